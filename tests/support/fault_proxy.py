"""A reverse proxy before an S3 server that damages what passes, by rules, and notes what it did.

    rules = [Rule(Kind.CUT, target=r"\\.tar$", nth=(1,), after_bytes=5000)]
    with FaultProxy(server.url, rules) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        …
    assert [each.kind for each in proxy.exchanges].count(Kind.CUT) == 1

    with fault_proxy_process(server.url, rules) as proxy: …     # its CPU time is not the caller's

At most one rule strikes a request: the first that selects it. A rule selects by method, target and
ordinal, or a share of the requests. That share is drawn from the seed and from what is asked for
(and how often that was asked before), not from the order of arrival: runs repeat however their
threads interleave.

Requests reach the server as they are, the Host header too, which SigV4 signs. Connections are kept
alive on both sides, one to the server for each of the client's, so a client's pool is put to the
test. A thread a connection: receiving and sending release the GIL, and a fault is a plain wait.
"""

import contextlib
import hashlib
import re
import select
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from io import BufferedReader
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_BUFFER_BYTES = 2**18
_NO_BODY = (204, 304)
_DRIPS_PER_S = 20
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time
_BODY_OF = {
    500: b"<Error><Code>InternalError</Code><Message>We had an error.</Message></Error>",
    503: b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>",
}


class Kind(StrEnum):
    """What happens to a request. Where `after_bytes` counts, None means: before any answer."""

    REFUSE = "refuse"  # answered with `status`; the server never hears of it
    RESET = "reset"  # the connection is reset, after_bytes of the body
    CUT = "cut"  # the connection is closed in good order, after_bytes
    STALL = "stall"  # nothing for `seconds`, after_bytes; then it goes on
    DRIP = "drip"  # `bytes_per_s` of the body
    FLIP = "flip"  # all bits of the object's byte or bytes at `offset` turned over
    SHORTEN = "shorten"  # the body ends after_bytes, and its Content-Length says so
    DELAY = "delay"  # `seconds` before the request goes to the server


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which requests are struck, and how. What a kind does not use is ignored."""

    kind: Kind
    method: str = "GET"
    target: str = ""  # a regular expression that path and query hold somewhere
    nth: Collection[int] = ()  # of those requests, counted from 1; all unless given
    share: float = 1.0  # of those requests
    after_bytes: int | None = None  # of the body; of a shorter one, all but its last byte
    seconds: float = 3600.0
    bytes_per_s: float = 1.0
    offset: int | Collection[int] = 0
    status: int = 503

    def selects(self, request: "Request") -> bool:
        """Whether this may strike the request, before ordinal and share are looked at."""
        if request.method != self.method or not re.search(self.target, request.target):
            return False
        return self.kind is not Kind.FLIP or any(map(request.covers, self.offsets))

    @property
    def offsets(self) -> Collection[int]:
        """Of all bytes to turn over."""
        return (self.offset,) if isinstance(self.offset, int) else self.offset


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    method: str
    target: str  # path and query: /bucket/key?uploads
    first_byte: int = 0  # of the object, as its Range header says
    end_byte: int | None = None  # of the object; None: to its end

    def covers(self, offset: int) -> bool:
        """Whether a byte of the object is asked for."""
        return self.first_byte <= offset and (self.end_byte is None or offset < self.end_byte)


@dataclass
class Exchange:
    """A request and what became of it. `sent_bytes` of the body were handed to the client."""

    request: Request
    kind: Kind | None = None
    status: int = 0
    sent_bytes: int = 0
    time_s: float = 0.0  # of its arrival, on the monotonic clock


class FaultProxy:
    """Listens on loopback until the context ends, on a random port unless one is given.

    `rules` may be replaced at any time; ordinals are counted anew then. `exchanges` lists all
    requests in the order of their arrival.
    """

    def __init__(
        self, server_url: str, rules: Sequence[Rule] = (), *, seed: int = 0, port: int = 0
    ) -> None:
        server = urlsplit(server_url)
        assert server.hostname is not None
        assert server.port is not None
        self.exchanges: list[Exchange] = []
        self.num_connections = 0
        self.rules = rules
        self._seed = seed
        self._asked: Counter[Request] = Counter()
        self._lock = threading.Lock()
        self._listener = _Listener(port, (server.hostname, server.port), self)
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.02,))

    @property
    def port(self) -> int:
        """Where it listens; known before the context begins."""
        port = self._listener.server_address[1]
        assert isinstance(port, int)
        return port

    @property
    def url(self) -> str:
        """The endpoint for clients."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def rules(self) -> Sequence[Rule]:
        """What is done to whom; the first rule that selects a request wins."""
        return self._rules

    @rules.setter
    def rules(self, rules: Sequence[Rule]) -> None:
        self._rules = tuple(rules)
        self._selected = [0] * len(self._rules)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.shutdown()
        self._listener.hang_up()
        self._listener.server_close()
        self._thread.join()

    def count(self, kind: Kind) -> int:
        """How many requests were struck so."""
        return sum(exchange.kind is kind for exchange in list(self.exchanges))

    def receive(self, request: Request) -> tuple[Exchange, Rule | None]:
        """Note a request, and choose the rule that strikes it."""
        exchange = Exchange(request, time_s=time.monotonic())
        with self._lock:
            self.exchanges.append(exchange)
            self._asked[request] += 1
            rule = self._striking(request)
        if rule is not None:
            exchange.kind = rule.kind
        return exchange, rule

    def _striking(self, request: Request) -> Rule | None:
        for number, rule in enumerate(self._rules):
            if not rule.selects(request):
                continue
            self._selected[number] += 1
            in_turn = not rule.nth or self._selected[number] in rule.nth
            if in_turn and self._draw(number, request) < rule.share:
                return rule
        return None

    def _draw(self, rule: int, request: Request) -> float:
        """A number in [0, 1), the same whenever the same thing is asked for as often."""
        what = f"{self._seed} {rule} {request} {self._asked[request]}".encode()
        return int.from_bytes(hashlib.blake2b(what, digest_size=6).digest()) / 2**48


