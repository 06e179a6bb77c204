"""Quantiles, histograms and counts in bounded memory."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shard_tools.tally import QUANTILES, Histogram, LogBins, Spread, Tally


@given(st.lists(st.lists(st.integers(0, 1000), max_size=20), min_size=1, max_size=8))
def test_exact_while_few(parts: list[list[int]]) -> None:
    values = [value for part in parts for value in part]
    spread = Spread()
    for part in parts:
        spread.add(np.array(part, np.int64))
    if values:
        expected = np.quantile(values, QUANTILES, method="inverted_cdf")
        assert spread.quantiles() == expected.tolist()
    else:
        assert spread.quantiles() == []


@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), st.integers(10, 50))
def test_every_nth_of_many(lengths: list[int], limit: int) -> None:
    """However the values arrive, those kept are evenly spaced."""
    spread = Spread(limit)
    values = np.arange(sum(lengths), dtype=np.int64)
    for part in np.split(values, np.cumsum(lengths)[:-1]):
        spread.add(part)
    assert len(spread._kept) <= limit
    assert spread._kept.tolist() == values[:: spread._step].tolist()


def test_close_when_thinned() -> None:
    spread = Spread(1000)
    for part in np.split(np.random.default_rng(0).permutation(100_000), 100):
        spread.add(part)
    wanted = 100_000 * np.array(QUANTILES)
    assert np.abs(np.array(spread.quantiles()) - wanted).max() < 6000


def test_bins_of_equal_ratio() -> None:
    bins = LogBins(1)
    bins.add(np.array([0, -5, 1, 2, 3, 4, 7, 31]))
    assert bins.histogram() == Histogram([1, 2, 4, 8, 16, 32], [1, 2, 2, 0, 1])
    assert LogBins(1).histogram() == Histogram()


def test_one_in_the_middle_of_a_bin() -> None:
    bins = LogBins(2, centred=True)
    bins.add(np.array([0.85, 1.0, 1.18]))
    bins.add(np.array([2.0]))
    found = bins.histogram()
    assert found.counts == [3, 0, 1]
    np.testing.assert_allclose(found.edges, [2**-0.25, 2**0.25, 2**0.75, 2**1.25])


@given(st.lists(st.floats(1e-3, 1e9), min_size=1), st.integers(1, 8), st.booleans())
def test_every_value_has_a_bin(values: list[float], per_octave: int, centred: bool) -> None:
    bins = LogBins(per_octave, centred=centred)
    bins.add(np.array(values))
    found = bins.histogram()
    assert sum(found.counts) == len(values)
    assert len(found.edges) == len(found.counts) + 1
    assert found.edges[0] * (1 - 1e-9) <= min(values)
    assert max(values) <= found.edges[-1] * (1 + 1e-9)
    assert found.counts[0]
    assert found.counts[-1]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 1))))
def test_a_few_names(rows: list[tuple[str, int]]) -> None:
    tally = Tally(num_kinds=2)
    for name, kind in rows:
        tally.add(name, 1, kind)
    expected = Counter(rows)
    named, others = tally.top(6)
    counts = {(n, kind): c for n, cs in named.items() for kind, c in enumerate(cs) if c}
    assert counts == dict(expected)
    assert others == [0, 0]
    assert tally.is_exact
    few, rest = tally.top(2)
    assert sum(map(sum, few.values())) + sum(rest) == len(rows)


def test_many_names_in_bounded_memory() -> None:
    """The frequent names of a long tail stay exact, and nothing is lost from the sum."""
    tally = Tally(max_names=100)
    for number in range(10_000):
        tally.add("everywhere", 2)
        tally.add(f"once-{number}", 1)
        assert len(tally) <= 100
    named, others = tally.top(1)
    assert dict(named) == {"everywhere": [20_000]}
    assert others == [10_000]
    assert not tally.is_exact
