"""Which crops to take of an image, and cutting them out of its pixels on the CPU.

The boxes are those of torchvision's RandomResizedCrop, as in the reference (SwAV's
MultiCropDataset), but each is a pure function of (seed, epoch, sample, crop): no worker, no order
of calls, no number of processes changes them. One decoded image gives all its crops, as uint8 in
blocks that are the caller's memory, mostly shared with another process; flip, colour and blur
follow in batches (augment_device.py, augment_host.py). No torch here: the loader's workers call.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge
from numpy.typing import ArrayLike, NDArray

from pipeline.decode import ImageHeader, decode_rgbx
from pipeline.randomness import uniform
from pipeline.resize import resize_regions

_STREAM = 0xC909  # keeps these draws independent of others at the same coordinates
_ATTEMPTS = 10
_RATIO = (3 / 4, 4 / 3)  # width / height


@dataclass(frozen=True)
class CropGroup:
    """The crops of one resolution: `count` squares whose share of the area is in `scale`."""

    count: int
    size_px: int
    scale: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class CropsConfig:
    """The multi-crop of SwAV: a few large crops, which get the codes, and many small ones.

    `reduced_decode` lets a JPEG be decoded at fewer pixels where the crops need no more
    (`decode_crops` says what it saves and what it changes).
    """

    global_crops: Annotated[int, Ge(1)] = 2
    global_size_px: Annotated[int, Ge(1)] = 224
    global_scale: tuple[float, float] = (0.14, 1.0)
    local_crops: Annotated[int, Ge(0)] = 6
    local_size_px: Annotated[int, Ge(1)] = 96
    local_scale: tuple[float, float] = (0.05, 0.14)
    reduced_decode: bool = True

    def __post_init__(self) -> None:
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} needs 0 < low <= high <= 1, not {low} and {high}")

    @property
    def num_crops(self) -> int:
        """Crops of one image, large ones first."""
        return self.global_crops + self.local_crops

    @property
    def groups(self) -> tuple[CropGroup, ...]:
        """One group a resolution, large first; without local crops there is one."""
        large = CropGroup(self.global_crops, self.global_size_px, self.global_scale)
        small = CropGroup(self.local_crops, self.local_size_px, self.local_scale)
        return (large, small) if small.count else (large,)


def crop_boxes(
    config: CropsConfig,
    *,
    seed: int,
    epoch: ArrayLike,
    sample: ArrayLike,
    width_px: ArrayLike,
    height_px: ArrayLike,
) -> NDArray[np.int32]:
    """Draw the boxes of one sample (75 µs), or of many at once (6.5 µs each of 16, 3 of 64).

    `epoch`, `sample`, `width_px`, `height_px` are integers or int64 arrays [B]; every element is
    what the scalar call gives. Returns int32 [num_crops, 4] or [B, num_crops, 4], rows (top, left,
    height, width) inside the image.

    Area and log aspect ratio are uniform; of ten attempts the first that fits is taken, else the
    largest central box of an allowed ratio (torchvision.transforms.RandomResizedCrop.get_params).
    """
    width = np.asarray(width_px, dtype=np.int64)[..., None, None]
    height = np.asarray(height_px, dtype=np.int64)[..., None, None]
    draws = _draw(
        config,
        seed=seed,
        epoch=np.asarray(epoch, dtype=np.int64),
        sample=np.asarray(sample, dtype=np.int64),
    )
    box_width, box_height = _attempt_sizes(config, width * height, draws[0], draws[1])
    fits = (box_width >= 1) & (box_width <= width) & (box_height >= 1) & (box_height <= height)
    first = fits.argmax(axis=-1, keepdims=True)
    box_width, box_height, u_top, u_left = (
        np.take_along_axis(values, first, axis=-1)
        for values in (box_width, box_height, draws[2], draws[3])
    )
    top = np.floor(u_top * (height - box_height + 1))
    left = np.floor(u_left * (width - box_width + 1))
    box = np.concatenate([top, left, box_height, box_width], axis=-1)
    fallback = _central_box(width, height)
    return np.where(fits.any(axis=-1, keepdims=True), box, fallback).astype(np.int32)


def block_shapes(config: CropsConfig, batch_size: int) -> list[tuple[int, int, int, int, int]]:
    """What a batch's blocks are, one a resolution: uint8 (count, batch_size, s, s, 3)."""
    return [(g.count, batch_size, g.size_px, g.size_px, 3) for g in config.groups]


