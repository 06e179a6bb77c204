"""Flip, colour jitter, grey, blur and normalisation of crops on the CPU, without the GIL.

A worker of a run without a GPU calls `augment_pixels` for the crops of one image, while they are
still in its cache; the training process calls `normalize_into`. To the bit the results are those of
augment_device.py, hence Pillow's. (Arithmetic: Pillow's Blend.c, Convert.c, BoxBlur.c.)

One crop at a time is taken apart into three planes, which stay in the level-2 cache, and every loop
runs over a whole plane, in float32 or 32-bit integers, so that LLVM makes vector code of it. Two
things are computed otherwise than in Pillow, and tested with all 16.7 million colours: hue without
double precision, and the way back from HSV as the exact fraction that Pillow's floats round. The
crops of an image, 2 of 224 px and 6 of 96 px, take 0.35 ms on one core of a Zen 5 over what is
drawn by default (Pillow 7.0, batched torch 7.3), their normalisation 0.07 (torch 2.0).

Compiling takes 5 s once on a machine, loading 0.4 s in every process (pipeline.kernels).
"""

from typing import Any

import numpy as np
from numba import boolean, carray, float32, float64, int8, int64, types, uint8, void
from numpy.typing import NDArray

from pipeline.augment import BRIGHTNESS, CONTRAST, HUE, SATURATION, AugmentConfig, AugmentParams
from pipeline.kernels import Kernel, memory_of, part

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Single = np.float32

_CHANNELS = 3
_LUMA = 3  # of the planes: red, green, blue, luma
_BLUR_PASSES = 3
_FIXED_BITS = 24  # Pillow's box blur works in 8.24 fixed point
_FIXED_ONE = np.float32(1 << _FIXED_BITS)
_HALF = np.uint32(1 << _FIXED_BITS - 1)
_ZERO, _ONE, _TWO, _SIX = np.float32(0), np.float32(1), np.float32(2), np.float32(6)
_ROUNDING = np.float32(0.5)
_MOST = np.float32(255)
_LUMA_RED, _LUMA_GREEN, _LUMA_BLUE = np.float32(19595), np.float32(38470), np.float32(7471)
_LUMA_HALF, _LUMA_ONE = np.float32(1 << 15), np.float32(1 / (1 << 16))
_HUES = np.float32(256)
_SECTOR = np.float32(85)  # half-steps of hue: six sectors are 510, two for each of Pillow's 255
_GREEN, _CYAN, _BLUE = np.float32(170), np.float32(255), np.float32(340)
_FULL = np.float32(255 * 85)  # steps of saturation times half-steps of a sector
_SHARE = np.float32(1 / (255 * 85))


def augment_pixels(crops: Bytes, params: AugmentParams) -> None:
    """Do what `params` say to uint8 crops [count, n, s, s, 3], in place.

    Every crop is contiguous in itself; the first two axes may be strided, as in the rows of a block
    that belong to one image. Parameters are crop-major, row c * n + i for crops[c, i]. Any number
    of threads may call, for different crops. Raises ValueError for other arrays, or if there are
    not count * n parameters.
    """
    _check(crops, np.uint8, written=True)
    count, num_images = crops.shape[:2]
    if len(params) != count * num_images:
        raise ValueError(f"parameters of {len(params)} crops for {count * num_images} crops")
    columns = (params.flip, params.order, params.factors, params.gray, params.blur_radius)
    _augment(*_describe(crops), *columns)


def normalize_into(crops: Bytes, out: Floats, config: AugmentConfig) -> None:
    """Scale uint8 crops [count, n, s, s, 3] into float32 of the same shape, as the reference does.

    ToTensor and Normalize, to the same bits as augment_device.normalize. Both arrays may be strided
    in their first two axes. Seen as [count * n, 3, s, s] a contiguous `out` is what torch calls
    channels_last, without a copy. Raises ValueError for other arrays.
    """
    _check(crops, np.uint8, written=False)
    _check(out, np.float32, written=True)
    if crops.shape != out.shape:
        raise ValueError(f"the result is {out.shape}, the crops are {crops.shape}")
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    address, crop_step, image_step, *_ = _describe(out)
    _normalize(*_describe(crops), address, crop_step, image_step, mean, std)


