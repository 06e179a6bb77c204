from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.manifest import Snapshot
from pipeline.mixture import PATTERN_SLOTS, Mixture, Slots, Source, Window, mix_sources, source_seed
from pipeline.order import SampleOrder
from pipeline.samples import SampleReader
from pipeline.store import Store, open_store
from pipeline.telemetry import Telemetry
from tests.pipeline.test_order import epoch_of
from tests.support.dataset import pictures
from tests.support.orders import CASES, GOLDEN_ORDER, batches
from tests.support.snapshots import write_snapshot

WORLD_SIZES = (1, 2, 4, 8, 16)
FIELDS = ("source", "epoch", "number", "lane", "place", "global_numbers")


def property_of(*strategies: Any) -> Callable[[Callable[..., None]], Callable[[int], None]]:
    """A few examples in make test, hundreds in make test-slow."""

    def decorate(holds: Callable[..., None]) -> Callable[[int], None]:
        @pytest.mark.parametrize("examples", [8, pytest.param(200, marks=pytest.mark.slow)])
        def test(examples: int) -> None:
            settings(max_examples=examples)(given(*strategies)(holds))()

        test.__doc__ = holds.__doc__
        return test

    return decorate


@st.composite
def mixtures(
    draw: st.DrawFn, *, min_sources: int = 1, max_sources: int = 4, min_per_lane: int = 1
) -> Mixture:
    """Mixtures whose lanes every world size divides."""
    lanes = draw(st.sampled_from([16, 32, 48]))
    num_sources = draw(st.integers(min_sources, max_sources))
    global_batch = lanes * draw(st.integers(min_per_lane, min_per_lane + 4))
    smallest = global_batch if num_sources == 1 else lanes
    sources = [
        Source(
            f"source {number}",
            draw(st.integers(smallest, 600)) + (global_batch if number == 0 else 0),
            chunk=draw(st.integers(1, 20)),
            window=draw(st.integers(1, 5)),
            weight=draw(st.floats(0.05, 20)),
        )
        for number in range(num_sources)
    ]
    seed = draw(st.integers(0, 2**31))
    return mix_sources(sources, global_batch=global_batch, lanes=lanes, seed=seed)


def single(num_samples: int = 500, *, batch: int = 24, seed: int = 7) -> Mixture:
    source = Source("s3://bucket/images", num_samples, chunk=5, window=3)
    return mix_sources([source], global_batch=batch, lanes=8, seed=seed)


def splits(lanes: range, workers: int) -> list[range]:
    """The lanes of each worker: contiguous parts that differ by one at most."""
    parts = np.array_split(np.arange(lanes.start, lanes.stop), workers)
    return [range(int(part[0]), int(part[-1]) + 1) for part in parts if part.size]


def join(parts: list[Slots]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS}


def assert_same(parts: list[Slots], whole: Slots) -> None:
    for name, array in join(parts).items():
        np.testing.assert_array_equal(array, getattr(whole, name), err_msg=name)


def served(mixture: Mixture, first: int, last: int, lanes: range) -> dict[str, np.ndarray]:
    """All slots of the steps first … last - 1, counted over epochs, step after step."""
    steps = (divmod(number, mixture.num_steps) for number in range(first, last))
    return join([mixture.slots(epoch, step, lanes) for epoch, step in steps])


