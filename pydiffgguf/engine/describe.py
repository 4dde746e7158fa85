"""What was opened, where it lies and what it takes, in words: what `verbose` prints and the logger is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pydiffgguf._binding.native import NativeModel
from pydiffgguf._binding.records import Device, Memory

__all__ = ["describe"]


def describe(name: str, model: NativeModel, memory: Memory, *, automatic: bool) -> list[str]:
    """The lines for people. `memory`: what a session will take; `automatic`: layers were placed by what fits."""
    c, devices = model.config, model.devices()
    full = sum(not layer.sliding for layer in c.layers)
    lines = [
        f"{name}: {c.n_layer} layers ({full} full), hidden {c.n_embd}, {c.n_expert} experts "
        f"top-{c.n_expert_used}, vocabulary {c.n_vocab}, canvas {c.canvas_length}, context {c.n_ctx_train}",
        f"weights {memory.weights / 1e6:.1f} MB ({memory.weights_mapped / 1e6:.1f} mapped), cache "
        f"{memory.kv_cache / 1e6:.1f} MB, buffers {(memory.compute + memory.logits) / 1e6:.1f} MB"
        + ("" if devices else "; all on the CPU"),
        f"CPU level {model.cpu or 'none, ggml'}; products: {_kernels(model)}",
    ]
    for device in devices:
        where = f" ({device.endpoint})" if device.endpoint else ""
        away = f" ({device.n_cpu_moe} with their experts on the CPU)" if device.n_cpu_moe else ""
        parts = f"{device.n_layers} layers{away}{', head' if device.is_main else ''}"
        lines.append(
            f"{device.name}{where}: {parts}, weights {device.weights / 1e6:.1f} MB; "
            f"{device.memory_free / 1e6:.0f} MB were free"
        )
    if automatic and devices:
        n_layers, n_cpu_moe = _placed(devices, c.n_layer)
        lines.append(f"auto: n_gpu_layers={n_layers}, n_cpu_moe={n_cpu_moe} is what fits into that")
    return lines


def _placed(devices: Sequence[Device], n_layer: int) -> tuple[int, int]:
    """n_gpu_layers and n_cpu_moe that ask for what is on the devices."""
    n_layers, n_away = sum(d.n_layers for d in devices), sum(d.n_cpu_moe for d in devices)
    return n_layers, n_layer - n_layers + n_away if n_away else 0


def _kernels(model: NativeModel) -> str:
    """Which tensors are multiplied by what: "8-bit integers for 120 tensors of Q4_K, 25 of Q6_K; ..."."""
    counts: dict[str, Counter[str]] = {}
    for tensor in model.tensors():
        if len(tensor.shape) > 1:
            counts.setdefault(tensor.kernel, Counter())[tensor.type.upper()] += 1
    return "; ".join(
        f"{kernel} for " + ", ".join(f"{n} of {name}" for name, n in kinds.items()) for kernel, kinds in counts.items()
    )
