"""The command line from end to end, against a directory and a real S3 server."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.manifest import read_snapshot
from pipeline.shards import kept_rows, read_index, read_samples
from pipeline.store import Store, open_store
from shard_tools.__main__ import _COMMANDS
from tests.shard_tools.conftest import Finished, shard_tools, spawn_shard_tools, write_images


def assert_fails(finished: Finished, code: int, *words: str) -> None:
    """One message on stderr that holds the words, no traceback, and the exit code."""
    assert finished.code == code, finished.err
    errors = [line for line in finished.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "Traceback" not in finished.err
    for word in words:
        assert word in errors[0]


def all_rows(store: Store) -> list[dict[str, object]]:
    """The index rows of the newest snapshot, every sample checked on the way."""
    snapshot = read_snapshot(store)
    rows = []
    for shard in range(len(snapshot)):
        where, size = snapshot.tar[shard], int(snapshot.tar_bytes[shard])
        index = read_index(store.get(snapshot.index[shard]), where=where)
        stream = store.reader(where, size, tag=snapshot.tar_tag[shard])
        samples = read_samples(stream, index, where=where, shard_hash=snapshot.tar_hash[shard])
        assert [s.key for s in samples] == kept_rows(index, None)["key"].to_pylist()
        assert len(index) == snapshot.rows[shard]
        rows += index.to_pylist()
    return rows


def test_pack_verify_stats(images: Path, dataset: str) -> None:
    packed = spawn_shard_tools(
        "pack", str(images), dataset, "--shard-bytes", "150kB", "--json"
    ).json()
    assert packed["packed"] == packed["snapshot_images"] == 60
    assert packed["rejected"] == {"not an image": 2, "truncated": 1}
    assert packed["snapshot"] == 1
    assert packed["images_per_s"] > 0

    rows = all_rows(open_store(dataset))
    assert [row["source"] for row in rows] == sorted(f"file://{p}" for p in images.rglob("*.*"))
    assert len({row["key"] for row in rows}) == len(rows) == 63
    reasons = {str(r["source"]).rpartition("/")[2]: r["reason"] for r in rows if r["reason"]}
    assert reasons == {
        "cut.jpg": "truncated",
        "empty.png": "not an image",
        "notes.txt": "not an image",
    }
    assert {r["label"] for r in rows} == {"astronaut", "chelsea", "coffee", None}
    good = [r for r in rows if r["status"] == "ok"]
    assert all((r["width"], r["height"]) == (96, 96) and r["phash"] is not None for r in good)
    assert len({r["sha256"] for r in good}) == 60

    verified = spawn_shard_tools("verify", dataset, "--json").json()
    assert verified["samples"] == 60
    assert 0 < verified["read_by_webdataset"] < 60
    assert shard_tools("verify", dataset, "--quick").code == 0

    stats = shard_tools("stats", dataset, "--json").json()
    assert stats["images"] == stats["kept"] == 60
    assert stats["labels"] == {"astronaut": 20, "chelsea": 20, "coffee": 20}
    assert sum(stats["formats"].values()) == 60
    assert stats["quantiles"]["width"] == [96] * 7
    assert stats["image_bytes"] == packed["packed_bytes"]


def test_what_a_person_sees(images: Path, dataset: str) -> None:
    packed = shard_tools("pack", str(images), dataset)
    assert packed.out.splitlines()[1:] == [
        "rejected    3: not an image 2, truncated 1",
        "snapshot    version 1: 60 images in 1 shard",
    ]
    again = shard_tools("pack", str(images), dataset)
    assert "packed      0 images" in again.out
    assert "1 of 1 shard packed before" in again.out
    assert "version 1" in again.out
    verified = shard_tools("verify", dataset)
    assert "sound       60 images in 1 shard" in verified.out
    assert "webdataset  reads 60 samples" in verified.out
    assert "labels      3: astronaut 20, chelsea 20, coffee 20" in shard_tools("stats", dataset).out


def test_step_by_step(images: Path, dataset: str) -> None:
    planned = shard_tools("plan", str(images), dataset, "--shard-rows", "25")
    assert "63 files" in planned.out
    assert "3 shards" in planned.out
    assert_fails(shard_tools("seal", dataset), 1, "3 of 3 units", "(0, 1, 2)", "shard_tools pack")
    assert_fails(shard_tools("stats", dataset), 1, "has no snapshot", "shard_tools pack")
    assert "seal" in shard_tools("pack", dataset).out
    assert "version 1: 60 images in 3 shards" in shard_tools("seal", dataset).out
    assert "sealed already" in shard_tools("seal", dataset).out
    assert shard_tools("verify", dataset).code == 0


def test_a_data_set_grows_by_plans(images: Path, dataset: str, tmp_path: Path) -> None:
    write_images(tmp_path / "more", 5)
    assert shard_tools("pack", str(images), dataset).code == 0
    packed = shard_tools("pack", str(tmp_path / "more"), dataset, "--json").json()
    assert (packed["snapshot"], packed["snapshot_images"]) == (2, 65)
    assert len(all_rows(open_store(dataset))) == 68
    assert read_snapshot(open_store(dataset), 1).num_kept == 60

    write_images(tmp_path / "more", 6)
    again = shard_tools("pack", str(tmp_path / "more"), dataset)
    assert_fails(again, 2, f"holds file://{tmp_path}/more already", "5 inputs (now 6")


def test_from_s3_to_s3(images: Path, s3_url: str) -> None:
    source = open_store(f"{s3_url}/source")
    for path in images.rglob("*.*"):
        source.put_if_absent(str(path.relative_to(images)), path.read_bytes())
    packed = shard_tools("pack", source.url, f"{s3_url}/set", "--json").json()
    assert packed["packed"] == 60
    rows = all_rows(open_store(f"{s3_url}/set"))
    assert rows[0]["source"] == f"{s3_url}/source/astronaut/00000.jpg"
    assert rows[0]["label"] == "astronaut"


READ_AS_ANYBODY_WOULD = """
import sys, webdataset
for sample in webdataset.WebDataset(sys.argv[1], shardshuffle=False):
    print(sample["__key__"], sum(len(sample.get(e, b"")) for e in ("jpg", "png", "webp")))
