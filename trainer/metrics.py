"""What a run says of itself: JSON lines, TensorBoard, a progress bar; called by the loop, on rank
0.

All lines so far travel inside every checkpoint, so that the curve of a run survives the machine it
was measured on. That copy shows each step once, however often the run was cut and resumed; the
local metrics.jsonl also keeps what was trained again, and TensorBoard shows the last of it. A line
is some 900 bytes: 100,000 steps logged every tenth make 9 MB.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm


class MetricsLog:
    """Writes one record a logged step: metrics.jsonl and TensorBoard's files in `directory`.

    Raises OSError when the directory cannot be written to.
    """

    def __init__(
        self, directory: str, *, history: bytes, first_step: int, total_steps: int
    ) -> None:
        # Imported here: TensorBoard takes half a second, and only rank 0 needs it.
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder), purge_step=first_step)
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", desc="train", disable=None
        )
        self._lines = [history]

    def write(self, record: Mapping[str, Any]) -> None:
        """Log one record; "step" is the step's number, from 0, "alarms" are lines for people."""
        line = json.dumps(record) + "\n"
        self._lines.append(line.encode())
        self._file.write(line)
        self._file.flush()
        for name, value in record.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                self._board.add_scalar(name, value, record["step"])
        for alarm in record.get("alarms", ()):
            self._board.add_text("alarms", alarm, record["step"])
            tqdm.write(f"ALARM at step {record['step']}: {alarm}", file=sys.stderr)
        self._show(record)

    def all_lines(self) -> bytes:
        """The records of the run from its first step on, those before a resume included."""
        return b"".join(self._lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()

    def _show(self, record: Mapping[str, Any]) -> None:
        step = record["step"] + 1
        if self._bar.disable:
            print(  # noqa: T201 - the log of a run without a terminal
                f"step {step}/{self._bar.total}  epoch {record['epoch']}  "
                f"loss {record['loss']:.4f}  lr {record['lr']:.4g}  "
                f"{record['images_per_s']:.0f} images/s",
                file=sys.stderr,
                flush=True,
            )
            return
        self._bar.set_postfix(
            loss=f"{record['loss']:.4f}",
            images_per_s=f"{record['images_per_s']:.0f}",
            refresh=False,
        )
        self._bar.update(step - self._bar.n)
