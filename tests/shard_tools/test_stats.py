"""Quantiles in bounded memory."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline.manifest import SNAPSHOT_SCHEMA, Snapshot
from pipeline.shards import encode_index
from pipeline.store import open_store
from shard_tools.stats import QUANTILES, Spread, collect


@given(st.lists(st.lists(st.integers(0, 1000), max_size=20), min_size=1, max_size=8))
def test_exact_while_few(parts: list[list[int]]) -> None:
    values = [value for part in parts for value in part]
    spread = Spread()
    for part in parts:
        spread.add(np.array(part, np.int64))
    if values:
        expected = np.quantile(values, QUANTILES, method="inverted_cdf")
        assert spread.quantiles() == expected.astype(int).tolist()


@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), st.integers(10, 50))
def test_every_nth_of_many(lengths: list[int], limit: int) -> None:
    """However the values arrive, those kept are evenly spaced."""
    spread = Spread(limit)
    values = np.arange(sum(lengths), dtype=np.int64)
    for part in np.split(values, np.cumsum(lengths)[:-1]):
        spread.add(part)
    assert len(spread._kept) <= limit
    assert spread._kept.tolist() == values[:: spread._step].tolist()


def test_nulls_are_no_values(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    row = {"key": "k", "source": "s", "status": "ok", "length": 7}
    body = encode_index([row, row])
    store.put_if_absent("i", body)
    shard = {"tar": "t", "index": "i", "tar_bytes": 0, "index_bytes": len(body), "rows": 2}
    shard |= {"tar_hash": bytes(32), "index_sha256": hashlib.sha256(body).digest(), "kept": 2}
    found = collect(store, Snapshot(pa.Table.from_pylist([shard], SNAPSHOT_SCHEMA), 1))
    assert (found.images, found.image_bytes) == (2, 14)
    assert found.quantiles == {"length": [7] * len(QUANTILES)}


def test_close_when_thinned() -> None:
    spread = Spread(1000)
    for part in np.split(np.random.default_rng(0).permutation(100_000), 100):
        spread.add(part)
    wanted = 100_000 * np.array(QUANTILES)
    assert np.abs(np.array(spread.quantiles()) - wanted).max() < 6000
