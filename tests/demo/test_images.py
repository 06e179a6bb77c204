"""The demo's pictures are distinct, varied and the same every time."""

import hashlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.demo.images import MAX_SIDE_PX, MIN_SIDE_PX, PHOTOGRAPHS, write_pictures

COUNT = 84
BROKEN = {"truncated.jpg", "not_an_image.jpg"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "pictures"
    assert write_pictures(folder, COUNT) == COUNT + len(BROKEN)
    return folder


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.*")
    }


def _readable(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.*") if path.name not in BROKEN)


def test_every_picture_is_another_one(pictures: Path) -> None:
    assert len(set(_digests(pictures).values())) == COUNT + len(BROKEN)


def test_the_label_is_the_photograph(pictures: Path) -> None:
    per_label = Counter(path.parent.name for path in _readable(pictures))
    assert set(per_label) == set(PHOTOGRAPHS)
    assert max(per_label.values()) - min(per_label.values()) <= 1


def test_sizes_stay_in_bounds_and_differ(pictures: Path) -> None:
    sizes = set()
    for path in _readable(pictures):
        with Image.open(path) as image:
            image.load()
            sizes.add(image.size)
    assert all(MIN_SIDE_PX <= side <= MAX_SIDE_PX for size in sizes for side in size)
    assert len(sizes) > COUNT // 2


def test_odd_kinds_are_among_them(pictures: Path) -> None:
    kinds = set()
    for path in _readable(pictures):
        with Image.open(path) as image:
            kinds.add((image.format, image.mode, image.getexif().get(0x0112)))
    assert kinds >= {
        ("JPEG", "RGB", None),
        ("JPEG", "L", None),
        ("JPEG", "RGB", 6),
        ("PNG", "P", None),
        ("PNG", "RGBA", None),
        ("WEBP", "RGB", None),
    }


def test_two_files_are_broken(pictures: Path) -> None:
    with (
        Image.open(pictures / "coffee" / "truncated.jpg") as image,
        pytest.raises(OSError, match="trunc"),
    ):
        image.load()
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(pictures / "astronaut" / "not_an_image.jpg")


def test_the_same_seed_gives_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "again", COUNT)
    assert _digests(tmp_path / "again") == _digests(pictures)


def test_a_finished_folder_is_left_alone(pictures: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in pictures.rglob("*")}
    write_pictures(pictures, COUNT)
    assert {path: path.stat().st_mtime_ns for path in pictures.rglob("*")} == before


def test_an_unfinished_folder_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "pictures.unfinished" / "astronaut").mkdir(parents=True)
    (tmp_path / "pictures.unfinished" / "astronaut" / "stale.jpg").write_bytes(b"")
    assert write_pictures(tmp_path / "pictures", 14) == 14 + len(BROKEN)
    assert not (tmp_path / "pictures" / "astronaut" / "stale.jpg").exists()


def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        write_pictures(tmp_path / "pictures", 3)
