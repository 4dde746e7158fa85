"""Denoise steps of random models: by sampler, by part, and what they come to in tokens a second.

The models are written where they are measured: nothing but their shape decides the time. On the CPU the released shape
has fewer layers, and its results say how many.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import performance_model as paper
import shapes
from speed import endless, ids

from first_hour import cards
from first_hour.stages import Context, StageError
from pydiffgguf import CanvasBatch, CanvasSpec, DiffGGUFError, DiffusionModel
from pydiffgguf.session import Session

#: Cached positions behind which a step is measured, as in docs/PERFORMANCE.md.
PREFIX = 1024
N_CTX = 4096
SAMPLERS = {"cuda": ("kernels", "operators", "host"), "cpu": ("host", "operators")}
#: Layers of the released shape on the CPU: five sliding ones and a full one, of thirty.
LAYERS_ON_CPU = 6
#: Timed steps of a sampler at most, and the seconds after which no further one begins.
STEPS = 12
SECONDS = 15.0
TYPE = "q4_k_m"


def write(path: Path, shape: str, n_layers: int | None) -> dict[str, Any]:
    """The random model; `n_layers`: of the shape's first ones, None: all."""
    began = time.perf_counter()
    name = shape
    if n_layers is not None:
        whole = shapes.SHAPES[shape]
        name = f"{shape}, {n_layers} layers"
        kept = {"layer_types": whole["layer_types"][:n_layers], "num_hidden_layers": n_layers}
        shapes.SHAPES[name] = whole | kept
    size = shapes.write(path, name, type=TYPE)
    return {
        "type": TYPE,
        "layers": len(shapes.shape(name).layers),
        "layers_of_shape": len(shapes.shape(shape).layers),
        "bytes": size,
        "write_s": time.perf_counter() - began,
    }


def timed(work: Any, *arguments: Any) -> float:
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def steps_of(session: Session, seed: int, until: float) -> tuple[float, list[float]]:
    """(seconds of a canvas's first step, of those behind it), until STEPS of them or the time `until`."""
    batch = CanvasBatch(session, [CanvasSpec(seed=seed, quiet=True)], endless())
    first, others = timed(batch.step), [timed(batch.step)]
    while len(others) < STEPS and time.perf_counter() < until:
        others.append(timed(batch.step))
    return first, others


def parts_of(session: Session) -> dict[str, float]:
    """Seconds of a conditioned step by part, operators timed one at a time."""
    batch = CanvasBatch(session, [CanvasSpec(seed=3, quiet=True)], endless())
    batch.step()
    session.profile(True)
    batch.step()
    parts = dataclasses.asdict(session.timings)
    session.profile(False)
    return parts


def with_sampler(path: Path, sampler: str, place: str, *, whole: bool) -> dict[str, Any]:
    """Encoding, first and later steps with one sampler; `whole`: a second canvas and the parts of a step too."""
    options: dict[str, Any] = {"n_gpu_layers": 0 if place == "cpu" else "auto", "sampler": sampler, "n_ctx": N_CTX}
    with DiffusionModel(path, **options) as model, model.session() as session:
        n_vocab, canvas = model.config.n_vocab, model.config.canvas_length
        on = [{"device": d.name, "layers": d.n_layers, "n_cpu_moe": d.n_cpu_moe} for d in model.devices()]
        session.encode(ids(PREFIX - canvas, n_vocab))
        encode = timed(session.encode, ids(canvas, n_vocab, PREFIX - canvas))
        first, others = steps_of(session, 1, time.perf_counter() + SECONDS)
        found: dict[str, Any] = {"devices": on, "encode_canvas_s": encode, "first_step_s": first}
        if whole:
            # It shows what the first canvas's graphs are worth: the same work, nothing to build.
            found["first_step_of_second_canvas_s"], more = steps_of(session, 2, time.perf_counter() + SECONDS / 5)
            others += more
            found["parts_s"] = parts_of(session)
        return found | {"step_s": statistics.median(others), "steps": len(others)}


def tokens_a_second(path: Path, context: Context, step: float, encode: float, n_canvas: int) -> dict[str, Any]:
    """By steps a canvas: generated where there is time for it, and else what step and encoding come to."""
    found: dict[str, Any] = {}
    options: dict[str, Any] = {"n_gpu_layers": 0 if context.place == "cpu" else "auto", "n_ctx": N_CTX}
    with DiffusionModel(path, **options) as model:
        prompt = [int(i) for i in ids(PREFIX, model.config.n_vocab)]
        for n in paper.STEPS:
            if 1.5 * (n * step + 5 * encode) < context.left - 10.0:
                # No mean entropy is below 0: all steps are made.
                stats = model.generate(prompt, seed=n, steps=n, max_tokens=n_canvas, confidence_threshold=0.0).stats
                found[str(n)] = {
                    "tokens_s": n_canvas / (stats.denoise_s + encode),
                    "how": "measured",
                    "steps": stats.steps,
                }
            else:
                found[str(n)] = {"tokens_s": n_canvas / (n * step + encode), "how": "from a step's time"}
    return found


def measure(context: Context, shape: str, n_layers: int | None) -> None:
    """Everything about one shape, each figure kept at once."""
    path = context.work / f"{shape}.gguf"
    context.record(**write(path, shape, n_layers))
    samplers: dict[str, Any] = {}
    for sampler in SAMPLERS[context.place]:
        try:
            samplers[sampler] = with_sampler(path, sampler, context.place, whole=not samplers)
        except (DiffGGUFError, MemoryError) as error:  # one sampler that fails does not hide the others
            samplers[sampler] = {"error": f"{type(error).__name__}: {error}"}
        context.record(samplers=samplers)
    own = samplers[SAMPLERS[context.place][0]]
    if "error" in own:
        raise StageError(own["error"])
    canvas = shapes.shape(shape).canvas_length
    context.record(tokens=tokens_a_second(path, context, own["step_s"], own["encode_canvas_s"], canvas))


def small(context: Context) -> None:
    """The project's speed shape, 724 M parameters."""
    measure(context, "724m", None)


def released(context: Context) -> None:
    """The released model's shape, with the floor of the card in use."""
    if context.place == "cuda":
        card = paper.card(cards.find_gpu().name)
        if card is not None:
            context.record(floor_s=paper.floors(TYPE, card, PREFIX).step)
    try:
        measure(context, paper.SHAPE, LAYERS_ON_CPU if context.place == "cpu" else None)
    finally:
        (context.work / f"{paper.SHAPE}.gguf").unlink(missing_ok=True)
