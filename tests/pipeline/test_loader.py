"""The loader on real stores: same batches whatever the world size, workers or interruptions.

Most loaders here work in threads of the test (workers=0), the very code that runs in processes;
what concerns the processes themselves is in test_worker.py.
"""

import json
import shutil
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.augment import AugmentConfig, draw_augment
from pipeline.augment_device import augment
from pipeline.batches import BatchFiller
from pipeline.crops import CropsConfig
from pipeline.errors import DataError, ManifestError, UsageError
from pipeline.loader import Batch, LoaderConfig, MixPart, MultiCropLoader
from pipeline.ring import Pulse
from pipeline.shards import parse_parquet
from pipeline.store import open_store
from tests.support.dataset import pictures, write_dataset
from tests.support.fault_proxy import FaultProxy

CROPS = CropsConfig(global_size_px=32, local_crops=2, local_size_px=16)
COUNT = 96


def loader_of(
    url: str | tuple[MixPart, ...],
    *,
    world: tuple[int, int] = (0, 1),
    state=None,
    epochs=None,
    quarantine=(),
    **settings,
):
    sizes = {"global_batch": 8, "lanes": 4, "chunk": 5, "window": 2}
    config = LoaderConfig(**source(url), **(sizes | {"workers": 0, "threads": 2} | settings))
    return MultiCropLoader(
        config,
        CROPS,
        AugmentConfig(),
        seed=3,
        rank=world[0],
        world_size=world[1],
        epochs=epochs,
        state=state,
        quarantine=quarantine,
    )


def source(url: str | tuple[MixPart, ...]) -> dict[str, Any]:
    return {"dataset": url} if isinstance(url, str) else {"mix": url}


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


def test_world_size_workers_and_threads_change_nothing(folder):
    alone = take(loader_of(folder, threads=1), 20)
    assert_same(take(loader_of(folder, threads=5), 20), alone)
    assert_same(take(loader_of(folder, workers=3), 20), alone)
    ranks = [take(loader_of(folder, world=(rank, 2), workers=rank), 20) for rank in range(2)]
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


