"""The resize against Pillow: the same bytes, from any region, to any size, in any thread."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from skimage import data as photographs

from pipeline import resize
from pipeline.resize import resize_regions

SOURCE = Path(resize.__file__)
BILINEAR = Image.Resampling.BILINEAR
NOISE = np.random.default_rng(0).integers(0, 256, (210, 260, 4), dtype=np.uint8)
PHOTO = np.pad(photographs.coffee(), ((0, 0), (0, 0), (0, 1)))  # uint8 [400, 600, 4]


def resized(pixels: NDArray[Any], box: Any, size: int, **options: int) -> NDArray[np.uint8]:
    """One region, cut into the middle slot of three, beside which nothing may change."""
    block = np.full((1, 3, size, size, 3), 77, np.uint8)
    resize_regions(pixels, np.array([box], np.int32), [block[:, 1]], **options)
    assert (block[:, [0, 2]] == 77).all()
    return block[0, 1]


def region_of(pixels: NDArray[Any], box: Any) -> Image.Image:
    top, left, height, width = box
    return Image.fromarray(
        np.ascontiguousarray(pixels[top : top + height, left : left + width, :3])
    )


def by_pillow(pixels: NDArray[Any], box: Any, size: int) -> NDArray[np.uint8]:
    """Pillow's result with the horizontal pass first, whatever the version prefers."""
    passed = region_of(pixels, box).resize((size, box[2]), BILINEAR)
    return np.asarray(passed.resize((size, size), BILINEAR))


@st.composite
def boxes_in(draw: st.DrawFn, height: int, width: int) -> tuple[int, int, int, int]:
    box_height, box_width = draw(st.integers(1, height)), draw(st.integers(1, width))
    top, left = draw(st.integers(0, height - box_height)), draw(st.integers(0, width - box_width))
    return top, left, box_height, box_width


@given(boxes_in(*NOISE.shape[:2]), st.integers(1, 240))
@settings(max_examples=300, deadline=None)
def test_every_region_at_every_size_is_pillows(box: tuple[int, int, int, int], size: int) -> None:
    np.testing.assert_array_equal(resized(NOISE, box, size), by_pillow(NOISE, box, size))


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 96, 97, 224])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (2, 3), (5, 900), (224, 224)])
def test_awkward_shapes_and_sizes(shape: tuple[int, int], size: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 4), dtype=np.uint8)
    box = (0, 0, *shape)
    np.testing.assert_array_equal(resized(pixels, box, size), by_pillow(pixels, box, size))


@pytest.mark.parametrize("level", [0, 1, 254, 255])
def test_a_plain_region_stays_as_it_is(level: int) -> None:
    pixels = np.full((300, 201, 4), level, np.uint8)
    for size in (1, 50, 224, 500):
        assert (resized(pixels, (3, 1, 297, 200), size) == level).all()


@given(boxes_in(400, 600), st.sampled_from([96, 224]))
@settings(max_examples=100, deadline=None)
def test_pass_order_of_pillow_13_differs_by_a_level(
    box: tuple[int, int, int, int], size: int
) -> None:
    direct = np.asarray(region_of(PHOTO, box).resize((size, size), BILINEAR))
    difference = np.abs(resized(PHOTO, box, size).astype(int) - direct)
    assert difference.max() <= 1
    if not box[2] - size > 2 * max(box[3] - size, 0):
        assert difference.max() == 0


def test_the_fourth_byte_means_nothing() -> None:
    other = NOISE.copy()
    other[..., 3] ^= 255
    box = (10, 20, 150, 170)
    np.testing.assert_array_equal(resized(NOISE, box, 96), resized(other, box, 96))


def test_every_slot_of_several_sizes() -> None:
    boxes = np.array([(0, 0, 210, 260), (5, 7, 100, 90), (9, 8, 40, 50)], np.int32)
    large, small = np.empty((2, 64, 64, 3), np.uint8), np.empty((1, 16, 16, 3), np.uint8)
    resize_regions(NOISE, boxes, [large, small])
    for slot, box in zip([*large, *small], boxes.tolist(), strict=True):
        np.testing.assert_array_equal(slot, by_pillow(NOISE, box, len(slot)))


