"""A minute of a loader as a page: who did what and when, how fast batches came, what bounds it.

Made by pipeline.profile of the spans that pipeline.telemetry has kept. One self-contained HTML file
without scripts: the pictures are inline SVG, its content security policy allows its own style sheet
and nothing else, and every text is escaped.

A minute has more spans than a screen has pixels, so a lane is no row of boxes: it is filled, pixel
by pixel, to the share of the time that each activity took there. A lane that is full up was busy
all the time; what is missing is time in which the thread had nothing to do. The same lanes follow
once more over a few batches, where single spans show.
"""

import base64
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.telemetry import Span

Float64 = NDArray[np.float64]

_WIDTH, _LEFT, _RIGHT = 1120, 170, 20  # of a picture, its labels left of it, its margin
_PLOT = _WIDTH - _LEFT - _RIGHT
_LANE, _GAP, _AXIS = 26, 5, 34  # heights of a lane, between two, below the last
_CURVE = 130  # height of a curve
_LEVELS = _LANE * 2  # a lane is filled in half pixels, so that equal columns melt into one box
_MAX_LANES = 24  # more threads than that are shown by groups
_MAX_MARKS = 200  # lines for the ends of batches; more would hide what they divide
_CLOSE_BATCHES, _CLOSE_SPANS = 4, 80  # what a close-up shows at most, of a thread

# In the order in which a lane is filled, from below.
_ACTIVITIES = {
    "fetch": "fetch: waiting for the store",
    "decode": "decode",
    "crop": "crop and resize",
    "colour": "colour",
    "transfer": "copy to the device",
    "wait": "wait: nothing to do",
    "other": "other",
}
_ALIASES = {"augment": "colour", "color": "colour", "decode_crops": "decode", "cut": "crop"}


class HandedOver(NamedTuple):
    """The end of a batch: when the training process had it, and how many images it brought."""

    time_s: float  # of time.perf_counter
    num_images: int


class Limit(NamedTuple):
    """What one part alone could do."""

    name: str
    images_per_s: float


@dataclass(frozen=True)
class Timeline:
    """What is to be drawn.

    Args:
        title: what was run, the data set's URL.
        verdict: the one sentence that a reader should take away.
        figures: (name, value) pairs, as they are to be shown.
        limits: the first is what the loader did, the others what each part alone could do.
        batches: in the order of time, the first one's images being older than the timeline.
        request_bytes: mean size of a read, which turns requests in flight into bytes.
    """

    title: str
    verdict: str
    figures: Sequence[tuple[str, str]]
    limits: Sequence[Limit]
    spans: Sequence[Span]
    batches: Sequence[HandedOver]
    request_bytes: float


def render_timeline(timeline: Timeline) -> str:
    """The page. Of the time from the first batch to the last; raises ValueError without two."""
    if len(timeline.batches) < 2:
        raise ValueError(f"a timeline needs two batches, not {len(timeline.batches)}")
    times = np.array([batch.time_s for batch in timeline.batches])
    whole = _Scale(times[0], times[-1], origin_s=times[0])
    close = _close_up(times, timeline.spans)
    lanes = _lanes(timeline.spans)
    sections = [
        _head(timeline),
        _card("What each part alone could do", _limits(timeline.limits), "images per second"),
        _card("Images per second", _rates(timeline.batches, whole), "handed over, over time"),
        _card("Bytes in flight", _in_flight(timeline, whole), "requested and not yet here"),
        _card("Threads", _legend(lanes) + _picture(lanes, whole, times), _THREADS_NOTE),
        _card(
            f"Threads, {1e3 * close.span_s:.3g} ms of it",
            _picture(lanes, close, times),
            _CLOSE_NOTE,
        ),
        _card("Where the threads' time went", _table(lanes, whole), "share of the whole time"),
    ]
    return _page(timeline.title, "\n".join(sections))


_THREADS_NOTE = (
    "A lane is filled to the share of the time that each activity took: full is busy throughout. "
    "One of several requests at once (×6) is full at the most it had. Point at a lane for figures"
)
_CLOSE_NOTE = "the same, close enough to see single images; a vertical line is the end of a batch"


