"""Reads the head of a GGUF: keys, tensor names, types, shapes and places; every number is checked before use. The parts
of a split one are read as one, from the first.

gguf's own reader trusts the file: a count of 2^60 keeps it busy for good, and broken files surface as IndexError,
KeyError, UnicodeDecodeError, or not at all. It also keeps a numpy view per vocabulary entry. A stranger's file needs
one kind of error that says what and where.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from pydiffgguf.errors import ModelFormatError

from ..names import SPLIT_KEYS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Type codes of values: (name, struct format), None where the value has no fixed size.
SCALARS: dict[int, tuple[str, str]] = {
    0: ("u8", "<B"),
    1: ("i8", "<b"),
    2: ("u16", "<H"),
    3: ("i16", "<h"),
    4: ("u32", "<I"),
    5: ("i32", "<i"),
    6: ("f32", "<f"),
    7: ("bool", "<?"),
    10: ("u64", "<Q"),
    11: ("i64", "<q"),
    12: ("f64", "<d"),
}
STRING = 8
ARRAY = 9

# How many elements of an array are kept: every per-layer array is whole, of a vocabulary the beginning is enough.
KEPT = 4096

# The most that one tensor may have, and a bound for hostile names and keys; ggml's own limits are 4 and 63.
MAX_DIMS = 4
MAX_NAME = 65_535

# Parts of a split file: their names count in five digits.
MAX_PARTS = 99_999

CHUNK = 1 << 20

Scalar = int | float | bool | str


@dataclass(frozen=True)
class Value:
    """One key's value: `type` as in names.KEYS ("u32", "arr[str]"); of an array, `count` elements, of which `value`
    holds the first `KEPT`. In its file it stands from byte `start` to `end`."""

    type: str
    value: Scalar | list[Scalar]
    count: int = 1
    start: int = field(default=0, compare=False, repr=False)
    end: int = field(default=0, compare=False, repr=False)

    @property
    def is_whole(self) -> bool:
        """Whether `value` holds all of it."""
        return not isinstance(self.value, list) or len(self.value) == self.count


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` in ggml's order (the first number is contiguous), `offset` from the beginning of the file
    `path`."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    n_bytes: int
    path: Path

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFHead:
    """What stands before the tensor data: `path` the file, or the first of `parts`; `size` that of all, in bytes. What
    is not per tensor is the first file's."""

    path: Path
    parts: tuple[Path, ...]
    size: int
    version: int
    alignment: int
    data_offset: int
    keys: dict[str, Value]
    tensors: dict[str, TensorInfo]


