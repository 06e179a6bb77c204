"""The report is one self-contained page, drawn from what the loop logged."""

import html.parser
import json
import math
import re
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import CheckpointError
from pipeline.manifest import commit
from pipeline.shards import crc32c
from pipeline.store import open_store
from trainer.fragments import Checkpoint, StoredObject, manifest_key, to_document
from trainer.report import (
    MAX_POINTS,
    Curve,
    Table,
    alarm_table,
    read_metrics,
    report_run,
    training_curves,
    write_report,
)


def _line(step: int, *, loss: float = 3.0, queue_used: bool = False) -> str:
    row = {"step": step, "loss": loss, "lr": 0.1, "images_per_s": 50.0, "queue_used": queue_used}
    return json.dumps(row)


def _page(path: Path, **parts: object) -> str:
    write_report(path / "report.html", title="a run", **parts)  # type: ignore[arg-type]
    return (path / "report.html").read_text(encoding="utf-8")


def _drawings(page: str) -> list[xml.etree.ElementTree.Element]:
    return [
        xml.etree.ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)
    ]


def test_text_is_escaped(tmp_path: Path) -> None:
    hostile = '<script>alert(1)</script> & "quotes"'
    page = _page(
        tmp_path,
        tables=[Table(title=hostile, columns=[hostile], rows=[[hostile]])],
        curves=[Curve(title=hostile, steps=[0], values=[1.0], marks=[(0, hostile)])],
        notes=[hostile],
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 7


def test_the_page_names_nothing_outside_itself(tmp_path: Path) -> None:
    crop = np.zeros((8, 8, 3), dtype=np.uint8)
    page = _page(
        tmp_path,
        crops=[[crop, crop]],
        curves=training_curves(read_metrics([_line(0)]), num_prototypes=60),
    )
    assert not re.search(r"https?://|<link|<script|@import|style=", page)
    assert "default-src 'none'" in page
    assert page.count("data:image/jpeg;base64,") == 2


def test_the_page_is_well_formed(tmp_path: Path) -> None:
    page = _page(
        tmp_path,
        tables=[Table(title="t", rows=[("a", "b")])],
        curves=[Curve(title="c", steps=[1], values=[2])],
    )
    opened: list[str] = []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img"):
                opened.append(tag)

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Parser().feed(page)
    assert not opened


def test_the_same_inputs_give_the_same_page(tmp_path: Path) -> None:
    crops = [[np.full((8, 8, 3), 77, dtype=np.uint8)]]
    assert _page(tmp_path, crops=crops) == _page(tmp_path, crops=crops)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_rows_logged_again_after_a_resume_count_once() -> None:
    lines = [_line(step, loss=9.0) for step in range(8)]
    lines += [_line(step, loss=1.0) for step in range(5, 10)]
    metrics = read_metrics(lines)
    assert [row["step"] for row in metrics.rows] == list(range(10))
    assert [row["loss"] for row in metrics.rows] == [9.0] * 5 + [1.0] * 5
    assert metrics.resumed_steps == [5]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "", "[1]", '{"loss": 1}', '{"step": "3"}'])
def test_a_line_cut_short_is_left_out(torn: str) -> None:
    assert [row["step"] for row in read_metrics([_line(2), torn, _line(3)]).rows] == [2, 3]


def test_the_loss_curve_marks_chance_queue_and_resume() -> None:
    lines = [_line(step, queue_used=step >= 6) for step in (0, 2, 4, 6, 4, 6, 8)]
    loss, *_ = training_curves(read_metrics(lines), num_prototypes=100)
    assert loss.levels == [(pytest.approx(math.log(100)), "ln K = 4.61")]
    assert sorted(loss.marks) == [(4, "resumed"), (6, "queue on")]


def _health_line(step: int, *alarms: str, **figures: float) -> str:
    row = json.loads(_line(step)) | {f"health/{name}": value for name, value in figures.items()}
    return json.dumps(row | {"alarms": list(alarms)} if alarms else row)


def test_figures_of_health_that_were_logged_have_curves_with_their_limits() -> None:
    lines = [
        _line(0),
        _health_line(10, code_entropy=2.0, prototypes_used=0.75, grad_norm_max=100.0),
        _health_line(20, code_entropy=1.0, prototypes_used=0.5, grad_norm_max=0.0),
    ]
    limits = {"min_prototypes_used": 0.6, "max_queue_drift": 0.3}
    curves = training_curves(read_metrics(lines), num_prototypes=100, limits=limits)
    entropy, used, grad = curves[3:]
    assert entropy.title == "Entropy of a code, nats"
    assert (list(entropy.values)[1:], entropy.levels) == ([2, 1], curves[0].levels)
    assert math.isnan(entropy.values[0])
    assert (list(used.values)[1:], used.levels) == ([0.75, 0.5], [(0.6, "alarm")])
    assert (grad.values[1], grad.levels) == (2, [])
    assert math.isnan(grad.values[2])


