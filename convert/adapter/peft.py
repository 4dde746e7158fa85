"""Reads a PEFT folder: adapter_config.json and adapter_model.safetensors. What is adapted is decided by the tensors.

Formulas, keys and variants were read in PEFT 0.21.2 and tried against it (tests/parity/test_adapted_passes.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from pydiffgguf.errors import ModelFormatError, UnsupportedError

from ..source.config import read_json
from ..source.shards import DTYPES, Shard, StoredTensor
from .pairs import Adapter, Floats, Pair, finish

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# NeMo AutoModel trains one stack that it runs in both modes, and writes this beside the adapter.
NEMO_CONFIG = "automodel_peft_config.json"
UNUSED_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# Behind the region, up to ".lora_A": what it is here.
MODULES: dict[str, str] = {
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    "router.proj": "ffn_gate_inp",
}
EXPERTS = ("experts", "experts.base_layer")
GLOBAL_MODULES: dict[str, str] = {
    **{f"self_conditioning.{x}_proj": f"self_cond_{x}" for x in ("gate", "up", "down")},
    "lm_head": "output",
}
REGION_OF = {"decoder.": "decoder", "encoder.language_model.": "encoder", "language_model.": "both", "": "both"}

MOST_NUMBER = 2.0**53
MAX_PATTERN = 1000
MAX_REPEATS = 8

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>(?:model\.)?"
    r"(?P<region>decoder\.|encoder\.language_model\.|language_model\.|)"
    r"(?P<module>(?:layers\.(?P<layer>\d{1,4})\.)?[a-z_.]+?))"
    r"\.(?P<half>lora_A|lora_B)(?:\.[^.]+)?\.weight"
)
_VISION = re.compile(r"(?:base_model\.model\.)?(?:model\.)?encoder\.(?:vision_tower|embed_vision)\.")
_HEAD_COPY = re.compile(r"(?:base_model\.model\.)?lm_head\.base_layer\.weight")

# Fields of the config that mean another method than plain LoRA, when they hold anything.
VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
)
# Of init_lora_weights: those that leave the base as it is. A base that was changed at the start of the training is
# another base than the one that is run here.
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", None)


@dataclass(frozen=True)
class BaseShape:
    """The base's figures that tell the factors of fused experts apart; None where the base is not known."""

    hidden: int | None = None
    expert_ffn: int | None = None
    n_expert: int | None = None


