"""Which crops to take of an image, and cutting them out of its pixels on the CPU.

The boxes are those of torchvision's RandomResizedCrop, as in the reference (SwAV's
MultiCropDataset), but each is a pure function of (seed, epoch, sample, crop): no worker, no order
of calls, no number of processes changes them. One decoded image gives all its crops; the loader
calls. Flip, colour and blur follow in batches on the device (augment.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import ArrayLike, NDArray

from pipeline.randomness import uniform

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
    """The multi-crop of SwAV: a few large crops, which get the codes, and many small ones."""

    global_crops: Annotated[int, Ge(1)] = 2
    global_size_px: Annotated[int, Ge(1)] = 224
    global_scale: tuple[float, float] = (0.14, 1.0)
    local_crops: Annotated[int, Ge(0)] = 6
    local_size_px: Annotated[int, Ge(1)] = 96
    local_scale: tuple[float, float] = (0.05, 0.14)

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
    epoch: int,
    sample: ArrayLike,
    width_px: ArrayLike,
    height_px: ArrayLike,
) -> NDArray[np.int32]:
    """Draw the boxes of one sample (140 µs), or of many at once (4 µs each in batches of 64).

    `sample`, `width_px`, `height_px` are integers or int64 arrays [B]; every element is what the
    scalar call gives. Returns int32 [num_crops, 4] or [B, num_crops, 4], rows (top, left, height,
    width) inside the image.

    Area and log aspect ratio are uniform; of ten attempts the first that fits is taken, else the
    largest central box of an allowed ratio (torchvision.transforms.RandomResizedCrop.get_params).
    """
    width = np.asarray(width_px, dtype=np.int64)[..., None, None]
    height = np.asarray(height_px, dtype=np.int64)[..., None, None]
    draws = _draw(config, seed=seed, epoch=epoch, sample=np.asarray(sample, dtype=np.int64))
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


def crop_blocks(
    config: CropsConfig, batch_size: int, *, pin_memory: bool = False
) -> list[torch.Tensor]:
    """Allocate what `cut_crops` fills: per resolution a uint8 block [count, batch_size, 3, s, s].

    A pixel's channels lie together, as the decoder gives them (writing planes costs the resize 1.4
    times as much), so that `block.flatten(0, 1)` is a crop-major channels_last batch without a
    copy.
    """
    shapes = [(g.count, batch_size, g.size_px, g.size_px, 3) for g in config.groups]
    blocks = [torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory) for shape in shapes]
    return [block.permute(0, 1, 4, 2, 3) for block in blocks]


def cut_crops(
    image: NDArray[np.uint8], boxes: NDArray[np.int32], out: Sequence[torch.Tensor]
) -> None:
    """Cut and resize all crops of one image into the caller's memory, mostly without the GIL.

    `image` uint8 [H, W, 3]; `boxes` int [num_crops, 4] of `crop_boxes`; `out` uint8 [count, 3, s,
    s] for every resolution, slot b of a batch being `[block[:, b] for block in crop_blocks(…)]`.
    Bilinear and antialiased on uint8, first cropped, then resized, as the reference does with
    Pillow (at most one level apart).

    Raises ValueError if the number of boxes is not that of the slots.
    """
    targets = [slot for group in out for slot in group.unsqueeze(1)]
    if len(targets) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes for {len(targets)} crops")
    pixels = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)
    # torch.nn.functional.interpolate calls the same kernel, but cannot write into given memory.
    resize = torch.ops.aten._upsample_bilinear2d_aa.out
    for (top, left, height, width), target in zip(boxes.tolist(), targets, strict=True):
        region = pixels[:, :, top : top + height, left : left + width]
        resize(region, target.shape[2:], False, None, None, out=target)


def _draw(
    config: CropsConfig, *, seed: int, epoch: int, sample: NDArray[np.int64]
) -> list[NDArray[np.float64]]:
    """Uniform numbers for area, ratio, top and left, each [..., num_crops, attempts]."""
    crop = np.arange(config.num_crops)[:, None]
    attempt = np.arange(_ATTEMPTS)
    where = (_STREAM, seed, epoch, sample[..., None, None], crop)
    return [uniform(*where, attempt * 4 + quantity) for quantity in range(4)]


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
