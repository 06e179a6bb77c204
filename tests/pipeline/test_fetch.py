"""Reading ahead of need: in order, within its bytes, from several threads and sources."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import AccessDeniedError, StoreError
from pipeline.fetch import FetchConfig, Piece, Prefetcher, pieces_in_order, split_into_pieces
from pipeline.manifest import Snapshot, read_snapshot
from pipeline.mixture import Window
from pipeline.samples import RawSample, SampleReader
from pipeline.store import open_store
from pipeline.telemetry import Telemetry
from tests.support.dataset import pictures, write_dataset
from tests.support.fault_proxy import FaultProxy, Kind, Rule
from tests.support.s3_server import S3Server

IMAGES = pictures(20)
MEAN_BYTES = sum(map(len, IMAGES)) / 20
SECONDS = 60  # what would take longer hangs


def reader_of(url: str, snapshot: Snapshot | None = None, **settings: Any) -> SampleReader:
    store = open_store(url)
    fetch = FetchConfig(**settings)
    return SampleReader(store, snapshot or read_snapshot(store), Telemetry(), fetch=fetch)


def window(numbers: range = range(20), source: int = 0, epoch: int = 0) -> Window:
    return Window(source, epoch, list(numbers))


def prefetcher_of(
    *readers: SampleReader, pieces: Iterator[Piece], ahead_bytes: int = 1 << 20
) -> Prefetcher:
    sizes = [MEAN_BYTES] * len(readers)
    return Prefetcher(readers, pieces, ahead_bytes=ahead_bytes, sample_bytes=sizes)


def test_pieces_hold_what_a_window_needs_of_a_chunk_in_the_order_of_need() -> None:
    pieces = split_into_pieces(Window(1, 2, [13, 4, 11, 0, 19]), 10)
    assert pieces == [
        Piece(1, 2, 11, 19, frozenset({13, 11, 19})),
        Piece(1, 2, 0, 4, frozenset({4, 0})),
    ]
    windows = [Window(0, 0, [3]), Window(1, 5, [3, 12])]
    firsts = [(p.source, p.epoch, p.first) for p in pieces_in_order(windows, [10, 4])]
    assert firsts == [(0, 0, 3), (1, 5, 3), (1, 5, 12)]


def test_read_ahead_stays_within_its_bytes_and_nothing_is_kept(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), IMAGES)
    requested: list[int] = []

    def pieces() -> Iterator[Piece]:
        for piece in split_into_pieces(window(), 2):
            requested.append(piece.first)
            yield piece

    prefetcher = prefetcher_of(
        reader_of(str(tmp_path)), pieces=pieces(), ahead_bytes=round(5 * MEAN_BYTES)
    )
    try:
        for number in range(20):
            sample = prefetcher.take(0, 0, number)
            assert isinstance(sample, RawSample)
            assert sample.data == IMAGES[number]
            assert max(requested) <= number + 10
    finally:
        prefetcher.close()
    assert not prefetcher._waiting
    assert prefetcher._held_bytes == pytest.approx(0, abs=1e-6)


def test_what_is_waited_for_comes_whatever_the_budget(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), IMAGES)
    prefetcher = prefetcher_of(
        reader_of(str(tmp_path), requests=1),
        pieces=pieces_in_order([window()], [3]),
        ahead_bytes=1,
    )
    try:
        order = [19, *range(19)]  # the last first, by eight threads
        with ThreadPoolExecutor(8) as threads:
            taken = [threads.submit(prefetcher.take, 0, 0, number) for number in order]
            for number, future in zip(order, taken, strict=True):
                sample = future.result(SECONDS)
                assert isinstance(sample, RawSample)
                assert sample.data == IMAGES[number]
    finally:
        prefetcher.close()


def test_reading_goes_on_while_the_next_pieces_are_worked_out(tmp_path: Path) -> None:
    """They take until the first piece is here, which waits for nobody."""
    write_dataset(str(tmp_path), IMAGES)
    come = threading.Event()

    def pieces() -> Iterator[Piece]:
        first, *others = split_into_pieces(window(), 5)
        yield first
        for _ in range(SECONDS * 100):
            if prefetcher.is_here(0, 0, 4):
                come.set()
                break
            threading.Event().wait(0.01)
        yield from others

    prefetcher = prefetcher_of(reader_of(str(tmp_path)), pieces=pieces())
    try:
        for number in range(20):
            sample = prefetcher.take(0, 0, number)
            assert isinstance(sample, RawSample)
            assert sample.data == IMAGES[number]
    finally:
        prefetcher.close()
    assert come.is_set()
    assert prefetcher._held_bytes == pytest.approx(0, abs=1e-6)


def test_sources_and_epochs_are_told_apart(tmp_path: Path) -> None:
    others = pictures(20, seed=1)
    write_dataset(f"{tmp_path}/one", IMAGES)
    write_dataset(f"{tmp_path}/two", others)
    first = reader_of(f"{tmp_path}/one")
    store = open_store(f"{tmp_path}/two")
    second = SampleReader(store, read_snapshot(store), first.telemetry, ranges=first.ranges)
    windows = [window(source=0), window(source=1), window(source=1, epoch=1)]
    prefetcher = prefetcher_of(first, second, pieces=pieces_in_order(windows, [5, 7]))
    try:
        for source, epoch, images in ((1, 1, others), (0, 0, IMAGES), (1, 0, others)):
            for number in range(20):
                sample = prefetcher.take(source, epoch, number)
                assert isinstance(sample, RawSample)
                assert sample.data == images[number]
    finally:
        prefetcher.close()


def test_waiting_is_counted(s3_url: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(s3_url, IMAGES)
    with FaultProxy(s3.url, [Rule(kind=Kind.DELAY, target=r"\.tar", seconds=0.3)]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        reader = reader_of(s3_url)
        prefetcher = prefetcher_of(reader, pieces=pieces_in_order([window()], [20]))
        for number in range(20):
            prefetcher.take(0, 0, number)
        prefetcher.close()
    assert reader.telemetry.total("sample_wait_s") >= 0.3
    assert reader.telemetry.total("fetch_s") >= 0.3


def test_denied_access_reaches_who_waits_for_a_sample(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(s3_url, IMAGES)
    snapshot = read_snapshot(open_store(s3_url))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    prefetcher = prefetcher_of(reader_of(s3_url, snapshot), pieces=pieces_in_order([window()], [5]))
    try:
        with pytest.raises(AccessDeniedError, match="AWS_SECRET_ACCESS_KEY"):
            prefetcher.take(0, 0, 7)
    finally:
        prefetcher.close()


def test_close_reaches_who_waits_for_a_sample(
    s3_url: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(s3_url, IMAGES)
    snapshot = read_snapshot(open_store(s3_url))
    with FaultProxy(s3.url, [Rule(kind=Kind.STALL)]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        prefetcher = prefetcher_of(
            reader_of(s3_url, snapshot), pieces=pieces_in_order([window()], [5])
        )
        with ThreadPoolExecutor(20) as threads:
            waiting = [threads.submit(prefetcher.take, 0, 0, number) for number in range(20)]
            threading.Event().wait(0.3)
            assert not any(future.done() for future in waiting)
            prefetcher.close()
            for future in waiting:
                with pytest.raises(StoreError, match="closed"):
                    future.result(SECONDS)
        with pytest.raises(StoreError, match="closed"):
            prefetcher.take(0, 1, 0)


def test_a_sample_that_is_in_no_piece_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), IMAGES)
    prefetcher = prefetcher_of(reader_of(str(tmp_path)), pieces=pieces_in_order([window()], [5]))
    try:
        prefetcher.take(0, 0, 3)
        for name in ((0, 0, 20), (0, 0, 3), (0, 1, 4)):
            with pytest.raises(LookupError, match="no piece"):
                prefetcher.take(*name)
    finally:
        prefetcher.close()