@dataclass(frozen=True)
class Config:
    """adapter_config.json, as far as it counts."""

    name: str
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    base: str | None
    version: tuple[int, int] | None
    parameters: tuple[str, ...]

    def rank_of(self, path: str) -> int:
        return int(pattern_value(self.rank_pattern, path, self.rank))

    def scale_of(self, path: str, rank: int) -> float:
        alpha = pattern_value(self.alpha_pattern, path, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def pattern_value(patterns: dict[str, Any], path: str, default: float) -> float:
    """The value of the first pattern, in the file's order, that the module's path ends with."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(value)
    return default


def check_pattern(name: str, key: str, pattern: str) -> str:
    """A regular expression of a stranger's, as far as it can be matched in bounded time: repeated groups, and many
    repetitions one behind the other, can take for ever."""
    repeats = len(re.findall(r"[*+?{]", pattern))
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelFormatError(f"{name}: {key} has {pattern!r:.60}, which is no regular expression: {error}") from None
    if len(pattern) > MAX_PATTERN or repeats > MAX_REPEATS or re.search(r"\)[*+{]", pattern):
        raise ModelFormatError(f"{name}: {key} has {pattern!r:.60}, which is too involved a regular expression")
    return pattern


@dataclass
class Halves:
    """What the file holds for one module."""

    path: str
    region: str
    module: str
    layer: int | None
    keys: dict[str, str] = field(default_factory=dict)  # half -> key
    inner: bool | None = None  # of the experts of a layer that has two pairs: gate_up's is the inner wrapper


def read_peft(folder: Path, name: str, base: BaseShape | None = None) -> Adapter:
    """Reads and checks the adapter in `folder`; messages begin with `name`.

    OSError for files that cannot be read, ModelFormatError for what is broken or belongs to another model,
    UnsupportedError for anything but plain LoRA.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        explain_missing(folder, name)
    config = read_config(folder, name)
    notes = []
    unused = [file for file in UNUSED_FILES if (folder / file).is_file()]
    if unused:
        notes.append(f"{', '.join(unused)} are there and not used: the base's own count")
    both = (folder / NEMO_CONFIG).is_file()
    with Shard(path) as shard:
        modules, n_vision = sort_keys(shard, name, both)
        if n_vision:
            notes.append(f"{n_vision} pairs of the vision tower are left out: images see the bare tower")
        pairs = read_pairs(shard, modules, config, base or BaseShape())
    return finish(name, folder, pairs, base=config.base, notes=notes)


def explain_missing(folder: Path, name: str) -> None:
    """Raises an error that says what is there instead of the weights."""
    if (folder / "adapter_model.bin").is_file():
        raise UnsupportedError(f"{name}: adapter_model.bin is a pickle: save it with safe_serialization=True")
    if (folder / "adapters.safetensors").is_file():
        raise UnsupportedError(f"{name}: is an MLX adapter: not read yet")
    raise ModelFormatError(f"{name}: {folder} holds no {WEIGHTS}: not a PEFT adapter")


# ------------------------------------------------------------------------------------------------------- the config


def read_config(folder: Path, name: str) -> Config:
    if not (folder / CONFIG).is_file():
        raise ModelFormatError(f"{name}: {folder} holds no {CONFIG}: not a PEFT adapter")
    values = read_json(folder / CONFIG)
    refuse_variants(name, values)

    def checked(key: str, value: Any, whole: bool) -> Any:
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not number or not abs(value) <= MOST_NUMBER:  # NaN is not, either
            raise ModelFormatError(f"{name}: {key} is {value!r:.60}: expected a {'whole ' if whole else ''}number")
        if value == 0 or (whole and value < 0):
            raise ModelFormatError(f"{name}: {key} is {value}")
        return value

    def patterns(key: str, whole: bool) -> dict[str, Any]:
        found = values.get(key) or {}
        if not isinstance(found, dict):
            raise ModelFormatError(f"{name}: {key} is {found!r:.60}: expected an object")
        return {
            check_pattern(name, key, pattern): checked(f"{key}[{pattern!r:.60}]", value, whole)
            for pattern, value in found.items()
        }

    def given(key: str, default: Any) -> Any:
        return default if values.get(key) is None else values[key]

    base = values.get("base_model_name_or_path")
    version = re.match(r"(\d{1,4})\.(\d{1,4})", str(values.get("peft_version") or ""))
    parameters = values.get("target_parameters")
    return Config(
        name=name,
        rank=checked("r", given("r", 8), True),
        alpha=checked("lora_alpha", given("lora_alpha", 8), False),
        rslora=bool(values.get("use_rslora")),
        rank_pattern=patterns("rank_pattern", True),
        alpha_pattern=patterns("alpha_pattern", False),
        base=base if isinstance(base, str) and base else None,
        version=(int(version[1]), int(version[2])) if version else None,
        parameters=tuple(str(p) for p in parameters) if isinstance(parameters, list) else (),
    )


def refuse_variants(name: str, values: dict[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind not in ("LORA", None):
        raise UnsupportedError(f"{name}: needs peft_type {kind!r:.40}: only plain LoRA is supported")
    if values.get("use_dora"):
        raise dora(name)
    if values.get("lora_bias"):
        raise UnsupportedError(f"{name}: has biases (lora_bias=True): not supported")
    for key in VARIANTS:
        if values.get(key):
            raise UnsupportedError(f"{name}: needs {key}: only plain LoRA is supported")
    init = values.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        if str(init).startswith("mica"):
            raise UnsupportedError(f"{name}: needs init_lora_weights={init!r:.40}: only plain LoRA is supported")
        raise UnsupportedError(
            f'{name}: was trained against a base that init_lora_weights="{init!s:.40}" changed: save it with '
            "path_initial_model_for_weight_conversion, as plain LoRA"
        )


def dora(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name}: uses DoRA, which needs row norms of the unquantized base: train with use_dora=False"
    )


# -------------------------------------------------------------------------------------------------------- the keys


def sort_keys(shard: Shard, name: str, both: bool) -> tuple[list[Halves], int]:
    """The modules that the tensors name, in the file's order, and how many pairs of the vision tower there are.

    `both`: no set is for one mode alone, whatever the keys say.
    """
    modules: dict[str, Halves] = {}
    foreign: list[str] = []
    whole: list[str] = []
    n_vision = 0
    for key in shard.tensors:
        if _VISION.match(key):
            n_vision += ".lora_A" in key
        elif "lora_magnitude_vector" in key:
            raise dora(name)
        elif "lora_embedding_" in key or "trainable_tokens_delta" in key:
            raise UnsupportedError(f"{name}: adapts the token embedding: not supported")
        elif re.search(r"lora_[AB](\.[^.]+)?\.bias$", key):
            raise UnsupportedError(f"{name}: has biases (lora_bias=True): not supported")
        elif match := _KEY.fullmatch(key):
            place = place_of(match)
            if place is None:
                foreign.append(key)
                continue
            path = match["path"]
            halves = modules.setdefault(path, Halves(path, *place))
            if both and halves.layer is not None:
                halves.region = "both"
            other = halves.keys.setdefault(match["half"], key)
            if other != key:
                raise ModelFormatError(f"{name}: {other} and {key} both adapt {path}")
        elif not _HEAD_COPY.fullmatch(key):
            (foreign if "lora_" in key else whole).append(key)
    if whole:
        names = [re.sub(r"^base_model\.model\.|\.weight$", "", key) for key in whole]
        raise UnsupportedError(
            f"{name}: holds whole weights of {len(whole)} modules ({names[0]:.100}{', ...' * (len(names) > 1)}): only "
            "low-rank pairs run beside a base; train without modules_to_save"
        )
    if foreign:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise ModelFormatError(f"{name}: tensor {foreign[0]:.150} belongs to no module of DiffusionGemma{more}")
    check_head_copy(shard, name, modules)
    for path, halves in modules.items():
        outer = path.removesuffix(".base_layer")
        if halves.module in EXPERTS and {outer, f"{outer}.base_layer"} <= modules.keys():
            halves.inner = path != outer
    return list(modules.values()), n_vision


def place_of(match: re.Match[str]) -> tuple[str, str, int | None] | None:
    """(region, module, layer) of a key; None for what the model does not have."""
    region, layer, module = REGION_OF[match["region"]], match["layer"], match["module"]
    if layer is None:
        if module not in GLOBAL_MODULES or (module == "lm_head" and match["region"]):
            return None
        return "both" if module == "lm_head" else "decoder", module, None
    module = module.removeprefix(f"layers.{layer}.")
    return (region, module, int(layer)) if module in MODULES or module in EXPERTS else None


def check_head_copy(shard: Shard, name: str, modules: dict[str, Halves]) -> None:
    """Beside a pair of the head there may be a copy of the base's head, unless the vocabulary was resized."""
    for key, tensor in shard.tensors.items():
        if not _HEAD_COPY.fullmatch(key):
            continue
        halves = next((h for h in modules.values() if h.module == "lm_head" and len(h.keys) == 2), None)
        if halves is None:
            raise UnsupportedError(
                f"{name}: holds whole weights of 1 modules (lm_head): only low-rank pairs run beside a base; train "
                "without modules_to_save"
            )
        a, b = (shard.tensors[halves.keys[half]].shape for half in ("lora_A", "lora_B"))
        if tensor.shape != (b[0], a[-1]):
            raise UnsupportedError(
                f"{name}: {key} has another shape than the head that is adapted: a resized vocabulary"
            )


# ------------------------------------------------------------------------------------------------------- the pairs


def read_pairs(shard: Shard, modules: Sequence[Halves], config: Config, base: BaseShape) -> list[Pair]:
    name = config.name
    stored: dict[str, tuple[StoredTensor, StoredTensor]] = {}
    for halves in modules:
        for half, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
            if half in halves.keys and other not in halves.keys:
                raise ModelFormatError(f"{name}: {halves.keys[half]} has no {other}")
        a, b = (shard.tensors[halves.keys[half]] for half in ("lora_A", "lora_B"))
        for tensor in (a, b):
            if tensor.dtype not in DTYPES:
                raise ModelFormatError(f"{name}: {tensor.name} is {tensor.dtype}: it must be F32, F16 or BF16")
            if len(tensor.shape) != 2 or 0 in tensor.shape:
                raise ModelFormatError(f"{name}: {tensor.name} has shape {list(tensor.shape)}: expected two dimensions")
        stored[halves.path] = (a, b)
    hidden = base.hidden or find_hidden(modules, stored)
    return [read_pair(shard, halves, *stored[halves.path], config, base, hidden) for halves in modules]


def find_hidden(modules: Sequence[Halves], stored: dict[str, tuple[StoredTensor, StoredTensor]]) -> int | None:
    """The model's width, from a pair that shows it; of experts alone, from the two that a layer has."""
    by_layer: dict[tuple[str, int | None], dict[str, tuple[int, int]]] = {}
    for halves in modules:
        a, b = (tensor.shape for tensor in stored[halves.path])
        if halves.module in EXPERTS:
            by_layer.setdefault((halves.region, halves.layer), {})[halves.module] = (a[1], b[0])
        elif MODULES.get(halves.module) not in ("attn_output", "ffn_down") and not halves.module.endswith("down_proj"):
            return a[1]
        else:
            return b[0]
    for pair in by_layer.values():
        if len(pair) == 2:
            gate_up, down = pair["experts.base_layer"], pair["experts"]
            if gate_up[0] == down[1] and gate_up[1] == 2 * down[0]:
                return gate_up[0]
            if gate_up[1] == down[0] and gate_up[0] == 2 * down[1]:
                return gate_up[1]
    return None


def read_pair(
    shard: Shard,
    halves: Halves,
    stored_a: StoredTensor,
    stored_b: StoredTensor,
    config: Config,
    base: BaseShape,
    hidden: int | None,
) -> Pair:
    name, key = config.name, stored_a.name
    if stored_a.shape[0] != stored_b.shape[1]:
        raise ModelFormatError(f"{name}: {key}: lora_A has rank {stored_a.shape[0]}, lora_B {stored_b.shape[1]}")
    a, b = (values_of(shard, tensor) for tensor in (stored_a, stored_b))
    if halves.module in EXPERTS:
        target, swapped = experts_target(halves, stored_a, stored_b, config, base, hidden)
        path = halves.path.removesuffix(".base_layer")
        path += ".down_proj" if target == "ffn_down_exps" else ".gate_up_proj"
        rank = config.rank_of(path)
        if a.shape[0] % rank or (base.n_expert and a.shape[0] != rank * base.n_expert):
            raise ModelFormatError(
                f"{name}: {key}: {a.shape[0]} rows are no rank {rank} of {base.n_expert or 'any number of'} experts"
            )
        a, b = split_experts(a, b, rank, swapped)
    else:
        path, rank = halves.path, a.shape[0]
        target = GLOBAL_MODULES[halves.module] if halves.layer is None else MODULES[halves.module]
        if config.rank_of(path) != rank:
            raise ModelFormatError(f"{name}: {key}: rank {rank}, {CONFIG} says {config.rank_of(path)}")
    if halves.layer is not None:
        target = f"blk.{halves.layer}.{target}"
    kinds = {DTYPES[tensor.dtype] for tensor in (stored_a, stored_b)}
    kind = kinds.pop() if len(kinds) == 1 else GGMLQuantizationType.F32
    return Pair(target, halves.region, a, b, config.scale_of(path, rank), kind, key)


def values_of(shard: Shard, tensor: StoredTensor) -> Floats:
    """A tensor's values, whatever they are: what is not finite is found when the pairs are whole."""
    raw = shard.read(tensor, 0, tensor.n_bytes)
    if tensor.dtype == "BF16":
        values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.view("<f4" if tensor.dtype == "F32" else "<f2").astype(np.float32)
    return values.reshape(tensor.shape)


def experts_target(
    halves: Halves,
    stored_a: StoredTensor,
    stored_b: StoredTensor,
    config: Config,
    base: BaseShape,
    hidden: int | None,
) -> tuple[str, bool]:
    """(tensor, whether A and B are swapped, as PEFT 0.17 and 0.18 wrote them). The key does not name the parameter:
    widths decide, and where they fit twice the version, and the one parameter that the config names."""
    name, widths = config.name, (stored_a.shape[1], stored_b.shape[0])
    if hidden is None and len(config.parameters) == 1 and config.version is not None:
        target = "ffn_down_exps" if config.parameters[0].endswith("down_proj") else "ffn_gate_up_exps"
        return target, config.version < (0, 19)
    if hidden is None:
        raise ModelFormatError(
            f"{name}: {stored_a.name}: nothing tells gate_up from down here: name the base it was trained on"
        )
    other = base.expert_ffn
    forms = [
        (target, swapped)
        for target, swapped, at, size in (
            ("ffn_gate_up_exps", False, 0, other and 2 * other),
            ("ffn_down_exps", False, 1, other),
            ("ffn_gate_up_exps", True, 1, other and 2 * other),
            ("ffn_down_exps", True, 0, other),
        )
        if (halves.inner is None or halves.inner == (target == "ffn_gate_up_exps"))
        and widths[at] == hidden
        and size in (None, widths[1 - at])
        and (size or "down" in target or widths[1 - at] % 2 == 0)
    ]
    if not forms:
        raise ModelFormatError(
            f"{name}: {halves.path}: made for {widths[0]} inputs and {widths[1]} outputs, this base has experts of "
            f"{hidden} and {other or 'another width'}: another base model?"
        )
    if len(forms) > 1 and config.version is not None:
        forms = [form for form in forms if form[1] == (config.version < (0, 19))]
    if len(forms) > 1 and len(config.parameters) == 1:
        wanted = "ffn_down_exps" if config.parameters[0].endswith("down_proj") else "ffn_gate_up_exps"
        forms = [form for form in forms if form[0] == wanted]
    if len(forms) != 1:
        raise ModelFormatError(
            f"{name}: {stored_a.name}: its widths fit gate_up and down alike, and no peft_version tells"
        )
    return forms[0]


def split_experts(a: Floats, b: Floats, rank: int, swapped: bool) -> tuple[Floats, Floats]:
    """A [E * r, in], expert by expert, and B [out, r * E], experts within ranks -> [E, r, in] and [E, out, r]."""
    n_expert = a.shape[0] // rank
    by_expert = a.reshape(n_expert, rank, a.shape[1])
    of_ranks = b.reshape(b.shape[0], rank, n_expert).transpose(2, 1, 0)  # [E, r, out]
    if swapped:
        return np.ascontiguousarray(of_ranks), np.ascontiguousarray(by_expert.transpose(0, 2, 1))
    return by_expert, np.ascontiguousarray(of_ranks.transpose(0, 2, 1))


__all__ = ["CONFIG", "WEIGHTS", "BaseShape", "read_peft"]
