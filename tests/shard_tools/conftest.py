"""Folders of small real images, and the command line run as a user would run it."""

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from skimage import data

from pipeline.errors import run_command
from shard_tools.__main__ import main

ROOT = Path(__file__).parents[2]
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")  # they come inside scikit-image's wheel


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        result: dict[str, Any] = json.loads(self.out)
        return result


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "shard_tools", *arguments]


def shard_tools(*arguments: str) -> Finished:
    """Run a command line to its end in this process, which saves a second."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_command(lambda: main(arguments))
        except SystemExit as ending:  # argparse
            code = int(str(ending.code))
    return Finished(code, out.getvalue(), err.getvalue())


def spawn_shard_tools(*arguments: str, **environment: str) -> Finished:
    """Run `python -m shard_tools …` to its end in a process of its own."""
    child = subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=120,
    )
    return Finished(child.returncode, child.stdout, child.stderr)


def write_images(folder: Path, count: int, *, size_px: int = 96) -> None:
    """Distinct cut-outs of photographs, a sub-folder for each photograph."""
    for number in range(count):
        name = PHOTOGRAPHS[number % len(PHOTOGRAPHS)]
        pixels = getattr(data, name)()
        top = (7 * number) % (pixels.shape[0] - size_px)
        left = (11 * number) % (pixels.shape[1] - size_px)
        cut = Image.fromarray(pixels[top : top + size_px, left : left + size_px])
        (folder / name).mkdir(parents=True, exist_ok=True)
        extension = ("jpg", "png", "webp")[number % 7 % 3]
        cut.save(folder / name / f"{number:05d}.{extension}")


def write_odd_ones(folder: Path) -> dict[str, str]:
    """Files that are to be rejected, and why."""
    whole = io.BytesIO()
    Image.fromarray(data.coffee()[:200, :200]).save(whole, "JPEG")
    (folder / "coffee" / "cut.jpg").write_bytes(whole.getvalue()[:-2000])
    (folder / "notes.txt").write_text("not a picture")
    (folder / "empty.png").touch()
    return {"coffee/cut.jpg": "truncated", "notes.txt": "not an image", "empty.png": "not an image"}


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of three labels and three files that are none. Do not change it."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 60)
    write_odd_ones(folder)
    return folder


@pytest.fixture(params=["file", "s3"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a data set that is not there yet, on a directory and on S3."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_url"))
    return f"file://{tmp_path}/set"