def decode_crops(
    data: bytes,
    header: ImageHeader,
    boxes: NDArray[np.int32],
    out: Sequence[NDArray[np.uint8]],
    *,
    reduced: bool = True,
) -> None:
    """Decode an image that `guard_header` let pass, once, and cut all its crops into `out`.

    `boxes` and `out` as for `cut_crops`. With `reduced`, a JPEG is decoded at a half, a quarter or
    an eighth of its size where every box still has at least the pixels of its crop, so that no
    crop is enlarged for it. Of photographs of 1080x810 pixels, cut to 2x224 + 6x96, that is 65 %,
    which take 0.77 of the time; of 500x375 none. The crops then differ by 0.8 levels on average
    (45 dB in the median, 37 dB at worst), because a cosine transform cut short is another filter.

    Only a box of all boxes could be decoded, too: that saves 4 to 7 % with libjpeg-turbo, since the
    entropy coding must be read all the same, and simplejpeg cannot, so it is not done.

    Raises SampleError as `decode_rgbx` does, ValueError as `cut_crops` does.
    """
    eighths = _least_eighths(header, boxes, out) if reduced and header.suits_simplejpeg else 8
    if eighths == 8:
        resize_regions(decode_rgbx(data, header), boxes, out)
        return
    width_px, height_px = (-(-side * eighths // 8) for side in (header.width_px, header.height_px))
    pixels = decode_rgbx(data, header, min_width_px=width_px, min_height_px=height_px)
    if pixels.shape[:2] != (height_px, width_px):  # simplejpeg refused it, and Pillow gave all
        eighths = 8
    resize_regions(pixels, boxes, out, eighths=eighths)


def cut_crops(
    pixels: NDArray[np.uint8], boxes: NDArray[np.int32], out: Sequence[NDArray[np.uint8]]
) -> None:
    """Cut and resize all crops of one decoded image into the caller's memory, without the GIL.

    `pixels` uint8 [H, W, 4] of `decode_rgbx`; `boxes` int32 [num_crops, 4] of `crop_boxes`; `out`
    uint8 [count, s, s, 3] for every resolution, slot b of a batch being `[block[:, b] for block in
    blocks]` where the blocks have the shapes of `block_shapes`. First cropped, then resized, as
    the reference does with Pillow, and with its numbers: see resize.py.

    Raises ValueError if the number of boxes is not that of the slots, or a box is outside.
    """
    resize_regions(pixels, boxes, out)


def _least_eighths(
    header: ImageHeader, boxes: NDArray[np.int32], out: Sequence[NDArray[np.uint8]]
) -> int:
    """The smallest scale, in eighths of the size, that leaves every box its crop's pixels.

    Other eighths than these have no vector code in libjpeg-turbo and take longer than the whole.
    """
    largest = max(group.shape[1] for group in out)
    if min(header.width_px, header.height_px) < 2 * largest:  # most images, at no cost
        return 8
    first, scale = 0, 8.0
    for group in out:
        last = first + len(group)
        scale = min(scale, int(boxes[first:last, 2:].min(initial=2**30)) / group.shape[1])
        first = last
    return next(eighths for eighths in (1, 2, 4, 8) if eighths * scale >= 8 or eighths == 8)


def _draw(
    config: CropsConfig, *, seed: int, epoch: NDArray[np.int64], sample: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Uniform numbers for area, ratio, top and left: [4, ..., num_crops, attempts]."""
    crop = np.arange(config.num_crops)[:, None]
    quantity, attempt = np.arange(4), np.arange(_ATTEMPTS)
    number = quantity.reshape(4, *[1] * (sample.ndim + 1), 1) + 4 * attempt
    return uniform(_STREAM, seed, epoch[..., None, None], sample[..., None, None], crop, number)


def _attempt_sizes(
    config: CropsConfig,
    image_area: NDArray[np.int64],
    u_area: NDArray[np.float64],
    u_ratio: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Width and height of every attempt, whole numbers, whether they fit or not."""
    low, high = np.array([g.scale for g in config.groups for _ in range(g.count)]).T[:, :, None]
    area = image_area * (low + u_area * (high - low))
    log_low, log_high = map(math.log, _RATIO)
    ratio = np.exp(log_low + u_ratio * (log_high - log_low))
    return np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))


def _central_box(width: NDArray[np.int64], height: NDArray[np.int64]) -> NDArray[np.float64]:
    """The largest centred (top, left, height, width) of an allowed ratio; maybe the whole image."""
    narrowest, widest = _RATIO
    box_width = np.where(width / height > widest, np.rint(height * widest), width)
    box_height = np.where(width / height < narrowest, np.rint(width / narrowest), height)
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return np.concatenate([top, left, box_height, box_width], axis=-1)