class FaultProxyProcess:
    """A FaultProxy in another process, as seen from here."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.url: str = pipe.recv()

    def exchanges(self) -> list[Exchange]:
        """All requests so far, in the order of their arrival."""
        self._pipe.send(None)
        found: list[Exchange] = self._pipe.recv()
        return found

    def replace_rules(self, rules: Sequence[Rule]) -> None:
        """See FaultProxy.rules. What was noted so far is forgotten."""
        self._pipe.send(tuple(rules))
        self._pipe.recv()


@contextlib.contextmanager
def fault_proxy_process(
    server_url: str, rules: Sequence[Rule] = (), *, seed: int = 0
) -> Iterator[FaultProxyProcess]:
    """A FaultProxy in a process of its own, which ends with the context or with the caller."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, server_url, rules, seed), daemon=True)
    process.start()
    there.close()
    try:
        yield FaultProxyProcess(here)
    finally:
        here.close()  # which tells it to end
        process.join(10)
        process.close()


def _serve(pipe: Connection, server_url: str, rules: Sequence[Rule], seed: int) -> None:
    with FaultProxy(server_url, rules, seed=seed) as proxy, contextlib.suppress(EOFError):
        pipe.send(proxy.url)
        while True:
            fresh = pipe.recv()
            if fresh is not None:
                proxy.rules = fresh
                proxy.exchanges.clear()
            pipe.send(list(proxy.exchanges))


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, port: int, server: tuple[str, int], proxy: FaultProxy) -> None:
        super().__init__(("127.0.0.1", port), _Client)
        self.server = server
        self.proxy = proxy
        self._clients: set[socket.socket] = set()
        self._lock = threading.Lock()

    def hang_up(self) -> None:
        """End all connections, whatever their threads wait for."""
        with self._lock:
            for client in self._clients:
                with contextlib.suppress(OSError):  # it has gone already
                    client.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def serving(self, client: socket.socket) -> Iterator[None]:
        """Keep a connection in mind while it is served."""
        with self._lock:
            self._clients.add(client)
            self.proxy.num_connections += 1
        try:
            yield
        finally:
            with self._lock:
                self._clients.remove(client)


