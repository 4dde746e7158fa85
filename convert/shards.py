"""Reads safetensors files row by row, without torch and without mapping them.

The format: eight bytes, little endian, the length of a JSON header; the header, name -> dtype, shape and data_offsets;
then the data. The safetensors package hands numpy no BF16 (numpy has no such type) and no parts of a tensor below an
index, and mapped pages count as the process' memory where containers count it, so the few lines stand here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from pydiffgguf.errors import ModelFormatError

# The dtypes that weights come in; bytes per element.
ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2}

MAX_HEADER = 100_000_000  # the limit of the reference implementation


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: row-major `shape`, `offset` in bytes from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class Shard:
    """One open safetensors file. Use it as a context manager, or call close()."""

    def __init__(self, path: Path) -> None:
        """Reads and checks the header. OSError when the file cannot be opened, ModelFormatError when it is broken."""
        self.path = path
        self.file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        try:
            self.tensors = read_header(path, self.file)
        except BaseException:
            self.file.close()
            raise

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def read(self, tensor: StoredTensor, first: int, count: int) -> npt.NDArray[np.float32]:
        """Elements `first` to `first + count` of the flattened tensor, widened to float32 (exact for every dtype)."""
        size = ITEM_SIZE[tensor.dtype]
        raw = bytearray(count * size)
        self.file.seek(tensor.offset + first * size)
        view = memoryview(raw)
        while view:
            got = self.file.readinto(view)  # type: ignore[attr-defined]  # FileIO has it, BinaryIO does not say so
            if not got:
                raise ModelFormatError(f"{self.path}: the file ends inside tensor '{tensor.name}'")
            view = view[got:]
        if tensor.dtype == "F32":
            return np.frombuffer(raw, dtype="<f4").astype(np.float32, copy=False)
        if tensor.dtype == "F16":
            return np.frombuffer(raw, dtype="<f2").astype(np.float32)
        # A bfloat16 is the upper half of a float32.
        upper = np.frombuffer(raw, dtype="<u2").astype(np.uint32)
        upper <<= np.uint32(16)
        return upper.view(np.float32)

    def slices(self, tensor: StoredTensor, max_elements: int) -> Iterator[npt.NDArray[np.float32]]:
        """The tensor in order, as float32 [rows, row length], in slices of whole rows of about `max_elements`."""
        row = tensor.shape[-1]
        rows = math.prod(tensor.shape[:-1])
        step = max(1, max_elements // row)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            yield self.read(tensor, first * row, count * row).reshape(count, row)


def read_header(path: Path, file: BinaryIO) -> dict[str, StoredTensor]:
    """Name -> StoredTensor, each checked to lie inside the file; ModelFormatError says which one does not."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > MAX_HEADER:
        raise ModelFormatError(f"{path}: not a safetensors file")
    if 8 + length > size:
        raise ModelFormatError(f"{path}: cut short: the header needs {8 + length} bytes, the file has {size}")
    try:
        header = json.loads(file.read(length).decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError("the header is not an object")
        header.pop("__metadata__", None)
        tensors = {name: parse_entry(name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise ModelFormatError(f"{path}: not a safetensors file: broken header") from e
    for tensor in tensors.values():
        end = tensor.offset + tensor.n_bytes
        if end > size:
            raise ModelFormatError(f"{path}: cut short: tensor '{tensor.name}' ends at byte {end}, the file has {size}")
        expected = math.prod(tensor.shape) * ITEM_SIZE.get(tensor.dtype, 0)
        if tensor.dtype in ITEM_SIZE and tensor.n_bytes != expected:
            raise ModelFormatError(
                f"{path}: tensor '{tensor.name}': {tensor.dtype} {list(tensor.shape)} needs {expected} bytes, "
                f"got {tensor.n_bytes}"
            )
    return tensors


def parse_entry(name: str, entry: dict[str, object], base: int) -> StoredTensor:
    """One header entry; ValueError, TypeError or KeyError when it is malformed."""
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise TypeError(name)
    if not all(type(n) is int and 0 <= n < 2**62 for n in [*shape, *offsets]) or offsets[0] > offsets[1]:
        raise ValueError(name)
    return StoredTensor(name, str(entry["dtype"]), tuple(shape), base + offsets[0], offsets[1] - offsets[0])
