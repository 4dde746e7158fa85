"""Adapters as GGUF: llama.cpp's keys and names, and a region, which it lacks.

A pair of `blk.3.attn_q.weight` is `blk.3.attn_q.weight.lora_a` and `.lora_b`. `dec.` or `enc.` before `blk.` means one
mode; names without it act where the key diffusion.adapter.region says, in both modes where there is none.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from pydiffgguf.errors import ModelFormatError, UnsupportedError

from ..inspection.gguf_file import GGUFHead, TensorInfo, read_head
from ..names import ARCHITECTURE
from ..output import whole_or_nothing
from ..quantize import decode, encode
from ..source.shards import read_bytes
from ..writing import padded
from .pairs import REGIONS, Adapter, Pair, finish, is_experts, kind_of

T = GGMLQuantizationType

KEY_TYPE = "adapter.type"
KEY_ALPHA = "adapter.lora.alpha"
KEY_REGION = "diffusion.adapter.region"
KEY_ALORA = "adapter.alora.invocation_tokens"
KEY_BASE = "general.base_model.0.name"
PREFIXES = {"decoder": "dec.", "encoder": "enc.", "both": ""}
TYPES = {"f32": T.F32, "f16": T.F16, "bf16": T.BF16, "q8_0": T.Q8_0}

_NAME = re.compile(r"(?P<prefix>dec\.|enc\.|)(?P<target>.+)\.weight\.lora_(?P<half>[ab])")


def is_adapter(head: GGUFHead) -> bool:
    """Whether a GGUF is an adapter, by what it says of itself or by what its tensors are called."""
    kind = head.keys.get("general.type")
    if (kind is not None and kind.value == "adapter") or KEY_TYPE in head.keys:
        return True
    return bool(head.tensors) and all(name.endswith((".lora_a", ".lora_b")) for name in head.tensors)


# ----------------------------------------------------------------------------------------------------------- reading


def read_gguf(path: Path, name: str) -> Adapter:
    """Reads and checks a GGUF adapter; messages begin with `name`. OSError, ModelFormatError, UnsupportedError."""
    head = read_head(path)
    if not is_adapter(head):
        raise ModelFormatError(f"{name}: is a model, not an adapter")

    def text(key: str, default: str) -> str:
        value = head.keys.get(key)
        return str(value.value) if value is not None else default

    architecture = text("general.architecture", ARCHITECTURE)
    if architecture != ARCHITECTURE:
        raise ModelFormatError(f"{name}: is made for {architecture:.60}: expected {ARCHITECTURE}")
    if text(KEY_TYPE, "lora") != "lora":
        raise UnsupportedError(f"{name}: is a {text(KEY_TYPE, ''):.60} adapter: only plain LoRA is supported")
    if KEY_ALORA in head.keys:
        raise UnsupportedError(f"{name}: needs {KEY_ALORA}: only plain LoRA is supported")
    region = text(KEY_REGION, "both")
    if region not in REGIONS:
        raise ModelFormatError(f"{name}: key {KEY_REGION} is {region!r:.60}: expected one of {', '.join(REGIONS)}")
    value = head.keys.get(KEY_ALPHA)
    alpha = value.value if value is not None else 0.0
    if isinstance(alpha, (bool, str, list)) or not math.isfinite(alpha):
        raise ModelFormatError(f"{name}: key {KEY_ALPHA} is {alpha!r:.60}: expected a finite number")
    halves: dict[tuple[str, str], dict[str, TensorInfo]] = {}
    for tensor in head.tensors.values():
        match = _NAME.fullmatch(tensor.name)
        if match is None:
            raise UnsupportedError(
                f"{name}: holds {tensor.name:.100}, which is no low-rank pair: only plain LoRA is supported"
            )
        if kind_of(match["target"]) is None:
            if match["target"] == "token_embd":
                raise UnsupportedError(f"{name}: adapts the token embedding: not supported")
            raise ModelFormatError(f"{name}: tensor {tensor.name:.100} belongs to no module of DiffusionGemma")
        halves.setdefault((match["prefix"], match["target"]), {})[match["half"]] = tensor
    with open(path, "rb", buffering=0) as file:
        pairs = [read_pair(name, file, place, found, region, float(alpha)) for place, found in halves.items()]
    base = head.keys.get(KEY_BASE)
    return finish(name, path, pairs, base=str(base.value) if base is not None else None)


def read_pair(
    name: str, file: BinaryIO, place: tuple[str, str], halves: dict[str, TensorInfo], region: str, alpha: float
) -> Pair:
    prefix, target = place
    for half, other in (("a", "b"), ("b", "a")):
        if half in halves and other not in halves:
            raise ModelFormatError(f"{name}: {halves[half].name:.100} has no lora_{other}")
    a, b = halves["a"], halves["b"]
    n_dims = 3 if is_experts(target) else 2
    for tensor in (a, b):
        if len(tensor.shape) != n_dims:
            raise ModelFormatError(
                f"{name}: {tensor.name:.100} has shape {list(tensor.shape)}: expected {n_dims} dimensions"
            )
        if tensor.ggml_type not in TYPES.values():
            raise ModelFormatError(f"{name}: {tensor.name:.100} is {tensor.type}: it must be F32, F16, BF16 or Q8_0")
    if a.shape[1] != b.shape[0]:
        raise ModelFormatError(f"{name}: {a.name:.100}: lora_a has rank {a.shape[1]}, lora_b {b.shape[0]}")
    if a.shape[2:] != b.shape[2:]:
        raise ModelFormatError(f"{name}: {a.name:.100}: lora_a has {a.shape[2]} experts, lora_b {b.shape[2]}")
    if not target.startswith("blk."):
        where = "both" if target == "output" else "decoder"
    else:
        where = next((r for r, p in PREFIXES.items() if p and p == prefix), region)
    try:
        factors = [
            decode(read_bytes(t.path, file, t.offset, t.n_bytes, t.name), t.ggml_type, t.shape[0], t.name).reshape(
                t.shape[::-1]
            )
            for t in (a, b)
        ]
    except ModelFormatError as error:
        raise ModelFormatError(f"{name}: {error}") from None
    kind = a.ggml_type if a.type == b.type else T.F32
    return Pair(target, where, factors[0], factors[1], alpha / a.shape[1] if alpha else 1.0, kind, a.name)


# ----------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Image:
    """A GGUF in pieces: its head, and each tensor's bytes padded to the alignment. `types`: type -> tensors."""

    head: bytes
    data: tuple[bytes, ...]
    types: dict[str, int]

    @property
    def n_bytes(self) -> int:
        return len(self.head) + sum(map(len, self.data))

    def pieces(self) -> Iterator[bytes]:
        yield self.head
        yield from self.data


