"""Drives a page in headless Chromium over the DevTools protocol, as a user would."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

TIMEOUT_S = 30.0
KEYS = {
    "Enter": (13, "\r"),
    "Escape": (27, None),
    "Tab": (9, None),
    "Backspace": (8, None),
}
SHIFT = 8


def chromium() -> str:
    """The browser's path; skips the test where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("the chat page is tried in Chromium: apt-get install chromium")
    return found


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """One empty tab of a browser that nobody else uses. profile: an empty folder."""
    flags = [
        "--headless=new",
        "--no-sandbox",  # CI is root in a container, where Chromium's own sandbox cannot start
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--hide-scrollbars",
        "--lang=en-GB",
        # A screen without one has no mouse either, as far as style sheets are told.
        "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
        "--remote-debugging-port=0",
        f"--user-data-dir={profile}",
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([chromium(), *flags, "about:blank"], **quiet)
    try:
        with Tab(_debugger(process, profile)) as tab:
            yield tab
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)


def _debugger(process: subprocess.Popen[bytes], profile: Path) -> str:
    """Where the browser listens; it writes its port when it does."""
    file = profile / "DevToolsActivePort"
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "Chromium ended before it began"
        with suppress(OSError, ValueError, IndexError):
            return f"http://127.0.0.1:{int(file.read_text().splitlines()[0])}"
        time.sleep(0.02)
    raise AssertionError("Chromium did not start")


class Tab:
    """One page. problems: what the browser's console complained of."""

    def __init__(self, debugger: str) -> None:
        self.problems: list[str] = []
        self._debugger = debugger
        self._loop = asyncio.new_event_loop()
        self._ids = itertools.count(1)

    def __enter__(self) -> Tab:
        self._loop.run_until_complete(self._connect())
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.run_until_complete(self._session.close())
        self._loop.close()

    async def _connect(self) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"{self._debugger}/json") as reply:
            (page,) = [each for each in await reply.json() if each["type"] == "page"]
        self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        return self._loop.run_until_complete(
            asyncio.wait_for(self._call(method, parameters), TIMEOUT_S)
        )

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = json.loads(await self._socket.receive_str())
            self._note(message)
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]

    def _note(self, event: dict[str, Any]) -> None:
        name, given = event.get("method"), event.get("params", {})
        if name == "Runtime.exceptionThrown":
            self.problems.append(given["exceptionDetails"]["exception"].get("description", ""))
        elif name == "Log.entryAdded" and given["entry"]["level"] == "error":
            entry = given["entry"]
            self.problems.append(f"{entry['text']} {entry.get('url', '')}")
        elif name == "Runtime.consoleAPICalled" and given["type"] == "error":
            self.problems.append(str(given["args"]))

    # --- eyes ---

    def see(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        options = {"awaitPromise": True, "returnByValue": True}
        result = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str, timeout_s: float = TIMEOUT_S) -> Any:
        """The value as soon as it is true."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if value := self.see(expression):
                return value
            time.sleep(0.02)
        raise AssertionError(f"this did not come: {expression}; problems: {self.problems}")

    def find(self, selector: str, count: int = 1) -> None:
        """Return once so many elements are there."""
        self.wait(f"document.querySelectorAll({selector!r}).length == {count}")

    def text(self, selector: str) -> str:
        """What an element shows; "" if there is none."""
        return self.see(f"document.querySelector({selector!r})?.innerText ?? ''")

    def picture(self, file: Path) -> None:
        """Write what is seen as a PNG file."""
        shot = self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(shot["data"]))

    def look_as(self, width: int, height: int, scale: float = 1, **media: str) -> None:
        """Be a screen of this size. media: features such as prefers_color_scheme="dark"."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale}
        self.call("Emulation.setDeviceMetricsOverride", mobile=width < 600, **size)
        features = [{"name": n.replace("_", "-"), "value": value} for n, value in media.items()]
        self.call("Emulation.setEmulatedMedia", features=features)

    # --- hands ---

    def open(self, url: str) -> None:
        """Go to an address and wait for the page's scripts."""
        self.call("Page.navigate", url=url)
        self.wait("location.href != 'about:blank' && document.readyState == 'complete'")

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of an element that can be seen there."""
        where = f"""(() => {{
            const element = document.querySelector({selector!r});
            if (!element) return false;
            element.scrollIntoView({{block: "nearest"}});
            const box = element.getBoundingClientRect();
            const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
            return element.contains(document.elementFromPoint(x, y)) && {{x, y}};
        }})()"""
        place = self.wait(where)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def type(self, text: str) -> None:
        """Put text where the focus is, as an input method does."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press and release one key."""
        code, text = KEYS[key]
        given = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        typed = {"text": text} if text else {}
        kind = "keyDown" if text else "rawKeyDown"
        self.call("Input.dispatchKeyEvent", type=kind, **given, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def tab_to(self, condition: str, most: int = 40) -> None:
        """Press Tab until the focused element, `e`, fulfils a condition."""
        for _ in range(most):
            if self.see(f"(e => {condition})(document.activeElement)"):
                return
            self.press("Tab")
        raise AssertionError(f"Tab does not lead to {condition}")

    def choose(self, selector: str, files: Sequence[Path]) -> None:
        """Choose files in a file field, as its dialog would."""
        document = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def drop(self, files: Sequence[Path], x: int = 300, y: int = 300) -> None:
        """Drag files over the page and let them fall."""
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)
