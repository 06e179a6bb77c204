from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.order import SampleOrder, resolve_sizes


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    global_batch = lanes * draw(st.integers(1, 5))
    return SampleOrder(
        draw(st.integers(global_batch, 700)),
        global_batch=global_batch,
        lanes=lanes,
        chunk=draw(st.integers(1, 40)),
        window=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 2**31)),
    )


def epoch_of(order: SampleOrder, epoch: int) -> np.ndarray:
    """All samples of an epoch as global batches: int64 [num_steps, global_batch]."""
    lanes = np.repeat(np.arange(order.lanes), order.samples_per_lane)
    places = np.tile(np.arange(order.samples_per_lane), order.lanes)
    samples = order.sample_at(epoch, lanes, places)
    per_lane = order.global_batch // order.lanes
    by_lane = samples.reshape(order.lanes, order.num_steps, per_lane)
    return by_lane.transpose(1, 0, 2).reshape(order.num_steps, order.global_batch)


@given(orders(), st.integers(0, 5))
def test_every_sample_at_most_once_and_fewer_than_a_batch_left_over(order, epoch):
    samples = epoch_of(order, epoch).ravel()
    assert len(set(samples.tolist())) == len(samples)
    assert samples.min() >= 0
    assert samples.max() < order.num_samples
    assert order.num_samples - len(samples) < order.global_batch


