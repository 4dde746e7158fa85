"""An opened source -> one GGUF file, tensor by tensor, a few MiB of weights in memory at a time."""

from __future__ import annotations

import contextlib
import math
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from .imatrix import Importance
from .names import ARCHITECTURE, KEYS, full_key
from .output import PartialFile
from .quantize import check_target, encode
from .recipes import TypeRules, row_bytes
from .source.pieces import Piece, Source, SourceTensor, read_ahead

ALIGNMENT = 32  # bytes; GGUF's default, so that no key has to say it

KEY_COUNT_AT = 16  # magic, version and tensor count stand before it

VALUE_TYPES = {
    "str": GGUFValueType.STRING,
    "bool": GGUFValueType.BOOL,
    "u32": GGUFValueType.UINT32,
    "i32": GGUFValueType.INT32,
    "f32": GGUFValueType.FLOAT32,
}


@dataclass(frozen=True)
class ConvertProgress:
    """Handed to the progress callback before each tensor, and every few MiB within one.

    `index` counts from 0 to `count` (at the end, with an empty `tensor`); bytes are those of the output's tensor data;
    `elapsed_s` counts from the first byte.
    """

    tensor: str
    index: int
    count: int
    bytes_done: int
    bytes_total: int
    elapsed_s: float


@dataclass(frozen=True)
class Fallback:
    """A tensor whose rows do not divide into the wanted type's blocks: name, row length, wanted and written type."""

    tensor: str
    row: int
    wanted: str
    written: str


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote: `types` counts tensors by type; `notes` are things worth a look, one line each."""

    path: Path
    type: str
    n_bytes: int
    n_tensors: int
    types: dict[str, int]
    fallbacks: tuple[Fallback, ...]
    notes: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output, `n_bytes` without padding: the source's `index`-th."""

    tensor: SourceTensor
    index: int
    kind: GGMLQuantizationType
    n_bytes: int


@dataclass(frozen=True)
class Keys:
    """The keys of the output.

    `values`: by name, as in names.KEYS or in full. `kept`: entries of another GGUF file that stay as they are, `n_kept`
    of them, as the bytes that they have there.
    """

    values: Mapping[str, Any]
    kept: bytes = b""
    n_kept: int = 0

    def size(self) -> int:
        """About the bytes of the file's head; names, keys and tensor infos come to as much as the vocabulary's text,
        and the check for room need be no closer."""
        return 1_000_000 + len(self.kept) + sum(len(v) * 40 for v in self.values.values() if isinstance(v, list))


def plan_tensors(source: Source, rules: TypeRules) -> tuple[list[PlannedTensor], list[Fallback]]:
    """The type and size of every tensor of the output, in order.

    ValueError when an override matches nothing; UnsupportedError for a type that ggml cannot write, or not without an
    importance matrix.
    """
    plan = []
    fallbacks = []
    kinds: dict[GGMLQuantizationType, str] = {}
    rules.settle([(tensor.name, tensor.shape) for tensor in source.tensors])
    for index, tensor in enumerate(source.tensors):
        choice = rules.choose(tensor.name, tensor.shape)
        row = tensor.shape[-1]
        n_bytes = math.prod(tensor.shape) // row * row_bytes(row, choice.kind)
        plan.append(PlannedTensor(tensor, index, choice.kind, n_bytes))
        kinds.setdefault(choice.kind, tensor.name)
        if choice.fell_back:
            fallbacks.append(Fallback(tensor.name, row, choice.wanted.name, choice.kind.name))
    rules.check_overrides()
    for kind, name in kinds.items():
        check_target(kind, f"tensor '{name}'", rules.with_importance)
    return plan, fallbacks


def header_writer(plan: Sequence[PlannedTensor], keys: Keys) -> gguf.GGUFWriter:
    """A writer that knows every tensor and the keys of `keys.values`, and holds none of the tensors' data."""
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    for p in plan:
        writer.add_tensor_info(p.tensor.name, p.tensor.shape, np.dtype(np.float32), p.n_bytes, raw_dtype=p.kind)
    values = dict(keys.values)
    if not keys.kept:
        values["general.size_label"] = gguf.size_label(*writer.get_total_parameter_count())
    for key, kind in KEYS.items():
        if key == "general.architecture" or values.get(key) in (None, []):  # the writer adds the first itself
            continue
        element = VALUE_TYPES[kind.removeprefix("arr[").removesuffix("]")]
        if kind.startswith("arr["):
            writer.add_key_value(full_key(key), values[key], GGUFValueType.ARRAY, sub_type=element)
        else:
            writer.add_key_value(full_key(key), values[key], element)
    return writer


def write_header(writer: gguf.GGUFWriter, keys: Keys, path: Path) -> None:
    """Header, keys and tensor infos into the empty file `path`, through gguf's writer; kept keys come last."""
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        if keys.kept:
            with open(path, "r+b") as file:  # the writer does not know of them: put in, and counted
                file.seek(0, 2)
                file.write(keys.kept)
                file.seek(KEY_COUNT_AT)
                (count,) = struct.unpack("<Q", file.read(8))
                file.seek(KEY_COUNT_AT)
                file.write(struct.pack("<Q", count + keys.n_kept))
            assert writer.fout is not None
            writer.fout[0].seek(0, 2)
        writer.write_ti_data_to_file()
        writer.close()
    except BaseException:
        with contextlib.suppress(OSError):  # closing flushes, and fails once more on a full disk
            writer.close()
        raise


def write_tensors(
    file: PartialFile,
    source: Source,
    plan: Sequence[PlannedTensor],
    importance: Importance | None,
    threads: int,
    progress: Callable[[ConvertProgress], None] | None,
) -> None:
    """Appends the tensors' data in order, each padded to the alignment."""
    pad(file)
    started = time.monotonic()
    bytes_total = sum(padded(p.n_bytes) for p in plan)
    bytes_done = 0

    def report(tensor: str, index: int) -> None:
        if progress:
            elapsed = time.monotonic() - started
            progress(ConvertProgress(tensor, index, len(plan), bytes_done, bytes_total, elapsed))

    def all_pieces() -> Iterator[tuple[PlannedTensor, Piece | None]]:
        for p in plan:
            for piece in source.pieces(p.index):
                yield p, piece
            yield p, None

    began = -1
    for p, piece in read_ahead(all_pieces()):
        if p.index != began:
            began = p.index
            report(p.tensor.name, p.index)
        if piece is None:
            bytes_done += pad(file)
            continue
        data = encode(
            piece.data,
            piece.kind,
            p.kind,
            p.tensor.shape[-1],
            f"{source.path}: {p.tensor.origin}",
            importance=importance.of(p.tensor.name, piece.matrix) if importance else None,
            threads=threads,
        )
        file.append(data.data.cast("B"))
        bytes_done += data.nbytes
        report(p.tensor.name, p.index)
    report("", len(plan))


def padded(n: int) -> int:
    """`n` bytes, rounded up to the alignment."""
    return -(-n // ALIGNMENT) * ALIGNMENT


def pad(file: PartialFile) -> int:
    """Fills up to the alignment; returns how many bytes that took."""
    at = file.tell()
    file.append(memoryview(bytes(padded(at) - at)))
    return padded(at) - at
