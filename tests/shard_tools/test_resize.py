"""Resizing: sizes, and pixels that are where they should be."""

import io

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage import data as photographs

from pipeline.decode import decode_pixels, guard_header
from shard_tools.resize import RESIZE_MODES, resize_pixels, scaled_size, stored_size

SIDES = st.integers(1, 5000)


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("keep", (300, 200), (300, 200)),
        ("longest", (300, 200), (96, 64)),
        ("longest", (200, 300), (64, 96)),
        ("shortest", (300, 200), (144, 96)),
        ("crop", (300, 200), (96, 96)),
        ("longest", (96, 50), (96, 50)),
        ("longest", (5000, 1), (96, 1)),
        ("shortest", (5000, 1), (5000, 1)),
        ("crop", (300, 50), (50, 50)),  # nothing is enlarged to make a square
        ("crop", (96, 96), (96, 96)),
    ],
)
def test_sizes(mode: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert stored_size(*size, mode=mode, size_px=96) == expected


@given(width=SIDES, height=SIDES, size_px=st.integers(1, 600), mode=st.sampled_from(RESIZE_MODES))
def test_nothing_is_enlarged_or_bent(width: int, height: int, size_px: int, mode: str) -> None:
    scaled = scaled_size(width, height, mode=mode, size_px=size_px)
    assert 1 <= scaled[0] <= width
    assert 1 <= scaled[1] <= height
    # Each side is within half a pixel, or at the one pixel that must remain.
    assert abs(scaled[0] * height - scaled[1] * width) <= max(width, height)
    assert stored_size(*scaled, mode=mode, size_px=size_px) == stored_size(
        width, height, mode=mode, size_px=size_px
    )


def resize(pixels: np.ndarray, mode: str, size_px: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    return resize_pixels(pixels, width_px=width, height_px=height, mode=mode, size_px=size_px)


def test_fine_stripes_become_grey_not_moire() -> None:
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2] = 254
    small = resize(stripes, "longest", 90)
    assert np.abs(small.astype(int) - 127).max() <= 12


def test_crop_without_scaling_gives_the_very_pixels_of_the_middle() -> None:
    pixels = photographs.coffee()[:50, :120]
    np.testing.assert_array_equal(resize(pixels, "crop", 64), pixels[:, 35:85])


@pytest.mark.parametrize("upright", [True, False])
def test_crop_is_the_middle_of_the_scaled_image(upright: bool) -> None:
    pixels = photographs.coffee()[:400, :600]
    pixels = pixels if upright else pixels.transpose(1, 0, 2)
    pixels = np.ascontiguousarray(pixels)
    whole, middle = resize(pixels, "shortest", 100), resize(pixels, "crop", 100)
    assert middle.shape == (100, 100, 3)
    expected = whole[:, 25:125] if upright else whole[25:125]
    assert np.abs(middle.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size_px", [40, 80, 100, 130, 160, 200, 240])
@pytest.mark.parametrize("mode", ["longest", "shortest", "crop"])
def test_a_jpeg_scaled_by_its_decoder_lies_where_it_should(mode: str, size_px: int) -> None:
    """Of sides that no eighth divides; half a pixel too far would cost ten decibels."""
    photo = Image.fromarray(photographs.astronaut()).resize((333, 251), Image.Resampling.LANCZOS)
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(photo), 95, "RGB", "444")
    width_px, height_px = scaled_size(333, 251, mode=mode, size_px=size_px)
    reduced = decode_pixels(
        data, guard_header(data), min_width_px=width_px, min_height_px=height_px
    )
    got = resize_pixels(reduced, width_px=333, height_px=251, mode=mode, size_px=size_px)
    wanted = resize(np.asarray(Image.open(io.BytesIO(data))), mode, size_px)
    error = np.square(got.astype(float) - wanted).mean()
    assert 10 * np.log10(255**2 / max(error, 1e-9)) > 30


def test_a_reducing_decoder_is_used() -> None:
    data = simplejpeg.encode_jpeg(photographs.astronaut(), 90)
    reduced = decode_pixels(data, guard_header(data), min_width_px=100, min_height_px=100)
    assert reduced.shape == (128, 128, 3)
