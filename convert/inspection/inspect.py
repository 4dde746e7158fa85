"""What a GGUF file is: keys, tensors, types by class, the memory it will need, and what it lacks."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from pydiffgguf._binding.file import ByteSource
from pydiffgguf._binding.records import Needs
from pydiffgguf._binding.structs import KV_TYPES
from pydiffgguf.engine.describe import too_large
from pydiffgguf.errors import ContextOverflowError
from pydiffgguf.text.rendering import template_fault

from ..names import (
    END_TOKENS,
    FOREIGN_GLOBAL_TENSORS,
    FOREIGN_LAYER_TENSORS,
    GLOBAL_TENSORS,
    KEYS,
    LAYER_TENSORS,
    SAMPLER_KEYS,
    Tensor,
    full_key,
    layer_name,
)
from .gguf_file import Figures, GGUFHead, TensorInfo, Value, read_head

RIVAL_NORM = "self_cond_norm.weight"

# Types that ggml has no float32 for.
UNREADABLE = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")

TOKENIZER_KEYS = ("tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.merges")

SELF_CONDITIONING = ("self_cond_gate.weight", "self_cond_up.weight", "self_cond_down.weight")
ENCODER_SCALAR = "enc_layer_output_scale.weight"
EXPERTS = "ffn_gate_up_exps.weight"
SPLIT_EXPERTS = ("ffn_gate_exps.weight", "ffn_up_exps.weight")

OTHER = "other"  # the class of tensors that the dialect does not name


@dataclass(frozen=True)
class Finding:
    """Something missing or unusual. `level`: "error" (the file will not load), "warning" (it loads, with a loss) or
    "note" (worth knowing)."""

    level: str
    text: str


@dataclass(frozen=True)
class TensorReport:
    """One tensor: `shape` in ggml's order, `kind` its class (attention, experts ...)."""

    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int
    kind: str


@dataclass(frozen=True)
class TypeShare:
    """How many tensors, values and bytes one type has, within a class or in the whole file."""

    tensors: int
    values: int
    n_bytes: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that are needed: the weights, and what a session takes with its cache in `type_kv`. `needs`: None when the
    keys do not tell."""

    type_kv: str
    weight_bytes: int
    needs: Needs | None

    @property
    def n_ctx(self) -> int | None:
        """Positions that the estimate is for."""
        return None if self.needs is None else self.needs.n_ctx

    @property
    def buffer_bytes(self) -> int | None:
        """Logits and working buffers, at most."""
        return None if self.needs is None else self.needs.logits + self.needs.passes + self.needs.sampling

    @property
    def total_bytes(self) -> int | None:
        """Weights, cache and buffers."""
        if self.kv_bytes is None or self.buffer_bytes is None:
            return None
        return self.weight_bytes + self.kv_bytes + self.buffer_bytes

    @property
    def kv_bytes(self) -> int | None:
        """The whole KV cache."""
        return None if self.needs is None else sum(self.needs.cache)


@dataclass(frozen=True)
class FileReport:
    """What inspect_file() found. `parts`: the file, or all files of a split model, `size` bytes together; `keys`: name
    -> Value; `types`: type -> share; `classes`: class -> type -> share; `figures`: None when the keys do not tell."""

    path: Path
    parts: tuple[Path, ...]
    size: int
    version: int
    keys: dict[str, Value]
    tensors: tuple[TensorReport, ...]
    types: dict[str, TypeShare]
    classes: dict[str, dict[str, TypeShare]]
    figures: Figures | None
    memory: MemoryEstimate
    findings: tuple[Finding, ...]

    def too_large(self, available: int | None) -> str | None:
        """What is said where this much memory does not hold it; None where it does, or where the need is not known."""
        m = self.memory
        if m.total_bytes is None:
            return None
        return too_large(self.n_parameters, m.weight_bytes, m.total_bytes - m.weight_bytes, available)

    @property
    def n_parameters(self) -> int:
        """The number of weights in the file."""
        return sum(share.values for share in self.types.values())


def inspect_file(
    path: str | Path, *, n_ctx: int | None = None, type_kv: str = "f16", source: ByteSource | None = None
) -> FileReport:
    """Reads the head of the GGUF `path`, of a split model the first file, and reports on it; no weight is read.

    `n_ctx`: positions that the memory estimate is for, by default the smaller of 8192 and the file's context length.
    `type_kv`: "f32", "f16", "bf16" or "q8_0". `source`: where the file is, None for this machine.
    Raises OSError when the file cannot be opened, ModelFormatError when it is not a GGUF, is broken, or holds
    another architecture, ValueError for options out of range; ContextOverflowError for an n_ctx, and
    UnsupportedError for a type_kv, that the model cannot have.
    """
    if type_kv not in KV_TYPES:
        raise ValueError(f"type_kv: {type_kv!r}, expected one of {', '.join(KV_TYPES)}")
    if n_ctx is not None and not 1 <= n_ctx < 2**31:
        raise ValueError(f"n_ctx: {n_ctx}, expected 1 to 2^31 - 1")
    head = read_head(Path(path), model=True, source=source)
    tensors = tuple(TensorReport(t.name, t.shape, t.type, t.n_bytes, kind_of(t.name)) for t in head.tensors.values())
    classes: dict[str, list[TensorReport]] = defaultdict(list)
    for tensor in tensors:
        classes[tensor.kind].append(tensor)
    return FileReport(
        path=head.path,
        parts=head.parts,
        size=head.size,
        version=head.version,
        keys=head.keys,
        tensors=tensors,
        types=shares(tensors),
        classes={kind: shares(members) for kind, members in sorted(classes.items())},
        figures=head.model,
        memory=estimate_memory(head, n_ctx, type_kv),
        findings=tuple(find_missing(head)),
    )


def base_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `attn_q.weight`; other names unchanged."""
    parts = name.split(".", 2)
    return parts[2] if len(parts) == 3 and parts[0] == "blk" and parts[1].isdigit() else name