@given(orders(), st.integers(0, 5), st.data())
def test_every_world_size_sees_the_same_global_batches(order, epoch, data):
    step = data.draw(st.integers(0, order.num_steps - 1))
    expected = epoch_of(order, epoch)[step]
    for world_size in (n for n in range(1, order.lanes + 1) if order.lanes % n == 0):
        parts = [order.batch(epoch, step, rank, world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(parts), expected)


@given(orders(), st.data())
def test_epochs_may_differ_from_sample_to_sample(order, data):
    places = np.arange(order.samples_per_lane)
    lanes = np.full_like(places, data.draw(st.integers(0, order.lanes - 1)))
    epochs = np.array(data.draw(st.lists(st.integers(0, 9), min_size=1)))
    mixed = np.resize(epochs, len(places))
    found = order.sample_at(mixed, lanes, places)
    for epoch in set(mixed.tolist()):
        alone = order.sample_at(epoch, lanes, places)
        np.testing.assert_array_equal(found[mixed == epoch], alone[mixed == epoch])


@given(orders())
def test_every_sample_is_reached_within_a_few_epochs(order):
    """Left-overs differ between epochs, as long as there are chunks to permute.

    With one single chunk nothing moves the samples past the last batch; the default chunk size
    leaves every lane several.
    """
    assume(order.num_chunks >= 4)
    seen: set[int] = set()
    for epoch in range(60):
        seen.update(epoch_of(order, epoch).ravel().tolist())
    assert len(seen) == order.num_samples


@given(orders())
def test_epochs_and_seeds_differ(order):
    assume(order.num_steps * order.global_batch >= 30)
    assert not np.array_equal(epoch_of(order, 0), epoch_of(order, 1))
    other = SampleOrder(
        order.num_samples,
        global_batch=order.global_batch,
        lanes=order.lanes,
        chunk=order.chunk,
        window=order.window,
        seed=order.seed + 1,
    )
    assert not np.array_equal(epoch_of(order, 0), epoch_of(other, 0))


@given(orders(), st.integers(0, 3))
def test_a_window_holds_what_is_served_from_it_and_few_chunks(order, epoch):
    size = order.window * order.chunk
    for lane in range(order.lanes):
        for place in range(0, order.samples_per_lane, size):
            samples = order.window_of(epoch, lane, place)
            places = np.arange(place, place + len(samples))
            served = order.sample_at(epoch, np.full_like(places, lane), places)
            np.testing.assert_array_equal(samples, served)
            # A window that begins inside a chunk touches one chunk more; the short chunk may add
            # another.
            assert len(set((samples // order.chunk).tolist())) <= order.window + 2


def test_the_order_is_a_uniform_looking_permutation():
    """Neighbouring chunks are no neighbours in the order, and no position prefers a sample."""
    order = SampleOrder(4096, global_batch=64, lanes=8, chunk=8, window=4, seed=1)
    places = np.zeros((4096, 40))
    for epoch in range(40):
        places[epoch_of(order, epoch).ravel(), epoch] = np.arange(4096)
    standard_error = 4096 / np.sqrt(12) / np.sqrt(40)
    assert np.abs(places.mean(axis=1) - 2047.5).max() < 5 * standard_error
    chunk = order.chunk  # samples of one chunk stay together in a window; samples of two do not
    assert np.abs(np.corrcoef(places[:-chunk].ravel(), places[chunk:].ravel())[0, 1]) < 0.05


def test_it_is_a_function_of_its_arguments_only():
    """Frozen values: changing these is a change of SAMPLE ORDER, for the change log."""
    order = SampleOrder(1000, global_batch=8, lanes=4, chunk=7, window=3, seed=5)
    assert order.batch(2, 3).tolist() == [988, 989, 695, 693, 901, 499, 596, 662]


def test_ten_billion_samples_cost_what_ten_cost():
    order = SampleOrder(10**10, global_batch=8192, lanes=512, chunk=64, window=4, seed=0)
    batch = order.batch(7, order.num_steps - 1)
    assert batch.shape == (8192,)
    assert len(np.unique(batch)) == 8192
    assert batch.max() < 10**10


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_samples": 7}, "fewer than one global batch"),
        ({"lanes": 3}, "does not divide"),
        ({"chunk": 0}, "loader.chunk"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, word):
    sizes = {"num_samples": 100, "global_batch": 8, "lanes": 4, "chunk": 4, "window": 2, "seed": 0}
    sizes |= changes
    with pytest.raises(UsageError, match=word):
        SampleOrder(sizes.pop("num_samples"), **sizes)


def test_a_world_that_does_not_divide_the_lanes_is_refused_with_the_ones_that_do():
    order = SampleOrder(100, global_batch=8, lanes=4, chunk=4, window=2, seed=0)
    with pytest.raises(UsageError, match="1, 2 or 4 ranks"):
        order.batch(0, 0, 0, 3)


def test_default_sizes():
    resolve = partial(resolve_sizes, budget_bytes=2 << 30)
    sizes = resolve(global_batch=4096, world_size=8, mean_sample_bytes=100_000, num_samples=10**9)
    assert (sizes.lanes, sizes.chunk, sizes.window) == (64, 62, 4)
    small = resolve(global_batch=32, world_size=2, mean_sample_bytes=20_000, num_samples=600)
    assert small.chunk * small.lanes * 8 <= 600
    for mean_bytes in (1 << 20, 4 << 20, 6 << 20):  # one rank, large photographs
        large = resolve(
            global_batch=4096, world_size=1, mean_sample_bytes=mean_bytes, num_samples=10**9
        )
        assert large.lanes * (large.window + 1) * large.chunk * mean_bytes <= 2 << 30
    with pytest.raises(UsageError, match="multiple of 3"):
        resolve(global_batch=32, world_size=3, mean_sample_bytes=1, num_samples=600)


@given(orders(), st.integers(0, 3), st.data())
def test_replacements_are_the_rest_of_the_lane_nearest_window_first(order, epoch, data):
    lane = data.draw(st.integers(0, order.lanes - 1))
    place = data.draw(st.integers(0, order.samples_per_lane - 1))
    mine = int(order.sample_at(epoch, np.array([lane]), np.array([place]))[0])
    found = list(order.replacements(epoch, lane, place))
    places = np.arange(order.samples_per_lane)
    whole_lane = order.sample_at(epoch, np.full_like(places, lane), places).tolist()
    assert sorted([mine, *found]) == sorted(whole_lane)
    window = order.window_of(epoch, lane, place).tolist()
    assert set(found[: len(window) - 1]) | {mine} == set(window)
    if window[-1] != mine:
        assert found[0] == window[window.index(mine) + 1]
