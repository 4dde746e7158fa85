"""A GGUF's header, whatever the file holds: keys, tensors, parts. Checks and messages are the C library's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pydiffgguf import errors
from pydiffgguf._binding.library import (
    StrPath,
    call,
    check_readable,
    encode_path,
    ffi,
    fields_of,
    keep_error,
    lib,
    text_of,
)
from pydiffgguf._binding.records import LayerConfig, MetadataValue
from pydiffgguf._binding.structs import CONFIG_FIELDS

#: GGUF's value types by their numbers: names as the dialect's table has them, and numpy's types.
VALUE_TYPES: dict[int, str] = {
    0: "u8",
    1: "i8",
    2: "u16",
    3: "i16",
    4: "u32",
    5: "i32",
    6: "f32",
    7: "bool",
    8: "str",
    10: "u64",
    11: "i64",
    12: "f64",
}
_NUMPY = {"f32": "<f4", "f64": "<f8", "bool": "?"}
_ARRAY = 9
#: The most layers that a model may have, and bytes for what is said of its keys.
_MAX_LAYERS, _WARNINGS = 1024, 8192


class ByteSource(Protocol):
    """Where files are when they are not on this machine: by a path, which is only a name here."""

    def size(self, path: str) -> int:
        """Bytes of a file; what it raises goes on from `NativeFile`."""
        ...

    def read(self, path: str, offset: int, n: int) -> bytes:
        """`n` bytes from `offset` on."""
        ...


@dataclass(frozen=True)
class Key:
    """A key: `type` "u32", "str", or "arr[str]" of `count` elements. `data`: its value as it is in the file, `entry`:
    the whole entry."""

    name: str
    type: str
    count: int
    data: bytes
    entry: bytes

    def values(self, most: int | None = None) -> list[Any]:
        """The first `most` elements, or all; a value that is no array counts as one. Text that is not UTF-8 has U+FFFD
        in its place."""
        element = self.type.removeprefix("arr[").removesuffix("]")
        count = self.count if most is None else min(most, self.count)
        if element == "str":
            values, at = [], 0
            for _ in range(count):
                end = at + 8 + int.from_bytes(self.data[at : at + 8], "little")
                values.append(self.data[at + 8 : end].decode("utf-8", errors="replace"))
                at = end
            return values
        dtype = _NUMPY.get(element) or f"<{element[0]}{int(element[1:]) // 8}"
        found: list[Any] = np.frombuffer(self.data, dtype=dtype, count=count).tolist()
        return found


@dataclass(frozen=True)
class Part:
    """One file of a model: its size in bytes, and where its header ends and the tensors' data begins."""

    path: str
    size: int
    data_offset: int
    version: int
    alignment: int