def kind_of(name: str) -> str:
    """The class of a tensor, from its name."""
    rules = (
        FOREIGN_LAYER_TENSORS + LAYER_TENSORS if name.startswith("blk.") else FOREIGN_GLOBAL_TENSORS + GLOBAL_TENSORS
    )
    base = base_name(name)
    return next((rule.kind for rule in rules if rule.name == base), OTHER)


def shares(tensors: tuple[TensorReport, ...] | list[TensorReport]) -> dict[str, TypeShare]:
    """Tensors by type, the type with the most bytes first."""
    by_type: dict[str, list[TensorReport]] = defaultdict(list)
    for tensor in tensors:
        by_type[tensor.type].append(tensor)
    totals = {
        kind: TypeShare(len(ts), sum(math.prod(t.shape) for t in ts), sum(t.n_bytes for t in ts))
        for kind, ts in by_type.items()
    }
    return dict(sorted(totals.items(), key=lambda item: (-item[1].n_bytes, item[0])))


def estimate_memory(head: GGUFHead, n_ctx: int | None, type_kv: str) -> MemoryEstimate:
    """Figures that no engine would take are as good as none; so is a context that the file itself has too little of."""
    needs = None
    if head.model is not None:
        try:
            needs = head.model.needs(n_ctx=n_ctx or 0, type_kv=type_kv)
        except (ValueError, ContextOverflowError) as error:
            if n_ctx is not None and isinstance(error, ContextOverflowError):
                raise
    return MemoryEstimate(type_kv, sum(t.n_bytes for t in head.tensors.values()), needs)


def find_missing(head: GGUFHead) -> list[Finding]:
    """Everything missing or unusual, errors first."""
    found = [*check_keys(head), *check_tensors(head), *check_shapes(head), *check_text(head.keys)]
    order = ("error", "warning", "note")
    return sorted(found, key=lambda finding: order.index(finding.level))


def check_keys(head: GGUFHead) -> list[Finding]:
    """Keys that are missing, or of another type."""
    keys = head.keys
    found = [Finding("warning", text) for text in head.model.warnings] if head.model else []
    for key, kind in KEYS.items():
        value = keys.get(full_key(key))
        if value is not None and value.type != kind:
            level = "note" if family(value.type) == family(kind) else "error"
            found.append(Finding(level, f"key '{full_key(key)}' has type {value.type}, the dialect has {kind}"))
    if head.model_fault and not any(finding.level == "error" for finding in found):
        found.append(Finding("error", head.model_fault))
    absent = [key for key in SAMPLER_KEYS if key not in keys]
    if absent:
        what = "no sampler keys" if len(absent) == len(SAMPLER_KEYS) else f"no {', '.join(absent)}"
        found.append(Finding("note", f"{what}: the released model's values are used"))
    return found


def is_rival(head: GGUFHead) -> bool:
    """Whether the file is written in the rival dialect, which has another name for a norm and no key for the canvas."""
    return RIVAL_NORM in head.tensors


def family(kind: str) -> str:
    """What a reader takes alike: integers of any width, and one of them for an array of them."""
    element = kind.removeprefix("arr[").removesuffix("]")
    return "int" if element[0] in "iu" else "real" if element[0] == "f" else kind