class _Lane(NamedTuple):
    """The spans of one thread (or of a group of them), by activity."""

    name: str
    num_threads: int
    spans: dict[str, Float64]  # activity -> [n, 2] start and end

    def shares(self, activity: str, edges: Float64) -> Float64:
        """Mean number of such spans at work between neighbouring edges, a thread."""
        return _at_work(self.spans[activity], edges) / self.num_threads

    def most(self, edges: Float64) -> float:
        """What fills the lane: one, or what runs at once in it."""
        total = sum((self.shares(each, edges) for each in self.spans), np.zeros(len(edges) - 1))
        highest = float(total.max(initial=0.0))
        return 1.0 if highest < 1.5 else float(math.ceil(highest))


class _Scale:
    """Seconds of perf_counter to places on the picture."""

    def __init__(self, first_s: float, last_s: float, *, origin_s: float) -> None:
        self.first_s, self.last_s, self.origin_s = float(first_s), float(last_s), float(origin_s)
        self.span_s = max(self.last_s - self.first_s, 1e-9)

    def x(self, time_s: float) -> float:
        return _LEFT + (time_s - self.first_s) / self.span_s * _PLOT

    def edges(self, count: int = _PLOT) -> Float64:
        return np.linspace(self.first_s, self.last_s, count + 1)

    def ticks(self) -> list[float]:
        """Round seconds since the beginning, four to nine of them."""
        step = _round_step(self.span_s, 8)
        first = math.ceil((self.first_s - self.origin_s) / step - 1e-9)
        last = math.floor((self.last_s - self.origin_s) / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


# Numbers


def _lanes(spans: Iterable[Span]) -> list[_Lane]:
    """The training process first, then workers and threads by name."""
    spans = list(spans)
    has_parts = any(span.name.startswith("wait_") for span in spans)
    if has_parts:  # then data_wait is their sum
        spans = [span for span in spans if span.name != "data_wait"]
    threads = sorted({span.thread for span in spans}, key=_natural)
    group = _group if len(threads) > _MAX_LANES else str
    members: dict[str, list[str]] = {}
    for thread in threads:
        members.setdefault(group(thread), []).append(thread)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in members}
    for span in spans:
        activities = found[group(span.thread)]
        activities.setdefault(_activity(span.name), []).append((span.start_s, span.end_s))
    return [
        _Lane(name, len(members[name]), {each: np.array(kept) for each, kept in lane.items()})
        for name, lane in found.items()
    ]


def _activity(name: str) -> str:
    if "wait" in name:
        return "wait"
    name = _ALIASES.get(name, name)
    return name if name in _ACTIVITIES else "other"


def _group(thread: str) -> str:
    """The worker of a thread, or what threads numbered alike have in common."""
    worker, slash, _ = thread.partition("/")
    return worker if slash else re.sub(r"[-_ ]?\d+$", "", thread) or thread


def _natural(thread: str) -> tuple[bool, list[tuple[int, str]]]:
    words = re.split(r"(\d+)", thread)
    return thread != "MainThread", [(int(w) if w.isdigit() else -1, w) for w in words]


def _at_work(spans: Float64, edges: Float64) -> Float64:
    """Mean number of spans [n, 2] that cover each interval between neighbouring edges."""
    begun, ended = (_passed(np.sort(spans[:, column]), edges) for column in (0, 1))
    mean: Float64 = np.diff(begun - ended) / np.diff(edges)
    return np.maximum(mean, 0.0)


def _passed(moments: Float64, times: Float64) -> Float64:
    """The sum of the seconds that have passed since each moment before a time."""
    before = np.searchsorted(moments, times)
    total = np.concatenate([[0.0], np.cumsum(moments - moments[0])])
    passed: Float64 = before * (times - moments[0]) - total[before]
    return passed


