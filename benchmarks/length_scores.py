"""How well each score tells the true length of a gap: what pydiffgguf/gap/search.py chooses by was chosen here.

    python benchmarks/length_scores.py [MODEL] [--tasks FILE.jsonl] [--limit N] [--json OUT]

Every item (prefix, gap, suffix) is filled at every length up to --longest, to the end and with the same seed. At each
length these are recorded:

    confidence k      mean log-probability of the gap rows' argmax at temperature 1, after k + 1 denoise steps;
                      "end": at the last one
    calibrated k      the same, less what this model shows at that length behind an empty prefix, before a suffix of
                      random ids (the length bias of CAL, arXiv 2602.00476)
    free suffix k     log-probability of the first FREE suffix ids where their rows are left free beside the gap's
    rejoin            the same in one step with the filled gap pinned
    causal            log-probability that the encoder gives to the filled gap and the first JUDGED suffix ids; "mean":
                      per token; "suffix": those of the suffix alone

and the length is chosen where the score is greatest. A rule is judged by how often that length is the true one, and how
often the text is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pydiffgguf import DiffusionModel, demo_model_path
from pydiffgguf._binding.records import RawStep
from pydiffgguf.session import CanvasBatch, CanvasSpec, Session

FREE = 6
JUDGED = 16
STEPS = 12
KEPT = (0, 1, 2)
NULL_DRAWS = 8


def run(session: Session, specs: Sequence[CanvasSpec], steps: int) -> list[list[RawStep]]:
    """Each canvas's own steps, as many canvases at a time as there are rows for."""
    sampling = replace(session._defaults, max_steps=steps)
    done: list[list[RawStep]] = []
    while len(done) < len(specs):
        group: list[CanvasSpec] = []
        for spec in specs[len(done) :]:
            if sum(s.n_rows or 0 for s in [*group, spec]) > session.n_rows:
                break
            group.append(spec)
        batch = CanvasBatch(session, group, sampling)
        mine: list[list[RawStep]] = [[] for _ in group]
        while not batch.finished:
            for steps_, step in zip(mine, batch.step(), strict=True):
                if not steps_ or not steps_[-1].finished:
                    steps_.append(step)
        done += mine
    return done


def layout(length: int, suffix: Sequence[int], rows: int, seed: int, free: int = 0) -> CanvasSpec:
    """A gap of `length` rows, then the suffix, of which the first `free` rows are left free and watched."""
    n = min(rows, length + len(suffix))
    known = np.array(suffix[: n - length], dtype=np.int32)
    pinned = np.concatenate([np.full(length, -1, dtype=np.int32), known])
    watched = np.concatenate([np.full(length, -1, dtype=np.int32), known])
    pinned[length : length + free] = -1
    return CanvasSpec(n_rows=n, pinned=pinned, watched=watched, seed=seed, canvas_index=length)


def logprob(step: RawStep) -> np.ndarray:
    assert step.logprob is not None
    return step.logprob


def at(steps: list[RawStep], k: int) -> RawStep:
    return steps[min(k, len(steps) - 1)]


def null_confidence(
    model: DiffusionModel, session: Session, lengths: Sequence[int], rows: int
) -> dict[str, np.ndarray]:
    """What the model shows of a length that nothing speaks for."""
    rng = np.random.default_rng(0)
    session.reset()
    session.encode([model.tokenizer.bos_id or 0])
    sums = {k: np.zeros(len(lengths)) for k in KEPT}
    for draw in range(NULL_DRAWS):
        suffix = rng.integers(0, model.config.n_vocab, rows).tolist()
        for i, steps in enumerate(run(session, [layout(n, suffix, rows, draw) for n in lengths], max(KEPT) + 1)):
            for k in KEPT:
                sums[k][i] += logprob(at(steps, k))[: lengths[i]].mean() / NULL_DRAWS
    return {f"calibrated {k}": sums[k] for k in KEPT}


