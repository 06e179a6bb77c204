"""Flip, colour jitter, grey, blur and normalisation of batches of crops, on the device.

The reference (SwAV's MultiCropDataset) does this crop by crop with Pillow and torchvision. Here,
called by the loader, every operation runs once for all the crops that drew it. The arithmetic is
Pillow's own, every rounding and clamp included, on uint8 between the operations: colours leave the
gamut at each step, so folding the steps into one matrix moves pixels by many levels.

Sources: Pillow's Blend.c, Convert.c, BoxBlur.c; torchvision's adjust_* for PIL images.

What to do is decided on the host from the parameters, which stay in numpy: nothing ever waits for
the device. On the CPU this is the slow, readable twin of augment_host.py.

On a GPU, by arithmetic, not measured: adding up what each kernel reads and writes of one channel of
a pixel, brightness moves 22 bytes, contrast 47, saturation 48 and hue 92, each for 80 % of the
crops; grey 19 for 20 %, blur 200 (182 up to a radius of sqrt(2), 242 beyond) and flip 6 for half of
them, the copy and the normalisation 15 for all. That is 290 bytes, 135 MB an image of 2 crops of
224 px and 6 of 96 px (467 thousand channels), and at 2,500 images/s 0.34 TB/s: 7 % of an H200's
4.8 TB/s, less what its cache of 50 MB keeps between kernels. A step launches some 750 kernels, be
it large or small.

Shapes: N crops, n <= N of them that drew an operation, s the size in pixels.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment import HUE, AugmentConfig, AugmentParams

_BLUR_PASSES = 3
_FIXED_ONE = 1 << 24  # Pillow's box blur works in 8.24 fixed point


def augment(crops: Tensor, params: AugmentParams, config: AugmentConfig) -> Tensor:
    """Apply `params` to uint8 crops [N, 3, s, s]; float32 [N, 3, s, s], normalised, same device.

    The input is left as it is; the output has its memory format (channels_last from the loader's
    blocks). Of `config`, only mean and std are read. Raises ValueError if there are not N
    parameters.
    """
    if len(params) != len(crops):
        raise ValueError(f"parameters of {len(params)} crops for {len(crops)} crops")
    pixels = crops.clone(memory_format=torch.contiguous_format)
    steps = [step for step in _steps(params) if len(step.rows)]
    rows = _upload([step.rows for step in steps], crops.device)
    values = _upload([step.values for step in steps], crops.device)
    for step, where, value in zip(steps, rows, values, strict=True):
        changed = step.operation(pixels.index_select(0, where), value)
        _words(pixels).index_copy_(0, where, _words(changed))
    return _normalize_as(crops, pixels, config)


def normalize(crops: Tensor, config: AugmentConfig) -> Tensor:
    """Scale uint8 crops [N, 3, s, s] as `augment` does at its end, on any device to the same bits.

    float32 of the same shape and memory format: ToTensor and Normalize of the reference.
    """
    return _normalize_as(crops, crops, config)


def _normalize_as(like: Tensor, pixels: Tensor, config: AugmentConfig) -> Tensor:
    """Normalise `pixels` into a tensor of the memory format of `like`."""
    scaling = _scaling(config.mean, config.std, pixels.device)
    scaled = torch.empty_like(like, dtype=torch.float32)
    torch.addcdiv(scaling.minus_mean, pixels, scaling.most, out=scaled)
    return scaled.div_(scaling.std)


class _Scaling(NamedTuple):
    """float32 [3, 1, 1] each. Divisors are tensors, for CUDA divides by a number inexactly."""

    minus_mean: Tensor
    most: Tensor
    std: Tensor


@functools.cache
def _scaling(
    mean: tuple[float, float, float], std: tuple[float, float, float], device: torch.device
) -> _Scaling:
    columns = torch.tensor([mean, (255.0, 255.0, 255.0), std], dtype=torch.float32)
    columns[0].neg_()
    return _Scaling(*columns[..., None, None].to(device).unbind())


class _Step(NamedTuple):
    """One operation on the crops that drew it."""

    operation: Callable[[Tensor, Tensor], Tensor]  # uint8 [n, 3, s, s], float32 [n, k] -> uint8
    rows: NDArray[np.int64]  # [n]
    values: NDArray[np.float32]  # [n, k]


def _steps(params: AugmentParams) -> Iterator[_Step]:
    """All there is to do, in the reference's order."""
    yield _step(_flip, params.flip)
    operations = (_brightness, _contrast, _saturation, _hue)
    factors = params.factors.copy()
    # torchvision truncates the shift towards zero and lets uint8 wrap around.
    factors[:, HUE] = np.trunc(factors[:, HUE] * 255)
    for turn in params.order.T:
        for number, operation in enumerate(operations):
            yield _step(operation, turn == number, factors[:, number])
    yield _step(_gray, params.gray)
    yield from _blur_steps(params.blur_radius)


