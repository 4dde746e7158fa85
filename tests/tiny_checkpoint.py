"""Random, tiny DiffusionGemma checkpoints for tests: every part of the architecture, a few hundred kilobytes.

They are written as transformers saves them (tests/parity/test_reference.py compares), but without it and without torch,
so that most tests need neither.

A fresh transformers model is a poor test: every norm weight and scalar is 1, so that a forgotten one changes nothing,
and the router hardly chooses. Here each of them is drawn away from 1, the two modes' layer scalars are far apart, and
the query and key norms are near 0.35: attention has no 1/sqrt(d) factor, and weights near 1 make a random net so
sharp that rounding errors grow from layer to layer.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

# A small config's text part, for tests that need no weights.
SMALL_TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "sliding_window": 8,
}

# Special tokens in the order of their ids; `<bos>` is 2 and `<eos>` 1, as in Gemma's vocabulary.
SPECIAL_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<|turn>",
    "<turn|>",
    "<|tool_response>",
    "<tool_response|>",
    "<|channel>",
    "<channel|>",
    "<|tool_call>",
    "<tool_call|>",
    '<|"|>',
    "<|think|>",
)
# Added tokens that are plain text, as Gemma's runs of newlines are.
PLAIN_ADDED_TOKENS = ("\n\n", "\n\n\n")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)

# What the merges are learned from: short enough to learn in milliseconds, with words, digits, code and line breaks.
CORPUS = """Why is the sky blue? Because the air scatters blue light more than it scatters red light.
The cat sat on the mat. The dog sat on the log. Where is the cat? The cat is on the mat.
def add(a, b):
    return a + b
for i in range(10):
    print(i)
1 2 3 4
3 4 1 2
2 1 4 3
4 3 2 1
Who has the key? The king has the key, and the queen has the ring.
What is two and three? Two and three is five. What is 7 + 8? 15.
Größe, naïve café, señor; "quoted" & (bracketed) [listed] {braced} <angled>.
"""


def learn_merges(text: str, count: int) -> list[tuple[str, str]]:
    """The `count` most frequent pairs of `text` in the order in which BPE joins them; ties go to the smaller pair.

    Plain BPE training over the whole text with spaces written as U+2581 and no pre-split, as Gemma's tokenizer runs.
    Returns fewer pairs when no pair occurs twice any more.
    """
    symbols = list(text.replace(" ", "\u2581"))
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs = Counter(itertools.pairwise(symbols))
        best = min(pairs.items(), key=lambda item: (-item[1], item[0]))
        if best[1] < 2:
            break
        left, right = best[0]
        merges.append((left, right))
        joined: list[str] = []
        i = 0
        while i < len(symbols):
            if i + 1 < len(symbols) and symbols[i] == left and symbols[i + 1] == right:
                joined.append(left + right)
                i += 2
            else:
                joined.append(symbols[i])
                i += 1
        symbols = joined
    return merges


def byte_fallback_tokenizer(
    vocab: dict[str, int],
    merges: Sequence[tuple[str, str]],
    added: Sequence[tuple[str, bool]],
    *,
    pre_tokenizer: dict[str, Any] | None = None,
    post_processor: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A tokenizer.json of the Gemma kind. `vocab`: token -> id; `added`: tokens that no text is cut into, and whether
    each is special."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[t], "content": t, **flags, "special": special} for t, special in added],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }


def write_tokenizer(path: Path, vocab_size: int) -> dict[str, int]:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja of the Gemma kind into the folder `path`.

    Special tokens, byte tokens `<0xXX>`, the corpus' characters, then merges until `vocab_size` ids are used (a few
    ids may stay unused). Returns token -> id. Raises ValueError when `vocab_size` is too small for the fixed part.
    """
    characters = sorted(set(CORPUS.replace(" ", "\u2581")))
    fixed = [*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS, *(f"<0x{b:02X}>" for b in range(256)), *characters]
    if vocab_size < len(fixed):
        raise ValueError(f"vocab_size: {vocab_size}, needs at least {len(fixed)} with a tokenizer")
    vocab = {token: i for i, token in enumerate(fixed)}
    merges: list[tuple[str, str]] = []
    for left, right in learn_merges(CORPUS, vocab_size - len(fixed)):
        merges.append((left, right))
        if left + right not in vocab:  # two merges may give the same token, and an added token may be a merge's result
            vocab[left + right] = len(vocab)

    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    tokenizer = byte_fallback_tokenizer(
        vocab,
        merges,
        [(t, True) for t in SPECIAL_TOKENS] + [(t, False) for t in PLAIN_ADDED_TOKENS],
        post_processor={
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, bos, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [vocab["<bos>"]], "tokens": ["<bos>"]}},
        },
    )
    (path / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return vocab


class Draws:
    """The numbers of torch.manual_seed(seed): uniform ones exactly, normal ones up to the last bits of log and cos.

    The bounds of the parity tests and the figures in benchmarks/results were measured with nets drawn by torch.
    """

    def __init__(self, seed: int) -> None:
        self._twister = np.random.RandomState(seed)

    def _unit(self, n: int) -> Floats:
        """n numbers in [0, 1) of 24 bits."""
        words = self._twister.randint(0, 2**32, size=n, dtype=np.uint32)
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def uniform(self, shape: Sequence[int], low: float, high: float) -> Floats:
        """Numbers in [low, high)."""
        return self._unit(math.prod(shape)).reshape(shape) * np.float32(high - low) + np.float32(low)

    def normal(self, shape: Sequence[int], deviation: float) -> Floats:
        """Normal numbers with mean 0; at least 16. Box and Muller's method in groups of 16, of which the last one
        is drawn again, from the end, where 16 does not divide their number."""

        def group(unit: Floats) -> Floats:
            first, second = np.moveaxis(unit.reshape(-1, 2, 8), 1, 0)
            radius, angle = np.sqrt(-2 * np.log(1 - first)), np.float32(2 * math.pi) * second
            return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)

        n = math.prod(shape)
        whole = n - n % 16
        values = np.empty(n, np.float32)
        values[:whole] = group(self._unit(n)[:whole])
        if whole < n:
            values[-16:] = group(self._unit(16))
        return values.reshape(shape) * np.float32(deviation)


def text_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The decoder's weights and their shapes, by transformers' names below `model.decoder`."""
    text = config["text_config"]
    hidden, inner, experts, wide = (
        text[key] for key in ("hidden_size", "intermediate_size", "num_experts", "moe_intermediate_size")
    )
    gated = {
        "gate_proj.weight": (inner, hidden),
        "up_proj.weight": (inner, hidden),
        "down_proj.weight": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (text["vocab_size"], hidden), "norm.weight": (hidden,)}
    shapes |= {f"self_conditioning.{name}": shape for name, shape in gated.items()}
    shapes["self_conditioning.pre_norm.weight"] = (hidden,)
    for i, kind in enumerate(text["layer_types"]):
        own = text | text["per_layer_config"].get(str(i), {})
        head, queries, keys = own["head_dim"], own["num_attention_heads"], own["num_key_value_heads"]
        layer: dict[str, tuple[int, ...]] = {f"mlp.{name}": shape for name, shape in gated.items()}
        for side in ("pre", "post"):
            for suffix in ("", "_2", "_1")[: 3 if side == "post" else 2]:
                layer[f"{side}_feedforward_layernorm{suffix}.weight"] = (hidden,)
        layer |= {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_norm.weight": (head,),
            "self_attn.k_norm.weight": (head,),
            "self_attn.q_proj.weight": (queries * head, hidden),
            "self_attn.k_proj.weight": (keys * head, hidden),
            "self_attn.o_proj.weight": (hidden, queries * head),
            "router.scale": (hidden,),
            "router.proj.weight": (experts, hidden),
            "router.per_expert_scale": (experts,),
            "experts.gate_up_proj": (experts, 2 * wide, hidden),
            "experts.down_proj": (experts, hidden, wide),
        }
        if kind == "sliding_attention":  # full layers take their values from the keys
            layer["self_attn.v_proj.weight"] = (keys * head, hidden)
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def text_weights(config: Mapping[str, Any], seed: int, sc_scale: float) -> dict[str, Floats]:
    """Every weight of the text model, drawn from `seed`; see the module's docstring for the ranges."""
    draws = Draws(seed)
    weights: dict[str, Floats] = {}
    for name, shape in sorted(text_shapes(config).items()):
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            value = draws.uniform(shape, 0.30, 0.40)
        elif name.endswith("per_expert_scale"):
            value = draws.uniform(shape, 0.5, 1.5)
        elif len(shape) == 1:  # norms and router.scale
            value = draws.uniform(shape, 0.6, 1.4)
        elif name == "embed_tokens.weight":
            value = draws.normal(shape, 2.5 * shape[-1] ** -0.5)
        elif name.endswith("router.proj.weight"):
            value = draws.normal(shape, 2.0)  # its input carries a factor hidden^-0.5
        else:
            value = draws.normal(shape, shape[-1] ** -0.5)
        weights[f"model.decoder.{name}"] = value
    for i in range(config["text_config"]["num_hidden_layers"]):
        weights[f"model.decoder.layers.{i}.layer_scalar"] = draws.uniform((1,), 0.8, 1.3)
        weights[f"model.encoder.language_model.layers.{i}.layer_scalar"] = draws.uniform((1,), 0.25, 0.55)
    weights["model.decoder.self_conditioning.down_proj.weight"] *= np.float32(sc_scale)
    return weights


