// Keeps the apps live and handles keys. The page works without any of it.
"use strict";

const EVERY_MS = 1000;
const list = document.getElementById("apps");
const freshness = document.getElementById("freshness");
const freshnessText = document.getElementById("freshness-text");
let shown = "";
let turn = 0;

async function show() {
  const mine = ++turn;
  try {
    const answer = await fetch("/apps/list");
    if (!answer.ok) throw new Error(answer.statusText);
    const html = await answer.text();
    if (mine !== turn) return;   // an older answer must never replace a newer one
    if (asking()) return;        // what one is asked about stays as it is until it is answered
    if (html !== shown) replace(html);
    shown = html;
    freshness.className = "fresh";
    freshnessText.textContent = "Live, every second";
  } catch {
    freshness.className = "lost";
    freshnessText.textContent = "The server does not answer; trying again.";
  }
}

function asking() {
  return list.querySelector(":popover-open");
}

function replace(html) {
  const focused = list.contains(document.activeElement) ? document.activeElement.id : "";
  const opened = new Map([...list.querySelectorAll("details")].map((each) => [each.id, each.open]));
  const scrolled = [...list.querySelectorAll(".scroll")].map((each) => each.scrollLeft);
  list.innerHTML = html;         // made and escaped by the server, the same code as the whole page
  for (const each of list.querySelectorAll("details")) {
    if (opened.has(each.id)) each.open = opened.get(each.id);
  }
  list.querySelectorAll(".scroll").forEach((each, index) => { each.scrollLeft = scrolled[index] ?? 0; });
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

// What the server opened, for a page that had no JavaScript yet, is from now on a question like any other.
function adopt() {
  const open = list.querySelector(".sure.open");
  if (!open) return;
  open.classList.remove("open");
  open.popover = "auto";
  open.showPopover();
  history.replaceState(null, "", "/apps");
}

list.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (event.target.method === "get") {     // asks a question, or is its answer that nothing is to be done
    const question = document.getElementById(event.submitter?.value);
    if (question) question.showPopover();
    else asking()?.hidePopover();
    return;
  }
  const button = event.target.querySelector("button");
  button.disabled = true;
  asking()?.hidePopover();
  try {
    const answer = await fetch(event.target.action, { method: "POST", redirect: "manual" });
    if (answer.type !== "opaqueredirect" && !answer.ok) {
      freshnessText.textContent = (await answer.json()).detail;
      return;
    }
  } finally {
    button.disabled = false;
  }
  await show();
});

function current(apps) {
  return apps.findIndex((each) => each.contains(document.activeElement));
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || asking()) return;
  const apps = [...list.querySelectorAll(".app")];
  const at = current(apps);
  const chosen = apps[at] ?? apps[0];
  const key = event.key.toLowerCase();
  if (key === "j" || key === "k") {
    const next = Math.min(Math.max(at + (key === "j" ? 1 : -1), 0), apps.length - 1);
    apps[next]?.focus();
  } else if (key === "p" && chosen) {
    chosen.querySelector(".switch")?.click();
  } else if (key === "r" && chosen) {
    chosen.querySelector(".retry")?.click();
  } else if (key === "a" && chosen) {
    chosen.querySelector(".anew")?.click();
  } else if (key === "d" && chosen) {
    // Of the row that has the focus, else the first: the question names it.
    (document.activeElement.closest("tr") ?? chosen).querySelector(".drop")?.click();
  }
});

adopt();
setInterval(() => { if (!document.hidden) show(); }, EVERY_MS);
document.addEventListener("visibilitychange", () => { if (!document.hidden) show(); });
