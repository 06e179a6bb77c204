"""Colours on the CPU against those of the device, which Pillow and the golden pixels vouch for."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import functional as torchvision_functional

from pipeline.augment import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    AugmentConfig,
    AugmentParams,
    draw_augment,
)
from pipeline.augment_device import augment, normalize
from pipeline.augment_host import augment_pixels, normalize_into

GOLDEN = Path(__file__).parent.parent / "golden"
OPS = np.load(GOLDEN / "augment_ops.npz")
OPS_META = json.loads((GOLDEN / "manifest.json").read_text())["files"]["augment_ops.npz"]["meta"]

CONFIG = AugmentConfig()
SIZES = [1, 2, 7, 24, 96, 224]
COLOURS = {
    "adjust_brightness": BRIGHTNESS,
    "adjust_contrast": CONTRAST,
    "adjust_saturation": SATURATION,
    "adjust_hue": HUE,
}

Bytes = NDArray[np.uint8]


def some_crops(count: int, num_images: int, size: int, *, seed: int = 0) -> Bytes:
    """Noise, smooth ramps and few levels in turn: hues of every kind, ties, clamps."""
    generator = np.random.default_rng(seed)
    crops = generator.integers(0, 256, (count * num_images, size, size, 3), np.uint8)
    crops[1::3] = (np.cumsum(crops[1::3] % 7, axis=2) + crops[1::3, :, :1]) // 2 % 256
    crops[2::3] = crops[2::3] // 128 * 255
    return crops.reshape(count, num_images, size, size, 3)


def as_batch(crops: Bytes) -> torch.Tensor:
    return torch.from_numpy(crops.reshape(-1, *crops.shape[2:])).permute(0, 3, 1, 2)


def normalized(crops: Bytes) -> NDArray[np.float32]:
    out = np.empty(crops.shape, np.float32)
    normalize_into(crops, out, CONFIG)
    return out


def assert_same_as_on_the_device(crops: Bytes, params: AugmentParams) -> None:
    expected = augment(as_batch(crops), params, CONFIG).permute(0, 2, 3, 1).numpy()
    ours = crops.copy()
    augment_pixels(ours, params)
    np.testing.assert_array_equal(normalized(ours).reshape(expected.shape), expected)


def only(operation: int, factor: float) -> Callable[[AugmentParams], None]:
    def fill(params: AugmentParams) -> None:
        params.order[:, 2] = operation
        params.factors[:, operation] = factor

    return fill


ALONE: dict[str, Callable[[AugmentParams], Any]] = {
    "nothing": lambda params: None,
    "flip": lambda params: params.flip.fill(True),
    "grey": lambda params: params.gray.fill(True),
    "dark": only(BRIGHTNESS, 0.23),
    "bright": only(BRIGHTNESS, 1.77),
    "black": only(BRIGHTNESS, 0.0),
    "flat": only(CONTRAST, 0.21),
    "steep": only(CONTRAST, 1.79),
    "pale": only(SATURATION, 0.31),
    "vivid": only(SATURATION, 1.8),
    "hue forward": only(HUE, 0.19),
    "hue back": only(HUE, -0.2),
    "hue half": only(HUE, 0.5),
    "hue below a step": only(HUE, -0.003),
    "narrow": lambda params: params.blur_radius.fill(0.1),
    "sharp box": lambda params: params.blur_radius.fill(2**0.5),
    "wide": lambda params: params.blur_radius.fill(1.9),
    "wider": lambda params: params.blur_radius.fill(2.6),
    "widest": lambda params: params.blur_radius.fill(11.3),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ALONE)
def test_every_operation_alone(name: str, size: int) -> None:
    params = AugmentParams.identity(3)
    ALONE[name](params)
    assert_same_as_on_the_device(some_crops(3, 1, size), params)


@pytest.mark.parametrize("size", SIZES)
def test_every_order_of_the_jitter(size: int) -> None:
    crops = some_crops(24, 1, size, seed=1)
    params = draw_augment(CONFIG, seed=3, epoch=0, samples=[9], crop_indices=range(24))
    params.order[:] = list(itertools.permutations(range(4)))
    assert_same_as_on_the_device(crops, params)


@given(
    size=st.sampled_from(SIZES[:-1]) | st.integers(1, 40),
    count=st.integers(1, 4),
    num_images=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
@example(size=224, count=2, num_images=3, seed=0)
@settings(max_examples=50, deadline=None)
def test_drawn_combinations(size: int, count: int, num_images: int, seed: int) -> None:
    samples, crop_indices = np.arange(num_images), range(count)
    params = draw_augment(CONFIG, seed=seed, epoch=0, samples=samples, crop_indices=crop_indices)
    assert_same_as_on_the_device(some_crops(count, num_images, size, seed=seed), params)


@given(factor=st.floats(-3, 20), operation=st.sampled_from([BRIGHTNESS, CONTRAST, SATURATION]))
@settings(max_examples=50, deadline=None)
def test_any_factor(factor: float, operation: int) -> None:
    params = AugmentParams.identity(3)
    only(operation, factor)(params)
    assert_same_as_on_the_device(some_crops(3, 1, 24), params)


@given(radius=st.floats(0.01, 8))
@settings(max_examples=100, deadline=None)
def test_any_radius(radius: float) -> None:
    params = AugmentParams.identity(3)
    params.blur_radius[:] = radius
    assert_same_as_on_the_device(some_crops(3, 1, 24), params)


def colours_of(reds: range) -> Bytes:
    """All greens and blues with some reds, as crops."""
    levels = np.arange(256, dtype=np.uint8)
    reds_of_crops = np.array(reds, np.uint8)[:, None, None]
    grid = np.broadcast_arrays(reds_of_crops, levels[:, None], levels)
    return np.ascontiguousarray(np.stack(grid, axis=-1)[:, None])


def assert_same_hues(reds: range, shift_steps: int) -> None:
    crops = colours_of(reds)
    params = AugmentParams.identity(len(crops))
    only(HUE, (shift_steps + 0.5) / 255)(params)
    assert_same_as_on_the_device(crops, params)


@pytest.mark.parametrize("shift_steps", [0, 1, 84, 127])
def test_hue_of_many_colours(shift_steps: int) -> None:
    assert_same_hues(range(0, 256, 51), shift_steps)


@pytest.mark.slow
@pytest.mark.parametrize("shift_steps", range(0, 128, 9))
def test_hue_of_all_colours(shift_steps: int) -> None:
    for first in range(0, 256, 32):
        assert_same_hues(range(first, first + 32), shift_steps)


@pytest.mark.parametrize("case", OPS_META["crops"], ids=lambda case: case["id"])
def test_golden_pipeline_after_the_reference_crop(case: dict[str, Any]) -> None:
    """The last blurred, jittered and flipped crop of the reference, step by step."""

    crop, *operations = case["ops"]
    picture = Image.fromarray(OPS["image"])
    size = [case["size"]] * 2
    image = np.array(torchvision_functional.resized_crop(picture, *crop["arg"], size))
    params = AugmentParams.identity(1)
    for operation in operations:
        name, argument = operation["op"], operation["arg"]
        if name in COLOURS:
            params.order[0, np.argmin(params.order[0])] = COLOURS[name]
            params.factors[0, COLOURS[name]] = argument
        elif name == "blur":
            params.blur_radius[0] = argument
        else:
            {"hflip": params.flip, "rgb_to_grayscale": params.gray}[name][0] = True
    ours = image[None, None].copy()
    augment_pixels(ours, params)
    np.testing.assert_array_equal(ours[0, 0], OPS[f"{case['id']}__uint8"])


def test_the_rows_of_one_image_in_a_block() -> None:
    """A worker's view of a block is strided; what lies between must stay as it is."""
    block = some_crops(6, 5, 24)
    before = block.copy()
    params = draw_augment(CONFIG, seed=2, epoch=0, samples=[17, 18], crop_indices=range(6))
    alone = block[:, 1:4:2].copy()
    augment_pixels(alone, params)
    augment_pixels(block[:, 1:4:2], params)
    np.testing.assert_array_equal(block[:, 1:4:2], alone)
    np.testing.assert_array_equal(block[:, ::2], before[:, ::2])
    assert (alone != before[:, 1:4:2]).any()


