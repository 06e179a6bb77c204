"""Colours on the device against the reference's recorded pixels and against Pillow itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from skimage import data as photographs
from torch import Tensor
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
from pipeline.crops import cut_crops

GOLDEN = Path(__file__).parent.parent / "golden"
OPS = np.load(GOLDEN / "augment_ops.npz")
OPS_META = json.loads((GOLDEN / "manifest.json").read_text())["files"]["augment_ops.npz"]["meta"]

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
    rgbx = np.pad(OPS["image"], ((0, 0), (0, 0), (0, 1)))
    image = np.empty((case["size"], case["size"], 3), np.uint8)
    cut_crops(rgbx, np.array([crop["arg"]], np.int32), [image[None]])
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


def drawn(count: int) -> AugmentParams:
    return draw_augment(CONFIG, seed=5, epoch=1, samples=np.arange(count), crop_indices=[0])


def test_a_batch_is_its_crops_one_by_one() -> None:
    crops = torch.from_numpy(np.stack([np.roll(PHOTO, 7 * n, axis=1) for n in range(24)]))
    crops = crops.permute(0, 3, 1, 2)
    before = crops.clone()
    params = draw_augment(CONFIG, seed=0, epoch=0, samples=np.arange(12), crop_indices=[0, 5])
    together = augment(crops, params, CONFIG)
    assert torch.equal(crops, before)
    assert together.dtype == torch.float32
    for row in range(24):
        single = AugmentParams(*(column[row : row + 1] for column in vars(params).values()))
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
    assert normalize(crops, CONFIG).is_contiguous(memory_format=layout)


def test_nothing_waits_for_the_device() -> None:
    """A meta tensor has no values: whatever needed one on the host would raise."""
    crops = torch.empty(64, 3, 32, 32, dtype=torch.uint8, device="meta")
    result = augment(crops, drawn(64), CONFIG)
    assert (result.shape, result.dtype) == (crops.shape, torch.float32)


def test_normalisation_is_what_augmenting_ends_with() -> None:
    crops = to_batch(PHOTO)
    assert torch.equal(normalize(crops, CONFIG), augment(crops, AugmentParams.identity(1), CONFIG))


def test_boxes_far_wider_than_the_crop() -> None:
    image = PHOTO[:5, :5]
    np.testing.assert_array_equal(pixels(image, ("blur", 140.0)), pillow(image, "blur", 140.0))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_gpu_gives_the_same_bits(layout: torch.memory_format) -> None:
    crops = to_batch(PHOTO).repeat(64, 1, 1, 1).contiguous(memory_format=layout)
    ours = augment(crops.cuda(), drawn(64), CONFIG).cpu()
    assert torch.equal(ours, augment(crops, drawn(64), CONFIG))
    assert torch.equal(normalize(crops.cuda(), CONFIG).cpu(), normalize(crops, CONFIG))


def test_parameters_must_fit() -> None:
    with pytest.raises(ValueError, match="parameters of 3 crops for 1 crops"):
        augment(to_batch(PHOTO), AugmentParams.identity(3), CONFIG)
