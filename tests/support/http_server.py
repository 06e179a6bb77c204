"""A real HTTP server on loopback, well behaved or not, for tests and benches.

    with HttpServer({"/a.jpg": data, "/gone": Page(status=404)}) as server:
        fetch(server.url("/a.jpg"))
        server.requests, server.most_active("/")

    with http_server_process({"/a.jpg": data}) as url: …    # one in a process of its own

What a page does wrong is said by its fields. A path with a list of pages answers with one after
the other, the last one from then on. It costs little: a plain page is one write of ready bytes.
"""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

Headers = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Page:
    """An answer."""

    body: bytes = b""
    status: int = 200
    headers: Headers = ()
    length: int | None = None  # announced; by default the body's
    chunked: bool = False  # nothing is announced
    wait_s: float = 0.0  # before anything is sent
    drip_s: float = 0.0  # between the single bytes, of the headers too unless drip_body
    drip_body: bool = False
    endless: bool = False  # the body is sent again and again
    hang_up: bool = False  # no answer: the connection is closed


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    path: str
    headers: dict[str, str] = field(default_factory=dict)  # names in lower case
    time_s: float = 0.0  # of the server's clock


Pages = Mapping[str, bytes | Page | Sequence[Page]]


class HttpServer:
    """Serves pages from a thread until the context ends.

    `requests` lists what was asked for, unless `record` is false.
    """

    def __init__(
        self, pages: Pages, *, hosts: Sequence[str] = ("127.0.0.1",), record: bool = True
    ) -> None:
        self.requests: list[Request] = []
        self.num_connections = 0
        self._active: Counter[str] = Counter()
        self._most_active: Counter[str] = Counter()
        self._record = record
        self._hosts = hosts
        self._pages = {path: _as_list(page) for path, page in pages.items()}
        self._ready_bytes = {
            path: _head(pages[0]) + pages[0].body
            for path, pages in self._pages.items()
            if len(pages) == 1 and _is_plain(pages[0])
        }

    def __enter__(self) -> Self:
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)))
        self._thread.start()
        assert started.wait(10), "the server did not start"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def url(self, path: str, host: str = "") -> str:
        """The URL of a path, by another of the server's names if need be."""
        return f"http://{host or self._hosts[0]}:{self.port}{path}"

    def add(self, path: str, page: Page) -> None:
        """One more page."""
        self._pages[path] = [page]

    def paths(self) -> list[str]:
        """The paths that were asked for, in order."""
        return [request.path for request in self.requests]

    def most_active(self, prefix: str = "/") -> int:
        """How many requests were at most being answered at once, of paths /prefix/…"""
        return self._most_active[prefix]

    def answer(self, path: str) -> Page:
        """The page whose turn it is at a path."""
        pages = self._pages.get(path)
        if not pages:
            return Page(b"nothing there", status=404)
        return pages.pop(0) if len(pages) > 1 else pages[0]

    async def _serve(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.connections: set[_Connection] = set()
        first, *others = self._hosts
        servers = [await self._loop.create_server(lambda: _Connection(self), first, 0, backlog=999)]
        self.port: int = servers[0].sockets[0].getsockname()[1]
        for host in others:
            servers.append(
                await self._loop.create_server(lambda: _Connection(self), host, self.port)
            )
        started.set()
        await self._stop.wait()
        for server in servers:
            server.close()
        for connection in list(self.connections):
            connection.end()
        await asyncio.sleep(0)

    def begin(self, path: str, lines: Sequence[str]) -> None:
        """Count a request that came in."""
        headers = dict(line.split(": ", 1) for line in lines)
        self.requests.append(
            Request(path, {n.lower(): v for n, v in headers.items()}, self._loop.time())
        )
        for prefix in _prefixes(path):
            self._active[prefix] += 1
            self._most_active[prefix] = max(self._most_active[prefix], self._active[prefix])

    def done(self, path: str) -> None:
        """Count a request that is answered."""
        for prefix in _prefixes(path):
            self._active[prefix] -= 1

    def receive(self, connection: "_Connection", head: bytes) -> None:
        """Answer a request."""
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path = first.split(" ")[:2]
        if method == "HEAD":
            pages = self._pages.get(path) or [Page(status=404)]
            connection.transport.write(_head(pages[0]))
            return
        ready = self._ready_bytes.get(path)
        if ready is not None and not self._record:
            connection.transport.write(ready)
            return
        self.begin(path, lines)
        connection.task = self._loop.create_task(self._answer(connection, path))

    async def _answer(self, connection: "_Connection", path: str) -> None:
        page = self.answer(path.partition("?")[0])
        last = contextlib.ExitStack()
        last.callback(self.done, path)
        with last:
            await connection.send(page, last.close)


class _Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._buffer = b""
        self._writable = asyncio.Event()
        self._writable.set()
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._server.connections.add(self)
        self._server.num_connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._writable.set()
        if self.task:
            self.task.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
            self._server.receive(self, head)
            if b"\r\nconnection: close" in head.lower():
                self._close_when_sent()

    def end(self) -> None:
        """Close the connection at once."""
        if self.task:
            self.task.cancel()
        self.transport.abort()

    async def send(self, page: Page, on_last: Callable[[], None]) -> None:
        """Answer with a page; `on_last` is called before the client can know that it has all."""
        await asyncio.sleep(page.wait_s)
        if page.hang_up:
            self.transport.abort()
            return
        body = _chunk(page.body) if page.chunked else page.body
        head = _head(page)
        if not page.endless:
            body += b"0\r\n\r\n" if page.chunked else b""
            if not page.drip_s:
                on_last()
        await self._write(head, 0.0 if page.drip_body else page.drip_s)
        await self._write(body, page.drip_s)
        while page.endless:
            await self._write(body, page.drip_s)
        if page.length is not None and page.length != len(page.body):
            self.transport.close()

    async def _write(self, data: bytes, drip_s: float) -> None:
        if not drip_s:
            self.transport.write(data)
            await self._writable.wait()
            await asyncio.sleep(0)
            return
        for byte in data:
            self.transport.write(bytes([byte]))
            await asyncio.sleep(drip_s)

    def _close_when_sent(self) -> None:
        if self.task:
            self.task.add_done_callback(lambda _: self.transport.close())
        else:
            self.transport.close()


@contextlib.contextmanager
def http_server_process(pages: Pages) -> Iterator[str]:
    """An HttpServer in a process of its own, which records nothing; yields "http://host:port"."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve_pages, args=(there, dict(pages)), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        here.close()  # which tells it to end
        there.close()
        process.join(10)
        process.close()


def _serve_pages(pipe: Connection, pages: Pages) -> None:
    with HttpServer(pages, record=False) as server:
        pipe.send(server.url(""))
        with contextlib.suppress(EOFError):
            pipe.recv()


def _as_list(page: bytes | Page | Sequence[Page]) -> list[Page]:
    if isinstance(page, bytes):
        return [Page(page)]
    return [page] if isinstance(page, Page) else list(page)


def _is_plain(page: Page) -> bool:
    return page == Page(page.body, page.status, page.headers)


def _head(page: Page) -> bytes:
    lines = [f"HTTP/1.1 {page.status} {_phrase(page.status)}"]
    if page.chunked:
        lines.append("Transfer-Encoding: chunked")
    elif not page.endless:
        lines.append(f"Content-Length: {len(page.body) if page.length is None else page.length}")
    lines += [f"{name}: {value}" for name, value in page.headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in set(HTTPStatus) else "Odd"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _prefixes(path: str) -> set[str]:
    return {"/", f"/{path.split('/')[1]}/"} if path.count("/") > 1 else {"/"}
