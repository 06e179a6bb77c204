"""The bench's own book-keeping, and that both sides of a comparison do the same work."""

import json
from pathlib import Path

import pytest
import torch

from tests.bench.loader import Ours, Reference, photographs
from tests.bench.rows import Row, merge, table


@pytest.mark.parametrize(
    ("value", "target", "ok"),
    [
        (7.0, ">= 7", True),
        (6.9, ">= 7", False),
        (2.5, "<= 2.5", True),
        (1.0, "", None),
        (None, ">= 7", None),
    ],
)
def test_targets(value: float | None, target: str, ok: bool | None) -> None:
    assert Row("a.b", value, "x", target).ok is ok


def test_measured_rows_replace_those_of_their_name(tmp_path: Path) -> None:
    path = tmp_path / "build" / "bench.json"
    merge(path, [Row("a.one", 1, "x"), Row("b.one", 3, "x")])
    merge(path, [Row("a.one", 4, "x", ">= 5"), Row("a.two", None, "x", note="not to be had")])
    rows = json.loads(path.read_text())
    assert [(row["name"], row["value"], row["ok"]) for row in rows] == [
        ("b.one", 3, None),
        ("a.one", 4, False),
        ("a.two", None, None),
    ]


def test_table_is_aligned_and_names_the_verdict() -> None:
    lines = table([Row("a.one", 1.23456, "x", ">= 7"), Row("a.longer", 8, "x", ">= 7")]).split("\n")
    assert "MISSED" in lines[1]
    assert " ok" in lines[2]
    assert len({line.index(" x ") for line in lines[1:]}) == 1


def test_both_loaders_cut_the_same_crops_of_the_same_photographs(tmp_path: Path) -> None:
    files = photographs()[:2]
    (reference, _), ours = Reference()(files), Ours(files, str(tmp_path), batch_size=2)
    ((samples, blocks),) = list(ours.batches())
    assert sorted(samples) == [0, 1]
    sizes = [tuple(crop.shape) for crop in reference]
    assert sizes == [shape[2:] for shape, _ in blocks for _ in range(shape[0])]
    assert {dtype for _, dtype in blocks} == {torch.uint8}
