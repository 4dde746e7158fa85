"""Opens an adapter by its path, whichever form it has, and converts one."""

from __future__ import annotations

import math
import re
import time
import warnings
from pathlib import Path

from gguf import GGMLQuantizationType

from pydiffgguf.errors import ModelFormatError

from ..inspection.gguf_file import GGUFHead, read_head
from ..source.shards import Shard
from ..writing import ConversionReport
from .gguf_adapter import TYPES, is_adapter, naming, read_gguf, to_gguf, write
from .pairs import Adapter, only_region
from .peft import CONFIG, WEIGHTS, BaseShape, read_peft

# What a folder holds that is an adapter, or means to be one.
SIGNS = (CONFIG, "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")


def adapter_name(path: Path) -> str:
    """What an adapter is called where nobody names it: the file's stem, or the folder's name."""
    path = path.absolute()
    return path.stem if path.suffix.lower() == ".gguf" else path.name


def is_adapter_folder(path: Path) -> bool:
    return path.is_dir() and any((path / sign).is_file() for sign in SIGNS)


def is_adapter_source(path: Path) -> bool:
    """Whether a path is an adapter of either form. What cannot be read as a GGUF is not: the reader says more."""
    if path.is_dir():
        return is_adapter_folder(path)
    try:
        return path.suffix.lower() == ".gguf" and is_adapter(read_head(path))
    except (OSError, ModelFormatError):
        return False


def read_adapter(path: Path, *, name: str | None = None, base: BaseShape | None = None) -> Adapter:
    """The adapter at `path`: a PEFT folder or a GGUF file. `base`: what the model is like that it will run beside,
    where that is known.

    OSError, ModelFormatError, UnsupportedError; messages begin with the adapter's name.
    """
    name = name or adapter_name(path)
    if path.is_dir():
        return read_peft(path, name, base)
    try:
        return read_gguf(path, name)
    except ModelFormatError as error:
        if str(error).startswith(name):
            raise
        raise ModelFormatError(f"{name}: {error}") from None


def bytes_in_memory(path: Path) -> int:
    """What the adapter at `path` takes beside a model's matrices, at most, by its header alone: its factors in float32.
    0 for what is none; opening it says why."""
    try:
        if path.is_dir():
            with Shard(path / WEIGHTS) as shard:
                sizes = {tensor.name: math.prod(tensor.shape) for tensor in shard.tensors.values()}
        else:
            sizes = {tensor.name: math.prod(tensor.shape) for tensor in read_head(path).tensors.values()}
    except (OSError, ModelFormatError):
        return 0
    return 4 * sum(size for name, size in sizes.items() if re.search(r"lora_[abAB](\.|$)", name))


def base_shape(head: GGUFHead) -> BaseShape:
    """The figures of a model's file by which the factors of its experts are told apart."""
    down = head.tensors.get("blk.0.ffn_down_exps.weight")
    if down is None or len(down.shape) != 3:
        return BaseShape()
    return BaseShape(hidden=down.shape[1], expert_ffn=down.shape[0], n_expert=down.shape[2])


def convert_adapter(
    src: Path,
    out: Path,
    *,
    type: str | None = None,
    region: str | None = None,
    name: str | None = None,
    base: Path | None = None,
) -> ConversionReport:
    """An adapter, a PEFT folder or a GGUF, as the GGUF `out`.

    `type`: "f32", "f16", "bf16" or "q8_0"; None: as the factors are stored. `region`: "decoder", "encoder" or "both";
    one set alone, or what an adapter of one set acts in. `name`: general.name, by default the folder's or file's.
    `base`: a model's GGUF, for experts whose factors cannot be told apart alone.

    Warns (UserWarning) of what llama.cpp would make of a file for one mode, and of a set that is left out. Raises
    ValueError for an unknown type or region; otherwise as `read_adapter`.
    """
    started = time.monotonic()
    kind: GGMLQuantizationType | None = None
    if type is not None:
        if type not in TYPES:
            raise ValueError(f"type is {type!r}: an adapter's must be one of {', '.join(TYPES)}")
        kind = TYPES[type]
    adapter = read_adapter(src, name=name, base=None if base is None else base_shape(read_head(base)))
    if region is not None:
        adapter, dropped = only_region(adapter, region)
        if dropped:
            warnings.warn(f"{adapter.name}: {dropped} pairs of the other set are left out", stacklevel=2)
    where, prefixed = naming(adapter)
    if not prefixed and where != "both":
        warnings.warn(
            f"{adapter.name}: acts in {where} mode only; llama.cpp knows no modes and would apply it in both",
            stacklevel=2,
        )
    image = to_gguf(adapter, kind)
    write(image, out)
    notes = list(adapter.notes)
    if adapter.n_zero:
        notes.append(f"{adapter.n_zero} pairs are left out: their product is zero")
    if prefixed:
        notes.append("a set for each mode (dec. and enc.): llama.cpp refuses the file, by name")
    return ConversionReport(
        path=out,
        type=type or "as stored",
        n_bytes=image.n_bytes,
        n_tensors=2 * len(adapter.pairs),
        types=image.types,
        fallbacks=(),
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )
