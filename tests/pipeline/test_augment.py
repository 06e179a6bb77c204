"""Augmentation against the reference's recorded pixels and rates, and against Pillow itself."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.stats import kstest
from skimage import data as photographs
from torch import Tensor
from torchvision.transforms import functional as torchvision_functional

from pipeline.augment import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    NO_OPERATION,
    SATURATION,
    AugmentConfig,
    AugmentParams,
    augment,
    draw_augment,
)
from pipeline.crops import CropsConfig, crop_blocks, cut_crops

GOLDEN = Path(__file__).parent.parent / "golden"
OPS = np.load(GOLDEN / "augment_ops.npz")
FILES = json.loads((GOLDEN / "manifest.json").read_text())["files"]
OPS_META = FILES["augment_ops.npz"]["meta"]
STATS = np.load(GOLDEN / "crop_stats.npz")
STATS_META = FILES["crop_stats.npz"]["meta"]["pipeline"]

CONFIG = AugmentConfig()
RAW = AugmentConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
PHOTO = np.ascontiguousarray(photographs.astronaut()[:96, 150:246])  # uint8 [96, 96, 3]
COLOURS = {
    "adjust_brightness": BRIGHTNESS,
    "adjust_contrast": CONTRAST,
    "adjust_saturation": SATURATION,
    "adjust_hue": HUE,
}


def params_of(operations: list[dict[str, Any]]) -> AugmentParams:
    """The parameters of one crop from the reference's record of it."""
    params = AugmentParams.identity(1)
    turn = 0
    for operation in operations:
        name, argument = operation["op"], operation["arg"]
        if name in COLOURS:
            params.order[0, turn] = COLOURS[name]
            params.factors[0, COLOURS[name]] = argument
            turn += 1
        elif name == "blur":
            params.blur_radius[0] = argument
        else:
            {"hflip": params.flip, "rgb_to_grayscale": params.gray}[name][0] = True
    return params


def to_batch(image: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def pixels(image: NDArray[np.uint8], *operations: tuple[str, Any]) -> NDArray[np.int64]:
    """Our uint8 pixels [H, W, 3] after the named operations."""
    params = params_of([{"op": name, "arg": argument} for name, argument in operations])
    values = augment(to_batch(image), params, RAW)[0] * 255
    return values.round().to(torch.int64).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    "case",
    [op for op in OPS_META["single_ops"] if "resized_crop" not in op["fn"]],
    ids=lambda case: case["array"],
)
def test_golden_single_operations(case: dict[str, Any]) -> None:
    name = case["fn"].split("(")[0].replace("PIL GaussianBlur", "blur")
    ours = pixels(OPS["op__input"], (name, case.get("factor", case.get("radius"))))
    np.testing.assert_array_equal(ours, OPS[case["array"]])


@pytest.mark.parametrize("case", OPS_META["crops"], ids=lambda case: case["id"])
def test_golden_pipeline_after_the_reference_crop(case: dict[str, Any]) -> None:
    crop, *rest = case["ops"]
    size = [case["size"]] * 2
    image = torchvision_functional.resized_crop(Image.fromarray(OPS["image"]), *crop["arg"], size)
    ours = pixels(np.array(image), *((operation["op"], operation["arg"]) for operation in rest))
    np.testing.assert_array_equal(ours, OPS[f"{case['id']}__uint8"])


@pytest.mark.parametrize("case", OPS_META["crops"], ids=lambda case: case["id"])
def test_golden_pipeline_after_our_crop(case: dict[str, Any]) -> None:
    crop, *rest = case["ops"]
    blocks = crop_blocks(CropsConfig(global_crops=1, global_size_px=case["size"], local_crops=0), 1)
    cut_crops(OPS["image"], np.array([crop["arg"]]), [block[:, 0] for block in blocks])
    image = blocks[0][0, 0].permute(1, 2, 0).numpy()
    ours = pixels(image, *((operation["op"], operation["arg"]) for operation in rest))
    difference = np.abs(ours - OPS[f"{case['id']}__uint8"])
    assert difference.mean() < 0.5
    assert difference.max() <= 8  # a level of the resize, magnified by contrast and hue


@pytest.mark.parametrize("case", OPS_META["crops"], ids=lambda case: case["id"])
def test_golden_normalisation(case: dict[str, Any]) -> None:
    reference = OPS[f"{case['id']}__uint8"]
    ours = augment(to_batch(reference), AugmentParams.identity(1), CONFIG)[0]
    np.testing.assert_allclose(ours.numpy(), OPS[f"{case['id']}__tensor"], atol=1e-6, rtol=0)


