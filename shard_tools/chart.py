"""A histogram over a logarithmic axis as inline SVG, without script or styles of its own."""

import math
from collections.abc import Callable, Iterator
from html import escape

from shard_tools.page import Html
from shard_tools.tally import Histogram

_WIDTH, _HEIGHT = 460.0, 200.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 8.0, 22.0, 24.0
_MAX_TICKS = 8

Label = Callable[[float], str]


def histogram_chart(
    histogram: Histogram, *, name: str, label: Label, ticks: list[float], middle: float | None
) -> Html:
    """Bars, with the count under the pointer.

    Args:
        name: for those who do not see it. label: how a value is written. ticks: values that may be
        written below the axis. middle: a value to mark as the median.
    """
    if not histogram.counts:
        return Html('<p class="note">No sizes are recorded.</p>')
    parts = [
        *_scale(max(histogram.counts)),
        *_bars(histogram, label),
        *_axis(histogram, ticks, label),
        *([_middle(histogram, middle, label)] if middle else []),
    ]
    head = (
        f'<svg class="chart" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" '
        f'aria-label="{escape(name)}">'
    )
    return Html("\n".join([head, *parts, "</svg>"]))


def powers_of_two(histogram: Histogram) -> list[float]:
    """Ticks for pixels."""
    if not histogram.edges:
        return []
    first, last = (math.log2(edge) for edge in (histogram.edges[0], histogram.edges[-1]))
    return [2.0**n for n in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)]


def powers_of_ten(histogram: Histogram) -> list[float]:
    """Ticks for bytes: 1, 2 and 5 times a power of ten."""
    if not histogram.edges:
        return []
    low, high = histogram.edges[0], histogram.edges[-1]
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**n for n in exponents]
    few = [t for t in tens if low <= t <= high]
    many = [f * t for t in tens for f in (1, 2, 5) if low <= f * t <= high]
    return many if len(many) <= _MAX_TICKS else few


def _bars(histogram: Histogram, label: Label) -> Iterator[str]:
    total, highest = sum(histogram.counts), max(histogram.counts)
    for i, count in enumerate(histogram.counts):
        left, right = (_x(histogram, edge) for edge in histogram.edges[i : i + 2])
        top = _y(count, highest)
        low, high = label(histogram.edges[i]), label(histogram.edges[i + 1])
        title = escape(f"{low} to {high}: {count:,} images, {100 * count / total:.1f} %")
        yield (
            f"<g><title>{title}</title>"
            f'<rect class="reach" x="{left:.1f}" y="{_TOP:g}" width="{right - left:.1f}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM:g}"/>'
            f'<rect class="bar" x="{left + 0.5:.1f}" y="{top:.1f}" '
            f'width="{max(right - left - 1, 0.5):.1f}" height="{_floor() - top:.1f}" rx="1"/></g>'
        )


def _scale(highest: int) -> Iterator[str]:
    """Lines at two to four round counts."""
    power = 10 ** math.floor(math.log10(max(highest, 2) / 2))
    step = max(f * power for f in (1, 2, 5) if 2 * f * power <= max(highest, 2))
    for count in range(step, highest + 1, step):
        yield _line("grid", _LEFT, _y(count, highest), _WIDTH - _RIGHT, _y(count, highest))
        yield _text(_LEFT - 8, _y(count, highest) + 4, f"{count:,}", "end")
    yield _line("grid", _LEFT, _floor(), _WIDTH - _RIGHT, _floor())


def _axis(histogram: Histogram, ticks: list[float], label: Label) -> Iterator[str]:
    stride = math.ceil(len(ticks) / _MAX_TICKS) or 1
    for tick in ticks[::stride]:
        x = _x(histogram, tick)
        yield _line("grid", x, _floor(), x, _floor() + 4)
        yield _text(x, _HEIGHT - 6, label(tick), "middle")


def _middle(histogram: Histogram, value: float, label: Label) -> str:
    x = _x(histogram, value)
    is_left = x < _WIDTH / 2
    text = f"median {label(value)}"
    return _line("middle", x, 4, x, _floor()) + _text(
        x + (5 if is_left else -5), 13, text, "start" if is_left else "end", kind="middle-text"
    )


def _x(histogram: Histogram, value: float) -> float:
    low, high = (math.log(edge) for edge in (histogram.edges[0], histogram.edges[-1]))
    return _LEFT + (math.log(value) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)


def _y(count: float, highest: int) -> float:
    return _TOP + (1 - count / highest) * (_HEIGHT - _TOP - _BOTTOM)


def _floor() -> float:
    return _HEIGHT - _BOTTOM


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    place = f'class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(text)}</text>"
