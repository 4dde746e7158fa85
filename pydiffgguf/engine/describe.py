"""A model in words: what was opened, where it is and what it takes. `verbose` prints it, and the logger gets it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pydiffgguf._binding.native import NativeModel
from pydiffgguf._binding.records import Device, Memory
from pydiffgguf._text import human

__all__ = ["describe", "too_large"]

#: Bits a weight has in a whole file, by the types of docs/QUANTIZATION.md at the released shape, rounded up.
BITS = {"bf16": 16.0, "q8_0": 8.6, "q6_k": 7.2, "q5_k_m": 6.1, "q4_k_m": 5.4, "dg4": 4.7, "q3_k_m": 4.3, "q2_k": 3.4}


def too_large(n_parameters: int, weights: int, session: int, available: int | None) -> str | None:
    """What to say where weights and a session, in bytes, are more than the memory that is available, and which type
    would fit; None where they fit, or where nobody knows."""
    if available is None or weights + session <= available:
        return None
    sizes = {kind: round(n_parameters * bits / 8) for kind, bits in BITS.items()}
    smaller = [(kind, size) for kind, size in sizes.items() if size < weights and size + session <= available]
    cure = f"a file in {smaller[0][0]}, {human(smaller[0][1])}, would fit" if smaller else "no smaller type would fit"
    return (
        f"it needs {human(weights + session)} of memory (weights {human(weights)}, session {human(session)}), and "
        f"{human(available)} are available, so that every pass reads from the disk; {cure}"
    )


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
        head = ", head, the signal's copy of the embedding" if memory.signal_copy else ", head"
        parts = f"{device.n_layers} layers{away}{head if device.is_main else ''}"
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
