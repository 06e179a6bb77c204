"""The command on a real store: its table adds up, its page is drawn, its mistakes are told."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.augment import AugmentConfig
from pipeline.crops import CropsConfig
from pipeline.errors import DataError
from pipeline.profile import Profile, _fitting_batch, main, verdict
from pipeline.samples import RawSample
from pipeline.stages import Cutting, Looping, Reading, _cpu_s, measure_cutting
from tests.support.dataset import pictures, write_dataset
from tests.support.launch import ROOT, environment

SMALL = (
    *("crops.global_size_px=32", "crops.local_size_px=16", "loader.global_batch=8"),
    *("loader.lanes=4", "loader.chunk=5", "loader.window=2", "loader.workers=1"),
)


def profile(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.profile", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def exit_code() -> int:
    try:
        return main()
    except SystemExit as end:  # of argparse
        return int(end.code or 0)


def test_measures_a_data_set_on_s3(s3_url: str, tmp_path: Path) -> None:
    write_dataset(s3_url, pictures(96, size_px=(100, 200)))
    config, page = tmp_path / "run.toml", tmp_path / "timeline.html"
    config.write_text('[loader]\ndataset = "s3://other/data"\n[queue]\nlength = 5\n')
    result = profile(
        *(s3_url, "--config", str(config), "--seconds", "1", "--images-per-s", "123"),
        *("--out", str(page), *SMALL),
    )
    assert result.returncode == 0, result.stderr
    said = result.stdout
    assert f"{s3_url}, version 1: 96 images" in said
    for stage in ("reading alone", "one core", "the loader", "its waits"):
        assert re.search(rf"^{stage} .*\d", said, re.MULTILINE), stage
    for stage in ("reading alone: ", "one core: ", "the loader: "):
        assert re.search(rf"^{stage}.* …$", result.stderr, re.MULTILINE), stage
    assert re.search(
        r"^(bound|held up) by \w+.*: .*a GPU of 123 images/s needs \d+ such cores", said, re.M
    )
    row = re.search(r"^ +128 (.*)$", said, re.MULTILINE)
    assert row is not None
    assert row[1].split() == ["123", "g"] * 4, "with so many cores the given device is the bound"
    drawn = page.read_text()
    assert "Images per second" in drawn
    assert "decode" in drawn


def test_says_what_is_wrong_before_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(str(tmp_path / "data"), pictures(8))
    url = str(tmp_path / "data")
    for arguments, code, message in [
        ([url, "loader.thread=1"], 2, "loader.thread: unknown key"),
        ([url, "que.length=1"], 2, "que: unknown key"),
        ([url, "--out", str(tmp_path / "none/page.html")], 2, "cannot write --out"),
        ([url], 2, "loader.global_batch"),  # of 256 images, where there are 8
        (['loader.mix=[{dataset="a"}]'], 2, "profile one data set at a time"),
        (["loader.global_batch=8", url], 2, "give the data set first"),
        ([str(tmp_path / "nothing")], 1, "nothing"),
        ([url, "--seconds", "0"], 2, "must be a positive number"),
    ]:
        monkeypatch.setattr(sys, "argv", ["profile", *arguments])
        assert exit_code() == code, arguments
        said = capsys.readouterr()
        assert message in said.err, arguments
        assert said.out == ""


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys\nfrom pipeline import profile\n"
        "sys.argv[1:] = ['--help']\n"
        "try:\n    profile.main()\nexcept SystemExit as end:\n    print(end.code)\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.endswith("0\nFalse\n")
    assert "exit codes" in result.stdout


LOOPING = Looping(
    start_s=1.0,
    wall_s=10.0,
    cpu_s=10.0,
    num_images=5_860,
    resident_bytes=0,
    sums={"wait_fetch_s": 7.2, "wait_decode_s": 2.1, "fetch_bytes": 45e6, "fetch_requests": 1e3},
    spans=[],
    batches=[],
)
PROFILE = Profile(
    title="data",
    num_images=10_000,
    sample_bytes=45e3,
    num_cores=2,
    reading=Reading(wall_s=1.0, cpu_s=0.1, read_bytes=56e6, requests=1e3, retries=0.0),
    cutting=Cutting(1e-3, 1e-3, 1e-3),
    looping=LOOPING,
    device_work=None,
    given_images_per_s=None,
)


def test_a_loader_near_its_slowest_stage_is_bound_by_it() -> None:
    said = verdict(replace(PROFILE, looping=replace(LOOPING, num_images=9_000)))
    assert said.startswith("bound by network: the network brings 1,244 images/s, ")
    assert "the loader reached 900;" in said


def test_a_loader_far_below_every_stage_is_held_up_by_what_it_waits_for() -> None:
    said = verdict(PROFILE)
    assert said.startswith("held up by fetch: the loader reached 586 of the 1,172 images/s ")
    assert "waited for fetch 72 %, decode 21 %: requests of 45 kB" in said
    assert "loader.chunk" in said
    large = replace(LOOPING, sums={**LOOPING.sums, "fetch_bytes": 6e9})
    said = verdict(replace(PROFILE, looping=large))
    assert "requests of 6,000 kB" in said
    assert "latency" not in said
    late = replace(LOOPING, sums={"wait_handover_s": 5.0})
    assert "loader.prefetch_batches" in verdict(replace(PROFILE, looping=late))


def test_a_stage_ends_in_the_middle_of_a_round_but_measures_one_image() -> None:
    done: list[int] = []

    def work() -> Iterator[int]:
        for image in range(1_000_000_000):
            done.append(image)
            yield 1

    _cpu_s(work, seconds=0.0)
    assert done == [0]


def test_cutting_tries_until_it_has_an_image() -> None:
    crops = CropsConfig(global_size_px=32, local_size_px=16)
    bodies = [b"no image", *pictures(40)]
    samples = [RawSample(n, f"key{n}", "shard", body, None) for n, body in enumerate(bodies)]
    cutting = measure_cutting(samples, crops, AugmentConfig(), seconds=0.0)
    assert min(cutting.decode_s, cutting.crops_s, cutting.colour_s) > 0
    with pytest.raises(DataError, match="none of 1 samples"):
        measure_cutting(samples[:1], crops, AugmentConfig(), seconds=0.0)


def test_batches_shrink_to_what_fits_into_the_time() -> None:
    assert _fitting_batch(8, 2, image_s=2.0, seconds=6.0) == 2
    assert _fitting_batch(256, 2, image_s=0.1, seconds=6.0) == 30
    assert _fitting_batch(256, 2, image_s=0.001, seconds=6.0) == 256
    assert _fitting_batch(4, 16, image_s=9.0, seconds=6.0) == 4
