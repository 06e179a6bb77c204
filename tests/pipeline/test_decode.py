"""Decoding: every kind of pixel, and everything that is not quite an image."""

import io
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms
from skimage import data as photographs

from pipeline import decode
from pipeline.decode import (
    decode_grey,
    decode_pixels,
    decode_rgb,
    decode_rgbx,
    exif_orientation,
    guard_header,
    hash_grey,
    is_animated,
    perceptual_hash,
    to_grey,
)
from pipeline.errors import SampleError

# As decode.py asks for, which pytest undoes.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")

REASONS = {
    decode.NOT_AN_IMAGE,
    decode.TRUNCATED,
    decode.TOO_LARGE,
    decode.BOMB,
    decode.UNSUPPORTED,
    decode.UNDECODABLE,
}
PHOTO = np.ascontiguousarray(photographs.astronaut()[40:260, 100:400])  # uint8 [220, 300, 3]


def encode(pixels: NDArray[Any] | Image.Image, image_format: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


JPEG = encode(PHOTO, "JPEG", quality=88)
FILES = {
    "JPEG": JPEG,
    "PNG": encode(PHOTO, "PNG"),
    "WEBP": encode(PHOTO, "WEBP"),
    "GIF": encode(PHOTO, "GIF"),
    "BMP": encode(PHOTO, "BMP"),
    "TIFF": encode(PHOTO, "TIFF", compression="tiff_deflate"),
    "AVIF": encode(PHOTO, "AVIF", speed=10),
}


def reason_of(function: Any, data: bytes, **limits: int) -> str:
    with pytest.raises(SampleError) as caught:
        function(data, **limits)
    return caught.value.reason


def png(header: bytes, pixels: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of the given IHDR body and uncompressed scan lines, with extra chunks before them."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    parts = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def png_header(width_px: int, height_px: int) -> bytes:
    """A PNG that says it is that large, with hardly any pixels behind it."""
    return png(struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0), bytes(1000))


@pytest.mark.parametrize("image_format", FILES)
def test_header_and_pixels_of_every_format(image_format: str) -> None:
    data = FILES[image_format]
    assert guard_header(data) == decode.ImageHeader(300, 220, image_format)
    pixels = decode_rgb(data)
    assert (pixels.shape, pixels.dtype) == ((220, 300, 3), np.uint8)
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable  # torch.from_numpy warns otherwise
    assert np.abs(pixels.astype(int) - PHOTO).mean() < 8


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_give_the_pixels_back(image_format: str) -> None:
    np.testing.assert_array_equal(decode_rgb(FILES[image_format]), PHOTO)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}, {"optimize": True}]
)
def test_jpeg_has_the_pixels_of_pillow(options: dict[str, Any]) -> None:
    data = encode(PHOTO, "JPEG", **options)
    np.testing.assert_array_equal(decode_rgb(data), np.asarray(Image.open(io.BytesIO(data))))


def test_grey_jpeg_has_three_equal_channels() -> None:
    data = encode(PHOTO[..., 1], "JPEG")
    grey = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode_rgb(data), np.stack([grey] * 3, axis=-1))


def test_cmyk_jpeg_is_converted_by_pillow() -> None:
    data = encode(Image.fromarray(PHOTO).convert("CMYK"), "JPEG", quality=95)
    pixels = decode_rgb(data)
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(pixels.astype(int) - PHOTO).mean() < 8


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    grey = decode_rgb(encode(values, "PNG"))[0, :, 0]
    np.testing.assert_array_equal(grey, [0, 0, 1, 1, 128, 255])


def test_sixteen_bit_colour_keeps_its_high_byte() -> None:
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = png(header, b"\0" + struct.pack(">HHH", 0x12FF, 0x8000, 0xFE01))
    np.testing.assert_array_equal(decode_rgb(data), [[[0x12, 0x80, 0xFE]]])


