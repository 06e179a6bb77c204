"""The golden files are those that the manifest was written for."""

import hashlib

import pytest

from tests.support import golden


@pytest.mark.parametrize("name", golden.manifest()["files"])
def test_every_byte_is_as_recorded(name: str) -> None:
    body = (golden.GOLDEN / name).read_bytes()
    assert hashlib.sha256(body).hexdigest() == golden.manifest()["files"][name]["sha256"]


def test_every_file_is_recorded() -> None:
    # The last two are tested beside the order and the presets.
    ours = {"manifest.json", "README.md", "order.npz", "recipes.json"}
    there = {path.name for path in golden.GOLDEN.iterdir()} - ours
    assert there == set(golden.manifest()["files"])