def by_lane(slots: dict[str, np.ndarray]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(lane, source) -> (epoch, number) of each slot in turn."""
    found = defaultdict(list)
    for lane, source, epoch, number in zip(
        *(slots[name].tolist() for name in ("lane", "source", "epoch", "number")), strict=True
    ):
        found[lane, source].append((epoch, number))
    return found


def flat(windows: Iterator[Window]) -> list[tuple[int, int, int]]:
    return [(w.source, w.epoch, number) for w in windows for number in w.numbers]


# ----------------------------------------------------------------------------------------
# ranks, workers, resumes


@property_of(mixtures(), st.integers(0, 3), st.data())
def test_any_world_size_and_any_workers_serve_the_same_batch(mixture, epoch, data):
    step = data.draw(st.integers(0, mixture.num_steps - 1))
    whole = mixture.slots(epoch, step, range(mixture.lanes))
    assert len(whole.number) == mixture.global_batch
    for world_size in WORLD_SIZES:
        workers = data.draw(st.integers(1, 5))
        parts = [
            mixture.slots(epoch, step, lanes)
            for rank in range(world_size)
            for lanes in splits(mixture.lanes_of(rank, world_size), workers)
        ]
        assert_same(parts, whole)


@property_of(mixtures(), st.data())
def test_windows_are_what_the_slots_take_from_every_resume_on(mixture, data):
    """Of every lane and source, in order; and nothing that was served before."""
    first = data.draw(st.integers(0, 2 * mixture.num_steps))
    epochs = data.draw(st.integers(first // mixture.num_steps + 1, 4))
    rank, world_size = data.draw(st.sampled_from([(0, 1), (1, 2), (3, 4), (15, 16)]))
    lanes = mixture.lanes_of(rank, world_size)
    expected = by_lane(served(mixture, first, epochs * mixture.num_steps, lanes))
    position = divmod(first, mixture.num_steps)
    windows = list(mixture.windows(*position, lanes, epochs=epochs))
    found = Counter(flat(iter(windows)))
    assert found == Counter(
        (source, epoch, number)
        for (_, source), numbers in expected.items()
        for epoch, number in numbers
    )
    for lane in lanes[:2]:
        alone = mixture.windows(*position, range(lane, lane + 1), epochs=epochs)
        by_source = defaultdict(list)
        for source, epoch, number in flat(alone):
            by_source[source].append((epoch, number))
        assert by_source == {
            source: numbers for (its, source), numbers in expected.items() if its == lane
        }


@property_of(mixtures(), st.data())
def test_no_sample_is_served_before_its_window_has_come(mixture, data):
    """Windows begin no later than needed, so that what a step takes is among the windows whose
    first sample a step up to it takes; and lanes share a step's reads in their order."""
    lanes = mixture.lanes_of(0, data.draw(st.sampled_from(WORLD_SIZES)))
    first = data.draw(st.integers(0, mixture.num_steps))
    slots = served(mixture, first, 2 * mixture.num_steps, lanes)
    step_of = {
        key: number // (mixture.global_batch // mixture.lanes * len(lanes))
        for number, key in enumerate(
            zip(slots["source"].tolist(), slots["epoch"].tolist(), slots["number"].tolist(),
                strict=True)
        )
    }  # fmt: skip
    position = divmod(first, mixture.num_steps)
    needed = [
        step_of[window.source, window.epoch, window.numbers[0]]
        for window in mixture.windows(*position, lanes, epochs=2)
    ]
    assert needed == sorted(needed)


@property_of(mixtures(), st.data())
def test_windows_without_an_end_begin_with_those_that_end(mixture, data):
    first = data.draw(st.integers(0, mixture.num_steps - 1))
    endless = mixture.windows(0, first, range(2))
    for window in mixture.windows(0, first, range(2), epochs=2):
        other = next(endless)
        assert (other.source, other.epoch) == (window.source, window.epoch)
        assert other.numbers[: len(window.numbers)] == window.numbers


# ----------------------------------------------------------------------------------------
# one source


@property_of(mixtures(max_sources=1), st.integers(0, 5), st.data())
def test_a_mixture_of_one_is_its_order(mixture, epoch, data):
    (order,) = mixture.orders
    step = data.draw(st.integers(0, mixture.num_steps - 1))
    slots = mixture.slots(epoch, step, range(mixture.lanes))
    np.testing.assert_array_equal(slots.number, order.batch(epoch, step))
    np.testing.assert_array_equal(slots.global_numbers, slots.number)
    assert (mixture.num_steps, set(slots.epoch.tolist())) == (order.num_steps, {epoch})


@property_of(mixtures(max_sources=1), st.integers(0, 3))
def test_an_epoch_of_one_source_covers_all_but_less_than_a_batch_once(mixture, epoch):
    steps = range(epoch * mixture.num_steps, (epoch + 1) * mixture.num_steps)
    numbers = served(mixture, steps.start, steps.stop, range(mixture.lanes))["number"]
    batch = mixture.global_batch
    assert len(np.unique(numbers)) == len(numbers) == mixture.num_samples // batch * batch
    np.testing.assert_array_equal(
        np.sort(numbers), np.sort(epoch_of(mixture.orders[0], epoch).ravel())
    )


def test_windows_of_one_source_come_lane_by_lane():
    mixture = single()
    order, size = mixture.orders[0], 15
    windows = mixture.windows(2, 4, range(2, 5))
    for place in (12, *range(size, order.samples_per_lane, size)):
        for lane in range(2, 5):
            window = next(windows)
            expected = order.window_of(2, lane, place)[place % size :]
            assert (window.source, window.epoch) == (0, 2)
            assert window.numbers == expected.tolist()
    assert next(windows).epoch == 3


# ----------------------------------------------------------------------------------------
# several sources


@property_of(mixtures(min_sources=2, min_per_lane=30), st.integers(0, 50))
def test_a_thousand_slots_of_a_lane_hold_each_source_its_share(mixture, start):
    per_lane = mixture.global_batch // mixture.lanes
    steps = -(-PATTERN_SLOTS // per_lane)
    slots = served(mixture, start, start + steps, range(3))
    for lane in range(3):
        turns = slots["source"][slots["lane"] == lane][:PATTERN_SLOTS]
        counts = np.bincount(turns, minlength=len(mixture.orders))
        np.testing.assert_array_equal(counts, mixture.shares)


@property_of(mixtures(min_sources=2, max_sources=3))
def test_each_source_goes_through_its_own_epochs_sample_by_sample(mixture):
    """However fast a source goes: an epoch of a lane is one run of all its places."""
    slots = served(mixture, 0, 3 * mixture.num_steps, range(mixture.lanes))
    for index, order in enumerate(mixture.orders):
        for lane in range(0, mixture.lanes, 5):
            its = (slots["source"] == index) & (slots["lane"] == lane)
            epochs, places = slots["epoch"][its], slots["place"][its]
            counts = epochs * order.samples_per_lane + places
            np.testing.assert_array_equal(counts, np.arange(len(counts)))
        for epoch in range(int(slots["epoch"][slots["source"] == index].max())):
            its = (slots["source"] == index) & (slots["epoch"] == epoch)
            numbers = slots["number"][its]
            assert len(np.unique(numbers)) == len(numbers)
            whole = order.samples_per_lane * order.lanes
            lanes_done = (
                np.bincount(slots["lane"][its], minlength=order.lanes) == order.samples_per_lane
            )
            assert not lanes_done.all() or len(numbers) == whole


@property_of(mixtures(min_sources=2), st.data())
def test_global_numbers_tell_the_sources_apart(mixture, data):
    step = data.draw(st.integers(0, mixture.num_steps - 1))
    slots = mixture.slots(1, step, range(mixture.lanes))
    source = np.searchsorted(mixture.first_number, slots.global_numbers, side="right") - 1
    np.testing.assert_array_equal(source, slots.source)
    np.testing.assert_array_equal(slots.global_numbers - mixture.first_number[source], slots.number)


def test_lanes_take_turns_differently():
    mixture = mix([3, 1])
    turns = served(mixture, 0, mixture.num_steps, range(2))
    first, second = (turns["source"][turns["lane"] == lane] for lane in (0, 1))
    assert not np.array_equal(first, second)


def test_a_data_set_mixed_with_itself_has_another_order_there():
    mixture = mix([1, 1])
    first, second = (epoch_of(order, 0).ravel() for order in mixture.orders)
    assert np.mean(first == second) < 0.05
    assert source_seed(3, 0) == 3


def mix(weights: list[float], *, sizes: list[int] | None = None, batch: int = 16) -> Mixture:
    sizes = sizes or [400] * len(weights)
    sources = [
        Source(f"s3://bucket/set{number}", size, chunk=6, window=3, weight=weight)
        for number, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    return mix_sources(sources, global_batch=batch, lanes=8, seed=3)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([1, 1, 1], [334, 333, 333]),
        ([0.7, 0.2, 0.1], [700, 200, 100]),
        ([1e308, 1e308], [500, 500]),
        ([2, 1], [667, 333]),
        ([1998.5, 1.5], [999, 1]),
        ([5], [1000]),
    ],
)
def test_weights_become_thousandths_by_largest_remainders(weights, shares):
    assert mix(weights).shares.tolist() == shares


# ----------------------------------------------------------------------------------------
# masks


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(9))])
def test_a_mask_hides_rows_from_every_rank_and_changes_nothing_else(tmp_path, seed):
    """Numbers are those of kept rows, so an epoch serves each kept row once and no other."""
    rng = np.random.default_rng(seed)
    images = pictures(60, seed=seed)
    rows = [[{"source": f"{i}", "data": images[i]} for i in range(n, n + 20)] for n in (0, 20, 40)]
    masks = {shard: (rng.random(20) < 0.7).tolist() for shard in (0, 2)}
    store = open_store(str(tmp_path))
    snapshot = write_snapshot(store, rows, masks=masks)
    kept = [bit for shard in range(3) for bit in masks.get(shard, [True] * 20)]
    assert snapshot.num_kept == sum(kept) == snapshot.first_row[-1]
    mixture = mix_sources(
        [Source(store.url, snapshot.num_kept, chunk=3, window=2)],
        global_batch=16, lanes=16, seed=seed,
    )  # fmt: skip
    for world_size in WORLD_SIZES:
        ranks = (mixture.lanes_of(rank, world_size) for rank in range(world_size))
        windows = [w for lanes in ranks for w in mixture.windows(0, 0, lanes, epochs=1)]
        bodies = read_all(store, snapshot, windows)
        assert len(set(bodies)) == len(bodies) == mixture.num_steps * 16
        assert set(bodies) <= {image for image, bit in zip(images, kept, strict=True) if bit}