@pytest.mark.parametrize(
    "extra",
    [
        (b"gAMA", struct.pack(">I", 100_000)),
        (b"cHRM", struct.pack(">8I", *range(10_000, 90_000, 10_000))),
        (b"tEXt", b"Comment\0\xff\xfe"),
        (b"eXIf", b"garbage"),
    ],
)
def test_chunks_beside_the_pixels_change_nothing(extra: tuple[bytes, bytes]) -> None:
    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    np.testing.assert_array_equal(
        decode_rgb(png(header, b"\0\x01\x80\xfe", extra)), [[[1, 128, 254]]]
    )


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("profile", ["a real one", "garbage"])
def test_colour_profiles_are_ignored(image_format: str, profile: str) -> None:
    body = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    with_profile = encode(PHOTO, image_format, icc_profile=body if profile[0] == "a" else b"x" * 50)
    np.testing.assert_array_equal(decode_rgb(with_profile), decode_rgb(encode(PHOTO, image_format)))


def test_alpha_is_composited_on_white() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 128, 255
    np.testing.assert_array_equal(decode_rgb(encode(rgba, "PNG"))[0, :, 0], [255, 127, 0])
    np.testing.assert_array_equal(
        decode_rgb(encode(rgba, "WEBP", lossless=True, exact=True))[0, :, 0], [255, 127, 0]
    )


def test_grey_with_alpha_is_composited_on_white() -> None:
    image = Image.merge("LA", [Image.new("L", (2, 1), 10), Image.new("L", (2, 1), 0)])
    np.testing.assert_array_equal(decode_rgb(encode(image, "PNG")), np.full((1, 2, 3), 255))


def test_palette_is_looked_up_and_its_transparent_entry_is_white() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    opaque = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    np.testing.assert_array_equal(decode_rgb(encode(image, "PNG"))[0], opaque)
    seen_through = decode_rgb(encode(image, "PNG", transparency=1))[0]
    np.testing.assert_array_equal(seen_through, [opaque[0], [255, 255, 255], opaque[2]])


def test_transparent_colour_of_rgb_is_white() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    pixels = decode_rgb(encode(image, "PNG", transparency=(1, 2, 3)))
    np.testing.assert_array_equal(pixels[0], [[255, 255, 255], [4, 5, 6]])


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_several(image_format: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    data = encode(
        frames[0], image_format, save_all=True, append_images=frames[1:], **{"lossless": True}
    )
    np.testing.assert_array_equal(decode_rgb(data)[0, 0], [255, 0, 0])
    assert is_animated(data, guard_header(data))


@pytest.mark.parametrize("image_format", FILES)
def test_one_frame(image_format: str) -> None:
    data = FILES[image_format]
    assert not is_animated(data, guard_header(data))


def test_an_animated_avif_has_a_brand_of_its_own() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "AVIF", save_all=True, append_images=frames[1:])
    assert data[4:12] == b"ftypavis"
    assert guard_header(data) == decode.ImageHeader(16, 16, "AVIF")
    assert is_animated(data, guard_header(data))
    assert np.abs(decode_rgb(data).astype(int) - [254, 0, 0]).max() < 8


def test_one_bit() -> None:
    image = Image.fromarray(np.array([[True, False]]))
    np.testing.assert_array_equal(decode_rgb(encode(image, "PNG"))[0, :, 0], [255, 0])


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_scale_are_unsupported(mode: str) -> None:
    data = encode(Image.new(mode, (4, 4)), "TIFF")
    assert reason_of(decode_rgb, data) == decode.UNSUPPORTED


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (7, 3)])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_awkward_sizes(size: tuple[int, int], image_format: str) -> None:
    data = encode(Image.new("RGB", size, "white"), image_format)
    assert (guard_header(data).width_px, guard_header(data).height_px) == size
    np.testing.assert_array_equal(decode_rgb(data), np.full((size[1], size[0], 3), 255))
    perceptual_hash(data)


def test_bytes_after_the_end_of_a_jpeg_are_ignored() -> None:
    np.testing.assert_array_equal(decode_rgb(JPEG + b"\0" * 100), decode_rgb(JPEG))


@pytest.mark.parametrize("filler", [b"\0\0", b"abc"])
def test_harmless_complaints_of_libjpeg_are_as_in_pillow(filler: bytes) -> None:
    data = JPEG[:-2] + filler + JPEG[-2:]
    np.testing.assert_array_equal(decode_rgb(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (b"", decode.NOT_AN_IMAGE),
        (b"<!DOCTYPE html><html>", decode.NOT_AN_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0", decode.NOT_AN_IMAGE),  # Pillow would start Ghostscript
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", decode.NOT_AN_IMAGE),
        (b"8BPS\0\1" + bytes(30), decode.UNSUPPORTED),
        (b"\0\0\0\x0cJXL \r\n\x87\n", decode.UNSUPPORTED),
        (b"\xff\xd8\xff", decode.TRUNCATED),
        (b"GIF89a", decode.UNDECODABLE),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), decode.UNDECODABLE),
    ],
)
def test_reasons(start: bytes, reason: str) -> None:
    for function in (guard_header, decode_rgb, perceptual_hash):
        assert reason_of(function, start) == reason


