"""The samples a run could not use: each once, counted against a budget, kept by checkpoints.

Called by the loader, batch by batch in their order, so that what is in it at a step, and at which
step it is too much, depends on the data alone.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipeline.errors import DataError
from pipeline.samples import BadSample

_log = logging.getLogger(__name__)

_LISTED = 20  # shards, and samples, in a message

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

    def known(self) -> tuple[BadSample, ...]:
        """All of them: they need not be read again."""
        return tuple(
            BadSample(entry["number"], entry["key"], entry["shard"], entry["reason"])
            for entry in self._entries.values()
        )

    def add(self, bad: BadSample, *, epoch: int, step: int, substitute: int) -> None:
        """Enter a sample that was replaced. Raises DataError, naming the first, over the limit."""
        place = {"epoch": epoch, "step": step, "substitute": substitute}
        entry = {"number": bad.number, "key": bad.key, "shard": bad.shard, "reason": bad.reason}
        known = self._entries.get(bad.number)
        if known is None or (epoch, step) < (known["epoch"], known["step"]):
            self._entries[bad.number] = entry | place
        if known is None:
            self._tell(bad, len(self._entries))

    def before(self, epoch: int, step: int) -> list[Entry]:
        """Entries of batches before a position: those read ahead will be met again."""
        entries = self._entries.values()
        return in_order(e for e in entries if (e["epoch"], e["step"]) < (epoch, step))

    def _tell(self, bad: BadSample, count: int) -> None:
        if count > self._limit:
            listed = "\n  ".join(_listed(in_order(self._entries.values())))
            raise DataError(
                f"{count} samples of {self._dataset} could not be used, allowed are "
                f"loader.max_bad_samples={self._limit}; run `python -m shard_tools verify "
                f"{self._dataset}`. Shards, and samples:\n  {listed}"
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


def _listed(entries: list[Entry]) -> Iterator[str]:
    """The shards, each with its count and reasons, the worst first; then the first samples.

    A sample without a key was never looked at, because its shard could not be read: it is told with
    the shard alone.
    """
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        reasons[entry["shard"]][entry["reason"]] += 1
    worst = sorted(reasons.items(), key=lambda item: -item[1].total())
    for shard, counts in worst[:_LISTED]:
        why = "; ".join(f"{reason} ({count})" for reason, count in counts.most_common(3))
        yield f"{counts.total()} of {shard}: {why}"
    if len(worst) > _LISTED:
        yield f"… and {len(worst) - _LISTED} more shards"
    for entry in [entry for entry in entries if entry["key"]][:_LISTED]:
        yield f"{entry['key']} of {entry['shard']}: {entry['reason']}"
