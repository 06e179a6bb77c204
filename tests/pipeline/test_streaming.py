import socket
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from webdataset import TarWriter

from pipeline.augment import AugmentConfig, draw_augment
from pipeline.augment_device import augment
from pipeline.crops import CropsConfig, crop_boxes, decode_crops
from pipeline.decode import guard_header
from pipeline.errors import DataError, UsageError
from pipeline.loader import LoaderConfig, MixPart, MultiCropLoader
from pipeline.store import open_store
from pipeline.streaming import StreamingLoader
from tests.support.dataset import pictures, write_dataset

CROPS = CropsConfig(global_size_px=32, local_crops=3, local_size_px=16)
BATCH = 8


def write_tars(folder: Path, images: list[bytes], *, count: int = 4) -> str:
    """The images dealt to some tars by webdataset's own writer; the tars in its notation."""
    for tar in range(count):
        with TarWriter(str(folder / f"{tar}.tar")) as writer:
            for number, image in enumerate(images[tar::count]):
                writer.write({"__key__": f"{number:04d}", "jpg": image, "txt": "a caption"})
    return f"{folder}/{{0..{count - 1}}}.tar"


def open_loader(dataset: str, config: dict | None = None, **arguments) -> StreamingLoader:
    settings = {"epoch_samples": 3 * BATCH, "shuffle_samples": 16, "threads": 2} | (config or {})
    loader_config = LoaderConfig(dataset=dataset, global_batch=BATCH, **settings)
    return StreamingLoader(loader_config, CROPS, AugmentConfig(), **({"seed": 5} | arguments))


def crops_of(image: bytes, *, epoch: int, slots: np.ndarray) -> list[torch.Tensor]:
    """What these slots must hold if all images are this one, by the way of a device."""
    header = guard_header(image)
    blocks = [
        np.empty((group.count, len(slots), group.size_px, group.size_px, 3), np.uint8)
        for group in CROPS.groups
    ]
    for row, slot in enumerate(slots.tolist()):
        size = {"width_px": header.width_px, "height_px": header.height_px}
        boxes = crop_boxes(CROPS, seed=5, epoch=epoch, sample=slot, **size)
        decode_crops(image, header, boxes, [block[:, row] for block in blocks])
    crops, first = [], 0
    for block in blocks:
        indices = range(first, first + len(block))
        params = draw_augment(
            AugmentConfig(), seed=5, epoch=epoch, samples=slots, crop_indices=indices
        )
        pixels = torch.from_numpy(block).flatten(0, 1).permute(0, 3, 1, 2)
        crops.append(augment(pixels, params, AugmentConfig()))
        first += len(block)
    return crops


