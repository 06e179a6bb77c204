"""The golden order: batches of several settings, frozen in tests/golden/order.npz.

`python -m tests.support.orders` writes the file anew. Do so only together with an entry in
CHANGELOG.md that bears the label SAMPLE ORDER: runs that were begun before cannot be resumed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.mixture import Source, mix_sources

GOLDEN_ORDER = Path(__file__).parents[1] / "golden" / "order.npz"


@dataclass(frozen=True)
class OrderCase:
    """A mixture and the epochs of which the first, third and last batch are kept.

    sources: (samples, chunk, window, weight) of each.
    """

    sources: tuple[tuple[int, int, int, float], ...]
    global_batch: int
    lanes: int
    seed: int
    epochs: tuple[int, ...] = (0, 1, 29)


CASES = {
    "single": OrderCase(((1000, 7, 3, 1),), global_batch=8, lanes=4, seed=5),
    "whole_chunks": OrderCase(((4096, 8, 4, 1),), global_batch=64, lanes=8, seed=1),
    "short_chunk": OrderCase(((1027, 32, 2, 1),), global_batch=48, lanes=16, seed=2),
    "one_chunk": OrderCase(((100, 128, 4, 1),), global_batch=20, lanes=2, seed=3),
    "one_sample_windows": OrderCase(((333, 1, 1, 1),), global_batch=16, lanes=16, seed=2**40),
    "ten_billion": OrderCase(
        ((10**10, 61, 4, 1),), global_batch=256, lanes=64, seed=0, epochs=(0, 7, 10**6)
    ),
    "mix_of_two": OrderCase(
        ((5000, 16, 4, 0.7), (3000, 11, 2, 0.3)), global_batch=128, lanes=16, seed=4
    ),
    "mix_of_unequal": OrderCase(
        ((10**9, 60, 4, 2.5), (16, 3, 1, 1), (70_001, 9, 7, 0.01)),
        global_batch=64, lanes=16, seed=9, epochs=(0, 3),
    ),
    "mix_of_three_equal": OrderCase(
        ((640, 8, 4, 1), (640, 8, 4, 1), (640, 8, 4, 1)), global_batch=32, lanes=32, seed=6
    ),
}  # fmt: skip


def batches(case: OrderCase) -> NDArray[np.int64]:
    """Global sample numbers of whole batches: int64 [3 * len(epochs), global_batch]."""
    sources = [Source(f"source {n}", *sizes) for n, sizes in enumerate(case.sources)]
    mixture = mix_sources(sources, global_batch=case.global_batch, lanes=case.lanes, seed=case.seed)
    steps = (0, 2, mixture.num_steps - 1)
    return np.stack(
        [
            mixture.slots(epoch, step, range(case.lanes)).global_numbers
            for epoch in case.epochs
            for step in steps
        ]
    )


def write_golden_order() -> None:
    arrays: dict[str, Any] = {name: batches(case) for name, case in CASES.items()}
    np.savez_compressed(GOLDEN_ORDER, **arrays)


if __name__ == "__main__":
    write_golden_order()