def test_columns_of_a_batch_as_parameters() -> None:
    """The parameters of one image out of a batch are strided, too, and may be read-only."""
    crops = some_crops(6, 4, 7)
    params = draw_augment(CONFIG, seed=2, epoch=0, samples=np.arange(4), crop_indices=range(6))
    whole = crops.copy()
    augment_pixels(whole, params)
    for image in range(4):
        rows = {name: column[image::4] for name, column in vars(params).items()}
        for column in rows.values():
            column.flags.writeable = False
        augment_pixels(crops[:, image : image + 1], AugmentParams(**rows))
    np.testing.assert_array_equal(crops, whole)


def test_threads_do_not_disturb_each_other() -> None:
    num_images = 64
    block = some_crops(4, num_images, 48)
    params = [
        draw_augment(CONFIG, seed=2, epoch=0, samples=[image], crop_indices=range(4))
        for image in range(num_images)
    ]
    expected = block.copy()
    for image in range(num_images):
        augment_pixels(expected[:, image : image + 1], params[image])
    with ThreadPoolExecutor(8) as pool:
        views = [block[:, image : image + 1] for image in range(num_images)]
        list(pool.map(augment_pixels, views, params))
    np.testing.assert_array_equal(block, expected)


@pytest.mark.parametrize("size", SIZES)
def test_normalisation_of_strided_crops(size: int) -> None:
    crops = some_crops(2, 6, size)
    expected = normalize(as_batch(crops), CONFIG).permute(0, 2, 3, 1).reshape(crops.shape)
    out = np.full(crops.shape, np.nan, np.float32)
    normalize_into(crops[:, 1::2], out[:, 1::2], CONFIG)
    np.testing.assert_array_equal(out[:, 1::2], expected[:, 1::2])
    assert np.isnan(out[:, ::2]).all()


