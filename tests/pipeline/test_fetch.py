"""Reading runs of samples from real stores: across shards, with masks, through an outage."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import AccessDeniedError, StoreError
from pipeline.fetch import BadSample, Prefetcher, RawSample, SampleReader, split_into_pieces
from pipeline.manifest import SNAPSHOT_SCHEMA, Snapshot, read_snapshot
from pipeline.store import open_store
from pipeline.telemetry import Telemetry
from tests.support.dataset import pictures, write_dataset
from tests.support.s3_server import S3Server

IMAGES = pictures(20)


def reader_of(url: str, snapshot: Snapshot | None = None, **settings) -> SampleReader:
    store = open_store(url)
    return SampleReader(store, snapshot or read_snapshot(store), Telemetry(), **settings)


def with_rows(snapshot: Snapshot, rows: list[dict]) -> Snapshot:
    return Snapshot(pa.Table.from_pylist(rows, SNAPSHOT_SCHEMA), snapshot.version)


@pytest.mark.parametrize(("first", "last"), [(0, 19), (4, 4), (3, 9), (5, 14), (19, 19)])
def test_a_run_over_shards_with_an_empty_one_between(tmp_path: Path, first: int, last: int) -> None:
    write_dataset(str(tmp_path), IMAGES, per_shard=5)
    snapshot = read_snapshot(open_store(str(tmp_path)))
    rows = snapshot.table.to_pylist()
    gap = {**rows[0], "tar": "data/none.tar", "index": "data/none.parquet", "kept": 0}
    samples = reader_of(str(tmp_path), with_rows(snapshot, [*rows[:2], gap, *rows[2:]])).read(
        first, last
    )
    assert [sample.number for sample in samples] == list(range(first, last + 1))
    assert [s.data for s in samples if isinstance(s, RawSample)] == IMAGES[first : last + 1]


def test_masked_rows_are_not_there_and_a_damaged_mask_is_seen(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), IMAGES, per_shard=20)
    keep = np.arange(20) % 3 == 0
    mask = np.packbits(keep, bitorder="little").tobytes()
    store = open_store(str(tmp_path))
    store.put_if_absent("masks/one", mask)
    (row,) = read_snapshot(store).table.to_pylist()
    row |= {"mask": "masks/one", "mask_sha256": hashlib.sha256(mask).digest(), "kept": 7}
    samples = reader_of(str(tmp_path), with_rows(read_snapshot(store), [row])).read(0, 6)
    assert [s.data for s in samples if isinstance(s, RawSample)] == IMAGES[::3]

    row["mask_sha256"] = bytes(32)
    (bad,) = reader_of(str(tmp_path), with_rows(read_snapshot(store), [row])).read(0, 0)
    assert isinstance(bad, BadSample)
    assert "mask" in bad.reason


def test_an_outage_is_waited_for_and_costs_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = S3Server(tmp_path)
    server.start()
    try:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        url = server.make_bucket("outage")
        write_dataset(url, IMAGES, per_shard=20)
        reader = reader_of(url, patience_s=60)
        assert len(reader.read(0, 1)) == 2
        server.stop()
        with pytest.raises(StoreError, match="outage"):
            reader_of(url, read_snapshot_of(reader), patience_s=0).read(2, 3)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(reader.read, 2, 19)
            time.sleep(2)
            assert not waiting.done()
            server.start()  # by this thread: the server ends with the one that started it
            samples = waiting.result(60)
    finally:
        server.stop()
    assert [s.data for s in samples if isinstance(s, RawSample)] == IMAGES[2:]


def read_snapshot_of(reader: SampleReader) -> Snapshot:
    return reader._snapshot


def test_denied_access_reaches_who_waits_for_a_sample(
    s3: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(s3_url, IMAGES)
    snapshot = read_snapshot(open_store(s3_url))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    prefetcher = Prefetcher(
        reader_of(s3_url, snapshot),
        iter(split_into_pieces(0, range(20), 5)),
        ahead_bytes=1 << 20,
        sample_bytes=1000,
        threads=2,
    )
    try:
        with pytest.raises(AccessDeniedError, match="AWS_SECRET_ACCESS_KEY"):
            prefetcher.take(0, 7)
    finally:
        prefetcher.close()


def test_read_ahead_stays_within_its_bytes_and_nothing_is_kept(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), IMAGES)
    mean = sum(map(len, IMAGES)) / 20
    requested: list[int] = []

    def pieces():
        for piece in split_into_pieces(0, range(20), 2):
            requested.append(piece.first)
            yield piece

    prefetcher = Prefetcher(
        reader_of(str(tmp_path)),
        pieces(),
        ahead_bytes=round(5 * mean),
        sample_bytes=mean,
        threads=1,
    )
    try:
        for number in range(20):
            sample = prefetcher.take(0, number)
            assert isinstance(sample, RawSample)
            assert sample.data == IMAGES[number]
            assert max(requested) <= number + 10
    finally:
        prefetcher.close()
    assert not prefetcher._arrived
    assert not prefetcher._waiting
