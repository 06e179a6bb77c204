"""The bench's own book-keeping, and that both sides of a comparison do the same work."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.bench.cuda import summarize
from tests.bench.loader import alternate
from tests.bench.photographs import TRAIN, photographs
from tests.bench.pipelines import BATCH, Ours
from tests.bench.reference import Reference
from tests.bench.rows import Row, merge, table
from tests.support.dataset import write_dataset


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
    files = list(photographs(2, TRAIN))
    write_dataset(str(tmp_path), files)
    reference = Reference()(files)
    with Ours(str(tmp_path), colour=True, batch_size=2) as everything:
        crops = next(everything.batches).crops
    with Ours(str(tmp_path), colour=False, batch_size=2) as ours:
        blocks = [block.copy() for block in next(ours.batches).blocks]
    assert [block.dtype for block in blocks] == [np.uint8] * 2
    for theirs, mine, block in zip(reference, crops, blocks, strict=True):
        assert theirs.flatten(0, 1).shape == mine.shape
        assert theirs.dtype == mine.dtype == torch.float32
        assert block.shape[:2] == theirs.shape[:2]
        # Both normalise: the same photographs have much the same mean, whatever the crops.
        assert abs(float(theirs.mean()) - float(mine.mean())) < 1.0


def test_a_round_is_timed_and_the_first_one_forgotten() -> None:
    class Costly:
        def __init__(self) -> None:
            self.asked: list[int] = []

        def cpu_s(self, num_batches: int) -> float:
            self.asked.append(num_batches)
            return len(self.asked) * num_batches * BATCH

    dear, cheap = Costly(), Costly()
    timings = alternate({"pillow": dear, "ours": cheap}, rounds=2)
    assert timings["pillow"].rounds == timings["ours"].rounds == [2, 3]
    assert timings["pillow"] / timings["ours"] == 1
    assert len(dear.asked) == 3


def test_a_run_is_summed_up_over_its_steps() -> None:
    records = [
        {"data_wait_s": 0.0, "step_s": 0.1, "images_per_s": 1000.0},
        {"data_wait_s": 0.1, "step_s": 0.3, "images_per_s": 333.333},
    ]
    trained = summarize(records)
    assert trained.wait_share == pytest.approx(0.25)
    assert trained.images_per_s == pytest.approx(500, rel=1e-3)
