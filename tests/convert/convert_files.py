"""What the converter's tests read and write files with."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
from tiny_checkpoint import Floats

Weights = dict[str, Floats]


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    edit(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def read_keys(path: Path) -> dict[str, tuple[str, Any]]:
    """Key -> (type, value) by gguf's own reader."""
    fields = gguf.GGUFReader(path).fields
    return {
        name: (" ".join(t.name for t in field.types), field.contents())
        for name, field in fields.items()
        if not name.startswith("GGUF.")
    }


def read_tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]