def vision_weights(config: Mapping[str, Any]) -> dict[str, Floats]:
    """A vision tower of one layer, which nothing here uses: what a converter must know how to leave out."""
    vision = config["vision_config"]
    hidden, inner, head = vision["hidden_size"], vision["intermediate_size"], vision["head_dim"]
    layer = {f"self_attn.{letter}_proj.linear.weight": (hidden, hidden) for letter in "qkvo"}
    layer |= {f"self_attn.{letter}_norm.weight": (head,) for letter in "qk"}
    layer |= {f"mlp.{part}_proj.linear.weight": (inner, hidden) for part in ("gate", "up", "down")}
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    layer |= {f"{norm}.weight": (hidden,) for norm in norms}
    tower: dict[str, tuple[int, ...]] = {f"encoder.layers.0.{name}": shape for name, shape in layer.items()}
    tower["patch_embedder.input_proj.weight"] = (hidden, 3 * vision["patch_size"] ** 2)
    tower["patch_embedder.position_embedding_table"] = (2, vision["position_embedding_size"], hidden)
    shapes = {f"model.encoder.vision_tower.{name}": shape for name, shape in tower.items()}
    shapes["model.encoder.embed_vision.embedding_projection.weight"] = (config["text_config"]["hidden_size"], hidden)
    draws = Draws(0)
    return {name: draws.normal(shape, 0.02) for name, shape in shapes.items()}


