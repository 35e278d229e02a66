"""A headless Chromium that tests open pages in, driven over a pipe in the DevTools protocol."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--remote-debugging-pipe",
]
PATIENCE = 60  # seconds; a browser on busy cores takes some to start


class Browser:
    """A page in a browser of its own.

    Args:
        folder: an empty one, for what the browser keeps.

    Attributes:
        complaints: what the console was told as an error or a warning, and exceptions.
        requests: addresses that the page asked for.
    """

    def __init__(self, folder):
        self.complaints, self.requests = [], []
        self.numbers, self.answers, self.rest = itertools.count(1), {}, b""
        # Chromium reads commands from file 3 and answers on file 4.
        (read, self.commands), (self.replies, write) = os.pipe(), os.pipe()
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", *command],
            pass_fds=(read, write), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read), os.close(write)
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.commands)  # which ends it
        os.close(self.replies)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def call(self, method, **values):
        """What a command of the protocol answers."""
        number = next(self.numbers)
        message = dict(id=number, method=method, params=values)
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        self.wait(lambda: number in self.answers, method)
        answer = self.answers.pop(number)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def wait(self, done, what):
        """Read what the browser says until ``done()``."""
        end = time.monotonic() + PATIENCE
        while not done():
            ready, _, _ = select.select([self.replies], [], [], max(0, end - time.monotonic()))
            part = os.read(self.replies, 1 << 20) if ready else b""
            assert part, f"the browser does not answer to {what}"
            *messages, self.rest = (self.rest + part).split(b"\0")
            for message in map(json.loads, messages):
                self.hear(message)

    def hear(self, message):
        """Remember an answer, or what happened."""
        if "id" in message:
            self.answers[message["id"]] = message
            return
        kind, found = message["method"], message["params"]
        if kind == "Page.loadEventFired":
            self.loaded = True
        elif kind == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif kind == "Runtime.exceptionThrown":
            details = found["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif kind == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(found["args"]))
        elif kind == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.complaints.append(found["entry"]["text"])

    def open(self, path, width=1280, height=800, touch=False):
        """Load a file in a window of so many CSS pixels; what was heard before is forgotten."""
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.loaded, self.complaints[:], self.requests[:] = False, (), ()
        self.call("Page.navigate", url=path.as_uri())
        self.wait(lambda: self.loaded, "load the page")

    def js(self, expression):
        """The value of an expression of JavaScript on the page; promises are awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def box(self, selector, index=0):
        """Left, top, width and height of an element that a selector finds, in view."""
        element = f"document.querySelectorAll({json.dumps(selector)})[{index}]"
        return self.js(
            f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'nearest'}});"
            "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height] })()"
        )

    def mouse(self, x, y, click=False):
        """Move the mouse to a place, and click there."""
        for kind in ("mouseMoved", *(("mousePressed", "mouseReleased") if click else ())):
            button = dict(button="left", clickCount=1) if kind != "mouseMoved" else {}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def tap(self, x, y):
        """Touch a place with a finger."""
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[dict(x=x, y=y)])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def key(self, name, code):
        """Press a key, such as ArrowLeft, 37."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def screenshot(self):
        """The whole page as PNG."""
        options = dict(format="png", captureBeyondViewport=True)
        return base64.b64decode(self.call("Page.captureScreenshot", **options)["data"])
