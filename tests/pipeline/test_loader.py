"""The loader on real stores: same batches whatever the world size, threads or interruptions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.augment import AugmentConfig
from pipeline.crops import CropsConfig
from pipeline.errors import DataError, ManifestError, UsageError
from pipeline.loader import Batch, LoaderConfig, MultiCropLoader
from pipeline.shards import parse_parquet
from pipeline.store import open_store
from tests.support.dataset import pictures, write_dataset

CROPS = CropsConfig(global_size_px=32, local_crops=2, local_size_px=16)
COUNT = 96


def loader_of(
    url: str, *, world: tuple[int, int] = (0, 1), state=None, epochs=None, quarantine=(), **settings
):
    settings = {"global_batch": 8, "lanes": 4, "chunk": 5, "window": 2, "threads": 2} | settings
    return MultiCropLoader(
        LoaderConfig(dataset=url, **settings),
        CROPS,
        AugmentConfig(),
        seed=3,
        rank=world[0],
        world_size=world[1],
        epochs=epochs,
        state=state,
        quarantine=quarantine,
    )


def take(loader: MultiCropLoader, count: int) -> list[Batch]:
    with loader:
        return [batch for _, batch in zip(range(count), loader, strict=False)]


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert (one.epoch, one.step) == (other.epoch, other.step)
        np.testing.assert_array_equal(one.samples, other.samples)
        for mine, theirs in zip(one.crops, other.crops, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    prefix = str(tmp_path) if request.param == "file" else request.getfixturevalue("s3_url")
    write_dataset(prefix, pictures(COUNT), labels=[f"class{i % 3}" for i in range(COUNT)])
    return prefix


@pytest.fixture
def folder(tmp_path: Path) -> str:
    write_dataset(str(tmp_path), pictures(COUNT))
    return str(tmp_path)


def test_shapes_and_epochs(url):
    batches = take(loader_of(url, epochs=2), 1000)
    assert len(batches) == 2 * COUNT // 8
    large, small = batches[0].crops
    assert large.shape == (2 * 8, 3, 32, 32)
    assert small.shape == (2 * 8, 3, 16, 16)
    assert large.dtype == torch.float32
    for epoch in range(2):
        seen = np.concatenate([b.samples for b in batches if b.epoch == epoch])
        assert sorted(seen.tolist()) == list(range(COUNT))


def test_world_size_and_threads_change_nothing(url):
    alone = take(loader_of(url, threads=1), 20)
    assert_same(take(loader_of(url, threads=5), 20), alone)
    ranks = [take(loader_of(url, world=(rank, 2)), 20) for rank in range(2)]
    for step, batch in enumerate(alone):
        samples = np.concatenate([rank[step].samples for rank in ranks])
        np.testing.assert_array_equal(samples, batch.samples)
        for group in range(2):
            parts = [rank[step].crops[group].unflatten(0, (2, 4)) for rank in ranks]
            whole = batch.crops[group].unflatten(0, (2, 8))
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=0)


@pytest.mark.parametrize("stop", [1, 5, 12, 17])
def test_resume_is_the_uninterrupted_run(folder, stop):
    whole = take(loader_of(folder), 24)
    first = loader_of(folder)
    head = take(first, stop)
    tail = take(loader_of(folder, state=first.state_dict(), lanes=0, chunk=0, window=0), 24 - stop)
    assert_same(head + tail, whole)


def test_every_byte_is_read_once_an_epoch(folder):
    loader = loader_of(folder, epochs=1)
    take(loader, 1000)
    stored = loader.snapshot.tar_bytes.sum() + loader.snapshot.index_bytes.sum()
    assert 0.5 * stored < loader.telemetry.total("fetch_bytes") <= stored


def test_a_damaged_sample_is_replaced_by_the_same_one_every_time(folder):
    clean = take(loader_of(folder, epochs=1), 1000)
    tar = sorted(Path(folder, "data").rglob("*.tar"))[2]
    damaged = bytearray(tar.read_bytes())
    damaged[5000] ^= 1
    tar.write_bytes(damaged)
    loader = loader_of(folder, epochs=1)
    batches = take(loader, 1000)
    again = loader_of(folder, epochs=1)
    assert_same(take(again, 1000), batches)
    (entry,) = loader.quarantine.before(1, 0)
    assert again.quarantine.before(1, 0) == [entry]
    assert loader.quarantine.before(0, entry["step"]) == [], "not before its turn"
    assert entry["reason"] == "checksum differs"
    assert entry["shard"].endswith(tar.name)
    assert entry["substitute"] != entry["number"]
    changed = [
        (before.samples[slot], b)
        for b, (before, after) in enumerate(zip(clean, batches, strict=True))
        for slot in range(8)
        if not torch.equal(before.crops[0][slot], after.crops[0][slot])
    ]
    assert changed == [(entry["number"], entry["step"])]


def test_too_many_bad_samples_stop_the_run_with_the_list(folder):
    sorted(Path(folder, "data").rglob("*.tar"))[1].unlink()
    with pytest.raises(DataError, match=r"loader\.max_bad_samples=3(.|\n)*data/00/000016.tar"):
        take(loader_of(folder, max_bad_samples=3), 1000)


def test_a_whole_missing_shard_is_survived_within_the_budget(folder):
    sorted(Path(folder, "data").rglob("*.tar"))[1].unlink()
    loader = loader_of(folder, epochs=1)
    assert len(take(loader, 1000)) == COUNT // 8
    found = loader.quarantine.before(1, 0)
    assert sorted(entry["number"] for entry in found) == list(range(16, 32))
    assert all(entry["substitute"] not in range(16, 32) for entry in found)


def test_a_bad_sample_counts_once_however_often_it_is_met(folder):
    sorted(Path(folder, "data").rglob("*.tar"))[1].unlink()
    loader = loader_of(folder, epochs=4, max_bad_samples=16)
    take(loader, 1000)
    known = loader.quarantine.before(4, 0)
    assert len(known) == 16
    again = loader_of(folder, epochs=4, max_bad_samples=16, quarantine=known)
    take(again, 1000)
    assert again.quarantine.before(4, 0) == known


def test_a_substitute_comes_from_the_rest_of_its_own_window(folder):
    """Steps of 3 places in windows of 10: a batch straddles two."""
    settings = {"global_batch": 12, "lanes": 4, "chunk": 5, "window": 2}
    order = loader_of(folder, **settings).order
    tar = sorted(Path(folder, "data").rglob("*.tar"))[2]
    tar.write_bytes(tar.read_bytes()[:512])  # all of 32 … 47
    loader = loader_of(folder, epochs=1, **settings)
    take(loader, 1000)
    entries = loader.quarantine.before(1, 0)
    assert len(entries) == 16
    places = np.arange(order.samples_per_lane)
    for entry in entries:
        for lane in range(4):
            row = order.sample_at(0, np.full_like(places, lane), places).tolist()
            if entry["number"] in row:
                expected = order.replacements(0, lane, row.index(entry["number"]))
                good = next(number for number in expected if number not in range(32, 48))
                assert entry["substitute"] == good


def test_a_window_of_nothing_but_bad_samples_takes_from_the_next(folder):
    """21 places a lane in windows of 10: the last window is one sample, which is damaged."""
    settings = {"global_batch": 4, "lanes": 4, "chunk": 5, "window": 2}
    order = loader_of(folder, **settings).order
    last = int(order.sample_at(0, np.array([1]), np.array([20]))[0])
    tar = Path(folder, "data", "00", f"{last // 16 * 16:06d}.tar")
    body = bytearray(tar.read_bytes())
    index = parse_parquet(tar.with_suffix(".parquet").read_bytes())
    body[index["offset"][last % 16].as_py() + 100] ^= 1
    tar.write_bytes(body)
    loader = loader_of(folder, epochs=1, **settings)
    take(loader, 1000)
    (entry,) = loader.quarantine.before(1, 0)
    assert (entry["number"], entry["step"]) == (last, 20)


def test_two_iterations_do_not_disturb_each_other(folder):
    loader = loader_of(folder)
    with loader:
        first = iter(loader)
        next(first)
        second = iter(loader)
        batch = next(second)
        del first
        assert next(second).step == batch.step + 1


def test_what_does_not_fit_is_refused(folder):
    with pytest.raises(UsageError, match=r"loader\.budget_bytes"):
        loader_of(folder, budget_bytes=1000)
    with pytest.raises(UsageError, match="does not divide the 4 lanes"):
        loader_of(folder, world=(0, 3))
    with pytest.raises(UsageError, match="fewer than one global batch"):
        loader_of(folder, global_batch=128)
    state = loader_of(folder).state_dict()
    with pytest.raises(UsageError, match=r"loader\.chunk is 6, .* written with 5"):
        loader_of(folder, state=state, chunk=6)
    with pytest.raises(ManifestError, match="shard_tools"):
        loader_of(f"{folder}/nothing")


def test_nothing_is_left_running(folder):
    import threading

    before = threading.active_count()
    take(loader_of(folder), 3)
    assert threading.active_count() == before
    assert open_store(folder).head("snapshots/v000001.parquet") is not None
