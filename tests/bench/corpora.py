"""What becomes of other projects' test images, broken and hostile ones among them.

    python -m tests.bench.corpora     download, judge, and write VERDICTS.md
    rows()                            the same as rows of `make bench`

Every file of three corpora goes through a Sandbox with the default settings: the images of Pillow's
source distribution, and of Debian's source packages of gdk-pixbuf and exiv2. They are downloaded by
pip and apt-get into build/corpora and never leave it (their licences are mixed).
"""

import re
import subprocess
import sys
import tarfile
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from pipeline import decode
from pipeline.errors import CropstreamError, SampleError
from shard_tools.judge import ImageSettings
from shard_tools.sandbox import DECODER_DIED, DECODER_HUNG, Sandbox
from tests.bench.rows import Row

FOLDER = Path("build/corpora")
REPORT = Path("VERDICTS.md")
OK = "ok"

_TIME_LIMIT_S = 20.0
_DOWNLOAD_LIMIT_S = 600
_LISTED = 100  # names at most, a verdict
_PILLOW = "pillow==13.0.0"
_CORPORA = {  # name -> (what its archive's name starts with, folders of images in it)
    "pillow": ("pillow-", ("Tests/images/",)),
    "gdk-pixbuf": ("gdk-pixbuf_", ("tests/",)),
    "exiv2": ("exiv2_", ("test/data/",)),
}


GROUP = "pack."


@dataclass(frozen=True)
class Corpus:
    """The verdicts on one corpus; every file's is OK or the reason of its rejection."""

    name: str
    archive: str
    verdicts: dict[str, str]  # by path inside the corpus
    num_files: int
    seconds: float

    def count(self, verdict: str) -> int:
        return sum(each == verdict for each in self.verdicts.values())


def rows() -> Iterator[Row]:
    """Four rows a corpus; without a value where it cannot be downloaded."""
    for name in _CORPORA:
        label = f"pack.corpus_{name.replace('-', '_')}"
        try:
            corpus = judge_corpus(name)
        except OSError as error:
            for what in ("judged", "crashes", "hangs", "time"):
                yield Row(f"{label}_{what}", None, "", note=f"no corpus: {error}")
            continue
        note = f"{corpus.count(OK)} of {corpus.num_files} files of {corpus.archive} are accepted"
        share = len(corpus.verdicts) / corpus.num_files
        yield Row(f"{label}_judged", share, "of files", target=">= 1", note=note)
        yield Row(f"{label}_crashes", corpus.count(DECODER_DIED), "images", target="<= 0")
        yield Row(f"{label}_hangs", corpus.count(DECODER_HUNG), "images", target="<= 0")
        yield Row(f"{label}_time", corpus.seconds, "s", note="in a sandbox")


def judge_corpus(name: str) -> Corpus:
    """Download a corpus if it is not there, and judge every file of it.

    Raises OSError if it cannot be had.
    """
    prefix, folders = _CORPORA[name]
    archive = _archive(name, prefix)
    files = list(_files(archive, folders))
    started = time.monotonic()
    with Sandbox(ImageSettings(), time_limit_s=_TIME_LIMIT_S) as sandbox:
        found = {path: _verdict(sandbox, data) for path, data in files}
    verdicts = {path: verdict for path, verdict in found.items() if verdict is not None}
    return Corpus(name, archive.name, verdicts, len(files), time.monotonic() - started)


def _verdict(sandbox: Sandbox, data: bytes) -> str | None:
    try:
        sandbox.judge(data)
    except SampleError as error:
        return error.reason
    except CropstreamError:  # the sandbox itself failed
        return None
    return OK


def _files(archive: Path, folders: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """The path, without the archive's own top folder, and bytes of every file in the folders."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = str(PurePosixPath(*PurePosixPath(member.name).parts[1:]))
            if member.isfile() and path.startswith(folders):
                opened = tar.extractfile(member)
                assert opened is not None
                yield path, opened.read()


def _archive(name: str, prefix: str) -> Path:
    """The archive of a corpus, downloaded unless an earlier run did."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if (found := _find(prefix)) is None:
        _download_pillow() if name == "pillow" else _download_debian(name)
        found = _find(prefix)
    if found is None:
        raise FileNotFoundError(f"nothing was downloaded for {name}")
    return found


def _find(prefix: str) -> Path | None:
    archives = sorted(FOLDER.glob(f"{prefix}*.tar.*"))
    return next((path for path in archives if ".debian." not in path.name), None)


def _download_pillow() -> None:
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", "pillow"]
    _run([sys.executable, "-m", "pip", "download", *options, _PILLOW, "--dest", str(FOLDER)])


def _download_debian(package: str) -> None:
    options = _apt_options()
    _run(["apt-get", *options, "source", "--download-only", package], folder=FOLDER)


@cache
def _apt_options() -> tuple[str, ...]:
    """Options for an apt-get of our own that also lists source packages; nothing needs root."""
    apt = (FOLDER / "apt").absolute()
    for folder in ("sources.list.d", "lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    for path in (Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")):
        if path.is_file() and (text := _with_sources(path.read_text())):
            (apt / "sources.list.d" / path.name).write_text(text)
    options = (
        *("-o", "Dir::Etc::sourcelist=/dev/null"),
        *("-o", f"Dir::Etc::sourceparts={apt}/sources.list.d"),
        *("-o", f"Dir::State::lists={apt}/lists"),
        *("-o", f"Dir::Cache={apt}/cache"),
        *("-o", "APT::Sandbox::User="),
    )
    _run(["apt-get", *options, "--quiet", "update"])
    return options


