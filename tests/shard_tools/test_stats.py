"""What a data set holds: counts over indexes and masks."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import ShardError
from pipeline.manifest import SNAPSHOT_SCHEMA, Snapshot
from pipeline.shards import encode_index
from pipeline.store import open_store
from shard_tools.stats import SourceCounts, collect, table
from shard_tools.tally import QUANTILES, Histogram
from tests.support.dataset import pictures
from tests.support.snapshots import write_snapshot

IMAGE = pictures(1, size_px=(64, 65))[0]


def image(source: str, label: str | None = None, **columns: object) -> dict[str, object]:
    return {"data": IMAGE, "source": source, "label": label, **columns}


def reject(source: str, reason: str) -> dict[str, object]:
    return {"source": source, "reason": reason}


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    """Two shards: 5 images, of which 2 are masked, 3 rejects and 1 that a retry superseded."""
    first = [
        image("https://a.example/1", "cat"),
        reject("https://a.example/2", "timeout"),
        image("https://a.example/3", "dog"),
        reject("https://b.example/1", "timeout"),
        image("https://b.example/2", "dog", width=128, height=64, format="PNG"),
    ]
    second = [
        image("https://a.example/2", "cat"),
        image("https://a.example/4", "dog"),
        reject("https://b.example/3", "HTTP 404"),
        reject("https://b.example/4", "HTTP 404"),
    ]
    masks = {0: [True, False, True, True, True], 1: [False, False, True, True]}
    return write_snapshot(open_store(tmp_path), [first, second], masks=masks)


def test_masked_images_and_superseded_rejects(tmp_path: Path, snapshot: Snapshot) -> None:
    found = collect(open_store(tmp_path), snapshot)
    assert (found.rows, found.images, found.masked, found.kept) == (9, 5, 2, 3)
    assert (found.superseded, found.rejected) == (1, {"HTTP 404": 2, "timeout": 1})
    assert found.image_bytes == 3 * len(IMAGE)
    assert found.formats == {"JPEG": 2, "PNG": 1}
    assert (found.labels, found.num_labels, found.other_labels) == ({"dog": 2, "cat": 1}, 2, 0)
    assert found.sources == {
        "a.example": SourceCounts(kept=2, masked=2, rejected=0),
        "b.example": SourceCounts(kept=1, masked=0, rejected=3),
    }
    assert found.other_sources == SourceCounts(0, 0, 0)


def test_sizes(tmp_path: Path, snapshot: Snapshot) -> None:
    found = collect(open_store(tmp_path), snapshot)
    assert found.quantiles["width"] == [64, 64, 64, 64, 128, 128, 128]
    assert found.quantiles["aspect"] == [1, 1, 1, 1, 2, 2, 2]
    assert found.histograms["pixels"] == Histogram([4096, 8192, 16384], [2, 1])
    assert found.histograms["aspect"].counts == [2, 0, 0, 0, 0, 0, 1]
    length = found.histograms["length"]
    assert length.counts == [3]
    assert length.edges[0] <= len(IMAGE) < length.edges[1]


def test_as_json_and_for_people(tmp_path: Path, snapshot: Snapshot) -> None:
    found = collect(open_store(tmp_path), snapshot)
    document = json.loads(json.dumps(dataclasses.asdict(found)))
    assert document["quantile_levels"] == list(QUANTILES)
    assert document["histograms"]["pixels"]["counts"] == [2, 1]
    assert document["sources"]["b.example"] == {"kept": 1, "masked": 0, "rejected": 3}
    lines = table(found).splitlines()
    assert lines[0] == "snapshot    version 1: 2 shards"
    assert lines[2:] == [
        "masked      2",
        "rejected    3: HTTP 404 2, timeout 1",
        "superseded  1 rejects, tried again",
        "formats     JPEG 2, PNG 1",
        "labels      2: dog 2, cat 1",
        "sources     a.example 2, b.example 1",
        "                   min       5 %      25 %      50 %      75 %      95 %       max",
        "width px            64        64        64        64       128       128       128",
        "height px           64        64        64        64        64        64        64",
        f"bytes       {''.join(f'{len(IMAGE):>10}' for _ in QUANTILES)}",
        "width/height      1.00      1.00      1.00      1.00      2.00      2.00      2.00",
    ]


def test_progress_by_shard(tmp_path: Path, snapshot: Snapshot) -> None:
    ticks: list[tuple[int, int]] = []
    collect(open_store(tmp_path), snapshot, on_tick=lambda *tick: ticks.append(tick))
    assert ticks == [(5, 1), (9, 3)]
    assert ticks[-1][0] == snapshot.rows.sum()


def test_a_mask_that_is_not_the_recorded_one(tmp_path: Path, snapshot: Snapshot) -> None:
    (tmp_path / snapshot.mask[0]).write_bytes(b"\xff")
    with pytest.raises(ShardError, match=r"masks/001-00000: not the mask .* restore the object"):
        collect(open_store(tmp_path), snapshot)


def test_an_index_that_keeps_another_number(tmp_path: Path, snapshot: Snapshot) -> None:
    rows = snapshot.table.to_pylist()
    rows[0]["kept"] = 5
    wrong = Snapshot(pa.Table.from_pylist(rows, SNAPSHOT_SCHEMA), 1)
    with pytest.raises(ShardError, match=r"keeps 3 rows, the snapshot says 5: run `python -m"):
        collect(open_store(tmp_path), wrong)


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
    assert found.histograms["width"] == Histogram()
    assert "width px" not in table(found)