def warm_up() -> None:
    """Have the kernels compiled, or loaded, before anybody waits for a call."""
    _augment.warm_up()
    _normalize.warm_up()


def _check(crops: NDArray[Any], dtype: type[np.generic], *, written: bool) -> None:
    size = crops.shape[-2] if crops.ndim == 5 else 0
    if crops.dtype != dtype or crops.shape[2:] != (size, size, _CHANNELS):
        name = np.dtype(dtype).name
        raise ValueError(f"crops are {name} [count, n, s, s, 3], not {crops.dtype} {crops.shape}")
    if not crops[:1, :1].flags.c_contiguous:
        raise ValueError(f"every crop must be contiguous, not of strides {crops.strides[2:]}")
    if written and not crops.flags.writeable:
        raise ValueError("crops that are written to must be writable")


def _describe(crops: NDArray[Any]) -> tuple[int, int, int, int, int, int]:
    """Crops as the kernels take them: address, bytes between crops and images, count, n, s."""
    count, num_images, size = crops.shape[:3]
    address = crops.__array_interface__["data"][0]
    return address, crops.strides[0], crops.strides[1], count, num_images, size


# What numba compiles. It reads no annotations; they are for people.


_bytes_at = memory_of(uint8)
_floats_at = memory_of(float32)


@part
def _load(crop: Bytes, planes: Bytes) -> None:
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(len(red)):
        red[i] = crop[3 * i]
        green[i] = crop[3 * i + 1]
        blue[i] = crop[3 * i + 2]


@part
def _store(planes: Bytes, crop: Bytes) -> None:
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(len(red)):
        crop[3 * i] = red[i]
        crop[3 * i + 1] = green[i]
        crop[3 * i + 2] = blue[i]


@part
def _copy(source: Bytes, target: Bytes) -> None:
    """A loop becomes memcpy; numba's assignment to a slice goes byte by byte."""
    for i in range(len(target)):
        target[i] = source[i]


@part
def _flip(plane: Bytes, size: int, row: Bytes) -> None:
    last = np.uint64(size - 1)
    for start in range(0, size * size, size):
        turned = plane[start : start + size]
        _copy(turned, row)
        for x in range(size):
            turned[x] = row[last - np.uint64(x)]  # unsigned: no test for indices from the end


@part
def _larger(one: Single, other: Single) -> Single:
    return one if one > other else other  # max would ask for NaN, too


@part
def _smaller(one: Single, other: Single) -> Single:
    return one if one < other else other


@part
def _quantize(value: Single) -> np.uint8:
    """Clamp to a byte, cut the fraction off."""
    return np.uint8(_smaller(_larger(value, _ZERO), _MOST))


@part
def _scale(plane: Bytes, factor: Single) -> None:
    for i in range(len(plane)):
        plane[i] = _quantize(np.float32(plane[i]) * factor)


@part
def _blend_with_level(plane: Bytes, level: Single, factor: Single) -> None:
    for i in range(len(plane)):
        plane[i] = _quantize((np.float32(plane[i]) - level) * factor + level)


@part
def _blend_with_plane(plane: Bytes, other: Bytes, factor: Single) -> None:
    for i in range(len(plane)):
        level = np.float32(other[i])
        plane[i] = _quantize((np.float32(plane[i]) - level) * factor + level)