class Cursor:
    """Reads forward through a file in chunks; every failure is a ModelFormatError that names the place."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.buffer = b""
        self.position = 0  # in the buffer
        self.start = 0  # of the buffer, in the file

    def tell(self) -> int:
        return self.start + self.position

    def fail(self, message: str) -> ModelFormatError:
        return ModelFormatError(f"{self.path}: {message}")

    def check(self, n: int, what: str) -> None:
        """Fails unless `n` more bytes are there."""
        if n > self.size - self.tell():
            raise self.fail(f"cut short: it ends at byte {self.size}, inside {what}")

    def take(self, n: int, what: str) -> bytes:
        """The next `n` bytes."""
        end = self.position + n
        if end > len(self.buffer):
            self.check(n, what)
            self.start += self.position
            rest = self.buffer[self.position :]
            self.buffer = rest + self.file.read(max(n - len(rest), CHUNK))
            self.position = 0
            end = n
            if end > len(self.buffer):
                raise self.fail(f"cut short while it was read, inside {what}")
        data = self.buffer[self.position : end]
        self.position = end
        return data

    def number(self, fmt: str, what: str) -> int:
        """The next integer."""
        value: int = struct.unpack(fmt, self.take(struct.calcsize(fmt), what))[0]
        return value

    def text(self, what: str) -> bytes:
        """The next string, as the bytes it has."""
        return self.take(self.number("<Q", what), what)

    def name(self, what: str) -> str:
        """The next string, which names something: valid UTF-8 and of bounded length."""
        length = self.number("<Q", what)
        if length > MAX_NAME:
            raise self.fail(f"{what} has a name of {length} bytes")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"the name of {what} is not valid UTF-8") from None


def read_head(path: Path) -> GGUFHead:
    """Reads and checks keys and tensor infos of the GGUF `path`, a whole file or the first part of a split one, whose
    other parts stand beside it.

    OSError when a file cannot be opened (FileNotFoundError, IsADirectoryError); ModelFormatError when one is empty, not
    a GGUF, cut short (in the head, or before the end of a tensor's data), makes no sense, or is not the part it should
    be.
    """
    first = read_part(path)
    count = split_key(first, "split.count", 1, MAX_PARTS) if "split.count" in first.keys else 1
    if count == 1:
        return first
    index = split_key(first, "split.no", 0, count - 1)
    suffix = part_suffix(index, count)
    if not path.name.endswith(suffix):
        raise ModelFormatError(
            f"{path}: this is part {index + 1} of a model in {count} files, whose name must end in {suffix} for the "
            "others to be found"
        )
    stem = path.name.removesuffix(suffix)
    if index:
        raise ModelFormatError(
            f"{path}: this is part {index + 1} of a model in {count} files: open the first, "
            f"{path.with_name(stem + part_suffix(0, count))}"
        )
    parts, tensors = [first], dict(first.tensors)
    for i in range(1, count):
        try:
            part = read_part(path.with_name(stem + part_suffix(i, count)))
        except FileNotFoundError as error:
            what = f"{error.strerror} (part {i + 1} of the {count} that the model is split into)"
            raise FileNotFoundError(error.errno, what, error.filename) from None
        split_key(part, "split.no", i, i)
        split_key(part, "split.count", count, count)
        for name in part.tensors.keys() & tensors.keys():
            raise ModelFormatError(f"{part.path}: tensor '{name:.100}' is in another part of the model as well")
        tensors |= part.tensors
        parts.append(part)
    expected = split_key(first, "split.tensors.count", 0, 2**31 - 1)
    if expected != len(tensors):
        raise ModelFormatError(
            f"{path}: its {count} parts hold {len(tensors)} tensors, but key 'split.tensors.count' is {expected}: "
            "parts of different models are mixed"
        )
    return replace(
        first, parts=tuple(part.path for part in parts), size=sum(part.size for part in parts), tensors=tensors
    )


def part_suffix(index: int, count: int) -> str:
    """How the name of part `index`, from 0, of a model in `count` files ends."""
    return f"-{index + 1:05d}-of-{count:05d}.gguf"


def split_key(head: GGUFHead, key: str, least: int, most: int) -> int:
    """One of SPLIT_KEYS; ModelFormatError when it is missing, no integer, or out of range."""
    value = head.keys.get(key)
    if value is None:
        raise ModelFormatError(f"{head.path}: key '{key}' is missing")
    if type(value.value) is not int:
        raise ModelFormatError(f"{head.path}: key '{key}' has type {value.type}: expected {SPLIT_KEYS[key]}")
    if not least <= value.value <= most:
        raise ModelFormatError(f"{head.path}: key '{key}' is {value.value}: expected {least} to {most}")
    return value.value


def read_part(path: Path) -> GGUFHead:
    """One file's own head, whether the file is a whole GGUF or part of one; see `read_head`."""
    if path.is_dir():
        raise IsADirectoryError(21, "expected a GGUF file, this is a folder", str(path))
    with open(path, "rb") as file:
        cursor = Cursor(path, file)
        if cursor.size == 0:
            raise cursor.fail("the file is empty")
        if cursor.take(min(4, cursor.size), "the magic number") != MAGIC:
            raise cursor.fail("not a GGUF file: it does not begin with 'GGUF'")
        version = cursor.number("<I", "the header")
        if version not in VERSIONS:
            big = " (a big-endian file)" if version & 0xFFFF == 0 else ""
            raise cursor.fail(f"GGUF version {version}{big}: expected 2 or 3, little-endian")
        n_tensors = cursor.number("<Q", "the header")
        n_keys = cursor.number("<Q", "the header")
        # A key has at least a length, a type and one byte of value; a tensor five numbers and a dimension.
        cursor.check(n_keys * 13 + n_tensors * 32, f"the {n_keys} keys and {n_tensors} tensors that it announces")
        keys = read_keys(cursor, n_keys)
        infos = [read_tensor_info(cursor, i) for i in range(n_tensors)]
        alignment = read_alignment(cursor, keys)
        data_offset = -(-cursor.tell() // alignment) * alignment
        tensors = place(cursor, infos, data_offset, alignment)
        return GGUFHead(path, (path,), cursor.size, version, alignment, data_offset, keys, tensors)


def read_keys(cursor: Cursor, n_keys: int) -> dict[str, Value]:
    keys: dict[str, Value] = {}
    for i in range(n_keys):
        name = cursor.name(f"key {i}")
        if name in keys:
            raise cursor.fail(f"key '{name:.100}' is there twice")
        start = cursor.tell()
        keys[name] = replace(read_value(cursor, f"key '{name:.100}'"), start=start, end=cursor.tell())
    return keys


def read_value(cursor: Cursor, what: str) -> Value:
    code = cursor.number("<I", what)
    if code == STRING:
        return Value("str", cursor.text(what).decode("utf-8", errors="replace"))
    if code in SCALARS:
        name, fmt = SCALARS[code]
        return Value(name, struct.unpack(fmt, cursor.take(struct.calcsize(fmt), what))[0])
    if code != ARRAY:
        raise cursor.fail(f"{what} has the unknown type {code}")
    element = cursor.number("<I", what)
    count = cursor.number("<Q", what)
    if element == STRING:
        kept: list[Scalar] = []
        for i in range(count):
            data = cursor.text(what)
            if i < KEPT:
                kept.append(data.decode("utf-8", errors="replace"))
        return Value("arr[str]", kept, count)
    if element not in SCALARS:
        raise cursor.fail(f"{what} is an array of the unknown type {element}")
    name, fmt = SCALARS[element]
    size = struct.calcsize(fmt)
    head = min(count, KEPT)
    values = list(struct.unpack(f"<{head}{fmt[1]}", cursor.take(head * size, what)))
    rest = (count - head) * size
    while rest:
        rest -= len(cursor.take(min(rest, CHUNK), what))
    return Value(f"arr[{name}]", values, count)


def read_tensor_info(cursor: Cursor, index: int) -> TensorInfo:
    """One tensor info; `offset` still counts from the data's beginning."""
    name = cursor.name(f"tensor {index}")
    what = f"tensor '{name:.100}'"
    n_dims = cursor.number("<I", what)
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.fail(f"{what} has {n_dims} dimensions: expected 1 to {MAX_DIMS}")
    shape = tuple(cursor.number("<Q", what) for _ in range(n_dims))
    code = cursor.number("<I", what)
    offset = cursor.number("<Q", what)
    try:
        kind = GGMLQuantizationType(code)
        block, size = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise cursor.fail(f"{what} has the unknown type {code}") from None
    if 0 in shape or math.prod(shape) >= 2**63:
        raise cursor.fail(f"{what} has the impossible shape {list(shape)}")
    if shape[0] % block:
        raise cursor.fail(
            f"{what} has rows of {shape[0]}, which do not divide into the blocks of {block} of {kind.name}"
        )
    return TensorInfo(name, shape, kind, offset, math.prod(shape) // block * size, cursor.path)


def read_alignment(cursor: Cursor, keys: dict[str, Value]) -> int:
    value = keys.get("general.alignment", Value("u32", DEFAULT_ALIGNMENT))
    if value.type != "u32" or not isinstance(value.value, int):
        raise cursor.fail(f"key 'general.alignment' has type {value.type}: expected u32")
    if value.value == 0 or value.value & (value.value - 1):
        raise cursor.fail(f"key 'general.alignment' is {value.value}: expected a power of two")
    return value.value


def place(cursor: Cursor, infos: list[TensorInfo], data_offset: int, alignment: int) -> dict[str, TensorInfo]:
    """The tensors by name, with offsets from the file's beginning, each checked to lie inside the file."""
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        what = f"tensor '{info.name:.100}'"
        if info.name in tensors:
            raise cursor.fail(f"{what} is there twice")
        if info.offset % alignment:
            raise cursor.fail(f"{what} lies at {info.offset}, which is not a multiple of the alignment {alignment}")
        end = data_offset + info.offset + info.n_bytes
        if end > cursor.size:
            raise cursor.fail(f"cut short: {what} ends at byte {end}, the file has {cursor.size}")
        tensors[info.name] = replace(info, offset=data_offset + info.offset)
    return tensors