def _step(
    operation: Callable[[Tensor, Tensor], Tensor], chosen: NDArray[np.bool_], *values: NDArray[Any]
) -> _Step:
    rows = np.flatnonzero(chosen)
    shape = (len(values), len(rows))  # numpy cannot know it when there are no values
    columns = np.array([value[rows] for value in values], np.float32).reshape(shape)
    return _Step(operation, rows, columns.T)


def _blur_steps(radius: NDArray[np.float64]) -> Iterator[_Step]:
    """One step for each whole box radius: 0 for radii up to sqrt(2), 1 up to 2.4, and so on."""
    box = _box_radius(radius)
    whole = np.floor(box).astype(np.int64)
    # Pillow's integer weights of the inner taps and of the two at the ends.
    inner = (np.float32(_FIXED_ONE) / (box * 2 + 1)).astype(np.int64)
    outer = (_FIXED_ONE - (whole * 2 + 1) * inner) // 2
    missing = _FIXED_ONE - (whole * 2 + 1) * inner - 2 * outer
    rounding = _FIXED_ONE // 2 - 128 * missing  # of values less 128, see _blur
    for reach in np.unique(whole[radius > 0]):
        chosen = (radius > 0) & (whole == reach)
        operation = functools.partial(_blur, box_radius=int(reach))
        yield _step(operation, chosen, inner, outer, rounding)


def _box_radius(radius: NDArray[np.float64]) -> NDArray[np.float32]:
    """The fractional radius of the box whose three passes have the variance radius².

    Equations 7, 11 and 14 of Gwosdek et al., SSVM 2011. In float32 step by step, as in C: the last
    bit of a weight decides ties in flat regions.
    """
    variance = radius.astype(np.float32) ** 2 / np.float32(_BLUR_PASSES)
    length = np.sqrt(12 * variance.astype(np.float64) + 1).astype(np.float32)
    whole = np.floor((length - 1) / 2)
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return np.asarray(whole + fraction / (6 * (variance - (whole + 1) * (whole + 1))))


def _upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> Sequence[Tensor]:
    """Bring arrays of one dtype to the device in one transfer, which the host does not wait for."""
    if not arrays:
        return []
    sizes = [array.size for array in arrays]
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = torch.split_with_sizes(flat.to(device, non_blocking=True), sizes)
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _words(pixels: Tensor) -> Tensor:
    """The crops as rows of 8-byte words where they divide: index_copy_ moves one word at a time."""
    rows = pixels.reshape(len(pixels), -1)
    return rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows


def _flip(pixels: Tensor, _: Tensor) -> Tensor:
    return pixels.flip(-1)


def _brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return _quantize(pixels * factor[:, :, None, None])


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    luma = _luma(pixels)
    size = luma[0].numel()
    total = luma.sum(dim=(1, 2, 3), dtype=torch.int64)
    mean = (total * 2 + size) // (size * 2)  # rounded, as in Pillow
    return _blend(pixels, mean.to(torch.int16)[:, None, None, None], factor)


def _saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    return _blend(pixels, _luma(pixels), factor)


def _gray(pixels: Tensor, _: Tensor) -> Tensor:
    return _luma(pixels).to(torch.uint8).expand_as(pixels)


def _luma(pixels: Tensor) -> Tensor:
    """ITU-R 601 luma, int16 [n, 1, s, s]."""
    red, green, blue = pixels.unbind(1)
    half = torch.full((1, 1, 1), 1 << 15, dtype=torch.int32, device=pixels.device)
    weighted = torch.add(half, red, alpha=19595)
    weighted.add_(green, alpha=38470).add_(blue, alpha=7471)
    return weighted.bitwise_right_shift_(16).to(torch.int16).unsqueeze(1)


def _blend(pixels: Tensor, degenerate: Tensor, factor: Tensor) -> Tensor:
    """degenerate + factor * (pixels - degenerate); not lerp, which rounds otherwise."""
    difference = pixels - degenerate  # int16
    return _quantize((difference * factor[:, :, None, None]).add_(degenerate))


def _quantize(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).to(torch.uint8)  # the cast cuts the fraction off, as Pillow's does


def _hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """To HSV and back in Pillow's 8 bits, the hue turned by a whole number of its 255 steps.

    A channel of the result is value * (1 - saturation * w), w in [0, 1] depending on the hue alone.
    """
    tables = _hue_tables(pixels.device)
    red, green, blue = pixels.to(torch.int16).unbind(1)
    value = pixels.amax(1).to(torch.int16)
    chroma = value - pixels.amin(1)
    # The largest channel says the sector and which difference of the others places the hue in it.
    place = torch.where(green == value, (blue - red).add_(767), (red - green).add_(1279))
    place = torch.where(red == value, (green - blue).add_(255), place)
    hue = _look_up(tables.hue, torch.addcmul(chroma, place, tables.stride))
    hue = hue.add_(shift.to(torch.int32).to(torch.uint8)[:, :, None]).to(torch.int32)
    saturation = _look_up(tables.saturation, torch.addcmul(value, chroma, tables.stride))
    scale = torch.empty(pixels.shape, device=pixels.device)
    for channel, weight in enumerate(tables.weight):
        torch.mul(_look_up(weight, hue), saturation, out=scale[:, channel])
    return scale.add_(1).mul_(value.unsqueeze(1)).add_(0.5).to(torch.uint8)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    # Seven times faster than table[index].
    return table.index_select(0, index.view(-1)).view(index.shape)