def to_gguf(adapter: Adapter, kind: GGMLQuantizationType | None = None) -> Image:
    """The adapter as GGUF. `kind`: the factors' type; None: as they are stored."""
    region, prefixed = naming(adapter)
    alpha = common_alpha(adapter)
    tensors: list[tuple[str, tuple[int, ...], GGMLQuantizationType, bytes]] = []
    for pair in adapter.pairs:
        wanted = kind or pair.kind
        folded = fold(pair, alpha)
        name = (PREFIXES[pair.region] if prefixed and pair.has_region else "") + pair.target
        for half, values, exact in (
            ("a", folded.a, True),
            ("b", folded.b, is_power_of_two(pair.scale * pair.rank / alpha)),
        ):
            stored = wanted if exact or kind else T.F32
            row = values.shape[-1]
            if row % GGML_QUANT_SIZES[stored][0]:
                stored = T.F16
            what = f"{adapter.name}: {pair.key}"
            rows = encode(np.ascontiguousarray(values), T.F32, stored, row, what)
            tensors.append((f"{name}.weight.lora_{half}", values.shape[::-1], stored, rows.tobytes()))
    keys = [
        text_key("general.architecture", ARCHITECTURE),
        text_key("general.type", "adapter"),
        text_key("general.name", adapter.name),
        text_key(KEY_TYPE, "lora"),
        gguf_text(KEY_ALPHA) + struct.pack("<If", 6, alpha),
        text_key(KEY_REGION, region),
    ]
    if adapter.base:
        keys += [gguf_text("general.base_model.count") + struct.pack("<II", 4, 1), text_key(KEY_BASE, adapter.base)]
    infos, offset = [], 0
    for name, shape, stored, data in tensors:
        infos.append(gguf_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, int(stored), offset))
        offset += padded(len(data))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + b"".join(infos)
    head += bytes(padded(len(head)) - len(head))
    blobs = tuple(data + bytes(padded(len(data)) - len(data)) for _, _, _, data in tensors)
    return Image(head, blobs, dict(sorted(Counter(stored.name for _, _, stored, _ in tensors).items())))


def naming(adapter: Adapter) -> tuple[str, bool]:
    """(what names without a prefix mean, whether names of one region have theirs)."""
    regions = adapter.regions
    return (regions[0], False) if len(regions) == 1 else ("both", True)


def common_alpha(adapter: Adapter) -> float:
    """The alpha that most pairs have: there is one in a file, and each pair's rank divides it."""
    return Counter(float(np.float32(pair.scale * pair.rank)) for pair in adapter.pairs).most_common(1)[0][0]


def fold(pair: Pair, alpha: float) -> Pair:
    """The pair with what its scale has beside alpha / rank multiplied into B."""
    factor = np.float32(pair.scale * pair.rank / alpha)
    return pair if factor == 1.0 else replace(pair, b=pair.b * factor)


def is_power_of_two(x: float) -> bool:
    return math.frexp(float(np.float32(x)))[0] in (0.5, -0.5)


def gguf_text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def text_key(key: str, value: str) -> bytes:
    return gguf_text(key) + struct.pack("<I", 8) + gguf_text(value)


def write(image: Image, out: Path) -> None:
    """Writes the file, which appears only when it is whole."""
    with whole_or_nothing(out, image.n_bytes) as file:
        for piece in image.pieces():
            file.append(memoryview(piece))
