"""Rewrites a GGUF with changed keys and tensors, through gguf-py alone: how the broken and foreign files are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

#: Leaves a key or tensor out.
DROP = object()


class Typed:
    """A key's value with a type other than the one it had."""

    def __init__(self, value: Any, kind: gguf.GGUFValueType, element: gguf.GGUFValueType | None = None) -> None:
        self.value, self.kind, self.element = value, kind, element


class Raw:
    """A tensor's bytes as they stand in the file, uint8 [..., bytes of a row], and its type's number."""

    def __init__(self, data: np.ndarray[Any, np.dtype[np.uint8]], kind: int, row: int) -> None:
        self.data, self.kind, self.row = data, kind, row

    def add_to(self, writer: gguf.GGUFWriter, name: str) -> None:
        """gguf-py does not know every type that ggml has: the tensor goes in as bytes, and is named afterwards."""
        writer.add_tensor(name, self.data, raw_dtype=gguf.GGMLQuantizationType.I8)
        info = writer.tensors[-1][name]
        info.shape = (*self.data.shape[:-1], self.row)
        info.dtype = self.kind  # type: ignore[assignment]


def rewrite(
    source: Path,
    target: Path,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    rename: Callable[[str], str] = lambda name: name,
    part_tensors: int = 0,
) -> None:
    """Copies `source` to `target`. `keys`: new values by name (DROP, Typed or a plain value of the same type; unknown
    names are added as Typed). `tensors`: by name DROP, Raw or a float32 array. `rename`: new tensor names.
    `part_tensors`: split into files of so many tensors, target-00001-of-0000N.gguf ..., the first with keys only."""
    keys, tensors = dict(keys or {}), dict(tensors or {})
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture, split_max_tensors=part_tensors, small_first_shard=part_tensors > 0)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or (name == "general.architecture" and name not in keys):
            continue
        kind = field.types[0]
        element = field.types[1] if kind == gguf.GGUFValueType.ARRAY else None
        value = keys.pop(name, field.contents())
        if name == "general.architecture":
            writer.kv_data[0].clear()
        if value is DROP:
            continue
        if isinstance(value, Typed):
            value, kind, element = value.value, value.kind, value.element
        writer.add_key_value(name, value, kind, sub_type=element)
    for name, value in keys.items():
        if value is not DROP:
            writer.add_key_value(name, value.value, value.kind, sub_type=value.element)
    for tensor in reader.tensors:
        data = tensors.pop(tensor.name, None)
        if data is DROP:
            continue
        if isinstance(data, Raw):
            data.add_to(writer, rename(tensor.name))
        elif data is not None:
            writer.add_tensor(rename(tensor.name), np.ascontiguousarray(data, dtype=np.float32))
        else:
            writer.add_tensor(rename(tensor.name), tensor.data.copy(), raw_dtype=tensor.tensor_type)
    for name, data in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(data, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_tensor(path: Path, name: str) -> np.ndarray[Any, Any]:
    """A tensor as float32, in numpy's order of dimensions."""
    (tensor,) = [t for t in gguf.GGUFReader(path).tensors if t.name == name]
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
