"""Where rows come from, as a few names: hosts of URLs, folders of files, folders of tars.

A row's `source` becomes one of

    http(s)://host…              the host, in small letters, with its port
    …/shards/0001.tar#member     the folder of the tar
    s3://…, file:///…, a path    the first folder below what all such sources have in common

What sources have in common is known only at the end. It never grows, though, so groups made by a
longer common root are merged whenever a source shortens it: one pass, and memory for the names.
"""

import re
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from shard_tools.tally import Tally

# RE2, on whole columns: what is left has as many different values as there are hosts and folders.
_TAR_FOLDER = r"(?si)^(.*?)/[^/#]*\.(?:tar(?:\.\w+)?|tgz)#.*$"
_HOST = r"(?si)^(https?://)(?:[^/?#\\]*@)?([^/?#\\]*).*$"
_LAST_NAME = r"(?s)[^/]*$"

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):/?/?(.*)", re.DOTALL | re.IGNORECASE)
_Folder = tuple[str, ...]


class Origins:
    """Counts rows by origin; a row has one of several kinds (kept, masked, …)."""

    def __init__(self, num_kinds: int) -> None:
        self._hosts = Tally(num_kinds)
        self._tars = Tally(num_kinds)
        self._folders: dict[str, _Folders] = {}
        self._num_kinds = num_kinds

    def add(self, sources: pa.ChunkedArray, kind: int) -> None:
        """Count the rows of these sources, strings [rows]."""
        is_member = pc.match_substring_regex(sources, _TAR_FOLDER)
        for folder, count in _counted(_replaced(sources.filter(is_member), _TAR_FOLDER, r"\1")):
            self._tars.add(folder, count, kind)
        sources = sources.filter(pc.invert(is_member))
        is_url = pc.match_substring_regex(sources, _HOST)
        for host, count in _counted(_replaced(sources.filter(is_url), _HOST, r"\2")):
            self._hosts.add(host.lower(), count, kind)
        files = sources.filter(pc.invert(is_url))
        for folder, count in _counted(_replaced(files, _LAST_NAME, "")):
            self._add_folder(folder, count, kind)

    def top(self, num_names: int) -> tuple[dict[str, list[int]], list[int]]:
        """The most frequent origins with their counts by kind, and the counts of all others."""
        merged = Tally(self._num_kinds)
        for tally in (self._hosts, self._tars, *(each.tally for each in self._folders.values())):
            merged.merge(tally)
        return merged.top(num_names)

    def _add_folder(self, folder: str, count: int, kind: int) -> None:
        match = _SCHEME.fullmatch(folder)
        scheme, path = (match[1].lower(), match[2]) if match else ("", folder)
        folders = self._folders.setdefault(scheme, _Folders(scheme, self._num_kinds))
        folders.add(tuple(path.strip("/").split("/")), count, kind)


def is_tar_member(source: str) -> bool:
    """Whether a source is an image inside a tar: …/0001.tar#member."""
    return re.search(_TAR_FOLDER, source) is not None


class _Folders:
    """Counts by the first folder below the common root of all folders of one scheme."""

    def __init__(self, scheme: str, num_kinds: int) -> None:
        self._prefix = {"": "", "file": "file:///"}.get(scheme, f"{scheme}://")
        self._root: _Folder | None = None
        self.tally = Tally(num_kinds)

    def add(self, folder: _Folder, count: int, kind: int) -> None:
        if self._root is None:
            self._root = folder
        elif folder[: len(self._root)] != self._root:
            self._shorten(folder)
        self.tally.add(self._group(folder), count, kind)

    def _shorten(self, folder: _Folder) -> None:
        assert self._root is not None
        pairs = zip(self._root, folder, strict=False)
        common = next((n for n, (a, b) in enumerate(pairs) if a != b), len(folder))
        self._root = self._root[: min(common, len(self._root))]
        self.tally.rename({name: self._group(self._parse(name)) for name in self.tally.names()})

    def _group(self, folder: _Folder) -> str:
        assert self._root is not None
        return self._prefix + "/".join(folder[: len(self._root) + 1])

    def _parse(self, name: str) -> _Folder:
        return tuple(name.removeprefix(self._prefix).split("/"))


def _replaced(sources: pa.ChunkedArray, pattern: str, by: str) -> pa.ChunkedArray:
    return pc.replace_substring_regex(sources, pattern=pattern, replacement=by, max_replacements=1)


def _counted(names: pa.ChunkedArray) -> Iterator[tuple[str, int]]:
    for entry in pc.value_counts(names.drop_null()).to_pylist():
        yield entry["values"], entry["counts"]
