"""Sources by host, folder and tar."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_tools.origins import Origins, is_tar_member


def counted(*batches: list[str]) -> dict[str, int]:
    origins = Origins(num_kinds=1)
    for batch in batches:
        origins.add(pa.chunked_array([pa.array(batch, pa.string())]), 0)
    named, others = origins.top(100)
    assert others == [0]
    return {name: counts[0] for name, counts in named.items()}


def test_urls_by_host() -> None:
    assert counted(
        ["http://A.example/x/1.jpg", "https://a.example/y?z=1", "https://a.example"],
        ["https://u:p@b.example:8080/1", "HTTPS://B.EXAMPLE:8080#x", "http://a.example?q=/c/"],
    ) == {"a.example": 4, "b.example:8080": 2}


def test_tars_by_folder() -> None:
    assert counted(
        ["https://h.example/wds/0001.tar#a/b.jpg", "https://h.example/wds/0002.tar#c.jpg"],
        ["s3://b/deep/in/x.tar.gz#m", "file:///data/y.TGZ#m/n", "https://h.example/1.tar"],
    ) == {"https://h.example/wds": 2, "s3://b/deep/in": 1, "file:///data": 1, "h.example": 1}


def test_folders_below_what_is_common() -> None:
    assert counted(
        ["file:///data/photos/cat/1/a.jpg", "file:///data/photos/cat/2/b.jpg"],
        ["file:///data/photos/dog/a.jpg", "file:///data/photos/top.jpg"],
    ) == {"file:///data/photos/cat": 2, "file:///data/photos/dog": 1, "file:///data/photos": 1}


def test_each_scheme_has_a_root_of_its_own() -> None:
    assert counted(
        ["s3://one/p/x/1.jpg", "s3://one/p/y/1.jpg", "file:///d/e/f.jpg", "plain/a.jpg", "b.jpg"],
    ) == {"s3://one/p/x": 1, "s3://one/p/y": 1, "file:///d/e": 1, "plain": 1, "": 1}
    assert counted(["s3://one/p/x/1.jpg", "s3://two/p/1.jpg"]) == {"s3://one": 1, "s3://two": 1}


_PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=4)


@given(st.lists(_PATHS, min_size=1, max_size=20), st.integers(0, 20))
def test_the_order_does_not_matter(folders: list[list[str]], cut: int) -> None:
    """A pass that learns the common root late counts what one that knew it counts."""
    sources = [f"file:///{'/'.join(folder)}/x.jpg" for folder in folders]
    assert counted(sources[cut:], sources[:cut]) == counted(sources)
    assert sum(counted(sources).values()) == len(sources)
    depths = {name.count("/") for name in counted(sources)}
    assert max(depths) - min(depths) <= 1


@pytest.mark.parametrize("odd", ["", "#", "://", "http://", "a\nb/c", "\u202e/x", "s3:///", "///"])
def test_odd_sources_are_counted(odd: str) -> None:
    assert sum(counted([odd, "https://a.example/x"], [odd]).values()) == 3


def test_members() -> None:
    assert is_tar_member("https://h/x.tar#a.jpg")
    assert not is_tar_member("https://h/x.jpg#tar")