def rounded(values: Floats, dtype: str) -> npt.NDArray[Any]:
    """Values as the disk holds them; "bfloat16" as the bit patterns, rounded to the nearest, ties to even."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, header: Mapping[str, Any], body: bytes) -> None:
    """A safetensors file of a header, which may be wrong, and the tensors' bytes."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def write_weights(path: Path, weights: Mapping[str, Floats], dtype: str = "float32") -> None:
    """A safetensors file as transformers writes it. `dtype`: "float32", "bfloat16" or "float16"."""
    code = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = bytearray()
    for name, values in sorted(weights.items()):
        data = rounded(values, dtype).tobytes()
        header[name] = {"dtype": code, "shape": values.shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    write_safetensors(path, header, bytes(body))


def write_shards(path: Path, weights: Mapping[str, Floats], dtype: str, largest: int) -> None:
    """Several safetensors files of at most `largest` bytes (or one tensor) in the folder `path`, and their index."""
    shards: list[dict[str, Floats]] = [{}]
    for name, values in sorted(weights.items()):
        if shards[-1] and sum(v.nbytes for v in shards[-1].values()) + values.nbytes > largest:
            shards.append({})
        shards[-1][name] = values
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_weights(path / file, shard, dtype)
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(v.nbytes for v in weights.values())}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def make_checkpoint(
    path: Path,
    *,
    seed: int = 0,
    vocab_size: int = 512,
    hidden_size: int = 128,
    intermediate_size: int = 96,
    num_hidden_layers: int = 6,
    layer_types: Sequence[str] | None = None,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    head_dim: int = 32,
    global_head_dim: int = 64,
    num_global_key_value_heads: int = 1,
    num_experts: int = 8,
    top_k_experts: int = 2,
    moe_intermediate_size: int = 64,
    sliding_window: int = 16,
    canvas_length: int = 64,
    max_position_embeddings: int = 4096,
    sc_scale: float = 1.0,
    sharpen: float = 1.0,
    dtype: str = "float32",
    tokenizer: bool = False,
    sharded: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
) -> None:
    """Writes a random DiffusionGemma into the folder `path`, which is made when absent.

    Shape parameters are named as in transformers' DiffusionGemmaTextConfig. `layer_types` None: every sixth layer is
    full, and the last one. `sc_scale` scales self_conditioning.down_proj (0.3 keeps a random net from doubling its
    rounding errors at every denoise step), `sharpen` the embedding, and with it the logits. `dtype`: "float32",
    "bfloat16" or "float16", the dtype on the disk. `tokenizer`: writes a small BPE tokenizer of the Gemma kind and a
    chat template too. `sharded`: several safetensors files with an index. `eos_token_id`: for generation_config.json;
    None: `<eos>`, `<turn|>` and `<|tool_response>` with a tokenizer, no end token without.
    """
    path.mkdir(parents=True, exist_ok=True)
    if layer_types is None:
        n = num_hidden_layers
        layer_types = ["full_attention" if (i + 1) % 6 == 0 or i == n - 1 else "sliding_attention" for i in range(n)]
    usual = {"head_dim": head_dim, "num_key_value_heads": num_key_value_heads}
    full = {"head_dim": global_head_dim, "num_key_value_heads": num_global_key_value_heads}
    own = {key: value for key, value in full.items() if value != usual[key]}
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "layer_types": list(layer_types),
        "max_position_embeddings": max_position_embeddings,
        "model_type": "diffusion_gemma_text",
        "moe_intermediate_size": moe_intermediate_size,
        "num_attention_heads": num_attention_heads,
        "num_experts": num_experts,
        "num_hidden_layers": num_hidden_layers,
        "num_key_value_heads": num_key_value_heads,
        "pad_token_id": 0,
        "per_layer_config": {str(i): own for i, kind in enumerate(layer_types) if kind == "full_attention"},
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        "sliding_window": sliding_window,
        "tie_word_embeddings": True,
        "top_k_experts": top_k_experts,
        "use_bidirectional_attention": "vision",
        "vocab_size": vocab_size,
    }
    vision = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 32,
        "max_position_embeddings": 131072,
        "model_type": "gemma4_vision",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "position_embedding_size": 16,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
        "standardize": False,
        "use_clipped_linears": False,
    }
    # The image ids only have to be inside the vocabulary; nothing here uses them.
    config = {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "boi_token_id": vocab_size - 1,
        "canvas_length": canvas_length,
        "dtype": dtype,
        "eoi_token_id": vocab_size - 2,
        "image_token_id": vocab_size - 3,
        "initializer_range": 0.02,
        "model_type": "diffusion_gemma",
        "text_config": text,
        "tie_word_embeddings": True,
        "transformers_version": "5.23.0",
        "vision_config": vision,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))

    if tokenizer:
        vocab = write_tokenizer(path, vocab_size)
        if eos_token_id is None:
            eos_token_id = [vocab["<eos>"], vocab["<turn|>"], vocab["<|tool_response>"]]
    # Values other than the reference's defaults, so that a converter that drops them is seen.
    generation: dict[str, Any] = {
        "bos_token_id": 2,
        "confidence_threshold": 0.01,
        "max_denoising_steps": 24,
        "max_new_tokens": canvas_length,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.25},
        "stability_threshold": 2,
        "t_max": 0.9,
        "t_min": 0.3,
        "transformers_version": "5.23.0",
    }
    if eos_token_id is not None:
        generation["eos_token_id"] = eos_token_id if isinstance(eos_token_id, int) else list(eos_token_id)
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2))

    weights = text_weights(config, seed, sc_scale)
    weights["model.decoder.embed_tokens.weight"] *= np.float32(sharpen)
    weights |= vision_weights(config)
    if sharded:
        write_shards(path, weights, dtype, largest=600_000)
    else:
        write_weights(path / "model.safetensors", weights, dtype)