@part
def _fill_luma(planes: Bytes) -> None:
    """ITU-R 601; the sums are whole numbers below 2**24, so float32 is exact."""
    red, green, blue, luma = planes[0], planes[1], planes[2], planes[_LUMA]
    for i in range(len(luma)):
        weighted = np.float32(red[i]) * _LUMA_RED + np.float32(green[i]) * _LUMA_GREEN
        weighted += np.float32(blue[i]) * _LUMA_BLUE + _LUMA_HALF
        luma[i] = np.uint8(weighted * _LUMA_ONE)


@part
def _rounded_mean(luma: Bytes) -> Single:
    total = 0
    for i in range(len(luma)):
        total += luma[i]
    return np.float32((total * 2 + len(luma)) // (len(luma) * 2))


@part
def _hue_of(red: Single, green: Single, blue: Single, most: Single, least: Single) -> Single:
    """Pillow's hue in whole steps, 0 to 255; any number for a grey."""
    middle = red + green + blue - most - least
    chroma = most - least
    # One of Pillow's two distances to the largest channel is the chroma, hence exactly 1.
    distance = (most - middle) / _larger(chroma, _ONE)
    sector = np.float32(0)
    first, second = green, blue
    if red != most:
        sector = np.float32(2) if green == most else np.float32(4)
        first = blue if green == most else red
        second = red if green == most else green
    # One rounding, as in double precision: Pillow's is 2.0 + first - second.
    angle = (sector + _ONE) - distance if first >= second else (sector - _ONE) + distance
    turns = angle / _SIX
    turns = turns + _ONE if turns < _ZERO else turns
    return np.float32(np.floor(turns * _MOST))


@part
def _clamp_sector(value: Single) -> Single:
    return _smaller(_larger(value, _ZERO), _SECTOR)


@part
def _channel(value: Single, saturation: Single, weight: Single) -> np.uint8:
    """value * (1 - saturation * weight), rounded; below 2**24 and free of ties."""
    return np.uint8((_FULL - saturation * weight) * value * _SHARE + _ROUNDING)


@part
def _turn_hue(planes: Bytes, shift: Single) -> None:
    """To HSV and back in Pillow's 8 bits, the hue turned by `shift` of its 255 steps."""
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(len(red)):
        r, g, b = np.float32(red[i]), np.float32(green[i]), np.float32(blue[i])
        most = _larger(_larger(r, g), b)
        least = _smaller(_smaller(r, g), b)
        saturation = np.floor((most - least) / _larger(most, _ONE) * _MOST)
        hue = _hue_of(r, g, b, most, least) + shift
        half_steps = (hue - _HUES if hue >= _HUES else hue) * _TWO
        # How far a channel is below the largest: a trapezium over the circle of hues.
        to_red = _clamp_sector(_TWO * _SECTOR - abs(half_steps - _CYAN))
        to_green = _clamp_sector(abs(half_steps - _GREEN) - _SECTOR)
        to_blue = _clamp_sector(abs(half_steps - _BLUE) - _SECTOR)
        red[i] = _channel(most, saturation, to_red)
        green[i] = _channel(most, saturation, to_green)
        blue[i] = _channel(most, saturation, to_blue)


@part
def _jitter(planes: Bytes, operation: int, factor: float) -> None:
    if operation == BRIGHTNESS:
        for channel in range(_CHANNELS):
            _scale(planes[channel], np.float32(factor))
    elif operation == CONTRAST:
        _fill_luma(planes)
        mean = _rounded_mean(planes[_LUMA])
        for channel in range(_CHANNELS):
            _blend_with_level(planes[channel], mean, np.float32(factor))
    elif operation == SATURATION:
        _fill_luma(planes)
        for channel in range(_CHANNELS):
            _blend_with_plane(planes[channel], planes[_LUMA], np.float32(factor))
    elif operation == HUE:
        # torchvision truncates the shift towards zero and lets uint8 wrap around.
        _turn_hue(planes, np.float32(int64(factor * 255) & 255))


@part
def _box_radius(radius: float) -> Single:
    """As in augment_device: in float32 step by step, the last bit of a weight decides ties."""
    deviation = np.float32(radius)
    variance = deviation * deviation / np.float32(_BLUR_PASSES)
    length = np.float32(np.sqrt(12.0 * np.float64(variance) + 1.0))
    whole = np.floor((length - _ONE) / _TWO)
    fraction = (_TWO * whole + _ONE) * (whole * (whole + _ONE) - np.float32(3) * variance)
    return np.float32(whole + fraction / (_SIX * (variance - (whole + _ONE) * (whole + _ONE))))


@part
def _box_pass(source: Bytes, target: Bytes, span: Any, step: int, whole: int, weights: Any) -> None:
    """One box over the bytes [first, last) of a padded plane; neighbours are `step` bytes apart."""
    first, last = span
    reach = (whole + 1) * step
    out = target[first:last]
    before, after = source[first - reach : last - reach], source[first + reach : last + reach]
    inner, outer = weights
    middle = source[first:last]
    if whole == 0:
        for i in range(len(out)):
            ends = np.uint32(before[i]) + np.uint32(after[i])
            total = np.uint32(inner * np.uint32(middle[i]) + outer * ends + _HALF)
            out[i] = np.uint8(total >> np.uint32(_FIXED_BITS))
        return
    left, right = source[first - step : last - step], source[first + step : last + step]
    if whole == 1:
        for i in range(len(out)):
            ends = np.uint32(before[i]) + np.uint32(after[i])
            inside = np.uint32(middle[i]) + np.uint32(left[i]) + np.uint32(right[i])
            total = np.uint32(inner * inside + outer * ends + _HALF)
            out[i] = np.uint8(total >> np.uint32(_FIXED_BITS))
        return
    _wide_box_pass(source, target, span, step, whole, weights)


@part
def _wide_box_pass(
    source: Bytes, target: Bytes, span: Any, step: int, whole: int, weights: Any
) -> None:
    """Any width, neighbour by neighbour, so that the loops stay over the plane."""
    first, last = span
    inner, outer = weights
    reach = (whole + 1) * step
    before, after = source[first - reach : last - reach], source[first + reach : last + reach]
    inside = np.zeros(last - first, np.uint32)
    for tap in range(-whole, whole + 1):
        shifted = source[first + tap * step : last + tap * step]
        for i in range(len(inside)):
            inside[i] += np.uint32(shifted[i])
    out = target[first:last]
    for i in range(len(inside)):
        ends = np.uint32(before[i]) + np.uint32(after[i])
        total = np.uint32(inner * inside[i] + outer * ends + _HALF)
        out[i] = np.uint8(total >> np.uint32(_FIXED_BITS))


@part
def _pad_columns(padded: Bytes, size: int, pad: int) -> None:
    width = size + 2 * pad
    for row in range(pad, pad + size):
        start = row * width
        first, last = padded[start + pad], padded[start + pad + size - 1]
        for x in range(pad):
            padded[start + x] = first
            padded[start + pad + size + x] = last


@part
def _pad_rows(padded: Bytes, size: int, pad: int) -> None:
    width = size + 2 * pad
    top, bottom = pad * width, (pad + size - 1) * width
    for row in range(pad):
        above, below = row * width, (pad + size + row) * width
        _copy(padded[top : top + width], padded[above : above + width])
        _copy(padded[bottom : bottom + width], padded[below : below + width])


@part
def _blur(plane: Bytes, size: int, box: Single, padded: Bytes, other: Bytes) -> None:
    """Three boxes along the rows, three along the columns, each rounded to bytes."""
    whole = int64(box)
    pad = whole + 1
    width = size + 2 * pad
    inner = np.uint32(_FIXED_ONE / (box * _TWO + _ONE))
    outer = np.uint32((int64(_FIXED_ONE) - (2 * whole + 1) * int64(inner)) // 2)
    span = (pad * width, (pad + size) * width)
    for y in range(size):
        start = (pad + y) * width + pad
        _copy(plane[y * size : (y + 1) * size], padded[start : start + size])
    for _ in range(_BLUR_PASSES):
        _pad_columns(padded, size, pad)
        _box_pass(padded, other, span, 1, whole, (inner, outer))
        padded, other = other, padded
    for _ in range(_BLUR_PASSES):
        _pad_rows(padded, size, pad)
        _box_pass(padded, other, span, width, whole, (inner, outer))
        padded, other = other, padded
    for y in range(size):
        start = (pad + y) * width + pad
        _copy(padded[start : start + size], plane[y * size : (y + 1) * size])


@part
def _largest(values: NDArray[np.float64]) -> float:
    largest = 0.0
    for i in range(len(values)):
        largest = max(largest, values[i])
    return largest


def _augment_all(
    address: int,
    crop_step: int,
    image_step: int,
    count: int,
    num_images: int,
    size: int,
    flip: NDArray[np.bool_],
    order: NDArray[np.int8],
    factors: NDArray[np.float64],
    gray: NDArray[np.bool_],
    blur_radius: NDArray[np.float64],
) -> None:
    planes = np.empty((_LUMA + 1, size * size), np.uint8)
    padded_size = size + 2 * (int64(_box_radius(_largest(blur_radius))) + 1)
    padded = np.empty((2, padded_size * padded_size), np.uint8)
    for row in range(count * num_images):
        place = address + row // num_images * crop_step + row % num_images * image_step
        crop = carray(_bytes_at(place), size * size * _CHANNELS)
        _load(crop, planes)
        if flip[row]:
            for channel in range(_CHANNELS):
                _flip(planes[channel], size, padded[0][:size])
        for turn in range(order.shape[1]):
            if order[row, turn] >= 0:
                _jitter(planes, order[row, turn], factors[row, order[row, turn]])
        if gray[row]:
            _fill_luma(planes)
            for channel in range(_CHANNELS):
                _copy(planes[_LUMA], planes[channel])
        if blur_radius[row] > 0:
            for channel in range(_CHANNELS):
                _blur(planes[channel], size, _box_radius(blur_radius[row]), padded[0], padded[1])
        _store(planes, crop)


def _normalize_all(
    address: int,
    crop_step: int,
    image_step: int,
    count: int,
    num_images: int,
    size: int,
    out_address: int,
    out_crop_step: int,
    out_image_step: int,
    mean: Floats,
    std: Floats,
) -> None:
    row_length = size * _CHANNELS
    means, stds = np.empty(row_length, np.float32), np.empty(row_length, np.float32)
    for i in range(row_length):
        means[i], stds[i] = mean[i % _CHANNELS], std[i % _CHANNELS]
    for row in range(count * num_images):
        crop_index, image_index = row // num_images, row % num_images
        place = address + crop_index * crop_step + image_index * image_step
        out_place = out_address + crop_index * out_crop_step + image_index * out_image_step
        crop = carray(_bytes_at(place), row_length * size)
        out = carray(_floats_at(out_place), row_length * size)
        for start in range(0, row_length * size, row_length):
            pixels, values = crop[start : start + row_length], out[start : start + row_length]
            for i in range(row_length):
                values[i] = (np.float32(pixels[i]) / _MOST - means[i]) / stds[i]


def _column(dtype: Any, num_axes: int) -> Any:
    return types.Array(dtype, num_axes, "A", readonly=True)


_DESCRIPTION = [int64] * 6
_AUGMENT = void(
    *_DESCRIPTION,
    _column(boolean, 1),
    _column(int8, 2),
    _column(float64, 2),
    _column(boolean, 1),
    _column(float64, 1),
)
_NORMALIZE = void(*_DESCRIPTION, *[int64] * 3, float32[::1], float32[::1])


_augment = Kernel(_AUGMENT, _augment_all)
_normalize = Kernel(_NORMALIZE, _normalize_all)