def test_a_normalised_block_is_channels_last_for_torch() -> None:
    out = torch.from_numpy(normalized(some_crops(2, 3, 8)))
    batch = out.view(6, 8, 8, 3).permute(0, 3, 1, 2)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert batch.data_ptr() == out.data_ptr()


def test_arrays_must_fit() -> None:
    crops = some_crops(2, 1, 8)
    fitting = AugmentParams.identity(2)
    with pytest.raises(ValueError, match="parameters of 3 crops for 2 crops"):
        augment_pixels(crops, AugmentParams.identity(3))
    with pytest.raises(ValueError, match=r"crops are uint8 \[count, n, s, s, 3\], not uint8"):
        augment_pixels(crops[0], fitting)
    with pytest.raises(ValueError, match=r"crops are uint8 .*, not float32"):
        augment_pixels(crops.astype(np.float32), fitting)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every crop must be contiguous"):
        augment_pixels(crops[:, :, :4, :4], fitting)
    with pytest.raises(ValueError, match="the result is"):
        normalize_into(crops, np.empty((1, 1, 8, 8, 3), np.float32), CONFIG)
    crops.flags.writeable = False
    with pytest.raises(ValueError, match="must be writable"):
        augment_pixels(crops, fitting)


WARM_UP = "from pipeline.augment_host import warm_up; warm_up()"


@pytest.mark.slow
def test_several_processes_may_compile_at_once(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    children = [subprocess.Popen([sys.executable, "-c", WARM_UP], env=environment) for _ in "123"]
    assert [child.wait(120) for child in children] == [0, 0, 0]
    assert list(tmp_path.rglob("*.nbi"))
    again = subprocess.run(
        [sys.executable, "-c", WARM_UP], env=environment, capture_output=True, text=True, check=True
    )
    assert "compiling" not in again.stderr


@pytest.mark.slow
def test_nowhere_to_keep_what_is_compiled() -> None:
    nowhere = {
        "NUMBA_CACHE_DIR": "/dev/null/nowhere",
        "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator",
    }
    subprocess.run([sys.executable, "-c", WARM_UP], env=os.environ | nowhere, check=True)
