"""Plans: the same job has the same plan, every file is in one unit, in one order."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ObjectMissingError, UsageError
from pipeline.store import SourceFile, open_store
from shard_tools.plan import PackSettings, _cut, list_plans, make_plan, read_plan, read_unit
from shard_tools.sources import label_of, sorted_files, source_url


def write(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)


def test_a_plan_is_found_again(tmp_path: Path) -> None:
    source, store = tmp_path / "source", open_store(tmp_path / "set")
    write(source, "b/2", "a/1", "c", "a/b/3")
    plan = make_plan(str(source), store, PackSettings())
    before = {info.key: info.modified for info in store.list()}
    assert make_plan(f"{source}/", store, PackSettings()) == plan == read_plan(store, plan.name)
    assert {info.key: info.modified for info in store.list()} == before
    assert list_plans(store) == [plan.name]
    assert (plan.num_units, plan.num_files, plan.total_bytes) == (1, 4, 3 + 5 + 3 + 1)
    files = read_unit(store, plan.name, 0)
    assert [f.source for f in files] == [
        f"file://{source}/{p}" for p in ("a/1", "a/b/3", "b/2", "c")
    ]
    assert [f.label for f in files] == ["a", "a", "b", None]
    assert [f.row for f in files] == [0, 1, 2, 3]


def test_another_input_or_setting_is_another_plan(tmp_path: Path) -> None:
    source, store = tmp_path / "source", open_store(tmp_path / "set")
    write(source, "a/1")
    names = {make_plan(str(source), store, PackSettings()).name}
    names.add(make_plan(str(source), store, PackSettings(max_pixels=7)).name)
    write(source, "a/2")
    names.add(make_plan(str(source), store, PackSettings()).name)
    assert len(names) == 3
    assert set(list_plans(store)) == names


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no plan 'abc'"):
        read_plan(open_store(tmp_path), "abc")


@given(
    sizes=st.lists(st.integers(0, 100), max_size=40),
    shard_bytes=st.integers(1, 120),
    shard_rows=st.integers(1, 7),
)
def test_cutting_into_units(sizes: list[int], shard_bytes: int, shard_rows: int) -> None:
    files = [SourceFile(str(i), str(i), size, "") for i, size in enumerate(sizes)]
    settings = PackSettings(shard_bytes=shard_bytes, shard_rows=shard_rows)
    units = list(_cut(files, settings))
    assert [file for unit in units for file in unit] == files
    for unit in units:
        assert 1 <= len(unit) <= shard_rows
        assert len(unit) == 1 or sum(file.size_bytes for file in unit) <= shard_bytes


@pytest.mark.parametrize("run_files", [1, 3, 100])
def test_sorting_in_runs(tmp_path: Path, run_files: int) -> None:
    paths = ["a/z", "a-b", "a/b/c", "é", "b", "Z/1", "0"]
    write(tmp_path, *paths)
    assert [f.path for f in sorted_files(str(tmp_path), run_files=run_files)] == sorted(paths)


def test_nothing_to_pack(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no files there"):
        list(sorted_files(str(tmp_path)))
    with pytest.raises(ObjectMissingError, match="nowhere"):
        list(sorted_files(str(tmp_path / "nowhere")))


def test_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / b"\xff.jpg".decode(errors="surrogateescape")).touch()
    with pytest.raises(UsageError, match="not UTF-8"):
        list(sorted_files(str(tmp_path)))


def test_urls_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_url("photos/") == f"file://{tmp_path}/photos"
    assert source_url("s3://bucket/photos/") == "s3://bucket/photos"
    assert [label_of(path) for path in ("cat/1.jpg", "cat/black/2.jpg", "3.jpg")] == [
        "cat",
        "cat",
        None,
    ]
