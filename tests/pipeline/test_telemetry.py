import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from pipeline.telemetry import Span, Telemetry


def test_many_threads_add_and_a_take_starts_over():
    telemetry = Telemetry()
    with ThreadPoolExecutor(8) as threads:
        for _ in range(1000):
            threads.submit(telemetry.add, fetch_bytes=3, fetch_requests=1)
    assert telemetry.total("fetch_bytes") == 3000
    assert telemetry.take() == {"fetch_bytes": 3000, "fetch_requests": 1000}
    assert telemetry.total("fetch_bytes") == 0
    assert telemetry.take() == {}


def test_timed_adds_what_has_passed_also_on_an_exception():
    telemetry = Telemetry()
    for _ in range(2):
        try:
            with telemetry.timed("decode_s"):
                raise ValueError
        except ValueError:
            pass
    assert telemetry.total("decode_s") > 0


def test_spans_are_kept_only_if_asked_for():
    telemetry = Telemetry()
    telemetry.record("decode_s", 1.0, 3.5)
    assert telemetry.take_spans() == []
    assert telemetry.take() == {"decode_s": 2.5}


def test_a_span_says_what_who_and_when():
    telemetry = Telemetry(record_spans=True)
    before = time.perf_counter()
    thread = threading.Thread(target=lambda: _timed(telemetry), name="decode_7")
    thread.start()
    thread.join()
    (span,) = telemetry.take_spans()
    assert (span.name, span.thread) == ("decode", "decode_7")
    assert before <= span.start_s <= span.end_s <= time.perf_counter()
    assert telemetry.total("decode_s") == span.end_s - span.start_s
    assert telemetry.take_spans() == []


def test_what_another_has_taken_is_added():
    telemetry = Telemetry()
    span = Span("fetch", "worker 0/fetch", 1.0, 2.0)
    telemetry.merge({"fetch_s": 1.0, "fetch_bytes": 5}, [span])
    telemetry.merge({"fetch_bytes": 6})
    assert telemetry.take() == {"fetch_s": 1.0, "fetch_bytes": 11}
    assert telemetry.take_spans() == [span]


def test_no_span_is_lost_to_a_take_meanwhile():
    """Nor appended to a list that has been handed out, which may be being pickled."""
    telemetry = Telemetry()
    spans = [Span("fetch", "worker 0", number, number + 1) for number in range(2)]
    taken: list[Span] = []
    taker = threading.Thread(target=lambda: taken.extend(telemetry.take_spans()))

    def taken_from_meanwhile():
        yield spans[0]
        taker.start()
        taker.join(0.1)
        yield spans[1]

    telemetry.merge({}, taken_from_meanwhile())
    taker.join()
    assert taken + telemetry.take_spans() == spans


def test_processes_of_a_machine_share_the_clock_of_spans():
    program = "import time; print(time.perf_counter())"
    before = time.perf_counter()
    told = subprocess.run(
        [sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True
    )
    assert before < float(told.stdout) < time.perf_counter(), os.uname()


def _timed(telemetry: Telemetry) -> None:
    with telemetry.timed("decode_s"):
        pass
