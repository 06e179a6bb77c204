"""Crop boxes against 20,000 draws of the reference, their purity, and the cutting."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import ks_2samp
from skimage import data as photographs

from pipeline.crops import CropsConfig, block_shapes, crop_boxes, cut_crops, decode_crops
from pipeline.decode import decode_rgb, decode_rgbx, guard_header
from pipeline.errors import SampleError
from pipeline.resize import resize_regions

GOLDEN = Path(__file__).parent.parent / "golden"
STATS = np.load(GOLDEN / "crop_stats.npz")
META = json.loads((GOLDEN / "manifest.json").read_text())["files"]["crop_stats.npz"]["meta"]
CASES = [name for name in META if name.startswith("box_")]
CONFIG = CropsConfig()
PHOTO = photographs.coffee()  # uint8 [400, 600, 3]


def draw(case: str, count: int) -> NDArray[np.int64]:
    """`count` boxes of the golden case, one a sample: large ones are crop 0, small ones crop 2."""
    _, kind, size = case.split("_")
    width, height = map(int, size.split("x"))
    boxes = crop_boxes(
        CONFIG,
        seed=7,
        epoch=3,
        sample=np.arange(count),
        width_px=np.full(count, width),
        height_px=np.full(count, height),
    )
    return boxes[:, 0 if kind == "large" else 2].astype(np.int64)


def measures(case: str, boxes: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    width, height = map(int, case.split("_")[2].split("x"))
    top, left, box_height, box_width = boxes.astype(np.float64).T
    return {
        "area": box_height * box_width / (width * height),
        "log_aspect": np.log(box_width / box_height),
        "cx": (left + box_width / 2) / width,
        "cy": (top + box_height / 2) / height,
    }


@pytest.mark.parametrize("case", ["box_large_500x375", "box_small_500x375"])
def test_boxes_are_distributed_as_the_reference(case: str) -> None:
    ours = measures(case, draw(case, 20_000))
    theirs = measures(case, STATS[case])
    for name, values in ours.items():
        assert ks_2samp(values, theirs[name]).statistic < 0.0195, name


@pytest.mark.parametrize("case", CASES)
def test_means_of_every_image_size(case: str) -> None:
    meta = META[case]
    ours = measures(case, draw(case, 20_000))
    for name, values in ours.items():
        error = meta["std"][name] * np.sqrt(1 / 20_000 + 1 / meta["draws"])
        assert abs(values.mean() - meta["mean"][name]) < 4 * error, name


@pytest.mark.parametrize("case", CASES)
def test_histograms_of_every_image_size(case: str) -> None:
    draws = META[case]["draws"]
    for name, values in measures(case, draw(case, 20_000)).items():
        edges = STATS[f"{case}__edges_{name}"]
        theirs = np.cumsum(STATS[f"{case}__hist_{name}"]) / draws
        # Fractions often fall on an edge, where rounding decides their bin: allow either.
        ours = [(values <= edge + 1e-9).mean() for edge in edges[1:]]
        below = [(values < edge - 1e-9).mean() for edge in edges[1:]]
        tolerance = 1.95 * np.sqrt(1 / 20_000 + 1 / draws)
        assert np.maximum(theirs - ours, below - theirs).max() < tolerance, name


@pytest.mark.parametrize("case", [c for c in CASES if "fallback_box_ij_hw" in META[c]])
def test_fallback_is_the_reference_box_as_often(case: str) -> None:
    expected = META[case]["fraction_equal_to_fallback_box"]
    seen = (draw(case, 20_000) == META[case]["fallback_box_ij_hw"]).all(axis=1).mean()
    spread = np.sqrt(max(expected * (1 - expected), 1e-4) * (1 / 20_000 + 1 / META[case]["draws"]))
    assert abs(seen - expected) < 4 * spread


NUMBERS = st.integers(0, 2**40)
SIDES = st.integers(1, 3000)


@given(NUMBERS, st.integers(0, 10_000), st.lists(st.tuples(NUMBERS, SIDES, SIDES), min_size=1))
@settings(max_examples=100, deadline=None)
def test_a_box_depends_on_its_sample_alone(
    seed: int, epoch: int, images: list[tuple[int, int, int]]
) -> None:
    samples, widths, heights = np.array(images).T
    together = crop_boxes(
        CONFIG, seed=seed, epoch=epoch, sample=samples, width_px=widths, height_px=heights
    )
    for (sample, width, height), boxes in zip(images, together, strict=True):
        alone = crop_boxes(
            CONFIG, seed=seed, epoch=epoch, sample=sample, width_px=width, height_px=height
        )
        np.testing.assert_array_equal(boxes, alone)
        top, left, box_height, box_width = alone.T
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (box_height >= 1).all()
        assert (box_width >= 1).all()
        assert (top + box_height <= height).all()
        assert (left + box_width <= width).all()


def test_a_crop_is_the_same_whatever_crops_follow() -> None:
    where: dict[str, Any] = {"seed": 1, "epoch": 2, "sample": 3, "width_px": 640, "height_px": 480}
    fewer = crop_boxes(CropsConfig(local_crops=1), **where)
    np.testing.assert_array_equal(crop_boxes(CONFIG, **where)[:3], fewer)


@pytest.mark.parametrize("changed", ["seed", "epoch", "sample"])
def test_every_coordinate_matters(changed: str) -> None:
    where = {"seed": 1, "epoch": 1, "sample": 1, "width_px": 500, "height_px": 375}
    boxes = crop_boxes(CONFIG, **where)
    assert len(np.unique(boxes, axis=0)) == CONFIG.num_crops
    assert (boxes != crop_boxes(CONFIG, **(where | {changed: 2}))).any(axis=1).all()


def test_boxes_never_change() -> None:
    """A change here is a change of every run that resumes: say so in the change log."""
    boxes = crop_boxes(CONFIG, seed=1, epoch=0, sample=5, width_px=500, height_px=375)
    expected = [[8, 13, 363, 483], [35, 12, 288, 319], [160, 296, 101, 106], [106, 221, 132, 154]]
    np.testing.assert_array_equal(boxes[:4], expected)
    assert boxes.dtype == np.int32


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.4), (0.5, 1.1)])
def test_scales_are_checked(scale: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="local_scale needs"):
        CropsConfig(local_scale=scale)


def test_without_local_crops_there_is_one_group() -> None:
    assert len(CropsConfig(local_crops=0).groups) == 1
    assert block_shapes(CONFIG, 4) == [(2, 4, 224, 224, 3), (6, 4, 96, 96, 3)]


def test_epochs_may_differ_from_sample_to_sample() -> None:
    """As in a mixture, whose sources are in epochs of their own."""
    where: dict[str, Any] = {"seed": 1, "width_px": [500, 400, 300], "height_px": [300, 400, 500]}
    together = crop_boxes(CONFIG, epoch=np.array([0, 5, 5]), sample=[7, 7, 8], **where)
    for epoch in (0, 5):
        alone = crop_boxes(CONFIG, epoch=epoch, sample=[7, 7, 8], **where)
        same = (together == alone).all(axis=(1, 2))
        assert same.tolist() == [epoch == 0, epoch == 5, epoch == 5]


def slots(config: CropsConfig) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """Blocks of a batch of 3, all 77, and of each the slot in the middle."""
    blocks = [np.full(shape, 77, np.uint8) for shape in block_shapes(config, 3)]
    return blocks, [block[:, 1] for block in blocks]


def cut(
    image: NDArray[np.uint8], config: CropsConfig, boxes: NDArray[Any]
) -> list[NDArray[np.uint8]]:
    """The crops of one image uint8 [H, W, 3], each [s, s, 3]."""
    blocks, out = slots(config)
    cut_crops(np.pad(image, ((0, 0), (0, 0), (0, 1))), boxes, out)
    assert all((block[:, [0, 2]] == 77).all() for block in blocks)
    return [crop for group in out for crop in group]


def test_crops_are_cropped_then_resized_as_by_pillow() -> None:
    boxes = crop_boxes(CONFIG, seed=0, epoch=0, sample=0, width_px=600, height_px=400)
    for crop, (top, left, height, width) in zip(cut(PHOTO, CONFIG, boxes), boxes, strict=True):
        region = Image.fromarray(PHOTO[top : top + height, left : left + width])
        expected = np.asarray(region.resize(crop.shape[:2], Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(crop - expected).max() <= 1


def test_golden_resized_crops() -> None:
    golden = np.load(GOLDEN / "augment_ops.npz")
    meta = json.loads((GOLDEN / "manifest.json").read_text())["files"]["augment_ops.npz"]["meta"]
    cases = [op for op in meta["single_ops"] if op["array"].startswith("op__resized_crop")]
    assert len(cases) == 4
    for op in cases:
        config = CropsConfig(global_crops=1, global_size_px=op["size"], local_crops=0)
        box = np.array([[op["i"], op["j"], op["h"], op["w"]]])
        (crop,) = cut(golden["image"], config, box)
        assert np.abs(crop.astype(int) - golden[op["array"]]).max() <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (2, 3), (224, 224)])
def test_awkward_images_give_full_crops(shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), (10, 200, 30), np.uint8)
    boxes = crop_boxes(CONFIG, seed=0, epoch=0, sample=0, width_px=shape[1], height_px=shape[0])
    for crop in cut(image, CONFIG, boxes):
        assert (crop == [10, 200, 30]).all()


def test_wrong_number_of_boxes() -> None:
    with pytest.raises(ValueError, match="7 boxes for 8 crops"):
        cut(PHOTO, CONFIG, np.zeros((7, 4), np.int32))


def encode(image: NDArray[np.uint8], image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, image_format, **options)
    return file.getvalue()


def decoded(data: bytes, boxes: NDArray[Any], **options: bool) -> list[NDArray[np.uint8]]:
    blocks, out = slots(CONFIG)
    decode_crops(data, guard_header(data), boxes, out, **options)
    assert all((block[:, [0, 2]] == 77).all() for block in blocks)
    return [crop for group in out for crop in group]


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_crops_of_every_format_are_those_of_its_pixels(image_format: str) -> None:
    data = encode(PHOTO[:200, :300], image_format)
    boxes = crop_boxes(CONFIG, seed=0, epoch=0, sample=0, width_px=300, height_px=200)
    expected = cut(decode_rgb(data), CONFIG, boxes)
    for crop, same in zip(decoded(data, boxes), expected, strict=True):
        np.testing.assert_array_equal(crop, same)


def boxes_of(side: int) -> NDArray[np.int32]:
    """Squares of that side for the large crops, and of half as much for the small ones."""
    large, small = [[3, 5, side, side]] * 2, [[60, 31, side // 2, side // 2]] * 6
    return np.array(large + small, np.int32)


LARGE = np.tile(PHOTO, (3, 2, 1))[:1111, :1001]  # an odd size: a half of it is not whole


@pytest.mark.parametrize(("side", "eighths"), [(447, 8), (448, 4), (895, 4), (896, 2)])
def test_a_jpeg_is_reduced_while_every_box_has_the_pixels_of_its_crop(
    side: int, eighths: int
) -> None:
    data = encode(LARGE, "JPEG", quality=90)
    header = guard_header(data)
    size = [-(-length * eighths // 8) for length in LARGE.shape[1::-1]]
    reduced = decode_rgbx(data, header, min_width_px=size[0], min_height_px=size[1])
    assert reduced.shape[1::-1] == tuple(size)
    _, out = slots(CONFIG)
    resize_regions(reduced, boxes_of(side), out, eighths=eighths)
    expected = [crop for group in out for crop in group]
    crops, whole = decoded(data, boxes_of(side)), decoded(data, boxes_of(side), reduced=False)
    for crop, same, exact in zip(crops, expected, whole, strict=True):
        np.testing.assert_array_equal(crop, same)
        assert np.abs(crop.astype(int) - exact).mean() < 2.5
        assert (eighths < 8) == bool((crop != exact).any())


def test_one_small_box_keeps_the_whole_image() -> None:
    data = encode(LARGE, "JPEG")
    boxes = boxes_of(900)
    boxes[-1, 3] = 191  # of a crop of 96
    for crop, exact in zip(decoded(data, boxes), decoded(data, boxes, reduced=False), strict=True):
        np.testing.assert_array_equal(crop, exact)


def test_a_jpeg_that_only_pillow_decodes_is_not_reduced() -> None:
    """Junk before the end: simplejpeg refuses, libjpeg only warns."""
    whole = encode(LARGE, "JPEG")
    data = whole[:-2] + b"abc" + whole[-2:]
    expected = decoded(whole, boxes_of(900), reduced=False)
    for crop, same in zip(decoded(data, boxes_of(900)), expected, strict=True):
        np.testing.assert_array_equal(crop, same)


def test_a_broken_image_is_told() -> None:
    data = encode(PHOTO, "JPEG")
    with pytest.raises(SampleError, match="truncated"):
        decoded(data[: len(data) // 2], boxes_of(300))


def test_crops_never_reach_torch() -> None:
    code = "import pipeline.crops, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
