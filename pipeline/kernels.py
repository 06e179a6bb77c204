"""Functions that numba compiles: kernels, called from Python, and the parts they are made of.

Used by resize.py and augment_host.py. A kernel is compiled when it is first called, or by
`warm_up`, and kept on disk beside its file or in `NUMBA_CACHE_DIR`, so that only the first process
on a machine waits for it, and says so. Where no folder is writable, or the disk is full, every
process compiles for itself. The cache looks at the time stamp of a kernel's own file, so all its
parts belong there.
"""

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, cast

from numba import int64, njit, types
from numba.core import event
from numba.extending import intrinsic

P = ParamSpec("P")
R = TypeVar("R")

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
_compiling = threading.Lock()

_log = logging.getLogger(__name__)


def part(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function one that compiled functions may call."""
    return cast("Callable[P, R]", njit(**_OPTIONS)(function))


class Kernel(Generic[P, R]):
    """A function of one signature that runs compiled, without the GIL."""

    def __init__(self, signature: Any, function: Callable[P, R]) -> None:
        self._signature = signature
        self._function = function
        self._compiled: Callable[P, R] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return (self._compiled or self.warm_up())(*args, **kwargs)

    def warm_up(self) -> Callable[P, R]:
        """Compile, or load what an earlier process compiled, so that no later call has to."""
        with _compiling:
            self._compiled = self._compiled or self._compile()
        return self._compiled

    def _compile(self) -> Callable[P, R]:
        build = functools.partial(njit, self._signature, **_OPTIONS)
        with event.install_listener("numba:compile", _Announcer()):
            try:
                return cast("Callable[P, R]", build(cache=True)(self._function))
            except (RuntimeError, OSError):  # no folder is writable, or the disk is full
                return cast("Callable[P, R]", build()(self._function))


class _Announcer(event.Listener):  # type: ignore[misc]  # numba has no types
    """Hears of what is compiled, and not of what is loaded."""

    def on_start(self, _: event.Event) -> None:
        _announce()

    def on_end(self, _: event.Event) -> None:
        pass


@functools.cache
def _announce() -> None:
    _log.warning(
        "compiling the kernels for images, which takes some seconds; they are kept for later "
        "starts where the folder of this code or NUMBA_CACHE_DIR can be written to"
    )


def memory_of(dtype: Any) -> Any:
    """A part that makes a pointer, which numba.carray takes, of an address."""
    pointer = types.CPointer(dtype)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    def define(typing: Any, address: Any) -> Any:
        return pointer(int64), emit

    return intrinsic(define)