"""


def test_a_plain_webdataset_reads_every_sample(images: Path, tmp_path: Path) -> None:
    assert shard_tools("pack", str(images), str(tmp_path / "set")).code == 0
    [shard] = (tmp_path / "set" / "data").rglob("*.tar")
    child = subprocess.run(
        [sys.executable, "-c", READ_AS_ANYBODY_WOULD, f"file:{shard}"],
        capture_output=True,
        text=True,
        check=True,
    )
    good = [r for r in all_rows(open_store(tmp_path / "set")) if r["status"] == "ok"]
    assert child.stdout.splitlines() == [f"{r['key']} {r['length']}" for r in good]


# ----------------------------------------------------------------------------------------
# bad input


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    finished = shard_tools("pack", str(tmp_path / "empty"), str(tmp_path / "set"))
    assert_fails(finished, 2, f"{tmp_path}/empty: no files there")
    assert not list((tmp_path / "set").rglob("*.*"))


def test_an_empty_prefix(s3_url: str) -> None:
    assert_fails(shard_tools("pack", f"{s3_url}/empty", f"{s3_url}/set"), 2, "no files there")
    assert list(open_store(s3_url).list()) == []


def test_missing_places(tmp_path: Path, s3_url: str) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert_fails(shard_tools("pack", nowhere, str(tmp_path / "set")), 1, nowhere)
    for place in (nowhere, s3_url):
        for name in ("verify", "stats"):
            assert_fails(shard_tools(name, place), 1, place, "has no snapshot", "check the URL")
        for name in ("pack", "seal"):
            assert_fails(shard_tools(name, place), 2, place, "has no plan")
    assert not (tmp_path / "nowhere").exists()


def test_wrong_credentials(images: Path, s3_url: str) -> None:
    for arguments in (["pack", str(images), s3_url], ["verify", s3_url]):
        finished = spawn_shard_tools(*arguments, AWS_SECRET_ACCESS_KEY="wrong")
        assert_fails(finished, 1, s3_url, "check AWS_ACCESS_KEY_ID")
    assert list(open_store(s3_url).list()) == []


def test_a_source_that_holds_the_data_set(images: Path) -> None:
    assert_fails(shard_tools("pack", str(images), str(images / "set")), 2, "lies inside the source")


def test_a_source_inside_the_data_set(images: Path) -> None:
    finished = shard_tools("pack", str(images / "coffee"), str(images))
    assert_fails(finished, 2, f"the source file://{images}/coffee lies inside file://{images}")


def test_a_source_that_is_one_image(images: Path, tmp_path: Path) -> None:
    picture = min((images / "coffee").glob("*.png"))
    packed = shard_tools("pack", str(picture), str(tmp_path / "set"), "--json").json()
    assert (packed["packed"], packed["rejected"]) == (1, {})


def test_settings_without_a_source(tmp_path: Path) -> None:
    assert_fails(shard_tools("pack", str(tmp_path), "--shard-bytes", "1MB"), 2, "give SRC")


def test_no_image_at_all(tmp_path: Path) -> None:
    """The rejects are kept all the same: what was wrong may pass, and be tried again."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("not a picture")
    finished = shard_tools("pack", str(tmp_path / "notes"), str(tmp_path / "set"))
    assert_fails(finished, 2, "has no image", f"{tmp_path}/set", "not an image 1", "retry")
    assert read_snapshot(open_store(tmp_path / "set")).num_kept == 0
    Image.new("RGB", (9, 9)).save(tmp_path / "notes" / "a.txt", "PNG")
    again = ("retry", str(tmp_path / "set"), "--reason", "not an image", "--json")
    assert shard_tools(*again).json()["packed"] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["pack"],
        ["pak", "a", "b"],
        ["pack", "a", "b", "--workers", "0"],
        ["pack", "a", "b", "--shard-bytes", "many"],
        ["stats", "gs://bucket/prefix"],
        ["pack", "a", "b", "--plan", "c"],
    ],
)
def test_bad_usage(arguments: list[str]) -> None:
    finished = shard_tools(*arguments)
    assert finished.code == 2
    assert "Traceback" not in finished.err


@pytest.mark.parametrize("name", ["", *_COMMANDS])
def test_help(name: str) -> None:
    finished = shard_tools(*name.split(), "--help")
    assert finished.code == 0
    assert "exit codes: 0 done, 1 failed" in finished.out