def test_caps_come_before_decoding() -> None:
    assert reason_of(decode_rgb, JPEG, max_bytes=len(JPEG) - 1) == decode.TOO_LARGE
    assert reason_of(decode_rgb, JPEG, max_pixels=300 * 220 - 1) == decode.BOMB
    assert decode_rgb(JPEG, max_pixels=300 * 220, max_bytes=len(JPEG)).shape == (220, 300, 3)


@pytest.mark.parametrize("width_px", [8193, 10_000, 60_000, 2**31 - 1])
def test_bombs_are_refused_from_the_header(width_px: int) -> None:
    data = png_header(width_px, width_px)
    for function in (guard_header, decode_rgb, perceptual_hash):
        assert reason_of(function, data) == decode.BOMB


@pytest.mark.parametrize("width_px", [10_000, 60_000])
def test_a_bomb_is_told_with_our_limit_and_not_with_pillows(width_px: int) -> None:
    with pytest.raises(SampleError, match=r"pixels, allowed are 1000$"):
        guard_header(png_header(width_px, width_px), max_pixels=1000)


def test_beyond_pillows_limit_its_own_is_told() -> None:
    with pytest.raises(SampleError, match=r"^bomb: 3600000000 pixels, allowed are 178956970$"):
        guard_header(png_header(60_000, 60_000), max_pixels=10**12)


@given(cut=st.integers(min_value=3, max_value=len(JPEG) - 1))
@settings(max_examples=150, deadline=None)
def test_a_jpeg_cut_anywhere_is_truncated(cut: int) -> None:
    assert reason_of(decode_rgb, JPEG[:cut]) == decode.TRUNCATED
    assert reason_of(perceptual_hash, JPEG[:cut]) == decode.TRUNCATED


@pytest.mark.parametrize(
    "image",
    [Image.fromarray(PHOTO[..., 0]), Image.fromarray(PHOTO).convert("CMYK")],
    ids=["grey", "CMYK"],
)
@given(share=st.floats(min_value=0.001, max_value=0.999))
@settings(max_examples=50, deadline=None)
def test_other_jpegs_cut_anywhere_are_truncated(image: Image.Image, share: float) -> None:
    data = encode(image, "JPEG", progressive=True)
    assert reason_of(decode_rgb, data[: max(3, int(share * len(data)))]) == decode.TRUNCATED


def test_a_cut_webp_is_truncated() -> None:
    assert reason_of(decode_rgb, FILES["WEBP"][:2000]) == decode.TRUNCATED


@pytest.mark.parametrize("image_format", FILES)
@given(share=st.floats(min_value=0, max_value=1))
@settings(max_examples=25, deadline=None)
def test_a_cut_file_decodes_wholly_or_not_at_all(image_format: str, share: float) -> None:
    data = FILES[image_format][: int(share * len(FILES[image_format]))]
    assert shape_or_reason(data) in {(220, 300, 3), *REASONS}


@given(
    data=st.binary(max_size=200),
    magic=st.sampled_from([b"", *(file[:12] for file in FILES.values())]),
)
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_refused(data: bytes, magic: bytes) -> None:
    assert reason_of(decode_rgb, magic + data) in REASONS
    assert exif_or_reason(magic + data) in {1, *REASONS}


@pytest.mark.parametrize("image_format", FILES)
@given(damage=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8))
@settings(max_examples=40, deadline=None)
def test_damage_never_raises_anything_else(
    image_format: str, damage: list[tuple[int, int]]
) -> None:
    data = bytearray(FILES[image_format])
    for position, value in damage:
        # Half the hits are in the header, where they hurt.
        data[position % (len(data) if position % 2 else 300)] = value
    shape_or_reason(bytes(data), max_pixels=10**6)
    exif_or_reason(bytes(data))


