"""Headless Chromium, driven over its DevTools protocol through a pipe: no driver, no port, no further package."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = [
    "--headless=new",
    "--no-sandbox",  # it refuses root otherwise
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
]


class Page:
    """A tab. ``events`` has everything that the browser told about it, such as requests and errors of the console."""

    def __init__(self, process, to, of):
        self.process, self.to, self.of = process, to, of
        self.rest, self.number, self.events, self.session = b"", 0, [], None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **params):
        """Call a method of the protocol and return its result."""
        self.number += 1
        message = dict(id=self.number, method=method, params=params) | (dict(sessionId=self.session) if self.session else {})
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _read(self):
        while b"\0" not in self.rest:
            part = os.read(self.of, 1 << 20)
            assert part, "chromium ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, path, width, dark=False):
        """Load a file in a window so many pixels wide."""
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + 60
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < deadline, "not loaded after a minute"
            self.events.append(self._read())

    def value(self, expression):
        """Of a JavaScript expression, by the page's content security policy untouched."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def requests(self):
        return [event["params"]["request"]["url"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]

    def complaints(self):
        return [e for e in self.events if e.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")]


@contextmanager
def browser():
    """A page of a new browser with a new profile, ended afterwards."""
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # the protocol's pipe is file descriptors 3 and 4 of the browser
        wiring = f'exec {CHROMIUM} "$@" 3<&{in_read} 4>&{out_write}'
        process = subprocess.Popen(
            ["bash", "-c", wiring, "chromium", *OPTIONS, f"--user-data-dir={profile}"],
            pass_fds=(in_read, out_write),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(in_read)
        os.close(out_write)
        try:
            yield Page(process, in_write, out_read)
        finally:
            os.close(in_write)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
            os.close(out_read)
