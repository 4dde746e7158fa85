"""PEFT folders made by hand, without torch: those that are read, and those that must be refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Array = npt.NDArray[Any]

PREFIX = "base_model.model.model."


def factors(seed: int, n_in: int, n_out: int, rank: int) -> tuple[Array, Array]:
    """A float32 [rank, n_in] and B [n_out, rank], whose product has entries near 0.05."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((rank, n_in)).astype(np.float32) / np.float32(np.sqrt(n_in))
    b = rng.standard_normal((n_out, rank)).astype(np.float32) * np.float32(0.2)
    return a, b


def pair(module: str, n_in: int, n_out: int, rank: int = 4, seed: int = 0) -> dict[str, Array]:
    """The two tensors of one module, by their keys; `module` stands behind `model.`, or in full with a slash before."""
    path = f"base_model.model.{module[1:]}" if module.startswith("/") else PREFIX + module
    a, b = factors(seed, n_in, n_out, rank)
    return {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}


def write_folder(folder: Path, tensors: Mapping[str, Array], **config: Any) -> Path:
    """An adapter's folder with these tensors and, over r 4 and alpha 8, these fields of the config."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "peft_version": "0.21.2", **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder
