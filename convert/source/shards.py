"""Reads safetensors files piece by piece, without torch and without mapping them.

The format: eight bytes, little endian, the length of a JSON header; the header, name -> dtype, shape and data_offsets;
then the data. The safetensors package hands numpy no BF16 (numpy has no such type) and no parts of a tensor below an
index, and mapped pages count as the process' memory where containers count it, so the few lines stand here.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from pydiffgguf.errors import ModelFormatError

# The dtypes that weights come in, and ggml's names for them.
DTYPES: dict[str, GGMLQuantizationType] = {t: GGMLQuantizationType[t] for t in ("F32", "F16", "BF16")}
ITEM_SIZE: dict[str, int] = {t: GGML_QUANT_SIZES[kind][1] for t, kind in DTYPES.items()}  # bytes per element

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

    def read(self, tensor: StoredTensor, first: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes `first` to `first + n_bytes` of the tensor."""
        return read_bytes(self.path, self.file, tensor.offset + first, n_bytes, tensor.name)


def read_bytes(path: Path, file: BinaryIO, offset: int, n_bytes: int, name: str) -> npt.NDArray[np.uint8]:
    """`n_bytes` from `offset` on, of tensor `name`, from an unbuffered file; ModelFormatError when it ends early."""
    data = np.empty(n_bytes, dtype=np.uint8)
    file.seek(offset)
    view = data.data
    while view:
        got = file.readinto(view)  # type: ignore[attr-defined]  # FileIO has it, BinaryIO does not say so
        if not got:
            raise ModelFormatError(f"{path}: the file ends inside tensor '{name}'")
        view = view[got:]
    return data


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
    dtype = str(entry["dtype"])
    if not (name + dtype).isprintable():  # they stand in messages, on one line of a terminal
        raise ValueError(name)
    return StoredTensor(name, dtype, tuple(shape), base + offsets[0], offsets[1] - offsets[0])