def _close_up(times: Float64, spans: Sequence[Span]) -> _Scale:
    """Around the end of the middle batch: a few batches, or fewer images if those are many."""
    whole_s = times[-1] - times[0]
    length_s = whole_s * min(1.0, _CLOSE_BATCHES / (len(times) - 1))
    decoding = [span.end_s - span.start_s for span in spans if _activity(span.name) == "decode"]
    if decoding:
        length_s = min(length_s, max(_CLOSE_SPANS * float(np.median(decoding)), whole_s / 10_000))
    first = min(times[len(times) // 2] - length_s / 2, times[-1] - length_s)
    return _Scale(first, first + length_s, origin_s=times[0])


def _round_step(span: float, most: int) -> float:
    """1, 2 or 5 times a power of ten, at most `most` of which make the span."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(f * power for f in (1, 2, 5, 10) if f * power * most >= span * (1 - 1e-9))


# Pictures


def _picture(lanes: Sequence[_Lane], scale: _Scale, times: Float64) -> str:
    height = len(lanes) * (_LANE + _GAP) + _AXIS
    floor = height - _AXIS
    parts = [
        part
        for number, lane in enumerate(lanes)
        for part in _draw_lane(lane, number * (_LANE + _GAP), scale)
    ]
    marks = [_line("mark", x, 0, x, floor) for x in _marks(times, scale)]
    return _svg(height, [*parts, *marks, *_time_axis(scale, floor)], "what every thread did")


def _draw_lane(lane: _Lane, top: float, scale: _Scale) -> Iterator[str]:
    edges = scale.edges()
    most = lane.most(edges)
    label = _lane_name(_shortened(lane.name), lane, most)
    yield _text(_LEFT - 8, top + _LANE / 2 + 4, label, "end")
    yield f'<rect class="well" x="{_LEFT}" y="{top}" width="{_PLOT}" height="{_LANE}"/>'
    below = np.zeros(_PLOT)
    for activity in _ACTIVITIES:
        if activity in lane.spans:
            above = below + lane.shares(activity, edges) / most
            shape = _filled(below, above, top)
            yield f'<path class="{activity}" d="{shape}"/>' if shape else ""
            below = above
    yield from _hints(lane, top, scale)


def _filled(below: Float64, above: Float64, top: float) -> str:
    """Boxes from one level to another, a box for as many columns as are alike."""
    low, high = (np.rint(np.clip(v, 0, 1) * _LEVELS).astype(int) for v in (below, above))
    changes = np.flatnonzero((np.diff(low) != 0) | (np.diff(high) != 0)) + 1
    starts, ends = np.concatenate([[0], changes]), np.concatenate([changes, [len(low)]])
    return "".join(
        f"M{_LEFT + start} {top + _LANE - low[start] / 2:g}"
        f"h{end - start}v{(low[start] - high[start]) / 2:g}h{start - end}z"
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        if high[start] > low[start]
    )


def _hints(lane: _Lane, top: float, scale: _Scale, count: int = 30) -> Iterator[str]:
    """What is told of a part of a lane under the pointer."""
    edges = scale.edges(count)
    shares = {each: lane.shares(each, edges) for each in _ACTIVITIES if each in lane.spans}
    for number in range(count):
        told = ", ".join(f"{name} {100 * share[number]:.0f} %" for name, share in shares.items())
        x, width = scale.x(edges[number]), _PLOT / count
        since = edges[number] - scale.origin_s
        title = escape(
            f"{lane.name}, {since:.3g} s to {since + scale.span_s / count:.3g} s: {told}"
        )
        box = f'x="{x:.1f}" y="{top}" width="{width:.1f}" height="{_LANE}"'
        yield f'<rect class="reach" {box}><title>{title}</title></rect>'


def _lane_name(name: str, lane: _Lane, most: float) -> str:
    if most > 1:
        return f"{name} ×{most:.0f}"
    return f"{name}, {lane.num_threads} threads" if lane.num_threads > 1 else name


def _rates(batches: Sequence[HandedOver], scale: _Scale) -> str:
    """Images per second; a point for at least two batches, or it would show only their beat."""
    times = np.array([batch.time_s for batch in batches])
    images = np.cumsum([0, *(batch.num_images for batch in batches[1:])])
    edges = scale.edges(max(1, min(120, (len(batches) - 1) // 2)))
    rates = np.diff(np.interp(edges, times, images)) / np.diff(edges)
    mean = float(images[-1]) / scale.span_s
    return _curve(edges, rates, scale, unit="images/s", told="{:,.0f}", mean=mean)


def _in_flight(timeline: Timeline, scale: _Scale) -> str:
    spans = [(s.start_s, s.end_s) for s in timeline.spans if _activity(s.name) == "fetch"]
    if not spans:
        return '<p class="note">No read was recorded.</p>'
    edges = scale.edges(_PLOT // 2)
    megabytes = _at_work(np.array(spans), edges) * timeline.request_bytes / 1e6
    mean = float(megabytes.mean())
    return _curve(edges, megabytes, scale, unit="MB", told="{:,.3g}", mean=mean, kind="fetch")


def _curve(
    edges: Float64,
    values: Float64,
    scale: _Scale,
    *,
    unit: str,
    told: str,
    mean: float,
    kind: str = "rate",
) -> str:
    """Steps over time, with a line at the mean."""
    highest = max(float(values.max()), mean, 1e-9)
    step = _round_step(highest, 4)
    ceiling = math.ceil(highest / step) * step

    def y(value: float) -> float:
        return 8 + (1 - value / ceiling) * (_CURVE - 8)

    grid = [
        part
        for number in range(round(ceiling / step) + 1)
        for part in _level(y(number * step), f"{told.format(number * step)} {unit}")
    ]
    shape = "".join(
        f"L{scale.x(left):.1f} {y(value):.1f}H{scale.x(right):.1f}"
        for left, right, value in zip(edges[:-1], edges[1:], values.tolist(), strict=True)
    )
    area = f'<path class="{kind} area" d="M{_LEFT} {_CURVE}{shape}V{_CURVE}z"/>'
    at = y(mean)
    middle = _line("mean", _LEFT, at, _LEFT + _PLOT, at)
    label = f"mean {told.format(mean)} {unit}"
    side = at + 15 if at < 24 else at - 5
    parts = [*grid, area, middle, _text(_WIDTH - _RIGHT - 4, side, label, "end", kind="mean-text")]
    return _svg(_CURVE + _AXIS, [*parts, *_time_axis(scale, _CURVE)], f"{unit} over time")


def _level(y: float, label: str) -> Iterator[str]:
    yield _line("grid", _LEFT, y, _LEFT + _PLOT, y)
    yield _text(_LEFT - 8, y + 4, label, "end")


def _limits(limits: Sequence[Limit]) -> str:
    """Bars: the shortest of the parts is what bounds the loader."""
    highest = max(limit.images_per_s for limit in limits)
    lowest = min(limit.images_per_s for limit in limits[1:])
    parts = []
    for number, limit in enumerate(limits):
        top = number * 30
        length = max(1.0, limit.images_per_s / highest * (_PLOT - 140))
        kind = "rate" if number == 0 else "bound" if limit.images_per_s == lowest else "limit"
        label = f"{limit.images_per_s:,.0f}" + (", the bound" if kind == "bound" else "")
        parts += [
            _text(_LEFT - 8, top + 16, limit.name, "end"),
            f'<rect class="{kind}" x="{_LEFT}" y="{top + 2}" width="{length:.1f}" height="20" '
            f'rx="2"/>',
            _text(_LEFT + length + 8, top + 16, label, "start", kind="value"),
        ]
    return _svg(len(limits) * 30, parts, "images per second of each part alone")


def _marks(times: Float64, scale: _Scale) -> list[float]:
    inside = times[(times >= scale.first_s - 1e-9) & (times <= scale.last_s + 1e-9)]
    return [scale.x(time) for time in inside.tolist()] if len(inside) <= _MAX_MARKS else []


def _time_axis(scale: _Scale, floor: float) -> Iterator[str]:
    yield _line("grid", _LEFT, floor, _LEFT + _PLOT, floor)
    ticks = scale.ticks()
    for tick in ticks:
        x = scale.x(tick + scale.origin_s)
        yield _line("grid", x, floor, x, floor + 4)
        yield _text(x, floor + 18, f"{tick:.6g} s", "middle")


def _svg(height: float, parts: Iterable[str], name: str) -> str:
    head = f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(name)}">'
    return "\n".join([head, *filter(None, parts), "</svg>"])


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    place = f'class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(text)}</text>"


def _shortened(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:8]}…{name[-11:]}"


# The page


def _head(timeline: Timeline) -> str:
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in timeline.figures
    )
    return (
        f"<h1>{escape(timeline.title)}</h1>\n"
        f'<p class="verdict">{escape(timeline.verdict)}</p>\n<dl class="figures">{cells}</dl>'
    )


def _card(title: str, body: str, note: str) -> str:
    head = f'<h2>{escape(title)} <span class="note">{escape(note)}</span></h2>'
    return f'<section>\n{head}\n<div class="scroll">{body}</div>\n</section>'


def _legend(lanes: Sequence[_Lane]) -> str:
    seen = {activity for lane in lanes for activity in lane.spans}
    entries = "".join(
        f'<li><svg viewBox="0 0 12 12"><rect class="{activity}" width="12" height="12" rx="2"/>'
        f"</svg>{escape(label)}</li>"
        for activity, label in _ACTIVITIES.items()
        if activity in seen
    )
    return f'<ul class="legend">{entries}</ul>'


def _table(lanes: Sequence[_Lane], scale: _Scale) -> str:
    seen = [each for each in _ACTIVITIES if any(each in lane.spans for lane in lanes)]
    edges = scale.edges(1)
    share: Callable[[_Lane, str], str] = lambda lane, activity: (  # noqa: E731
        f"{100 * lane.shares(activity, edges)[0]:.1f} %" if activity in lane.spans else ""
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in ("thread", *seen))
    rows = "".join(
        f"<tr><th>{escape(lane.name)}</th>"
        + "".join(f"<td>{share(lane, activity)}</td>" for activity in seen)
        + "</tr>"
        for lane in lanes
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _page(title: str, body: str) -> str:
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


# The colours of activities are told apart by people who do not see all of them (Okabe and Ito).
_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1b1c1e; --soft: #5c6066;
  --line: #e0e0dc; --well: #efefec; --fetch: #0072b2; --decode: #d55e00; --crop: #009e73;
  --colour: #b0588a; --transfer: #8a7a00; --wait: #c3c5c9; --other: #77797d; --rate: #2667c9; }
@media (prefers-color-scheme: dark) { :root { --page: #141517; --card: #1d1f22; --ink: #e8e8e6;
  --soft: #a5aab1; --line: #34373c; --well: #27292d; --fetch: #56b4e9; --decode: #f08a3c;
  --crop: #2fc39a; --colour: #d98fb6; --transfer: #e6d44c; --wait: #565a61; --other: #8d9096;
  --rate: #6ea3f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 76rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "Liberation Sans", sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.4rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0 0 .75rem; font-size: 1rem; }
h2 .note { margin-left: .5rem; font-weight: 400; }
.note { color: var(--soft); font-size: .9rem; }
.verdict { margin: 0; font-size: 1.15rem; overflow-wrap: anywhere; }
section { margin: 1rem 0 0; padding: 1rem 1.25rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; }
.figures { display: flex; flex-wrap: wrap; gap: 1px; margin: 1rem 0 0; overflow: hidden;
  background: var(--line); border: 1px solid var(--line); border-radius: 10px; }
.figures div { flex: 1 0 9rem; padding: .6rem 1.25rem; background: var(--card); }
.figures dt { color: var(--soft); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.scroll { overflow-x: auto; }
.scroll > svg { display: block; width: 100%; min-width: 44rem; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, "Segoe UI", "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
svg .value { fill: var(--ink); font-weight: 600; }
svg .mean-text { fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
.well { fill: var(--well); } .reach { fill: transparent; }
.reach:hover { fill: var(--ink); fill-opacity: .12; }
.fetch { fill: var(--fetch); } .decode { fill: var(--decode); } .crop { fill: var(--crop); }
.colour { fill: var(--colour); } .transfer { fill: var(--transfer); } .wait { fill: var(--wait); }
.other { fill: var(--other); } .rate { fill: var(--rate); } .limit { fill: var(--wait); }
.bound { fill: var(--decode); }
.area { fill-opacity: .75; }
.grid { stroke: var(--line); }
.mark { stroke: var(--ink); stroke-opacity: .35; stroke-width: .75; pointer-events: none; }
.mean { stroke: var(--ink); stroke-dasharray: 5 4; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0 0 .75rem; padding: 0;
  list-style: none; font-size: .9rem; }
.legend svg { width: 12px; height: 12px; margin-right: .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem 1.25rem .25rem 0; border-bottom: 1px solid var(--line); }
td { text-align: right; } th { text-align: left; font-weight: 500; }
thead th:not(:first-child) { text-align: right; }
thead th { color: var(--soft); }
tbody tr:last-child > * { border-bottom: 0; }
@media print { :root { --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #ccc; }
  body { max-width: none; padding: 0; } svg { print-color-adjust: exact; } }
"""
