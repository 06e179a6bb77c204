"""The samples a run could not use: each once, counted against a budget, kept by checkpoints.

Called by the loader, batch by batch in their order, so that what is in it at a step, and at which
step it is too much, depends on the data alone. How many are too many counts for all ranks together,
and they must fail together: that is the trainer's part, which knows the other ranks (`check`).

Only what killed or hung its decoder is never tried again (`deadly`). Everything else is read anew
whenever its turn comes, in a run that goes on as in one that was resumed: what was out of reach for
an hour comes back.
"""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipeline.errors import DataError
from pipeline.probe import DIED, HUNG
from pipeline.samples import BadSample

_log = logging.getLogger(__name__)

_LISTED = 20  # shards, and samples, in a message
_MILESTONES = (10, 100, 1000, 10_000, 100_000)  # of bad samples, at which to say so again

Entry = dict[str, Any]  # epoch, step, number, key, shard, reason, substitute


class Quarantine:
    """Bad samples by number, with where they were first met and what replaced them there.

    Args:
        dataset: the data set's URL, for messages.
        limit: distinct samples before the run fails.
        entries: what earlier runs have found, on all ranks.
        world_size: how many ranks have a quarantine of the same limit.

    Attributes:
        num_found: entries added here; those of the arguments are not counted.
    """

    def __init__(
        self,
        dataset: str,
        *,
        limit: int,
        entries: Iterable[Mapping[str, Any]],
        world_size: int = 1,
    ) -> None:
        self._dataset = dataset
        self._limit = limit
        self._entries = {entry["number"]: dict(entry) for entry in entries}
        self._num_carried = len(self._entries)
        self._shards = {entry["shard"] for entry in self._entries.values()}
        self._is_alone = world_size == 1

    @property
    def num_found(self) -> int:
        return len(self._entries) - self._num_carried

    def deadly(self) -> tuple[BadSample, ...]:
        """Those that killed or hung their decoder: they are not to be decoded again."""
        return tuple(
            BadSample(entry["number"], entry["key"], entry["shard"], entry["reason"])
            for entry in self._entries.values()
            if entry["reason"].startswith((DIED, HUNG))
        )

    def add_batch(
        self, replaced: Iterable[tuple[BadSample, int]], *, epoch: int, step: int
    ) -> None:
        """Enter what could not be used of a batch, with the substitutes; one after the other.

        Raises DataError over the limit. One rank of several lets a batch pass, so that all can
        `check` together: it fails on its own, and with its own entries, at the next.
        """
        if not self._is_alone:
            self.check()
        for bad, substitute in replaced:
            self._add(bad, epoch=epoch, step=step, substitute=substitute)
        if self._is_alone:
            self.check()

    def may_be_over(self, num_found: int) -> bool:
        """Whether so many found on all ranks, some perhaps by several, can exceed the limit."""
        return num_found > 0 and self._num_carried + num_found > self._limit

    def check(self, entries: Iterable[Entry] | None = None) -> None:
        """Raise DataError, naming the first, if entries exceed the limit, ours or of all ranks.

        Those of earlier runs alone do not, so that a lower limit does not end what was allowed.
        """
        found = in_order(self._entries.values() if entries is None else entries)
        if len(found) > max(self._limit, self._num_carried):
            listed = "\n  ".join(_listed(found))
            raise DataError(
                f"{len(found)} samples of {self._dataset} could not be used, allowed are "
                f"loader.max_bad_samples={self._limit}; run `python -m shard_tools verify "
                f"{self._dataset}`. Shards, and samples:\n  {listed}"
            )

    def before(self, epoch: int, step: int) -> list[Entry]:
        """Entries of batches before a position: those read ahead will be met again."""
        entries = self._entries.values()
        return in_order(e for e in entries if (e["epoch"], e["step"]) < (epoch, step))

    def _add(self, bad: BadSample, *, epoch: int, step: int, substitute: int) -> None:
        place = {"epoch": epoch, "step": step, "substitute": substitute}
        entry = {"number": bad.number, "key": bad.key, "shard": bad.shard, "reason": bad.reason}
        known = self._entries.get(bad.number)
        if known is None or (epoch, step) < (known["epoch"], known["step"]):
            self._entries[bad.number] = entry | place
        if known is None:
            self._tell(bad, len(self._entries))

    def _tell(self, bad: BadSample, count: int) -> None:
        """Say of the first sample of every shard, and now and then, that there was one."""
        is_first = bad.shard not in self._shards
        self._shards.add(bad.shard)
        if (is_first and len(self._shards) <= _LISTED) or count in _MILESTONES:
            _log.warning(
                "replaced %s of %s by another image: %s (bad samples known here: %d, in %d "
                "shard(s); allowed: %d)",
                bad.key or f"sample {bad.number}",
                bad.shard,
                bad.reason,
                count,
                len(self._shards),
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
        reasons[entry["shard"]][_kind(entry["reason"], entry["shard"])] += 1
    worst = sorted(reasons.items(), key=lambda item: -item[1].total())
    for shard, counts in worst[:_LISTED]:
        why = "; ".join(f"{reason} ({count})" for reason, count in counts.most_common(3))
        yield f"{counts.total()} of {shard}: {why}"
    if len(worst) > _LISTED:
        yield f"… and {len(worst) - _LISTED} more shards"
    for entry in [entry for entry in entries if entry["key"]][:_LISTED]:
        yield f"{entry['key']} of {entry['shard']}: {entry['reason']}"


def _kind(reason: str, shard: str) -> str:
    """A reason without what differs from sample to sample, so that like ones are counted as one."""
    return re.sub(r"\d+", "N", reason.replace(shard, "…"))
