"""Small packed data sets for tests, written with pipeline's own shard writer."""

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.manifest import SNAPSHOT_SCHEMA, commit_snapshot, new_attempt
from pipeline.shards import ShardWriter, encode_index, sample_key
from pipeline.store import open_store


def pictures(count: int, *, seed: int = 0, size_px: tuple[int, int] = (40, 90)) -> list[bytes]:
    """JPEGs of smooth noise, all different, of many sizes."""
    rng = np.random.default_rng(seed)
    encoded = []
    for _ in range(count):
        width, height = rng.integers(*size_px, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        body = io.BytesIO()
        coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(body, "JPEG")
        encoded.append(body.getvalue())
    return encoded


def write_dataset(
    url: str, images: Sequence[bytes], *, labels: Sequence[str] | None = None, per_shard: int = 16
) -> list[str]:
    """Pack `images` under `url` as version 1; returns the keys in the order of the samples."""
    import hashlib

    store = open_store(url)
    shards, keys = [], []
    for first in range(0, len(images), per_shard):
        tar, index = f"data/00/{first:06d}.tar", f"data/00/{first:06d}.parquet"
        rows = []
        with store.writer(tar) as output:
            shard = ShardWriter(output)
            for number in range(first, min(first + per_shard, len(images))):
                keys.append(sample_key("0123456789", number))
                entry = shard.add(keys[-1], "jpg", images[number])
                rows.append(
                    {
                        "key": keys[-1],
                        "offset": entry.offset,
                        "length": entry.length,
                        "crc32c": entry.crc32c,
                        "sha256": entry.sha256,
                        "source": f"test:{number}",
                        "status": "ok",
                        "label": labels[number] if labels else None,
                    }
                )
            tar_hash = shard.finish()
        body = encode_index(rows, ["label"])
        store.put_if_absent(index, body)
        shards.append(
            {
                "tar": tar,
                "index": index,
                "tar_bytes": output.info.size_bytes,
                "index_bytes": len(body),
                "tar_tag": output.info.tag,
                "tar_hash": tar_hash,
                "index_sha256": hashlib.sha256(body).digest(),
                "rows": len(rows),
                "kept": len(rows),
            }
        )
    table = pa.Table.from_pylist(shards, SNAPSHOT_SCHEMA)
    commit_snapshot(store, table, version=1, attempt=new_attempt())
    return keys
