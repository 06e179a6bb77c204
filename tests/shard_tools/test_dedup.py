"""Dedup: no pair is missed, no image is lost that nothing kept stands for."""

import hashlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from pipeline.decode import perceptual_hash
from pipeline.errors import CropstreamError, UsageError
from pipeline.manifest import Snapshot, commit_snapshot, latest_version, read_snapshot
from pipeline.store import Store, open_store
from shard_tools import hamming
from shard_tools.dedup import CLUSTERS_SCHEMA, dedup
from shard_tools.hamming import near_pairs
from shard_tools.indexes import read_indexes
from shard_tools.leaders import Rows, exact_leaders, near_leaders
from shard_tools.mask import mask, restore
from shard_tools.selection import Selection
from tests.support.dataset import pictures
from tests.support.snapshots import write_snapshot

Hashes = npt.NDArray[np.uint64]

MANY = 10**7
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "gravel", "coins")


def planted(seed: int, *, size: int = 3000) -> Hashes:
    """Random hashes, and some with up to ten bits changed; ascending and distinct."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, size, dtype=np.uint64)
    near = rng.choice(hashes, size // 2)
    for number in range(len(near)):
        for bit in rng.choice(64, number % 11, replace=False):
            near[number] ^= np.uint64(1 << int(bit))
    return np.unique(np.concatenate([hashes, near]))


def all_pairs(hashes: Hashes, distance: int) -> set[tuple[int, int]]:
    found = set()
    for first, value in enumerate(hashes):
        near = np.flatnonzero(np.bitwise_count(hashes[first + 1 :] ^ value) <= distance)
        found |= {(first, first + 1 + int(offset)) for offset in near}
    return found


def pairs(hashes: Hashes, distance: int, *, threads: int = 1) -> list[tuple[int, int]]:
    first, second = near_pairs(hashes, distance, max_pairs=MANY, threads=threads)
    return list(zip(first.tolist(), second.tolist(), strict=True))


@pytest.mark.parametrize("distance", range(9))
def test_every_pair_once(distance: int) -> None:
    hashes = planted(distance)
    found = pairs(hashes, distance, threads=2)
    assert len(found) == len(set(found))
    assert set(found) == all_pairs(hashes, distance)
    assert found == pairs(hashes, distance)  # in the same order whoever finds them first


@pytest.mark.parametrize("distance", [1, 2, 3, 4])
def test_every_pair_in_split_buckets(distance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with buckets that are joined by the bits left, level below level."""
    monkeypatch.setattr(hamming, "SCAN", 8)
    low = planted(distance, size=700) % np.uint64(2**30)
    hashes = np.unique(np.concatenate([low, low + np.uint64(2**60), planted(9, size=200)]))
    found = pairs(hashes, distance)
    assert len(found) == len(set(found))
    assert set(found) == all_pairs(hashes, distance)


@settings(max_examples=30)
@given(
    st.sets(st.integers(0, 2**64 - 1).map(lambda n: n & 0x8000_0000_0000_10FF), max_size=300),
    st.integers(0, 8),
)
def test_every_pair_of_dense_hashes(values: set[int], distance: int) -> None:
    hashes = np.array(sorted(values), np.uint64)
    assert sorted(pairs(hashes, distance)) == sorted(all_pairs(hashes, distance))


