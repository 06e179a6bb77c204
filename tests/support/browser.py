"""A real headless Chromium that opens a page and says what happened in it.

It is driven through the DevTools protocol, whose own scripts run whatever the page's content
security policy says. All its traffic, that to loopback included, goes to a proxy that answers
nothing and writes down who was to be reached.
"""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-default-apps", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--remote-debugging-port=0", "--proxy-bypass-list=<-loopback>"),
)
_START_TIMEOUT_S = 30
_PAGE_TIMEOUT_S = 30


@dataclass
class PageSeen:
    """What became of a page: what was evaluated on it, and what it tried."""

    value: Any = None
    console: list[str] = field(default_factory=list)  # messages, and violations of the policy
    dialogs: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # URLs, without data: and the page itself
    screenshot: str = ""  # PNG, base64


def require_chromium(what: str) -> str:
    """The browser's path; skips the test, saying that `what` was not checked, if there is none."""
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip(
            f"not checked: {what}; there is no Chromium: run `make setup` as root on Debian or "
            "Ubuntu, or install one that is called " + " or ".join(_NAMES)
        )
    return path


class Browser:
    """A browser with an empty profile, for a `with` block."""

    def __init__(self, program: str, profile: Path) -> None:
        self._program = program
        self._profile = profile
        self._stack = contextlib.ExitStack()
        self.contacted: list[str] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            proxy = stack.enter_context(_recording_proxy(self.contacted))
            log = stack.enter_context((self._profile / "log").open("wb"))
            profile = f"--user-data-dir={self._profile / 'profile'}"
            process = subprocess.Popen(
                [self._program, *_FLAGS, profile, f"--proxy-server=http://{proxy}", "about:blank"],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            stack.callback(_end, process)
            self._port = self._wait_for_port(process)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(
        self,
        url: str,
        script: str,
        *,
        width_px: int = 1280,
        height_px: int = 800,
        dark: bool = False,
    ) -> PageSeen:
        """Load a page, evaluate an expression on it (a promise is awaited), and close it."""
        return asyncio.run(
            asyncio.wait_for(self._visit(url, script, width_px, height_px, dark), _PAGE_TIMEOUT_S)
        )

    async def _visit(
        self, url: str, script: str, width_px: int, height_px: int, dark: bool
    ) -> PageSeen:
        devtools = f"http://127.0.0.1:{self._port}/json"
        async with aiohttp.ClientSession() as http:
            async with http.put(f"{devtools}/new?about:blank") as answer:
                target = json.loads(await answer.text())
            async with http.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = _Tab(socket, url)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await tab.call(f"{domain}.enable")
                scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
                await tab.call("Emulation.setEmulatedMedia", features=[scheme])
                size = {"width": width_px, "height": height_px, "deviceScaleFactor": 1}
                await tab.call("Emulation.setDeviceMetricsOverride", **size, mobile=width_px < 600)
                return await tab.visit(script)

    def _wait_for_port(self, process: subprocess.Popen[bytes]) -> int:
        port_file = self._profile / "profile" / "DevToolsActivePort"
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not (port_file.exists() and port_file.read_text().count("\n")):
            if process.poll() is not None or time.monotonic() > deadline:
                log = (self._profile / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"Chromium did not start (code {process.returncode}):\n{log}")
            time.sleep(0.05)
        return int(port_file.read_text().splitlines()[0])


class _Tab:
    """One tab's DevTools session."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, url: str) -> None:
        self._socket = socket
        self._url = url
        self._numbers = itertools.count(1)
        self._is_loaded = False
        self.seen = PageSeen()

    async def visit(self, script: str) -> PageSeen:
        await self.call("Page.navigate", url=self._url)
        while not self._is_loaded:
            self._note(await self._socket.receive_json())
        arguments = {"awaitPromise": True, "returnByValue": True}
        answer = await self.call("Runtime.evaluate", expression=script, **arguments)
        assert "exceptionDetails" not in answer, answer
        self.seen.value = answer["result"].get("value")
        self.seen.screenshot = (await self.call("Page.captureScreenshot"))["data"]
        await self.call("Page.close")
        return self.seen

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        event, details = message.get("method"), message.get("params", {})
        if event == "Page.loadEventFired":
            self._is_loaded = True
        elif event == "Log.entryAdded":
            self.seen.console.append(details["entry"]["text"])
        elif event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.seen.console.append(json.dumps(details)[:1000])
        elif event == "Page.javascriptDialogOpening":
            self.seen.dialogs.append(details["message"])
        elif event == "Network.requestWillBeSent":
            self._note_request(details["request"]["url"])

    def _note_request(self, url: str) -> None:
        if url != self._url and not url.startswith("data:"):
            self.seen.requests.append(url)


@contextlib.contextmanager
def _recording_proxy(contacted: list[str]) -> Iterator[str]:
    """A proxy that writes down what it is asked for, and hangs up."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            contacted.append(self.rfile.readline(10_000).decode("latin-1").strip())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a browser with all its processes: they are a process group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
