"""Downloading from real servers on loopback, well behaved and not."""

import asyncio
import gzip
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from email.utils import formatdate
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SampleError, UsageError
from shard_tools import addresses, crawl, request
from shard_tools.addresses import ForbiddenAddressError, Resolver, is_public
from shard_tools.crawl import Crawl
from shard_tools.download import DownloadSettings
from shard_tools.downloader import Downloader
from shard_tools.hosts import HostQueue
from tests.support.http_server import HttpServer, Page, Pages

MAX_BYTES = 1_000_000
OPEN = DownloadSettings(allow_private=True, timeout_s=20)
Outcome = bytes | SampleError


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crawl, "_FIRST_PAUSE_S", 0.02)


def settings(**values: object) -> DownloadSettings:
    return DownloadSettings(**{"allow_private": True, "timeout_s": 20.0, **values})  # type: ignore[arg-type]


def fetch(urls: Sequence[str], how: DownloadSettings = OPEN) -> list[Outcome]:
    with Downloader(how, max_bytes=MAX_BYTES) as downloader:
        return list(downloader.fetch(urls))


def fetch_pages(pages: Pages, how: DownloadSettings = OPEN) -> tuple[list[Outcome], HttpServer]:
    """Every page once, in their order."""
    with HttpServer(pages) as server:
        return fetch([server.url(path) for path in pages], how), server


def fetch_soon(urls: Sequence[str], how: DownloadSettings) -> list[Outcome]:
    """A fetch that fails should it hang."""
    with Downloader(how, max_bytes=MAX_BYTES) as downloader:
        watch = threading.Timer(30, loop_of(downloader).fail, [TimeoutError("it hangs")])
        watch.start()
        try:
            return list(downloader.fetch(urls))
        finally:
            watch.cancel()


def loop_of(downloader: Downloader) -> Crawl:
    assert downloader._crawl is not None
    return downloader._crawl


def reason(outcome: Outcome) -> str:
    assert isinstance(outcome, SampleError), f"{len(outcome)} bytes"
    return outcome.reason


def reasons(pages: Pages, how: DownloadSettings = OPEN) -> list[str]:
    return [reason(outcome) for outcome in fetch_pages(pages, how)[0]]


def threads_fall_to(number: int) -> bool:
    """Whether they do: the resolver's idle threads are told to end, not waited for."""
    for _ in range(500):
        if threading.active_count() <= number:
            return True
        time.sleep(0.01)
    return False


# What arrives.


def test_bodies_come_in_the_order_of_the_input_however_long_they_take() -> None:
    pages = {f"/{i}": Page(b"%d" % i * 50, wait_s=(i * 7 % 11) / 50) for i in range(60)}
    with HttpServer(pages) as server:
        urls = [server.url(f"/{i}", host) for i in range(60) for host in ("127.0.0.1", "localhost")]
        assert fetch(urls) == [b"%d" % i * 50 for i in range(60) for _ in range(2)]


def test_a_connection_is_kept_as_long_as_there_is_more_to_ask_for() -> None:
    with (
        HttpServer({"/a": b"one", "/b": b"two"}) as server,
        Downloader(settings(per_host=1), max_bytes=MAX_BYTES) as downloader,
    ):
        for _ in range(2):  # one downloader fetches again and again
            outcomes = downloader.fetch([server.url("/a"), server.url("/b")] * 5)
            assert list(outcomes) == [b"one", b"two"] * 5
        assert server.num_connections <= 4
        assert list(downloader.fetch([])) == []


def test_no_connection_is_kept_to_a_host_without_more_to_ask_for() -> None:
    hosts = [f"127.0.0.{i}" for i in range(1, 30)]
    with HttpServer({"/": b"x"}, hosts=hosts) as server:
        urls = [server.url("/", host) for host in hosts]
        with Downloader(OPEN, max_bytes=9) as downloader:
            assert list(downloader.fetch(urls)) == [b"x"] * len(hosts)
            for _ in range(500):  # the server hears of it a moment later
                if not server.connections:
                    break
                time.sleep(0.01)
            assert not server.connections


def test_a_body_without_a_length_in_chunks_and_an_empty_one_arrive() -> None:
    pages = {"/a": Page(b"x" * 70_000, chunked=True), "/b": b"", "/c": Page(b"y", status=206)}
    assert fetch_pages(pages)[0] == [b"x" * 70_000, b"", b"y"]


def test_urls_are_asked_for_as_they_are_spelt() -> None:
    spelt = ["/a%2Fb~%7E+c?x=%41&X-Amz-Signature=a%2Bb=", "/a/../b;c?d=e|f", "/!$'()*,=@:"]
    with HttpServer({}) as server:
        fetch([server.url(path) + "#part" for path in spelt])
        fetch([f"  {server.url('/ü x')}\n"])
        assert server.paths() == [*spelt, "/%C3%BC%20x"] or set(server.paths()[:3]) == set(spelt)


def test_the_request_says_who_asks_and_for_what() -> None:
    _, server = fetch_pages({"/a": b"x"}, settings(user_agent="tester/1 (+mailto:me@example.com)"))
    headers = server.requests[0].headers
    assert headers["user-agent"] == "tester/1 (+mailto:me@example.com)"
    assert headers["accept-encoding"] == "identity"
    assert not {"cookie", "authorization", "referer"} & headers.keys()


def test_cookies_are_not_kept() -> None:
    page = Page(b"x", headers=[("Set-Cookie", "id=7")])
    with HttpServer({"/a": page}) as server:
        fetch([server.url("/a", "localhost")] * 3, settings(per_host=1))
        assert all("cookie" not in request.headers for request in server.requests)


def test_proxies_and_passwords_of_the_environment_are_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    netrc = tmp_path_factory.mktemp("home") / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password hunter2\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1/")
    bodies, server = fetch_pages({"/a": b"x"})
    assert bodies == [b"x"]
    assert "authorization" not in server.requests[0].headers


# What does not, and why.


def test_statuses_are_reasons() -> None:
    pages = {f"/{status}": Page(status=status) for status in (404, 410, 403, 304, 451)}
    pages["/lost"] = Page(status=302)  # to nowhere
    assert reasons(pages) == [
        "http 404",
        "http 410",
        "http 403",
        "http 304",
        "http 451",
        "http 302",
    ]


def test_a_final_status_is_asked_for_once_and_a_passing_one_retries_times() -> None:
    pages = {f"/{status}": Page(status=status) for status in (404, 429, 500, 503)}
    outcomes, server = fetch_pages(pages, settings(retries=2))
    assert [reason(outcome) for outcome in outcomes] == [f"http {path[1:]}" for path in pages]
    assert Counter(server.paths()) == {"/404": 1, "/429": 3, "/500": 3, "/503": 3}


def test_what_passes_is_survived() -> None:
    good = Page(b"x" * 1000)
    pages = {
        "/busy": [Page(status=503), Page(status=429), good],
        "/cut": [Page(b"x" * 10, length=1000), Page(b"x", length=1000), good],
        "/gone": [Page(hang_up=True)] * 4 + [good],  # aiohttp repeats each once by itself
        "/slow": [Page(wait_s=9), good],
    }
    outcomes, _ = fetch_pages(pages, settings(timeout_s=0.5))
    assert outcomes == [good.body] * 4


def test_what_does_not_pass_is_rejected_with_its_reason() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    pages = {
        "/cut": Page(b"x" * 10, length=1000),
        "/gone": Page(hang_up=True),
        "/slow": Page(wait_s=9),
    }
    with HttpServer(pages) as server:
        urls = [nobody, "http://name.invalid/", *map(server.url, pages)]
        outcomes = fetch(urls, settings(timeout_s=0.3, retries=1))
    expected = ["unreachable", "unreachable", "truncated", "unreachable", "timeout"]
    assert [reason(outcome) for outcome in outcomes] == expected


@pytest.mark.parametrize("drip_body", [False, True], ids=["header", "body"])
def test_a_server_that_drips_is_left_when_the_time_is_over(drip_body: bool) -> None:
    page = Page(b"x" * 10_000, drip_s=0.01, drip_body=drip_body)
    assert reasons({"/a": page}, settings(timeout_s=0.3, retries=0)) == ["timeout"]


def test_a_server_that_accepts_and_says_nothing_is_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/"
        assert reason(fetch([url], settings(timeout_s=0.3, retries=0))[0]) == "timeout"


def test_what_is_no_http_at_all_is_unreachable() -> None:
    with HttpServer(
        {"/a": Page(status=200, headers=[("bad header\0", "x\r\nand worse")])}
    ) as server:
        assert reason(fetch([server.url("/a")], settings(retries=0))[0]) == "unreachable"


def test_endless_headers_are_not_collected() -> None:
    page = Page(headers=[(f"x-{i}", "y" * 8000) for i in range(2000)])
    assert reasons({"/a": page}, settings(retries=0)) == ["unreachable"]


# Size.


def test_a_body_ends_at_the_cap_whatever_was_announced() -> None:
    megabyte = b"x" * 2**20
    pages = {
        "/announced": Page(megabyte),
        "/chunked": Page(megabyte, chunked=True),
        "/endless": Page(b"x" * 10_000, endless=True),
        "/endless-chunks": Page(b"x" * 10_000, endless=True, chunked=True),
        "/exact": Page(b"x" * MAX_BYTES),
    }
    outcomes, server = fetch_pages(pages)
    assert [reason(outcome) for outcome in outcomes[:4]] == ["too large"] * 4
    assert outcomes[4] == pages["/exact"].body
    assert len(server.requests) == 5  # none of them twice


def test_compression_nobody_asked_for_is_undone() -> None:
    data = b"image" * 1000
    bare = zlib.compressobj(wbits=-15)
    encoded = {
        "gzip": gzip.compress(data),
        "X-GZip": gzip.compress(data),
        "deflate": zlib.compress(data),
        "Deflate": bare.compress(data) + bare.flush(),
        "utf-8": data,  # names no compression
        "identity": data,
    }
    pages = {
        f"/{name}": Page(body, headers=[("Content-Encoding", name)])
        for name, body in encoded.items()
    }
    assert fetch_pages(pages)[0] == [data] * len(encoded)


def test_a_bomb_is_too_large_and_other_encodings_are_refused() -> None:
    bomb = gzip.compress(bytes(50_000_000), 1)
    assert len(bomb) < MAX_BYTES
    bodies = {
        "gzip": (bomb, "too large"),
        "gzip ": (gzip.compress(b"x" * 1000)[:-9], "truncated"),
        "deflate": (b"\x78\x9cno zlib", "unknown encoding"),
        "br": (b"x", "unknown encoding"),
        "gzip, zstd": (b"x", "unknown encoding"),
        "gzip, gzip": (gzip.compress(bomb), "unknown encoding"),
    }
    pages = {
        f"/{number}": Page(body, headers=[("Content-Encoding", name)])
        for number, (name, (body, _)) in enumerate(bodies.items())
    }
    assert reasons(pages) == [expected for _, expected in bodies.values()]


# Consent.


@pytest.mark.parametrize(
    ("headers", "opted_out"),
    [
        (["noai"], True),
        (["NoImageAI"], True),
        (["noindex, noimageai ,nofollow"], True),
        (["noindex", "otherbot: noai"], True),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], True),
        (["noindex, nofollow"], False),
        (["all", "noaim", "max-image-preview:large"], False),
    ],
)
def test_owners_who_opted_out_are_left_alone(headers: list[str], opted_out: bool) -> None:
    page = Page(b"x" * 500_000, headers=[("x-robots-TAG", value) for value in headers])
    outcomes, _ = fetch_pages({"/a": page})
    assert (outcomes == [page.body]) is not opted_out
    if opted_out:
        assert reason(outcomes[0]) == "opted out"


def test_opting_out_counts_on_the_way_too() -> None:
    hop = Page(status=301, headers=[("Location", "/a"), ("X-Robots-Tag", "noai")])
    with HttpServer({"/hop": hop, "/a": b"x"}) as server:
        assert reason(fetch([server.url("/hop")])[0]) == "opted out"
        assert server.paths() == ["/hop"]


# Politeness.


def test_a_host_is_never_asked_more_than_so_much_at_once() -> None:
    pages = {f"/{i % 2}/{i}": Page(b"x", wait_s=0.01) for i in range(60)}
    with HttpServer(pages, hosts=("127.0.0.1", "127.0.0.2")) as server:
        urls = [server.url(path, f"127.0.0.{1 + int(path[1])}") for path in pages]
        assert fetch(urls, settings(per_host=3)) == [b"x"] * 60
        assert server.most_active("/0/") == 3
        assert server.most_active("/1/") == 3


def test_redirects_take_a_slot_of_the_host_they_lead_to() -> None:
    with HttpServer({}, hosts=("127.0.0.1", "127.0.0.2")) as server:
        for i in range(40):
            location = server.url(f"/b/{i}", "127.0.0.2")
            server.add(f"/a/{i}", Page(status=302, headers=[("Location", location)]))
            server.add(f"/b/{i}", Page(b"x", wait_s=0.01))
        urls = [server.url(f"/a/{i}") for i in range(40)]
        assert fetch(urls, settings(per_host=2)) == [b"x"] * 40
        assert server.most_active("/a/") <= 2
        assert server.most_active("/b/") == 2


def test_no_more_than_the_concurrency_runs_at_once() -> None:
    pages = {f"/{i}": Page(b"x", wait_s=0.01) for i in range(40)}
    _, server = fetch_pages(pages, settings(concurrency=5, per_host=100))
    assert server.most_active() == 5


def test_a_slow_host_does_not_stop_the_others() -> None:
    pages = {f"/slow/{i}": Page(b"x", wait_s=0.02) for i in range(100)}
    with HttpServer(pages | {"/fast": b"y"}, hosts=("127.0.0.1", "127.0.0.2")) as server:
        urls = [*map(server.url, pages), *[server.url("/fast", "127.0.0.2")] * 100]
        assert fetch(urls, settings(per_host=2, concurrency=4)) == [b"x"] * 100 + [b"y"] * 100
        # The hundred behind them in the input were there long before the slow ones were through.
        assert "/fast" not in server.paths()[-50:]


def test_requests_to_a_host_keep_their_distance() -> None:
    _, server = fetch_pages({f"/{i}": b"x" for i in range(5)}, settings(delay_s=0.05))
    times = [request.time_s for request in server.requests]
    assert times[-1] - times[0] >= 4 * 0.05 * 0.9


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_keeps_the_whole_host_waiting(as_date: bool) -> None:
    when = formatdate(time.time() + 2, usegmt=True) if as_date else "1"
    busy = Page(status=429, headers=[("Retry-After", when)])
    pages = {"/0": [busy, Page(b"x")], **{f"/{i}": Page(b"x", wait_s=0.2) for i in range(1, 6)}}
    outcomes, server = fetch_pages(pages, settings(per_host=2))
    assert outcomes == [b"x"] * 6
    # One more was on its way when the answer came; then there is nothing until the time is over.
    paused, resumed = server.requests[1].time_s, server.requests[2].time_s
    assert resumed - paused >= 0.9
    assert server.paths()[2] == "/0"


def test_who_says_to_come_back_much_later_is_not_asked_again() -> None:
    busy = Page(status=503, headers=[("Retry-After", "3600")])
    outcomes, server = fetch_pages({"/a": busy})
    assert reason(outcomes[0]) == "http 503"
    assert len(server.requests) == 1


def test_a_host_that_says_so_is_not_asked_for_anything_else() -> None:
    busy = Page(status=503, headers=[("Retry-After", "3600")])
    with HttpServer({"/busy": busy}, hosts=("127.0.0.1", "127.0.0.2")) as server:
        hop = Page(status=302, headers=[("Location", server.url("/1"))], wait_s=0.2)
        server.add("/hop", hop)
        server.add("/good", Page(b"x"))
        urls = [server.url(path) for path in ("/busy", "/1", "/2", "/3")]
        urls += [server.url("/hop", "127.0.0.2"), server.url("/good", "127.0.0.2")]
        with Downloader(settings(per_host=1), max_bytes=9) as downloader:
            *refused, good = downloader.fetch(urls)
            assert [reason(outcome) for outcome in refused] == ["http 503"] * 5
            assert good == b"x"
            assert [reason(outcome) for outcome in downloader.fetch(urls[:3])] == ["http 503"] * 3
        assert sorted(server.paths()) == ["/busy", "/good", "/hop"]
    assert "127.0.0.1 wants to be left alone" in str(refused[-1])


@pytest.mark.parametrize("text", ["soon", "-1", "", "1e9", "9" * 400, "Mon, 99 Foo 2020"])
def test_a_senseless_retry_after_is_passed_over(text: str) -> None:
    busy = Page(status=503, headers=[("Retry-After", text)])
    assert fetch_pages({"/a": [busy, Page(b"x")]})[0] == [b"x"]


# Redirects.


def test_redirects_are_followed_to_their_end_or_the_limit() -> None:
    def to(place: str, status: int = 302) -> Page:
        return Page(status=status, headers=[("Location", place)])

    pages: dict[str, bytes | Page] = {f"/{i}": to(f"/{i + 1}", 301 + i % 2) for i in range(5)}
    pages |= {"/5": b"there", "/loop": to("loop"), "/lön": to("5?q=ü x", 307)}
    with HttpServer(pages) as server:
        urls = [server.url(path) for path in ("/0", "/loop", "/1")]
        first, loop, second = fetch(urls, settings(max_redirects=5))
        assert (first, second) == (b"there", b"there")
        assert reason(loop) == "too many redirects"
        assert reason(fetch([urls[0]], settings(max_redirects=4))[0]) == "too many redirects"


@pytest.mark.parametrize(
    "place",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "data:image/png,x",
        "gopher://x/",
        "http://[",
    ],
)
def test_a_redirect_to_something_else_than_http_is_refused(place: str) -> None:
    assert reasons({"/a": Page(status=302, headers=[("Location", place)])}) == ["bad url"]


