"""A command of the demo as a child process: its log, its progress on our terminal, its death.

A child leads a process group of its own, so that killing it kills every process it has started. Its
stdout is a result for us; its stderr goes to a log file and, line by line, to our stderr. Where a
person waits at a terminal the child sees one too, and draws its progress bars.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_NOISE = re.compile(rb"\[20\d\d-")
"""How lines of the launcher begin (`[2026-01-31 …] [INFO] …`), which belong into the log only."""
_LINE_END = re.compile(rb"(?<=\n)|(?<=\r)(?=[^\n])")
_DEFAULT_SIZE = (24, 80)


class Child:
    """A running command; as a context manager it does not outlive the block."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._output = folder / f"{name}.out"
        theirs, ours = _terminal() if sys.stderr.isatty() else _pipe()
        try:
            with self._output.open("wb") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=theirs,
                    env=dict(environment),
                    start_new_session=True,
                )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._pump = threading.Thread(target=self._pass_on, args=(ours,), daemon=True)
        self._pump.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    @property
    def output(self) -> str:
        """What it wrote to stdout."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def wait(self) -> int:
        """Wait for its end, and for its last line; returns the exit code."""
        code = self._process.wait()
        self._pump.join()
        return code

    def kill(self) -> None:
        """SIGKILL to the command and everything it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.wait()

    def _pass_on(self, descriptor: int) -> None:
        shown = b"\n"
        with self.log.open("wb") as log:
            for line in _lines(descriptor):
                log.write(line)
                log.flush()
                if not _NOISE.match(line):
                    shown = line
                    _show(line)
        if not shown.endswith(b"\n"):  # killed while its progress bar stood there
            _show(b"\n")
        os.close(descriptor)


def _pipe() -> tuple[int, int]:
    """(the child's end, our end)."""
    ours, theirs = os.pipe()
    return theirs, ours


def _terminal() -> tuple[int, int]:
    """(the child's end, our end) of a pseudo-terminal as wide as ours."""
    ours, theirs = os.openpty()
    rows, columns = termios.tcgetwinsize(sys.stderr.fileno())
    termios.tcsetwinsize(theirs, (rows, columns) if columns else _DEFAULT_SIZE)
    return theirs, ours


def _lines(descriptor: int) -> Iterator[bytes]:
    """What is read until the other end is closed, cut behind every end of line.

    A progress bar begins with a carriage return, so each of its states is a line too.
    """
    rest = b""
    while chunk := _read(descriptor):
        *lines, rest = _LINE_END.split(rest + chunk)
        yield from lines
    if rest:
        yield rest


def _show(text: bytes) -> None:
    sys.stderr.buffer.write(text)
    sys.stderr.buffer.flush()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # how Linux tells that a pseudo-terminal's other end was closed
        return b""
