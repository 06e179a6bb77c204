"""The command line over what the open web offers: URL lists, tars, shards of others."""

import hashlib
import io
import json
import os
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.fetch import RawSample, SampleReader
from pipeline.manifest import Snapshot, read_snapshot
from pipeline.shards import read_index
from pipeline.store import open_store
from pipeline.telemetry import Telemetry
from shard_tools.plan import PackSettings, make_plan, plan_inputs, read_unit
from shard_tools.retry import plan_retry
from shard_tools.sources import Kind
from tests.shard_tools.conftest import shard_tools, spawn_shard_tools
from tests.support.dataset import pictures
from tests.support.http_server import HttpServer, Page

QUICK = ("--allow-private", "--retries", "0", "--timeout", "2", "--workers", "1", "--json")


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return pictures(8)


@pytest.fixture
def web(images: list[bytes]) -> Iterator[HttpServer]:
    pages: dict[str, bytes | list[Page]] = {f"/{n}.jpg": body for n, body in enumerate(images)}
    pages["/late.jpg"] = [Page(images[0], wait_s=5), Page(images[0])]
    pages["/robots.jpg"] = [Page(images[0], headers=[("X-Robots-Tag", "noai")])]
    with HttpServer(pages) as server:
        yield server


def rows_of(dataset: Path | str, snapshot: Snapshot | None = None) -> list[dict[str, Any]]:
    store = open_store(dataset)
    snapshot = snapshot or read_snapshot(store)
    indexes = [read_index(store.get(key), where=key) for key in snapshot.index]
    return [row for index in indexes for row in index.to_pylist()]


def test_from_urls_to_a_snapshot(web: HttpServer, images: list[bytes], tmp_path: Path) -> None:
    lines = [
        {"url": web.url("/0.jpg"), "caption": "zéro", "label": "a"},
        {"url": web.url("/gone.jpg"), "caption": "one"},
        {"url": web.url("/late.jpg").replace("//", "//me:word@"), "caption": "two"},
        {"url": web.url("/robots.jpg")},
        {"url": web.url("/3.jpg?sig=secret&se=1&sp=r&size=2")},
        {"url": "file:///etc/passwd"},
        {"url": None},
    ]
    listing = tmp_path / "in.jsonl"
    listing.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    web.add("/3.jpg?sig=secret&se=1&sp=r&size=2", Page(images[3]))
    packed = shard_tools("pack", str(listing), str(tmp_path / "set"), *QUICK).json()
    assert packed["packed"] == 2
    assert packed["rejected"] == {
        "http 404": 1, "timeout": 1, "opted out": 1, "bad url": 2
    }  # fmt: skip
    rows = rows_of(tmp_path / "set")
    assert [row["source"] for row in rows] == [
        web.url("/0.jpg"),
        web.url("/gone.jpg"),
        web.url("/late.jpg"),
        web.url("/robots.jpg"),
        web.url("/3.jpg?size=2"),
        "file:///etc/passwd",
        "",
    ]
    assert [row["caption"] for row in rows[:3]] == ["zéro", "one", "two"]
    assert rows[0]["label"] == "a"
    for info in (store := open_store(tmp_path / "set")).list():
        assert not any(secret in store.get(info.key) for secret in (b"word", b"secret"))
    again = shard_tools("retry", str(tmp_path / "set"), "--reason", "timeout", *QUICK).json()
    assert (again["packed"], again["rejected"], again["snapshot"]) == (1, {}, 2)
    assert [row["caption"] for row in rows_of(tmp_path / "set")[7:]] == ["two"]
    stats = shard_tools("stats", str(tmp_path / "set"), "--json").json()
    assert stats["images"] == 3
    assert stats["rejected"] == {"bad url": 2, "http 404": 1, "opted out": 1}
    still = shard_tools("retry", str(tmp_path / "set"), "--reason", "http 404", *QUICK).json()
    assert (still["packed"], still["rejected"], still["snapshot"]) == (0, {"http 404": 1}, 3)
    web.add("/gone.jpg", Page(images[1]))
    found = shard_tools("retry", str(tmp_path / "set"), "--reason", "http 404", *QUICK).json()
    assert (found["packed"], found["snapshot"]) == (1, 4)
    nothing = shard_tools("retry", str(tmp_path / "set"), "--reason", "timeout", *QUICK)
    assert (nothing.code, "no rejects with the reason timeout" in nothing.err) == (2, True)
    assert shard_tools("verify", str(tmp_path / "set"), "--json").json()["samples"] == 4