def test_user_information_is_used_for_its_own_host_only() -> None:
    with HttpServer({}, hosts=("127.0.0.1", "127.0.0.2")) as server:
        elsewhere = server.url("/there", "127.0.0.2")
        server.add("/own", Page(status=302, headers=[("Location", "/away")]))
        server.add("/away", Page(status=302, headers=[("Location", elsewhere)]))
        server.add("/there", Page(b"x"))
        url = server.url("/own").replace("//", "//me:hunter2@")
        assert fetch([url]) == [b"x"]
        sent = {request.path: request.headers.get("authorization") for request in server.requests}
    assert sent["/own"] == sent["/away"] == "Basic bWU6aHVudGVyMg=="
    assert sent["/there"] is None


def test_secrets_are_in_no_message() -> None:
    pages = {
        "/a": Page(status=404),
        "/b": Page(status=302, headers=[("Location", "http://u:hunter2@[/")]),
    }
    with HttpServer(pages) as server:
        secret = "?x=1&X-Amz-Signature=hunter2#hunter2"
        urls = [server.url(path).replace("//", "//me:hunter2@") + secret for path in ("/a", "/b")]
        urls += [f"ftp://me:hunter2@host/{secret}", f"http://me:hunter2@[/{secret}"]
        urls += [f"http://me:hunter2@name.invalid/{secret}", f"http://me:hunter2@127.1/{secret}"]
        outcomes = fetch(urls, settings(retries=0))
        outcomes += fetch(urls[:1], settings(allow_private=False))
    assert len([reason(outcome) for outcome in outcomes]) == 7
    assert not any("hunter2" in f"{outcome!s} {outcome!r}" for outcome in outcomes)


# Where it may go.

LOOPBACK = [
    *("127.0.0.1", "127.0.0.2", "127.1", "127.0.1", "0", "0.0.0.0", "2130706433", "0x7f000001"),
    *("0x7f.1", "0177.0.0.1", "017700000001", "127.0.0.1.", "127.0.0.1..", "localhost"),
    *("localhost.", "LOCALHOST", "[::1]", "[0:0:0:0:0:0:0:1]", "[::]", "[::ffff:127.0.0.1]"),
    *("[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[::1%25lo]"),
    *(
        "127。0。0。1",
        "１２７.0.0.1",
        "①②⑦.⓪.⓪.①",
        "ⓛocalhost",
        "loc\u00adalhost",
        "%31%32%37.0.0.1",
    ),
    *("127.0.0.1%00.example.com", "127.0.0.1\\@example.com", "example.com@127.0.0.1"),
    *("127.0.0.1%2f", "127.0.0.1%09", "user@127.0.0.1", "[::ffff:0:127.0.0.1]"),
]


def test_no_spelling_of_a_loopback_address_leads_there() -> None:
    with HttpServer({"/": b"secret"}, hosts=("127.0.0.1", "127.0.0.2")) as server:
        urls = [f"http://{host}:{server.port}/" for host in LOOPBACK]
        outcomes = fetch(urls, DownloadSettings(retries=0, timeout_s=5))
        assert server.num_connections == 0
    found = {url: reason(outcome) for url, outcome in zip(urls, outcomes, strict=True)}
    assert set(found.values()) <= {"forbidden address", "bad url", "unreachable"}, found
    for host in ("127.0.0.1", "localhost", "0x7f.1", "[::1]", "127。0。0。1"):
        assert found[f"http://{host}:{server.port}/"] == "forbidden address"


