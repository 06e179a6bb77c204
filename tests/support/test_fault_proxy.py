"""Every fault as a plain client sees it, and that what is not struck passes as it is."""

import http.client
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.support.fault_proxy import FaultProxy, Kind, Rule, fault_proxy_process
from tests.support.http_server import HttpServer, Page

BODY = bytes(range(256)) * 4096  # 1 MiB
TIMEOUT_S = 10


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with HttpServer({"/a": BODY, "/chunks": Page(BODY[:1000], chunked=True)}) as server:
        yield server


class Client:
    """One connection that is kept alive."""

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout_s)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The next request opens a new connection."""
        self._connection.close()

    def get(self, path: str = "/a", **headers: str) -> bytes:
        self._connection.request("GET", path, headers=headers)
        with self._connection.getresponse() as answer:
            body = answer.read()
        assert answer.status == 200, answer.status
        return body


def struck(server: HttpServer, **fields) -> FaultProxy:
    return FaultProxy(server.url(""), [Rule(**{"nth": (1,), **fields})])


def test_what_is_not_struck_passes_on_one_connection(server):
    with FaultProxy(server.url("")) as proxy, Client(proxy.url) as client:
        assert [client.get() for _ in range(3)] == [BODY] * 3
        assert client.get("/chunks") == BODY[:1000]
        with pytest.raises(AssertionError, match="404"):
            client.get("/none")
        assert proxy.num_connections == 1
        assert [each.status for each in proxy.exchanges] == [200, 200, 200, 200, 404]
        assert proxy.exchanges[0].sent_bytes == len(BODY)


def test_a_refusal_never_reaches_the_server(server):
    asked = len(server.requests)
    with struck(server, kind=Kind.REFUSE) as proxy, Client(proxy.url) as client:
        with pytest.raises(AssertionError, match="503"):
            client.get()
        assert len(server.requests) == asked
        assert client.get() == BODY
        assert proxy.count(Kind.REFUSE) == 1


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"kind": Kind.RESET}, ConnectionResetError),
        ({"kind": Kind.RESET, "after_bytes": 300_000}, ConnectionResetError),
        ({"kind": Kind.CUT}, http.client.RemoteDisconnected),
        ({"kind": Kind.CUT, "after_bytes": 5}, http.client.IncompleteRead),
        ({"kind": Kind.CUT, "after_bytes": 2**40}, http.client.IncompleteRead),
    ],
)
def test_broken_connections(server, fields, error):
    with struck(server, **fields) as proxy, Client(proxy.url) as client:
        with pytest.raises(error):
            client.get()
        client.close()
        assert client.get() == BODY
        sent = [exchange.sent_bytes for exchange in proxy.exchanges]
        assert sent == [min(fields.get("after_bytes", 0), len(BODY) - 1), len(BODY)]


@pytest.mark.parametrize("after_bytes", [None, 70_000])
def test_a_stall_outlasts_the_client_or_ends(server, after_bytes):
    fields = {"kind": Kind.STALL, "after_bytes": after_bytes}
    with struck(server, **fields) as proxy, Client(proxy.url, timeout_s=0.2) as client:
        with pytest.raises(TimeoutError):
            client.get()
        assert proxy.exchanges[0].sent_bytes == (after_bytes or 0)
    with struck(server, **fields, seconds=0.2) as proxy, Client(proxy.url) as client:
        began = time.monotonic()
        assert client.get() == BODY
        assert time.monotonic() - began >= 0.2


def test_a_stalled_proxy_ends_all_the_same(server):
    with struck(server, kind=Kind.STALL) as proxy, Client(proxy.url) as client:
        client._connection.request("GET", "/a")
        while not proxy.exchanges:
            time.sleep(0.01)


def test_drip_and_delay_take_their_time(server):
    slow = 5 * len(BODY)
    for fields in ({"kind": Kind.DRIP, "bytes_per_s": slow}, {"kind": Kind.DELAY, "seconds": 0.2}):
        with struck(server, **fields) as proxy, Client(proxy.url) as client:
            began = time.monotonic()
            assert client.get() == BODY
            assert time.monotonic() - began >= 0.19


def test_flips_hit_those_requests_that_ask_for_the_bytes(server):
    fields = {"kind": Kind.FLIP, "offset": (1000, 2**40, 0), "nth": ()}
    with struck(server, **fields) as proxy, Client(proxy.url) as client:
        body = client.get()
        assert [i for i in range(len(BODY)) if body[i] != BODY[i]] == [0, 1000]
        assert client.get(Range="bytes=1001-2000") == BODY  # this server knows no ranges
        assert proxy.count(Kind.FLIP) == 1


def test_a_short_body_looks_whole(server):
    with struck(server, kind=Kind.SHORTEN, after_bytes=999) as proxy, Client(proxy.url) as client:
        assert client.get() == BODY[:999]
        assert client.get() == BODY


def test_rules_select_by_ordinal_target_and_share(server):
    rules = [
        Rule(kind=Kind.REFUSE, target="^/chunks$"),
        Rule(kind=Kind.CUT, nth=(2,)),
        Rule(kind=Kind.SHORTEN, after_bytes=1, share=0.3),
    ]

    def kinds(seed: int) -> list[Kind | None]:
        with FaultProxy(server.url(""), rules, seed=seed) as proxy, Client(proxy.url) as client:
            for path in ["/a", "/a", "/chunks", *["/a"] * 100]:
                try:
                    client.get(path)
                except (http.client.HTTPException, AssertionError):
                    client.close()
            return [each.kind for each in proxy.exchanges]

    first = kinds(1)
    assert first[1:3] == [Kind.CUT, Kind.REFUSE]
    assert 15 <= first.count(Kind.SHORTEN) <= 45
    assert kinds(1) == first
    assert kinds(2) != first


def test_a_proxy_in_a_process_of_its_own(server):
    with fault_proxy_process(server.url("")) as proxy, Client(proxy.url) as client:
        assert client.get() == BODY
        assert [each.request.target for each in proxy.exchanges()] == ["/a"]
        proxy.replace_rules([Rule(kind=Kind.SHORTEN, after_bytes=7)])
        assert client.get() == BODY[:7]
        assert [each.kind for each in proxy.exchanges()] == [Kind.SHORTEN]
