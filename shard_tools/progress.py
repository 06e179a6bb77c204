"""Progress on stderr: a bar where a person waits, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

FIRST_LINE_S = 2.0
LINE_INTERVAL_S = 10.0


class Progress:
    """Counts images towards a total, if there is one, with their rate and the number of rejects."""

    def __init__(self, what: str, total: int | None) -> None:
        self._what = what
        self._total = total
        self._before = 0
        self._started = time.monotonic()
        self._next_line = self._started + FIRST_LINE_S
        self._bar = (
            tqdm(total=total, desc=what, unit=" images", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def resume(self, done: int) -> None:
        """Begin with what an earlier run has done, which does not count for the rate."""
        self._before = done
        if self._bar is not None:
            self._bar.initial = self._bar.n = done
            self._bar.refresh()

    def show(self, done: int, rejected: int = 0) -> None:
        """Show that this run has done `done` images, `rejected` of them rejected."""
        done += self._before
        if self._total is not None:
            done = min(done, self._total)  # work that was lost and repeated counts once
        if self._bar is not None:
            self._bar.set_postfix(rejected=rejected, refresh=False)
            self._bar.update(done - self._bar.n)
        elif (now := time.monotonic()) >= self._next_line:
            self._next_line = now + LINE_INTERVAL_S
            self._print(done, rejected, now - self._started)

    def _print(self, done: int, rejected: int, elapsed_s: float) -> None:
        rate = (done - self._before) / elapsed_s if elapsed_s > 1 else 0.0
        whole = "" if self._total is None else f" of {self._total}"
        left = (
            ""
            if self._total is None or rate == 0
            else f", {(self._total - done) / rate:.0f} s left"
        )
        sys.stderr.write(
            f"{self._what}: {done}{whole} images, {rate:.0f}/s, {rejected} rejected{left}\n"
        )
