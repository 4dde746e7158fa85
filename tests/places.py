"""Where a model may lie, and what may do the work on its logits: the places at which the same tests run.

The host cannot touch the memory of a server: an engine that reads or writes there as it does on the CPU fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from pydiffgguf import DiffusionModel
from pydiffgguf._binding.functions import build_info

#: The backends of this build that are for this machine's GPUs.
LOCAL = sorted({"CUDA", "MTL", "Metal", "Vulkan", "ROCm"} & set(build_info()["backends"]))

T = TypeVar("T")

Servers = Callable[[], tuple[str, str]]
"""The addresses of two RPC servers. A place that has no use for them does not call it, and none is started."""


@dataclass(frozen=True)
class Place:
    """A place's name, and the options of DiffusionModel that put a model there."""

    name: str
    options: Mapping[str, Any]

    def open(self, path: Path, **options: Any) -> DiffusionModel:
        """The file, opened at this place; `options` go before the place's own."""
        return DiffusionModel(path, **{**self.options, **options})

    @property
    def may_be_a_gpu(self) -> bool:
        """Whether some of the model may lie on a GPU. Servers of a build for GPUs offer theirs."""
        return bool(LOCAL) and self.name not in ON_THE_CPU

    @property
    def tolerance(self) -> float:
        """How far logits of float32 models may be from the reference's, relative to the greatest.

        The sines of angles are the driver's on Vulkan; Mesa's are off by 1e-5 at position 1,000, which moves the logits
        of a net with heads of 512 by 2.9e-5 there. Those of the other nets are within 2e-6 on Vulkan too.

        CUDA multiplies attention's factors in TF32 unless the environment forbids it: emulated on the CPU, that moves
        the demo model's logits by 2.5e-2 (benchmarks/results/tf32.md)."""
        if self.name == "CUDA" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
            return 5e-2
        return 5e-5 if self.name == "Vulkan" else 2e-5

    def some(self, items: Sequence[T], n: int) -> Sequence[T]:
        """All items on the CPU; at other places n of them, the first, the last and others evenly between."""
        last = len(items) - 1
        return items if self.name == "cpu" else [items[round(i * last / (n - 1))] for i in range(n)]


def on_servers(*endpoints: str) -> dict[str, Any]:
    """Options that put all layers on servers, none on this machine's GPUs. A server of such a build offers its
    machine's GPUs, too, and else its CPU."""
    n_gpus = sum(device["name"].startswith(tuple(LOCAL)) for device in build_info()["devices"])
    if n_gpus == 0:
        return {"rpc": endpoints}
    n_served = len(endpoints) * n_gpus
    return {"rpc": endpoints, "tensor_split": [1.0] * n_served + [0.0] * n_gpus, "main_gpu": n_served - 1}


#: Nets have five to seven layers: with four of them on devices, some are left to the CPU.
PLACES: dict[str, Callable[[Servers], dict[str, Any]]] = {
    "cpu": lambda servers: {"n_gpu_layers": 0},
    # the sampler of ggml's operators; the CUDA kernels' loop is tested by tests/test_kernels.py
    "operators": lambda servers: {"n_gpu_layers": 0, "sampler": "operators"},
    "rpc": lambda servers: on_servers(servers()[0]),
    "two servers and the CPU": lambda servers: {**on_servers(*servers()), "n_gpu_layers": 4},
    **{name: lambda servers: {"n_gpu_layers": "auto"} for name in LOCAL},
}

#: Those that differ in what samples; those that differ in where a model lies, for tests in which nothing is sampled.
ON_THE_CPU = ("cpu", "operators")
DEVICES = [name for name in PLACES if name == "cpu" or name not in ON_THE_CPU]


def place_of(request: pytest.FixtureRequest, places: Mapping[str, Callable[[Servers], dict[str, Any]]]) -> Place:
    """The place that a fixture with these as its params is made for."""
    return Place(request.param, places[request.param](lambda: request.getfixturevalue("servers")))


def furthest_apart(a: np.ndarray, b: np.ndarray) -> float:
    """The greatest difference between two places' numbers, of the greatest magnitude in `b`."""
    return float(np.abs(a - b).max() / np.abs(b).max())
