"""A GGUF file as the source of another one: its tensors in other types, its keys as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES

from pydiffgguf.errors import UnsupportedError

from .gguf_file import Cursor, GGUFHead, TensorInfo, read_head, read_value
from .names import ARCHITECTURE
from .pieces import Piece, spans
from .recipes import FLOAT_TYPES, ModelFacts, facts_of_keys
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
        "diffusion.recipe",
    )
)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the source; `shape` is row-major."""

    info: TensorInfo

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
    """An open GGUF file. Use it as a context manager, or call close()."""

    def __init__(self, path: Path) -> None:
        """Reads and checks the head. OSError, ModelFormatError as `read_head`; UnsupportedError for another
        architecture."""
        self.path = path
        self.head: GGUFHead = read_head(path)
        architecture = self.head.keys.get("general.architecture")
        if architecture is None or architecture.value != ARCHITECTURE:
            found = "none" if architecture is None else repr(architecture.value)
            raise UnsupportedError(f"{path}: general.architecture is {found:.60}: expected '{ARCHITECTURE}'")
        self.tensors = [GgufTensor(info) for info in self.head.tensors.values()]
        self.file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()

    def close(self) -> None:
        self.file.close()

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
        block, size = GGML_QUANT_SIZES[tensor.info.type]
        row = tensor.shape[-1] // block * size
        for span in spans(tensor.shape):
            offset = tensor.info.offset + span.first * row
            data = read_bytes(self.head.path, self.file, offset, span.count * row, tensor.info.name)
            yield Piece(tensor.info.type, data, span.matrix)

    def quantized(self) -> str:
        """The quantized types of the file and how many tensors have each, "194 Q4_K, 33 Q5_0"; empty when none is."""
        kinds = Counter(t.info.type for t in self.tensors if t.info.type not in FLOAT_TYPES)
        return ", ".join(f"{n} {kind.name}" for kind, n in kinds.most_common())

    def kept_keys(self, without: Set[str]) -> tuple[bytes, int]:
        """(bytes, number) of the entries of all keys but those in REPLACED and `without`, as they stand in the file."""
        self.file.seek(0)
        cursor = Cursor(self.head.path, self.file)
        cursor.take(16, "the header")
        kept = []
        for i in range(cursor.number("<Q", "the header")):
            first = cursor.tell()
            name = cursor.name(f"key {i}")
            read_value(cursor, f"key '{name:.100}'")
            if name not in REPLACED and name not in without:
                kept.append((first, cursor.tell()))
        return b"".join(self._bytes(*span) for span in kept), len(kept)

    def _bytes(self, first: int, end: int) -> bytes:
        return read_bytes(self.head.path, self.file, first, end - first, "the keys").tobytes()