def read_all(store: Store, snapshot: Snapshot, windows: list[Window]) -> list[bytes]:
    reader = SampleReader(store, snapshot, Telemetry())
    try:
        return [reader.read(n, n)[0].data for window in windows for n in window.numbers]
    finally:
        reader.close()


# ----------------------------------------------------------------------------------------
# what cannot be


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": [1, 0.0001]}, r"weight 0.0001 of s3://bucket/set1 in loader.mix"),
        ({"weights": [1, 0]}, r"weight of s3://bucket/set1 in loader.mix is 0"),
        ({"weights": [float("nan"), 1]}, r"weight of s3://bucket/set0 in loader.mix is nan"),
        ({"weights": [1, float("inf")]}, r"weight of s3://bucket/set1 in loader.mix is inf"),
        ({"weights": [1, 1], "sizes": [400, 7]}, r"s3://bucket/set1 of loader.mix keeps 7 samples"),
        ({"weights": [1, 1], "sizes": [9, 9], "batch": 24}, r"loader.mix keeps 18 samples"),
        ({"weights": [1, 1], "batch": 20}, r"loader.lanes=8 does not divide"),
        ({"weights": [1], "sizes": [7]}, r"fewer than one global batch"),
        ({"weights": [1, 1], "batch": 0}, r"loader.global_batch is 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_mixed_is_refused_by_name(arguments, words):
    with pytest.raises(UsageError, match=words):
        mix(**arguments)


def test_a_step_past_the_epoch_is_no_step():
    mixture = single()
    with pytest.raises(IndexError, match="20 steps"):
        mixture.slots(0, mixture.num_steps, range(8))


def test_weights_and_orders_belong_together():
    order = SampleOrder(100, global_batch=8, lanes=4, chunk=4, window=2, seed=0)
    with pytest.raises(UsageError, match="2 weights for 1 data sets"):
        Mixture([order], weights=[1, 1], global_batch=8, lanes=4, seed=0)


# ----------------------------------------------------------------------------------------
# frozen


@pytest.mark.parametrize("name", CASES)
def test_the_golden_order(name):
    with np.load(GOLDEN_ORDER) as golden:
        same = np.array_equal(batches(CASES[name]), golden[name])
    assert same, (
        f"the order of {name!r} is not the one of {GOLDEN_ORDER.name}: runs that were begun before "
        "cannot be resumed. If that is meant, say so in CHANGELOG.md under the label SAMPLE ORDER "
        "and write the file anew: python -m tests.support.orders"
    )


def test_the_golden_file_holds_these_cases_and_no_others():
    with np.load(GOLDEN_ORDER) as golden:
        assert sorted(golden) == sorted(CASES)