class _HueTables(NamedTuple):
    hue: Tensor  # uint8 [3 * 512 * 256], at (512 * sector + 255 + difference) * 256 + chroma
    saturation: Tensor  # float32 [256 * 256] in [0, 1], at chroma * 256 + value
    weight: Tensor  # float32 [3, 256], minus those of red, green, blue by hue
    stride: Tensor  # int32 [1, 1, 1], 256; one axis a factor, or it would not widen int16


@functools.cache
def _hue_tables(device: torch.device) -> _HueTables:
    """Pillow's rgb2hsv and hsv2rgb: its mix of float and double decides where each step begins."""
    stride = np.full((1, 1, 1), 256, np.int32)
    arrays = (_hue_table(), _saturation_table(), -_weight_table(), stride)
    return _HueTables(*(torch.from_numpy(array).to(device) for array in arrays))


def _hue_table() -> NDArray[np.uint8]:
    chroma = np.arange(256, dtype=np.float32)
    difference = np.arange(-255, 257, dtype=np.float32)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        # One of the two distances to the largest channel is the chroma, hence exactly 1 here.
        first = np.minimum(chroma + difference, chroma) / chroma
        second = np.minimum(chroma - difference, chroma) / chroma
        angle = np.stack([first - second, _angle(2, first, second), _angle(4, first, second)])
        turns = np.fmod(angle.astype(np.float64) / 6 + 1, 1).astype(np.float32)
    steps = np.nan_to_num(turns.astype(np.float64) * 255, posinf=0, neginf=0)
    steps[..., 0] = 0  # no chroma, no hue
    return steps.clip(0, 255).astype(np.uint8).ravel()


def _angle(
    sector: int, first: NDArray[np.float32], second: NDArray[np.float32]
) -> NDArray[np.float32]:
    return (sector + first.astype(np.float64) - second).astype(np.float32)


def _saturation_table() -> NDArray[np.float32]:
    chroma, value = np.arange(256, dtype=np.float32)[:, None], np.arange(256, dtype=np.float32)
    share = np.minimum(chroma, value) / np.maximum(value, 1)
    steps = np.floor(share.astype(np.float64) * 255)
    return (steps.astype(np.float32) / np.float32(255)).ravel()


def _weight_table() -> NDArray[np.float32]:
    angle = (np.arange(256) * 6.0 / 255).astype(np.float32)
    sector = np.floor(angle).astype(np.int64) % 6
    fraction = angle - np.floor(angle)
    none, full = np.zeros_like(fraction), np.ones_like(fraction)
    falling, rising = fraction, 1 - fraction
    red = (none, falling, full, full, rising, none)
    green = (rising, none, none, falling, full, full)
    blue = (full, full, rising, none, none, falling)
    return np.stack([np.choose(sector, channel) for channel in (red, green, blue)])


def _blur(pixels: Tensor, weights: Tensor, *, box_radius: int) -> Tensor:
    """Three box blurs along the rows, then three along the columns, each rounded to 8 bits.

    Weighted sums are integers below 2**32. On values less 128 they fit int32, whose speed is that
    of float32; float32 itself cannot do it: ties are common and the last bit decides them.
    """
    fixed = weights.to(torch.int32)[:, :, None, None, None].unbind(1)
    between = torch.int16 if box_radius < 127 else torch.int32  # wide enough for the sum of a box
    values = pixels.to(between).sub_(128)
    for dim in (-1, -2):
        values = _box_passes(values, *fixed, reach=box_radius + 1, dim=dim)
    return values.add_(128).to(torch.uint8)


def _box_passes(
    values: Tensor, inner: Tensor, outer: Tensor, rounding: Tensor, *, reach: int, dim: int
) -> Tensor:
    size = values.shape[dim]
    shape = list(values.shape)
    shape[dim] = size + 2 * reach
    padded = values.new_empty(shape)
    taps = [padded.narrow(dim, offset, size) for offset in range(2 * reach + 1)]
    middle = taps[reach].copy_(values)
    for _ in range(_BLUR_PASSES):
        padded.narrow(dim, 0, reach).copy_(middle.narrow(dim, 0, 1))
        padded.narrow(dim, reach + size, reach).copy_(middle.narrow(dim, size - 1, 1))
        total = torch.addcmul(rounding, functools.reduce(torch.add, taps[1:-1]), inner)
        total.addcmul_(taps[0] + taps[-1], outer)
        torch.bitwise_right_shift(total, 24, out=middle)
    return middle
