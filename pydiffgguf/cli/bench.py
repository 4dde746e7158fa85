"""The command ``bench``: how long prefill and denoise steps take, and what a generation comes to.

Times are medians: one interrupted run does not move them. Prefill and steps are measured on a session of their own, so
that the first step, which builds the graph, can be told from the others.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from pydiffgguf.model import DiffusionModel
    from pydiffgguf.session import Session

__all__ = ["measure", "table"]

#: What is generated from when the caller has no prompt of his own: an answer of some hundred tokens.
PROMPT = "Explain in a few paragraphs how a rainbow comes about."
#: Steps that are timed of each canvas: all steps cost the same, and a canvas of a large model takes a minute.
STEPS = 8


def measure(
    model: DiffusionModel,
    prompt: str | None,
    *,
    prefill: int,
    repeat: int,
    options: Mapping[str, Any],
    compare: str | None = None,
) -> dict[str, Any]:
    """Measures; returns JSON types. Times in seconds, memory in bytes.

    Args:
        prompt: what the generation starts from; None for one of its own.
        prefill: tokens of the prompt whose encoding is timed.
        repeat: runs that a median is taken of.
        options: keyword arguments of DiffusionModel.generate.
        compare: a checkpoint folder, whose model is timed in transformers (float32) in turns with this one.

    Raises:
        ValueError: `prefill` or `repeat` below 1.
        ContextOverflowError: `prefill` tokens do not fit.
        ImportError: `compare` without torch and transformers.
    """
    for name, value in (("prefill", prefill), ("repeat", repeat)):
        if value < 1:
            raise ValueError(f"{name} is {value}: at least 1")
    with model.session() as session:
        # The same tokens every time, spread over the vocabulary: experts are chosen by token.
        ids = [(7919 * i + 5) % model.config.n_vocab for i in range(prefill)]
        prefill_s = [_timed_prefill(session, ids) for _ in range(repeat + 1)][1:]  # the first one warms up
        sampling = {name: value for name, value in options.items() if name not in ("max_tokens", "stop", "seed")}
        first_s, step_s = _timed_steps(session, repeat, sampling)
        parts = _parts(session, sampling)
        compared = None if compare is None else _compared(session, compare, ids, repeat)
        held = session.memory
        n_ctx, n_threads = session.n_ctx, session.n_threads
    # A file without a vocabulary, of random weights say, is given ids.
    own = PROMPT if "tokenizer.ggml.tokens" in model.metadata else ids
    result = model.generate(own if prompt is None else prompt, **{"seed": 0, **options})
    stats = result.stats
    median_prefill, median_step = statistics.median(prefill_s), statistics.median(step_s)
    return {
        "model": str(model.path),
        "bytes": os.path.getsize(model.path),
        "threads": n_threads,
        "n_ctx": n_ctx,
        "canvas": model.config.canvas_length,
        "repeat": repeat,
        "prefill": {"tokens": prefill, "seconds": median_prefill, "tokens_per_second": prefill / median_prefill},
        "denoise": {
            "first_step_s": statistics.median(first_s),
            "step_s": median_step,
            "steps_measured": len(step_s),
            "parts_s": parts,
            "product_flop": product_flop(model),
            "flop_per_second": product_flop(model) / median_step,
            "ceiling_flop_per_second": ceiling(),
        },
        **({} if compared is None else {"compare": compared}),
        "generation": {
            "tokens": len(result.tokens),
            "finish_reason": result.finish_reason,
            "steps": stats.steps,
            "steps_per_canvas": sum(stats.steps) / max(len(stats.steps), 1),
            "tokens_per_forward": stats.tokens_per_forward,
            "tokens_per_second": stats.tokens_per_second,
            "prefill_s": stats.prefill_s,
            "denoise_s": stats.denoise_s,
            "seed": stats.seed,
        },
        "memory": {
            "weights": held.weights,
            "weights_mapped": held.weights_mapped,
            "kv_cache": held.kv_cache,
            "compute": held.compute,
            "logits": held.logits,
            "peak_rss": _peak_rss(),
        },
    }


def product_flop(model: DiffusionModel) -> int:
    """Floating point operations of the matrix products of one denoise step, two for each weight that a row meets;
    attention, and self-conditioning's product with the embedding, come on top."""
    c = model.config
    total = 0
    for tensor in model.tensors():
        if len(tensor.shape) > 1:
            n = math.prod(tensor.shape)
            total += 2 * c.canvas_length * (n // c.n_expert * c.n_expert_used if len(tensor.shape) > 2 else n)
    return total


def ceiling() -> float:
    """Operations a second of numpy's float32 product of two 1,536 x 1,536 matrices, on as many cores as its BLAS
    takes; the best of five."""
    n = 1536
    a = np.random.default_rng(1).standard_normal((n, n), np.float32)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times)


