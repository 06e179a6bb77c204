"""The command on a real store: its table adds up, its page is drawn, its mistakes are told."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.profile import main
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
    assert re.search(r"^bound by \w+: .*a GPU of 123 images/s needs \d+ such cores", said, re.M)
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
