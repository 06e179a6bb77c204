"""Ranges read from a real S3 server through a proxy that breaks, delays and refuses."""

import asyncio
import logging
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import load_config
from pipeline.errors import (
    AccessDeniedError,
    ConfigError,
    ObjectChangedError,
    ObjectMissingError,
    StoreError,
)
from pipeline.ranges import FetchConfig, RangeReader, begin
from pipeline.store import Store, open_store
from pipeline.telemetry import Telemetry
from tests.support.fault_proxy import FaultProxy, Kind, Rule
from tests.support.s3_server import S3Server

BODY = random.Random(1).randbytes(3 << 20)
SECONDS = 60  # what would take longer hangs


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def store(s3_url: str, proxy: FaultProxy) -> Store:
    store = open_store(s3_url)
    store.put_if_absent("key", BODY)
    proxy.exchanges.clear()
    return store


def new_reader(**settings: float) -> RangeReader:
    return RangeReader(FetchConfig(**settings), Telemetry())  # type: ignore[arg-type]


def read(
    reader: RangeReader,
    store: Store,
    start: int = 0,
    length: int = len(BODY),
    tag: str | None = None,
) -> bytes:
    return begin(reader.read(store, "key", start, length, tag=tag)).result(SECONDS)


def total(reader: RangeReader, name: str) -> int:
    return int(reader.telemetry.total(name))


@pytest.mark.parametrize("length", [0, 1, 1000, len(BODY) - 7])
def test_a_range(store: Store, length: int) -> None:
    reader = new_reader()
    assert read(reader, store, 7, length) == BODY[7 : 7 + length]
    assert total(reader, "fetch_bytes") == length
    assert total(reader, "fetch_requests") == (length > 0)


def test_a_range_of_a_file(tmp_path: Path) -> None:
    store, reader = open_store(tmp_path), new_reader(patience_s=0)
    store.put_if_absent("key", BODY)
    assert read(reader, store, 7, 1000) == BODY[7:1007]
    assert total(reader, "fetch_bytes") == 1000
    for start in (len(BODY) - 5, len(BODY), len(BODY) + 5):
        with pytest.raises(ObjectChangedError, match=f"{len(BODY)} bytes"):
            read(reader, store, start, 10)
    store.delete("key")
    with pytest.raises(ObjectMissingError, match="key"):
        read(reader, store)


BREAKS = [
    Rule(kind=Kind.RESET, nth=(1,)),
    Rule(kind=Kind.RESET, nth=(1,), after_bytes=1 << 20),
    Rule(kind=Kind.CUT, nth=(1,), after_bytes=1 << 20),
    Rule(kind=Kind.SHORTEN, nth=(1,), after_bytes=1 << 20),
    Rule(kind=Kind.REFUSE, nth=(1,), status=500),
]


@pytest.mark.parametrize("rule", BREAKS)
def test_what_broke_is_taken_up_where_it_broke(store: Store, proxy: FaultProxy, rule: Rule) -> None:
    proxy.rules = [rule]
    reader = new_reader()
    assert read(reader, store, 5, len(BODY) - 5) == BODY[5:]
    first, second = [exchange.request for exchange in proxy.exchanges]
    assert first.end_byte == second.end_byte == len(BODY)
    read_before = second.first_byte - 5
    sent = rule.after_bytes or 0
    assert sent // 2 <= read_before <= sent
    assert total(reader, "fetch_retries") == 1
    assert total(reader, "fetch_resumes") == (read_before > 0)
    assert total(reader, "fetch_bytes") == len(BODY) - 5


def test_a_break_loses_less_than_a_part_and_a_failed_range_is_read_as_it_comes(
    store: Store, proxy: FaultProxy
) -> None:
    proxy.rules = [Rule(kind=Kind.CUT, nth=range(1, 4), after_bytes=500_000)]
    reader = new_reader()
    reader.pace.add(len(BODY), 0.05)  # so parts are of a megabyte
    assert read(reader, store) == BODY
    begins = [exchange.request.first_byte for exchange in proxy.exchanges]
    assert begins[:2] == [0, 0]
    assert all(250_000 <= step <= 500_000 for step in np.diff(begins[1:]))
    assert total(reader, "fetch_retries") == 3
    assert total(reader, "fetch_resumes") == 2


def test_large_parts_are_resumed_behind_the_last_whole_one(store: Store, proxy: FaultProxy) -> None:
    proxy.rules = [Rule(kind=Kind.CUT, nth=(1,), after_bytes=2_600_000)]
    reader = new_reader()
    reader.pace.add(len(BODY), 0.05)
    assert read(reader, store) == BODY
    assert 1 << 20 <= proxy.exchanges[1].request.first_byte <= 2_600_000
    assert total(reader, "fetch_resumes") == 1