def _parts(session: Session, sampling: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a step by what they went into: means over one canvas's conditioned steps, operators timed apart."""
    steps = 0

    def note(_: object) -> bool:
        nonlocal steps
        steps += 1
        if steps == 1:
            session.profile()  # the first step has no self-conditioning
        return steps > STEPS

    session.run_canvas(seed=0, on_step=note, **sampling)
    parts = dataclasses.asdict(session.timings)
    session.profile(False)
    return {name: seconds / max(steps - 1, 1) for name, seconds in parts.items()}


def _compared(session: Session, checkpoint: str, ids: list[int], repeat: int) -> dict[str, float]:
    """Medians, in turns: a step here, a forward pass of the decoder in transformers; and the prefill."""
    from pydiffgguf.cli.compare import Reference

    reference = Reference(checkpoint, session.n_threads)
    theirs: dict[str, list[float]] = {"prefill": [], "step": []}
    ours: dict[str, list[float]] = {"prefill": [], "step": []}
    for seed in range(repeat):
        theirs["prefill"].append(reference.prefill(ids))
        ours["prefill"].append(_timed_prefill(session, ids))
        theirs["step"].append(reference.step())
        ours["step"].append(statistics.median(_canvas_times(session, seed, {})[1:]))
    names = {f"transformers_{k}_s": statistics.median(v) for k, v in theirs.items()}
    names |= {f"{k}_s": statistics.median(v) for k, v in ours.items()}
    return names | {k: statistics.median(ours[k]) / statistics.median(theirs[k]) for k in ours}


def _timed_prefill(session: Session, ids: list[int]) -> float:
    session.reset()
    began = time.perf_counter()
    session.encode(ids)
    return time.perf_counter() - began


def _timed_steps(session: Session, repeat: int, sampling: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """(seconds of each canvas's first step, seconds of all others), over the beginnings of `repeat` canvases."""
    first: list[float] = []
    others: list[float] = []
    for seed in range(repeat):
        spans = _canvas_times(session, seed, sampling)
        first.append(spans[0])
        others += spans[1:]
    return first, others or first


def _canvas_times(session: Session, seed: int, sampling: Mapping[str, Any]) -> list[float]:
    """Seconds of each of a canvas's first steps, at most STEPS of them."""
    times = [time.perf_counter()]

    def note(_: object) -> bool:
        times.append(time.perf_counter())
        return len(times) > STEPS

    session.run_canvas(seed=seed, on_step=note, **sampling)
    return [after - before for before, after in itertools.pairwise(times)]


def _peak_rss() -> int | None:
    """The most memory this process has held, mapped file pages included; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes, except on macOS


def table(result: dict[str, Any]) -> Table:
    """The measurements as a table for rich."""
    prefill, denoise, generation = result["prefill"], result["denoise"], result["generation"]
    memory = result["memory"]
    title = f"{os.path.basename(result['model'])}: {result['threads']} threads, canvas {result['canvas']}"
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("what")
    out.add_column("value", justify="right")
    out.add_column("", overflow="fold")
    peak = "unknown" if memory["peak_rss"] is None else f"{memory['peak_rss'] / 1e6:,.0f} MB"
    steps = generation["steps"]
    total = sum(denoise["parts_s"].values()) or 1.0
    rows = [
        ("prefill", f"{prefill['seconds'] * 1e3:,.1f} ms", f"{prefill['tokens']} tokens"),
        ("", f"{prefill['tokens_per_second']:,.0f} tokens/s", ""),
        ("denoise step", f"{denoise['step_s'] * 1e3:,.2f} ms", f"median of {denoise['steps_measured']}"),
        ("first step", f"{denoise['first_step_s'] * 1e3:,.2f} ms", "of a canvas"),
        *[
            ("" if i else "of which", f"{seconds * 1e3:,.2f} ms", f"{name.replace('_', '-')}, {seconds / total:.0%}")
            for i, (name, seconds) in enumerate(denoise["parts_s"].items())
        ],
        (
            "matrix products",
            f"{denoise['flop_per_second'] / 1e9:,.0f} GFLOP/s",
            f"of {denoise['ceiling_flop_per_second'] / 1e9:,.0f} that numpy's float32 product reaches",
        ),
        ("steps per canvas", f"{generation['steps_per_canvas']:.1f}", "+".join(map(str, steps[:16]))),
        ("tokens per step", f"{generation['tokens_per_forward']:.2f}", f"{generation['tokens']} tokens"),
        ("speed", f"{generation['tokens_per_second']:,.1f} tokens/s", f"seed {generation['seed']}"),
        ("weights", f"{memory['weights'] / 1e6:,.0f} MB", f"{memory['weights_mapped'] / 1e6:,.0f} MB mapped"),
        ("KV cache", f"{memory['kv_cache'] / 1e6:,.0f} MB", f"{result['n_ctx']} positions"),
        ("buffers", f"{(memory['compute'] + memory['logits']) / 1e6:,.0f} MB", ""),
        ("peak memory", peak, "of the process, with mapped pages"),
    ]
    if "compare" in result:
        compared = result["compare"]
        for kind in ("prefill", "step"):
            theirs = f"{compared[f'transformers_{kind}_s'] * 1e3:,.1f} ms there, float32"
            rows.append((f"{kind}, of transformers'", f"{compared[kind]:.2f}", theirs))
    for row in rows:
        out.add_row(*row)
    return out
