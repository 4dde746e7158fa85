"""How many tokens make up a row's softmax, step by step: what the gathered self-conditioning signal reads, and how
often a row has more of them than there is room for. It needs a trained model, and no GPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from first_hour import checks
from first_hour.kernels import CAPACITY
from first_hour.stages import Context
from pydiffgguf import DiffusionModel, demo_model_path
from pydiffgguf._binding import functions
from pydiffgguf._binding.functions import sample
from pydiffgguf.cli.bench import PROMPT

#: What may weigh together what is left out of a row's softmax (csrc/base/signal_cut.h), by whether the embedding is
#: quantized.
REST = {True: 1e-4 / 16, False: 1e-6 / 16}
CANVASES = 2

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]


def by_bound(z: Floats, rest: float) -> Counts:
    """Tokens above the bound below which all others together, however many, weigh less than `rest`; z [rows, tokens],
    over the temperature."""
    lowest = math.log(rest) - math.log(z.shape[1])
    return (z - z.max(axis=1, keepdims=True) > lowest).sum(axis=1)


def by_mass(z: Floats, rest: float) -> Counts:
    """The fewest tokens whose others weigh less than `rest`, measured."""
    p = np.exp((z - z.max(axis=1, keepdims=True)).astype(np.float64))
    p = np.sort(p / p.sum(axis=1, keepdims=True), axis=1)
    return z.shape[1] - (p.cumsum(axis=1) < rest).sum(axis=1)


def count(model: DiffusionModel, prompt: str, n_canvases: int) -> list[dict[str, Any]]:
    """For each step of the first canvas of an answer, over `n_canvases` seeds: candidates a row by both rules."""
    ids = model._engine.prompts.turn(prompt)
    n_vocab, canvas = model.config.n_vocab, model.config.canvas_length
    sampling = model.sampling
    kinds = {tensor.name: tensor.type for tensor in model.tensors()}
    rest = REST[kinds["token_embd.weight"].lower() not in ("f32", "f16", "bf16")]
    found: dict[int, list[tuple[Counts, Counts]]] = {}
    with model.session() as session:
        session.encode(ids)
        for seed in range(n_canvases):
            rows = functions.noise_canvas(seed, 0, canvas, n_vocab)
            signal: Floats | None = None
            last: npt.NDArray[np.int32] | None = None
            for step in range(sampling.steps):
                z = session.denoise(rows, signal)
                t = sampling.t_min + (sampling.t_max - sampling.t_min) * (sampling.steps - step) / sampling.steps
                signal = z / np.float32(t)
                found.setdefault(step, []).append((by_bound(signal, rest), by_mass(signal, rest)))
                uniform = functions.noise_uniform(seed, 0, step, canvas)
                renoise = functions.noise_renoise(seed, 0, step, canvas, n_vocab)
                out = sample(z, sampling, step=step, uniform=uniform, renoise=renoise)
                rows = out.canvas
                settled = out.entropy.mean() < sampling.confidence_threshold
                if settled and last is not None and np.array_equal(last, out.argmax):
                    break
                last = out.argmax
    table = []
    for step, pairs in found.items():
        bound, mass = (np.concatenate(some) for some in zip(*pairs, strict=True))
        table.append(
            {
                "step": step,
                "rows": len(bound),
                "median": float(np.median(bound)),
                "median_by_mass": float(np.median(mass)),
                "most": int(bound.max()),
                "most_by_mass": int(mass.max()),
                "share_beyond_capacity": float((bound > CAPACITY).mean()),
            }
        )
    return table


def run(context: Context) -> None:
    """Of the trained model that was given, or the demo model."""
    path = context.model or demo_model_path()
    with DiffusionModel(path, **({"n_gpu_layers": 0} if context.place == "cpu" else {})) as model:
        context.record(model=path.name, n_vocab=model.config.n_vocab)
        prompts = [PROMPT] if context.model else checks.prompts(2)
        context.record(prompts={prompt: count(model, prompt, CANVASES) for prompt in prompts})
