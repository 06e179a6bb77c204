"""What becomes of single images, and how much memory a worker takes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.manifest import read_snapshot
from pipeline.shards import read_index
from pipeline.store import Store, open_store
from shard_tools.commits import read_unit_commit, seal
from shard_tools.judge import ImageSettings
from shard_tools.pack import PackOptions, UnitTask, pack, pack_unit
from shard_tools.plan import PackSettings, Plan, make_plan
from tests.shard_tools.conftest import ROOT, write_images, write_odd_ones


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_images(tmp_path / "source", 9)
    return tmp_path / "source"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "set")


def task_of(store: Store, plan: Plan, unit: int, *, careful: bool = False) -> UnitTask:
    options = PackOptions(filter=plan.settings.image.filter)
    return UnitTask(
        store.url, plan.name, plan.kind, unit, plan.settings, options, "01234567", careful
    )


def pack_all(source: Path, store: Store, settings: PackSettings) -> list[dict[str, object]]:
    return pack_planned(store, make_plan(str(source), store, settings))


def pack_planned(store: Store, plan: Plan, *, careful: bool = False) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for unit in range(plan.num_units):
        done = pack_unit(task_of(store, plan, unit, careful=careful))
        rows += read_index(store.get(done.index), where=done.index).to_pylist()
    return rows


def test_bytes_are_kept_as_they_are(source: Path, store: Store) -> None:
    plan = make_plan(str(source), store, PackSettings())
    rows = pack_planned(store, plan)
    tar = seal(store, plan)[0].tar[0]
    for row in rows:
        original = Path(str(row["source"]).removeprefix("file://")).read_bytes()
        assert store.get_range(tar, int(str(row["offset"])), int(str(row["length"]))) == original


def test_limits(source: Path, store: Store) -> None:
    sizes = sorted(path.stat().st_size for path in source.rglob("*.*"))
    rows = pack_all(source, store, PackSettings(image=ImageSettings(max_bytes=sizes[4])))
    assert [row["reason"] for row in rows].count("too large") == 4
    store = open_store(f"{store.url}-2")
    rows = pack_all(source, store, PackSettings(image=ImageSettings(max_pixels=96 * 96 - 1)))
    assert {row["reason"] for row in rows} == {"bomb"}
    assert all(row["width"] is None and row["offset"] is None for row in rows)


def test_a_shard_of_rejects_only(tmp_path: Path, store: Store) -> None:
    (tmp_path / "odd" / "coffee").mkdir(parents=True)
    reasons = write_odd_ones(tmp_path / "odd")
    rows = pack_all(tmp_path / "odd", store, PackSettings())
    assert [row["reason"] for row in rows] == [reasons[path] for path in sorted(reasons)]


def test_sources_that_change_after_planning(source: Path, store: Store) -> None:
    plan = make_plan(str(source), store, PackSettings())
    paths = sorted(source.rglob("*.*"))
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes() + b"more")
    rows = pack_planned(store, plan)
    assert [row["reason"] for row in rows] == ["missing", "changed", *[None] * 7]


def test_a_file_that_cannot_be_read_is_a_reject(source: Path, store: Store) -> None:
    """Reading one's own memory at address 0 fails with EIO, for root too."""
    plan = make_plan(str(source), store, PackSettings())
    path = min(source.rglob("*.*"))
    path.unlink()
    path.symlink_to("/proc/self/mem")
    rows = pack_planned(store, plan)
    assert [row["reason"] for row in rows] == ["unreadable", *[None] * 8]


def test_what_was_packed_before_is_told(source: Path, store: Store) -> None:
    settings = PackSettings(shard_rows=4)
    plan = make_plan(str(source), store, settings)
    pack_unit(task_of(store, plan, 0))
    before: list[int] = []
    options = PackOptions(workers=1)
    report = pack(store, plan, options, on_tick=lambda *seen: None, on_resume=before.append)
    assert before == [4]
    assert (report.units, report.units_before, report.units_elsewhere) == (3, 1, 0)
    assert (report.packed, report.rejected) == (5, {})


def test_a_packed_unit_is_not_packed_again(source: Path, store: Store) -> None:
    plan = make_plan(str(source), store, PackSettings())
    task = task_of(store, plan, 0)
    done = pack_unit(task)
    assert done == read_unit_commit(store, plan.name, 0)
    assert pack_unit(task) == done
    assert len(list(store.list("data"))) == 2
    snapshot, is_new = seal(store, plan)
    assert is_new
    assert snapshot.num_kept == 9
    assert seal(store, plan)[1] is False
    assert read_snapshot(store).version == 1


PEAK_OF_PACKING = """
import resource, sys
from pipeline.store import open_store
from shard_tools.pack import PackOptions, UnitTask, pack_unit
from shard_tools.plan import PackSettings, make_plan
store, settings = open_store(sys.argv[2]), PackSettings()
plan = make_plan(sys.argv[1], store, settings)
assert plan.num_units == 1
task = UnitTask(store.url, plan.name, plan.kind, 0, settings, PackOptions(), "job")
assert pack_unit(task).rejected == {}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak_mib(source: Path, target: str) -> float:
    child = subprocess.run(
        [sys.executable, "-c", PEAK_OF_PACKING, str(source), target],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return float(child.stdout)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, s3_url: str) -> None:
    """60 and 400 copies of a 400 kB picture: a worker holds its read-ahead and a few parts."""
    write_images(tmp_path / "one", 1, size_px=400)
    [picture] = (tmp_path / "one").rglob("*.*")
    pixels = tmp_path / "picture.png"
    Image.open(picture).resize((480, 480)).save(pixels)
    for count in (60, 400):
        (tmp_path / str(count)).mkdir()
        for number in range(count):
            shutil.copy(pixels, tmp_path / str(count) / f"{number}.png")
    small = peak_mib(tmp_path / "60", f"{s3_url}/60")
    large = peak_mib(tmp_path / "400", f"{s3_url}/400")
    assert 400 * pixels.stat().st_size > 100e6
    print(f"peak {small:.0f} MiB with 60 images, {large:.0f} MiB with 400")
    assert large < small + 60