def shape_or_reason(data: bytes, **limits: int) -> tuple[int, ...] | str:
    try:
        return decode_rgb(data, **limits).shape
    except SampleError as error:
        return error.reason


def exif_or_reason(data: bytes) -> int | str:
    try:
        return exif_orientation(data)
    except SampleError as error:
        return error.reason


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "PNG"])
def test_orientation_is_told_but_not_applied(orientation: int, image_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PHOTO, image_format, exif=exif)
    assert exif_orientation(data) == orientation
    assert decode_rgb(data).shape == (220, 300, 3)


def test_pillow_turns_tiff_so_nothing_is_left_to_do() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(PHOTO, "TIFF", exif=exif)
    assert exif_orientation(data) == 1
    assert decode_rgb(data).shape == (300, 220, 3)


def test_orientation_may_stand_in_xmp() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert exif_orientation(encode(PHOTO, "JPEG", xmp=xmp)) == 6


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff"])
def test_broken_exif_is_upright(exif: bytes) -> None:
    data = encode(PHOTO, "JPEG", exif=exif)
    assert exif_orientation(data) == 1
    assert decode_rgb(data).shape == (220, 300, 3)


def test_orientation_out_of_range_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 200
    assert exif_orientation(encode(PHOTO, "JPEG", exif=exif)) == 1


def distance(a: int, b: int) -> int:
    return (a ^ b).bit_count()


def test_hash_survives_formats_and_sizes() -> None:
    expected = perceptual_hash(JPEG)
    assert 0 <= expected < 2**64
    half = encode(Image.fromarray(PHOTO).resize((150, 110)), "JPEG")
    for data in (*FILES.values(), half, encode(PHOTO, "JPEG", quality=20)):
        assert distance(perceptual_hash(data), expected) <= 6


