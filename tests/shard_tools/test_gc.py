"""What killed writers left goes; whatever anything names, or somebody may be writing, stays."""

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.errors import ManifestError, UsageError
from pipeline.manifest import SNAPSHOT_SCHEMA, commit, commit_snapshot, new_attempt, read_snapshot
from pipeline.store import Store, open_store
from shard_tools.gc import GcReport, collect_garbage
from shard_tools.mask import mask_snapshot
from shard_tools.plan import list_plans
from tests.shard_tools.conftest import ROOT, shard_tools
from tests.support.snapshots import write_snapshot
from tests.support.trajectory import Case, plain_engine
from trainer.checkpoint import CheckpointConfig, Checkpoints
from trainer.distributed import World

TOMORROW = datetime.now(UTC) + timedelta(days=1, hours=1)
ATTEMPT = "0123456789abcdef"
ORPHANS = {
    f"data/01/aaaaaaaa-00000003-{ATTEMPT}.tar",
    f"data/01/aaaaaaaa-00000003-{ATTEMPT}.parquet",
    f"masks/01/{ATTEMPT}",
    f"dedup/{ATTEMPT}/clusters.parquet",
    f"plans/{ATTEMPT}/unit-00000000.parquet",
    f".probe-{ATTEMPT}",
}
FOREIGN = {
    "data/cats/1.jpg",
    f"data/01/{ATTEMPT}.tar",
    "data/README.md",
    "masks/mine.png",
    "notes.txt",
    "plans/mine.txt",
    "gallery/v000001.html",
    "objects/statue.jpg",
}


def keys(store: Store) -> set[str]:
    return {info.key for info in store.list()}


def names(report: GcReport) -> set[str]:
    return {orphan.key for orphan in report.orphans}


def put(store: Store, *names: str) -> None:
    for name in names:
        assert store.put_if_absent(name, b"body")


def next_version(store: Store, note: str = "", **changed: object) -> None:
    """A version like the newest, with something changed in its first shard."""
    newest = read_snapshot(store)
    rows = newest.table.to_pylist()
    rows[0] |= changed
    table = pa.Table.from_pylist(rows, SNAPSHOT_SCHEMA)
    commit_snapshot(store, table, version=newest.version + 1, attempt=new_attempt(), note=note)


@pytest.fixture
def packed(images: Path, dataset: str) -> Store:
    """A sealed data set, a plan that is only packed, and what nobody knows of."""
    assert shard_tools("pack", str(images / "astronaut"), dataset, "--shard-rows", "9").code == 0
    assert shard_tools("pack", str(images / "coffee"), dataset, "--no-seal").code == 0
    store = open_store(dataset)
    assert len(set(list_plans(store)) - set(read_snapshot(store).plans)) == 1
    put(store, *FOREIGN)
    return store


def test_only_orphans_go(packed: Store) -> None:
    before = keys(packed)
    put(packed, *ORPHANS)
    found = collect_garbage(packed, now=TOMORROW)
    assert names(found) == ORPHANS
    assert not found.deleted
    assert keys(packed) == before | ORPHANS
    assert (found.num_objects, found.num_unfinished, found.size_bytes) == (6, 0, 24)
    assert all(89_000 < orphan.age_s <= 90_000 for orphan in found.orphans)
    assert names(collect_garbage(packed, delete=True, now=TOMORROW)) == ORPHANS
    assert keys(packed) == before
    assert shard_tools("verify", packed.url, "--quick").code == 0
    assert collect_garbage(packed, delete=True, now=TOMORROW).orphans == ()


def test_every_name_that_writers_give(packed: Store) -> None:
    """With all that names them gone, no shard, index, mask or plan is taken for somebody else's."""
    first = np.arange(9) == 0
    mask_snapshot(packed, decide=lambda tar, rows: ~first[: len(rows.is_ok)], note="one less")
    written = {key for key in keys(packed) - FOREIGN if "/" in key}
    for key in written:
        if key.startswith(("snapshots/", "commits/")) or key.endswith("plan.json"):
            packed.delete(key)
    left = keys(packed) - FOREIGN
    assert {key.partition("/")[0] for key in left} == {"data", "masks", "plans"}
    assert names(collect_garbage(packed, now=TOMORROW)) == left


def test_what_is_younger_than_the_grace_stays(packed: Store) -> None:
    put(packed, *ORPHANS)
    before = keys(packed)
    assert collect_garbage(packed, delete=True).orphans == ()
    assert keys(packed) == before
    assert names(collect_garbage(packed, grace_s=0, now=TOMORROW)) == ORPHANS


