"""The samples a run could not use: each once, counted against a budget, kept by checkpoints."""

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.errors import DataError
from pipeline.fetch import BadSample

_log = logging.getLogger(__name__)

Entry = dict[str, Any]  # epoch, step, number, key, shard, reason, substitute


class Quarantine:
    """Bad samples by number, with where they were first met and what replaced them there.

    Args:
        dataset: the data set's URL, for messages.
        limit: distinct samples before the run fails.
        entries: what earlier runs have found, on all ranks.
    """

    def __init__(self, dataset: str, *, limit: int, entries: Iterable[Mapping[str, Any]]) -> None:
        self._dataset = dataset
        self._limit = limit
        self._entries = {entry["number"]: dict(entry) for entry in entries}
        self._useless: set[int] = set(self._entries)
        self._lock = threading.Lock()

    def __contains__(self, number: int) -> bool:
        """Whether a sample is known to be of no use; as a substitute it need not be tried."""
        return number in self._useless

    def note(self, number: int) -> None:
        """Remember a sample that failed as a substitute; it is no entry before its own turn."""
        self._useless.add(number)

    def add(self, bad: BadSample, *, epoch: int, step: int, substitute: int) -> None:
        """Enter a sample that was replaced. Raises DataError, naming the first, over the limit."""
        place = {"epoch": epoch, "step": step, "substitute": substitute}
        entry = {"number": bad.number, "key": bad.key, "shard": bad.shard, "reason": bad.reason}
        with self._lock:
            known = self._entries.get(bad.number)
            if known is None or (epoch, step) < (known["epoch"], known["step"]):
                self._entries[bad.number] = entry | place
            self._useless.add(bad.number)
            count = len(self._entries)
        if known is None:
            self._tell(bad, count)

    def before(self, epoch: int, step: int) -> list[Entry]:
        """Entries of batches before a position: those read ahead will be met again."""
        with self._lock:
            entries = list(self._entries.values())
        return in_order(e for e in entries if (e["epoch"], e["step"]) < (epoch, step))

    def _tell(self, bad: BadSample, count: int) -> None:
        if count > self._limit:
            listed = "\n  ".join(
                f"{e['key'] or e['number']} of {e['shard']}: {e['reason']}"
                for e in in_order(self._entries.values())[:20]
            )
            raise DataError(
                f"{count} samples of {self._dataset} could not be used, allowed are "
                f"loader.max_bad_samples={self._limit}; run `python -m shard_tools verify "
                f"{self._dataset}`. The first of them:\n  {listed}"
            )
        if count in (1, 10, 100, 1000, 10_000, 100_000):
            _log.warning(
                "replaced %s of %s by another image: %s (bad samples so far: %d of %d allowed)",
                bad.key or bad.number,
                bad.shard,
                bad.reason,
                count,
                self._limit,
            )


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """One entry a sample, the first it was met in; sorted by when that was."""
    found: dict[int, Entry] = {}
    for entry in sorted(entries, key=lambda e: (e["epoch"], e["step"], e["number"])):
        found.setdefault(entry["number"], entry)
    return list(found.values())
