"""Runs of samples from real stores: across shards, with masks, through damage and an outage."""

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import samples
from pipeline.errors import StoreError
from pipeline.manifest import SNAPSHOT_SCHEMA, Snapshot, read_snapshot
from pipeline.ranges import FetchConfig
from pipeline.samples import BadSample, RawSample, SampleReader
from pipeline.shards import encode_index, parse_parquet
from pipeline.store import open_store
from pipeline.telemetry import Telemetry
from tests.support.dataset import pictures, write_dataset
from tests.support.fault_proxy import FaultProxy, Kind, Rule
from tests.support.s3_server import S3Server

IMAGES = pictures(20)


def reader_of(url: str, snapshot: Snapshot | None = None, **settings: Any) -> SampleReader:
    store = open_store(url)
    fetch = FetchConfig(**settings)
    return SampleReader(store, snapshot or read_snapshot(store), Telemetry(), fetch=fetch)


def data_of(found: list[RawSample | BadSample]) -> list[bytes]:
    return [sample.data for sample in found if isinstance(sample, RawSample)]


def with_rows(snapshot: Snapshot, rows: list[dict[str, Any]]) -> Snapshot:
    return Snapshot(pa.Table.from_pylist(rows, SNAPSHOT_SCHEMA), snapshot.version)


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.mark.parametrize(("first", "last"), [(0, 19), (4, 4), (3, 9), (5, 14), (19, 19)])
def test_a_run_over_shards_with_an_empty_one_between(tmp_path: Path, first: int, last: int) -> None:
    labels = [f"class{i}" for i in range(20)]
    keys = write_dataset(str(tmp_path), IMAGES, per_shard=5, labels=labels)
    snapshot = read_snapshot(open_store(str(tmp_path)))
    rows = snapshot.table.to_pylist()
    gap = {**rows[0], "tar": "data/none.tar", "index": "data/none.parquet", "kept": 0}
    reader = reader_of(str(tmp_path), with_rows(snapshot, [*rows[:2], gap, *rows[2:]]))
    assert reader.read(first, last) == [
        RawSample(i, keys[i], f"data/00/{i // 5 * 5:06d}.tar", IMAGES[i], labels[i])
        for i in range(first, last + 1)
    ]


@given(body=st.binary(max_size=40), data=st.data())
def test_bytes_are_found_whatever_parts_they_came_in(body: bytes, data: st.DataObject) -> None:
    place = st.integers(0, len(body))
    cuts = [0, *sorted(data.draw(st.lists(place, max_size=5))), len(body)]
    parts = [body[start:end] for start, end in pairwise(cuts)]
    bounds = sorted(data.draw(st.lists(st.integers(0, 50), max_size=8)))
    found = samples._Body(parts)
    for start, end in zip(bounds[::2], bounds[1::2], strict=False):
        assert found.copy(start, end - start) == body[start:end]
        assert sum(map(len, parts)) <= max(0, len(body) - end)


def with_index(url: str, change: Callable[[list[dict[str, Any]]], object]) -> Snapshot:
    """A data set of one shard whose index, hash and all, says what somebody wants."""
    store = open_store(url)
    (row,) = read_snapshot(store).table.to_pylist()
    index = parse_parquet(store.get(row["index"])).to_pylist()
    change(index)
    body = encode_index(index, ["label"])
    store.put_if_absent("other.parquet", body)
    row |= {"index": "other.parquet", "index_tag": None, "index_bytes": len(body)}
    row |= {"index_sha256": hashlib.sha256(body).digest()}
    row |= {"kept": sum(each["status"] == "ok" for each in index)}
    return with_rows(read_snapshot(store), [row])


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"offset": -512}, "outside the shard"),
        ({"offset": 10**9}, "outside the shard"),
        ({"offset": 2**63 - 1}, "outside the shard"),
        ({"offset": None}, "outside the shard"),
        ({"offset": 0}, "in the sample before"),
        ({"length": -1}, "outside the shard"),
        ({"length": None}, "outside the shard"),
        ({"length": 10**7}, "outside the shard"),
        ({"length": 64 * 2**20 + 1}, "too large: 67108865 bytes, allowed are 67108864"),
        ({"length": 2**63 - 1}, "too large"),
        ({"crc32c": None}, "checksum differs"),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", [1, 19])