def test_what_keeps_above_the_floor_is_left_alone(store: Store, proxy: FaultProxy) -> None:
    proxy.rules = [Rule(kind=Kind.DRIP, bytes_per_s=400_000)]
    reader = new_reader(stall_s=0.4, floor_bytes_per_s=200_000)  # 80 kB at least: below a part
    for _ in range(2):
        assert read(reader, store, 0, 600_000) == BODY[:600_000]
    assert total(reader, "fetch_stalls") == total(reader, "fetch_retries") == 0
    assert len(proxy.exchanges) == 2


def test_breaks_without_end_are_no_obstacle_while_bytes_come(
    store: Store, proxy: FaultProxy
) -> None:
    reader = new_reader(patience_s=0.5)
    proxy.rules = [Rule(kind=Kind.CUT, after_bytes=600_000, nth=range(1, 5))]
    assert read(reader, store) == BODY
    assert total(reader, "fetch_resumes") == 4


@pytest.mark.parametrize(
    "rule",
    [
        Rule(kind=Kind.STALL, nth=(1,)),
        Rule(kind=Kind.STALL, nth=(1,), after_bytes=1 << 20),
        Rule(kind=Kind.DRIP, nth=(1,), bytes_per_s=50_000),
    ],
)
def test_silence_and_drips_are_ended(store: Store, proxy: FaultProxy, rule: Rule) -> None:
    proxy.rules = [rule]
    reader = new_reader(stall_s=0.4)
    assert read(reader, store) == BODY
    assert len(proxy.exchanges) == 2
    assert total(reader, "fetch_stalls") == 1


def earn_hedges(reader: RangeReader, seconds: float = 0.05) -> None:
    """As if many ranges like ours had been read."""
    for _ in range(40):
        reader.pace.add(len(BODY), seconds)
    reader.hedges.earn(100 * len(BODY))


def test_a_store_that_is_slower_than_a_stall_is_given_more_time(
    store: Store, proxy: FaultProxy
) -> None:
    proxy.rules = [Rule(kind=Kind.DELAY, seconds=0.5)]
    reader = new_reader(stall_s=0.2)
    assert read(reader, store) == BODY
    assert total(reader, "fetch_stalls") == 2


def test_a_late_range_gets_a_second_request_that_wins(store: Store, proxy: FaultProxy) -> None:
    proxy.rules = [Rule(kind=Kind.STALL, nth=(1,), after_bytes=1 << 20)]
    reader = new_reader(stall_s=SECONDS)
    earn_hedges(reader, 0.5)
    assert read(reader, store) == BODY
    hedge = proxy.exchanges[1].request
    assert 1 << 19 <= hedge.first_byte <= 1 << 20
    assert total(reader, "fetch_hedges") == 1
    assert total(reader, "fetch_hedge_bytes") == total(reader, "fetch_retries") == 0


def test_the_first_request_may_win_as_well(store: Store, proxy: FaultProxy) -> None:
    proxy.rules = [
        Rule(kind=Kind.STALL, nth=(1,), seconds=0.6, after_bytes=1 << 20),
        Rule(kind=Kind.STALL, nth=(1,), after_bytes=1 << 20),  # of those that are left
    ]
    reader = new_reader(stall_s=SECONDS)
    earn_hedges(reader)
    before = reader.hedges.left_bytes
    assert read(reader, store) == BODY
    wasted = total(reader, "fetch_hedge_bytes")
    assert 1 << 19 <= wasted <= 1 << 20
    assert reader.hedges.left_bytes == pytest.approx(before + 0.05 * len(BODY) - wasted)


def test_a_hedge_that_breaks_leaves_the_first_request_alone(
    store: Store, proxy: FaultProxy
) -> None:
    proxy.rules = [
        Rule(kind=Kind.STALL, nth=(1,), seconds=0.6, after_bytes=1 << 20),
        Rule(kind=Kind.REFUSE, nth=(1,)),
    ]
    reader = new_reader(stall_s=SECONDS)
    earn_hedges(reader)
    reader.hedges.left_bytes = float(len(BODY))  # for one
    assert read(reader, store) == BODY
    assert total(reader, "fetch_retries") == 0
    assert total(reader, "fetch_hedges") == total(reader, "fetch_throttled") == 1


