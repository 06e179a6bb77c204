"""Memory for batches on the host, used again once nobody looks at it any more.

Called by the loaders of a run without a device: the normalised crops of a batch are some 77 MB, and
memory fresh from the system has to be cleared and mapped page by page, which takes ten times as
long as normalising. What is lent comes back by itself when the last array or tensor made of it is
gone, so a batch that somebody keeps never changes.
"""

from collections import defaultdict, deque

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Shape = tuple[int, ...]

_KEPT = 2  # free arrays of a shape: the loop has one batch in its hands while the next is made


class Lender:
    """Lends float32 arrays. Any thread may ask, and any may be the last to let go."""

    def __init__(self) -> None:
        self._free: defaultdict[Shape, deque[Floats]] = defaultdict(lambda: deque(maxlen=_KEPT))

    def lend(self, shape: Shape) -> Floats:
        """An array of this shape, of any values, for as long as it or a view of it is alive."""
        free = self._free[shape]
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(shape, np.float32)
        return np.asarray(_Loan(memory, free))


class _Loan:
    """What an array that was lent is a view of: the array holds it, and with it the memory.

    A weak reference to the array itself would not do: numpy and torch let views of an array hold
    its base only.
    """

    def __init__(self, memory: Floats, free: deque[Floats]) -> None:
        self.__array_interface__ = memory.__array_interface__
        self._memory, self._free = memory, free

    def __del__(self) -> None:
        self._free.append(self._memory)
