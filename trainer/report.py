"""One self-contained HTML page about a run: tables, curves, and the crops the model saw.

    python -m trainer.report s3://bucket/runs/first --output report.html

The page needs no network, no script and no other file: curves are inline SVG, pictures are data
URLs, and its content security policy allows nothing else. `write_report` is a pure function of its
inputs; `read_metrics`, `training_curves` and `alarm_table` turn the loop's JSON lines into them.
"""

import argparse
import base64
import hashlib
import io
import json
import math
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import CheckpointError, run_command
from pipeline.store import Store, open_store
from trainer.fragments import Checkpoint, damage, read_checkpoint, saved_steps

MAX_POINTS = 600
"""A curve with more points is drawn as the means of this many equal spans."""

Crop = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under column names; without names the first column names each row."""

    title: str
    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Curve:
    """`values` over `steps`, which ascend; a value that is not finite leaves a gap.

    `levels` are horizontal lines (value, label), `marks` vertical ones (step, label). A `wide`
    curve takes the page's whole width and shows its running mean; `from_zero` starts the axis at
    zero.
    """

    title: str
    steps: Sequence[int]
    values: Sequence[float]
    levels: Sequence[tuple[float, str]] = ()
    marks: Sequence[tuple[int, str]] = ()
    wide: bool = False
    from_zero: bool = False


class Metrics(NamedTuple):
    """What the loop logged: a row a step, ascending, and the steps at which it was resumed."""

    rows: list[dict[str, Any]]
    resumed_steps: list[int]


def write_report(
    path: Path | str,
    *,
    title: str,
    tables: Sequence[Table] = (),
    curves: Sequence[Curve] = (),
    crops: Sequence[Sequence[Crop]] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write the page to `path`, whole or not at all.

    `crops` holds, for each image, its crops [height, width, 3] uint8, global ones first; `notes`
    are paragraphs of plain text. All text is escaped. Raises OSError if `path` cannot be written.
    """
    sections = [
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
        *(_table(table) for table in tables),
        _curves(curves) if curves else "",
        _crops(crops) if crops else "",
    ]
    target = Path(path)
    unfinished = target.with_name(target.name + ".unfinished")
    page = _page(title, "\n".join(sections), _STYLE + _crops_style(crops))
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(target)


def read_metrics(lines: Iterable[str]) -> Metrics:
    """Rows of a metrics file, each a JSON object with an integer `step`.

    A run that is resumed logs the steps after its last checkpoint again: the later row counts, and
    the step where the count goes back is a resumed one. What a kill cut short is left out.
    """
    rows: dict[int, dict[str, Any]] = {}
    resumed_steps: list[int] = []
    last_step = -1
    for line in lines:
        row = _parse_row(line)
        if row is None:
            continue
        step = row["step"]
        if step <= last_step:
            resumed_steps.append(step)
        rows[step] = row
        last_step = step
    return Metrics([rows[step] for step in sorted(rows)], resumed_steps)


def training_curves(
    metrics: Metrics, *, num_prototypes: int, limits: Mapping[str, float] | None = None
) -> list[Curve]:
    """The loss with its chance level ln K, the learning rate, the images a second, and the health.

    `limits` is section `health` of the run's configuration: figures are drawn with the value from
    which on they are an alarm. A figure that was never logged has no curve.
    """
    rows = metrics.rows
    steps = [row["step"] for row in rows]
    queued = [row["step"] for row in rows if row.get("queue_used")]
    marks = [(step, "queue on") for step in queued[:1]]
    marks += [(step, "resumed") for step in metrics.resumed_steps]
    marks += [(step, name.replace("_", " ")) for step, name, _ in _alarms(metrics)]
    chance = (math.log(num_prototypes), f"ln K = {math.log(num_prototypes):.2f}")
    return [
        Curve(
            title="Loss",
            steps=steps,
            values=_column(rows, "loss"),
            levels=[chance],
            marks=marks,
            wide=True,
        ),
        Curve(title="Learning rate", steps=steps, values=_column(rows, "lr"), from_zero=True),
        Curve(
            title="Images per second, all ranks",
            steps=steps,
            values=_column(rows, "images_per_s"),
            from_zero=True,
        ),
        *_health_curves(rows, steps, chance, limits or {}),
    ]


def alarm_table(metrics: Metrics) -> list[Table]:
    """The alarms that rang, one a row; no table if there were none."""
    alarms = _alarms(metrics)
    if not alarms:
        return []
    rows = [(f"{step:,}", name.replace("_", " "), message) for step, name, message in alarms]
    return [Table(title="Alarms", columns=("Step", "Alarm", "Cause and remedy"), rows=rows)]