def test_hash_tells_images_apart() -> None:
    images = [PHOTO, PHOTO[:, ::-1], PHOTO[::-1], photographs.coffee(), photographs.chelsea()]
    hashes = [perceptual_hash(encode(np.ascontiguousarray(image), "PNG")) for image in images]
    far = [distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(far) > 12


def test_hash_reads_left_to_right() -> None:
    ramp = np.tile(np.arange(0, 252, 28, dtype=np.uint8), (8, 1))
    assert perceptual_hash(encode(ramp, "PNG")) == 2**64 - 1
    assert perceptual_hash(encode(ramp[:, ::-1].copy(), "PNG")) == 0


@pytest.mark.parametrize("image_format", FILES)
def test_hash_in_steps(image_format: str) -> None:
    data = FILES[image_format]
    grey = decode_grey(data, guard_header(data))
    assert hash_grey(grey) == perceptual_hash(data)
    if image_format != "JPEG":  # which comes out reduced
        np.testing.assert_array_equal(grey, to_grey(decode_rgb(data)))


def test_a_jpeg_decodes_at_no_less_than_is_asked_for() -> None:
    header = guard_header(JPEG)
    for minimum in ((1, 1), (100, 100), (150, 110), (151, 1), (300, 220), (0, 0), (900, 900)):
        pixels = decode_pixels(JPEG, header, min_width_px=minimum[0], min_height_px=minimum[1])
        width, height = (300, 220) if minimum in ((0, 0), (900, 900)) else minimum
        assert height <= pixels.shape[0] <= 220
        assert width <= pixels.shape[1] <= 300
    half = decode_pixels(JPEG, header, min_width_px=150, min_height_px=110)
    small = np.asarray(Image.fromarray(PHOTO).resize((150, 110), Image.Resampling.BOX))
    assert half.shape == (110, 150, 3)
    assert np.abs(half.astype(int) - small).mean() < 6


@pytest.mark.parametrize("image_format", FILES)
def test_only_jpegs_come_out_reduced(image_format: str) -> None:
    data = FILES[image_format]
    pixels = decode_pixels(data, guard_header(data), min_width_px=30, min_height_px=22)
    assert (pixels.shape == (220, 300, 3)) == (image_format != "JPEG")


@given(cut=st.integers(min_value=700, max_value=len(JPEG) - 1))
@settings(max_examples=50, deadline=None)
def test_a_reduced_jpeg_is_read_to_its_end(cut: int) -> None:
    with pytest.raises(SampleError, match="truncated"):
        decode_pixels(JPEG[:cut], guard_header(JPEG), min_width_px=40, min_height_px=40)


@pytest.mark.parametrize("image_format", FILES)
def test_words_of_pixels_hold_the_same_colours(image_format: str) -> None:
    data = FILES[image_format]
    words = decode_rgbx(data, guard_header(data))
    assert (words.shape, words.dtype) == ((220, 300, 4), np.uint8)
    assert words.flags.carray  # contiguous, writable: the kernel copies others
    np.testing.assert_array_equal(words[..., :3], decode_rgb(data))


@pytest.mark.parametrize(
    "data",
    [
        encode(PHOTO[..., 1], "JPEG"),
        encode(Image.fromarray(PHOTO).convert("CMYK"), "JPEG"),
        encode(np.dstack([PHOTO, PHOTO[..., 0]]), "PNG"),
        encode(PHOTO[..., 0].astype(np.uint16) * 250, "PNG"),
        JPEG[:-2] + b"abc" + JPEG[-2:],
    ],
    ids=["grey", "CMYK", "alpha", "16 bits", "junk"],
)
def test_words_of_odd_pixels_hold_the_same_colours(data: bytes) -> None:
    np.testing.assert_array_equal(decode_rgbx(data, guard_header(data))[..., :3], decode_rgb(data))


def test_words_of_a_reduced_jpeg() -> None:
    limits = {"min_width_px": 75, "min_height_px": 55}
    words = decode_rgbx(JPEG, guard_header(JPEG), **limits)
    np.testing.assert_array_equal(words[..., :3], decode_pixels(JPEG, guard_header(JPEG), **limits))


@given(cut=st.integers(min_value=700, max_value=len(JPEG) - 1))
@settings(max_examples=50, deadline=None)
def test_words_of_a_cut_jpeg_are_refused(cut: int) -> None:
    with pytest.raises(SampleError, match="truncated"):
        decode_rgbx(JPEG[:cut], guard_header(JPEG))


def scans_of(data: bytes) -> list[tuple[int, int]]:
    """Where the scans of a JPEG, each with its pixels, begin and end."""
    begins = [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xda"]
    ends = [
        next(
            i
            for i in range(begin + 2, len(data))
            if data[i] == 0xFF and data[i + 1] >= 0xC0 and not 0xD0 <= data[i + 1] <= 0xD7
        )
        for begin in begins
    ]
    return list(zip(begins, ends, strict=True))


def repeat_last_scan(data: bytes, times: int) -> bytes:
    begin, end = scans_of(data)[-1]
    return data[:end] + data[begin:end] * times + data[end:]


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("hidden", [b"", b"\xff\xc0\x00\x04ab", b"\xff\xff", b"junk"])
def test_many_passes_over_the_pixels_are_a_bomb(mode: str, hidden: bytes) -> None:
    """Few bytes a pass, but each costs as much as the image is large."""
    image = Image.fromarray(PHOTO).convert(mode)
    data = encode(image, "JPEG", progressive=True)
    num_scans = len(scans_of(data))
    assert 2 < num_scans < 20
    allowed = repeat_last_scan(data, decode.MAX_SCANS - num_scans)
    assert guard_header(allowed).width_px == 300
    bomb = repeat_last_scan(data, decode.MAX_SCANS - num_scans + 1)
    for function in (guard_header, decode_rgb, perceptual_hash):
        assert reason_of(function, bomb) == decode.BOMB
    place = 4 + int.from_bytes(bomb[4:6], "big")  # after the first segment
    disguised = bomb[:place] + hidden + bomb[place:]
    assert reason_of(decode_rgb, disguised) in {decode.BOMB, decode.UNDECODABLE}


def test_sequential_scans_that_only_pillow_takes_are_counted_too() -> None:
    scan = JPEG[slice(*scans_of(JPEG)[0])]
    data = JPEG[:-2] + scan[:40] * decode.MAX_SCANS + JPEG[-2:]
    assert reason_of(decode_rgb, data) == decode.BOMB
    assert reason_of(lambda data: decode_rgbx(data, guard_header(data)), data) == decode.BOMB


def test_decode_never_reaches_torch() -> None:
    code = "import pipeline.decode, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
