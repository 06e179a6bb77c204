"""Sources: every file once, sorted, whatever the listing's order and however the URL is spelt."""

import json
import resource
import zipfile
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import ObjectMissingError, UsageError
from pipeline.store import find_file, list_files, read_file
from shard_tools.sources import (
    MAX_GZIP_SPANS,
    MERGED_RUNS,
    Kind,
    PlannedInput,
    kind_of,
    label_of,
    planned_inputs,
    sorted_files,
    source_url,
)
from tests.shard_tools.test_tars import make_tar
from tests.support.http_server import HttpServer, Page


@pytest.mark.parametrize("run_files", [1, 3, 100])
def test_sorting_in_runs(tmp_path: Path, run_files: int) -> None:
    paths = ["a/z", "a-b", "a/b/c", "é", "b", "Z/1", "0"]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert [f.path for f in sorted_files(str(tmp_path), run_files=run_files)] == sorted(paths)


def test_nothing_to_pack(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no files there"):
        list(sorted_files(str(tmp_path)))
    with pytest.raises(ObjectMissingError, match="nowhere"):
        list(sorted_files(str(tmp_path / "nowhere")))


def test_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / b"\xff.jpg".decode(errors="surrogateescape")).touch()
    with pytest.raises(UsageError, match="not UTF-8"):
        list(sorted_files(str(tmp_path)))


def test_urls_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_url("photos/") == f"file://{tmp_path}/photos"
    assert source_url("s3://bucket/photos/") == "s3://bucket/photos"
    assert source_url("s3://bucket//photos//a/") == "s3://bucket/photos/a"
    for spelling in (
        "./photos",
        "a/../photos",
        f"{tmp_path}//photos",
        f"file://{tmp_path}/./photos",
    ):
        assert source_url(spelling) == f"file://{tmp_path}/photos"
    assert [label_of(path) for path in ("cat/1.jpg", "cat/black/2.jpg", "3.jpg")] == [
        "cat",
        "cat",
        None,
    ]


def test_more_runs_than_may_be_open(tmp_path: Path) -> None:
    """4200 runs of one file need three levels, with a file open for each of 64 runs."""
    paths = sorted(str(number) for number in range(MERGED_RUNS**2 + 104))
    for path in paths:
        (tmp_path / path).touch()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 80, before[1])
    )
    try:
        found = [file.path for file in sorted_files(str(tmp_path), run_files=1)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found == paths


def plan(source: Path | str, kind: Kind, *, guessed: bool = False) -> list[PlannedInput]:
    inputs = planned_inputs(str(source), kind, url_column=None, span_bytes=10**4, guessed=guessed)
    return list(inputs)


# ----------------------------------------------------------------------------------------
# kinds


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.tar", "b.TGZ", "c.tar.gz"], "tars"),
        (["a.csv", "b.parquet", "c.JSONL.gz"], "urls"),
        (["a.jpg", "b.txt", "c"], "files"),
    ],
)
def test_the_kind_follows_from_the_names(tmp_path: Path, names: list[str], kind: Kind) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert kind_of(str(tmp_path)) == kind


@pytest.mark.parametrize("other", ["z.jpg", "z.csv", "z.txt"])
def test_a_mixture_is_no_guess(tmp_path: Path, other: str) -> None:
    (tmp_path / "a.tar").write_bytes(make_tar([("1.jpg", b"x")]))
    (tmp_path / other).write_text("url\n")
    with pytest.raises(UsageError, match=r"and also .*\.(tar|jpg|csv|txt): say by --kind"):
        kind_of(str(tmp_path))
    with pytest.raises(UsageError, match=rf"tars and also .*{other}: say by --kind"):
        plan(tmp_path, "tars", guessed=True)
    assert [item.source for item in plan(tmp_path, "tars")] == [f"file://{tmp_path}/a.tar"]


def test_nothing_of_the_kind(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UsageError, match="no tar there, but 1 other files"):
        plan(tmp_path, "tars")


def test_gzipped_tars_that_no_plan_takes(tmp_path: Path) -> None:
    """They cannot be cut, nor read by place: told before anything is packed."""
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    assert len(plan(tmp_path, "tars")) == 1
    with pytest.raises(UsageError, match=r"a\.tar\.gz: a gzipped tar cannot be adopted"):
        plan(tmp_path, "adopt")
    (tmp_path / "a.tar.gz").write_bytes(bytes(MAX_GZIP_SPANS * 10**4 + 1))
    with pytest.raises(UsageError, match=r"a\.tar\.gz: .*unpack it first"):
        plan(tmp_path, "tars")


# ----------------------------------------------------------------------------------------
# origins


def test_a_list_is_read_again_only_for_secrets(tmp_path: Path) -> None:
    urls = ["https://h/1#top", "https://h/2?sig=x", "https://me:a#b@h/3", "https://h/4?w=1"]
    (tmp_path / "l.jsonl").write_text("".join(f"{json.dumps({'url': url})}\n" for url in urls))
    found = plan(tmp_path / "l.jsonl", "urls")
    listing = f"file://{tmp_path}/l.jsonl"
    assert [(item.source, item.origin) for item in found] == [
        ("https://h/1", None),
        ("https://h/2", f"{listing}#1"),
        ("https://h/3", f"{listing}#2"),
        ("https://h/4?w=1", None),
    ]


# ----------------------------------------------------------------------------------------
# what fsspec opens


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as file:
        file.writestr("x/cat/1.jpg", "one")
        file.writestr("x/2.jpg", "two!")
    return tmp_path / "i.zip"


def test_files_inside_an_archive(archive: Path) -> None:
    for source in (f"zip://x::{archive}", f"zip://x::simplecache::file://{archive}"):
        files = list(sorted_files(source))
        assert [(file.path, file.size_bytes) for file in files] == [("2.jpg", 4), ("cat/1.jpg", 3)]
        assert [read_file(f.url, size_bytes=f.size_bytes, tag=f.tag) for f in files] == [
            b"two!",
            b"one",
        ]
        assert files[1].url == source_url(source).replace("zip://x", "zip://x/cat/1.jpg")


def test_a_relative_archive(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may have another working directory."""
    monkeypatch.chdir(archive.parent)
    assert source_url("zip://x::i.zip") == f"zip://x::file://{archive}"


def test_files_through_a_cache() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/cached/a/1.jpg", b"one")
    try:
        [file] = list_files("simplecache::memory://cached")
        assert (file.path, read_file(file.url)) == ("a/1.jpg", b"one")
        assert file.url.startswith("simplecache::memory://")
    finally:
        memory.rm("/cached", recursive=True)


def test_http_has_no_folders() -> None:
    with HttpServer({"/photos/": b"<a href='1.jpg'>1</a>", "/l.txt": b"https://h/1.jpg\n"}) as web:
        for source in (web.url("/photos/"), f"simplecache::{web.url('/photos/')}"):
            with pytest.raises(UsageError, match="write the URLs of the images into a list"):
                kind_of(source)
        assert [item.source for item in plan(web.url("/l.txt"), "urls")] == ["https://h/1.jpg"]


def test_a_size_that_nobody_knows() -> None:
    """A chunked answer does not announce its length; None is not 0."""
    page = Page(make_tar([("1.jpg", b"x")]), chunked=True, headers=[("Connection", "close")])
    with HttpServer({"/a.tar": page}) as web:
        file = find_file(web.url("/a.tar"))
        assert file is not None
        assert file.size_bytes is None
        with pytest.raises(UsageError, match="does not tell how large"):
            plan(web.url("/a.tar"), "tars")
