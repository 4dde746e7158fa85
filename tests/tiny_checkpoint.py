"""Random, tiny DiffusionGemma checkpoints for tests: every part of the architecture, a few hundred kilobytes.

A fresh transformers model is a poor test: every norm weight and scalar is 1, so that a forgotten one changes nothing,
and the router hardly chooses. Here each of them is drawn away from 1, the two modes' layer scalars lie far apart, and
the query and key norms lie near 0.35: attention has no 1/sqrt(d) factor, and weights near 1 make a random net so
sharp that rounding errors grow from layer to layer.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.configuration_diffusion_gemma import (
    DiffusionGemmaConfig,
    DiffusionGemmaTextConfig,
)
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig

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

    def added(token: str, special: bool) -> dict[str, Any]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return {"id": vocab[token], "content": token, **flags, "special": special}

    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(t, True) for t in SPECIAL_TOKENS] + [added(t, False) for t in PLAIN_ADDED_TOKENS],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, bos, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [vocab["<bos>"]], "tokens": ["<bos>"]}},
        },
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


def randomise(model: DiffusionGemmaForBlockDiffusion, seed: int, sc_scale: float) -> None:
    """Draws every text weight of `model` anew, in place, from `seed`; see the module's docstring for the ranges."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=rng) * (high - low) + low)

    def normal(tensor: torch.Tensor, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=rng) * std)

    with torch.no_grad():
        for name, tensor in sorted(model.model.decoder.named_parameters()):
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                uniform(tensor, 0.30, 0.40)
            elif name.endswith("per_expert_scale"):
                uniform(tensor, 0.5, 1.5)
            elif tensor.ndim == 1:  # norms and router.scale
                uniform(tensor, 0.6, 1.4)
            elif name == "embed_tokens.weight":
                normal(tensor, 2.5 * tensor.shape[-1] ** -0.5)
            elif name.endswith("router.proj.weight"):
                normal(tensor, 2.0)  # its input carries a factor hidden^-0.5
            else:
                normal(tensor, tensor.shape[-1] ** -0.5)
        for decoder, encoder in zip(model.model.decoder.layers, model.model.encoder.language_model.layers, strict=True):
            uniform(decoder.layer_scalar, 0.8, 1.3)
            uniform(encoder.layer_scalar, 0.25, 0.55)
        model.model.decoder.self_conditioning.down_proj.weight.mul_(sc_scale)


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
    dtype: str = "float32",
    tokenizer: bool = False,
    sharded: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
) -> DiffusionGemmaForBlockDiffusion:
    """Builds a random DiffusionGemma, saves it in the folder `path` (made when absent), and returns it in eval mode.

    Shape parameters are named as in transformers' DiffusionGemmaTextConfig. `layer_types` None: every sixth layer is
    full, and the last one. `sc_scale` scales self_conditioning.down_proj (0.3 keeps a random net from doubling its
    rounding errors at every denoise step). `dtype`: "float32", "bfloat16" or "float16", the dtype on the disk; the
    returned model is float32 and holds the rounded values. `tokenizer`: writes a small BPE tokenizer of the Gemma kind
    and a chat template too. `sharded`: several safetensors files with an index. `eos_token_id`: for
    generation_config.json; None: `<eos>`, `<turn|>` and `<|tool_response>` with a tokenizer, no end token without.
    """
    path.mkdir(parents=True, exist_ok=True)
    text = DiffusionGemmaTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        layer_types=None if layer_types is None else list(layer_types),
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        global_head_dim=global_head_dim,
        num_global_key_value_heads=num_global_key_value_heads,
        num_experts=num_experts,
        top_k_experts=top_k_experts,
        moe_intermediate_size=moe_intermediate_size,
        sliding_window=sliding_window,
        max_position_embeddings=max_position_embeddings,
        use_bidirectional_attention="vision",
    )
    vision = Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        position_embedding_size=16,
    )
    # The image ids only have to lie inside the vocabulary; nothing here uses them.
    config = DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=canvas_length,
        boi_token_id=vocab_size - 1,
        eoi_token_id=vocab_size - 2,
        image_token_id=vocab_size - 3,
    )
    torch.manual_seed(seed)
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    randomise(model, seed, sc_scale)

    if tokenizer:
        vocab = write_tokenizer(path, vocab_size)
        if eos_token_id is None:
            eos_token_id = [vocab["<eos>"], vocab["<turn|>"], vocab["<|tool_response>"]]
    # Values other than the reference's defaults, so that a converter that drops them is seen.
    model.generation_config = DiffusionGemmaGenerationConfig(
        max_new_tokens=canvas_length,
        max_denoising_steps=24,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.25),
        t_min=0.3,
        t_max=0.9,
        stability_threshold=2,
        confidence_threshold=0.01,
        bos_token_id=2,
        pad_token_id=0,
        eos_token_id=eos_token_id if eos_token_id is None or isinstance(eos_token_id, int) else list(eos_token_id),
    )

    saved = model
    if dtype != "float32":
        # A copy goes to the disk: `.to()` would round the rotary frequencies of the returned model as well.
        saved = copy.deepcopy(model).to(getattr(torch, dtype))
        with torch.no_grad():
            state = saved.state_dict()
            for name, tensor in model.state_dict().items():
                tensor.copy_(state[name].to(torch.float32))
    saved.save_pretrained(path, max_shard_size="600KB" if sharded else "50GB")
    return model
