"""What a bad network and damaged objects do to a run: nothing at all, or a loss that is reported.

A real S3 server stands behind a proxy that breaks, stalls, refuses and falsifies; directories are
damaged in place. What goes wrong on the way is healed, and the requests prove that there was
something to heal. What is wrong in the store itself costs exactly the samples that it touches.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import pyarrow as pa
import pytest

from pipeline.augment import AugmentConfig
from pipeline.crops import CropsConfig
from pipeline.errors import ManifestError, StoreError
from pipeline.fetch import FetchConfig
from pipeline.loader import LoaderConfig, MultiCropLoader
from pipeline.manifest import SNAPSHOT_SCHEMA, Snapshot, read_snapshot, snapshot_key
from pipeline.samples import BadSample, RawSample, SampleReader, begin
from pipeline.shards import parse_parquet
from pipeline.store import Store, open_store
from pipeline.telemetry import Telemetry
from tests.support.dataset import pictures, write_dataset
from tests.support.fault_proxy import Exchange, FaultProxy, Kind, Rule
from tests.support.s3_server import S3Server
from tests.support.snapshots import write_snapshot

IMAGES = pictures(80, size_px=(200, 260))  # a shard of 400 kB
MASK = [number % 5 != 1 for number in range(len(IMAGES))]
KEPT = [image for image, is_kept in zip(IMAGES, MASK, strict=True) if is_kept]
OBJECTS = {"tar": r"\.tar$", "index": r"\.parquet$", "mask": r"/masks/"}
QUICK = FetchConfig(stall_s=0.3, patience_s=30)
STEP_BYTES = 4096

Samples = Sequence[RawSample | BadSample]


@dataclass
class Data:
    """A data set of one masked shard, on S3 behind a proxy or in a directory."""

    store: Store
    snapshot: Snapshot

    def __post_init__(self) -> None:
        index = parse_parquet(self.store.get(self.snapshot.index[0])).to_pylist()
        rows = [row for row, is_kept in zip(index, MASK, strict=True) if is_kept]
        self.spans = [range(row["offset"], row["offset"] + row["length"]) for row in rows]
        self.begin_byte, self.end_byte = self.spans[0].start, self.spans[-1].stop

    def reader(self, fetch: FetchConfig = QUICK) -> SampleReader:
        """One that knows nothing yet."""
        return SampleReader(self.store, self.snapshot, Telemetry(), fetch=fetch)

    def read(self) -> Samples:
        """All samples, by a new reader."""
        return self.reader().read(0, len(KEPT) - 1)

    def touched(self, offset: int) -> list[int]:
        """The sample that a byte of the shard belongs to, if it does to one."""
        return [number for number, span in enumerate(self.spans) if offset in span]


def write_data(url: str) -> Data:
    store = open_store(url)
    rows = [{"source": f"test:{i}", "data": image} for i, image in enumerate(IMAGES)]
    return Data(store, write_snapshot(store, [rows], masks={0: MASK}))


@dataclass
class Road:
    """The data set of the module, and the proxy before it."""

    data: Data
    proxy: FaultProxy

    def strike(self, *rules: Rule) -> None:
        """From now on; what was asked for before is forgotten."""
        self.proxy.rules = rules
        self.proxy.exchanges.clear()

    def requests(self, what: str) -> list[Exchange]:
        """Those for one of the OBJECTS, in order."""
        return [e for e in self.proxy.exchanges if re.search(OBJECTS[what], e.request.target)]


@pytest.fixture(scope="module")
def built_road(s3: S3Server) -> Iterator[Road]:
    with FaultProxy(s3.url) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield Road(write_data("s3://cropstream/faults"), proxy)


@pytest.fixture
def road(built_road: Road) -> Iterator[Road]:
    yield built_road
    built_road.strike()


def assert_clean(samples: Samples) -> None:
    assert [s.data if isinstance(s, RawSample) else s for s in samples] == KEPT


def assert_lost(samples: Samples, lost: Sequence[int], reason: str) -> None:
    """Those samples are reported, and all the others are right."""
    assert [sample.number for sample in samples] == list(range(len(KEPT)))
    assert [s.number for s in samples if isinstance(s, BadSample)] == list(lost)
    for sample in samples:
        if isinstance(sample, BadSample):
            assert re.search(reason, sample.reason), sample
        else:
            assert sample.data == KEPT[sample.number]


# ----------------------------------------------------------------------------------------
# on the way


def first_of_each(**fields: Any) -> list[Rule]:
    """The first request for every object."""
    return [Rule(target=target, nth=(1,), **fields) for target in OBJECTS.values()]


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": Kind.REFUSE, "status": 503},
        {"kind": Kind.REFUSE, "status": 500},
        {"kind": Kind.RESET},
        {"kind": Kind.RESET, "after_bytes": 0},
        {"kind": Kind.RESET, "after_bytes": 100_000},
        {"kind": Kind.CUT},
        {"kind": Kind.CUT, "after_bytes": 0},
        {"kind": Kind.CUT, "after_bytes": 100_000},
        {"kind": Kind.STALL},
        {"kind": Kind.STALL, "after_bytes": 0},
        {"kind": Kind.STALL, "after_bytes": 100_000},
        {"kind": Kind.DRIP, "bytes_per_s": 10.0},
        {"kind": Kind.SHORTEN, "after_bytes": 100_000},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_every_object_is_had_in_spite_of_a_fault(road: Road, fields: dict[str, Any]) -> None:
    road.strike(*first_of_each(**fields))
    reader = road.data.reader()
    assert_clean(reader.read(0, len(KEPT) - 1))
    assert road.proxy.count(fields["kind"]) == 3
    assert [len(road.requests(what)) for what in OBJECTS] == [2, 2, 2]
    assert reader.telemetry.total("fetch_requests") == len(road.proxy.exchanges)
    assert reader.telemetry.total("fetch_retries") == 3
    is_slow = fields["kind"] in (Kind.STALL, Kind.DRIP)
    assert reader.telemetry.total("fetch_stalls") == (3 if is_slow else 0)


@pytest.mark.parametrize("kind", [Kind.RESET, Kind.CUT, Kind.STALL])
def test_reading_goes_on_where_it_broke(
    road: Road, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.ranges._MOST_PART_BYTES", 1 << 16)
    road.strike(Rule(kind=kind, target=OBJECTS["tar"], nth=(1,), after_bytes=300_000))
    reader = road.data.reader()
    assert_clean(reader.read(0, len(KEPT) - 1))
    first, second = (each.request.first_byte for each in road.requests("tar"))
    assert first + 100_000 <= second <= first + 300_000
    assert reader.telemetry.total("fetch_resumes") == 1


@pytest.mark.parametrize("status", [404, 412, 416])
@pytest.mark.parametrize("what", OBJECTS)
def test_a_wrong_answer_that_an_object_is_gone(road: Road, what: str, status: int) -> None:
    """From a gateway, say: once it is healed, for ever it costs the samples."""
    reader, gone = road.data.reader(), {"kind": Kind.REFUSE, "status": status}
    road.strike(Rule(target=OBJECTS[what], nth=(1,), **gone))
    assert_clean(reader.read(0, len(KEPT) - 1))
    assert len(road.requests(what)) == 2
    assert reader.telemetry.total("fetch_retries") == 1
    road.strike(Rule(target=OBJECTS[what], **gone))
    assert_lost(road.data.read(), range(len(KEPT)), r"no such object|recorded")
    assert len(road.requests(what)) == 2


def test_many_faults_at_once(road: Road) -> None:
    """Four readers beside each other."""
    share = {"share": 0.15}
    road.strike(
        Rule(kind=Kind.REFUSE, **share),
        Rule(kind=Kind.RESET, after_bytes=3000, **share),
        Rule(kind=Kind.CUT, after_bytes=50_000, **share),
        Rule(kind=Kind.CUT, **share),
        Rule(kind=Kind.STALL, after_bytes=20_000, **share),
    )
    readers = [road.data.reader() for _ in range(4)]
    for samples in [begin(reader.read_async(0, len(KEPT) - 1)) for reader in readers]:
        assert_clean(samples.result())
    seen = {each.kind for each in road.proxy.exchanges}
    assert len(seen) >= 4, seen


# ----------------------------------------------------------------------------------------
# flipped bytes


def flip(road: Road, reader: SampleReader, what: str, offset: int, **fields: Any) -> Samples:
    road.strike(Rule(kind=Kind.FLIP, target=OBJECTS[what], offset=offset, **fields))
    samples = reader.read(0, len(KEPT) - 1)
    assert road.proxy.count(Kind.FLIP) >= 1
    return samples


def check_flips_of_the_shard(road: Road, step_bytes: int) -> None:
    data, reader = road.data, road.data.reader()
    rereads = 0
    for offset in range(data.begin_byte, data.end_byte, step_bytes):
        lost = data.touched(offset)
        assert_clean(flip(road, reader, "tar", offset, nth=(1,)))
        assert_lost(flip(road, reader, "tar", offset), lost, "checksum differs")
        rereads += 2 * len(lost)
        assert reader.telemetry.total("fetch_rereads") == rereads
    assert rereads


def check_flips_of_a_whole_object(road: Road, what: str, step_bytes: int) -> None:
    everything = range(len(KEPT))
    size = int(road.data.snapshot.index_bytes[0]) if what == "index" else -(-len(MASK) // 8)
    for offset in range(0, size, step_bytes):
        assert_clean(flip(road, road.data.reader(), what, offset, nth=(1,)))
        assert len(road.requests(what)) == 2
        samples = flip(road, road.data.reader(), what, offset)
        assert_lost(samples, everything, f"{what}'s SHA-256")


def test_a_flip_every_4_kb_of_a_shard(road: Road) -> None:
    check_flips_of_the_shard(road, STEP_BYTES)


def test_flips_of_an_index_and_of_a_mask(road: Road) -> None:
    check_flips_of_a_whole_object(road, "index", 512)
    check_flips_of_a_whole_object(road, "mask", 1)


@pytest.mark.slow
def test_a_flip_every_5_bytes_of_an_index(road: Road) -> None:
    check_flips_of_a_whole_object(road, "index", 5)


@pytest.mark.slow
def test_a_flip_every_199_bytes_of_a_shard(road: Road) -> None:
    check_flips_of_the_shard(road, 199)


def test_a_good_sample_stays_good_when_its_neighbours_are_fetched_again(road: Road) -> None:
    """The second answer spans three samples, and damages the one that the first had right."""
    first, middle, last = (road.data.spans[number].start + 5 for number in (3, 5, 7))
    flip = {"kind": Kind.FLIP, "target": OBJECTS["tar"], "nth": (1,)}
    road.strike(Rule(offset=(first, last), **flip), Rule(offset=middle, **flip))
    assert_clean(road.data.read())
    assert [each.kind for each in road.requests("tar")] == [Kind.FLIP, Kind.FLIP]


# ----------------------------------------------------------------------------------------
# late answers and outages


def test_a_hedge_overtakes_what_hangs(road: Road) -> None:
    """Nothing else would: a stall is waited for far longer than the test may take."""
    reader = road.data.reader(FetchConfig(stall_s=3600, patience_s=3600))
    road.strike(Rule(kind=Kind.STALL, target=OBJECTS["tar"], nth=(60, 80), after_bytes=1000))
    assert [reader.read(7, 7)[0].data for _ in range(100)] == [KEPT[7]] * 100
    check_hedges(reader, at_least=2)


def test_hedges_stay_within_their_share_when_everything_is_late(road: Road) -> None:
    reader = road.data.reader(FetchConfig(stall_s=3600))
    for _ in range(40):
        reader.read(7, 7)
    road.strike(Rule(kind=Kind.DELAY, seconds=0.5))
    late = [begin(reader.read_async(7, 7)) for _ in range(64)]
    assert [samples.result()[0].data for samples in late] == [KEPT[7]] * 64
    check_hedges(reader, at_least=1)
    assert len(road.requests("tar")) <= 64 + 0.05 * 104


def check_hedges(reader: SampleReader, *, at_least: int) -> None:
    count = reader.telemetry.total
    assert count("fetch_hedges") >= at_least
    assert count("fetch_stalls") == 0
    assert 0 <= count("fetch_hedge_bytes") <= 0.05 * count("fetch_bytes")


def test_an_outage_is_waited_for(road: Road, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """First nobody listens, then somebody says that he is overloaded."""
    with FaultProxy(s3.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        data = Data(open_store(road.data.store.url), road.data.snapshot)
        reader = data.reader()
        reader.read(0, 0)
    waiting = begin(reader.read_async(0, len(KEPT) - 1))
    wait_until(lambda: reader.telemetry.total("fetch_retries") >= 2)
    overloaded = [Rule(kind=Kind.REFUSE, nth=(1, 2))]
    with FaultProxy(s3.url, overloaded, port=proxy.port) as proxy:
        assert_clean(waiting.result(60))
        assert proxy.count(Kind.REFUSE) == 2
        assert reader.telemetry.total("fetch_throttled") == 2
    with pytest.raises(StoreError, match=re.escape(data.store.url)):
        data.reader(FetchConfig(patience_s=0.5)).read(0, 0)


def wait_until(ready: Callable[[], bool]) -> None:
    while not ready():
        time.sleep(0.02)


# ----------------------------------------------------------------------------------------
# in the store itself


@pytest.fixture(params=["file", "s3"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Data:
    """Without a proxy, to be damaged."""
    return write_data(
        str(tmp_path) if request.param == "file" else request.getfixturevalue("s3_url")
    )


def overwrite(data: Data, key: str, body: bytes) -> None:
    with data.store.writer(key) as writer:
        writer.write(body)


def key_of(data: Data, what: str) -> str:
    key = getattr(data.snapshot, what)[0]
    assert isinstance(key, str)
    return key


def test_a_directory_damaged_every_4_kb(tmp_path: Path) -> None:
    data = write_data(str(tmp_path))
    path = tmp_path / key_of(data, "tar")
    whole = path.read_bytes()
    for offset in range(0, len(whole), STEP_BYTES):
        path.write_bytes(flipped(whole, offset))
        assert_lost(data.read(), data.touched(offset), "checksum differs")


def test_a_directory_whose_index_or_mask_is_damaged(tmp_path: Path) -> None:
    data = write_data(str(tmp_path))
    for what, step_bytes in (("index", 256), ("mask", 1)):
        path = tmp_path / key_of(data, what)
        whole = path.read_bytes()
        for offset in range(0, len(whole), step_bytes):
            path.write_bytes(flipped(whole, offset))
            assert_lost(data.read(), range(len(KEPT)), f"{what}'s SHA-256")
        path.write_bytes(whole)


@pytest.mark.parametrize("what", ["tar", "index", "mask"])
@pytest.mark.parametrize("how", ["replaced", "cut", "emptied", "deleted"])
def test_an_object_that_is_not_what_it_was(data: Data, what: str, how: str) -> None:
    """Seen by who reads on, if it is the shard, and by who begins; nothing of it is used."""
    reader = data.reader()
    assert isinstance(reader.read(0, 0)[0], RawSample)
    key = key_of(data, what)
    whole = data.store.get(key)
    if how == "deleted":
        data.store.delete(key)
    else:
        half = whole[: len(whole) // 2]
        overwrite(data, key, {"replaced": whole[::-1], "cut": half, "emptied": b""}[how])
    everything = range(len(KEPT))
    assert_lost(data.read(), everything, "")
    if what == "tar":
        assert_lost(reader.read(0, len(KEPT) - 1), everything, "")
    else:
        assert_clean(reader.read(0, len(KEPT) - 1))


def test_what_lies_before_a_cut_is_still_read(tmp_path: Path) -> None:
    data = write_data(str(tmp_path))
    path = tmp_path / key_of(data, "tar")
    path.write_bytes(path.read_bytes()[: data.spans[9].stop])
    samples = data.reader().read(0, 9)
    assert [s.data for s in samples if isinstance(s, RawSample)] == KEPT[:10]
    assert [type(s) for s in data.reader().read(10, 12)] == [BadSample] * 3


@pytest.mark.parametrize("how", ["replaced", "cut"])
def test_an_adopted_shard_without_a_tag(s3_url: str, how: str) -> None:
    data = write_data(s3_url)
    (row,) = data.snapshot.table.to_pylist()
    table = pa.Table.from_pylist([{**row, "tar_tag": None}], SNAPSHOT_SCHEMA)
    data.snapshot = Snapshot(table, data.snapshot.version)
    assert_clean(data.read())
    whole = data.store.get(row["tar"])
    overwrite(data, row["tar"], whole[::-1] if how == "replaced" else whole[:100_000])
    expected = "checksum differs" if how == "replaced" else "has 100000 bytes, recorded were"
    assert_lost(data.read(), range(len(KEPT)), expected)


def flipped(body: bytes, offset: int) -> bytes:
    return body[:offset] + bytes([body[offset] ^ 0xFF]) + body[offset + 1 :]


def check_flips_of_a_snapshot(folder: Path, step_bytes: int) -> None:
    """It is refused, unless the byte says nothing of shards."""
    data = write_data(str(folder))
    path = folder / snapshot_key(1)
    whole = path.read_bytes()
    num_refused = 0
    for offset in range(0, len(whole), step_bytes):
        path.write_bytes(flipped(whole, offset))
        try:
            seen = read_snapshot(data.store, 1)
        except ManifestError:
            num_refused += 1
        else:
            assert seen.table.to_pylist() == data.snapshot.table.to_pylist()
    assert num_refused > len(whole) / step_bytes / 2


def test_a_damaged_snapshot_is_refused(tmp_path: Path) -> None:
    check_flips_of_a_snapshot(tmp_path, 7)


@pytest.mark.slow
def test_a_snapshot_damaged_anywhere_is_refused(tmp_path: Path) -> None:
    check_flips_of_a_snapshot(tmp_path, 1)


# ----------------------------------------------------------------------------------------
# a whole loader

SHARDS, PER_SHARD, BATCH = 6, 32, 16
PHOTOS = pictures(SHARDS * PER_SHARD, size_px=(180, 260))
CROPS = CropsConfig(global_size_px=32, local_crops=2, local_size_px=16)

Rows = dict[tuple[int, int, int], bytes]
"""(epoch, step, sample) -> its crops."""


@pytest.fixture(scope="module")
def url(s3: S3Server) -> str:
    """Six shards."""
    url = "s3://cropstream/faults-of-a-run"
    write_dataset(url, PHOTOS, per_shard=PER_SHARD)
    return url


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """What a run sees if nothing goes wrong, whatever it reads from."""
    folder = str(tmp_path_factory.mktemp("clean"))
    write_dataset(folder, PHOTOS, per_shard=PER_SHARD)
    return rows_of(loader_of(folder))


def loader_of(url: str, workers: int = 0) -> MultiCropLoader:
    """It reads 40 samples ahead, of two epochs of 192."""
    sizes = {"global_batch": BATCH, "lanes": 4, "chunk": 5, "window": 1, "prefetch_batches": 1}
    config = LoaderConfig(dataset=url, workers=workers, threads=2, **sizes)
    return MultiCropLoader(config, CROPS, AugmentConfig(), seed=5, epochs=2, fetch=QUICK)


def rows_of(
    loader: MultiCropLoader, *, after_batch: int = 0, do: Callable[[], object] = bool
) -> Rows:
    """All that it yields; something is done after one of the batches."""
    rows = {}
    with loader:
        for count, batch in enumerate(loader.cut_batches(), 1):
            for row, number in enumerate(batch.samples.tolist()):
                crops = [block[:, row].tobytes() for block in batch.blocks]
                rows[batch.epoch, batch.step, number] = b"".join(crops)
            if count == after_batch:
                do()
    assert len(rows) == 2 * SHARDS * PER_SHARD
    return rows


def quarantined(loader: MultiCropLoader) -> set[int]:
    return {entry["number"] for entry in loader.quarantine.before(2, 0)}


def changed(rows: Rows, clean: Rows) -> set[int]:
    """The samples in whose place there was another; the slots must be the same."""
    assert rows.keys() == clean.keys()
    return {name[2] for name, crops in rows.items() if clean[name] != crops}


def on_the_way(share: float) -> list[Rule]:
    """Every fault that more requests can heal; to objects other than the snapshot."""
    fields = {"target": "/data/", "share": share}
    return [
        Rule(kind=Kind.STALL, **fields),
        Rule(kind=Kind.STALL, after_bytes=9000, **fields),
        Rule(kind=Kind.REFUSE, **fields),
        Rule(kind=Kind.RESET, after_bytes=5000, **fields),
        Rule(kind=Kind.CUT, after_bytes=9000, **fields),
        Rule(kind=Kind.SHORTEN, after_bytes=7000, **fields),
        Rule(kind=Kind.DRIP, bytes_per_s=100, **fields),
    ]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_are_the_same_whatever_happens_on_the_way(
    url: str, clean: Rows, s3: S3Server, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = on_the_way(0.04)
    with FaultProxy(s3.url, rules) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        loader = loader_of(url, workers)
        assert rows_of(loader) == clean
        assert all(proxy.count(rule.kind) for rule in rules)
        struck = sum(each.kind is not None for each in proxy.exchanges)
    count = loader.telemetry.total
    assert count("fetch_retries") >= struck / 2  # others were hedges, or overtaken by one
    assert count("fetch_hedge_bytes") <= 0.05 * count("fetch_bytes")
    assert not quarantined(loader)


def test_a_run_outlasts_a_store_that_fails_for_a_while(
    url: str, clean: Rows, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(s3.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        loader = loader_of(url)
        up = Timer(1.0, lambda: setattr(proxy, "rules", ()))

        def fail() -> None:
            proxy.rules = [Rule(kind=Kind.RESET)]
            up.start()

        assert rows_of(loader, after_batch=3, do=fail) == clean
        up.join()
        assert proxy.count(Kind.RESET) > 0
    assert not quarantined(loader)


@pytest.mark.parametrize("how", ["replaced", "cut", "deleted"])
def test_a_shard_that_changes_in_mid_run(
    tmp_path: Path, clean: Rows, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is lost, sooner or later: what was read ahead and is whole may still be used."""
    monkeypatch.setattr("pipeline.pacing._MOST_DOUBT_S", 0)  # for dozens of pieces
    monkeypatch.setattr("pipeline.pacing._LEAST_DOUBT_S", 0)
    write_dataset(str(tmp_path), PHOTOS, per_shard=PER_SHARD)
    tar = tmp_path / f"data/00/{2 * PER_SHARD:06d}.tar"
    body = tar.read_bytes()

    def change() -> None:
        tar.unlink()
        if how != "deleted":
            tar.write_bytes(body[::-1] if how == "replaced" else body[:1000])

    loader, again = loader_of(str(tmp_path)), loader_of(str(tmp_path))
    seen = changed(rows_of(loader, after_batch=2, do=change), clean)
    gone = set(range(2 * PER_SHARD, 3 * PER_SHARD))
    assert seen == quarantined(loader) == gone
    assert changed(rows_of(again), clean) == quarantined(again) == gone


def test_a_byte_that_is_always_wrong_costs_its_sample(
    url: str, clean: Rows, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = f"data/00/{PER_SHARD:06d}"
    row = parse_parquet(open_store(url).get(f"{key}.parquet")).to_pylist()[7]
    rule = Rule(kind=Kind.FLIP, target=rf"{key}\.tar", offset=row["offset"] + 100)
    with FaultProxy(s3.url, [rule]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        loader = loader_of(url)
        assert changed(rows_of(loader), clean) == {PER_SHARD + 7}
    (entry,) = loader.quarantine.before(2, 0)
    assert (entry["number"], entry["reason"]) == (PER_SHARD + 7, "checksum differs")