class NativeFile:
    """An opened header: of `path`, or of a split model's first part with all others. `source`: None for this machine's
    files.

    Raises OSError (FileNotFoundError, IsADirectoryError, PermissionError where it is one of them), ModelFormatError,
    and what the source raises.
    """

    def __init__(self, path: StrPath, source: ByteSource | None = None) -> None:
        encoded = encode_path(path)
        if source is None:
            check_readable(path)
        functions = ffi.NULL
        if source is not None:
            handle = ffi.new_handle(source)  # lives as long as this frame
            functions = ffi.new("dg_source *", (lib.dg_python_size, lib.dg_python_read, handle))
        out = ffi.new("dg_file **")
        call(lib.dg_file_open, out, encoded, functions)
        self._pointer = ffi.gc(out[0], lib.dg_file_free)

    def require_model(self) -> None:
        """ModelFormatError, which says what the file is, unless it is a model that NativeModel opens."""
        call(lib.dg_file_require_model, self._pointer)

    def config(self) -> tuple[dict[str, Any], list[LayerConfig], list[str]]:
        """(the figures by the names of dg_config, the layers, what is said of missing keys) of the model in the file,
        as NativeModel would have them. Raises what it raises for keys."""
        config, warnings = ffi.new("dg_config *"), ffi.new("char[]", _WARNINGS)
        layers = ffi.new("dg_layer_config[]", _MAX_LAYERS)
        call(lib.dg_file_config, self._pointer, config, layers, _MAX_LAYERS, warnings, _WARNINGS)
        shapes = [LayerConfig(s.sliding, s.n_head_kv, s.head_dim) for s in layers[0 : config.n_layer]]
        return fields_of(config, CONFIG_FIELDS), shapes, text_of(warnings).splitlines()

    def parts(self) -> list[Part]:
        found = (lib.dg_file_get_part(self._pointer, i) for i in range(lib.dg_file_n_parts(self._pointer)))
        return [Part(path_of(p.path), p.size, p.data_offset, p.version, p.alignment) for p in found]

    def read_keys(self) -> list[Key]:
        """All keys, in the file's order."""
        out = []
        for i in range(lib.dg_file_n_keys(self._pointer)):
            key = lib.dg_file_key(self._pointer, i)
            name = VALUE_TYPES[key.element]
            data, entry = (bytes(ffi.buffer(p, n)) for p, n in ((key.data, key.n_bytes), (key.entry, key.entry_bytes)))
            out.append(Key(text_of(key.name), f"arr[{name}]" if key.type == _ARRAY else name, key.count, data, entry))
        return out

    def read_tensors(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """See `read_tensors`."""
        return read_tensors(self._pointer)


def read_tensors(file: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """(the fields of a TensorInfo but its kernel, the dg_tensor_info) of all tensors of a dg_file, in its order."""
    for i in range(lib.dg_file_n_tensors(file)):
        info = lib.dg_file_tensor(file, i)
        fields = {
            "name": text_of(info.name),
            "type": text_of(info.type_name),
            "shape": tuple(info.ne[0 : max(1, info.n_dims)]),
            "n_bytes": info.n_bytes,
        }
        yield fields, info


def path_of(pointer: Any) -> str:
    """A path that went into C by `encode_path`."""
    return os.fsdecode(ffi.string(pointer))


@ffi.def_extern(name="dg_python_size", error=-1, onerror=keep_error)  # type: ignore[untyped-decorator]
def _python_size(source: Any, path: Any) -> int:
    size: int = ffi.from_handle(source).size(path_of(path))
    return size


@ffi.def_extern(name="dg_python_read", error=False, onerror=keep_error)  # type: ignore[untyped-decorator]
def _python_read(source: Any, path: Any, offset: int, out: Any, n: int) -> bool:
    data: bytes = ffi.from_handle(source).read(path_of(path), offset, n)
    ffi.memmove(out, data, min(n, len(data)))
    return len(data) == n


class Metadata(Mapping[str, MetadataValue]):
    """The file's key-value pairs in the file's order; a value is decoded when it is first asked for.

    Numbers, bools and strings are Python's own, arrays are lists. A vocabulary of 262,144 tokens takes 30 ms to
    decode, which a caller that wants only a name does not pay. A string that is not UTF-8 raises ModelFormatError;
    after `close()`, a value that was not asked for before raises ModelClosedError.
    """

    def __init__(self, file: Any, owner: Any) -> None:
        """`file`: a dg_file, which lives as long as `owner` does."""
        self._file, self._owner = file, owner
        self._index = {text_of(lib.dg_file_key(file, i).name): i for i in range(lib.dg_file_n_keys(file))}
        self._values: dict[str, MetadataValue] = {}

    def close(self) -> None:
        """Lets go of the file's owner, which somebody who keeps this mapping would keep alive. Idempotent."""
        self._owner = None

    def __getitem__(self, key: str) -> MetadataValue:
        if key not in self._values:
            self._values[key] = self._decode(key, self._index[key])
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __repr__(self) -> str:
        return f"<Metadata: {len(self)} keys>"

    def _decode(self, key: str, i: int) -> MetadataValue:
        owner = self._owner  # lives on until this call is done, whoever closes meanwhile
        if owner is None:
            raise errors.ModelClosedError("the model is closed")
        info = lib.dg_file_key(self._file, i)
        element = VALUE_TYPES[info.element]
        if element == "str":
            values = self._strings(key, i)
        else:
            data = bytes(ffi.buffer(info.data, info.n_bytes))
            values = Key(key, element, info.count, data, b"").values()
        value: MetadataValue = values if info.type == _ARRAY else values[0]
        return value

    def _strings(self, key: str, i: int) -> list[str]:
        size = lib.dg_file_strings(self._file, i, ffi.NULL, 0)
        buffer = ffi.new("char[]", size)
        lib.dg_file_strings(self._file, i, buffer, size)
        try:
            # One decode for all of them. Every string is closed by a NUL, so the piece after the last one is empty.
            return bytes(ffi.buffer(buffer)).decode("utf-8").split("\0")[:-1]
        except UnicodeDecodeError as error:
            raise errors.ModelFormatError(f"key {key} holds text that is not UTF-8: {error.reason}") from None
