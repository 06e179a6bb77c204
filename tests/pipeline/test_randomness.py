"""The hash behind every draw: pure, elementwise, uniform."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from pipeline.randomness import mix64, uniform

ANY = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(ANY, min_size=1, max_size=5), ANY, ANY)
def test_arrays_are_hashed_element_by_element(column: list[int], seed: int, last: int) -> None:
    together = mix64(seed, np.array(column), last)
    assert together.dtype == np.uint64
    assert [int(value) for value in together] == [int(mix64(seed, x, last)) for x in column]


def test_parts_broadcast() -> None:
    assert mix64(1, np.arange(3)[:, None], np.arange(4)).shape == (3, 4)
    assert mix64(1, 2).shape == ()
    assert uniform(1, range(5)).shape == (5,)


def test_order_and_number_of_parts_matter() -> None:
    values = {int(mix64(*parts)) for parts in [(1, 2), (2, 1), (1, 2, 0), (0, 1, 2), (1,), (2,)]}
    assert len(values) == 6


def test_values_never_change() -> None:
    """The first one is SplitMix64's own first output from seed 0."""
    assert int(mix64(0)) == 0xE220A8397B1DCDAF
    assert int(mix64(1, 2, 3)) == int(mix64(np.uint64(1), np.int32(2), np.array(3)))
    assert int(mix64(-1)) == int(mix64(2**64 - 1))


def test_floats_are_refused() -> None:
    with pytest.raises(TypeError):
        mix64(1.5)


def test_one_bit_of_input_flips_half_of_the_output() -> None:
    base, flipped = mix64(3, np.arange(10_000)), mix64(3, np.arange(10_000) ^ 1)
    flips = np.bitwise_count(base ^ flipped)
    assert abs(flips.mean() - 32) < 0.2


@pytest.mark.parametrize("neighbour", [0, 1])
def test_draws_are_uniform_and_neighbours_independent(neighbour: int) -> None:
    values = uniform(11, np.arange(50_000), neighbour)
    assert ((values >= 0) & (values < 1)).all()
    assert kstest(values, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02