def pillow(image: NDArray[np.uint8], name: str, argument: float) -> NDArray[np.uint8]:
    picture = Image.fromarray(image)
    if name == "blur":
        return np.asarray(picture.filter(ImageFilter.GaussianBlur(argument)))
    return np.asarray(getattr(torchvision_functional, name)(picture, argument))


@pytest.mark.parametrize("name", list(COLOURS)[:3])
@given(factor=st.floats(0, 2))
@settings(max_examples=40, deadline=None)
def test_blends_are_pillow_to_the_bit(name: str, factor: float) -> None:
    np.testing.assert_array_equal(pixels(PHOTO, (name, factor)), pillow(PHOTO, name, factor))


@given(radius=st.floats(0.01, 6))
@settings(max_examples=60, deadline=None)
def test_blur_is_pillow_to_the_bit(radius: float) -> None:
    np.testing.assert_array_equal(pixels(PHOTO, ("blur", radius)), pillow(PHOTO, "blur", radius))


@pytest.mark.parametrize("radius", [0.1, 0.7, 1.0, 1.3, 2.0])
def test_blur_of_flat_and_extreme_pixels(radius: float) -> None:
    image = np.zeros((24, 24, 3), np.uint8)
    image[8:, :, 0] = 255
    image[:, 8:, 1] = 255
    np.testing.assert_array_equal(pixels(image, ("blur", radius)), pillow(image, "blur", radius))


@pytest.mark.parametrize("factor", [-0.5, -0.2, 0.0, 0.003, 0.2, 0.5])
@pytest.mark.parametrize("red", [0, 1, 100, 254, 255])
def test_hue_is_pillow_to_the_bit_for_all_greens_and_blues(red: int, factor: float) -> None:
    levels = np.arange(256, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(np.uint8(red), levels[:, None], levels), axis=-1)
    image = np.ascontiguousarray(image)
    ours = pixels(image, ("adjust_hue", factor))
    np.testing.assert_array_equal(ours, pillow(image, "adjust_hue", factor))


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


def test_a_batch_is_its_crops_one_by_one() -> None:
    crops = torch.from_numpy(np.stack([np.roll(PHOTO, 7 * n, axis=1) for n in range(24)]))
    crops = crops.permute(0, 3, 1, 2)
    before = crops.clone()
    params = draw_augment(CONFIG, seed=0, epoch=0, samples=np.arange(12), crop_indices=[0, 5])
    together = augment(crops, params, CONFIG)
    assert torch.equal(crops, before)
    assert together.dtype == torch.float32
    for row in range(24):
        single = AugmentParams(*(column[row : row + 1] for column in columns(params)))
        assert torch.equal(augment(crops[row : row + 1], single, CONFIG)[0], together[row])


@pytest.mark.parametrize("size", [1, 2, 5, 97])
def test_odd_sizes(size: int) -> None:
    crops = torch.randint(0, 256, (40, 3, size, size), dtype=torch.uint8)
    params = draw_augment(CONFIG, seed=0, epoch=0, samples=np.arange(40), crop_indices=[0])
    result = augment(crops, params, CONFIG)
    assert result.shape == crops.shape
    assert result.isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(layout: torch.memory_format) -> None:
    crops = to_batch(PHOTO).repeat(4, 1, 1, 1).contiguous(memory_format=layout)
    result = augment(crops, drawn(4), CONFIG)
    assert result.is_contiguous(memory_format=layout)


def test_nothing_waits_for_the_device() -> None:
    """A meta tensor has no values: whatever needed one on the host would raise."""
    crops = torch.empty(64, 3, 32, 32, dtype=torch.uint8, device="meta")
    result = augment(crops, drawn(64), CONFIG)
    assert (result.shape, result.dtype) == (crops.shape, torch.float32)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_pixels() -> None:
    crops = to_batch(PHOTO).repeat(64, 1, 1, 1)
    ours = augment(crops.cuda(), drawn(64), RAW).cpu() * 255
    assert torch.equal(ours.round(), (augment(crops, drawn(64), RAW) * 255).round())


def test_parameters_must_fit() -> None:
    with pytest.raises(ValueError, match="parameters of 3 crops for 1 crops"):
        augment(to_batch(PHOTO), AugmentParams.identity(3), CONFIG)


def test_ranges_are_checked() -> None:
    with pytest.raises(ValueError, match="blur_radius needs"):
        AugmentConfig(blur_radius=(2.0, 1.0))
    with pytest.raises(ValueError, match="std must be positive"):
        AugmentConfig(std=(0.2, 0.0, 0.2))
