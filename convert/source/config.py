"""config.json of a DiffusionGemma checkpoint, in both spellings, checked and resolved to one shape per layer.

Follows DiffusionGemmaTextConfig of transformers 5.23: the full layers' head size and KV heads stand either in
`per_layer_config` (keys are layer indices; it wins even when it is empty) or in `global_head_dim` and
`num_global_key_value_heads`; the last layer is always a full one.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydiffgguf._text import one_line
from pydiffgguf.errors import ModelFormatError, UnsupportedError

SLIDING = "sliding_attention"
FULL = "full_attention"

# The reference's defaults for what a config may leave out.
DEFAULTS = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 512,
    "max_position_embeddings": 131_072,
    "canvas_length": 256,
}
DEFAULT_RMS_EPS = 1e-6
DEFAULT_SOFTCAP = 30.0
DEFAULT_FULL_EVERY = 6
DEFAULT_GLOBAL_HEAD_DIM = 512
DEFAULT_ROPE: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}

MAX_U31 = 2**31 - 1
MAX_LAYERS = 4096  # far above any real model; keeps a hostile config from filling the memory with layers


@dataclass(frozen=True)
class LayerShape:
    """One layer's attention: sliding or full, with `head_dim` dimensions and `kv_heads` key/value heads."""

    sliding: bool
    head_dim: int
    kv_heads: int


@dataclass(frozen=True)
class CheckpointConfig:
    """The model's figures. Sizes are in elements; `rotating_pairs` counts the frequency pairs of a full layer that
    rotate, of `full.head_dim / 2`; `sliding` is the shape that sliding layers have, or would have."""

    vocab_size: int
    hidden_size: int
    ffn_size: int
    heads: int
    layers: tuple[LayerShape, ...]
    sliding: LayerShape
    full: LayerShape
    sliding_window: int
    context_length: int
    canvas_length: int
    rms_eps: float
    rope_base: float
    rope_base_sliding: float
    rotating_pairs: int
    experts: int
    experts_used: int
    expert_ffn_size: int
    softcap: float

    def dims(self, layer: int | None = None) -> dict[str, int]:
        """The sizes by the names that the table in names.py uses; `q`, `kv` and `head` only for a layer's index."""
        sizes = {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.ffn_size,
            "pairs": self.full.head_dim // 2,
            "experts": self.experts,
            "expert_ffn": self.expert_ffn_size,
            "gate_up": 2 * self.expert_ffn_size,
            "one": 1,
        }
        if layer is not None:
            shape = self.layers[layer]
            sizes["head"] = shape.head_dim
            sizes["q"] = self.heads * shape.head_dim
            sizes["kv"] = shape.kv_heads * shape.head_dim
        return sizes


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. ModelFormatError when it is not one; FileNotFoundError when there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ModelFormatError(f"{path}: not valid JSON: {one_line(e)}") from e
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