def _alarms(metrics: Metrics) -> list[tuple[int, str, str]]:
    """Step, name and message of every alarm: the loop logs "name: message"."""
    found = []
    for row in metrics.rows:
        for alarm in row.get("alarms", ()):
            name, _, message = alarm.partition(": ")
            found.append((row["step"], name, message))
    return found


class _Figure(NamedTuple):
    """A figure of trainer.health and how it is drawn."""

    name: str
    title: str
    limit: str = ""  # the setting from which on it is an alarm
    in_powers: bool = False  # of ten


_FIGURES = (
    _Figure("code_entropy", "Entropy of a code, nats"),
    _Figure("crop_agreement", "Crops that agree with the code"),
    _Figure("prototypes_used", "Prototypes in use", "min_prototypes_used"),
    _Figure("nearest_prototypes", "Largest cosine of two prototypes"),
    _Figure("feature_std", "Spread of features (1: the whole sphere)", "min_feature_std"),
    _Figure("queue_drift", "Drift of queued features (1: they say nothing)", "max_queue_drift"),
    _Figure("grad_norm_max", "Largest gradient norm, power of ten", in_powers=True),
    _Figure("trust_ratio_min", "Smallest trust ratio, power of ten", in_powers=True),
)


def _health_curves(
    rows: Sequence[dict[str, Any]],
    steps: Sequence[int],
    chance: tuple[float, str],
    limits: Mapping[str, float],
) -> list[Curve]:
    curves = []
    for figure in _FIGURES:
        values = _column(rows, f"health/{figure.name}")
        if all(map(math.isnan, values)):
            continue
        if figure.in_powers:
            values = [math.log10(value) if value > 0 else math.nan for value in values]
        levels = [(limits[figure.limit], "alarm")] if figure.limit in limits else []
        if figure.name == "code_entropy":
            levels = [chance]
        from_zero = not figure.in_powers
        curves.append(
            Curve(
                title=figure.title, steps=steps, values=values, levels=levels, from_zero=from_zero
            )
        )
    return curves


