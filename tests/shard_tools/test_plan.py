"""Plans: the same job has the same plan, every file is in one unit, in one order."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.store import open_store
from shard_tools.judge import ImageSettings
from shard_tools.plan import PackSettings, _cut, list_plans, make_plan, read_plan, read_unit
from shard_tools.sources import PlannedInput


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
    assert (plan.num_units, plan.num_inputs, plan.total_bytes) == (1, 4, 3 + 5 + 3 + 1)
    files = read_unit(store, plan.name, 0)
    assert [f.source for f in files] == [
        f"file://{source}/{p}" for p in ("a/1", "a/b/3", "b/2", "c")
    ]
    assert [f.label for f in files] == ["a", "a", "b", None]
    assert [f.row for f in files] == [0, 1, 2, 3]


def test_another_input_or_setting_is_another_plan(tmp_path: Path) -> None:
    source, store = tmp_path / "source", open_store(tmp_path / "set")
    write(source, "a/1")
    small = PackSettings(image=ImageSettings(max_pixels=7))
    names = {make_plan(str(source), store, PackSettings()).name}
    names.add(make_plan(str(source), store, small, replace=True).name)
    write(source, "a/2")
    names.add(make_plan(str(source), store, PackSettings(), replace=True).name)
    assert len(names) == 3
    assert set(list_plans(store)) == names


def test_an_unfinished_plan_is_not_forgotten(tmp_path: Path) -> None:
    """Another setting or input would leave its work behind: that must be asked for."""
    source, store = tmp_path / "source", open_store(tmp_path / "set")
    write(source, "a/1")
    waiting = make_plan(str(source), store, PackSettings())
    small = PackSettings(image=ImageSettings(max_pixels=7))
    with pytest.raises(UsageError, match=rf"plan {waiting.name} .*max_pixels \d+ \(now 7\)"):
        make_plan(str(source), store, small)
    write(source, "a/2")
    with pytest.raises(UsageError, match=r"1 inputs \(now 2"):
        make_plan(str(source), store, PackSettings())
    assert list_plans(store) == [waiting.name]
    write(tmp_path / "other", "a/1")
    make_plan(str(tmp_path / "other"), store, PackSettings())


def test_columns_of_lists_come_through(tmp_path: Path) -> None:
    """Also those that are called like a field of the plan, and those that only some rows have."""
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "1.csv").write_text("url,row,label\nhttps://h/1.jpg,7,cat\nhttps://h/2.jpg,,\n")
    (lists / "2.jsonl").write_text('{"url": "https://h/3.jpg", "tag": {"a": 1}, "width": 3}\n')
    store = open_store(tmp_path / "set")
    plan = make_plan(str(lists), store, PackSettings(shard_rows=2))
    assert (plan.kind, plan.num_units, plan.num_inputs) == ("urls", 2, 3)
    first, second = read_unit(store, plan.name, 0)
    [third] = read_unit(store, plan.name, 1)
    assert (first.source, first.label, first.columns) == ("https://h/1.jpg", "cat", {"row": "7"})
    assert second.columns == {"row": ""}
    assert (third.row, third.columns) == (2, {"tag": '{"a": 1}', "input_width": "3"})


def test_signatures_are_not_stored(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("https://me:word@h/1.jpg?X-Amz-Signature=abc&size=2\n")
    store = open_store(tmp_path / "set")
    plan = make_plan(str(tmp_path / "in.txt"), store, PackSettings())
    [planned] = read_unit(store, plan.name, 0)
    assert planned.source == "https://h/1.jpg?size=2"
    assert planned.origin == f"file://{tmp_path}/in.txt#0"
    for info in store.list():
        assert not any(secret in store.get(info.key) for secret in (b"word", b"abc"))


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no plan 'abc'"):
        read_plan(open_store(tmp_path), "abc")


@given(
    sizes=st.lists(st.integers(0, 100), max_size=40),
    shard_bytes=st.integers(1, 120),
    shard_rows=st.integers(1, 7),
)
def test_cutting_into_units(sizes: list[int], shard_bytes: int, shard_rows: int) -> None:
    files = [PlannedInput(i, str(i), size) for i, size in enumerate(sizes)]
    settings = PackSettings(shard_bytes=shard_bytes, shard_rows=shard_rows)
    units = list(_cut(files, settings, "files"))
    assert [file for unit in units for file in unit] == files
    for unit in units:
        assert 1 <= len(unit) <= shard_rows
        assert len(unit) == 1 or sum(file.size_bytes or 0 for file in unit) <= shard_bytes