class _HangUpError(Exception):
    """The client's connection is to be closed."""


@dataclass(frozen=True)
class _Head:
    """First line and headers of a request or an answer."""

    raw: bytes

    @property
    def words(self) -> list[str]:
        return self.raw.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)

    def get(self, name: bytes) -> str:
        found = re.search(rb"\r\n" + name + rb": *([^\r]*)", self.raw, re.IGNORECASE)
        return found[1].decode("latin-1") if found else ""

    @property
    def length_bytes(self) -> int:
        return int(self.get(b"content-length") or 0)

    @property
    def is_chunked(self) -> bool:
        return self.get(b"transfer-encoding").lower() == "chunked"

    def without(self, name: bytes) -> "_Head":
        return _Head(re.sub(rb"\r\n" + name + rb":[^\r]*", b"", self.raw, flags=re.IGNORECASE))

    def with_length(self, length_bytes: int) -> "_Head":
        end = b"\r\nContent-Length: %d\r\n\r\n" % length_bytes
        return _Head(self.without(b"content-length").raw.removesuffix(b"\r\n\r\n") + end)


class _Server:
    """The connection to the real server that belongs to one client's."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def close(self) -> None:
        self.file.close()
        self.socket.close()


class _Client(socketserver.StreamRequestHandler):
    """One client's connection, request after request."""

    server: _Listener
    rfile: BufferedReader
    disable_nagle_algorithm = True

    def handle(self) -> None:
        self._server: _Server | None = None
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        quiet = contextlib.suppress(OSError, ValueError, _HangUpError)  # either side has gone
        with self.server.serving(self.connection), quiet:
            while (head := _read_head(self.rfile)) is not None:
                self._answer(head)

    def finish(self) -> None:
        if self._server is not None:
            self._server.close()
        with contextlib.suppress(OSError):
            super().finish()

    def _answer(self, head: _Head) -> None:
        self._exchange, self._rule = self.server.proxy.receive(_request_of(head))
        if head.get(b"expect"):
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.rfile.read(head.length_bytes)
        if self._rule is not None and self._rule.after_bytes is None:
            self._strike_before()
        answer = self._ask(head, body)
        self._exchange.status = int(answer.words[1])
        self._relay(answer, has_body=head.words[0] != "HEAD")

    def _strike_before(self) -> None:
        """Faults that need no answer of the server's."""
        rule = self._rule
        assert rule is not None
        if rule.kind in (Kind.STALL, Kind.DELAY):
            self._wait(rule.seconds)
        elif rule.kind is Kind.RESET:
            self._reset()
        elif rule.kind is Kind.CUT:
            raise _HangUpError
        elif rule.kind is Kind.REFUSE:
            self._refuse(rule.status)

    def _refuse(self, status: int) -> None:
        self._exchange.status = status
        body = _BODY_OF.get(status, b"")
        head = b"HTTP/1.1 %d Fault\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
        self.wfile.write(head % (status, len(body)) + body)
        raise _HangUpError

    def _reset(self) -> None:
        # What was sent before must have reached the client: a reset discards what is in flight.
        time.sleep(0.01)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.rfile.close()
        self.connection.close()
        raise _HangUpError

    def _wait(self, seconds: float) -> None:
        """Wait, but not longer than the client does."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if poll.poll(seconds * 1000):
            raise _HangUpError

    def _ask(self, head: _Head, body: bytes) -> _Head:
        if self._server is None:
            self._server = _Server(self.server.server)
        self._server.socket.sendall(head.without(b"expect").raw + body)
        answer = _read_head(self._server.file)
        if answer is None:
            raise _HangUpError
        return answer

    def _relay(self, answer: _Head, *, has_body: bool) -> None:
        if not has_body or int(answer.words[1]) in _NO_BODY:
            self.wfile.write(answer.raw)
        elif answer.is_chunked:
            self.wfile.write(answer.raw)
            self._relay_chunks()
        else:
            self._relay_body(answer)
        if answer.get(b"connection").lower() == "close":
            raise _HangUpError

    def _relay_chunks(self) -> None:
        assert self._server is not None
        source, size = self._server.file, -1
        while size != 0:
            line = source.readline()
            size = int(line.split(b";")[0], 16)
            self.wfile.write(line + source.read(size + 2))

    def _relay_body(self, answer: _Head) -> None:
        rule, length = self._rule, answer.length_bytes
        if rule is None or rule.kind in (Kind.REFUSE, Kind.DELAY):
            self.wfile.write(answer.raw)
            self._pass_on(length)
        elif rule.kind is Kind.SHORTEN:
            self._shorten(answer, _inside(rule.after_bytes or 0, length))
        else:
            self.wfile.write(answer.raw)
            self._damage(rule, length)

    def _shorten(self, answer: _Head, kept_bytes: int) -> None:
        assert self._server is not None
        self.wfile.write(answer.with_length(kept_bytes).raw)
        self._pass_on(kept_bytes)
        left = answer.length_bytes - kept_bytes
        while left:
            left -= len(self._server.file.read(min(left, _BUFFER_BYTES)))

    def _damage(self, rule: Rule, length: int) -> None:
        if rule.kind is Kind.DRIP:
            self._drip(rule.bytes_per_s, length)
        elif rule.kind is Kind.FLIP:
            self._flip(rule.offsets, length)
        elif rule.after_bytes is None:  # a stall before the answer, which is over
            self._pass_on(length)
        else:
            sent = _inside(rule.after_bytes, length)
            self._pass_on(sent)
            self._break_off(rule)
            self._pass_on(length - sent)

    def _break_off(self, rule: Rule) -> None:
        if rule.kind is Kind.RESET:
            self._reset()
        elif rule.kind is Kind.CUT:
            raise _HangUpError
        self._wait(rule.seconds)

    def _flip(self, offsets: Collection[int], length: int) -> None:
        assert self._server is not None
        first_byte, sent = self._exchange.request.first_byte, 0
        for place in sorted(offset - first_byte for offset in offsets):
            if sent <= place < length:  # of this range
                self._pass_on(place - sent)
                self.wfile.write(bytes([self._server.file.read(1)[0] ^ 0xFF]))
                self._exchange.sent_bytes += 1
                sent = place + 1
        self._pass_on(length - sent)

    def _drip(self, bytes_per_s: float, length: int) -> None:
        drop_bytes = max(1, round(bytes_per_s / _DRIPS_PER_S))
        while length:
            dropped = min(drop_bytes, length)
            self._wait(dropped / bytes_per_s)
            self._pass_on(dropped)
            length -= dropped

    def _pass_on(self, length: int) -> None:
        """So many bytes of the body from the server to the client."""
        assert self._server is not None
        while length:
            received = self._server.file.readinto1(self._buffer[: min(length, _BUFFER_BYTES)])
            if not received:
                raise _HangUpError
            self._exchange.sent_bytes += received
            self.connection.sendall(self._buffer[:received])
            length -= received


def _read_head(file: BufferedReader) -> _Head | None:
    """First line, headers and the empty line; None at the connection's end."""
    lines = []
    while (line := file.readline()) != b"\r\n":
        if not line.endswith(b"\r\n"):
            return None
        lines.append(line)
    return _Head(b"".join([*lines, line]))


def _request_of(head: _Head) -> Request:
    method, target, _ = head.words
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", head.get(b"range"))
    if asked is None:
        return Request(method, target)
    return Request(method, target, int(asked[1]), int(asked[2]) + 1 if asked[2] else None)


def _inside(after_bytes: int, length: int) -> int:
    return max(0, min(after_bytes, length - 1))
