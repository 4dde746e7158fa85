"""Checks of what a caller hands in: each error names the argument, what it is, and what it must be."""

from __future__ import annotations

import secrets
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

#: Seeds are 64 bits.
MAX_SEED = 2**64 - 1


def integer(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int in [low, high]. Raises TypeError for anything else, ValueError outside of the range."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, but is {value!r}")
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, but is {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}: it must be from {low} to {high}")
    return number


def seed_of(value: object) -> int:
    """A seed as the caller gave it; for None and -1 a fresh one of 64 bits."""
    if value is None or (isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value == -1):
        return secrets.randbits(64)
    return integer("seed", value, 0, MAX_SEED)


def flag(name: str, value: object) -> bool:
    """Raises TypeError unless `value` is True or False: "no" and "false" would both be true."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, but is {value!r:.60}")
    return bool(value)


def int32(name: str, value: object, low: int = 0) -> int:
    """`value` as an int in [low, 2**31 - 1]; raises what integer() raises."""
    return integer(name, value, low, 2**31 - 1)


def real(name: str, value: object) -> float:
    """`value` as a float, of whatever size. Raises TypeError for anything but a number."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, but is {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a float") from None


def id_array(name: str, value: object, length: int | None = None) -> npt.NDArray[np.int32]:
    """`value` as a contiguous int32 array of one dimension, of `length` entries when given.

    Any sequence of integers will do; which ids are valid is checked in C. Raises TypeError for other element types,
    ValueError for another shape or numbers that do not fit into int32.
    """
    array = np.asarray(value)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, but has dtype {array.dtype}")
    _check_shape(name, array, (length,))
    if array.size and (int(array.min()) < -(2**31) or int(array.max()) >= 2**31):
        raise ValueError(f"{name} holds numbers from {array.min()} to {array.max()}: they must fit into int32")
    return np.ascontiguousarray(array, dtype=np.int32)


def float_array(name: str, value: object, dtype: type[np.generic], shape: tuple[int | None, ...]) -> Any:
    """`value` as a contiguous array of `dtype` and `shape` (None: any). An array of other floats is converted: what
    numpy computes is float64 unless one takes care. Raises TypeError for integers and all else."""
    array = np.asarray(value)
    if array.dtype.kind != "f":
        raise TypeError(f"{name} must have dtype {np.dtype(dtype)}, but has {array.dtype}")
    _check_shape(name, array, shape)
    return np.ascontiguousarray(array, dtype=dtype)


def words_array(name: str, value: object, length: int) -> npt.NDArray[np.uint32]:
    """`value` as a contiguous uint32 array of `length` entries. Raises TypeError for other element types."""
    array = np.asarray(value)
    if array.dtype != np.uint32:
        raise TypeError(f"{name} must have dtype uint32, but has {array.dtype}")
    _check_shape(name, array, (length,))
    return np.ascontiguousarray(array)


def _check_shape(name: str, array: npt.NDArray[Any], shape: tuple[int | None, ...]) -> None:
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {list(array.shape)}: it must be [{wanted}]")
