"""What each quantization costs: canvas logits against F32, steps a canvas, and tasks solved.

    python benchmarks/quality.py pydiffgguf/data/demo.gguf                       # all recipes, with and without imatrix
    python benchmarks/quality.py model-f32.gguf --types q4_k_m dg4 --out results.json

MODEL is a model of tools/demo_model: the bundled one, or one trained with `--shape rows256`, whose rows are multiples
of 256, so that its K-quants are K-quants. It is the reference, in F32 (a quantized MODEL is dequantized first). Each
recipe is made from it by the converter, once without and once with an importance matrix of text of the training split.

Logits: 200 held-out documents, each as a prefix and a canvas of up to 64 rows behind it, at five noise levels; with the
self-conditioning signal of a first pass, as in generation. KL is the mean over rows of sum p log(p / q), in nats, p of
F32. Tasks: the 400 of tests/data/demo_tasks.jsonl that are Sudokus in the prompt, questions, and gaps of known length.
The cache is F32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from pydiffgguf import DiffusionModel
from pydiffgguf.convert import collect, convert
from pydiffgguf.convert.collect import NOISE_LEVELS
from pydiffgguf.convert.recipes import FLOAT_TYPES, RECIPES

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "tests" / "data" / "demo_tasks.jsonl"
CALIBRATION_DOCUMENTS = 400
CALIBRATION_SEED = 77

Canvas = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]


def calibration_text() -> str:
    """Documents of the training split, by the generator that the demo model was trained with."""
    sys.path.insert(0, str(ROOT / "tools" / "demo_model"))
    from tasks import corpus

    return "\n\n".join(corpus(CALIBRATION_SEED, CALIBRATION_DOCUMENTS))


def canvases(model: DiffusionModel, documents: Sequence[str]) -> Iterator[Canvas]:
    """(prefix, noised canvas) of every document at every noise level; the same for all models of one vocabulary."""
    rng = np.random.default_rng(5)
    for text in documents:
        ids = np.array(model.tokenize(text, add_bos=True, special=False), dtype=np.int32)
        rows = min(model.config.canvas_length, ids.size - 1)
        for level in NOISE_LEVELS:
            noised = rng.random(rows) < level
            noise = rng.integers(0, model.config.n_vocab, rows)
            yield ids[:-rows], np.where(noised, noise, ids[-rows:]).astype(np.int32)


def log_probabilities(model: DiffusionModel, documents: Sequence[str]) -> Iterator[npt.NDArray[np.float32]]:
    """float32 [rows, V] for each canvas."""
    temperature = np.float32(0.6)
    with model.session() as session:
        last: bytes | None = None
        for prefix, canvas in canvases(model, documents):
            if prefix.tobytes() != last:
                session.reset()
                session.encode(prefix)
                last = prefix.tobytes()
            signal = session.denoise(canvas, n_rows=canvas.size)
            z = session.denoise(canvas, signal / temperature, n_rows=canvas.size)
            z -= z.max(-1, keepdims=True)
            yield z - np.log(np.exp(z).sum(-1, keepdims=True))


def tasks_right(model: DiffusionModel, tasks: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """(share of tasks solved, mean steps of a canvas)."""
    right = 0
    steps: list[int] = []
    for task in tasks:
        if "prompt" in task:
            result = model.generate(task["prompt"], max_tokens=model.config.canvas_length, seed=task["id"])
            right += result.text.strip() == task["answer"]
            steps += result.stats.steps
        elif task["kind"] == "infill":
            filled = model.infill(task["prefix"], task["suffix"], gap=task["gap_tokens"], seed=task["id"])
            right += filled.text == task["gap"]
            steps.append(filled.stats.forwards)
    return right / len(tasks), float(np.mean(steps))


def measure(
    model: DiffusionModel,
    documents: Sequence[str],
    reference: Sequence[npt.NDArray[np.float32]],
    tasks: Sequence[dict[str, Any]],
) -> dict[str, float]:
    """Everything about one file but its size."""
    total, same, rows = 0.0, 0, 0
    for p, q in zip(reference, log_probabilities(model, documents), strict=True):
        total += float((np.exp(p.astype(np.float64)) * (p.astype(np.float64) - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        rows += len(p)
    share, steps = tasks_right(model, tasks)
    return {"kl": total / rows, "top1": same / rows, "steps": steps, "tasks": share}


def run(
    source: Path, names: Sequence[str], work: Path, limit: int, n_tasks: int, bar: Progress
) -> list[dict[str, Any]]:
    """One row for each file: F32, then every recipe without and with importance."""
    base = work / "f32.gguf"
    convert(source, base, type="f32")
    held_out = [json.loads(line) for line in TASKS.read_text(encoding="utf-8").splitlines()]
    tasks = [t for t in held_out if "prompt" in t or t["kind"] == "infill"]
    tasks = tasks[:: max(1, len(tasks) // n_tasks)]
    documents = [t["prefix"] + t["gap"] + t["suffix"] for t in held_out if t["kind"] == "infill"][:limit]
    plans: list[tuple[str, bool]] = [(n, i) for n in names for i in (False, True)]
    plans = [(n, i) for n, i in plans if not (i and (RECIPES[n].big in FLOAT_TYPES or n == "q8_0"))]
    task = bar.add_task("files", total=len(plans) + 1)
    options: dict[str, Any] = {"type_kv": "f32", "n_ctx": 1024}
    out = []
    with DiffusionModel(base, **options) as model:
        collect(model, calibration_text(), work / "imatrix.gguf")
        reference = [p.astype(np.float32) for p in log_probabilities(model, documents)]
        parameters = sum(int(np.prod(t.shape)) for t in model.tensors())
        out.append({"type": "f32", "imatrix": False, "bytes": base.stat().st_size, "bits": 32.0})
        out[-1] |= measure(model, documents, reference, tasks)
    bar.advance(task)
    for name, with_importance in plans:
        path = work / f"{name}.gguf"
        report = convert(base, path, type=name, imatrix=work / "imatrix.gguf" if with_importance else None)
        with DiffusionModel(path, **options) as model:
            bits = 8 * sum(t.n_bytes for t in model.tensors()) / parameters
            row = {"type": name, "imatrix": with_importance, "bytes": report.n_bytes, "bits": bits}
            out.append(row | measure(model, documents, reference, tasks))
        path.unlink()
        bar.advance(task)
    return out


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| type | imatrix | MB | bits a weight | KL, nats | top-1 | steps a canvas | tasks solved |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['type']} | {'yes' if r['imatrix'] else ''} | {r['bytes'] / 1e6:.2f} | {r['bits']:.2f} | {r['kl']:.5f} | "
        f"{r['top1']:.2%} | {r['steps']:.2f} | {r['tasks']:.1%} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what each quantization costs.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--types", nargs="+", default=[n for n in RECIPES if n != "f32"], choices=RECIPES)
    parser.add_argument("--documents", type=int, default=200, help="at most so many (200)")
    parser.add_argument("--tasks", type=int, default=400, help="about so many, evenly drawn from all (400)")
    parser.add_argument("--out", type=Path, help="the figures as JSON too")
    args = parser.parse_args()
    began = time.monotonic()
    console = Console(stderr=True)
    warnings.filterwarnings("ignore", message=".*is quantized already")  # the bundled model is, and is the reference
    with tempfile.TemporaryDirectory() as work, Progress(console=console, disable=not console.is_terminal) as bar:
        rows = run(args.model, args.types, Path(work), args.documents, args.tasks, bar)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))
    print(table(rows))
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