def test_without_budget_there_is_no_hedge(store: Store, proxy: FaultProxy) -> None:
    proxy.rules = [Rule(kind=Kind.STALL, nth=(1,), after_bytes=1 << 20, seconds=0.6)]
    reader = new_reader(stall_s=SECONDS)
    earn_hedges(reader)
    reader.hedges.left_bytes = 1000.0
    assert read(reader, store) == BODY
    assert total(reader, "fetch_hedges") == 0
    assert len(proxy.exchanges) == 1


def test_hedges_waste_no_more_than_their_share(store: Store, proxy: FaultProxy) -> None:
    proxy.rules = [Rule(kind=Kind.DRIP, nth=range(30, 60, 5), bytes_per_s=400_000)]
    reader = new_reader(requests=4, floor_bytes_per_s=0)
    for _ in range(200):
        reader.pace.add(1 << 18, 0.01)

    async def read_all() -> None:
        starts = [i % 11 << 18 for i in range(50)]
        reads = [reader.read(store, "key", start, 1 << 18) for start in starts]
        bodies = await asyncio.gather(*reads)
        assert bodies == [BODY[start : start + (1 << 18)] for start in starts]

    begin(read_all()).result(SECONDS)
    assert total(reader, "fetch_hedges") > 0
    assert total(reader, "fetch_hedge_bytes") <= 0.05 * total(reader, "fetch_bytes")


@pytest.mark.parametrize("status", [503, 429])
def test_a_store_that_asks_for_fewer_requests_gets_fewer(
    store: Store, proxy: FaultProxy, status: int
) -> None:
    proxy.rules = [Rule(kind=Kind.REFUSE, nth=range(1, 4), status=status)]
    reader = new_reader(requests=8)
    assert read(reader, store) == BODY
    assert total(reader, "fetch_throttled") == 3
    assert 1 <= reader.limiter.limit <= 4.25
    for _ in range(30):
        read(reader, store, 0, 1000)
    assert reader.limiter.limit == 8


def test_no_more_requests_at_a_time_than_allowed(store: Store, proxy: FaultProxy) -> None:
    proxy.rules = [Rule(kind=Kind.STALL, nth=(1, 2))]
    reader = new_reader(requests=2, stall_s=SECONDS)
    reads = [begin(reader.read(store, "key", i, 1000)) for i in range(10)]
    time.sleep(0.5)
    assert len(proxy.exchanges) == 2
    reader.close()
    for each in reads:
        with pytest.raises(StoreError, match="closed"):
            each.result(SECONDS)


@pytest.mark.parametrize("patience", [0, 1])
def test_patience_ends(store: Store, proxy: FaultProxy, patience: float) -> None:
    proxy.rules = [Rule(kind=Kind.REFUSE, status=503)]
    with pytest.raises(StoreError, match="503"):
        read(new_reader(patience_s=patience), store)
    assert len(proxy.exchanges) == 1 if patience == 0 else len(proxy.exchanges) > 2


def test_an_empty_answer_of_the_right_length_is_no_progress(
    store: Store, proxy: FaultProxy
) -> None:
    proxy.rules = [Rule(kind=Kind.SHORTEN, after_bytes=0)]
    with pytest.raises(StoreError, match=rf"/key.*{len(BODY)} bytes early"):
        read(new_reader(patience_s=0.5), store)


