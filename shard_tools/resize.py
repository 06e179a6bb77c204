"""How large an image is stored, and how its pixels get there: antialiased, never enlarged.

Three modes besides keeping the size: `longest` and `shortest` bring that side to `size_px` and keep
the shape, `crop` brings the shorter side to `size_px` and cuts the square in the middle. A JPEG
comes from its decoder already scaled by eighths (see `pipeline.decode.decode_pixels`) to no less
than what is wanted; an antialiased bicubic filter, two thirds of the time of Lanczos, does the
rest, after a box filter where more than a factor of two is left. Only judge.py calls this.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RESIZE_MODES = ("keep", "longest", "shortest", "crop")

_REDUCING_GAP = 2.0


def scaled_size(width_px: int, height_px: int, *, mode: str, size_px: int) -> tuple[int, int]:
    """The width and height after scaling, before any crop."""
    if mode == "keep":
        return width_px, height_px
    side_px = (max if mode == "longest" else min)(width_px, height_px)
    if side_px <= size_px:
        return width_px, height_px
    scale = size_px / side_px
    return max(1, round(width_px * scale)), max(1, round(height_px * scale))


def stored_size(width_px: int, height_px: int, *, mode: str, size_px: int) -> tuple[int, int]:
    """The width and height of what is stored of an image."""
    scaled = scaled_size(width_px, height_px, mode=mode, size_px=size_px)
    return (min(scaled), min(scaled)) if mode == "crop" else scaled


def resize_pixels(
    pixels: NDArray[np.uint8], *, width_px: int, height_px: int, mode: str, size_px: int
) -> NDArray[np.uint8]:
    """Bring pixels uint8 [H, W, 3] of an image of `width_px` x `height_px` to its stored size.

    The pixels may be the whole image, or all of it scaled down by eighths as a JPEG decoder does.
    """
    scaled = scaled_size(width_px, height_px, mode=mode, size_px=size_px)
    stored = stored_size(width_px, height_px, mode=mode, size_px=size_px)
    if scaled == (width_px, height_px):  # at most a crop: nothing to resample
        left, top = (width_px - stored[0]) // 2, (height_px - stored[1]) // 2
        return np.ascontiguousarray(pixels[top : top + stored[1], left : left + stored[0]])
    width, height = _extent(pixels, width_px, height_px)
    margin_x = width * (1 - stored[0] / scaled[0]) / 2
    margin_y = height * (1 - stored[1] / scaled[1]) / 2
    resized = Image.fromarray(pixels).resize(
        stored,
        Image.Resampling.BICUBIC,
        box=(margin_x, margin_y, width - margin_x, height - margin_y),
        reducing_gap=_REDUCING_GAP,
    )
    return np.asarray(resized)


def _extent(pixels: NDArray[np.uint8], width_px: int, height_px: int) -> tuple[float, float]:
    """The part of the pixels, from the top left, that the image fills.

    5/8 of 100 rows are 62.5, stored in 63: taken for 63, all is bent by up to half a row, which
    measured costs 10 to 19 dB.
    """
    height, width = pixels.shape[:2]
    eighths = round(8 * max(width, height) / max(width_px, height_px))
    return min(width, width_px * eighths / 8), min(height, height_px * eighths / 8)