def test_a_row_of_nonsense_costs_its_sample_and_is_not_asked_for(
    tmp_path: Path, wrong: dict[str, int | None], reason: str, place: int
) -> None:
    write_dataset(str(tmp_path), IMAGES, per_shard=20)
    snapshot = with_index(str(tmp_path), lambda rows: rows[place].update(wrong))
    reader = reader_of(str(tmp_path), snapshot)
    found = reader.read(0, 19)
    assert data_of(found) == IMAGES[:place] + IMAGES[place + 1 :]
    bad = found[place]
    assert isinstance(bad, BadSample)
    assert reason in bad.reason
    assert bad.key
    assert reader.read(place, place) == [bad]
    most_bytes = 2 * int(snapshot.tar_bytes[0]) + int(snapshot.index_bytes[0])
    assert reader.telemetry.total("fetch_bytes") <= most_bytes


def test_what_is_too_large_and_wide_gaps_are_not_fetched(tmp_path: Path) -> None:
    """Two small samples beside each other, then one of each kind between two more."""
    giant, gap = bytes(64 * 2**20 + 1), bytes(9 * 2**20)
    images = [*IMAGES[:2], giant, IMAGES[2], gap, IMAGES[3]]
    write_dataset(str(tmp_path), images, per_shard=6)
    snapshot = with_index(str(tmp_path), lambda rows: rows[4].update(status="rejected"))
    reader = reader_of(str(tmp_path), snapshot)
    found = reader.read(0, 4)
    assert data_of(found) == IMAGES[:4]
    assert isinstance(found[2], BadSample)
    assert found[2].reason.startswith("too large")
    assert reader.telemetry.total("fetch_requests") == 1 + 3
    assert reader.telemetry.total("fetch_bytes") < 2**20


def test_masked_rows_are_not_there_and_a_damaged_mask_is_seen(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), IMAGES, per_shard=20)
    keep = np.arange(20) % 3 == 0
    mask = np.packbits(keep, bitorder="little").tobytes()
    store = open_store(str(tmp_path))
    store.put_if_absent("masks/one", mask)
    (row,) = read_snapshot(store).table.to_pylist()
    row |= {"mask": "masks/one", "mask_sha256": hashlib.sha256(mask).digest(), "kept": 7}
    found = reader_of(str(tmp_path), with_rows(read_snapshot(store), [row])).read(0, 6)
    assert data_of(found) == IMAGES[::3]

    row["mask_sha256"] = bytes(32)
    (bad,) = reader_of(str(tmp_path), with_rows(read_snapshot(store), [row])).read(0, 0)
    assert isinstance(bad, BadSample)
    assert "mask" in bad.reason


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_a_byte_that_flipped_on_the_way_is_fetched_again(
    s3_url: str, proxy: FaultProxy, suffix: str
) -> None:
    write_dataset(s3_url, IMAGES, per_shard=20)
    proxy.rules = [Rule(kind=Kind.FLIP, target=rf"data/.*{suffix}", nth=(1,), offset=600)]
    reader = reader_of(s3_url)
    assert data_of(reader.read(0, 19)) == IMAGES
    assert proxy.count(Kind.FLIP) == 1
    assert reader.telemetry.total("fetch_rereads") == 1


def test_a_byte_that_stays_flipped_costs_one_sample(s3_url: str, proxy: FaultProxy) -> None:
    keys = write_dataset(s3_url, IMAGES, per_shard=20)
    offset = 512 + len(IMAGES[0]) + (-len(IMAGES[0]) % 512) + 512 + 10  # in the second image
    proxy.rules = [Rule(kind=Kind.FLIP, target=r"\.tar", offset=offset)]
    found = reader_of(s3_url).read(0, 19)
    assert data_of(found) == [IMAGES[0], *IMAGES[2:]]
    assert found[1] == BadSample(1, keys[1], "data/00/000000.tar", "checksum differs")
    assert proxy.count(Kind.FLIP) == 2


def test_an_index_that_stays_damaged_costs_its_samples(s3_url: str, proxy: FaultProxy) -> None:
    write_dataset(s3_url, IMAGES, per_shard=10)
    proxy.rules = [Rule(kind=Kind.FLIP, target=r"000010\.parquet", offset=100)]
    found = reader_of(s3_url).read(0, 19)
    assert data_of(found) == IMAGES[:10]
    bad = [sample for sample in found if isinstance(sample, BadSample)]
    assert [sample.number for sample in bad] == list(range(10, 20))
    assert all("000010.parquet" in sample.reason for sample in bad)