def test_by_the_stores_own_clock(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    old, young = sorted(ORPHANS)[:2]
    put(store, old, young)
    yesterday = datetime.now(UTC).timestamp() - 25 * 3600
    os.utime(tmp_path / old, (yesterday, yesterday))
    assert names(collect_garbage(store, delete=True)) == {old}
    assert keys(store) == {young}


def test_a_negative_grace(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="grace"):
        collect_garbage(open_store(tmp_path), grace_s=-1)


def test_older_versions_and_masks_count(dataset: str) -> None:
    store = open_store(dataset)
    write_snapshot(store, [[{"source": "a", "reason": "bad"}]])
    tars = [f"data/01/aaaaaaaa-0000000{n}-{ATTEMPT}.tar" for n in range(3)]
    mask, clusters = f"masks/01/{ATTEMPT}", f"dedup/{ATTEMPT}/clusters.parquet"
    put(store, *tars, mask, clusters)
    next_version(store, tar=tars[0], mask=mask)
    next_version(store, tar=store.url_of(tars[1]), mask=None, note=f"near, clusters: {clusters}")
    next_version(store, tar="s3://elsewhere/x.tar")
    assert names(collect_garbage(store, now=TOMORROW)) == {tars[2]}


def test_a_commit_without_a_seal_counts(dataset: str) -> None:
    store = open_store(dataset)
    tar, index = (f"data/01/aaaaaaaa-00000000-{ATTEMPT}.{kind}" for kind in ("tar", "parquet"))
    put(store, tar, index)
    commit(store, "commits/gone/00000000.json", {"deep": [{"tar": tar}]}, attempt="a")
    assert names(collect_garbage(store, now=TOMORROW)) == {index}


def test_an_unfinished_plan_is_whole_or_gone(dataset: str, tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/set")
    units = [f"plans/{ATTEMPT}/unit-0000000{n}.parquet" for n in range(3)]
    put(store, *units)
    path = tmp_path / "set" / units[1]
    os.utime(path, (TOMORROW.timestamp(), TOMORROW.timestamp()))
    assert collect_garbage(store, now=TOMORROW).orphans == ()
    os.utime(path)
    assert names(collect_garbage(store, now=TOMORROW)) == set(units)
    put(store, f"plans/{ATTEMPT}/plan.json")
    assert collect_garbage(store, now=TOMORROW).orphans == ()


@pytest.mark.parametrize("key", ["commits/p/00000000.json", "snapshots/v000001.parquet"])
def test_a_damaged_document_stops_everything(tmp_path: Path, key: str) -> None:
    store = open_store(tmp_path)
    put(store, *ORPHANS, key)
    with pytest.raises(ManifestError, match=key):
        collect_garbage(store, delete=True, now=TOMORROW)
    assert keys(store) == {*ORPHANS, key}


# ----------------------------------------------------------------------------------------
# writes that were never finished

_DIE_WRITING = """
import os, sys, signal
from pipeline.store import open_store
store = open_store(sys.argv[1])
writer = store.writer(sys.argv[2])
writer.__enter__()
for _ in range(5):
    writer.write(bytes(8 * 2**20))
while not list(store.unfinished()):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def die_writing(url: str, key: str) -> None:
    command = [sys.executable, "-c", _DIE_WRITING, url, key]
    died = subprocess.run(command, cwd=ROOT, check=False, timeout=60)
    assert died.returncode == -signal.SIGKILL


def test_killed_writers_leave_nothing_for_good(dataset: str) -> None:
    store = open_store(dataset)
    key = f"data/01/aaaaaaaa-00000000-{ATTEMPT}.tar"
    die_writing(dataset, key)
    die_writing(dataset, "mine/upload.bin")
    die_writing(f"{dataset}-2", key)
    assert keys(store) == set()
    assert collect_garbage(store).orphans == ()
    found = collect_garbage(store, now=TOMORROW)
    assert [(orphan.key, orphan.is_unfinished) for orphan in found.orphans] == [(key, True)]
    assert {write.key for write in store.unfinished()} == {key, "mine/upload.bin"}
    assert collect_garbage(store, delete=True, now=TOMORROW).num_unfinished == 1
    assert {write.key for write in store.unfinished()} == {"mine/upload.bin"}
    assert [write.key for write in open_store(f"{dataset}-2").unfinished()] == [key]


# ----------------------------------------------------------------------------------------
# runs


class Alone(World):
    """A world of one that needs no process group."""

    def gather(self, value: object) -> list[object]:
        return [value]

    def share(self, value: object) -> object:
        return value


def test_checkpoints_survive_and_their_orphans_go(dataset: str) -> None:
    """A real checkpoint; and the objects of a save that was killed before its manifest."""
    store = open_store(dataset)
    case = Case("traj_ws1_resnet", torch.float64, 0, 1)
    checkpoints = Checkpoints(CheckpointConfig(run=dataset), Alone(0, 0, 1, torch.device("cpu")))
    engine = plain_engine(case)
    for step in (1, 2):
        checkpoints.save(step, engine, queue=None, state={"step": step}, metrics=b"{}")
    before = keys(store)
    assert len(before) == 6
    orphans = {
        f"objects/000000003-{ATTEMPT}/{name}" for name in ("rank-00000.bin", "metrics.jsonl")
    }
    put(store, *orphans, "objects/statue.jpg", "report.html")
    assert names(collect_garbage(store, delete=True, now=TOMORROW)) == orphans
    assert keys(store) == before | {"objects/statue.jpg", "report.html"}
    found = checkpoints.latest()
    assert found is not None
    assert (found.step, found.damaged) == (2, ())


def test_a_damaged_manifest_of_a_run(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    put(store, f"objects/000000003-{ATTEMPT}/rank-00000.bin")
    store.put_if_absent("manifests/000000003.json", json.dumps({"objects": []}).encode()[:-1])
    with pytest.raises(ManifestError, match="000000003"):
        collect_garbage(store, delete=True, now=TOMORROW)
