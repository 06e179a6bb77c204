"""What a training process and its loader workers say to each other, pickled over a socket pair.

First comes an `Assignment`; then the training process says, again and again, up to which step there
are free slots (an int), and the worker answers with a `Done` for every batch. Both ends are ours
and of one version, so pickle is safe here.
"""

from dataclasses import dataclass
from typing import NamedTuple

from pipeline.batches import Replaced, Share
from pipeline.ring import RingLayout
from pipeline.samples import BadSample
from pipeline.telemetry import Span


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a worker is told first.

    worker: its number, hence its pulse in the ring. step: the first to fill, counted from the
    beginning of the run; step s belongs into slot s % num_slots. suspects: global numbers of the
    samples in the hands of a predecessor that died, to be probed before anything is decoded.
    probe_limit_s: of CPU time for each of them.
    """

    share: Share
    layout: RingLayout
    worker: int
    step: int
    suspects: tuple[int, ...]
    probe_limit_s: float


class Condemned(NamedTuple):
    """Suspects that crashed a probe, or took all its CPU time; the others may be decoded."""

    bad: list[BadSample]


class Done(NamedTuple):
    """A batch whose rows of this worker lie in its slot; what there is to tell of it.

    arrived_s, done_s: of time.perf_counter, when the last sample that had to be waited for came
    (-inf: none had to be) and when all crops were cut. sums, spans: of Telemetry, since the last
    message.
    """

    step: int
    replaced: list[Replaced]
    arrived_s: float
    done_s: float
    sums: dict[str, float]
    spans: list[Span]


class Failed(NamedTuple):
    """The worker cannot go on, and another in its place could not either."""

    error: BaseException
