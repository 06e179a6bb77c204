"""The page of a loader's time: what is drawn is what the spans say, and nothing in it is alive."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from pipeline.telemetry import Span
from pipeline.timeline import HandedOver, Limit, Timeline, render_timeline

SECONDS = 10
BEGIN = 5_000.0


def timeline(
    *, title: str = "s3://bucket/data", spans: list[Span] | None = None, batches: int = 20
) -> Timeline:
    ends = np.linspace(BEGIN, BEGIN + SECONDS, batches + 1).tolist()
    return Timeline(
        title=title,
        verdict="bound by decode",
        figures=[("Images per second", "1,280")],
        limits=[Limit("this loader", 1280), Limit("network", 9000), Limit("decode", 1300)],
        spans=worker_spans() if spans is None else spans,
        batches=[HandedOver(end, 640) for end in ends],
        request_bytes=4e6,
    )


def worker_spans() -> list[Span]:
    """A thread that decodes half of the time, and a fetch loop with two requests at once."""
    spans = []
    for number in range(SECONDS * 100):
        start = BEGIN + number / 100
        spans.append(Span("decode", "worker 0/decode_0", start, start + 0.005))
    for number in range(SECONDS):
        start = BEGIN + number
        spans += [Span("fetch", "worker 0/fetch", start, start + 0.5)] * 2
    return spans


def table(page: str) -> dict[str, list[str]]:
    """The last table's rows by thread."""
    rows = re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", page)
    return {name: re.findall(r"<td>(.*?)</td>", cells) for name, cells in rows}


def test_shares_of_time_are_those_of_the_spans():
    page = render_timeline(timeline())
    assert table(page)["worker 0/decode_0"] == ["", "50.0 %"]
    assert table(page)["worker 0/fetch"] == ["100.0 %", ""]
    assert "mean 1,280 images/s" in page
    assert "mean 4 MB" in page, "one of two requests of 4 MB is in flight on average"
    assert "worker 0/fetch ×2" in page


def test_the_time_outside_of_the_batches_does_not_count():
    early = Span("decode", "worker 0/decode_0", BEGIN - 60, BEGIN + 1)
    late = Span("decode", "worker 0/decode_0", BEGIN + SECONDS - 1, BEGIN + SECONDS + 60)
    page = render_timeline(timeline(spans=[early, late]))
    assert table(page)["worker 0/decode_0"] == ["20.0 %"]


def test_a_sum_of_waits_is_not_drawn_beside_its_parts():
    waits = [Span(n, "MainThread", BEGIN, BEGIN + 5) for n in ("wait_decode", "data_wait")]
    assert table(render_timeline(timeline(spans=waits)))["MainThread"] == ["50.0 %"]
    alone = render_timeline(timeline(spans=waits[1:]))
    assert table(alone)["MainThread"] == ["50.0 %"]


def test_the_training_process_comes_first_and_numbers_are_in_their_order():
    names = ["worker 10/decode_0", "worker 2/decode_0", "MainThread"]
    spans = [Span("decode", name, BEGIN, BEGIN + 1) for name in names]
    assert list(table(render_timeline(timeline(spans=spans))))[-3:] == names[::-1]


def test_many_threads_are_shown_by_worker():
    spans = [
        Span("decode", f"worker {worker}/decode_{thread}", BEGIN, BEGIN + worker + 1)
        for worker in range(4)
        for thread in range(16)
    ]
    page = render_timeline(timeline(spans=spans))
    shares = {name: cells for name, cells in table(page).items() if name.startswith("worker")}
    assert shares == {f"worker {n}": [f"{10 * (n + 1)}.0 %"] for n in range(4)}
    assert "worker 3, 16 threads" in page


def test_the_least_part_is_marked_as_the_bound():
    page = render_timeline(timeline())
    assert "1,300, the bound" in page
    assert page.count("the bound") == 1


def test_a_minute_of_a_node_stays_small():
    spans = [
        Span("decode", f"worker {n % 8}/decode_{n // 8 % 3}", s, s + 0.001)
        for n, s in enumerate(np.linspace(BEGIN, BEGIN + SECONDS, 200_000).tolist())
    ]
    assert len(render_timeline(timeline(spans=spans, batches=2000))) < 2_000_000


def test_every_picture_is_well_formed():
    page = render_timeline(timeline())
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) >= 5
    for picture in pictures:
        ElementTree.fromstring(picture)


def test_nothing_that_a_name_contains_comes_alive():
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    spans = [Span("decode", evil, BEGIN, BEGIN + 5), Span(evil, "MainThread", BEGIN, BEGIN + 1)]
    page = render_timeline(timeline(title=evil, spans=spans))
    seen = _Tags()
    seen.feed(page)
    assert seen.names.isdisjoint({"script", "img", "iframe", "object", "link", "a"})
    assert not any(name.startswith("on") or name in ("src", "href") for name in seen.attributes)
    assert "default-src 'none'" in page


@pytest.mark.parametrize("count", [0, 1])
def test_one_batch_makes_no_timeline(count):
    short = timeline()
    with pytest.raises(ValueError, match="two batches"):
        render_timeline(Timeline(**{**vars(short), "batches": short.batches[:count]}))


@pytest.mark.parametrize("spans", [[], [Span("wait_fetch", "MainThread", BEGIN, BEGIN)]])
def test_a_run_without_work_is_drawn_all_the_same(spans):
    page = render_timeline(timeline(spans=spans, batches=1))
    assert "No read was recorded" in page


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
