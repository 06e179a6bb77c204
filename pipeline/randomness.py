"""Counter-based random numbers: a value is a function of its coordinates and of nothing else.

A generator with state ties a draw to the draws before it, hence to the worker that made them. Here
every draw is the hash of where it is used, `(seed, epoch, sample, crop, …)`, so any process can
compute it at any time, thousands at once. The hash is the finaliser of SplitMix64 (Steele, Lea,
Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014), chained over the coordinates.
Used by order, crops and augment.
"""

import operator
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1 = np.uint64(0xBF58476D1CE4E5B9)
_FACTOR_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_MASK = 2**64 - 1


def mix64(*parts: ArrayLike) -> NDArray[np.uint64]:
    """Hash integers, elementwise over their broadcast shape.

    `parts` are integers or integer arrays, negative ones modulo 2**64; their order matters. Put a
    constant of your own among them, so that two users of the same coordinates draw independently.
    Returns uint64 of the broadcast shape (0-d for scalars). Raises TypeError on anything but
    integers.
    """
    with np.errstate(over="ignore"):  # numpy warns of wrapping scalars, which is what we want
        return np.asarray(reduce(_absorb, map(_as_uint64, parts), np.uint64(0)))


def mix64_in_place(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix64` of each value, for who hashes small arrays often: overwritten, and returned."""
    values += _GOLDEN
    shifted = values >> _SHIFT_1
    values ^= shifted
    values *= _FACTOR_1
    values ^= np.right_shift(values, _SHIFT_2, out=shifted)
    values *= _FACTOR_2
    values ^= np.right_shift(values, _SHIFT_3, out=shifted)
    return values


def uniform(*parts: ArrayLike) -> NDArray[np.float64]:
    """Draw from [0, 1) for each element of the parts' broadcast shape, with 53 random bits."""
    return np.asarray((mix64(*parts) >> np.uint64(11)) * 2.0**-53)


def _absorb(state: Any, part: Any) -> Any:
    z = (state ^ part) + _GOLDEN
    z = (z ^ (z >> _SHIFT_1)) * _FACTOR_1
    z = (z ^ (z >> _SHIFT_2)) * _FACTOR_2
    return z ^ (z >> _SHIFT_3)


def _as_uint64(part: ArrayLike) -> Any:
    if isinstance(part, np.ndarray) and part.dtype.kind in "iu":
        return part.astype(np.uint64)
    if isinstance(part, list | tuple | range):
        return np.asarray(part, dtype=np.int64).astype(np.uint64)
    return np.uint64(operator.index(part) & _MASK)  # type: ignore[arg-type]