@given(boxes_in(400, 600), st.sampled_from([1, 2, 4]))
@settings(max_examples=50, deadline=None)
def test_boxes_of_a_reduced_image_keep_their_place(
    box: tuple[int, int, int, int], eighths: int
) -> None:
    """Pillow takes the box in fractions of a pixel; it looks beyond the box, where we stop."""
    reduced = np.ascontiguousarray(PHOTO[:: 8 // eighths, :: 8 // eighths])
    first = [side * eighths // 8 for side in box[:2]]
    last = [-(-(begin + side) * eighths // 8) for begin, side in zip(box, box[2:], strict=False)]
    whole = (*first, last[0] - first[0], last[1] - first[1])
    offset = [side * eighths / 8 - begin for side, begin in zip(box, first, strict=False)]
    fraction = (
        offset[1],
        offset[0],
        offset[1] + box[3] * eighths / 8,
        offset[0] + box[2] * eighths / 8,
    )
    region = region_of(reduced, whole)
    across = region.resize((40, whole[2]), BILINEAR, box=(fraction[0], 0, fraction[2], whole[2]))
    expected = across.resize((40, 40), BILINEAR, box=(0, fraction[1], 40, fraction[3]))
    np.testing.assert_array_equal(resized(reduced, box, 40, eighths=eighths), np.asarray(expected))


def test_four_threads_get_what_one_gets() -> None:
    rng = np.random.default_rng(2)
    boxes = [
        (int(t), int(l), int(rng.integers(1, 400 - t)), int(rng.integers(1, 600 - l)))
        for t, l in rng.integers(0, [399, 599], (200, 2))  # noqa: E741
    ]
    alone = [resized(PHOTO, box, 96) for box in boxes]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda box: resized(PHOTO, box, 96), boxes))
    np.testing.assert_array_equal(together, alone)


def test_a_large_region_grows_the_scratch_and_small_ones_reuse_it() -> None:
    seen: list[int] = []

    def work() -> None:
        for box in ((0, 0, 10, 10), (0, 0, 400, 600), (0, 0, 10, 10)):
            np.testing.assert_array_equal(resized(PHOTO, box, 64), by_pillow(PHOTO, box, 64))
            seen.append(len(resize._kept.scratch))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen[0] < seen[1] == seen[2]


@pytest.mark.parametrize(
    "box",
    [(-1, 0, 9, 9), (0, -1, 9, 9), (0, 0, 0, 9), (0, 0, 9, 0), (202, 0, 9, 9), (0, 252, 9, 9)],
)
def test_boxes_outside_the_image_are_refused(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="empty or outside 260x210 pixels"):
        resized(NOISE, box, 8)


@pytest.mark.parametrize(
    ("pixels", "slots", "said"),
    [
        (NOISE[..., :3], np.empty((1, 8, 8, 3), np.uint8), "pixels are uint8"),
        (NOISE.astype(float), np.empty((1, 8, 8, 3), np.uint8), "pixels are uint8"),
        (NOISE, np.empty((1, 8, 9, 3), np.uint8), "slots are uint8"),
        (NOISE, np.empty((1, 0, 0, 3), np.uint8), "slots are uint8"),
        (NOISE, np.empty((1, 8, 8, 3), np.float32), "slots are uint8"),
        (NOISE, np.empty((1, 3, 8, 8), np.uint8).transpose(0, 2, 3, 1), "slots are contiguous"),
        (NOISE, np.broadcast_to(np.uint8(0), (1, 8, 8, 3)), "slots are contiguous"),
        (NOISE, np.empty((2, 8, 8, 3), np.uint8), "1 boxes for 2 crops"),
    ],
)
def test_other_arrays_are_refused(pixels: Any, slots: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resize_regions(pixels, np.array([[0, 0, 5, 5]], np.int32), [slots])


def test_other_integers_and_gaps_are_welcome() -> None:
    boxes = np.zeros((1, 8), np.int64)
    boxes[0, ::2] = 10, 20, 100, 90
    slot = np.empty((1, 50, 50, 3), np.uint8)
    resize_regions(NOISE[::-1], boxes[:, ::2], [slot])
    np.testing.assert_array_equal(slot[0], by_pillow(NOISE[::-1], (10, 20, 100, 90), 50))


def test_without_a_place_to_cache_it_still_compiles() -> None:
    """The source of a file that does not exist is one for which numba finds no place."""
    space: dict[str, Any] = {"__name__": "pipeline.resize"}
    exec(compile(SOURCE.read_text(), "/nowhere/resize.py", "exec"), space)
    slot = np.empty((1, 8, 8, 3), np.uint8)
    space["resize_regions"](NOISE, np.array([[0, 0, 90, 80]], np.int32), [slot])
    np.testing.assert_array_equal(slot[0], by_pillow(NOISE, (0, 0, 90, 80), 8))


@pytest.mark.slow
def test_processes_may_compile_at_the_same_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from pipeline.resize import warm_up; warm_up()"]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    for count in (2, 1):  # the last one only loads
        processes = [subprocess.Popen(command, env=environment) for _ in range(count)]
        assert [process.wait(timeout=250) for process in processes] == [0] * count
    assert list(tmp_path.glob("*/resize.*.nbi"))