@pytest.mark.parametrize("position", [(0, 0), (0, 77), (3, 119), (10**9, 60)])
def test_resuming_anywhere_reads_no_more_than_beginning(s3, s3_url, monkeypatch, position):
    """At most window + 1 chunks a lane, and as much again as the first batches make room for."""
    sizes = {"chunk": 4, "window": 1}
    write_dataset(s3_url, pictures(960), per_shard=64)
    state = loader_of(s3_url, **sizes).state_dict()
    state |= dict(zip(("epoch", "step"), position, strict=True))
    with FaultProxy(s3.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        loader = loader_of(s3_url, state=state, **sizes)
        (batch,) = take(loader, 1)
        requests = [each.request for each in proxy.exchanges]
    (order,) = loader.mixture.orders
    np.testing.assert_array_equal(batch.samples, order.batch(*position))
    (snapshot,) = loader.snapshots
    tars = [each for each in requests if each.target.endswith(".tar")]
    asked = sum((each.end_byte or 0) - each.first_byte for each in tars)
    assert 0 < asked < snapshot.tar_bytes.sum() / 8
    assert len(requests) < 960 / 8


def test_every_byte_is_read_once_an_epoch(folder):
    loader = loader_of(folder, epochs=1)
    take(loader, 1000)
    (snapshot,) = loader.snapshots
    stored = snapshot.tar_bytes.sum() + snapshot.index_bytes.sum()
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
    (order,) = loader_of(folder, **settings).mixture.orders
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
    (order,) = loader_of(folder, **settings).mixture.orders
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


def test_an_iteration_that_was_ended_says_so(folder):
    loader = loader_of(folder)
    batches = iter(loader)
    next(batches)
    loader.close()
    with pytest.raises(UsageError, match="closed or begun again"):
        for _ in batches:
            pass


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
    before = set(threading.enumerate())
    take(loader_of(folder), 3)
    left = {thread.name.split("_")[0] for thread in set(threading.enumerate()) - before}
    assert left <= {"fetch", "file", "asyncio"}, "the loop of all reading stays with the process"
    assert open_store(folder).head("snapshots/v000001.parquet") is not None


def test_colours_of_workers_are_those_of_the_device_code(folder):
    """Crops before colour, coloured by what a GPU would run, are the batches of a CPU run."""
    loader = loader_of(folder)
    batch = take(loader, 3)[-1]
    (cut,) = [
        [block.copy() for block in cut.blocks]
        for cut in islice(loader_of(folder).cut_batches(), 2, 3)
    ]
    first = 0
    for block, crops in zip(cut, batch.crops, strict=True):
        params = draw_augment(
            AugmentConfig(),
            seed=3,
            epoch=0,
            samples=batch.samples,
            crop_indices=range(first, first + len(block)),
        )
        pixels = torch.from_numpy(block).flatten(0, 1).permute(0, 3, 1, 2)
        expected = augment(pixels, params, AugmentConfig())
        torch.testing.assert_close(crops, expected, rtol=0, atol=0)
        assert crops.is_contiguous(memory_format=torch.channels_last)
        first += len(block)


def test_batches_that_are_kept_never_change_and_what_is_dropped_is_used_again(folder):
    with loader_of(folder) as loader:
        batches = iter(loader)
        kept = list(islice(batches, 5))
        copies = [[crops.clone() for crops in batch.crops] for batch in kept]
        addresses = {crops.data_ptr() for batch in kept for crops in batch.crops}
        assert len(addresses) == 10
        for _ in islice(batches, 5):
            pass
        for batch, copied in zip(kept, copies, strict=True):
            for crops, before in zip(batch.crops, copied, strict=True):
                assert torch.equal(crops, before)
        part = kept[3].crops[0][5:7]
        expected = part.clone()
        del kept, batch, crops
        later = {crops.data_ptr() for batch in islice(batches, 6) for crops in batch.crops}
        assert len(later) <= 6, "of two resolutions: the loop's, the one being made, and one spare"
        assert torch.equal(part, expected)


@pytest.fixture
def mix(tmp_path: Path) -> tuple[MixPart, ...]:
    """60 and 40 pictures; the smaller set comes three times as often."""
    write_dataset(str(tmp_path / "one"), pictures(60, seed=1))
    write_dataset(str(tmp_path / "two"), pictures(40, seed=2))
    parts = (MixPart(dataset=str(tmp_path / "one")), MixPart(dataset=str(tmp_path / "two")))
    return parts[0], replace(parts[1], weight=3.0)


def test_a_mixture_is_the_same_for_any_world_and_any_workers(mix):
    alone = take(loader_of(mix), 40)
    assert alone[-1].epoch == 3
    assert_same(take(loader_of(mix, workers=2), 40), alone)
    ranks = [take(loader_of(mix, world=(rank, 2)), 40) for rank in range(2)]
    for step, batch in enumerate(alone):
        samples = np.concatenate([rank[step].samples for rank in ranks])
        np.testing.assert_array_equal(samples, batch.samples)
    numbers = np.concatenate([batch.samples for batch in alone])
    assert 0.7 < np.mean(numbers >= 60) < 0.8
    assert set(numbers.tolist()) == set(range(100))


def test_a_worker_finds_the_epoch_in_which_a_sample_is_its_turn(mix):
    loader = loader_of(mix)
    (share,) = loader._shares(colour=False)
    with BatchFiller(share, Pulse(np.zeros(5, np.int64)), loader.telemetry) as filler:
        steps = range(20, 23)
        epochs: dict[int, int] = {}
        for step in steps:
            slots = loader.mixture.slots(*divmod(step, loader.steps_per_epoch), share.lanes)
            for number, epoch in zip(slots.global_numbers, slots.epoch, strict=True):
                epochs.setdefault(int(number), int(epoch))
        assert len(set(epochs.values())) > 1
        for number, epoch in epochs.items():
            assert filler.epoch_of(number, steps) == epoch


@pytest.mark.parametrize("stop", [1, 13, 29])
def test_a_mixture_resumes_where_it_was(mix, stop):
    whole = take(loader_of(mix), 40)
    first = loader_of(mix)
    head = take(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    tail = take(loader_of(mix, state=state, lanes=0, chunk=0, window=0), 40 - stop)
    assert_same(head + tail, whole)


def test_bad_samples_of_a_mixture_are_told_by_global_number_and_url(mix):
    tar = sorted(Path(mix[1].dataset, "data").rglob("*.tar"))[2]
    tar.unlink()
    loader = loader_of(mix, epochs=3)
    batches = take(loader, 1000)
    assert_same(take(loader_of(mix, epochs=3, workers=2), 1000), batches)
    found = loader.quarantine.before(3, 0)
    assert {entry["number"] for entry in found} == set(range(92, 100))
    assert {entry["shard"] for entry in found} == {f"file://{tar}"}
    assert all(60 <= entry["substitute"] < 100 for entry in found), "of the same source"
    known = loader_of(mix, epochs=3, quarantine=found)
    assert_same(take(known, 1000), batches)
    assert known.quarantine.before(3, 0) == found


@pytest.mark.parametrize(("reason", "is_read"), [("decoder died: signal 11", False), ("", True)])
def test_of_what_is_known_to_be_bad_only_the_deadly_is_not_read_again(folder, reason, is_read):
    tar = sorted(Path(folder, "data").rglob("*.tar"))[1]
    clean = take(loader_of(folder, epochs=1), 1000)
    away = tar.rename(tar.with_suffix(".away"))
    first = loader_of(folder, epochs=1)
    batches = take(first, 1000)
    found = first.quarantine.before(1, 0)
    away.rename(tar)
    known = [entry | {"reason": reason or entry["reason"]} for entry in found]
    again = loader_of(folder, epochs=1, quarantine=known)
    assert_same(take(again, 1000), clean if is_read else batches)
    assert again.telemetry.total("substituted_samples") == (0 if is_read else 16)


def test_what_comes_back_comes_back_to_a_resumed_run_as_well(folder):
    second = take(loader_of(folder, epochs=2), 1000)[COUNT // 8 :]
    tar = sorted(Path(folder, "data").rglob("*.tar"))[1]
    away = tar.rename(tar.with_suffix(".away"))
    first = loader_of(folder)
    take(first, COUNT // 8)
    found = first.quarantine.before(1, 0)
    away.rename(tar)
    resumed = loader_of(folder, epochs=2, state=first.state_dict(), quarantine=found)
    assert_same(take(resumed, 1000), second)
    assert resumed.quarantine.before(2, 0) == found


def test_what_cannot_start_leaves_nothing_open(folder):
    """No thread can be started with a stack as large as all addresses: a real failure."""
    with loader_of(folder) as loader:
        before = len(list(Path("/proc/self/fd").iterdir()))
        size = threading.stack_size(1 << 46)
        try:
            with pytest.raises(RuntimeError, match="start new thread"):
                next(iter(loader))
        finally:
            threading.stack_size(size)
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        assert len(next(iter(loader)).crops) == 2


def test_a_state_that_says_otherwise_is_refused_by_the_name_of_the_setting(mix, folder):
    state = loader_of(mix).state_dict()
    for setting, changes in {
        r"loader\.mix\[1\]\.weight is 2": {"weight": 2.0},
        r"loader\.mix\[1\]\.version is 7": {"version": 7},
    }.items():
        with pytest.raises(UsageError, match=setting):
            loader_of((mix[0], replace(mix[1], **changes)), state=state)
    with pytest.raises(UsageError, match="names 1 data set"):
        loader_of(folder, state=state)
    with pytest.raises(UsageError, match=r"loader\.lanes is 2, .* written with 4"):
        loader_of(mix, state=state, lanes=2)
    with pytest.raises(UsageError, match=r"train\.seed is 3, .* written with 4"):
        loader_of(mix, state=state | {"seed": 4})
    for name in ("seed", "lanes", "sources"):
        less = {key: value for key, value in state.items() if key != name}
        with pytest.raises(UsageError, match=f"state otherwise, without {name};"):
            loader_of(mix, state=less)
    for name in ("attempt", "chunk"):
        less = [{k: v for k, v in each.items() if k != name} for each in state["sources"]]
        with pytest.raises(UsageError, match=f"state otherwise, without {name} of sources;"):
            loader_of(mix, state=state | {"sources": less})
    loader = loader_of(folder)
    with pytest.raises(UsageError, match=r"loader\.window is 2, .* written with 3"):
        loader.load_state_dict(loader_of(folder, window=3).state_dict())


def test_a_seed_of_0_is_a_seed(folder):
    config = loader_of(folder).config
    state = MultiCropLoader(config, CROPS, AugmentConfig(), seed=0).state_dict()
    same = MultiCropLoader(config, CROPS, AugmentConfig(), seed=0, state=state)
    assert same.mixture.seed == 0
    with pytest.raises(UsageError, match=r"train\.seed is 3, .* written with 0"):
        loader_of(folder, state=state)
    with pytest.raises(UsageError, match=r"train\.seed is 0, .* written with 3"):
        MultiCropLoader(
            config, CROPS, AugmentConfig(), seed=0, state=loader_of(folder).state_dict()
        )


def test_another_data_set_in_the_place_of_one_is_refused_and_a_copy_is_not(tmp_path):
    for name in ("one", "two"):
        write_dataset(str(tmp_path / name), pictures(48))
    one, two = (MixPart(dataset=str(tmp_path / name)) for name in ("one", "two"))
    state = json.loads(json.dumps(loader_of((one, two)).state_dict()))
    with pytest.raises(UsageError, match=r"mix\[0\]\.dataset is .*/two, .* data set \(.*/one"):
        loader_of((two, one), state=state)
    copy = MixPart(dataset=str(shutil.copytree(one.dataset, tmp_path / "copy")))
    loader_of((copy, two), state=state)
    alone = loader_of(one.dataset).state_dict()
    with pytest.raises(UsageError, match=r"loader\.dataset is .*/two, "):
        loader_of(two.dataset, state=alone)
    loader_of(copy.dataset, state=alone)


def test_one_data_set_or_a_mixture():
    for sources in ({}, {"dataset": "a", "mix": (MixPart(dataset="b"),)}):
        with pytest.raises(ValueError, match="dataset"):
            LoaderConfig(**sources)
    with pytest.raises(ValueError, match="version"):
        LoaderConfig(mix=(MixPart(dataset="b"),), version=1)


def test_it_says_what_it_loads_and_with_which_means(mix, folder):
    line = loader_of(folder, workers=2, threads=3).describe()
    assert f"96 images of {folder} (version 1, chunk 5, window 2)" in line
    assert "1 rank(s) of 8 images, each with 2 worker(s) of 3 thread(s)" in line
    assert "no worker processes" in loader_of(folder).describe()
    assert "weight 3)" in loader_of(mix).describe()
    assert "\n" not in line


def test_waiting_is_split_without_remainder(folder):
    loader = loader_of(folder, epochs=1)
    take(loader, 1000)
    sums = loader.telemetry.take()
    parts = sums["wait_fetch_s"] + sums["wait_decode_s"] + sums["wait_handover_s"]
    assert parts == pytest.approx(sums["data_wait_s"])
    assert min(sums["wait_fetch_s"], sums["wait_decode_s"], sums["wait_handover_s"]) >= 0
    assert "worker_restarts" not in sums


def test_spans_say_which_worker(folder):
    loader = MultiCropLoader(
        loader_of(folder, workers=2).config, CROPS, AugmentConfig(), seed=3, record_spans=True
    )
    take(loader, 3)
    threads = {span.thread.split("/")[0] for span in loader.telemetry.take_spans()}
    assert {"worker 0", "worker 1"} <= threads
