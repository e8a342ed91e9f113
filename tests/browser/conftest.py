"""A real browser, driven through its own WebDriver server over HTTP."""

import base64
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deltaworks.testing.postgres import free_port

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key under which the W3C WebDriver standard hands out an element's id."""


class Browser:
    """The few WebDriver calls that the page tests need."""

    def __init__(self, client: httpx.Client, session: str) -> None:
        self._client = client
        self._path = f"/session/{session}"

    def open(self, url: str) -> None:
        self._post("/url", {"url": url})

    def run(self, script: str) -> Any:
        """Run JavaScript in the page; `return …` gives its value."""
        return self._post("/execute/sync", {"script": script, "args": []})

    def press(self, *keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._post("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def text(self) -> str:
        """All visible text."""
        return str(self.run("return document.body.innerText"))

    def wait(self, condition: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"still not so on the page:\n{self.text()[:2000]}"
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        answer = self._client.get(f"{self._path}/screenshot").json()
        path.write_bytes(base64.b64decode(answer["value"]))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self._client.post(self._path + path, json=body)
        assert answer.is_success, answer.text
        return answer.json()["value"]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    assert driver, "chromedriver is missing; run tests/servers/install.sh"
    port = free_port()
    with (tmp_path / "chromedriver.log").open("wb") as log:
        process = subprocess.Popen([driver, f"--port={port}"], stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            deadline = time.monotonic() + 20
            while True:
                try:
                    if client.get("/status").json()["value"]["ready"]:
                        break
                except httpx.TransportError:
                    assert time.monotonic() < deadline, "chromedriver does not answer"
                time.sleep(0.05)
            arguments = [
                "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--window-size=1400,1000", f"--user-data-dir={tmp_path / 'profile'}",
            ]  # fmt: skip
            wanted = {"browserName": "chrome", "goog:chromeOptions": {"args": arguments}}
            answer = client.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
            assert answer.is_success, answer.text
            session = answer.json()["value"]["sessionId"]
            yield Browser(client, session)
            client.delete(f"/session/{session}")
    finally:
        process.terminate()
        process.wait(10)
