from concurrent.futures import ThreadPoolExecutor

from pipeline.telemetry import Telemetry


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