def check_tensors(head: GGUFHead) -> list[Finding]:
    """Which tensors are missing, which are foreign."""
    names = head.tensors.keys()
    found = []
    if "output.weight" in names:
        found.append(Finding("error", "tensor 'output.weight' is there: an untied head is not supported"))
    has_pre_norm = "self_cond_pre_norm.weight" in names or is_rival(head)
    parts = [has_pre_norm, *(name in names for name in SELF_CONDITIONING)]
    if not any(parts):
        found.append(Finding("warning", "no self-conditioning tensors: the signal is zero, more steps are needed"))
    elif not all(parts):
        found.append(Finding("error", "some of the self-conditioning tensors are missing"))
    if is_rival(head):
        found.append(Finding("note", "written in the rival dialect: 'self_cond_norm' for 'self_cond_pre_norm'"))
    known = {*SELF_CONDITIONING, "self_cond_pre_norm.weight"}
    found += [
        Finding("error", f"tensor '{rule.name}' is missing")
        for rule in GLOBAL_TENSORS
        if rule.name not in names and rule.name not in known
    ]

    if head.model is None:
        return found
    layers = head.model.layers
    no_scalar, split = [], []
    for i, layer in enumerate(layers):
        absent = [
            r.name
            for r in LAYER_TENSORS
            if layer_name(i, r.name) not in names and (layer.sliding or not r.sliding_only)
        ]
        if ENCODER_SCALAR in absent:
            absent.remove(ENCODER_SCALAR)
            no_scalar.append(i)
        if EXPERTS in absent and all(layer_name(i, name) in names for name in SPLIT_EXPERTS):
            absent.remove(EXPERTS)
            split.append(i)
        found += [Finding("error", f"tensor '{layer_name(i, name)}' is missing") for name in absent]
        if not layer.sliding and layer_name(i, "attn_v.weight") in names:
            found.append(Finding("error", f"tensor '{layer_name(i, 'attn_v.weight')}' is there: full layers have no V"))
    if no_scalar:
        which = "every layer" if len(no_scalar) == len(layers) else f"layers {no_scalar}"
        found.append(Finding("warning", f"no encoder scalars in {which}: the decoder's are used, prompts suffer"))
    if split:
        found.append(Finding("note", f"gate and up of the experts stand apart in {len(split)} layers"))
    for tensor in head.tensors.values():
        if kind_of(tensor.name) != OTHER and tensor.type in UNREADABLE:
            found.append(Finding("error", f"tensor '{tensor.name}' has type {tensor.type}, which is not served"))
        elif tensor.name.endswith(".scale") and kind_of(tensor.name) == OTHER:
            found.append(Finding("error", f"tensor '{tensor.name}' is there: scales beside a tensor are not served"))
    n_other = sum(1 for name in names if kind_of(name) == OTHER)
    if n_other:
        found.append(Finding("note", f"{n_other} tensors are not part of a text model and are not used"))
    return found


def check_shapes(head: GGUFHead) -> list[Finding]:
    """Tensors whose shape is not what the keys say."""
    if head.model is None:
        return []
    v, layers = head.model.values, head.model.layers
    full = next((layer.head_dim for layer in layers if not layer.sliding), 0)
    known = {
        "vocab": v["n_vocab"],
        "hidden": v["n_embd"],
        "ffn": v["n_ff"],
        "experts": v["n_expert"],
        "expert_ffn": v["n_ff_exp"],
        "gate_up": 2 * v["n_ff_exp"],
        "pairs": full // 2,
        "one": 1,
    }
    found = []
    for rule in GLOBAL_TENSORS + FOREIGN_GLOBAL_TENSORS:
        found += check_shape(head.tensors.get(rule.name), rule, known)
    for i, layer in enumerate(layers):
        dim = layer.head_dim
        own = {**known, "head": dim, "q": v["n_head"] * dim, "kv": layer.n_head_kv * dim}
        for rule in LAYER_TENSORS + FOREIGN_LAYER_TENSORS:
            found += check_shape(head.tensors.get(layer_name(i, rule.name)), rule, own)
    return found


def check_shape(tensor: TensorInfo | None, rule: Tensor, sizes: dict[str, int]) -> list[Finding]:
    if tensor is None:
        return []
    expected = tuple(sizes[d] for d in reversed(rule.dims))
    if tensor.shape == expected:
        return []
    text = f"tensor '{tensor.name}' has shape {list(tensor.shape)}, the keys say {list(expected)}"
    return [Finding("error", text)]


def check_text(keys: dict[str, Value]) -> list[Finding]:
    """The tokenizer and the chat template."""
    absent = [key for key in TOKENIZER_KEYS if key not in keys]
    if absent:
        what = "no tokenizer" if len(absent) == len(TOKENIZER_KEYS) else f"no {', '.join(absent)}"
        return [Finding("warning", f"{what}: the file can only be used with token ids")]
    found = []
    model = keys["tokenizer.ggml.model"].value
    if model != "gemma4":
        found.append(Finding("warning", f"tokenizer.ggml.model is {model!r:.60}, the dialect has 'gemma4'"))
    template = keys.get("tokenizer.chat_template")
    if template is None:
        found.append(Finding("note", "no chat template: prompts are used as plain text"))
    elif fault := template_fault(str(template.value)):
        found.append(Finding("warning", f"chat is not possible: {fault}"))
    tokens = keys["tokenizer.ggml.tokens"]
    # Gemma keeps its special tokens at the vocabulary's beginning, which is what the head of the array shows.
    shown = tokens.value if isinstance(tokens.value, list) else []
    if tokens.count == len(shown) and not any(token in END_TOKENS for token in shown):
        found.append(Finding("warning", f"none of the end tokens {', '.join(END_TOKENS)} is in the vocabulary"))
    return found