def features(
    session: Session, suffix: Sequence[int], lengths: Sequence[int], rows: int, null: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[list[int]]]:
    """Every score at every length, and the texts."""
    found: dict[str, np.ndarray] = {}
    filled = run(session, [layout(n, suffix, rows, 1) for n in lengths], STEPS)
    texts = [steps[-1].argmax[:n].tolist() for n, steps in zip(lengths, filled, strict=True)]
    for k in KEPT:
        confidence = np.array([logprob(at(s, k))[:n].mean() for n, s in zip(lengths, filled, strict=True)])
        found[f"confidence {k}"] = confidence
        found[f"calibrated {k}"] = confidence - null[f"calibrated {k}"]
    found["confidence end"] = np.array([logprob(s[-1])[:n].mean() for n, s in zip(lengths, filled, strict=True)])
    found["confidence end, sum"] = np.array([logprob(s[-1])[:n].sum() for n, s in zip(lengths, filled, strict=True)])
    found["converged, then steps"] = -np.array([len(s) + (not s[-1].converged) * 100 for s in filled], dtype=float)
    free = min(FREE, len(suffix))
    opened = run(session, [layout(n, suffix, rows, 1, free) for n in lengths], max(KEPT) + 1)
    for k in KEPT:
        found[f"free suffix {k}"] = np.array(
            [logprob(at(s, k))[n : n + free].sum() for n, s in zip(lengths, opened, strict=True)]
        )
    pinned = []
    for n, text in zip(lengths, texts, strict=True):
        spec = layout(n, suffix, rows, 1, free)
        fixed = np.array(spec.pinned)
        fixed[:n] = text
        pinned.append(replace(spec, pinned=fixed))
    again = run(session, pinned, 1)
    found["rejoin"] = np.array([logprob(s[0])[n : n + free].sum() for n, s in zip(lengths, again, strict=True)])
    scores = session.score([[*text, *suffix[: min(JUDGED, rows - len(text))]] for text in texts])
    found["causal"] = np.array([s.sum() for s in scores])
    found["causal, mean"] = np.array([s.mean() for s in scores])
    found["causal, suffix"] = np.array([s[n:].sum() for n, s in zip(lengths, scores, strict=True)])
    found["causal + confidence end, sum"] = found["causal"] + found["confidence end, sum"]
    found["causal + 10 confidence end"] = found["causal"] + 10 * found["confidence end"]
    found["causal, suffix + confidence end, sum"] = found["causal, suffix"] + found["confidence end, sum"]
    found["rejoin + confidence end, sum"] = found["rejoin"] + found["confidence end, sum"]
    found["causal + rejoin"] = found["causal"] + found["rejoin"]
    return found, texts


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, best rule first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=demo_model_path(), help="a GGUF file (default: the demo model)")
    parser.add_argument("--tasks", type=Path, required=True, help="JSON lines with prefix, gap and suffix")
    parser.add_argument("--limit", type=int, default=100, help="items (default: 100)")
    parser.add_argument("--longest", type=int, default=36, help="longest length that is tried (default: 36)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every score of every item")
    args = parser.parse_args(argv)
    items = [json.loads(line) for line in args.tasks.read_text().splitlines()]
    items = [item for item in items if item.get("kind", "infill") == "infill"]
    items = items[:: max(1, len(items) // args.limit)][: args.limit]
    records: list[dict[str, Any]] = []
    with DiffusionModel(args.model, type_kv="f32", n_threads=args.threads) as model:
        canvas = model.config.canvas_length
        session = model.session(n_rows=4 * canvas)
        lengths = list(range(1, min(args.longest, canvas - 8) + 1))
        null = null_confidence(model, session, lengths, canvas)
        for i, item in enumerate(items):
            session.reset()
            session.encode(model.tokenize(item["prefix"], add_bos=True, special=False))
            truth = model.tokenize(item["gap"], special=False)
            found, texts = features(session, model.tokenize(item["suffix"], special=False), lengths, canvas, null)
            right = [text == truth for text in texts]
            records.append({"length": len(truth), "right": right, "scores": {k: v.tolist() for k, v in found.items()}})
            print(f"\r{i + 1} of {len(items)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    known = np.mean([r["length"] in lengths and r["right"][lengths.index(r["length"])] for r in records])
    print(f"{len(records)} gaps, lengths 1 to {lengths[-1]}; known length: {known:.1%} of the texts right\n")
    print("| score | length right | text right | mean error of the length |\n| --- | --- | --- | --- |")
    rows = []
    for name in records[0]["scores"]:
        chosen = [int(np.argmax(r["scores"][name])) for r in records]
        picked = [(lengths[c], r["right"][c], r["length"]) for c, r in zip(chosen, records, strict=True)]
        rows.append(
            (
                float(np.mean([text for _, text, _ in picked])),
                float(np.mean([n == true for n, _, true in picked])),
                float(np.mean([abs(n - true) for n, _, true in picked])),
                name,
            )
        )
    for text, length, error, name in sorted(rows, reverse=True):
        print(f"| {name} | {length:.1%} | {text:.1%} | {error:.2f} |")
    if args.json:
        args.json.write_text(json.dumps({"lengths": lengths, "records": records}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
