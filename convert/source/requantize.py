"""A GGUF file as the source of another one: its tensors in other types, its keys as they are."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ..inspection.gguf_file import GGUFHead, TensorInfo, read_head
from ..recipes import FLOAT_TYPES, ModelFacts, facts_of_keys
from .pieces import Piece, spans
from .shards import read_bytes

# The rival dialect's names for tensors of ours, which are what gets written.
RENAMED = {"self_cond_norm.weight": "self_cond_pre_norm.weight"}

# Keys that the output has its own values for, or that would be untrue of it.
REPLACED = frozenset(
    (
        "general.architecture",
        "general.file_type",
        "general.quantization_version",
        "general.alignment",
        "split.no",
        "split.count",
        "split.tensors.count",
    )
)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the source; `shape` is row-major."""

    info: TensorInfo
    kind: GGMLQuantizationType

    @property
    def name(self) -> str:
        return RENAMED.get(self.info.name, self.info.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape[::-1]

    @property
    def origin(self) -> str:
        """For messages."""
        return f"tensor '{self.info.name}'"


class GgufSource:
    """An open GGUF file, or all parts of a split one, by its first. Use it as a context manager, or call close()."""

    def __init__(self, path: Path) -> None:
        """Reads and checks the head. OSError, ModelFormatError as `read_head`; UnsupportedError for a tensor type that
        the writer does not know."""
        self.path = path
        self.head: GGUFHead = read_head(path, model=True)
        self.tensors = [GgufTensor(info, info.ggml_type) for info in self.head.tensors.values()]
        self.files: dict[Path, BinaryIO] = {}
        with contextlib.ExitStack() as stack:
            for part in self.head.parts:
                self.files[part] = stack.enter_context(open(part, "rb", buffering=0))
            self.stack = stack.pop_all()

    def close(self) -> None:
        self.stack.close()

    def __enter__(self) -> GgufSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def facts(self) -> ModelFacts:
        """What recipes go by."""
        return facts_of_keys({k: v.value for k, v in self.head.keys.items()}, (t.name for t in self.tensors))

    def pieces(self, index: int) -> Iterator[Piece]:
        """The `index`-th of `tensors`, in order."""
        tensor = self.tensors[index]
        block, size = GGML_QUANT_SIZES[tensor.kind]
        row = tensor.shape[-1] // block * size
        for span in spans(tensor.shape):
            offset = tensor.info.offset + span.first * row
            path = tensor.info.path
            data = read_bytes(path, self.files[path], offset, span.count * row, tensor.info.name)
            yield Piece(tensor.kind, data, span.matrix)

    def quantized(self) -> str:
        """The quantized types of the file and how many tensors have each, "194 Q4_K, 33 Q5_0"; empty when none is."""
        kinds = Counter(t.kind for t in self.tensors if t.kind not in FLOAT_TYPES)
        return ", ".join(f"{n} {kind.name}" for kind, n in kinds.most_common())

    def kept_keys(self, without: Set[str]) -> tuple[bytes, int]:
        """(bytes, number) of the entries of all keys but those in REPLACED and `without`, as they stand in the file."""
        left_out = REPLACED | without
        entries = [value.entry for name, value in self.head.keys.items() if name not in left_out]
        return b"".join(entries), len(entries)