def test_a_list_that_changes_under_its_plan(web: HttpServer, tmp_path: Path) -> None:
    """A signature is not in the plan, so the list must still be there, and say the same."""
    listing = tmp_path / "in.txt"
    listing.write_text(web.url("/0.jpg?sig=a&se=1&sp=r\n"))
    assert shard_tools("plan", str(listing), str(tmp_path / "set")).code == 0
    listing.write_text(web.url("/1.jpg?sig=a&se=1&sp=r\n"))
    finished = shard_tools("pack", str(tmp_path / "set"), *QUICK)
    assert finished.code == 2
    assert "in.txt has changed since the plan was made: its row 0 was" in finished.err


def test_what_a_list_says_beside_the_url(web: HttpServer, tmp_path: Path) -> None:
    """No secret of it is kept anywhere, and a row that is none ends as a reject with its text."""
    secret = "https://me:word@h/t.jpg?X-Amz-Signature=secret&w=1"
    lines = [
        json.dumps({"url": web.url("/0.jpg"), "thumb": secret, "Label": secret, "label": secret}),
        '{"url": "https://me:word@h/broken',
        json.dumps({"url": web.url("/1.jpg#top"), "text": "\ud800 half"}),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    dataset = str(tmp_path / "set")
    packed = shard_tools("pack", str(tmp_path / "in.jsonl"), dataset, *QUICK).json()
    assert (packed["packed"], packed["rejected"]) == (2, {"bad url": 1})
    first, bad, last = rows_of(dataset)
    kept = "https://h/t.jpg?w=1"
    assert (first["thumb"], first["input_Label"], first["label"]) == (kept, kept, kept)
    assert bad["bad_row"].startswith("line 2: ")
    assert last["text"] == "? half"
    for info in (store := open_store(dataset)).list():
        assert not any(word in store.get(info.key) for word in (b"word", b"secret"))


@pytest.mark.parametrize("kind", ["tars", "adopt"])
def test_one_tar_that_is_gone_does_not_hold_up_the_rest(
    tars: Path, tmp_path: Path, kind: Kind
) -> None:
    dataset = str(tmp_path / "set")
    make_plan(str(tars), open_store(dataset), PackSettings(), kind=kind)
    (tars / "a.tar").unlink()
    os.utime(tars / "c.tar", (1, 1))
    arguments = ("pack", dataset, "--seal", "--workers", "1", "--json")
    packed = shard_tools(*arguments).json()
    assert packed["packed"] == 2
    assert packed["rejected"] == {"missing": 1, "changed": 1, "not an image": 1}
    rows = rows_of(dataset)
    assert rows[0]["source"] == f"file://{tars}/a.tar"
    assert len({row["key"] for row in rows}) == len(rows)


def test_a_gzipped_tar_is_refused_before_anything_is_adopted(tars: Path, tmp_path: Path) -> None:
    (tars / "d.tar.gz").write_bytes(b"")
    refused = shard_tools("adopt", str(tars), str(tmp_path / "set"), "--workers", "1")
    assert (refused.code, "d.tar.gz: a gzipped tar cannot be adopted" in refused.err) == (2, True)
    assert not list((tmp_path / "set").rglob("plan.json"))


def write_tar(path: Path, members: dict[str, bytes], *, keep_bytes: int | None = None) -> None:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(body.getvalue()[:keep_bytes])


@pytest.fixture
def tars(images: list[bytes], tmp_path: Path) -> Path:
    """A WebDataset shard, a plain tar with folders, and one that was cut."""
    folder = tmp_path / "tars"
    write_tar(
        folder / "a.tar",
        {"0.jpg": images[0], "0.cls": b"7", "0.txt": b"zero", "1.jpg": images[1], "1.txt": b"one"},
    )
    write_tar(folder / "b.tar", {"cat/x.1.jpg": images[2], "cat/x.2.jpg": images[3], "y": b"no"})
    cut = 512 + len(images[4]) + -len(images[4]) % 512 + 512 + 100
    write_tar(folder / "c.tar", {"4.jpg": images[4], "5.jpg": images[5]}, keep_bytes=cut)
    return folder


def test_tars_are_packed_anew(tars: Path, images: list[bytes], tmp_path: Path) -> None:
    dataset = str(tmp_path / "set")
    packed = shard_tools("pack", str(tars), dataset, "--workers", "1", "--json").json()
    assert packed["packed"] == 5
    assert packed["rejected"] == {"not an image": 1, "truncated": 1}
    rows = rows_of(dataset)
    assert len({row["key"] for row in rows}) == len(rows)
    assert [row["label"] for row in rows[:4]] == ["7", None, "cat", "cat"]
    assert [row["txt"] for row in rows[:2]] == ["zero", "one"]
    assert rows[2]["source"] == f"file://{tars}/b.tar#cat/x.1.jpg"
    assert shard_tools("verify", dataset, "--json").json()["samples"] == 5


def test_large_tars_are_cut_into_shards(images: list[bytes], tmp_path: Path) -> None:
    members = {f"{number:03d}.jpg": images[number % 8] for number in range(60)}
    write_tar(tmp_path / "one.tar", members)
    dataset = str(tmp_path / "set")
    settings = ("--shard-bytes", "30kB", "--workers", "1", "--json")
    packed = shard_tools("pack", str(tmp_path / "one.tar"), dataset, *settings).json()
    assert packed["packed"] == 60
    assert packed["units"] > 2
    sources = [row["source"].rpartition("#")[2] for row in rows_of(dataset)]
    assert sources == list(members)


@pytest.mark.parametrize("place", ["file", "s3"])
def test_adopted_shards_stay_where_they_are(
    tars: Path, images: list[bytes], tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    source, dataset = str(tars), str(tmp_path / "set")
    if place == "s3":
        url = request.getfixturevalue("s3_url")
        source, dataset = f"{url}/theirs", f"{url}/ours"
        for tar in tars.iterdir():
            open_store(source).put_if_absent(tar.name, tar.read_bytes())
    adopted = shard_tools("adopt", source, dataset, "--workers", "1", "--json").json()
    assert (adopted["packed"], adopted["units"]) == (5, 3)
    assert not [info for info in open_store(dataset).list() if info.key.endswith(".tar")]
    assert shard_tools("verify", dataset, "--json").json()["samples"] == 5
    store = open_store(dataset)
    snapshot = read_snapshot(store)
    assert all("://" in tar for tar in snapshot.tar)
    rows = [row for row in rows_of(dataset) if row["status"] == "ok"]
    assert [row["txt"] for row in rows[:2]] == ["zero", "one"]
    samples = SampleReader(store, snapshot, Telemetry()).read(0, 4)
    assert [sample.data for sample in samples if isinstance(sample, RawSample)] == images[:5]


def test_pixels_are_changed_on_demand(images: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, body in enumerate(images):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(body)
    settings = ("--resize", "shortest", "--size", "24", "--encode", "webp", "--workers", "1")
    dataset = str(tmp_path / "set")
    assert shard_tools("pack", str(tmp_path / "in"), dataset, *settings).code == 0
    store = open_store(dataset)
    tar = read_snapshot(store).tar[0]
    for row in rows_of(dataset):
        stored = store.get_range(tar, row["offset"], row["length"])
        assert Image.open(io.BytesIO(stored)).size == (row["width"], row["height"])
        assert (min(row["width"], row["height"]), row["format"]) == (24, "WEBP")
        assert int(row["original_width"]) >= 40


def only_large(pixels: Any, columns: Any) -> bool:
    return bool(columns["width"] > 64)


def test_a_stored_plan_never_chooses_the_code(images: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, body in enumerate(images):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(body)
    name = f"{__name__}.only_large"
    dataset = str(tmp_path / "set")
    assert shard_tools("plan", str(tmp_path / "in"), dataset, "--filter", name).code == 0
    refused = shard_tools("pack", dataset, "--workers", "1")
    assert refused.code == 2
    assert f"if you trust it, give --filter {name}" in refused.err
    done = ("pack", dataset, "--workers", "1", "--seal", "--json", "--filter", name)
    packed = shard_tools(*done).json()
    assert packed["packed"] > 0
    assert packed["rejected"] == {f"filtered:{name}": 8 - packed["packed"]}


def test_duplicates_in_a_shard(images: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(4):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(images[number % 2])
    arguments = ("pack", str(tmp_path / "in"), str(tmp_path / "set"), "--workers", "1", "--json")
    packed = shard_tools(*arguments, "--unique").json()
    assert (packed["packed"], packed["rejected"]) == (2, {"duplicate": 2})


def crash_on_narrow(pixels: Any, columns: Any) -> bool:
    """Stands for a decoder that dies of an image."""
    if columns["width"] < 45:
        os.kill(os.getpid(), signal.SIGSEGV)
    return True


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_decoder_that_dies_takes_only_its_image(tmp_path: Path, engine: str) -> None:
    """… on either engine, and what is packed is the same on both."""
    (tmp_path / "in").mkdir()
    images = pictures(30)
    narrow = 0
    for number, body in enumerate(images):
        narrow += Image.open(io.BytesIO(body)).width < 45
        (tmp_path / "in" / f"{number:02d}.jpg").write_bytes(body)
    name = f"{__name__}.crash_on_narrow"
    arguments = ("--shard-rows", "15", "--workers", "2", "--filter", name, "--json")
    pack = ("pack", str(tmp_path / "in"), str(tmp_path / "set"), *arguments)
    packed = spawn_shard_tools(*pack, "--engine", engine).json()
    assert packed["rejected"] == {"decoder died": narrow}
    assert packed["packed"] == len(images) - narrow
    assert 0 < narrow < 20
    digests = [row["sha256"] for row in rows_of(tmp_path / "set") if row["status"] == "ok"]
    assert digests == [
        hashlib.sha256(body).digest() for body in images if Image.open(io.BytesIO(body)).width >= 45
    ]


def test_an_interrupted_retry_is_not_sealed_twice(web: HttpServer, tmp_path: Path) -> None:
    """Packed but not sealed, then tried again with others: sealing both would hold images twice."""
    dataset = str(tmp_path / "set")
    (tmp_path / "in.txt").write_text(f"{web.url('/0.jpg')}\n{web.url('/late')}\n{web.url('/x')}\n")
    assert shard_tools("pack", str(tmp_path / "in.txt"), dataset, *QUICK).code == 0
    store = open_store(dataset)
    [left] = plan_retry(store, read_snapshot(store), ["http 404"])
    web.add("/late", Page(web.answer("/0.jpg").body))
    assert shard_tools("pack", dataset, "--plan", left.name, *QUICK).code == 0
    other = plan_inputs(
        read_unit(store, left.name, 0)[:1],
        store,
        left.settings,
        kind="urls",
        source="retry:by somebody else",
    )
    assert shard_tools("pack", dataset, "--plan", other.name, "--seal", *QUICK).code == 0
    refused = shard_tools("seal", dataset, "--plan", left.name)
    assert refused.code == 2
    assert "another try of 2 rejects, of which only 1 still are" in refused.err
    assert read_snapshot(store).num_kept == 2


def test_a_tar_that_goes_before_it_is_adopted(tars: Path, tmp_path: Path) -> None:
    dataset = str(tmp_path / "set")
    store = open_store(dataset)
    plan = make_plan(str(tars), store, PackSettings(), kind="adopt")
    (tars / "b.tar").unlink()
    done = ("pack", dataset, "--plan", plan.name, "--seal", "--workers", "1", "--json")
    packed = shard_tools(*done).json()
    assert (packed["packed"], packed["rejected"]) == (3, {"missing": 1, "truncated": 1})
    assert shard_tools("verify", dataset, "--json").json()["samples"] == 3
