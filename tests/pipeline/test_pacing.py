"""Limits, budgets and pauses of reading, without any store."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import StoreError
from pipeline.pacing import HedgeBudget, Limiter, Pace, Patience

SECONDS = 60  # what would take longer hangs


@given(
    most=st.integers(1, 6),
    events=st.lists(st.sampled_from(["throttled", "succeeded", "cancel", "pass"]), max_size=30),
)
def test_the_limiter_never_admits_too_many_and_loses_no_turn(most: int, events: list[str]) -> None:
    limiter, active = Limiter(most), 0

    async def work(number: int) -> None:
        nonlocal active
        async with limiter:
            active += 1
            assert active <= most
            try:
                await asyncio.sleep(0)
            finally:
                active -= 1

    async def run() -> None:
        tasks = [asyncio.create_task(work(i)) for i in range(len(events) + 3)]
        for number, event in enumerate(events):
            if event == "cancel":
                tasks[number].cancel()
            elif event != "pass":
                getattr(limiter, event)()
            await asyncio.sleep(0)
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), SECONDS)
        kinds = {type(result) for result in results}
        assert kinds <= {type(None), asyncio.CancelledError}
        async with limiter:
            assert 1 <= limiter.limit <= most

    asyncio.run(run())


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), max_size=30))
def test_hedges_never_spend_what_was_not_earned(events: list[tuple[int, int]]) -> None:
    budget, earned, spent = HedgeBudget(0.05), 0, 0
    for read_bytes, hedge_bytes in events:
        budget.earn(read_bytes)
        earned += read_bytes
        if budget.reserve(hedge_bytes):
            spent += hedge_bytes // 2
            budget.refund(hedge_bytes - hedge_bytes // 2)
        assert spent <= 0.05 * earned + 1e-6


def test_late_is_what_takes_longer_than_nearly_all() -> None:
    pace = Pace()
    for tenths in range(31):
        pace.add(1 << 20, tenths / 10)
    assert pace.late_s(1 << 20) == float("inf")
    pace.add(1 << 20, 3.1)
    assert 3.1 < pace.late_s(1 << 20) < 6
    assert pace.late_s(1 << 10) == float("inf")


def test_the_rate_of_the_recent_past() -> None:
    pace = Pace()
    assert pace.bytes_per_s == 0
    for _ in range(3):
        pace.add(1000, 0.5)
    assert pace.bytes_per_s == pytest.approx(2000)
    for _ in range(200):
        pace.add(1000, 2)
    assert pace.bytes_per_s == pytest.approx(500, rel=0.01)


def test_only_stalls_of_most_requests_mean_that_there_are_too_many() -> None:
    async def run() -> None:
        limiter = Limiter(8)
        turns = [await limiter.__aenter__() for _ in range(8)]
        for _ in range(4):
            limiter.stalled()
        limiter.succeeded()
        for _ in range(4):
            limiter.stalled()
        assert limiter.limit == 8
        limiter.stalled()
        assert limiter.limit == 4
        assert limiter.is_resting()
        assert len(turns) == 8

    asyncio.run(run())


def test_a_pause_keeps_its_turn_until_a_range_arrives() -> None:
    async def run() -> None:
        limiter = Limiter(2)
        assert await limiter.pause(1000) > 999
        limiter.throttled()
        pausing = asyncio.create_task(limiter.pause(1000))
        assert await limiter.pause(0.01) == 0
        assert not pausing.done()
        limiter.succeeded()
        assert 0 < await asyncio.wait_for(pausing, SECONDS) < 1000

    asyncio.run(run())


def test_pauses_grow_at_random_until_patience_has_run_out() -> None:
    patience, error = Patience(1000), StoreError("no")
    pauses = [[Patience(1000).pause_s(error) for _ in range(200)]]
    for _ in range(10):
        pauses.append([patience.pause_s(error)])
    assert 0.15 < max(pauses[0]) <= 0.2
    assert min(pauses[0]) < 0.05
    assert all(0 <= pause <= 5 for (pause,) in pauses[1:])
    late = [Patience(1000).pause_s(error, falls=4) for _ in range(200)]
    assert 2 < max(late) <= 3.2
    with pytest.raises(StoreError, match="no"):
        Patience(0).pause_s(error)
    assert Patience(0.01).pause_s(error) <= 0.01
