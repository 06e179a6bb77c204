"""Sources: every file once, sorted, whatever the listing's order and however the URL is spelt."""

import resource
from pathlib import Path

import pytest

from pipeline.errors import ObjectMissingError, UsageError
from shard_tools.sources import MERGED_RUNS, label_of, sorted_files, source_url


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
