"""The head of a GGUF as records: keys, tensor names, types, shapes and places; the parts of a split one as one.

The reader is the engine's own (csrc/file/gguf_header.cpp), so that there is one set of checks, and of messages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from pydiffgguf._binding.file import ByteSource, NativeFile
from pydiffgguf._binding.functions import session_needs
from pydiffgguf._binding.records import LayerConfig, Needs
from pydiffgguf.errors import ModelFormatError, UnsupportedError

# How many elements of an array are kept: every per-layer array is whole, of a vocabulary the beginning is enough.
KEPT = 4096

Scalar = int | float | bool | str


@dataclass(frozen=True)
class Value:
    """One key's value: `type` as in names.KEYS ("u32", "arr[str]"); of an array, `count` elements, of which `value`
    holds the first `KEPT`. `data`: all of it as it is in the file; `entry`: with the key's name and type before it."""

    type: str
    value: Scalar | list[Scalar]
    count: int = 1
    data: bytes = field(default=b"", compare=False, repr=False)
    entry: bytes = field(default=b"", compare=False, repr=False)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` in ggml's order (the first number is contiguous), `type` by ggml's name in capitals, `code`
    its number, `offset` from the beginning of the file `path`."""

    name: str
    shape: tuple[int, ...]
    type: str
    code: int
    offset: int
    n_bytes: int
    path: Path

    @property
    def ggml_type(self) -> GGMLQuantizationType:
        """The type as gguf has it. UnsupportedError for one that ggml has and the gguf package does not."""
        try:
            return GGMLQuantizationType(self.code)
        except ValueError:
            raise UnsupportedError(
                f"{self.path}: tensor '{self.name:.100}' has type {self.type}, which the gguf package does not know"
            ) from None

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Figures:
    """A model's figures. `values`: by the names of dg_config in csrc/diffgguf.h; `warnings`: missing keys, and what is
    used in their place."""

    values: dict[str, Any]
    layers: tuple[LayerConfig, ...]
    warnings: tuple[str, ...]

    def needs(self, **options: Any) -> Needs:
        """What a session with these options takes; raises what session_needs() raises."""
        return session_needs(self.values, self.layers, self.values["has_self_conditioning"], **options)


@dataclass(frozen=True)
class GGUFHead:
    """What stands before the tensor data: `path` the file, or the first of `parts`; `size` that of all, in bytes. What
    is not per tensor is the first file's. `model`: the figures, where a model was asked for and its keys tell them;
    where they do not, `model_fault` says why."""

    path: Path
    parts: tuple[Path, ...]
    size: int
    version: int
    alignment: int
    data_offset: int
    keys: dict[str, Value]
    tensors: dict[str, TensorInfo]
    model: Figures | None = None
    model_fault: str | None = None


def read_head(path: Path, *, model: bool = False, source: ByteSource | None = None) -> GGUFHead:
    """Keys and tensor infos of the GGUF `path`, a whole file or the first part of a split one, whose other parts stand
    beside it. `model`: it must hold a model of ours. `source`: where it is, None for this machine.

    OSError when a file cannot be opened (FileNotFoundError, IsADirectoryError); ModelFormatError when one is empty, not
    a GGUF, cut short (in the head, or before the end of a tensor's data), makes no sense, is not the part it should be,
    or is not a model where one was asked for.
    """
    file = NativeFile(path, source)
    figures, fault = None, None
    if model:
        file.require_model()
        try:
            config, layers, warnings = file.config()
            figures = Figures(config, tuple(layers), tuple(warnings))
        except (ModelFormatError, UnsupportedError) as error:
            fault = str(error).removeprefix(f"{path}: ")
    parts = file.parts()
    keys = {}
    for key in file.read_keys():
        values = key.values(KEPT)
        keys[key.name] = Value(
            key.type, values if key.type.startswith("arr[") else values[0], key.count, key.data, key.entry
        )
    tensors = {
        t["name"]: TensorInfo(
            t["name"], t["shape"], t["type"].upper(), info.type, info.offset, t["n_bytes"], Path(parts[info.part].path)
        )
        for t, info in file.read_tensors()
    }
    return GGUFHead(
        path=path,
        parts=tuple(Path(part.path) for part in parts),
        size=sum(part.size for part in parts),
        version=parts[0].version,
        alignment=parts[0].alignment,
        data_offset=parts[0].data_offset,
        keys=keys,
        tensors=tensors,
        model=figures,
        model_fault=fault,
    )