def test_skewed_hashes_are_not_compared_all_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 hashes that share a band, then two bands: counted are comparisons, not seconds."""
    compared = Counter[int]()
    agree = hamming._agree

    def counting(first: Hashes, second: Hashes, rest: int) -> npt.NDArray[np.bool_]:
        compared[0] += len(first)
        return agree(first, second, rest)

    monkeypatch.setattr(hamming, "_agree", counting)
    rng = np.random.default_rng(0)
    for bits in (13, 26):
        compared.clear()
        free = rng.integers(0, 2 ** (64 - bits), 100_000, dtype=np.uint64)
        hashes = np.unique(free | (np.uint64(1) << np.uint64(63)))
        planted_pair = hashes[500] ^ np.uint64(0b10101)
        hashes = np.unique(np.append(hashes, planted_pair))
        found = {tuple(sorted((int(hashes[a]), int(hashes[b])))) for a, b in pairs(hashes, 3)}
        assert any(int(planted_pair) in pair for pair in found)
        assert compared[0] < 1000 * len(hashes)  # all with all: 50,000 a hash


def test_too_many_pairs_are_refused() -> None:
    hashes = np.arange(2**12, dtype=np.uint64)
    with pytest.raises(UsageError, match="more than 1000 pairs of hashes are within 3 bits"):
        near_pairs(hashes, 3, max_pairs=1000, threads=2)


# Who leads


def leaders_of(
    rows: Rows, *, distance: int = 3, prefer: Any = "largest", flat_bits: int = 0
) -> list[int]:
    return near_leaders(
        rows,
        exact_leaders(rows, prefer),
        distance=distance,
        flat_bits=flat_bits,
        prefer=prefer,
        max_pairs=MANY,
        threads=1,
    ).tolist()


def as_rows(
    phash: list[int | None], *, pixels: list[int] | None = None, sha: list[int] | None = None
) -> Rows:
    count = len(phash)
    digests = np.zeros((count, 2), np.uint64)
    digests[:, 1] = np.array(sha or range(count), np.uint64)  # the first halves are all alike
    return Rows(
        digests,
        phash=np.array([value or 0 for value in phash], np.uint64),
        has_phash=np.array([value is not None for value in phash], np.bool_),
        pixels=np.array(pixels or [1] * count, np.int64),
        length_bytes=np.ones(count, np.int64),
    )


def slow_leaders(rows: Rows, distance: int) -> list[int]:
    """What shard_tools.leaders promises for rows that are all different: best first, one by one."""
    order = sorted(range(len(rows)), key=lambda row: (-int(rows.pixels[row]), row))
    rank = {row: place for place, row in enumerate(order)}
    kept: list[int] = []
    leaders = list(range(len(rows)))
    for row in order:
        near = [
            (int(np.bitwise_count(rows.phash[row] ^ rows.phash[other])), rank[other], other)
            for other in kept
        ]
        near = [found for found in near if found[0] <= distance]
        if near:
            leaders[row] = min(near)[2]
        else:
            kept.append(row)
    return leaders


@settings(max_examples=60)
@given(
    st.dictionaries(st.integers(1, 255), st.integers(1, 3), max_size=60).map(
        lambda pixels: list(pixels.items())
    ),
    st.integers(1, 3),
)
def test_leaders_are_those_of_the_slow_way(values: list[tuple[int, int]], distance: int) -> None:
    spread = [0x0101_0000_FFFF_0000 ^ value for value, _ in values]
    rows = as_rows(list(spread), pixels=[pixels for _, pixels in values])
    assert leaders_of(rows, distance=distance) == slow_leaders(rows, distance)


def test_a_chain_does_not_merge_what_is_unlike() -> None:
    """Each three bits from the next, the ends nine apart: the second goes, the third does not."""
    base = 0xFF00FF00FF00FF00
    chain: list[int | None] = [base ^ mask_ for mask_ in (0, 0b111, 0b111111, 0b111111111)]
    assert leaders_of(as_rows(chain)) == [0, 0, 2, 2]
    assert leaders_of(as_rows(chain, pixels=[1, 9, 1, 1])) == [1, 1, 1, 3]


def test_the_best_stays() -> None:
    same: list[int | None] = [0xF0F0F0F0] * 4
    assert leaders_of(as_rows(same, pixels=[4, 9, 9, 1])) == [1] * 4
    assert leaders_of(as_rows(same, pixels=[4, 9, 9, 1]), prefer="first") == [0] * 4
    rows = as_rows(same, pixels=[9] * 4)
    rows.length_bytes[:] = [5, 5, 7, 7]
    assert leaders_of(rows) == [2] * 4


def test_a_copy_of_what_is_dropped_follows() -> None:
    """0 is a copy of 1, which has the hash of 2, which is near 3, which is kept."""
    base = 0xF0F0F0F0
    phash: list[int | None] = [base, base, base, base ^ 1]
    assert leaders_of(as_rows(phash, pixels=[1, 2, 3, 4], sha=[5, 5, 6, 7])) == [3] * 4


def test_hashes_that_tell_nothing_are_exact_only() -> None:
    full = 2**64 - 1
    phash: list[int | None] = [0, 0, 1, full, full - 2, None, None, 0]
    rows = as_rows(phash, sha=[1, 2, 3, 4, 5, 6, 6, 1])
    assert leaders_of(rows, flat_bits=1) == [0, 1, 2, 3, 4, 5, 5, 0]
    assert leaders_of(rows, flat_bits=0)[2:5] == [2, 3, 4]


# The whole


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    body = io.BytesIO()
    image.save(body, kind, **options)
    return body.getvalue()


def image_row(name: str, body: bytes) -> dict[str, Any]:
    return {"source": name, "data": body, "phash": perceptual_hash(body)}


@pytest.fixture(scope="module")
def photographs() -> list[list[dict[str, Any]]]:
    """Shards of six photographs: as they are, an exact copy, encoded again, made smaller; noise."""
    rows: dict[str, dict[str, Any]] = {}
    for name in PHOTOGRAPHS:
        image = Image.fromarray(getattr(data, name)()[:400, :400])
        body = encoded(image, quality=90)
        half = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        rows[name] = image_row(name, body)
        rows[f"{name}/copy"] = image_row(f"{name}/copy", body)
        rows[f"{name}/again"] = image_row(f"{name}/again", encoded(image, quality=55))
        rows[f"{name}/half"] = image_row(f"{name}/half", encoded(half, quality=80))
    for number, body in enumerate(pictures(10)):
        rows[f"noise{number}"] = image_row(f"noise{number}", body)
    for number in range(3):
        page = encoded(Image.new("RGB", (64, 64 + number), "white"))
        rows[f"flat{number}"] = image_row(f"flat{number}", page)
    every = list(rows.values())
    every.insert(4, {"source": "rejected", "reason": "timeout"})
    return [every[::2], every[1::2]]


def sources(store: Store, version: int | None = None) -> set[str]:
    shards = read_indexes(store, read_snapshot(store, version))
    kept = [rows.table.filter(pa.array(rows.kept))["source"].to_pylist() for rows in shards]
    return {source for some in kept for source in some}


def read_table(store: Store, snapshot: Snapshot) -> pa.Table:
    key = snapshot.note.rpartition("clusters: ")[2]
    return pq.read_table(io.BytesIO(store.get(key)))


def test_photographs(dataset: str, photographs: list[list[dict[str, Any]]]) -> None:
    store = open_store(dataset)
    write_snapshot(store, photographs)
    ticks: list[int] = []
    found = dedup(store, on_tick=lambda done, rejected: ticks.append(done))
    assert (found.images, found.exact, found.near, found.clusters) == (37, 6, 12, 6)
    assert (found.flat, found.without_hash, found.is_new) == (3, 0, True)
    assert ticks == [19, 38]
    left = set(PHOTOGRAPHS) | {f"noise{n}" for n in range(10)} | {f"flat{n}" for n in range(3)}
    survivors = {source.partition("/")[0] for source in sources(store)}
    assert survivors == left
    assert len(sources(store)) == len(left)
    assert not any("/again" in source or "/half" in source for source in sources(store))
    assert found.snapshot.version == 2
    assert found.clusters_url == store.url_of(found.snapshot.note.rpartition("clusters: ")[2])
    again = dedup(store)
    assert (again.is_new, again.exact, again.near, again.clusters_url) == (False, 0, 0, None)
    assert restore(store, 1).version == 3
    assert sources(store) == sources(store, 1)


def test_the_table_of_clusters(tmp_path: Path, photographs: list[list[dict[str, Any]]]) -> None:
    store = open_store(tmp_path)
    write_snapshot(store, photographs)
    table = read_table(store, dedup(store).snapshot)
    assert table.schema.equals(CLUSTERS_SCHEMA)
    rows = table.to_pylist()
    assert [row["cluster"] for row in rows] == [n for n in range(6) for _ in range(4)]
    assert [row["kept"] for row in rows] == [True, False, False, False] * 6
    for row in rows:
        given_row = photographs[row["shard"]][row["row"]]
        assert (given_row["source"], given_row["phash"]) == (row["source"], row["phash"])
        assert hashlib.sha256(given_row["data"]).digest() == row["sha256"]
        assert (
            row["source"].partition("/")[0] == rows[4 * row["cluster"]]["source"].partition("/")[0]
        )
        difference = row["phash"] ^ rows[4 * row["cluster"]]["phash"]
        assert row["distance"] == difference.bit_count() <= 3


def test_exact_only_and_dry(tmp_path: Path, photographs: list[list[dict[str, Any]]]) -> None:
    store = open_store(tmp_path)
    write_snapshot(store, photographs)
    before = {info.key for info in store.list()}
    dry = dedup(store, near=False, dry_run=True)
    assert (dry.exact, dry.near, dry.is_new, dry.clusters_url) == (6, 0, False, None)
    assert {info.key for info in store.list()} == before
    assert dedup(store, near=False).snapshot.num_kept == 31
    assert sum("/copy" in source for source in sources(store)) <= 6


def test_masked_and_rejected_rows_take_no_part(
    tmp_path: Path, photographs: list[list[dict[str, Any]]]
) -> None:
    store = open_store(tmp_path)
    write_snapshot(store, photographs)
    mask(store, Selection(patterns=("*/again", "*/half", "*/copy")))
    found = dedup(store)
    assert (found.images, found.exact, found.near) == (19, 0, 0)
    assert latest_version(store) == 2


def test_images_masked_meanwhile_are_not_lost(
    tmp_path: Path, photographs: list[list[dict[str, Any]]]
) -> None:
    """A takedown of what dedup is about to keep, while it reads: the copies must not go as well."""
    store = open_store(tmp_path)
    write_snapshot(store, photographs)
    taken = Selection(patterns=PHOTOGRAPHS)

    def on_tick(done: int, rejected: int) -> None:
        if done == 38:
            mask(store, taken)

    with pytest.raises(CropstreamError, match="run dedup again"):
        dedup(store, on_tick=on_tick)
    dedup(store)
    assert {source.partition("/")[0] for source in sources(store)} >= set(PHOTOGRAPHS)


def test_shards_sealed_meanwhile_stay(
    tmp_path: Path, photographs: list[list[dict[str, Any]]]
) -> None:
    store = open_store(tmp_path)
    first = write_snapshot(store, photographs)

    def on_tick(done: int, rejected: int) -> None:
        if done == 38:
            more = write_snapshot(store, [photographs[0]])
            tables = [more.table, first.table]
            table = pa.concat_tables([t.replace_schema_metadata(None) for t in tables])
            commit_snapshot(store, table, version=3, attempt="sealed")

    found = dedup(store, on_tick=on_tick)
    assert found.snapshot.version == 4
    assert found.snapshot.mask[0] is None
    assert found.snapshot.num_kept == 18 + 19  # the new shard whole, the six and 13 others


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"distance": 9}, "give 0 to 8"),
        ({"flat_bits": 32}, "give 0 to 31"),
        ({"prefer": "best"}, "none of largest, first"),
        ({"memory_bytes": 1e6}, "need about 0.4 GB"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    store = open_store(tmp_path)
    write_snapshot(store, [[image_row("a", pictures(1)[0])]])
    with pytest.raises(UsageError, match=message):
        dedup(store, **wrong)
