"""Judging: which images are kept, as which bytes, and what is known of the others."""

import contextlib
import dataclasses
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from skimage import data as photographs

from pipeline import decode
from pipeline.decode import decode_rgb, perceptual_hash
from pipeline.errors import CropstreamError
from shard_tools.judge import (
    Accepted,
    ImageSettings,
    RejectedError,
    entropy_of,
    judge,
    watched,
)

# As decode.py asks for, which pytest undoes.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")

PHOTO = np.ascontiguousarray(photographs.astronaut()[40:260, 100:400])  # uint8 [220, 300, 3]
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


def encode(pixels: NDArray[Any] | Image.Image, image_format: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


FILES = {name: encode(PHOTO, name) for name in FORMATS}
JPEG = FILES["JPEG"]


def rejection(data: bytes, **options: Any) -> RejectedError:
    keep = options.pop("keep", None)
    with pytest.raises(RejectedError) as caught:
        judge(data, ImageSettings(**options), keep=keep)
    return caught.value


def stored(accepted: Accepted) -> tuple[str, str, int, int]:
    columns = accepted.columns
    return accepted.extension, columns["format"], columns["width"], columns["height"]


def turned(orientation: int, image_format: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(PHOTO, image_format, exif=exif)


@pytest.mark.parametrize("image_format", FORMATS)
def test_an_image_is_kept_byte_for_byte(image_format: str) -> None:
    data = FILES[image_format]
    accepted = judge(data, ImageSettings())
    extension = {"JPEG": "jpg", "TIFF": "tif"}.get(image_format, image_format.lower())
    assert accepted == Accepted(
        data,
        extension,
        {"width": 300, "height": 220, "format": image_format, "phash": perceptual_hash(data)},
    )
    assert accepted.data is data


def test_settings_survive_json() -> None:
    chosen = ImageSettings(resize="crop", size_px=64, encode="webp", max_aspect=3.5, filter="a:b")
    assert ImageSettings(**json.loads(json.dumps(dataclasses.asdict(chosen)))) == chosen


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        ({"resize": "fill", "size_px": 9}, "resize='fill'"),
        ({"resize": "crop"}, "size_px=0"),
        ({"size_px": 9}, "resize='keep'"),
        ({"size_px": -9, "resize": "crop"}, "size_px=-9"),
        ({"encode": "gif"}, "encode='gif'"),
        ({"animated": "all"}, "animated='all'"),
        ({"orientation": "upright"}, "orientation='upright'"),
        ({"quality": 0}, "quality=0"),
        ({"quality": 101}, "quality=101"),
        ({"max_bytes": 0}, "max_bytes=0"),
        ({"max_pixels": 0}, "max_pixels=0"),
        ({"min_size_px": -1}, "min_size_px=-1"),
        ({"max_aspect": 0.5}, "max_aspect=0.5"),
        ({"max_aspect": float("nan")}, "max_aspect=nan"),
        ({"min_entropy": 9.0}, "min_entropy=9"),
        ({"min_entropy": float("nan")}, "min_entropy=nan"),
        ({"decode": False, "min_entropy": 1.0}, "min_entropy"),
        ({"decode": False, "orientation": "apply"}, "orientation"),
        ({"decode": False, "resize": "crop", "size_px": 9}, "resize"),
        ({"decode": False, "encode": "png", "filter": "a:b"}, "encode, filter"),
    ],
)
def test_settings_that_do_not_hold_are_refused(mistake: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ImageSettings(**mistake)


def test_what_is_known_of_a_reject_grows_with_the_checks() -> None:
    header = {"width": 300, "height": 220, "format": "JPEG"}
    early = [
        (rejection(b"<html>"), decode.NOT_AN_IMAGE),
        (rejection(JPEG, max_bytes=100), decode.TOO_LARGE),
        (rejection(JPEG, max_pixels=100), decode.BOMB),
    ]
    late = [
        (rejection(JPEG, min_size_px=221), "too small"),
        (rejection(JPEG, max_aspect=1.3), "filtered:aspect"),
        (rejection(JPEG[:-900]), decode.TRUNCATED),
    ]
    assert [(error.reason, error.columns) for error, _ in early] == [(r, {}) for _, r in early]
    assert [(error.reason, error.columns) for error, _ in late] == [(r, header) for _, r in late]
    assert "221" in str(late[0][0])


def test_cheap_checks_come_first() -> None:
    wrong_in_every_way = b"<html>" * 100
    assert rejection(wrong_in_every_way, max_bytes=10).reason == decode.TOO_LARGE
    assert rejection(JPEG[:-900], max_pixels=10, min_size_px=900).reason == decode.BOMB
    assert rejection(JPEG[:-900], min_size_px=900, max_aspect=1.0).reason == "too small"
    assert rejection(JPEG[:-900], max_aspect=1.0).reason == "filtered:aspect"
    assert rejection(JPEG[:-900], min_entropy=8.0).reason == decode.TRUNCATED


def test_limits_are_inclusive() -> None:
    judge(JPEG, ImageSettings(min_size_px=220, max_aspect=300 / 220, max_pixels=300 * 220))


def test_without_decoding_only_headers_count() -> None:
    unread = ImageSettings(decode=False)
    header = {"width": 300, "height": 220, "format": "JPEG"}
    assert judge(JPEG[:-900], unread) == Accepted(JPEG[:-900], "jpg", header)
    with pytest.raises(RejectedError, match="not an image"):
        judge(b"", unread)


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_animations_are_kept_whole_or_refused(image_format: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    data = encode(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert judge(data, ImageSettings()).data is data
    assert rejection(data, animated="reject").reason == "animated"
    # What is encoded again is the first frame.
    first = decode_rgb(judge(data, ImageSettings(resize="crop", size_px=4)).data)
    assert first[0, 0, 0] > 200
    assert first[0, 0, 2] < 50


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_single_frame_is_no_animation(image_format: str) -> None:
    judge(FILES[image_format], ImageSettings(animated="reject"))


@pytest.mark.parametrize("image_format", FORMATS)
def test_flat_pictures_are_filtered(image_format: str) -> None:
    flat = encode(Image.new("RGB", (200, 150), (200, 30, 90)), image_format)
    assert rejection(flat, min_entropy=0.5).reason == "filtered:entropy"
    judge(flat, ImageSettings())
    judge(FILES[image_format], ImageSettings(min_entropy=6.0))


def test_entropy_is_in_bits() -> None:
    ramp = np.arange(256, dtype=np.uint8)[None]
    assert entropy_of(ramp) == pytest.approx(8)
    assert entropy_of(ramp // 16) == pytest.approx(4)
    assert entropy_of(np.zeros((4, 4), np.uint8)) == 0


def test_a_filter_sees_upright_pixels_before_any_resizing_and_cannot_change_them() -> None:
    seen: list[tuple[NDArray[np.uint8], dict[str, Any]]] = []

    def look(pixels: NDArray[np.uint8], columns: Mapping[str, Any]) -> bool:
        seen.append((pixels.copy(), dict(columns)))
        with pytest.raises(ValueError, match="read-only"):
            pixels[0] = 0
        return True

    chosen = ImageSettings(orientation="apply", resize="crop", size_px=32, filter="m:look")
    accepted = judge(turned(6), chosen, keep=look)
    assert stored(accepted) == ("jpg", "JPEG", 32, 32)
    (pixels, columns), *_ = seen
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(turned(6))))
    np.testing.assert_array_equal(pixels, np.asarray(upright))
    assert columns == {"width": 300, "height": 220, "format": "JPEG"}


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_filter_decides(image_format: str) -> None:
    data = FILES[image_format]
    plain = judge(data, ImageSettings())
    assert judge(data, ImageSettings(filter="m:f"), keep=lambda pixels, columns: True) == plain
    error = rejection(data, filter="m:f", keep=lambda pixels, columns: False)
    assert error.reason == "filtered:m:f"
    assert error.columns["format"] == image_format


def test_a_broken_filter_ends_the_job() -> None:
    with pytest.raises(CropstreamError, match="filter 'm:f' failed") as caught:
        judge(JPEG, ImageSettings(filter="m:f"), keep=lambda pixels, columns: 1 / 0 > 1)
    assert not isinstance(caught.value, RejectedError)


@pytest.mark.parametrize(
    ("mode", "size"),
    [("longest", (75, 55)), ("shortest", (102, 75)), ("crop", (75, 75))],
)
@pytest.mark.parametrize("image_format", FORMATS)
def test_resizing(mode: str, size: tuple[int, int], image_format: str) -> None:
    accepted = judge(FILES[image_format], ImageSettings(resize=mode, size_px=75))
    lossless = image_format in ("PNG", "GIF", "BMP", "TIFF")
    assert stored(accepted) == (("png", "PNG", *size) if lossless else ("jpg", "JPEG", *size))
    assert accepted.columns["original_width"] == "300"
    assert accepted.columns["original_height"] == "220"
    assert accepted.columns["phash"] == perceptual_hash(accepted.data)
    assert decode_rgb(accepted.data).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("mode", ["longest", "shortest"])
def test_what_is_small_enough_keeps_its_bytes(mode: str) -> None:
    accepted = judge(JPEG, ImageSettings(resize=mode, size_px=300))
    assert accepted == judge(JPEG, ImageSettings())


def test_the_same_image_gives_the_same_bytes() -> None:
    for encoding in ("keep", "jpeg", "png", "webp"):
        chosen = ImageSettings(resize="longest", size_px=100, encode=encoding)
        assert judge(JPEG, chosen) == judge(JPEG, chosen)


@pytest.mark.parametrize("wanted", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("image_format", FORMATS)
def test_encoding(image_format: str, wanted: str) -> None:
    data = FILES[image_format]
    accepted = judge(data, ImageSettings(encode=wanted))
    assert accepted.columns["format"] == wanted.upper()
    if wanted.upper() == image_format:
        assert accepted == judge(data, ImageSettings())
    else:
        assert Image.open(io.BytesIO(accepted.data)).format == wanted.upper()
        assert accepted.columns["phash"] == perceptual_hash(accepted.data)
        difference = decode_rgb(accepted.data).astype(int) - decode_rgb(data)
        assert np.abs(difference).mean() < 4


def test_quality_is_that_of_what_is_encoded() -> None:
    for wanted in ("jpeg", "webp"):
        sizes = [
            len(judge(FILES["PNG"], ImageSettings(encode=wanted, quality=quality)).data)
            for quality in (30, 92)
        ]
        assert sizes[0] < sizes[1] / 2


def test_what_a_format_cannot_hold_is_rejected() -> None:
    wide = encode(Image.new("L", (16_384, 2)), "PNG")
    error = rejection(wide, encode="webp")
    assert error.reason == "unencodable"
    assert error.columns["width"] == 16_384
    assert rejection(encode(Image.new("L", (65_536, 1)), "PNG"), encode="jpeg").reason == (
        "unencodable"
    )


def test_what_would_grow_too_large_is_rejected() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (100, 100, 3), dtype=np.uint8)
    data = encode(noise, "JPEG", quality=10)
    assert rejection(data, encode="png", max_bytes=10_000).reason == decode.TOO_LARGE


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_applied_on_demand(orientation: int, image_format: str) -> None:
    data = turned(orientation, image_format)
    assert judge(data, ImageSettings()).data is data
    accepted = judge(data, ImageSettings(orientation="apply", encode="keep"))
    if orientation == 1:
        assert accepted.data is data
        return
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.abs(decode_rgb(accepted.data).astype(int) - upright).mean() < 3
    assert (accepted.columns["height"], accepted.columns["width"]) == upright.shape[:2]
    assert decode.exif_orientation(accepted.data) == 1  # turned once, not twice
    assert accepted.columns["original_width"] == "300"


def test_alpha_is_put_on_white_where_an_image_is_encoded_again() -> None:
    data = encode(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG")
    assert decode_rgb(judge(data, ImageSettings(encode="jpeg")).data).min() == 255


CHOICES = [
    ImageSettings(),
    ImageSettings(orientation="apply", resize="crop", size_px=40, animated="reject"),
    ImageSettings(resize="longest", size_px=90, encode="webp", min_entropy=1.0),
]


@pytest.mark.parametrize("image_format", FORMATS)
@given(
    damage=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
    share=st.floats(0.2, 1),
    chosen=st.sampled_from(CHOICES),
)
@settings(max_examples=25, deadline=None)
def test_damage_is_accepted_or_rejected(
    image_format: str, damage: list[tuple[int, int]], share: float, chosen: ImageSettings
) -> None:
    data = bytearray(FILES[image_format][: int(share * len(FILES[image_format]))])
    for position, value in damage:
        # Half the hits are in the header, where they hurt.
        data[position % (len(data) if position % 2 else 300)] = value
    limited = dataclasses.replace(chosen, max_pixels=10**6)
    with contextlib.suppress(RejectedError):
        accepted = judge(bytes(data), limited)
        assert accepted.columns["phash"] == perceptual_hash(accepted.data)


_HANG = """
import ctypes, sys
from shard_tools.judge import watched
with watched(float(sys.argv[1])) as watch:
    for _ in range(3):
        assert watch(sorted, [2, 1], reverse=True) == [2, 1]
    print("alive", flush=True)
    watch(ctypes.PyDLL(None).sleep, 100)  # holds the interpreter as a hanging decoder does
"""


def test_a_call_that_never_returns_is_killed_even_while_it_holds_the_interpreter() -> None:
    child = subprocess.run(
        [sys.executable, "-c", _HANG, "0.2"], capture_output=True, text=True, timeout=60
    )
    assert (child.returncode, child.stdout) == (-signal.SIGALRM, "alive\n"), child.stderr


def test_time_between_calls_does_not_count() -> None:
    code = (
        "import time\nfrom shard_tools.judge import watched\n"
        "with watched(0.2) as watch:\n watch(len, '')\n time.sleep(0.6)\n watch(len, '')\n"
        "time.sleep(0.3)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_watch_returns_the_alarm_as_it_found_it() -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    timer_before = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(RejectedError), watched(5.0) as watch:
            watch(judge, b"", ImageSettings())
        started = time.monotonic()
        while not rung and time.monotonic() < started + 20:
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer_before)
    assert rung == [signal.SIGALRM]
