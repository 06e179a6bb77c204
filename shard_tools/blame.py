"""Whose fault it is that an input cannot be read: its own, which rejects it, or its store's.

Called by shard_tools.inputs and shard_tools.adopt. One object that is gone, or that a store will
not hand out, must not hold up a job for ever; a disk that is not mounted, a network that is down or
a key that has been withdrawn must not turn into a million rejects. So there is one rule: an input
is at fault if the same store hands out another one at that moment, from the same unit or else from
the same folder. Where there is no other in either, it is enough that the folder can be listed.
"""

from collections.abc import Iterable
from itertools import islice

from pipeline.errors import (
    AccessDeniedError,
    CropstreamError,
    ObjectChangedError,
    ObjectMissingError,
    SampleError,
    StoreError,
)
from pipeline.store import find_file, list_files, open_stream

MISSING = "missing"  # gone since the plan was made
CHANGED = "changed"  # not what was planned
DENIED = "access denied"  # on a store that hands out others
UNREADABLE = "unreadable"  # the disk or the store fails on it again and again

_TRIED_OTHERS = 8


def reject_of(url: str, error: StoreError, others: Iterable[str] = ()) -> SampleError:
    """What the index says of an input that could not be read.

    Args:
        others: URLs of the same unit; a few of them are tried.

    Raises `error`, with what to do, if it is the store's.
    """
    reason = _reason(error)
    if reason != CHANGED and not _is_alone(url, others):
        raise type(error)(
            f"{error}. Neither can anything else there be read, so this is not put down to the "
            "file; if the files are gone for good, plan what is left: --new-plan"
        )
    return SampleError(reason, str(error))


def _reason(error: StoreError) -> str:
    if isinstance(error, ObjectMissingError):
        return MISSING
    if isinstance(error, ObjectChangedError):
        return CHANGED
    # A local file may be anybody's: a retry under another user may find it readable.
    return DENIED if isinstance(error, AccessDeniedError) else UNREADABLE


def _is_alone(url: str, others: Iterable[str]) -> bool:
    """Whether the store answers otherwise."""
    tried = list(islice((other for other in others if other != url), _TRIED_OTHERS))
    if any(map(_answers, tried)):
        return True
    try:
        siblings = _siblings(url)
    except CropstreamError:
        return False
    return any(map(_answers, siblings)) or not (tried or siblings)


def _siblings(url: str) -> list[str]:
    """Some other files of its folder."""
    link, chained, rest = url.partition("::")
    folder = f"{link.rpartition('/')[0]}/{chained}{rest}"
    files = (file.url for file in list_files(folder) if file.url != url)
    return list(islice(files, _TRIED_OTHERS))


def _answers(url: str) -> bool:
    """Whether a file can be read, at least its first byte."""
    try:
        file = find_file(url)
        if file is None:
            return False
        with open_stream(url, min(file.size_bytes or 1, 1)) as stream:
            stream.read(1)
    except StoreError:
        return False
    return True
