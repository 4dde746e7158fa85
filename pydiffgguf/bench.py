"""The command ``bench``: how long prefill and denoise steps take, and what a generation comes to.

Times are medians: one interrupted run does not move them. Prefill and steps are measured on a session of their own, so
that the first step, which builds the graph, can be told from the others.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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
    model: DiffusionModel, prompt: str | None, *, prefill: int, repeat: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Measures; returns JSON types. Times in seconds, memory in bytes.

    Args:
        prompt: what the generation starts from; None for one of its own.
        prefill: tokens of the prompt whose encoding is timed.
        repeat: runs that a median is taken of.
        options: keyword arguments of DiffusionModel.generate.

    Raises:
        ValueError: `prefill` or `repeat` below 1.
        ContextOverflowError: `prefill` tokens do not fit.
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
        held = session.memory
        n_ctx, n_threads = session.n_ctx, session.n_threads
    result = model.generate(PROMPT if prompt is None else prompt, **{"seed": 0, **options})
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
        },
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
        times = [time.perf_counter()]

        def note(_: object, times: list[float] = times) -> bool:
            times.append(time.perf_counter())
            return len(times) > STEPS

        session.run_canvas(seed=seed, on_step=note, **sampling)
        spans = [after - before for before, after in itertools.pairwise(times)]
        first.append(spans[0])
        others += spans[1:]
    return first, others or first


def _peak_rss() -> int | None:
    """The most memory this process has held, mapped file pages included; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes, but for macOS


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
    rows = [
        ("prefill", f"{prefill['seconds'] * 1e3:,.1f} ms", f"{prefill['tokens']} tokens"),
        ("", f"{prefill['tokens_per_second']:,.0f} tokens/s", ""),
        ("denoise step", f"{denoise['step_s'] * 1e3:,.2f} ms", f"median of {denoise['steps_measured']}"),
        ("first step", f"{denoise['first_step_s'] * 1e3:,.2f} ms", "of a canvas"),
        ("steps per canvas", f"{generation['steps_per_canvas']:.1f}", "+".join(map(str, steps[:16]))),
        ("tokens per step", f"{generation['tokens_per_forward']:.2f}", f"{generation['tokens']} tokens"),
        ("speed", f"{generation['tokens_per_second']:,.1f} tokens/s", f"seed {generation['seed']}"),
        ("weights", f"{memory['weights'] / 1e6:,.0f} MB", f"{memory['weights_mapped'] / 1e6:,.0f} MB mapped"),
        ("KV cache", f"{memory['kv_cache'] / 1e6:,.0f} MB", f"{result['n_ctx']} positions"),
        ("buffers", f"{(memory['compute'] + memory['logits']) / 1e6:,.0f} MB", ""),
        ("peak memory", peak, "of the process, with mapped pages"),
    ]
    for row in rows:
        out.add_row(*row)
    return out