class Reader:
    """Typed look-ups in one JSON object; errors name the file and the key."""

    def __init__(self, where: str, values: dict[str, Any], prefix: str = "") -> None:
        self.where = where
        self.values = values
        self.prefix = prefix

    def name(self, key: str) -> str:
        return f"{self.where}: key '{self.prefix}{key}'"

    def present(self, key: str) -> bool:
        """Whether `key` is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = MAX_U31) -> int:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ModelFormatError(f"{self.name(key)} is missing: expected an integer")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelFormatError(f"{self.name(key)}: expected an integer, got {value!r:.60}")
        if not low <= value <= high:
            raise ModelFormatError(f"{self.name(key)}: expected an integer from {low} to {high}, got {value!s:.60}")
        return value

    def real(self, key: str, default: float | None = None, positive: bool = True) -> float:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ModelFormatError(f"{self.name(key)} is missing: expected a number")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ModelFormatError(f"{self.name(key)}: expected a number, got {value!r:.60}")
        if abs(value) > 1e30 or not math.isfinite(value) or (value <= 0 if positive else value < 0):
            kind = "a finite number above 0" if positive else "a finite number, 0 or above"
            raise ModelFormatError(f"{self.name(key)}: expected {kind}, got {value!s:.60}")
        return float(value)

    def choice(self, key: str, choices: tuple[str, ...]) -> str | None:
        """One of `choices`, or None where the key is absent or null."""
        value = self.values.get(key)
        if value is not None and value not in choices:
            raise ModelFormatError(f"{self.name(key)}: expected one of {', '.join(choices)}, got {value!r:.60}")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise ModelFormatError(f"{self.name(key)}: expected an object, got {value!r:.60}")
        return value


def integer(reader: Reader, key: str) -> int:
    """A figure that a config may leave out."""
    return reader.integer(key, DEFAULTS[key])


def parse_config(config: dict[str, Any], where: str) -> CheckpointConfig:
    """Checks a checkpoint's config and resolves it. `config` is the whole DiffusionGemmaConfig, or its text part with
    `canvas_length` beside; `where` (a path) begins every message. Raises ModelFormatError for what is missing or makes
    no sense, UnsupportedError for variants that this project does not compute."""
    top = Reader(where, config)
    model_type = config.get("model_type")
    if model_type not in ("diffusion_gemma", "diffusion_gemma_text"):
        raise ModelFormatError(f"{top.name('model_type')}: expected 'diffusion_gemma', got {model_type!r:.60}")
    text = Reader(where, top.mapping("text_config"), "text_config.") if "text_config" in config else top
    refuse_variants(top, text)

    layer_types = parse_layer_types(text)
    shapes = parse_layers(text, layer_types)
    heads = integer(text, "num_attention_heads")
    for i, shape in enumerate(shapes):
        if shape.head_dim % 2:
            raise ModelFormatError(f"{where}: layer {i}: head_dim must be even, got {shape.head_dim}")
        if heads % shape.kv_heads:
            raise ModelFormatError(
                f"{where}: layer {i}: {heads} query heads do not divide by {shape.kv_heads} KV heads"
            )
    full = only_shape(where, shapes, sliding=False)
    sliding = only_shape(where, shapes, sliding=True) or LayerShape(
        True, integer(text, "head_dim"), integer(text, "num_key_value_heads")
    )
    assert full is not None  # the last layer is always a full one
    rope_base, rotating_pairs = parse_rope(text, FULL, full.head_dim)
    rope_base_sliding = parse_rope(text, SLIDING, sliding.head_dim)[0] if SLIDING in layer_types else 10_000.0

    experts = text.integer("num_experts")
    return CheckpointConfig(
        vocab_size=integer(text, "vocab_size"),
        hidden_size=integer(text, "hidden_size"),
        ffn_size=integer(text, "intermediate_size"),
        heads=heads,
        layers=shapes,
        sliding=sliding,
        full=full,
        sliding_window=integer(text, "sliding_window"),
        context_length=integer(text, "max_position_embeddings"),
        canvas_length=integer(top, "canvas_length"),
        rms_eps=text.real("rms_norm_eps", DEFAULT_RMS_EPS),
        rope_base=rope_base,
        rope_base_sliding=rope_base_sliding,
        rotating_pairs=rotating_pairs,
        experts=experts,
        experts_used=text.integer("top_k_experts", high=experts),
        expert_ffn_size=text.integer("moe_intermediate_size"),
        softcap=text.real("final_logit_softcapping", DEFAULT_SOFTCAP),
    )


def refuse_variants(top: Reader, text: Reader) -> None:
    """UnsupportedError for configs of which this project computes something else than the reference would."""
    if text.values.get("use_bidirectional_attention") not in (None, "vision"):
        value = text.values["use_bidirectional_attention"]
        raise UnsupportedError(
            f"{text.name('use_bidirectional_attention')}: only 'vision' and null are supported, got {value!r:.60}"
        )
    if text.values.get("attention_bias"):
        raise UnsupportedError(f"{text.name('attention_bias')}: attention with biases is not supported")
    for part in (top, text):
        if part.values.get("tie_word_embeddings", True) is not True:
            raise UnsupportedError(f"{part.name('tie_word_embeddings')}: an untied head is not supported")
    activation = text.values.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise UnsupportedError(
            f"{text.name('hidden_activation')}: only 'gelu_pytorch_tanh' is supported, got {activation!r:.60}"
        )
    if "final_logit_softcapping" in text.values and not text.present("final_logit_softcapping"):
        raise UnsupportedError(f"{text.name('final_logit_softcapping')}: a model without a softcap is not supported")


def parse_layer_types(text: Reader) -> list[str]:
    """`sliding_attention` or `full_attention` per layer; the last is forced to full, as the reference does."""
    n_layers = text.integer("num_hidden_layers", DEFAULTS["num_hidden_layers"], high=MAX_LAYERS)
    types = text.values.get("layer_types")
    if types is None:
        types = [FULL if (i + 1) % DEFAULT_FULL_EVERY == 0 else SLIDING for i in range(n_layers)]
    if not isinstance(types, list) or len(types) != n_layers:
        raise ModelFormatError(f"{text.name('layer_types')}: expected a list of {n_layers} layer types")
    for i, layer_type in enumerate(types):
        if layer_type not in (SLIDING, FULL):
            raise ModelFormatError(
                f"{text.name('layer_types')}: layer {i}: expected '{SLIDING}' or '{FULL}', got {layer_type!r:.60}"
            )
    return [*types[:-1], FULL]


def parse_layers(text: Reader, layer_types: list[str]) -> tuple[LayerShape, ...]:
    """One LayerShape per layer, from either spelling."""
    head_dim = integer(text, "head_dim")
    kv_heads = integer(text, "num_key_value_heads")
    if "per_layer_config" in text.values:
        overrides = parse_overrides(text, len(layer_types))
    else:
        override = {"head_dim": text.integer("global_head_dim", DEFAULT_GLOBAL_HEAD_DIM)}
        if text.present("num_global_key_value_heads"):
            override["num_key_value_heads"] = text.integer("num_global_key_value_heads")
        overrides = {i: override for i, t in enumerate(layer_types) if t == FULL}
    return tuple(
        LayerShape(
            sliding=t == SLIDING,
            head_dim=overrides.get(i, {}).get("head_dim", head_dim),
            kv_heads=overrides.get(i, {}).get("num_key_value_heads", kv_heads),
        )
        for i, t in enumerate(layer_types)
    )


def parse_overrides(text: Reader, n_layers: int) -> dict[int, dict[str, int]]:
    """`per_layer_config`: layer index -> overrides. Null and {} mean that no layer differs."""
    if not text.present("per_layer_config"):
        return {}
    overrides: dict[int, dict[str, int]] = {}
    for key, values in text.mapping("per_layer_config").items():
        if not (key.isascii() and key.isdigit() and len(key) <= 6 and int(key) < n_layers):
            raise ModelFormatError(
                f"{text.name('per_layer_config')}: {key!r:.60} is not a layer index from 0 to {n_layers - 1}"
            )
        if not isinstance(values, dict):
            raise ModelFormatError(f"{text.name(f'per_layer_config.{key}')}: expected an object, got {values!r:.60}")
        layer = Reader(text.where, values, f"{text.prefix}per_layer_config.{key}.")
        for name, value in values.items():
            # An override that repeats the global value changes nothing, and the reference drops it too.
            if name not in ("head_dim", "num_key_value_heads") and value != text.values.get(name, []):
                raise UnsupportedError(f"{layer.name(name)}: only head_dim and num_key_value_heads may vary by layer")
        overrides[int(key)] = {k: layer.integer(k) for k in ("head_dim", "num_key_value_heads") if k in values}
    return overrides


def only_shape(where: str, shapes: tuple[LayerShape, ...], sliding: bool) -> LayerShape | None:
    """The one shape of all sliding, or all full, layers; None when there is no such layer."""
    kind = [(i, s) for i, s in enumerate(shapes) if s.sliding == sliding]
    for i, shape in kind:
        if shape != kind[0][1]:
            raise UnsupportedError(
                f"{where}: {'sliding' if sliding else 'full'} layers differ from one another: layer {kind[0][0]} has "
                f"{kind[0][1].kv_heads} x {kind[0][1].head_dim}, layer {i} {shape.kv_heads} x {shape.head_dim}"
            )
    return kind[0][1] if kind else None


def parse_rope(text: Reader, layer_type: str, head_dim: int) -> tuple[float, int]:
    """(theta, rotating frequency pairs) of one layer type; the other pairs of `head_dim / 2` stand still.

    "proportional" rotates the first `int(factor * head_dim // 2)` pairs, with exponents over the whole `head_dim`;
    "default" rotates them all.
    """
    where = text
    if text.present("rope_parameters"):
        where = Reader(text.where, text.mapping("rope_parameters"), f"{text.prefix}rope_parameters.")
        values = where.mapping(layer_type)
    else:
        values = DEFAULT_ROPE[layer_type]
    rope = Reader(where.where, values, f"{where.prefix}{layer_type}.")
    theta = rope.real("rope_theta")
    factor = rope.real("partial_rotary_factor", 1.0)
    if factor > 1:
        raise ModelFormatError(f"{rope.name('partial_rotary_factor')}: expected at most 1, got {factor}")
    kinds = ("default",) if layer_type == SLIDING else ("default", "proportional")
    rope_type = values.get("rope_type")
    if rope_type not in kinds or (rope_type == "default" and factor != 1) or rope.real("factor", 1.0) != 1:
        raise UnsupportedError(
            f"{where.name(layer_type)}: only rope_type {' and '.join(kinds)} without a factor is supported, "
            f"got {rope_type!r:.60} with partial_rotary_factor {factor}, factor {values.get('factor', 1.0)!r:.60}"
        )
    pairs = head_dim // 2
    return theta, pairs if rope_type == "default" else int(factor * head_dim // 2)
