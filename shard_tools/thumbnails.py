"""Small pictures of samples, straight from their shards; what cannot be shown says why.

The pixels are those that training sees: decoded by pipeline.decode, EXIF orientation unapplied.
"""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pipeline.decode import decode_rgb
from pipeline.errors import ObjectChangedError, ObjectMissingError, SampleError
from pipeline.manifest import Snapshot
from pipeline.shards import crc32c
from pipeline.store import Store, resolve

THUMBNAIL_PX = 152  # the longer side
MAX_THUMBNAIL_BYTES = 14_000  # of noise; photographs take a third of it
COLUMNS = ("key", "offset", "length", "crc32c", "width", "height", "format", "source", "label")
_QUALITIES = (82, 60, 35, 10)
_THREADS = 4  # each may hold the pixels of one image of the largest size


@dataclass(frozen=True)
class Pick:
    """A sample to show: its shard and, by name, what its index row says (of COLUMNS)."""

    shard: int
    row: dict[str, Any]


@dataclass(frozen=True)
class Thumbnail:
    """A JPEG of the picked sample, or why there is none."""

    pick: Pick
    jpeg: bytes = b""
    width_px: int = 0
    height_px: int = 0
    problem: str = ""


def thumbnails(dataset: Store, snapshot: Snapshot, picks: Sequence[Pick]) -> Iterator[Thumbnail]:
    """A thumbnail for each pick, in order. Raises StoreError if the store is out of reach."""
    with ThreadPoolExecutor(_THREADS) as threads:
        yield from threads.map(lambda pick: _thumbnail(dataset, snapshot, pick), picks)


def _thumbnail(dataset: Store, snapshot: Snapshot, pick: Pick) -> Thumbnail:
    try:
        image = _decode(_read(dataset, snapshot, pick))
    except SampleError as error:
        return Thumbnail(pick, problem=str(error))
    except ObjectMissingError:
        return Thumbnail(pick, problem="the shard is missing")
    except ObjectChangedError:
        return Thumbnail(pick, problem="the shard is not the recorded one")
    return Thumbnail(pick, _encode(image), image.width, image.height)


def _read(dataset: Store, snapshot: Snapshot, pick: Pick) -> bytes:
    row = pick.row
    store, key = resolve(dataset, snapshot.tar[pick.shard])
    tag = snapshot.tar_tag[pick.shard]
    data = store.get_range(key, row["offset"], row["length"], tag=tag)
    if (crc := crc32c(data)) != row["crc32c"]:
        raise SampleError("damaged", f"CRC32C is {crc:#010x}, recorded was {row['crc32c']:#010x}")
    return data


def _decode(data: bytes) -> Image.Image:
    image = Image.fromarray(decode_rgb(data, max_bytes=len(data)))
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return image


def _encode(image: Image.Image) -> bytes:
    for quality in _QUALITIES:
        body = io.BytesIO()
        image.save(body, "JPEG", quality=quality, optimize=True)
        if body.tell() <= MAX_THUMBNAIL_BYTES:
            break
    return body.getvalue()
