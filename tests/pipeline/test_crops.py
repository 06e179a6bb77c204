"""Crop boxes against 20,000 draws of the reference, their purity, and the cutting."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import ks_2samp
from skimage import data as photographs

from pipeline.crops import CropsConfig, crop_blocks, crop_boxes, cut_crops

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
    assert [block.shape for block in crop_blocks(CONFIG, 4)] == [
        (2, 4, 3, 224, 224),
        (6, 4, 3, 96, 96),
    ]


def cut(image: NDArray[np.uint8], config: CropsConfig, boxes: NDArray[Any]) -> list[torch.Tensor]:
    """The crops of one image, one tensor [3, s, s] each, cut into slot 1 of a batch of 3."""
    blocks = crop_blocks(config, 3)
    for block in blocks:
        block.fill_(77)
    cut_crops(image, boxes, [block[:, 1] for block in blocks])
    assert all((block[:, [0, 2]] == 77).all() for block in blocks)
    return [crop for block in blocks for crop in block[:, 1]]


def test_crops_are_cropped_then_resized_as_by_pillow() -> None:
    boxes = crop_boxes(CONFIG, seed=0, epoch=0, sample=0, width_px=600, height_px=400)
    for crop, (top, left, height, width) in zip(cut(PHOTO, CONFIG, boxes), boxes, strict=True):
        region = Image.fromarray(PHOTO[top : top + height, left : left + width])
        size = (crop.shape[1], crop.shape[2])
        expected = np.asarray(region.resize(size, Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(crop.permute(1, 2, 0).numpy() - expected).max() <= 1


def test_golden_resized_crops() -> None:
    golden = np.load(GOLDEN / "augment_ops.npz")
    meta = json.loads((GOLDEN / "manifest.json").read_text())["files"]["augment_ops.npz"]["meta"]
    cases = [op for op in meta["single_ops"] if op["array"].startswith("op__resized_crop")]
    assert len(cases) == 4
    for op in cases:
        config = CropsConfig(global_crops=1, global_size_px=op["size"], local_crops=0)
        box = np.array([[op["i"], op["j"], op["h"], op["w"]]])
        (crop,) = cut(golden["image"], config, box)
        difference = crop.permute(1, 2, 0).numpy().astype(int) - golden[op["array"]]
        assert np.abs(difference).max() <= 2


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (2, 3), (224, 224)])
def test_awkward_images_give_full_crops(shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), (10, 200, 30), np.uint8)
    boxes = crop_boxes(CONFIG, seed=0, epoch=0, sample=0, width_px=shape[1], height_px=shape[0])
    for crop in cut(image, CONFIG, boxes):
        assert (crop == torch.tensor([10, 200, 30]).view(3, 1, 1)).all()


def test_blocks_become_channels_last_batches_without_a_copy() -> None:
    for block in crop_blocks(CONFIG, 4):
        batch = block.flatten(0, 1)
        assert batch.data_ptr() == block.data_ptr()
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch[1 * 4 + 2], block[1, 2])


def test_wrong_number_of_boxes() -> None:
    blocks = crop_blocks(CONFIG, 1)
    with pytest.raises(ValueError, match="7 boxes for 8 crops"):
        cut_crops(PHOTO, np.zeros((7, 4), np.int32), [block[:, 0] for block in blocks])