def _parse_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _column(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [float(row.get(name, math.nan)) for row in rows]


# The page

_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1b1c1e; --soft: #666a70;
  --line: #e3e3df; --series: #2667c9; --level: #b4530f; --mark: #7a3fa8; }
@media (prefers-color-scheme: dark) { :root { --page: #141517; --card: #1d1f22; --ink: #e8e8e6;
  --soft: #9da2a9; --line: #33363b; --series: #6ea3f5; --level: #e8955a; --mark: #c197ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 62rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "Liberation Sans", sans-serif; }
h1 { margin: 0 0 .75rem; font-size: 1.7rem; line-height: 1.2; letter-spacing: -.01em; }
h2 { margin: 0 0 .75rem; font-size: 1rem; }
.note { margin: 0 0 .5rem; max-width: 44rem; color: var(--soft); }
.card { margin: 1rem 0 0; padding: 1rem 1.25rem 1.25rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; overflow-x: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
  gap: 0 1rem; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-size: .85rem; font-weight: 500; }
tbody th { width: 40%; color: var(--soft); font-weight: 400; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font: 12px system-ui, "Segoe UI", "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); }
.raw, .trend { fill: none; stroke: var(--series); stroke-linejoin: round; stroke-width: 1.75; }
.faint { opacity: .35; stroke-width: 1; }
.trend { stroke-width: 2.25; }
.spot { fill: transparent; }
.spot:hover { fill: var(--series); }
.level { stroke: var(--level); stroke-dasharray: 5 4; }
.mark { stroke: var(--mark); stroke-dasharray: 2 3; }
svg .level-text, svg .mark-text { paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
svg .level-text { fill: var(--level); }
svg .mark-text { fill: var(--mark); }
.images { display: grid; gap: .5rem 1.5rem; }
.image { display: flex; gap: 3px; align-items: center; }
.image img { display: block; border-radius: 3px; }
"""


def _page(title: str, body: str, style: str) -> str:
    style_hash = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style_hash}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _card(title: str, body: str) -> str:
    return f'<section class="card">\n<h2>{escape(title)}</h2>\n{body}\n</section>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = "\n".join(_table_row(row, named=not table.columns) for row in table.rows)
    thead = f"<thead><tr>{head}</tr></thead>\n" if head else ""
    return _card(table.title, f"<table>\n{thead}<tbody>\n{rows}\n</tbody>\n</table>")


def _table_row(row: Sequence[str], *, named: bool) -> str:
    tags = ["th" if named and column == 0 else "td" for column in range(len(row))]
    cells = (f"<{tag}>{escape(text)}</{tag}>" for tag, text in zip(tags, row, strict=True))
    return f"<tr>{''.join(cells)}</tr>"


def _crops(images: Sequence[Sequence[Crop]]) -> str:
    rows = (f'<div class="image">{"".join(map(_image, crops))}</div>' for crops in images)
    title = "Crops as the model saw them: one image a row, the global crops first"
    return _card(title, '<div class="images">\n' + "\n".join(rows) + "\n</div>")


def _crops_style(images: Sequence[Sequence[Crop]]) -> str:
    """As many columns as rows of crops fit beside each other."""
    row_px = max((sum(crop.shape[1] + 3 for crop in crops) for crops in images), default=0)
    columns = f"repeat(auto-fill, minmax(min(100%, {row_px}px), 1fr))"
    return f".images {{ grid-template-columns: {columns}; }}\n"


def _image(crop: Crop) -> str:
    height, width = crop.shape[:2]
    buffer = io.BytesIO()
    Image.fromarray(crop).save(buffer, "JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    source = f"data:image/jpeg;base64,{data}"
    return f'<img width="{width}" height="{height}" alt="" src="{source}">'


# The curves


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Maps steps and values to the coordinates of one drawing."""

    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    top: float
    left = 52.0
    right = 8.0
    bottom = 24.0

    def x(self, step: float) -> float:
        low, high = self.x_range
        return self.left + (step - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.top + (high - value) / (high - low) * (self.height - self.top - self.bottom)

    @property
    def floor(self) -> float:
        return self.height - self.bottom

    @property
    def end(self) -> float:
        return self.width - self.right


def _curves(curves: Sequence[Curve]) -> str:
    wide = [_card(curve.title, _curve(curve)) for curve in curves if curve.wide]
    small = [_card(curve.title, _curve(curve)) for curve in curves if not curve.wide]
    return "\n".join([*wide, '<div class="pair">', *small, "</div>"])


def _curve(curve: Curve) -> str:
    points = _thin([(s, v) for s, v in zip(curve.steps, curve.values, strict=True)])
    if not any(math.isfinite(value) for _, value in points):
        return '<p class="note">No values were logged.</p>'
    frame = _frame(curve, points)
    parts = [
        *_y_axis(frame),
        *_x_axis(frame),
        *(_level(frame, value, label) for value, label in curve.levels),
        *(_mark(frame, step, label, row) for row, (step, label) in enumerate(sorted(curve.marks))),
        *_lines(frame, points, with_trend=curve.wide),
        *(_spot(frame, step, value) for step, value in points if math.isfinite(value)),
    ]
    box = f"0 0 {frame.width:g} {frame.height:g}"
    label = escape(f"{curve.title} over steps")
    head = f'<svg viewBox="{box}" role="img" aria-label="{label}">'
    return "\n".join([head, *parts, "</svg>"])


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: the means of equal spans."""
    if len(points) <= MAX_POINTS:
        return points
    spans = np.array_split(np.asarray(points, dtype=np.float64), MAX_POINTS)
    return [(float(span[:, 0].mean()), float(span[:, 1].mean())) for span in spans]


def _frame(curve: Curve, points: Sequence[tuple[float, float]]) -> _Frame:
    values = [value for _, value in points if math.isfinite(value)]
    values += [value for value, _ in curve.levels]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low = min(0.0, low) if curve.from_zero else low - margin
    first, last = points[0][0], points[-1][0]
    return _Frame(
        width=940 if curve.wide else 450,
        height=330 if curve.wide else 210,
        x_range=(first, max(last, first + 1)),
        y_range=(low, high + margin),
        top=28 if curve.marks else 8,
    )


def _y_axis(frame: _Frame) -> list[str]:
    parts = []
    for tick in _ticks(*frame.y_range, count=6 if frame.height > 250 else 4):
        y = frame.y(tick)
        parts.append(_line("grid", frame.left, y, frame.end, y))
        parts.append(_text(frame.left - 8, y + 4, f"{tick:.4g}", anchor="end"))
    return parts


def _x_axis(frame: _Frame) -> list[str]:
    y = frame.height - 6
    ticks = [t for t in _ticks(*frame.x_range, count=10 if frame.width > 600 else 5) if t % 1 == 0]
    texts = [_text(frame.x(tick), y, f"{tick:,.0f}", anchor="middle") for tick in ticks]
    name = _text(frame.left - 14, y, "step", anchor="end")
    return [_line("grid", frame.left, frame.floor, frame.end, frame.floor), name, *texts]


def _ticks(low: float, high: float, *, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / distance - 1e-9), math.floor(high / distance + 1e-9)
    return [number * distance for number in range(first, last + 1)]


def _level(frame: _Frame, value: float, label: str) -> str:
    y = frame.y(value)
    text = _text(frame.end, y - 6, label, anchor="end", kind="level-text")
    return _line("level", frame.left, y, frame.end, y) + text


def _mark(frame: _Frame, step: float, label: str, row: int) -> str:
    """A vertical line; labels of neighbours stand on alternating rows."""
    x = frame.x(step)
    anchor = "start" if x < frame.width - 120 else "end"
    y = 10 + 14 * (row % 2)
    text = _text(x + (4 if anchor == "start" else -4), y, label, anchor=anchor, kind="mark-text")
    return _line("mark", x, y - 8, x, frame.floor) + text


def _lines(frame: _Frame, points: Sequence[tuple[float, float]], *, with_trend: bool) -> list[str]:
    if not with_trend or len(points) < 40:
        return _paths(frame, points, "raw")
    return _paths(frame, points, "raw faint") + _paths(frame, _trend(points), "trend")


def _trend(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean of the fortieth of the run around each point, shorter at the ends."""
    reach = len(points) // 80 or 1
    windows = (points[max(0, i - reach) : i + reach + 1] for i in range(len(points)))
    means = (float(np.mean([value for _, value in window])) for window in windows)
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def _paths(frame: _Frame, points: Sequence[tuple[float, float]], kind: str) -> list[str]:
    """One polyline for each stretch of finite values."""
    stretches: list[list[str]] = [[]]
    for step, value in points:
        if math.isfinite(value):
            stretches[-1].append(f"{frame.x(step):.1f},{frame.y(value):.1f}")
        elif stretches[-1]:
            stretches.append([])
    return [f'<polyline class="{kind}" points="{" ".join(s)}"/>' for s in stretches if s]


def _spot(frame: _Frame, step: float, value: float) -> str:
    """An unseen point that shows its value under the pointer."""
    place = f'cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}" r="4"'
    return f'<circle class="spot" {place}><title>step {step:,.0f}: {value:.4g}</title></circle>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, *, anchor: str, kind: str = "tick") -> str:
    place = f'class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(text)}</text>"


# The command


def main() -> int:
    """`python -m trainer.report`: the report of a run, from its newest checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.report",
        description="Draw what a run has logged up to its newest checkpoint as one HTML page.",
    )
    parser.add_argument("run", metavar="URL", help="the run's prefix (checkpoint.run)")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="%(default)s")
    arguments = parser.parse_args()
    return run_command(lambda: report_run(arguments.run, Path(arguments.output)))


def report_run(url: str, output: Path) -> int:
    """Write the report of the run under `url`. Raises CheckpointError where it has none."""
    store = open_store(url)
    steps = saved_steps(store)
    if not steps:
        raise CheckpointError(f"{store.url} has no checkpoints; is it the run's checkpoint.run?")
    checkpoint = read_checkpoint(store, steps[-1])
    metrics = read_metrics(_stored_metrics(store, checkpoint).decode().splitlines())
    config = tomllib.loads(checkpoint.state["config"])
    settings = [
        (f"{section}.{name}", json.dumps(value, ensure_ascii=False))
        for section, values in config.items()
        for name, value in values.items()
    ]
    write_report(
        output,
        title=f"Run {store.url}",
        tables=[
            Table(title="Newest checkpoint", rows=_facts(checkpoint, metrics)),
            *alarm_table(metrics),
            Table(title="Settings", rows=settings),
        ],
        curves=training_curves(
            metrics,
            num_prototypes=config["model"]["num_prototypes"],
            limits=config.get("health"),
        ),
    )
    sys.stdout.write(f"{output}\n")
    return 0


def _stored_metrics(store: Store, checkpoint: Checkpoint) -> bytes:
    stored = [each for each in checkpoint.objects if each.key.endswith("metrics.jsonl")]
    if problems := damage(store, stored):
        raise CheckpointError("\n".join(problems))
    return b"".join(store.get(each.key) for each in stored)


def _facts(checkpoint: Checkpoint, metrics: Metrics) -> list[tuple[str, str]]:
    facts = [
        ("steps done", f"{checkpoint.step:,}"),
        ("saved", f"{checkpoint.time} by {checkpoint.world_size} rank(s)"),
        ("size", f"{checkpoint.size_bytes / 1e6:,.1f} MB"),
    ]
    if metrics.rows:
        first, last = metrics.rows[0], metrics.rows[-1]
        facts.append(("loss", f"{first['loss']:.4f} at first, {last['loss']:.4f} at last"))
        facts.append(("images per second", f"{last['images_per_s']:,.0f}"))
    return facts


if __name__ == "__main__":
    sys.exit(main())
