"""Whatever happens to a stored byte, verify says so, and where, and what was expected."""

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pipeline.decode import TRUNCATED
from pipeline.manifest import read_snapshot
from pipeline.shards import BLOCK_BYTES, read_index
from pipeline.store import Store, open_store
from shard_tools.verify import (
    DECODED_SAMPLES,
    ShardTask,
    ShardVerdict,
    samples_to_decode,
    verify_shard,
)
from tests.shard_tools.conftest import shard_tools, spawn_shard_tools, write_images
from tests.support.snapshots import write_snapshot


@pytest.fixture(scope="module")
def packed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    assert shard_tools("pack", str(images), str(folder), "--shard-rows", "40").code == 0
    return folder


def copy_of(packed: Path, target: Path) -> Path:
    for path in packed.rglob("*.*"):
        copy = target / path.relative_to(packed)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return target


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    return copy_of(packed, tmp_path / "copy")


def check(folder: Path, shard: int = 0, *, quick: bool = False) -> ShardVerdict:
    store = open_store(folder)
    row = read_snapshot(store).table.to_pylist()[shard]
    return verify_shard(ShardTask(dataset=store.url, quick=quick, **row))


def tar_of(folder: Path, shard: int = 0) -> Path:
    return folder / read_snapshot(open_store(folder)).tar[shard]


def flip(path: Path, position: int) -> None:
    body = bytearray(path.read_bytes())
    body[position] ^= 0x40
    path.write_bytes(body)


def test_a_sound_shard(folder: Path) -> None:
    verdict = check(folder)
    assert verdict.problem is None
    assert verdict.samples > 0


def test_first_and_last_shard_without_images(tmp_path: Path) -> None:
    write_images(tmp_path / "source", 2)
    for name in ("0.txt", "z.txt"):
        (tmp_path / "source" / name).write_text("not a picture")
    target = str(tmp_path / "set")
    assert shard_tools("pack", str(tmp_path / "source"), target, "--shard-rows", "1").code == 0
    verified = shard_tools("verify", target, "--json").json()
    assert verified["samples"] == verified["read_by_webdataset"] == 2


def cut_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(512))


@pytest.mark.parametrize("damage", [cut_end, append, Path.unlink])
@pytest.mark.parametrize("suffix", [".tar", ".parquet"])
@pytest.mark.parametrize("quick", [True, False])
def test_sizes(folder: Path, damage: Callable[[Path], None], suffix: str, quick: bool) -> None:
    path = tar_of(folder).with_suffix(suffix)
    damage(path)
    problem = check(folder, quick=quick).problem
    assert problem is not None
    assert str(path) in problem


def test_a_flipped_bit_in_an_index(folder: Path) -> None:
    flip(tar_of(folder).with_suffix(".parquet"), 100)
    assert "SHA-256" in str(check(folder).problem)


def test_a_flipped_bit_in_a_sample_through_the_command_line(folder: Path) -> None:
    tar = tar_of(folder, 1)
    body = tar.with_suffix(".parquet").read_bytes()
    row = [r for r in read_index(body, where="").to_pylist() if r["status"] == "ok"][3]
    flip(tar, row["offset"] + 5)
    finished = spawn_shard_tools("verify", str(folder))
    assert finished.code == 1
    [message] = [line for line in finished.err.splitlines() if line.startswith("error:")]
    assert "1 of 2 shards is damaged" in message
    assert f"{tar}: sample {row['key']} at byte {row['offset']}: CRC32C is 0x" in message
    assert f"recorded was {row['crc32c']:#010x}" in message
    assert "restore" in message
    assert "Traceback" not in finished.err
    assert shard_tools("verify", str(folder), "--quick").code == 0


def test_several_damaged_shards_are_all_named(folder: Path) -> None:
    for shard in (0, 1):
        flip(tar_of(folder, shard), 10)
    finished = shard_tools("verify", str(folder))
    assert finished.code == 1
    assert "2 of 2 shards are damaged" in finished.err
    assert all(str(tar_of(folder, shard)) in finished.err for shard in (0, 1))


# ----------------------------------------------------------------------------------------
# images that are none, and masks


def jpeg() -> bytes:
    output = io.BytesIO()
    Image.effect_noise((64, 48), 50).convert("RGB").save(output, "JPEG")
    return output.getvalue()


def verdict_of(store: Store, *, quick: bool = False) -> ShardVerdict:
    [row] = read_snapshot(store).table.to_pylist()
    return verify_shard(ShardTask(dataset=store.url, quick=quick, **row))


def test_some_samples_are_decoded_always_the_same(folder: Path) -> None:
    verdict = check(folder)
    assert verdict.decoded == DECODED_SAMPLES < verdict.samples
    store = open_store(folder)
    [task, *_] = (
        ShardTask(dataset=store.url, quick=False, **row)
        for row in read_snapshot(store).table.to_pylist()
    )
    index = read_index(store.get(task.index), where="")
    chosen = samples_to_decode(index, task.tar_hash)
    assert list(chosen) == list(samples_to_decode(index, task.tar_hash))
    assert chosen[index["key"][0].as_py()]["offset"] == BLOCK_BYTES


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": jpeg()[:-300]}, rf"sample \w+ does not decode: {TRUNCATED}.*mask"),
        ({"data": jpeg(), "width": 63}, r"has 64x48 pixels, recorded were 63x48"),
    ],
)
def test_an_image_that_is_not_what_the_index_says(
    tmp_path: Path, changed: dict[str, object], words: str
) -> None:
    store = open_store(tmp_path)
    rows = [{"source": "a", "data": jpeg(), "phash": 1}, {"source": "b", "phash": 2, **changed}]
    write_snapshot(store, [rows])
    problem = str(verdict_of(store).problem)
    assert re.search(words, problem)
    assert read_snapshot(store).tar[0] in problem
    assert verdict_of(store, quick=True).problem is None


def test_what_was_never_decoded_need_not_decode(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write_snapshot(store, [[{"source": "a", "data": jpeg()[:-300], "phash": None}]])
    assert verdict_of(store) == replace(verdict_of(store), problem=None, samples=1, decoded=0)


@pytest.mark.parametrize("quick", [True, False])
def test_a_missing_mask(tmp_path: Path, quick: bool) -> None:
    store = open_store(tmp_path)
    rows = [{"source": name, "data": jpeg(), "phash": 1} for name in "ab"]
    write_snapshot(store, [rows], masks={0: [True, False]})
    assert verdict_of(store, quick=quick).problem is None
    mask = read_snapshot(store).mask[0]
    store.delete(mask)
    assert mask in str(verdict_of(store, quick=quick).problem)


def test_a_damaged_mask(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    rows = [{"source": name, "data": jpeg(), "phash": 1} for name in "ab"]
    write_snapshot(store, [rows], masks={0: [True, False]})
    flip(tmp_path / read_snapshot(store).mask[0], 0)
    assert "the mask's SHA-256" in str(verdict_of(store).problem)
