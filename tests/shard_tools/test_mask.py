"""Masks: who is hidden, what is written for it, and the way back."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CropstreamError, ManifestError, UsageError
from pipeline.manifest import Snapshot, commit_snapshot, latest_version, read_snapshot
from pipeline.store import Store, open_store
from shard_tools.fingerprints import FingerprintSet, read_values
from shard_tools.indexes import Flags, ShardRows, read_indexes
from shard_tools.mask import mask, mask_snapshot, restore
from shard_tools.selection import Selection
from tests.support.dataset import pictures
from tests.support.snapshots import write_snapshot

IMAGES = pictures(12)
SHARD_ROWS = 5  # four images and one reject


def source(number: int) -> str:
    return f"https://host{number % 3}.example/{number}.jpg?size=big"


def fill(store: Store, *, shards: int = 3) -> Snapshot:
    """Three shards of four images and a reject each; labels a and b in turn."""
    return write_snapshot(
        store,
        [
            [
                *(
                    {"source": source(n), "data": IMAGES[n], "label": "ab"[n % 2]}
                    for n in range(4 * shard, 4 * shard + 4)
                ),
                {"source": "https://host0.example/reject", "reason": "timeout"},
            ]
            for shard in range(shards)
        ],
    )


def sources(store: Store, version: int | None = None) -> list[str]:
    """What readers see."""
    found: list[str] = []
    for rows in read_indexes(store, read_snapshot(store, version)):
        found += rows.table.filter(pa.array(rows.kept))["source"].to_pylist()
    return found


def listing(folder: Path, name: str, *lines: str) -> str:
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return str(folder / name)


def test_takedown_of_a_shard_leaves_the_others_alone(dataset: str, tmp_path: Path) -> None:
    store = open_store(dataset)
    before = fill(store)
    objects = {info.key for info in store.list()}
    listed = listing(tmp_path, "urls.txt", source(5), "", f"  {source(6)} ", "https://not/there")
    report = mask(store, Selection(urls=(listed,)))
    assert (report.is_new, report.dropped, report.shards_changed) == (True, 2, 1)
    assert (report.listed, report.found) == (3, 2)
    assert sources(store) == [source(n) for n in range(12) if n not in (5, 6)]
    after = report.snapshot
    assert after.version == 2
    assert after.note == f"drop urls in {listed}"
    assert after.kept.tolist() == [4, 2, 4]
    assert [after.mask[0], after.mask[2]] == [None, None]
    assert after.table.drop_columns(["mask", "mask_sha256", "kept"]).equals(
        before.table.drop_columns(["mask", "mask_sha256", "kept"])
    )
    assert {info.key for info in store.list()} - objects == {
        after.mask[1],
        "snapshots/v000002.parquet",
    }
    assert after.mask_sha256[1] == hashlib.sha256(store.get(after.mask[1])).digest()
    assert store.get(after.mask[1]) == bytes([0b11001])  # the reject's bit stays


def test_a_listed_url_may_still_have_its_secrets(tmp_path: Path) -> None:
    store = open_store(tmp_path / "set")
    fill(store)
    secret = "https://user:hunter2@host1.example/4.jpg?size=big&X-Amz-Signature=cafe&X-Amz-Date=1"
    listed = listing(tmp_path, "urls.txt", secret)
    report = mask(store, Selection(urls=(listed,)))
    assert report.dropped == 1
    assert source(4) not in sources(store)
    written = b"".join(path.read_bytes() for path in (tmp_path / "set").rglob("*v000002*"))
    assert b"hunter2" not in written
    assert b"cafe" not in written


def test_a_reject_that_is_taken_down_is_not_tried_again(tmp_path: Path) -> None:
    store = open_store(tmp_path / "set")
    fill(store)
    listed = listing(tmp_path, "urls.txt", "https://host0.example/reject")
    report = mask(store, Selection(urls=(listed,)))
    assert (report.is_new, report.dropped, report.found) == (True, 0, 1)
    for rows in read_indexes(store, report.snapshot):
        assert rows.kept.sum() == 4
        assert not rows.rejected.any()


def test_takedown_by_the_url_that_a_tar_carries(tmp_path: Path) -> None:
    store = open_store(tmp_path / "set")
    rows = [
        {"source": f"s3://b/x.tar#{n}.jpg", "data": IMAGES[n], "url": source(n)} for n in range(3)
    ]
    write_snapshot(store, [rows])
    report = mask(store, Selection(urls=(listing(tmp_path, "urls.txt", source(1)),)))
    assert (report.dropped, report.found) == (1, 1)
    assert mask(store, Selection(patterns=("https://host2.*",))).dropped == 1


@pytest.mark.parametrize("mode", ["drop", "keep"])
def test_any_of_what_is_given(tmp_path: Path, mode: str) -> None:
    store = open_store(tmp_path / "set")
    fill(store)
    rows = next(read_indexes(store, read_snapshot(store))).table.to_pylist()
    selection = Selection(
        keys=(listing(tmp_path, "keys.txt", rows[0]["key"]),),
        hashes=(listing(tmp_path, "hashes.txt", rows[1]["sha256"].hex().upper()),),
        patterns=("https://host2.*/1?.jpg*",),
        where="label = 'b' AND source LIKE '%/7.jpg%' -- and no more",
        mode=mode,
    )
    report = mask(store, selection)
    meant = [0, 1, 7, 11]
    left = meant if mode == "keep" else [n for n in range(12) if n not in meant]
    assert sources(store) == [source(n) for n in left]
    for rows_ in read_indexes(store, report.snapshot):
        assert rows_.rejected.tolist() == [False] * 4 + [True]


def test_masks_are_only_combined_by_and(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store)
    mask(store, Selection(where="label = 'a'"))
    again = mask(store, Selection(where="label = 'a' OR width < 0"))
    assert (again.is_new, again.dropped, again.snapshot.version) == (False, 0, 2)
    mask(store, Selection(patterns=("*/1.jpg*", "*/2.jpg*"), mode="keep"))
    assert sources(store) == [source(1)]
    assert latest_version(store) == 3


def test_no_image_left_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store)
    with pytest.raises(UsageError, match="none of 12 images would be left"):
        mask(store, Selection(where="width > 0"))
    assert latest_version(store) == 1


def test_only_the_version_that_was_meant(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store)
    mask(store, Selection(where="label = 'a'"), version=1)
    with pytest.raises(UsageError, match="version 1 is not the newest, which is 2"):
        mask(store, Selection(where="label = 'b'"), version=1)
    with pytest.raises(ManifestError, match="has no snapshot"):
        mask(open_store(tmp_path / "empty"), Selection(where="width > 0"))


def test_who_loses_a_version_masks_the_winners(tmp_path: Path) -> None:
    """While we decide, another process takes version 2, with a shard more: it is looked at too."""
    store = open_store(tmp_path)
    fill(store, shards=2)
    seen: list[str] = []

    def decide(tar: str, rows: ShardRows) -> Flags:
        if not seen:
            fill(store)  # version 2, its shards all have other names
        seen.append(tar)
        return np.arange(len(rows.table)) != 1

    report = mask_snapshot(store, decide=decide, note="every second")
    assert report.snapshot.version == 3
    assert len(seen) == len(set(seen)) == 5
    assert sources(store) == [source(n) for n in range(12) if n % 4 != 1]


def test_shards_are_decided_once_whatever_is_lost(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first = fill(store)
    seen: list[str] = []

    def decide(tar: str, rows: ShardRows) -> Flags:
        if not seen:
            commit_snapshot(store, first.table, version=2, attempt="another", plans=["p"])
        seen.append(tar)
        return np.arange(len(rows.table)) != 1

    report = mask_snapshot(store, decide=decide, note="")
    assert len(seen) == 3
    assert (report.snapshot.version, report.snapshot.plans) == (3, ("p",))
    assert len(list(store.list("masks"))) == 3


def test_a_race_that_is_always_lost_ends(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first = fill(store)

    def decide(tar: str, rows: ShardRows) -> Flags:
        version = latest_version(store) + 1
        table = first.table.set_column(
            first.table.schema.get_field_index("tar"),
            first.table.schema.field("tar"),
            pa.array([f"{tar}{version}-{n}" for n in range(3)]),
        )
        commit_snapshot(store, table, version=version, attempt="another")
        return np.zeros(len(rows.table), bool) | (rows.table["label"].to_numpy() == "a")

    with pytest.raises(CropstreamError, match="10 times another process committed"):
        mask_snapshot(store, decide=decide, note="")


def test_undone_by_restoring(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store)
    masked = mask(store, Selection(where="label = 'a'")).snapshot
    restored = restore(store, 1)
    assert (restored.version, restored.note) == (3, "version 1 restored")
    assert sources(store) == sources(store, 1)
    assert restore(store, 1).version == 3  # nothing to undo
    assert restore(store, 2).table["mask"].equals(masked.table["mask"])
    assert sources(store) == sources(store, 2)


def test_restoring_never_loses_shards_silently(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first = fill(store, shards=1)
    more = fill(store, shards=2)
    table = pa.concat_tables([s.table.replace_schema_metadata(None) for s in (first, more)])
    commit_snapshot(store, table, version=3, attempt="sealed", plans=["new"])
    with pytest.raises(UsageError, match="2 shards of plans new with 8 images came after"):
        restore(store, 1)
    forced = restore(store, 1, force=True)
    assert (forced.version, forced.plans, len(forced)) == (4, (), 1)
    with pytest.raises(ManifestError, match="has no snapshot 9"):
        restore(store, 9)


# Conditions


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("width <", "syntax error"),
        ("widht < 200", "names widht, .*; the columns are key, offset"),
        ("width", "INTEGER"),
        ("sum(width) > 3", "1 values"),
        ("unnest([true, false])", "10 values"),
        ("true) FROM rows; SELECT (true", "more than one statement"),
        ("key IN (SELECT key FROM read_csv('/etc/hostname'))", "disabled"),
        ("key IN (SELECT key FROM IMAGES)", "does not exist"),
        ("width = 'x'", "Could not convert"),
    ],
)
def test_a_wrong_condition_is_explained(tmp_path: Path, where: str, reason: str) -> None:
    store = open_store(tmp_path)
    fill(store)
    with pytest.raises(UsageError, match=reason):
        mask(store, Selection(where=where))
    assert latest_version(store) == 1


def test_null_is_not_true(tmp_path: Path) -> None:
    """Rejects have no width, and these shards no such column at all."""
    store = open_store(tmp_path)
    write_snapshot(store, [[{"source": "a", "data": IMAGES[0], "label": None}, *reject()]])
    assert not mask(store, Selection(where="label <> 'x'")).is_new
    assert not mask(store, Selection(where='NOT ("Width" > 0)')).is_new


def reject() -> list[dict[str, str]]:
    return [{"source": "b", "reason": "timeout"}]


def test_a_selection_of_nothing_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="nothing is selected"):
        Selection()
    with pytest.raises(UsageError, match="mode 'hide'"):
        Selection(where="true", mode="hide")


# Lists


def test_lists_of_every_kind(tmp_path: Path) -> None:
    values = ["one", "two,2", "drei"]
    table = pa.table({"n": [1, 2, 3], "URL": values})
    pq.write_table(table, tmp_path / "l.parquet")
    (tmp_path / "l.csv").write_text('n,url\n1,one\n2,"two,2"\n\n3,drei\n4\n')
    (tmp_path / "bare.csv").write_text('one,1\n"two,2",2\ndrei,3\n')
    (tmp_path / "l.tsv").write_text("url\tn\none\t1\ntwo,2\t2\ndrei\t3\n")
    text = "\ufeffone\r\ntwo,2\n\ndrei"
    (tmp_path / "l.txt").write_text(text)
    (tmp_path / "l.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "no-suffix").write_text(text)
    for file in sorted(tmp_path.iterdir()):
        assert list(read_values(str(file), ("url", "source"))) == values, file.name


def test_a_parquet_column_of_hashes(tmp_path: Path) -> None:
    store = open_store(tmp_path / "set")
    fill(store)
    digest = hashlib.sha256(IMAGES[3]).digest()
    pq.write_table(pa.table({"sha256": pa.array([digest, None])}), tmp_path / "h.parquet")
    assert mask(store, Selection(hashes=(str(tmp_path / "h.parquet"),))).dropped == 1
    assert source(3) not in sources(store)


@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        ("h.txt", b"abc\n", "value 1, 'abc': non-hexadecimal"),
        ("h.txt", b"abcd\n", "2 bytes are no SHA-256"),
        ("h.txt.gz", b"abcd\n", "not what its name says"),
        ("h.parquet", b"PAR1", "not what its name says"),
        ("h.txt", b"\xff\xfe\n", "not what its name says"),
    ],
)
def test_a_wrong_list_is_named(tmp_path: Path, name: str, body: bytes, reason: str) -> None:
    store = open_store(tmp_path / "set")
    fill(store, shards=1)
    (tmp_path / name).write_bytes(body)
    with pytest.raises(UsageError, match=f"{name}: .*{reason}"):
        mask(store, Selection(hashes=(str(tmp_path / name),)))


@given(st.lists(st.binary(max_size=3)), st.lists(st.binary(max_size=3)))
def test_a_set_of_fingerprints_is_a_set(members: list[bytes], asked: list[bytes]) -> None:
    fingerprints = FingerprintSet(members)
    assert fingerprints.contains(asked).tolist() == [value in members for value in asked]
    assert len(fingerprints) == len(set(members))
    assert fingerprints.num_found == len(set(members) & set(asked))
