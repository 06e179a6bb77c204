"""The draws of augmentations against the reference's recorded rates."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import kstest

from pipeline.augment import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    NO_OPERATION,
    SATURATION,
    AugmentConfig,
    AugmentParams,
    draw_augment,
    draw_groups,
)

GOLDEN = Path(__file__).parent.parent / "golden"
STATS = np.load(GOLDEN / "crop_stats.npz")
FILES = json.loads((GOLDEN / "manifest.json").read_text())["files"]
STATS_META = FILES["crop_stats.npz"]["meta"]["pipeline"]

CONFIG = AugmentConfig()


def drawn(count: int = 20_000, config: AugmentConfig = CONFIG) -> AugmentParams:
    return draw_augment(config, seed=5, epoch=1, samples=np.arange(count), crop_indices=[0])


def test_rates_and_their_independence() -> None:
    params = drawn()
    jitter = (params.order != NO_OPERATION).all(axis=1)
    decisions = (params.flip, jitter, params.gray, params.blur_radius > 0)
    expected = STATS_META["expected"].values()
    for seen, p in zip(decisions, expected, strict=True):
        assert abs(seen.mean() - p) < 4 * np.sqrt(p * (1 - p) / len(params))
    theirs = STATS["joint_flip_jitter_gray_blur"] / 20_000
    ours = np.histogramdd(np.array(decisions).T, bins=2)[0] / len(params)
    assert (np.abs(ours - theirs) < 4 * np.sqrt(2 * theirs / 20_000)).all()


def test_all_jitter_orders_are_equally_likely() -> None:
    order = drawn().order
    orders, counts = np.unique(order[order[:, 0] >= 0], axis=0, return_counts=True)
    assert sorted(map(tuple, orders)) == sorted(itertools.permutations(range(4)))
    assert np.abs(counts - counts.mean()).max() < 4 * np.sqrt(counts.mean())


@pytest.mark.parametrize(
    ("number", "name", "low", "high"),
    [
        (BRIGHTNESS, "brightness", 0.2, 1.8),
        (CONTRAST, "contrast", 0.2, 1.8),
        (SATURATION, "saturation", 0.2, 1.8),
        (HUE, "hue", -0.2, 0.2),
    ],
)
def test_factors_are_uniform(number: int, name: str, low: float, high: float) -> None:
    factors = drawn().factors[:, number]
    assert kstest(factors, "uniform", (low, high - low)).pvalue > 1e-3
    assert_matches_histogram(factors, f"factor_{name}")


def test_radii_are_uniform() -> None:
    radius = drawn().blur_radius
    assert kstest(radius[radius > 0], "uniform", (0.1, 1.9)).pvalue > 1e-3
    assert_matches_histogram(radius[radius > 0], "blur_radius")


def assert_matches_histogram(values: NDArray[np.float64], name: str) -> None:
    theirs, edges = STATS[f"{name}__hist"], STATS[f"{name}__edges"]
    ours = np.histogram(values, edges)[0] / len(values)
    gap = np.abs(np.cumsum(ours) - np.cumsum(theirs) / theirs.sum()).max()
    assert gap < 1.95 * np.sqrt(1 / len(values) + 1 / theirs.sum())


def columns(params: AugmentParams) -> Iterator[NDArray[Any]]:
    yield from (params.flip, params.order, params.factors, params.gray, params.blur_radius)


@given(
    samples=st.lists(st.integers(0, 2**40), min_size=1, max_size=6),
    crops=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=50, deadline=None)
def test_rows_are_crop_major_and_depend_on_their_sample_and_crop_alone(
    samples: list[int], crops: list[int], seed: int
) -> None:
    together = draw_augment(CONFIG, seed=seed, epoch=2, samples=samples, crop_indices=crops)
    alone = [
        draw_augment(CONFIG, seed=seed, epoch=2, samples=[sample], crop_indices=[crop])
        for crop in crops
        for sample in samples
    ]
    for whole, *parts in zip(columns(together), *map(columns, alone), strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_every_sample_may_have_its_own_epoch() -> None:
    epochs = np.array([3, 0, 7, 3])
    together = draw_augment(CONFIG, seed=1, epoch=epochs, samples=[5, 5, 6, 9], crop_indices=[2, 4])
    for place, (epoch, sample) in enumerate(zip(epochs, [5, 5, 6, 9], strict=True)):
        alone = draw_augment(
            CONFIG, seed=1, epoch=int(epoch), samples=[sample], crop_indices=[2, 4]
        )
        for whole, part in zip(columns(together), columns(alone), strict=True):
            np.testing.assert_array_equal(whole[place::4], part)


def test_groups_number_the_crops_of_an_image_through() -> None:
    arguments: dict[str, Any] = {"seed": 3, "epoch": [0, 1, 0], "samples": [4, 9, 4]}
    whole = draw_augment(CONFIG, crop_indices=range(8), **arguments)
    groups = list(draw_groups(CONFIG, iter([2, 0, 6]), **arguments))
    assert [len(group.flip) for group in groups] == [6, 0, 18]
    for name, values in vars(whole).items():
        joined = np.concatenate([getattr(group, name) for group in groups])
        np.testing.assert_array_equal(joined, values)


def test_strength_zero_switches_an_operation_off() -> None:
    config = AugmentConfig(hue=0.0, contrast=0.0, jitter_p=1.0)
    order = drawn(200, config).order
    assert set(np.unique(order)) == {NO_OPERATION, BRIGHTNESS, SATURATION}
    assert ((order == NO_OPERATION).sum(axis=1) == 2).all()


def test_probability_zero_changes_nothing() -> None:
    config = AugmentConfig(flip_p=0, jitter_p=0, grayscale_p=0, blur_p=0)
    for ours, nothing in zip(
        columns(drawn(50, config)), columns(AugmentParams.identity(50)), strict=True
    ):
        if ours.dtype != np.float64 or ours.ndim == 1:
            np.testing.assert_array_equal(ours, nothing)


def test_ranges_are_checked() -> None:
    with pytest.raises(ValueError, match="blur_radius needs"):
        AugmentConfig(blur_radius=(2.0, 1.0))
    with pytest.raises(ValueError, match="std must be positive"):
        AugmentConfig(std=(0.2, 0.0, 0.2))


def test_drawing_and_the_version_for_workers_do_without_torch() -> None:
    program = "import sys, pipeline.augment, pipeline.augment_host; print('torch' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (child.stdout.strip(), child.stderr) == ("False", "")