def test_a_missing_a_replaced_and_a_cut_shard(s3_url: str, s3: S3Server) -> None:
    write_dataset(s3_url, IMAGES, per_shard=5)
    store = open_store(s3_url)
    tars = [store.get(f"data/00/{i:06d}.tar") for i in range(0, 20, 5)]
    bodies = [tars[0], None, tars[2][::-1], tars[3][:2000]]
    for i, body in enumerate(bodies):
        store.delete(f"data/00/{5 * i:06d}.tar")
        if body is not None:
            store.put_if_absent(f"data/00/{5 * i:06d}.tar", body)
    found = reader_of(s3_url).read(0, 19)
    assert data_of(found) == IMAGES[:5]
    reasons = [sample.reason for sample in found if isinstance(sample, BadSample)]
    assert len(reasons) == 15
    assert "no such object" in reasons[0]
    assert all("recorded" in reason for reason in reasons[5:])


def test_an_index_is_read_once_however_many_ask(s3_url: str, proxy: FaultProxy) -> None:
    write_dataset(s3_url, IMAGES, per_shard=10)
    proxy.exchanges.clear()
    reader = reader_of(s3_url)
    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(lambda i: reader.read(i, i), range(20)):
            assert len(data_of(found)) == 1
    indexes = [e for e in proxy.exchanges if re.search(r"data/.*\.parquet", e.request.target)]
    assert len(indexes) == 2


def test_indexes_are_forgotten_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_INDEX_CACHE_BYTES", 1)
    write_dataset(str(tmp_path), IMAGES, per_shard=5)
    reader = reader_of(str(tmp_path))
    for _ in range(2):
        assert data_of(reader.read(0, 19)) == IMAGES
    assert reader.telemetry.total("fetch_requests") == 2 * (4 + 4)


def test_an_outage_is_waited_for_and_costs_no_sample(
    s3_url: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(s3_url, IMAGES, per_shard=20)
    snapshot = read_snapshot(open_store(s3_url))
    with FaultProxy(s3.url) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        reader = reader_of(s3_url, snapshot)
        assert len(reader.read(0, 1)) == 2
    with pytest.raises(StoreError, match="no connection"):
        reader_of(s3_url, snapshot, patience_s=0).read(2, 3)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(reader.read, 2, 19)
        time.sleep(0.5)
        assert not waiting.done()
        with FaultProxy(s3.url, port=int(way.url.rpartition(":")[2])):
            assert data_of(waiting.result(60)) == IMAGES[2:]


def test_everything_is_read_on_one_thread(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), IMAGES)
    readers = [reader_of(str(tmp_path)) for _ in range(3)]
    for reader in readers:
        assert data_of(reader.read(0, 19)) == IMAGES
    assert [thread.name for thread in threading.enumerate()].count("fetch") == 1


@pytest.mark.parametrize("place", ["file", "s3"])
def test_a_cache_serves_what_it_has_and_is_not_trusted(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("s3_url") if place == "s3" else str(tmp_path / "data")
    write_dataset(url, IMAGES, per_shard=20)
    settings = {"cache_dir": str(tmp_path / "cache"), "cache_bytes": 1 << 30}
    first = reader_of(url, **settings)
    for _ in range(2):
        assert data_of(first.read(0, 19)) == IMAGES
    assert first.telemetry.total("cache_hits") == 1
    assert first.telemetry.total("fetch_requests") == 2  # the index, the samples

    (entry,) = [path for path in (tmp_path / "cache").rglob("*-*") if path.is_file()]
    body = bytearray(entry.read_bytes())
    body[100] ^= 1
    entry.write_bytes(body)
    for reader in (first, reader_of(url, **settings)):  # one has checked the entry, one has not
        entry.write_bytes(body)
        assert data_of(reader.read(0, 19)) == IMAGES
        assert entry.read_bytes() != body
        hits = reader.telemetry.total("cache_hits")
        assert data_of(reader.read(0, 19)) == IMAGES
        assert reader.telemetry.total("cache_hits") == hits + 1


def test_damaged_samples_are_not_cached(s3_url: str, proxy: FaultProxy, tmp_path: Path) -> None:
    write_dataset(s3_url, IMAGES, per_shard=20)
    proxy.rules = [Rule(kind=Kind.FLIP, target=r"\.tar", offset=600)]
    reader = reader_of(s3_url, cache_dir=str(tmp_path), cache_bytes=1 << 30)
    for _ in range(2):
        assert len(data_of(reader.read(0, 19))) == 19
    proxy.rules = []
    assert data_of(reader.read(0, 19)) == IMAGES