def _with_sources(entries: str) -> str:
    """apt's entries with source packages in place of binary ones, the distribution's only."""
    if not re.search("debian|ubuntu", entries):
        return ""
    entries = re.sub(r"^Types:.*$", "Types: deb-src", entries, flags=re.MULTILINE)
    return re.sub(r"^deb ", "deb-src ", entries, flags=re.MULTILINE)


def _run(command: list[str], folder: Path = Path()) -> None:
    """Run a command to its end; whatever goes wrong is an OSError."""
    try:
        subprocess.run(
            command,
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_LIMIT_S,
        )
    except subprocess.CalledProcessError as error:
        complaint = error.stderr.strip().rpartition("\n")[2]
        raise OSError(f"{Path(command[0]).name} failed: {complaint}") from None
    except subprocess.TimeoutExpired as error:
        raise OSError(str(error)) from None


def report(corpora: list[Corpus]) -> str:
    """VERDICTS.md: the table of decode.py, and what became of every corpus."""
    return "\n".join([_INTRODUCTION, *_kinds(), "", *_counts(corpora), "", *_names(corpora), ""])


_INTRODUCTION = """# Verdicts

What becomes of which image. Written by `python -m tests.bench.corpora`, which downloads three test
corpora and judges every file of them with the default settings of `shard_tools pack`, in a sandbox.

Decoded are JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF, told by content. JPEG 2000, JPEG XL, HEIC, ICO
and Photoshop files are "unsupported", everything else is "not an image". Packing keeps the bytes of
what it accepts; these are the pixels that come out of them:

| image | becomes |
| --- | --- |"""


def _kinds() -> Iterator[str]:
    """The table in decode.py's docstring."""
    rows = re.findall(r"^    (\S.*?)  +(\S.*)$", decode.__doc__ or "", flags=re.MULTILINE)
    assert rows
    for kind, outcome in rows:
        yield f"| {kind} | {outcome} |"


def _counts(corpora: list[Corpus]) -> Iterator[str]:
    yield "## Three corpora of broken and hostile files"
    yield ""
    yield "Files by verdict. The folders also hold documents, programs and formats of other kinds,"
    yield 'all "not an image". No decoder crashed or hung unless the last rows say so.'
    yield ""
    yield "| verdict | " + " | ".join(corpus.archive for corpus in corpora) + " |"
    yield "| --- |" + " ---: |" * len(corpora)
    found = {verdict for corpus in corpora for verdict in corpus.verdicts.values()}
    last = [DECODER_DIED, DECODER_HUNG]
    for verdict in [OK, *sorted(found - {OK, *last}), *last]:
        yield f"| {verdict} | " + " | ".join(str(c.count(verdict)) for c in corpora) + " |"
    yield "| all | " + " | ".join(str(corpus.num_files) for corpus in corpora) + " |"


def _names(corpora: list[Corpus]) -> Iterator[str]:
    """The files of the first corpus by verdict; of long lists only how many of each extension."""
    corpus = corpora[0]
    yield f"## {corpus.archive}, file by file"
    by_verdict = defaultdict(list)
    for path, verdict in sorted(corpus.verdicts.items()):
        by_verdict[verdict].append(path.removeprefix(_CORPORA[corpus.name][1][0]))
    for verdict, names in sorted(by_verdict.items()):
        listed = names if len(names) <= _LISTED else _extensions(names)
        yield ""
        yield f"**{verdict}** ({len(names)}):"
        yield from textwrap.wrap(", ".join(listed), 100, break_on_hyphens=False)


def _extensions(names: list[str]) -> list[str]:
    counts = Counter(PurePosixPath(name).suffix.lower() or "no extension" for name in names)
    return [f"{count} {extension}" for extension, count in sorted(counts.items())]


def main() -> None:
    try:
        corpora = [judge_corpus(name) for name in _CORPORA]
    except OSError as error:
        sys.exit(f"error: {REPORT} needs all {len(_CORPORA)} corpora: {error}")
    REPORT.write_text(report(corpora))


if __name__ == "__main__":
    main()
