"""Plans: the same job has the same plan, every file is in one unit, in one order."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.store import SourceFile, open_store
from shard_tools.plan import PackSettings, _cut, list_plans, make_plan, read_plan, read_unit


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