def assert_equal(crops: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for mine, theirs in zip(crops, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_crops_and_colours_are_those_of_the_slot_whatever_the_world_size(tmp_path):
    (image,) = pictures(1)
    dataset = write_tars(tmp_path, [image] * 40)
    for world_size in (1, 2):
        for rank in range(world_size):
            with open_loader(dataset, rank=rank, world_size=world_size, epochs=2) as loader:
                batches = list(loader)
            assert [(b.epoch, b.step) for b in batches] == [
                (e, s) for e in (0, 1) for s in (0, 1, 2)
            ]
            size = BATCH // world_size
            for batch in batches:
                first = batch.step * BATCH + rank * size
                assert batch.samples.tolist() == list(range(first, first + size))
                assert_equal(batch.crops, crops_of(image, epoch=batch.epoch, slots=batch.samples))


def test_tars_on_a_real_store(tmp_path, s3, s3_url):
    write_tars(tmp_path, pictures(24))
    for tar in range(4):
        open_store(s3_url).put_if_absent(f"{tar}.tar", (tmp_path / f"{tar}.tar").read_bytes())
    with open_loader(f"{s3_url}/{{0..3}}.tar") as loader:
        for batch in islice(loader, 5):
            assert [crops.shape for crops in batch.crops] == [(16, 3, 32, 32), (24, 3, 16, 16)]
            assert all(crops.dtype == torch.float32 for crops in batch.crops)
        sums = loader.telemetry.take()
    assert sums["fetch_bytes"] > 24 * 500
    assert sums["data_wait_s"] == pytest.approx(sums["wait_fetch_s"] + sums["wait_decode_s"])
    assert sums["wait_fetch_s"] > 0
    assert sums["wait_decode_s"] >= 0
    assert "lost_tars" not in sums


def test_bad_images_are_left_out_and_counted_once(tmp_path):
    good = pictures(20)
    bad = [b"no image", good[0][:200]]
    with open_loader(write_tars(tmp_path, [*good, *bad]), epochs=4) as loader:
        batches = list(loader)
        entries = loader.quarantine.before(4, 0)
    assert len(batches) == 12
    assert sorted(entry["reason"].split(":")[0] for entry in entries) == [
        "not an image", "truncated",
    ]  # fmt: skip
    assert all(str(tmp_path) in entry["shard"] and entry["key"] for entry in entries)


def test_over_the_budget_the_run_fails_naming_them(tmp_path):
    dataset = write_tars(tmp_path, [*pictures(8), *[b"no image"] * 8])
    with (
        open_loader(dataset, {"max_bad_samples": 3}) as loader,
        pytest.raises(DataError, match=r"(?s)max_bad_samples=3.*\.tar: not an image"),
    ):
        list(islice(loader, 100))


def test_tars_of_bad_images_only_end_the_run_within_any_budget(tmp_path):
    with (
        open_loader(write_tars(tmp_path, [b"no image"] * 12)) as loader,
        pytest.raises(DataError, match="no image can be used in any tar"),
    ):
        next(iter(loader))


def test_images_over_the_cap_are_not_decoded(tmp_path):
    images = [*pictures(6, size_px=(20, 30)), *pictures(3, size_px=(200, 300))]
    with open_loader(write_tars(tmp_path, images), {"max_image_pixels": 10_000}) as loader:
        list(islice(loader, 4))
        assert len(loader.quarantine.before(9, 0)) == 3


def test_resuming_counts_on_and_says_what_it_cannot_do(tmp_path, caplog):
    dataset = write_tars(tmp_path, pictures(24))
    with open_loader(dataset) as loader:
        first = list(islice(loader, 4))
        state = loader.state_dict()
    assert (state["epoch"], state["step"]) == (1, 1)
    assert "world size" in caplog.text
    assert "adopt" in caplog.text
    caplog.clear()
    with open_loader(dataset, state=state) as loader:
        batch = next(iter(loader))
    assert (first[-1].epoch, first[-1].step) == (1, 0)
    assert (batch.epoch, batch.step) == (1, 1)
    assert "the data continue at another place" in caplog.text


@pytest.mark.parametrize(
    ("config", "seed", "word"), [({}, 6, "seed"), ({"epoch_samples": 80}, 5, "num_samples")]
)
def test_a_state_of_another_run_is_refused(tmp_path, config, seed, word):
    dataset = write_tars(tmp_path, pictures(8))
    with open_loader(dataset) as loader:
        state = loader.state_dict()
    with pytest.raises(UsageError, match=word):
        open_loader(dataset, config, state=state, seed=seed)


def test_the_state_of_a_packed_data_set_is_refused_and_the_other_way_round(tmp_path):
    write_dataset(str(tmp_path), pictures(16))
    packed = LoaderConfig(dataset=str(tmp_path), global_batch=BATCH, lanes=2)
    kept = MultiCropLoader(packed, CROPS, AugmentConfig(), seed=5).state_dict()
    tars = write_tars(tmp_path, pictures(8))
    with pytest.raises(UsageError, match=r"written with a packed data set.*loader\.dataset"):
        open_loader(tars, state=kept)
    with open_loader(tars) as loader:
        streamed = loader.state_dict()
    with pytest.raises(UsageError, match=r"was streamed.*start a new run"):
        MultiCropLoader(packed, CROPS, AugmentConfig(), seed=5, state=streamed)


def test_only_training_streams_tars(tmp_path):
    tars = write_tars(tmp_path, pictures(8))
    for config in (LoaderConfig(dataset=tars), LoaderConfig(mix=(MixPart(dataset=tars),))):
        with pytest.raises(UsageError, match="shard_tools adopt"):
            MultiCropLoader(config, CROPS, AugmentConfig(), seed=5)


@pytest.mark.parametrize(
    ("config", "world_size", "words"),
    [({"epoch_samples": 0}, 1, "loader.epoch_samples is 0"), ({}, 3, "multiple of 3")],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, config, world_size, words):
    with pytest.raises(UsageError, match=words):
        open_loader(f"{tmp_path}/{{0..7}}.tar", config, world_size=world_size)


def test_nothing_is_left_running(tmp_path):
    dataset = write_tars(tmp_path, pictures(24))
    before = set(threading.enumerate())
    with open_loader(dataset) as loader:
        batches = iter(loader)
        next(batches)
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before
    batches = iter(loader)  # a closed loader may be started again
    next(batches)
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 30
    assert set(threading.enumerate()) == before


def test_the_images_held_are_bounded_by_their_bytes(tmp_path):
    """With room for none, nothing is shuffled; with room for all, everything is."""
    dataset = write_tars(tmp_path, pictures(40), count=1)
    orders = []
    for budget_bytes in (1, 1 << 30):
        config = {"budget_bytes": budget_bytes, "shuffle_samples": 1000}
        with open_loader(dataset, config) as loader:
            stream = loader._stream.samples(0, 0)
            orders.append([sample.key for sample in islice(stream, 40)])
    assert orders[0] == sorted(orders[1])
    assert orders[0] != orders[1]


def test_closing_does_not_wait_for_a_store_that_never_answers(tmp_path):
    said = []

    def ask() -> None:
        try:
            next(iter(loader))
        except UsageError as error:
            said.append(str(error))

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with open_loader(f"http://127.0.0.1:{port}/0.tar", {"epoch_samples": BATCH}) as loader:
            asking = threading.Thread(target=ask)
            asking.start()
            connection, _ = silent.accept()  # it waits for an answer now
            with connection:
                loader.close()
                (follower,) = [each for each in threading.enumerate() if each.name == "stream"]
                assert follower.is_alive(), "what it waits for is not awaited"
        asking.join(30)
        assert said == ["this iteration has ended: the loader was closed or begun again"]
    follower.join(30)
    assert not follower.is_alive()


def test_who_is_told_to_stop_does_not_wait_for_a_store_that_never_answers():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dataset = f"http://127.0.0.1:{silent.getsockname()[1]}/0.tar"

        def is_stopped() -> bool:
            connections.append(silent.accept()[0])
            return True

        connections: list[socket.socket] = []
        with open_loader(dataset, {"epoch_samples": BATCH}, is_stopped=is_stopped) as loader:
            assert next(iter(loader), None) is None
            assert loader.state_dict()["step"] == 0
        connections[0].close()


def test_a_state_without_a_position_is_refused(tmp_path):
    dataset = write_tars(tmp_path, pictures(8))
    with open_loader(dataset) as loader:
        state = loader.state_dict()
    del state["epoch"]
    with pytest.raises(UsageError, match="epoch"):
        open_loader(dataset, state=state)


def test_it_says_what_it_reads(tmp_path):
    with open_loader(write_tars(tmp_path, pictures(4)), world_size=2, rank=1) as loader:
        assert loader.describe().startswith(f"4 tars of {tmp_path}")
        assert (loader.batch_size, loader.steps_per_epoch, loader.num_samples) == (4, 3, 24)