def test_close_interrupts_waiting_for_a_store(
    store: Store, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.rules = [Rule(kind=Kind.RESET)]
    reader = new_reader()
    with caplog.at_level(logging.WARNING):
        waiting = begin(reader.read(store, "key", 0, 10))
        time.sleep(1)
        assert not waiting.done()
        start = time.monotonic()
        reader.close()
        with pytest.raises(StoreError, match=r"/key was ended"):
            waiting.result(SECONDS)
    assert time.monotonic() - start < SECONDS / 2
    with pytest.raises(StoreError, match=r"/key was ended"):
        read(reader, store, 0, 10)


def test_what_waiting_cannot_mend_is_told_at_the_second_answer_denied_access_at_once(
    s3_url: str, store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = new_reader()
    with pytest.raises(ObjectChangedError, match="recorded"):
        read(reader, store, tag='"another"')
    for start in (len(BODY) - 5, len(BODY), len(BODY) + 5):
        with pytest.raises(ObjectChangedError, match="restore it"):
            read(reader, store, start, 10)
    with pytest.raises(ObjectMissingError, match="other"):
        begin(reader.read(store, "other", 0, 10)).result(SECONDS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessDeniedError, match="AWS_SECRET_ACCESS_KEY"):
        read(reader, open_store(s3_url))
    assert total(reader, "fetch_retries") == 5
    assert len(proxy.exchanges) == 2 * 5 + 1


@pytest.mark.parametrize(
    ("status", "error"), [(404, ObjectMissingError), (412, ObjectChangedError)]
)
def test_that_an_object_is_gone_must_be_said_twice(
    store: Store, proxy: FaultProxy, status: int, error: type[StoreError]
) -> None:
    proxy.rules = [Rule(kind=Kind.REFUSE, nth=(1,), status=status)]
    reader = new_reader(patience_s=0)
    assert read(reader, store) == BODY
    assert total(reader, "fetch_retries") == 1
    proxy.rules = [Rule(kind=Kind.REFUSE, nth=(1, 2), status=status)]
    with pytest.raises(error, match="/key"):
        read(reader, store)
    assert len(proxy.exchanges) == 2 + 2


def test_bytes_between_two_such_answers_prove_that_the_object_is_there(
    store: Store, proxy: FaultProxy
) -> None:
    proxy.rules = [
        Rule(kind=Kind.REFUSE, nth=(1, 3), status=404),
        Rule(kind=Kind.CUT, nth=(1,), after_bytes=1 << 20),
    ]
    assert read(new_reader(), store) == BODY
    seen = [exchange.kind for exchange in proxy.exchanges]
    assert seen == [Kind.REFUSE, Kind.CUT, Kind.REFUSE, None]


def test_a_hedge_that_finds_nothing_leaves_the_first_request_alone(
    store: Store, proxy: FaultProxy
) -> None:
    proxy.rules = [
        Rule(kind=Kind.STALL, nth=(1,), seconds=0.6, after_bytes=1 << 20),
        Rule(kind=Kind.REFUSE, nth=(1,), status=404),
    ]
    reader = new_reader(stall_s=SECONDS)
    earn_hedges(reader)
    reader.hedges.left_bytes = float(len(BODY))  # for one
    assert read(reader, store) == BODY
    assert total(reader, "fetch_hedges") >= 1  # what the first left of the budget may pay another
    assert total(reader, "fetch_retries") == 0


def test_a_few_bytes_a_request_are_progress_and_none_are_not(
    store: Store, proxy: FaultProxy
) -> None:
    """Every answer breaks after three bytes, at the latest before its last."""
    proxy.rules = [Rule(kind=Kind.CUT, after_bytes=3)]
    with pytest.raises(StoreError, match="/key"):
        read(new_reader(patience_s=0.5), store, 0, 40)
    begins = [exchange.request.first_byte for exchange in proxy.exchanges]
    assert begins == sorted(begins)
    assert set(begins) == {*range(0, 40, 3), 39}
    assert begins.count(39) == len(begins) - len(range(0, 39, 3)) > 1
    proxy.rules = [Rule(kind=Kind.CUT, after_bytes=3, nth=range(1, 14))]
    assert read(new_reader(patience_s=0.5), store, 0, 40) == BODY[:40]


def test_a_disk_that_fails_is_waited_for() -> None:
    """Nothing is mapped at a process's first byte, and the kernel calls that an I/O error."""
    reader = new_reader(patience_s=0.5)
    with pytest.raises(StoreError, match=r"/proc/self/mem: .*Input/output error.*the disk"):
        begin(reader.read(open_store("/proc/self"), "mem", 0, 10)).result(SECONDS)
    assert total(reader, "fetch_retries") > 0


@pytest.fixture
def hung(tmp_path: Path) -> Iterator[Store]:
    """Whoever opens the file `key` waits: nobody will ever write to this pipe."""
    os.mkfifo(tmp_path / "key")
    yield open_store(tmp_path)
    os.close(os.open(tmp_path / "key", os.O_RDWR | os.O_NONBLOCK))  # lets the threads go


def test_a_mount_that_hangs_is_reported_and_then_given_up(
    hung: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.ranges._QUIET_S", 0.1)
    reader = new_reader(patience_s=0.6)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(StoreError, match=r"/key: its file system has not answered for 1 s"),
    ):
        read(reader, hung, 0, 10)
    assert re.search(
        r" cannot be reached: its file system has not.*; waiting for it, up to 0 s", caplog.text
    )
    with pytest.raises(StoreError, match="has not answered"):
        read(new_reader(patience_s=0, stall_s=0.1), hung, 0, 10)


@pytest.fixture
def closed_port(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a store that is down, though it has the object: nobody listens there, nobody else will."""
    open_store(s3_url).put_if_absent("key", BODY)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        yield port


def test_a_dead_store_is_not_hammered(s3_url: str, closed_port: int) -> None:
    reader, store = new_reader(), open_store(s3_url)
    reads = [begin(reader.read(store, "key", i, 10)) for i in range(30)]
    time.sleep(3)
    attempts = total(reader, "fetch_requests")
    time.sleep(3)
    later = total(reader, "fetch_requests") - attempts
    reader.close()
    for each in reads:
        with pytest.raises(StoreError, match="closed"):
            each.result(SECONDS)
    assert attempts <= 130
    assert later <= 20
    assert reader.limiter.limit <= 2


def test_ranges_that_wait_for_their_turn_in_an_outage_share_its_clock(
    s3_url: str, closed_port: int
) -> None:
    reader, store = new_reader(requests=1, patience_s=1.5), open_store(s3_url)
    reader.limiter.throttled()  # so that the first failure keeps its turn
    reads = [begin(reader.read(store, "key", i, 10)) for i in range(30)]
    for each in reads:
        with pytest.raises(StoreError, match="no connection"):
            each.result(SECONDS)
    assert total(reader, "fetch_requests") < 2 * 30  # with clocks of their own two at least each


def test_an_outage_has_one_beginning_and_one_end_in_the_log(
    s3: S3Server,
    s3_url: str,
    closed_port: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("pipeline.ranges._QUIET_S", 0.5)
    reader, store = new_reader(), open_store(s3_url)
    with caplog.at_level(logging.WARNING):
        reads = [begin(reader.read(store, "key", i, 10)) for i in range(30)]
        time.sleep(2)
        with FaultProxy(s3.url, port=closed_port):
            assert [each.result(SECONDS) for each in reads] == [BODY[i : i + 10] for i in range(30)]
    first, second = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        rf"{re.escape(store.url)} cannot be reached: no connection; check the network, "
        r"AWS_ENDPOINT_URL and AWS_REGION; waiting for it, up to 29\d s",
        first,
    )
    assert re.fullmatch(rf"{re.escape(store.url)} answers again after \d+ s", second)


def test_close_leaves_a_mount_that_hangs(hung: Store) -> None:
    reader = new_reader()
    waiting = begin(reader.read(hung, "key", 0, 10))
    time.sleep(0.2)
    assert not waiting.done()
    reader.close()
    with pytest.raises(StoreError, match="closed"):
        waiting.result(SECONDS)


def test_more_hung_reads_than_threads_leave_none_without_an_end(hung: Store) -> None:
    reader = new_reader(patience_s=0.3, stall_s=0.1, requests=50)
    reads = [begin(reader.read(hung, "key", 0, 10)) for _ in range(50)]
    for each in reads:
        with pytest.raises(StoreError, match="has not answered"):
            each.result(SECONDS)


def test_a_process_ends_though_a_mount_hangs(hung: Store) -> None:
    """Its thread still waits for the file then."""
    program = (
        "import sys\n"
        "from pipeline.ranges import FetchConfig, RangeReader, begin\n"
        "from pipeline.store import open_store\n"
        "from pipeline.telemetry import Telemetry\n"
        "reader = RangeReader(FetchConfig(patience_s=0.2, stall_s=0.1), Telemetry())\n"
        "begin(reader.read(open_store(sys.argv[1]), 'key', 0, 10)).result()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, hung.url],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 1
    assert "has not answered" in done.stderr


def test_an_object_replaced_between_two_requests(store: Store, proxy: FaultProxy) -> None:
    info = store.head("key")
    assert info is not None
    proxy.rules = [Rule(kind=Kind.STALL, nth=(1,), after_bytes=1 << 20)]
    reading = begin(new_reader(stall_s=1).read(store, "key", 0, len(BODY), tag=info.tag))
    time.sleep(0.5)
    store.delete("key")
    store.put_if_absent("key", bytes(len(BODY)))
    with pytest.raises(ObjectChangedError, match="recorded"):
        reading.result(SECONDS)


def test_a_cache_needs_its_size() -> None:
    from dataclasses import dataclass, field

    @dataclass(frozen=True)
    class Whole:
        fetch: FetchConfig = field(default_factory=FetchConfig)

    assert load_config(Whole, None, ["fetch.requests=4"]).fetch.requests == 4
    with pytest.raises(ConfigError, match="cache_bytes"):
        load_config(Whole, None, ["fetch.cache_dir=/tmp/somewhere"])
    with pytest.raises(ConfigError, match="needs cache_dir"):
        load_config(Whole, None, ["fetch.cache_bytes=4096"])
