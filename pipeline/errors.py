"""Every error this project raises on purpose, and how a command ends because of one.

    CropstreamError                 the run failed                            exit code 1
    ├── UsageError                  the command or the configuration is wrong exit code 2
    │   └── ConfigError             a configuration file or an override, all mistakes at once
    ├── StoreError                  an object store said no, or not at all
    │   ├── ObjectMissingError      no object under that key
    │   ├── ObjectChangedError      the object is not the one that was recorded
    │   ├── ThrottledError          the store asks for fewer requests
    │   └── AccessDeniedError       credentials missing, wrong or too weak
    ├── DataError                   bytes that are not what they should be
    │   ├── ManifestError           a snapshot, commit or checkpoint manifest
    │   ├── ShardError              a shard or its index
    │   └── SampleError             one image; `reason` is the word kept in the table of rejects
    ├── CheckpointError             a checkpoint that cannot be written or resumed from
    └── TrainingError               the run itself went wrong (a loss that is not finite, …)

A message says what, where (URL, shard, key, rank), what was seen against what was expected, and
what to do next. Anything else that escapes is a bug and keeps its traceback.
"""

import os
import sys
from collections.abc import Callable


class CropstreamError(Exception):
    """The run failed for a reason the user can act on."""

    exit_code = 1


class UsageError(CropstreamError):
    """The command line or the configuration is wrong; nothing was done."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration that does not hold; the message lists every mistake with its path."""


class StoreError(CropstreamError):
    """An object store refused, failed, or could not be reached."""


class ObjectMissingError(StoreError):
    """There is no object under the key."""


class ObjectChangedError(StoreError):
    """The object under the key is not the one that was recorded."""


class ThrottledError(StoreError):
    """The store is overloaded and asks for fewer requests (503 SlowDown, 429)."""


class AccessDeniedError(StoreError):
    """Credentials are missing, wrong, or do not allow the request."""


class DataError(CropstreamError):
    """Stored bytes are not what they should be."""


class ManifestError(DataError):
    """A snapshot, commit or checkpoint manifest is missing, damaged or contradicts another."""


class ShardError(DataError):
    """A shard or its index is damaged."""


class SampleError(DataError):
    """One image cannot be used.

    `reason` is the short word that the index and the tables of rejects carry ("truncated", "not an
    image", …).
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class CheckpointError(CropstreamError):
    """A checkpoint cannot be written, or cannot be resumed from."""


class TrainingError(CropstreamError):
    """The training run itself went wrong."""


class StoppedWaiting(Exception):  # noqa: N818 - no error, and nobody outside a loader sees it
    """Whoever waits for a batch was told to stop."""


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command at the edge of the process and return its exit code.

    Our own errors become one message on stderr; Ctrl-C becomes 130; everything else keeps its
    traceback.
    """
    try:
        return main() or 0
    except CropstreamError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the edge of the process
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:  # `… | head` closed our stdout: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