@pytest.mark.parametrize(
    "place",
    [
        "http://127.0.0.1:{port}/",
        "//localhost:{port}/",
        "http://127.1:{port}/",
        "http://169.254.169.254/latest/meta-data/",
        "https://[::1]:{port}/",
    ],
)
def test_a_redirect_does_not_lead_there_either(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first server stands for a public one.
    for module in (addresses, request):
        monkeypatch.setattr(module, "is_public", lambda a: a == "127.0.0.2" or is_public(a))
    with HttpServer({"/": b"secret"}, hosts=("127.0.0.2", "127.0.0.1")) as server:
        server.add("/a", Page(status=302, headers=[("Location", place.format(port=server.port))]))
        outcome = fetch([server.url("/a")], DownloadSettings(retries=0, timeout_s=5))[0]
        assert reason(outcome) in ("forbidden address", "bad url")
        assert server.num_connections == 1
        assert server.paths() == ["/a"]


NO_URLS = [
    *("", "x", "file:///etc/passwd", "ftp://example.com/x", "http://", "http:///x", "http://["),
    *("//example.com/x", "http://h:99999/", "http://h:0/", "http://a b/", "http://h\0/", "data:,x"),
    *("javascript:1", "http://\ud800/", "https:h/x", f"http://{'é' * 300}/"),
]


@pytest.mark.parametrize("url", NO_URLS)
def test_what_is_no_url_of_http_is_rejected(url: str) -> None:
    assert reason(fetch([url], settings(retries=0))[0]) == "bad url"


@given(st.lists(st.text() | st.text(alphabet=":/@?#[]%.é\0 \r\n1"), max_size=20))
def test_garbage_is_rejected_and_never_raises(garbage: list[str]) -> None:
    urls = [
        f"{prefix}{text}" for text in garbage for prefix in ("", "http://127.0.0.1:1/", "http:")
    ]
    outcomes = fetch(urls, settings(retries=0))
    assert {reason(outcome) for outcome in outcomes} <= {"bad url", "unreachable"}


PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "2606:4700::1111",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
    "2002:808:808::1",
]
NOT_PUBLIC = [
    *("10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "100.100.100.200", "169.254.169.254"),
    *("0.0.0.0", "0.1.2.3", "127.0.0.1", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.1"),
    *("192.88.99.1", "192.88.99.255", "2002:c058:6301::", "::ffff:192.88.99.1"),
    *("203.0.113.1", "224.0.0.1", "239.1.2.3", "240.0.0.1", "255.255.255.255", "168.63.129.16"),
    *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1"),
    *(
        "2001:db8::1",
        "3fff::1",
        "100::1",
        "5f00::1",
        "64:ff9b:1::1",
        "::ffff:10.0.0.1",
        "::8.8.8.8",
    ),
    *("::ffff:0:127.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "2002:7f00:1::1"),
    *("2001:0:4136:e378:8000:63bf:80ff:fffe", "127.1", "2130706433", "0x7f.1", "localhost", ""),
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


async def _resolve(resolver: Resolver, hosts: Sequence[str]) -> list[object]:
    try:
        lookups = [resolver.resolve(host, 80) for host in hosts]
        return await asyncio.gather(*lookups, return_exceptions=True)
    finally:
        await resolver.close()


def test_names_are_looked_up_and_their_private_addresses_left_out() -> None:
    async def look_up() -> None:
        found, failed = await _resolve(Resolver(lambda _: True), ["localhost", "name.invalid"])
        assert isinstance(found, list)
        assert {(a["port"], is_public(a["host"])) for a in found} == {(80, False)}
        assert isinstance(failed, socket.gaierror)
        (refused,) = await _resolve(Resolver(is_public), ["localhost"])
        assert isinstance(refused, ForbiddenAddressError)

    asyncio.run(look_up())


def test_names_are_remembered_but_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "MAX_NAMES", 2)

    async def look_up() -> None:
        resolver = Resolver(lambda _: True)
        for host in ("localhost", "a.invalid", "localhost", "b.invalid"):
            await asyncio.gather(resolver.resolve(host), return_exceptions=True)
        assert list(resolver._known) == ["a.invalid", "b.invalid"]
        failure = resolver._known["a.invalid"]
        await asyncio.gather(resolver.resolve("a.invalid"), return_exceptions=True)
        assert resolver._known["a.invalid"] is failure
        await resolver.close()

    asyncio.run(look_up())


# Bounds, and the end.


def test_urls_are_taken_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shard_tools.downloader.LOOK_AHEAD", 100)
    taken = 0

    def count(url: str) -> Iterator[str]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield url

    with HttpServer({"/": b"x"}) as server, Downloader(OPEN, max_bytes=9) as downloader:
        for number, _ in enumerate(downloader.fetch(count(server.url("/"))), start=1):
            assert taken <= number + 100
    assert taken == number == 1000


def test_what_is_read_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies of unknown length, all at once, while nobody takes any."""
    monkeypatch.setattr(crawl, "READ_AHEAD_BYTES", 2_000_000)
    monkeypatch.setattr(crawl, "_START_BYTES", 1_500_000)
    page = Page(b"x" * 400_000, chunked=True)
    with (
        HttpServer({"/": page}) as server,
        Downloader(settings(per_host=32), max_bytes=MAX_BYTES) as downloader,
    ):
        outcomes = downloader.fetch([server.url("/")] * 100)
        assert next(outcomes) == page.body
        running = downloader._crawl
        assert running is not None
        highest_bytes = 0
        for _ in range(50):
            highest_bytes = max(highest_bytes, running._read_ahead_bytes)
            time.sleep(0.01)
        assert 1_000_000 < highest_bytes <= 2_000_000
        assert [outcome == page.body for outcome in outcomes] == [True] * 99
        assert running._read_ahead_bytes == 0


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """For five bodies of 400 kB, and nothing is looked for without a reason."""
    monkeypatch.setattr(crawl, "READ_AHEAD_BYTES", 2_000_000)
    monkeypatch.setattr(crawl, "_START_BYTES", 1_500_000)
    monkeypatch.setattr(crawl, "RECHECK_S", 1e6)


@pytest.mark.usefixtures("little_room")
def test_a_closed_host_opens_again_though_there_is_no_room_for_others() -> None:
    body = b"x" * 400_000
    busy = [Page(status=429, headers=[("Retry-After", "1")], wait_s=0.5), Page(b"y")]
    pages = {"/": body, "/busy": busy}
    with HttpServer(pages, hosts=("127.0.0.1", "127.0.0.2")) as server:
        urls = [server.url("/busy", "127.0.0.2"), *[server.url("/")] * 30]
        assert fetch_soon(urls, OPEN) == [b"y", *[body] * 30]


@pytest.mark.usefixtures("little_room")
def test_hosts_that_are_asked_slowly_open_again_though_there_is_no_room() -> None:
    body = b"x" * 400_000
    with HttpServer({"/": body}, hosts=("127.0.0.1", "127.0.0.2")) as server:
        urls = [server.url("/", f"127.0.0.{1 + i // 20}") for i in range(40)]
        assert fetch_soon(urls, settings(delay_s=0.04)) == [body] * 40


def test_a_missed_chance_to_start_is_found_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Crawl, "_set_alarm", lambda _: None)
    monkeypatch.setattr(crawl, "RECHECK_S", 0.05)
    with HttpServer({"/": b"x"}) as server:
        assert fetch_soon([server.url("/")] * 5, settings(delay_s=0.02)) == [b"x"] * 5


def test_a_fetch_that_is_not_read_to_its_end_leaves_nothing(
    recwarn: pytest.WarningsRecorder,
) -> None:
    pages = {"/": b"x", "/slow": Page(b"x", wait_s=30), "/busy": Page(status=503)}
    with HttpServer(pages) as server:
        urls = [server.url(path) for path in ["/", *["/slow", "/busy"] * 50]]
        before = threading.active_count()
        with Downloader(OPEN, max_bytes=9) as downloader:
            outcomes = downloader.fetch(urls)
            assert next(outcomes) == b"x"
            outcomes.close()  # type: ignore[attr-defined]
            again = downloader.fetch([server.url("/"), server.url("/", "localhost")])
            assert list(again) == [b"x"] * 2  # the next is not held up
            abandoned = downloader.fetch(urls)
            assert next(abandoned) == b"x"
        assert threads_fall_to(before)
        del abandoned
    assert not recwarn.list


def test_an_error_of_the_caller_ends_it_too() -> None:
    def fail_at_the_second(urls: Iterator[str]) -> None:
        with Downloader(OPEN, max_bytes=9) as downloader:
            for number, _ in enumerate(downloader.fetch(urls)):
                assert 1 // (1 - number)

    before = threading.active_count()
    with HttpServer({"/": b"x"}) as server:
        with pytest.raises(ZeroDivisionError):
            fail_at_the_second(server.url("/") for _ in range(10_000))
        with pytest.raises(ZeroDivisionError):
            fail_at_the_second(str(1 // number) for number in range(1))
    assert threads_fall_to(before)


def test_a_bug_in_the_loop_reaches_the_caller() -> None:
    with (
        Downloader(OPEN, max_bytes=9) as downloader,
        pytest.raises(AttributeError, match="strip"),
    ):
        list(downloader.fetch([None]))  # type: ignore[list-item]


def end_the_loop() -> None:
    raise SystemExit("the loop is dead")


def fetch_from_the_dying(url: str, dies_after_s: float) -> None:
    with Downloader(OPEN, max_bytes=9) as downloader:
        loop = loop_of(downloader)._loop
        threading.Timer(dies_after_s, loop.call_soon_threadsafe, [end_the_loop]).start()
        if not dies_after_s:
            downloader._thread.join()
        for _ in range(2):
            with pytest.raises(SystemExit, match="the loop is dead"):
                list(downloader.fetch([url] * 20))


@pytest.mark.parametrize("dies_after_s", [0.0, 0.3])
def test_the_death_of_the_loop_reaches_the_caller(dies_after_s: float) -> None:
    before = threading.active_count()
    with (
        HttpServer({"/": Page(b"x", wait_s=60)}) as server,
        pytest.raises(SystemExit, match="the loop is dead"),  # at the end again
    ):
        fetch_from_the_dying(server.url("/"), dies_after_s)
    assert threads_fall_to(before)


def test_who_reads_on_after_the_end_is_told() -> None:
    with HttpServer({"/": b"x", "/slow": Page(wait_s=60)}) as server:
        with Downloader(OPEN, max_bytes=9) as downloader:
            outcomes = downloader.fetch([server.url("/"), server.url("/slow"), server.url("/slow")])
            assert next(outcomes) == b"x"
        with pytest.raises(RuntimeError, match="has been left"):
            next(outcomes)


def test_a_request_that_was_cancelled_does_not_get_lost() -> None:
    with (
        HttpServer({"/": Page(wait_s=60)}) as server,
        Downloader(OPEN, max_bytes=9) as downloader,
    ):
        running = loop_of(downloader)

        def cancel() -> None:
            for task in running._running:
                task.cancel()

        threading.Timer(0.3, running.call, [cancel]).start()
        with pytest.raises(RuntimeError, match="/: the request was cancelled"):
            list(downloader.fetch([server.url("/")]))


@pytest.mark.parametrize(
    "values",
    [
        {"user_agent": "two\r\nlines"},
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
        {"connect_timeout_s": -1},
        {"per_host": 0},
        {"concurrency": 0},
        {"retries": -1},
        {"delay_s": float("nan")},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(values))):
        settings(**values)


# Whose turn it is.


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), max_size=40),
    st.integers(1, 3),
    st.sampled_from([0.0, 1.0]),
)
def test_the_queue_starts_everything_once_within_its_limits(
    jobs: list[tuple[str, int]], per_host: int, delay_s: float
) -> None:
    """Against a plain simulation: each job holds its slot for some seconds."""
    queue: HostQueue[int] = HostQueue(per_host=per_host, delay_s=delay_s)
    for number, (host, _) in enumerate(jobs):
        queue.push(host, number, number, 0.0)
    running: list[tuple[float, str]] = []
    started: dict[str, list[tuple[float, int]]] = {host: [] for host, _ in jobs}
    now = 0.0
    while running or any(len(started[h]) < sum(host == h for host, _ in jobs) for h in started):
        while (number := queue.first(now)) is not None:
            host, same = queue.start(now)
            assert (host, same) == (jobs[number][0], number)
            started[host].append((now, number))
            running.append((now + jobs[number][1], host))
            assert sum(h == host for _, h in running) <= per_host
        now += 1.0
        for end, host in [job for job in running if job[0] <= now]:
            running.remove((end, host))
            queue.finish(host, now)
    for starts in started.values():
        assert [number for _, number in starts] == sorted(number for _, number in starts)
        assert all(b - a >= delay_s for (a, _), (b, _) in pairwise(starts))
    queue.first(now + delay_s)
    assert len(queue) == 0


def test_a_closed_host_waits_while_others_go_on() -> None:
    queue: HostQueue[str] = HostQueue(per_host=2)
    for number, host in enumerate("aaabb"):
        queue.push(host, number, f"{host}{number}", 0.0)
    assert queue.first(0.0) == "a0"
    queue.start(0.0)
    queue.close_until("a", 10.0)
    assert queue.first(0.0) == "b3"
    queue.start(0.0)
    queue.start(0.0)
    assert queue.first(9.0) is None
    assert queue.opens_at() == 10.0
    queue.push("a", 0, "a0 again", 9.0)
    queue.finish("a", 9.0)
    assert queue.first(10.0) == "a0 again"


def test_what_waits_at_a_host_can_be_taken_out() -> None:
    queue: HostQueue[int] = HostQueue(per_host=1)
    for number, host in enumerate("aabaa"):
        queue.push(host, number, number, 0.0)
    assert queue.first(0.0) == 0
    queue.start(0.0)
    assert queue.remove("a") == [1, 3, 4]
    queue.finish("a", 0.0)
    assert queue.first(0.0) == 2
    assert len(queue) == 1


def test_a_dead_host_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other URLs fail for the same reason without being asked; other hosts go on."""
    monkeypatch.setattr(crawl, "HOST_FAILURES", 6)
    pages = {"/": b"x", "/late": Page(wait_s=9)}
    with HttpServer(pages, hosts=("127.0.0.1", "127.0.0.2")) as server:
        dead = [server.url("/late", "127.0.0.2")] * 40
        alive = [server.url("/")] * 3
        outcomes = fetch([*dead, *alive], settings(timeout_s=0.3, retries=1, per_host=4))
    assert [reason(outcome) for outcome in outcomes[:40]] == ["timeout"] * 40
    assert "not asked, since 127.0.0.2 did not answer 6 requests" in str(outcomes[39])
    assert outcomes[40:] == [b"x"] * 3
    assert server.paths().count("/late") < 20


def test_answers_are_no_failures_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crawl, "HOST_FAILURES", 3)
    pages = {"/": b"x", "/late": Page(wait_s=9)}
    with HttpServer(pages) as server:
        urls = [server.url(path) for path in ("/late", "/late", "/") * 3]
        outcomes = fetch(urls, settings(timeout_s=0.3, retries=0, per_host=1))
    assert outcomes[2::3] == [b"x"] * 3
