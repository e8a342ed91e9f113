// Results while typing, keys, and the freshness line. The page works without any of it.
"use strict";

const WAIT_MS = 70;          // between the last key and the question: about the time between two keys
const FRESHNESS_MS = 2000;
const input = document.getElementById("q");
const results = document.getElementById("results");
let timer = 0;
let asked = new AbortController();

async function show(query) {
  asked.abort();             // an older answer must never replace a newer one
  asked = new AbortController();
  const { signal } = asked;
  const busy = setTimeout(() => results.setAttribute("aria-busy", "true"), 250);
  try {
    const answer = await fetch("/results?q=" + encodeURIComponent(query), { signal });
    if (!answer.ok) throw new Error(answer.statusText);
    const html = await answer.text();
    if (signal.aborted) return;
    results.innerHTML = html;  // made and escaped by the server, the same code as the whole page
    const address = query ? "/?q=" + encodeURIComponent(query) : "/";
    history.replaceState(null, "", address);
  } catch (error) {
    if (error.name !== "AbortError") lost();
  } finally {
    clearTimeout(busy);
    if (!signal.aborted) results.removeAttribute("aria-busy");
  }
}

input.addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(() => show(input.value.trim()), WAIT_MS);
});

document.getElementById("search").addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(timer);
  show(input.value.trim());
});

function hits() {
  return [...results.querySelectorAll("summary")];
}

function move(step) {
  const all = hits();
  const next = all.indexOf(document.activeElement) + step;  // -1 + 1: from the box to the first hit
  if (next < 0) input.focus();
  else if (next < all.length) all[next].focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const inBox = document.activeElement === input;
  if (event.key === "/" && !inBox) {
    event.preventDefault();
    input.focus();
    input.select();
  } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    move(event.key === "ArrowDown" ? 1 : -1);
  } else if (event.key === "Escape") {
    event.preventDefault();
    input.focus();
    if (input.value) {
      input.value = "";
      show("");
    }
  } else if (event.key === "Enter" && inBox && hits().length) {
    event.preventDefault();
    const first = hits()[0];
    first.parentElement.open = !first.parentElement.open;
    first.focus();
  }
});

const freshness = document.getElementById("freshness");
const freshnessText = document.getElementById("freshness-text");
let wasReady = !freshness.classList.contains("empty");

function lost() {
  freshness.className = "lost";
  freshnessText.textContent = "The search server does not answer; trying again.";
}

async function refresh() {
  if (!document.hidden) {
    try {
      const status = await (await fetch("/api/status")).json();
      freshness.className = !status.is_ready ? "empty" : status.lag_changes ? "behind" : "fresh";
      freshnessText.textContent = status.text;
      if (status.is_ready !== wasReady) show(input.value.trim());  // the first documents have come
      wasReady = status.is_ready;
    } catch {
      lost();
    }
  }
  setTimeout(refresh, FRESHNESS_MS);
}

setTimeout(refresh, FRESHNESS_MS);
