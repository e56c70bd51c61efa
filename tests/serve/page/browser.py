"""A headless Chromium, driven over the DevTools protocol on two pipes: nothing to install, no port to open."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-extensions --disable-dev-shm-usage --mute-audio --remote-debugging-pipe"
).split()
PATIENCE_S = 60.0


class Browser:
    """One process; `open` gives tabs."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        theirs_in, self._out = _pipe()
        self._in, theirs_out = _pipe()

        def connect() -> None:
            # the browser reads commands from descriptor 3 and writes answers to descriptor 4
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        self._process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=connect,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._held = b""
        self._last = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: object) -> dict[str, Any]:
        """One command and its result; what happens meanwhile is kept in `events`."""
        self._last += 1
        message: dict[str, object] = {"id": self._last, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read(method)
            if found.get("id") == self._last:
                assert "error" not in found, f"{method}: {found['error']}"
                return found["result"]
            self.events.append(found)

    def person(self) -> str:
        """Storage of its own, as another user of the browser has."""
        return self.call("Target.createBrowserContext")["browserContextId"]

    def open(self, url: str, person: str, width: int = 1200, height: int = 800) -> "Tab":
        """A tab with a page, loaded."""
        target = self.call("Target.createTarget", url="about:blank", browserContextId=person)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, target, session, person)
        for domain in ("Page", "Runtime", "Log"):
            tab.call(f"{domain}.enable")
        tab.size(width, height)
        tab.go(url)
        return tab

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._in)
        os.close(self._out)

    def _read(self, what: str) -> dict[str, Any]:
        ends = time.monotonic() + PATIENCE_S
        while b"\0" not in self._held:
            ready = select.select([self._in], [], [], max(0.0, ends - time.monotonic()))[0]
            assert ready, f"the browser does not answer to {what}"
            piece = os.read(self._in, 1 << 16)
            assert piece, f"the browser ended during {what}"
            self._held += piece
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are neither of the two descriptors that the browser uses."""
    ends = os.pipe()
    above = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return above


class Tab:
    """A page: evaluate in it, type, press, look."""

    def __init__(self, browser: Browser, target: str, session: str, person: str) -> None:
        self.browser, self.target, self.session, self.person = browser, target, session, person

    def call(self, method: str, **params: object) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def go(self, url: str) -> None:
        """Load a page, and wait until its scripts have run."""
        self.call("Page.navigate", url=url)
        self.until(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def reload(self) -> None:
        self.js("window.isOld = true")
        self.call("Page.reload")
        self.until("!window.isOld && document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 20.0) -> Any:
        """Wait for an expression to be true, and return its value."""
        ends = time.monotonic() + seconds
        while True:
            try:
                value = self.js(expression)
            except AssertionError as error:
                # between two pages there is nothing to ask
                if "context" not in str(error).lower():
                    raise
                value = None
            if value:
                return value
            assert time.monotonic() < ends, (
                f"never true: {expression}; the page shows {self.js('document.body.innerText')!r}"
            )
            time.sleep(0.02)

    def write(self, text: str) -> None:
        """Type a text where the cursor is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """Press and release one key."""
        codes = {"Enter": 13, "Escape": 27, "/": 191, "Tab": 9}
        text = {"Enter": "\r", "/": "/"}.get(key)
        what: dict[str, object] = {"key": key, "windowsVirtualKeyCode": codes[key], "modifiers": 8 * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", **what, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **what)

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of an element."""
        box = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'nearest'});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = "none" if kind == "mouseMoved" else "left"
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button=button, clickCount=1)

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def colours(self, scheme: str) -> None:
        """Prefer "light" or "dark"."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path: Path) -> None:
        """A picture of what is seen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """Errors that the page ran into: exceptions, refused scripts, failed loads."""
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(event["params"]["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                found.append(event["params"]["entry"]["text"])
        return found

    def allow(self, *permissions: str) -> None:
        """Let the page do what a user would be asked for."""
        self.browser.call("Browser.grantPermissions", permissions=permissions, browserContextId=self.person)

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
