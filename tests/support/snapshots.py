"""Data sets row by row: any source, label, reject, mask or damage, without packing anything."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.decode import guard_header
from pipeline.manifest import SNAPSHOT_SCHEMA, Snapshot, commit_snapshot, latest_version
from pipeline.shards import INDEX_SCHEMA, ShardWriter, encode_index, sample_key
from pipeline.store import Store

_PLAN = "5a4d91e2"


def write_snapshot(
    store: Store,
    shards: Sequence[Sequence[Mapping[str, Any]]],
    *,
    masks: Mapping[int, Sequence[bool]] | None = None,
    tars: Mapping[int, str] | None = None,
    note: str = "",
) -> Snapshot:
    """Commit the next version. A row is a mapping with `source` and either `data`, the image's
    bytes, or `reason`; anything else in it replaces what the index would say.

    `masks` holds, by shard, a bit for each row, `tars` what the snapshot calls a shard.
    """
    version = latest_version(store) + 1
    table = []
    first = 0
    for number, rows in enumerate(shards):
        bits = (masks or {}).get(number)
        table.append(_write_shard(store, version, number, first, rows, bits))
        table[-1]["tar"] = (tars or {}).get(number, table[-1]["tar"])
        first += len(rows)
    shards_table = pa.Table.from_pylist(table, SNAPSHOT_SCHEMA)
    return commit_snapshot(
        store, shards_table, version=version, attempt=f"attempt{version}", note=note
    )


def _write_shard(
    store: Store,
    version: int,
    number: int,
    first: int,
    rows: Sequence[Mapping[str, Any]],
    bits: Sequence[bool] | None,
) -> dict[str, Any]:
    name = f"data/{number % 256:02x}/{version:03d}-{number:05d}"
    index = []
    with store.writer(f"{name}.tar") as output:
        shard = ShardWriter(output)
        for place, row in enumerate(rows):
            index.append(_write_row(shard, sample_key(_PLAN, first + place), row))
        tar_hash = shard.finish()
    names = dict.fromkeys(["label", *(name for row in index for name in row)])
    body = encode_index(index, [name for name in names if name not in INDEX_SCHEMA.names])
    with store.writer(f"{name}.parquet") as writer:
        writer.write(body)
    is_kept = np.array([row["status"] == "ok" for row in index], bool)
    found: dict[str, Any] = {"tar": f"{name}.tar", "index": f"{name}.parquet", "tar_hash": tar_hash}
    found |= {"tar_bytes": output.info.size_bytes, "index_bytes": len(body), "rows": len(rows)}
    found |= {"tar_tag": output.info.tag, "index_sha256": hashlib.sha256(body).digest()}
    if bits is not None:
        found |= _write_mask(store, f"masks/{version:03d}-{number:05d}", bits)
        is_kept &= np.array(bits, bool)
    return found | {"kept": int(is_kept.sum())}


def _write_row(shard: ShardWriter, key: str, row: Mapping[str, Any]) -> dict[str, Any]:
    given = {"key": key, **row}
    data = given.pop("data", None)
    if data is None:
        return {"status": "rejected", **given}
    entry = shard.add(key, "jpg", data)
    header = guard_header(data)
    measured = {"width": header.width_px, "height": header.height_px, "format": header.format}
    located = {name: getattr(entry, name) for name in ("offset", "length", "crc32c", "sha256")}
    return {"status": "ok", **measured, **located, **given}


def _write_mask(store: Store, key: str, bits: Sequence[bool]) -> dict[str, Any]:
    mask = np.packbits(np.array(bits, bool), bitorder="little").tobytes()
    with store.writer(key) as writer:
        writer.write(mask)
    return {"mask": key, "mask_sha256": hashlib.sha256(mask).digest()}
