"""The page of a snapshot: what it shows, what it survives, and that it is always the same."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from PIL import Image

from pipeline.errors import ShardError
from pipeline.manifest import Snapshot
from pipeline.store import Store, open_store
from shard_tools.cluster_table import MAX_MEMBERS, read_clusters
from shard_tools.gallery import NUM_SHARDS, write_gallery
from shard_tools.thumbnails import MAX_THUMBNAIL_BYTES, THUMBNAIL_PX, Pick, thumbnails
from tests.support.dataset import pictures
from tests.support.snapshots import write_snapshot

DEDUP = "dedup/0a1b/clusters.parquet"
COLUMNS = ("offset", "length", "crc32c")


def rows_of(images: Sequence[bytes], first: int = 0) -> list[dict[str, Any]]:
    return [
        {"data": data, "source": f"https://a.example/{n}.jpg", "label": f"label {n % 3}"}
        for n, data in enumerate(images, start=first)
    ]


def write_clusters(store: Store, members: Sequence[Mapping[str, Any]]) -> None:
    body = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(members)), body, row_group_size=16)
    with store.writer(DEDUP) as writer:
        writer.write(body.getvalue())


def member(cluster: int, row: int, *, kept: bool = False, shard: int = 0) -> dict[str, Any]:
    key = f"5a4d91e2{row:012d}"
    return {
        "cluster": cluster,
        "kept": kept,
        "shard": shard,
        "row": row,
        "key": key,
        "source": "s",
        "phash": 1,
        "distance": row,
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "set")


@pytest.fixture
def snapshot(store: Store) -> Snapshot:
    """24 images in two shards, two rejects."""
    images = pictures(24)
    rejects = [{"source": f"https://b.example/{n}", "reason": "HTTP 404"} for n in range(2)]
    return write_snapshot(store, [rows_of(images[:12]) + rejects, rows_of(images[12:], first=12)])


def page_of(store: Store, snapshot: Snapshot, **settings: Any) -> str:
    url = write_gallery(store, snapshot, **settings)
    return Path(url.removeprefix("file://")).read_text(encoding="utf-8")


def test_what_is_on_it(store: Store, snapshot: Snapshot) -> None:
    page = page_of(store, snapshot)
    assert "All 24 images" in page
    assert "3 of 24 images" in page_of(store, snapshot, samples=3)
    assert page.count("<img ") == 24
    assert page.count('<svg class="chart"') == 4
    assert "HTTP 404" in page
    assert 'href="https://b.example/1"' in page
    assert "2 packed here, 0 adopted" in page
    assert "24 of 26 rows are kept" in page
    assert "Duplicates" not in page


@pytest.mark.parametrize("place", ["file", "s3"])
def test_written_next_to_the_data_and_always_the_same(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("s3_url") if place == "s3" else str(tmp_path / "set")
    store = open_store(url)
    snapshot = write_snapshot(store, [rows_of(pictures(6))])
    first = write_gallery(store, snapshot, samples=3)
    assert re.fullmatch(rf"{store.url}/galleries/v000001-[0-9a-f]{{16}}\.html", first)
    assert write_gallery(store, snapshot, samples=3) == first
    assert write_gallery(store, snapshot, samples=3, seed=1) != first
    assert len(list(store.list("galleries"))) == 2


def test_output_where_the_user_says(store: Store, snapshot: Snapshot, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("an older one")
    url = write_gallery(store, snapshot, output=str(target), samples=2)
    assert url == f"file://{target}"
    assert target.read_text().count("<img ") == 2


def test_samples_are_kept_rows_each_as_likely(store: Store) -> None:
    shards = [rows_of(pictures(8, seed=s), first=8 * s) for s in range(4)]
    masks = {1: [False] * 8, 2: [True, False] * 4}
    snapshot = write_snapshot(store, shards, masks=masks)
    kept = {*range(8), 16, 18, 20, 22, *range(24, 32)}
    seen = np.zeros(32, int)
    for seed in range(30):
        page = page_of(store, snapshot, samples=10, seed=seed)
        numbers = [int(n) for n in re.findall(r'title="https://a.example/(\d+)\.jpg"', page)]
        assert len(set(numbers)) == len(numbers) == 10
        assert set(numbers) <= kept
        seen[numbers] += 1
    assert set(np.flatnonzero(seen)) == kept
    assert seen.max() < 4 * seen[seen > 0].min() + 10


def test_a_bad_sample_says_why(store: Store) -> None:
    images = pictures(6)
    cut = {**rows_of([images[0]])[0], "data": images[0][:-300]}
    wrong = {**rows_of([images[1]])[0], "crc32c": 7}
    text = {"data": images[2], "source": "s", "offset": 0, "length": 20, "crc32c": 0xDA6ED5FA}
    beyond = {"data": images[3], "source": "s", "offset": 10**9}
    first = [cut, wrong, text, beyond, *rows_of(images[4:5])]
    snapshot = write_snapshot(store, [first, rows_of(images[5:])])
    Path(store.url_of(snapshot.tar[1]).removeprefix("file://")).unlink()
    page = page_of(store, snapshot)
    assert page.count("<img ") == 1
    problems = re.findall(r'class="broken"><bdi>(.*?)</bdi>', page)
    assert [problem.partition(":")[0] for problem in problems] == [
        "truncated",
        "damaged",
        "damaged",
        "the shard is not the recorded one",
        "the shard is missing",
    ]


def test_a_damaged_index_is_an_error(store: Store, snapshot: Snapshot) -> None:
    path = Path(store.url_of(snapshot.index[1]).removeprefix("file://"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ShardError, match="SHA-256"):
        write_gallery(store, snapshot)


def test_nothing_kept(store: Store) -> None:
    snapshot = write_snapshot(store, [[{"source": "s", "reason": "timeout"}]])
    page = page_of(store, snapshot)
    assert "No image is kept." in page
    assert "No sizes are recorded." in page


def test_versions_with_their_notes(store: Store, snapshot: Snapshot) -> None:
    rows = [rows_of(pictures(2))]
    write_snapshot(store, rows, note="mask <b>: 3 rows of https://x.example/*")
    newest = write_snapshot(store, rows, note="retry: 2 timeouts")
    (Path(store.url.removeprefix("file://")) / "snapshots/v000001.parquet").unlink()
    page = page_of(store, newest)
    assert page.count("retry: 2 timeouts") == 2  # at the top, and in the table
    assert "mask &lt;b&gt;: 3 rows" in page
    assert "can no longer be read" in page


def test_shards_adopted_and_many(store: Store) -> None:
    shards = [rows_of(pictures(1, seed=s)) for s in range(NUM_SHARDS + 5)]
    tars = {3: "https://far.example/0003.tar"}
    page = page_of(store, write_snapshot(store, shards, tars=tars), samples=0)
    assert f"The first {NUM_SHARDS} shards" in page
    assert f"{NUM_SHARDS + 4} packed here, 1 adopted" in page
    assert "https://far.example/0003.tar" in page


def test_clusters_of_the_lineage(store: Store) -> None:
    """Also those of an earlier version; the kept image comes first and is marked."""
    rows = [rows_of(pictures(24))]
    write_clusters(store, [member(7, 4), member(7, 2, kept=True), member(9, 20, kept=True)])
    write_snapshot(store, rows, note=f"dedup: 1 copy dropped, clusters in {store.url_of(DEDUP)}")
    masks = {0: [n != 4 for n in range(24)]}
    page = page_of(store, write_snapshot(store, rows, masks=masks, note="mask"), samples=0)
    shown = re.findall(r'<figure class="(\w*)">.*?alt="(\w+)"', page, re.DOTALL)
    assert [(kind, int(key[8:])) for kind, key in shown] == [("chosen", 2), ("", 4), ("chosen", 20)]
    assert "4 bits away" in page


def test_clusters_that_do_not_fit_the_shards(store: Store) -> None:
    strange = {**member(1, 3), "key": "another"}
    far, no_row = member(1, 0, shard=9), member(1, 5000)
    write_clusters(store, [member(1, 1, kept=True), strange, far, no_row])
    snapshot = write_snapshot(store, [rows_of(pictures(6))], note=f"clusters: {DEDUP}")
    page = page_of(store, snapshot, samples=0)
    assert page.count("<img ") == 1
    assert page.count("not in this version") == 3


@pytest.mark.parametrize("body", [None, b"no parquet", b""])
def test_clusters_that_cannot_be_read(store: Store, body: bytes | None) -> None:
    if body is not None:
        with store.writer(DEDUP) as writer:
            writer.write(body)
    snapshot = write_snapshot(store, [rows_of(pictures(2))], note=f"clusters: {DEDUP}")
    page = page_of(store, snapshot)
    assert "Duplicates" in page
    assert re.search("no longer there|no readable table of clusters", page)
    assert page.count("<img ") == 2


def test_the_largest_clusters_and_random_ones(store: Store) -> None:
    members = [member(n, n * 100 + i, kept=i == n) for n in range(1, 40) for i in range(n + 1)]
    write_clusters(store, members)
    found = read_clusters(store, DEDUP, num_clusters=8, seed=3)
    assert [each.number for each in found[:4]] == [39, 38, 37, 36]
    assert found == read_clusters(store, DEDUP, num_clusters=8, seed=3)
    assert found != read_clusters(store, DEDUP, num_clusters=8, seed=4)
    for cluster in found:
        assert cluster.size == cluster.number + 1
        assert len(cluster.members) == min(cluster.size, MAX_MEMBERS)
        assert [each.kept for each in cluster.members] == [True] + [False] * (
            len(cluster.members) - 1
        )


def test_thumbnails_are_small_whatever_they_show(store: Store) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    strip = np.zeros((3, 3000, 3), np.uint8)
    bodies = []
    for pixels in (noise, strip):
        body = io.BytesIO()
        Image.fromarray(pixels).save(body, "PNG")
        bodies.append(body.getvalue())
    snapshot = write_snapshot(store, [rows_of(bodies)])
    index = pq.read_table(store.url_of(snapshot.index[0]).removeprefix("file://"))
    picks = [Pick(0, row) for row in index.select(COLUMNS).to_pylist()]
    large, flat = thumbnails(store, snapshot, picks)
    assert len(large.jpeg) <= MAX_THUMBNAIL_BYTES
    assert (flat.width_px, flat.height_px) == (THUMBNAIL_PX, 1)
    with Image.open(io.BytesIO(large.jpeg)) as image:
        assert image.size == (large.width_px, large.height_px) == (THUMBNAIL_PX, 122)


def test_progress_by_shard(store: Store, snapshot: Snapshot) -> None:
    ticks: list[tuple[int, int]] = []
    write_gallery(store, snapshot, on_tick=lambda *tick: ticks.append(tick))
    assert ticks == [(14, 2), (26, 2)]


def test_a_browser_is_told_that_it_is_a_page(s3_url: str) -> None:
    store = open_store(s3_url)
    url = write_gallery(store, write_snapshot(store, [rows_of(pictures(2))]))
    s3 = s3fs.S3FileSystem(skip_instance_cache=True, client_kwargs={"region_name": "us-east-1"})
    assert s3.info(url)["ContentType"] == "text/html; charset=utf-8"
