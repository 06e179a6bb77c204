import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.augment import AugmentConfig
from pipeline.fetch import FetchConfig
from pipeline.loader import LoaderConfig
from pipeline.sequential import SequentialLoader
from pipeline.store import open_store
from tests.support.dataset import pictures, write_dataset

COUNT = 50


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    prefix = str(tmp_path) if request.param == "file" else request.getfixturevalue("s3_url")
    write_dataset(prefix, pictures(COUNT), labels=[f"class{i % 3}" for i in range(COUNT)])
    return prefix


def test_sequential_reads_every_row_once_with_its_label(url):
    seen: dict[int, str | None] = {}
    for rank in range(2):
        loader = SequentialLoader(
            LoaderConfig(dataset=url),
            AugmentConfig(),
            size_px=24,
            batch_size=7,
            rank=rank,
            world_size=2,
        )
        for batch in loader:
            assert batch.images.shape == (len(batch.labels), 3, 24, 24)
            assert not seen.keys() & set(batch.samples.tolist())
            seen |= dict(zip(batch.samples.tolist(), batch.labels, strict=True))
    assert seen == {i: f"class{i % 3}" for i in range(COUNT)}


def test_damaged_images_are_left_out_and_counted(tmp_path: Path):
    write_dataset(str(tmp_path), [*pictures(10), b"no image", *pictures(9, seed=1)])
    loader = SequentialLoader(
        LoaderConfig(dataset=str(tmp_path)), AugmentConfig(), size_px=24, batch_size=4
    )
    samples = [number for batch in loader for number in batch.samples.tolist()]
    assert samples == [number for number in range(20) if number != 10]
    assert loader.telemetry.total("bad_samples") == 1


def test_the_pixel_cap_is_the_configurations(tmp_path: Path):
    write_dataset(str(tmp_path), pictures(6, size_px=(60, 61)))
    config = LoaderConfig(dataset=str(tmp_path), max_image_pixels=100)
    loader = SequentialLoader(config, AugmentConfig(), size_px=24, batch_size=4)
    assert list(loader) == []
    assert loader.telemetry.total("bad_samples") == 6


@pytest.mark.parametrize(("visible", "cut"), [(1.0, slice(0, 32)), (224 / 256, slice(2, 30))])
def test_an_image_of_the_size_asked_for_is_seen_as_it_is(
    tmp_path: Path, visible: float, cut: slice
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    body = io.BytesIO()
    Image.fromarray(pixels).save(body, "PNG")
    write_dataset(str(tmp_path), [body.getvalue()])
    plain = AugmentConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    size_px = cut.stop - cut.start
    config = LoaderConfig(dataset=str(tmp_path))
    loader = SequentialLoader(config, plain, size_px=size_px, batch_size=1, visible=visible)
    (batch,) = loader
    seen = (batch.images[0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(seen, pixels[cut, cut])


def test_reading_follows_the_section_fetch(tmp_path: Path):
    """Seen by its cache, which is filled and then read."""
    write_dataset(str(tmp_path / "data"), pictures(9))
    fetch = FetchConfig(cache_dir=str(tmp_path / "cache"), cache_bytes=10**7)
    for hits in (0, 3):
        loader = SequentialLoader(
            LoaderConfig(dataset=str(tmp_path / "data")),
            AugmentConfig(),
            size_px=24,
            batch_size=3,
            fetch=fetch,
        )
        assert sum(len(batch.labels) for batch in loader) == 9
        assert loader.telemetry.total("cache_hits") == hits


def test_what_killed_or_hung_its_decoder_in_training_is_left_out(tmp_path: Path):
    keys = write_dataset(str(tmp_path), pictures(20))
    first = open_store(str(tmp_path)).url_of("data/00/000000.tar")
    second = open_store(str(tmp_path)).url_of("data/00/000016.tar")
    entries = [
        (first, 2, "decoder died: signal 11"),
        (second, 17, "decoder hung for 60 s"),
        (second, 3, "decoder died: signal 11"),  # such a key of another shard
        (first, 5, "truncated"),  # told by decoding it again
    ]
    loader = SequentialLoader(
        LoaderConfig(dataset=str(tmp_path)),
        AugmentConfig(),
        size_px=24,
        batch_size=8,
        quarantine=[
            {"shard": shard, "key": keys[number], "reason": reason}
            for shard, number, reason in entries
        ],
    )
    samples = [number for batch in loader for number in batch.samples.tolist()]
    assert samples == [number for number in range(20) if number not in (2, 17)]
    assert loader.telemetry.total("bad_samples") == 2
