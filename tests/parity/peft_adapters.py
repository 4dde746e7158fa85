"""Adapters made by PEFT itself on the random nets: the reference's side of tests/parity/test_adapted_passes.py.

PEFT starts B at zero, which would prove nothing: every factor is drawn anew. Weights are never tied or resized after
loading: the encoder's and the decoder's factors would become one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference import Model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SEVEN = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
NO_VISION = r".*(vision_tower|embed_vision).*"


def modules(region: str, names: list[str]) -> str:
    """A regular expression of PEFT's for the layers of a region ("decoder", "encoder" or both)."""
    where = {"decoder": "decoder", "encoder": r"encoder\.language_model", "both": r"(decoder|encoder\.language_model)"}
    return rf"model\.{where[region]}\.layers\.\d+\..*\.({'|'.join(names)})"


@dataclass(frozen=True)
class Kind:
    """What an adapter adapts: fields of LoraConfig, and how large its factors are."""

    config: Mapping[str, Any]
    size: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    "two regions": Kind({"target_modules": SEVEN, "exclude_modules": NO_VISION, "r": 8, "lora_alpha": 16}),
    "decoder": Kind({"target_modules": modules("decoder", SEVEN), "r": 4, "lora_alpha": 8}),
    "encoder": Kind({"target_modules": modules("encoder", SEVEN), "r": 4, "lora_alpha": 8}),
    "self-conditioning": Kind(
        {"target_modules": r"model\.decoder\.self_conditioning\.(gate|up|down)_proj", "r": 4, "lora_alpha": 8}
    ),
    # So large that the choice of experts moves the logits: with one expert a token its weight is 1 whatever its score.
    "router": Kind({"target_modules": r".*\.router\.proj", "r": 4, "lora_alpha": 4}, size=4.0),
    "head": Kind({"target_modules": ["lm_head"], "r": 4, "lora_alpha": 4}, size=2.0),
    "rslora": Kind(
        {"target_modules": SEVEN, "exclude_modules": NO_VISION, "r": 16, "lora_alpha": 8, "use_rslora": True}
    ),
    "patterns": Kind(
        {
            "target_modules": SEVEN,
            "exclude_modules": NO_VISION,
            "r": 8,
            "lora_alpha": 8,
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 3},
            "alpha_pattern": {"down_proj": 9, r"decoder\.layers\.\d\.mlp\.up_proj": 5},
        }
    ),
    "experts": Kind(
        {
            "target_modules": [],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "r": 4,
            "lora_alpha": 8,
        }
    ),
    "experts' down": Kind({"target_modules": [], "target_parameters": ["experts.down_proj"], "r": 4, "lora_alpha": 8}),
}


def adapted(net: Model, kind: Kind, seed: int, name: str = "default") -> PeftModel:
    """A copy of the net with an adapter of that kind, whose factors are drawn from `seed`."""
    model = get_peft_model(copy.deepcopy(net), LoraConfig(**kind.config), adapter_name=name).eval()
    draw(model, seed, kind.size, name)
    return model


def draw(model: PeftModel, seed: int, size: float, name: str) -> None:
    """A of variance 1 / inputs, and B so that the product moves the logits by some 20 %."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, factor in model.named_parameters():
            if f".{name}." not in key or "lora_" not in key:
                continue
            values = torch.randn(factor.shape, generator=generator)
            width = factor.shape[-1] if "lora_A" in key else factor.shape[-1] * 30
            factor.copy_(values * size / width**0.5)


def save(model: PeftModel, folder: Path, edit: Callable[[Path], None] | None = None) -> Path:
    """The adapter as PEFT writes it."""
    model.save_pretrained(folder)
    if edit is not None:
        edit(folder)
    return folder
