"""A real Chromium without a window, and pages for it to open, each at an origin of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import threading
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import websockets

from tests.polyglot.programs import LIMIT, started, tool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

HEADLESS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--no-first-run",
    "--no-proxy-server",
    # Of itself it would ask for updates, and for much else.
    "--disable-background-networking",
    "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
"""The flags of a Chromium without a window, in a container too, that speaks to this machine only."""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nobody reads which files were sent."""


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The origin of a server with the pages of a folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Page:
    """An open page.

    Attributes:
        reports: What its script has sent with `report`, in order.
    """

    _socket: websockets.ClientConnection
    _session: str | None = None
    reports: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    _replies: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    async def call(self, function: str, *arguments: object) -> Any:  # noqa: ANN401 -- what the function returns
        """Call a function of the page's script and wait for what it returns, a promise's value included."""
        given = ", ".join(map(json.dumps, arguments))
        result = await self.send(
            "Runtime.evaluate", expression=f"{function}({given})", awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def send(self, method: str, **parameters: object) -> dict[str, Any]:
        """Send a command of the DevTools protocol and wait for its result."""
        number = next(self._numbers)
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        await self._socket.send(json.dumps(message))
        async with asyncio.timeout(LIMIT):
            result: dict[str, Any] = await reply
        return result

    async def open(self, url: str) -> None:
        """Open a page, until its script reports that it is ready."""
        target = (await self.send("Target.createTarget", url="about:blank"))["targetId"]
        self._session = (await self.send("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        await self.send("Runtime.enable")
        await self.send("Runtime.addBinding", name="report")
        await self.send("Page.navigate", url=url)
        async with asyncio.timeout(LIMIT):
            assert await self.reports.get() == "ready"

    async def receive(self) -> None:
        """Take what the browser sends, until it ends."""
        async for text in self._socket:
            message = json.loads(text)
            if "id" in message:
                reply = self._replies.pop(message["id"])
                if "error" in message:
                    reply.set_exception(AssertionError(message["error"]))
                elif not reply.cancelled():
                    reply.set_result(message["result"])
            elif message["method"] == "Runtime.bindingCalled":
                self.reports.put_nowait(message["params"]["payload"])


@contextlib.asynccontextmanager
async def page(folder: Path, url: str) -> AsyncIterator[Page]:
    """A Chromium with this page open."""
    profile, log = folder / "chromium", folder / "chromium.log"
    with log.open("wb") as output:
        async with started(
            # A port that it finds free; it writes it to a file.
            *(tool("chromium"), *HEADLESS, "--remote-debugging-port=0", f"--user-data-dir={profile}"),
            home=folder,
            out=output,
            err=output,
        ) as run:
            port_file = profile / "DevToolsActivePort"
            async with asyncio.timeout(LIMIT):
                while not (port_file.exists() and port_file.read_text().count("\n")):
                    assert run.returncode is None, log.read_text(errors="replace")
                    await asyncio.sleep(0.02)
            port, path = port_file.read_text().split()
            async with websockets.connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None) as socket:
                opened = Page(socket)
                receiving = asyncio.create_task(opened.receive())
                try:
                    await opened.open(url)
                    yield opened
                finally:
                    receiving.cancel()
                    await asyncio.wait([receiving])