def test_alarms_have_a_table_and_marks() -> None:
    lines = [
        _line(0),
        _health_line(10, "queue_drift: stale: lower queue.length", "dead_prototypes: few"),
        _health_line(1200, "queue_drift: again"),
    ]
    metrics = read_metrics(lines)
    (table,) = alarm_table(metrics)
    assert table.rows == [
        ("10", "queue drift", "stale: lower queue.length"),
        ("10", "dead prototypes", "few"),
        ("1,200", "queue drift", "again"),
    ]
    loss, *_ = training_curves(metrics, num_prototypes=100)
    marks = [(10, "queue drift"), (10, "dead prototypes"), (1200, "queue drift")]
    assert list(loss.marks) == marks
    assert alarm_table(read_metrics(lines[:1])) == []


def test_points_lie_where_the_axes_say(tmp_path: Path) -> None:
    page = _page(
        tmp_path, curves=[Curve(title="c", steps=[0, 50, 100], values=[0, 1, 2], wide=True)]
    )
    (svg,) = _drawings(page)
    ticks = {text.text: text for text in svg.iter("text")}
    spots = list(svg.iter("circle"))
    for spot, step, value in zip(spots, ("0", "50", "100"), ("0", "1", "2"), strict=True):
        x_ticks = [
            t for t in svg.iter("text") if t.text == step and t.get("text-anchor") == "middle"
        ]
        y_ticks = [t for t in svg.iter("text") if t.text == value and t.get("text-anchor") == "end"]
        if x_ticks:
            assert float(spot.get("cx", 0)) == pytest.approx(
                float(x_ticks[0].get("x", 0)), abs=0.11
            )
        assert float(spot.get("cy", 0)) + 4 == pytest.approx(
            float(y_ticks[0].get("y", 0)), abs=0.11
        )
    assert "step" in ticks


def test_a_long_run_stays_a_small_page(tmp_path: Path) -> None:
    steps = range(200_000)
    page = _page(tmp_path, curves=[Curve(title="c", steps=steps, values=[1.0 + s for s in steps])])
    assert page.count("<circle") == MAX_POINTS
    assert len(page) < 300_000


def test_a_value_that_is_not_finite_leaves_a_gap(tmp_path: Path) -> None:
    values = [1.0, 2.0, math.nan, 3.0, math.inf, 1.0]
    page = _page(tmp_path, curves=[Curve(title="c", steps=range(6), values=values)])
    assert page.count("<polyline") == 3
    assert "nan" not in page.split("</style>")[1]


@pytest.mark.parametrize("values", [[], [math.nan], [5.0], [0.0, 0.0], [-1.0, -1.0]])
def test_curves_without_extent_are_drawn(tmp_path: Path, values: list[float]) -> None:
    curve = Curve(title="c", steps=range(len(values)), values=values, wide=True)
    finite = sum(map(math.isfinite, values))
    assert _page(tmp_path, curves=[curve]).count("<circle") == finite


def _save_run(path: Path, lines: list[str]) -> str:
    """A run with one checkpoint that holds nothing but metrics and a configuration."""
    store = open_store(str(path))
    body = "\n".join(lines).encode()
    config = """
        loader = { dataset = 's3://b/<d>' }
        model = { num_prototypes = 60 }
        health = { min_prototypes_used = 0.5 }
    """
    stored = StoredObject("objects/1-a/metrics.jsonl", len(body), crc32c(body))
    assert store.put_if_absent(stored.key, body)
    checkpoint = Checkpoint(
        step=1,
        attempt="a",
        world_size=2,
        time="2026-01-31T12:00:00+00:00",
        objects=(stored,),
        tensors={},
        queue=None,
        state={"config": config},
    )
    commit(store, manifest_key(1), to_document(checkpoint), attempt="a")
    return stored.key


def test_the_command_reports_a_stored_run(tmp_path: Path) -> None:
    alarmed = _health_line(1, "dead_prototypes: <few>", prototypes_used=0.1)
    lines = [_line(0, loss=4.5), alarmed, _line(2, loss=3.25)]
    _save_run(tmp_path / "run", lines)
    assert report_run(str(tmp_path / "run"), tmp_path / "report.html") == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    first_to_last = "4.5000 at first, 3.2500 at last"
    for shown in ("ln K = 4.09", first_to_last, "s3://b/&lt;d&gt;", "&lt;few&gt;", ">alarm</text>"):
        assert shown in page


def test_the_command_refuses_damaged_metrics(tmp_path: Path) -> None:
    key = _save_run(tmp_path / "run", [_line(0)])
    (tmp_path / "run" / key).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
        report_run(str(tmp_path / "run"), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_command_refuses_a_prefix_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoints"):
        report_run(str(tmp_path), tmp_path / "report.html")
