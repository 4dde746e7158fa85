"""What tests/test_kernel_stepper.py runs in a process of its own, on an engine with the kernels' bodies on the host
(tests/host_twin.py): prints one JSON object, of what differed and how much was compared.

`python twin.py DEMO FLAT`: the demo model, and one whose free rows are too flat to be gathered.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from pydiffgguf import CanvasBatch, CanvasSpec, DiffusionModel, Session
from pydiffgguf._binding.records import Sampling

NAMES = ("argmax", "canvas", "accepted", "entropy", "logprob", "mean_entropy", "converged", "finished")
STEPS = 5


def trajectory(
    session: Session, sampling: Sampling, specs: Sequence[CanvasSpec], changes: bool = False
) -> Iterator[list[Any]]:
    """The canvases' results, step by step. With `changes`, the first of several leaves on the way, and the last one's
    pins become others, and then none."""
    batch = CanvasBatch(session, list(specs), replace(sampling, stability_threshold=2 * STEPS))
    for number in range(STEPS):
        yield [[np.copy(getattr(step, name)) for name in NAMES] for step in batch.step()]
        if changes and number == 0 and len(specs) > 1:
            batch.drop(0)
        elif changes and number in (1, 2):
            pinned = specs[-1].pinned
            batch.rules(len(specs) - 1, np.roll(pinned, 9) if number == 1 and pinned is not None else None, {})


def unlike(ours: Any, theirs: Any, names: Sequence[str] = NAMES) -> list[str]:
    """Which results of a canvas differ, in any bit."""
    both = dict(zip(NAMES, zip(ours, theirs, strict=True), strict=True))
    return [name for name in names if not np.array_equal(*both[name], equal_nan=both[name][0].dtype.kind == "f")]


def pins(rng: np.random.Generator, n: int, n_free: int, n_vocab: int) -> npt.NDArray[np.int32]:
    values = rng.integers(0, n_vocab, n).astype(np.int32)
    values[rng.permutation(n)[:n_free]] = -1
    return values


def some_rows(path: str, sampler: str) -> dict[str, Any]:
    """Canvases with pins, whose free rows alone get logits, against those of a session where all rows do, and before
    any signal against the host's sampler."""
    found: dict[str, Any] = {"differences": [], "steps": 0}
    with ExitStack() as stack:
        model = stack.enter_context(DiffusionModel(path, n_gpu_layers=0))
        c, v = model.config.canvas_length, model.config.n_vocab
        some, host = (stack.enter_context(model.session(n_rows=5 * c, sampler=s)) for s in (sampler, "host"))
        os.environ["EVERY_ROW"] = "1"
        every = stack.enter_context(model.session(n_rows=5 * c, sampler=sampler))
        del os.environ["EVERY_ROW"]
        rng = np.random.default_rng(1)
        for session in (some, every, host):
            session.encode(np.arange(2, 50))
        for n_frees in ([0], [1], [17], [40, 3], [16, 64, 0, 9, 33]):
            specs = [
                CanvasSpec(seed=n, pinned=pins(rng, c, n, v), watched=np.full(c, 7) if n % 2 else None) for n in n_frees
            ]
            ways = (trajectory(session, model.sampling, specs, changes=True) for session in (some, every, host))
            for step, (ours, all_rows, hosts) in enumerate(zip_longest(*ways, fillvalue=())):
                found["steps"] += 1
                for n, a, b in zip(n_frees, ours, all_rows, strict=True):
                    found["differences"] += [f"{n} of {n_frees} free, step {step}: {name}" for name in unlike(a, b)]
                for n, a, h in zip(n_frees, ours, hosts, strict=False):
                    what = unlike(a, h, NAMES[:3]) if step == 0 else []
                    found["differences"] += [f"{n} of {n_frees} free: host's {name}" for name in what]
    return found


def flat_beside(path: str) -> dict[str, Any]:
    """A canvas whose rows are gathered, alone and beside one that is flat; and one that has rows of both kinds."""
    found: dict[str, Any] = {"differences": [], "steps": 0}
    with DiffusionModel(path, n_gpu_layers=0) as model, model.session(n_rows=192, sampler="kernels") as session:
        hot = replace(model.sampling, t_min=20.0, t_max=20.0)
        rng = np.random.default_rng(2)
        v = model.config.n_vocab
        few = {row: rng.permutation(v)[:50] for row in range(24)}
        peaked = CanvasSpec(n_rows=24, seed=1, allowed=few)
        flat = CanvasSpec(n_rows=40, seed=2)
        both = CanvasSpec(n_rows=30, seed=3, allowed=few, pinned=pins(rng, 30, 28, v))
        session.encode(np.arange(2, 50))
        alone = [list(trajectory(session, hot, [spec])) for spec in (peaked, flat, both)]
        together = list(trajectory(session, hot, [peaked, flat, both]))
        found["steps"] = len(together)
        found["entropy"] = [float(step[1][5]) for step in together]
        for step, rows in enumerate(together):
            for name, own, beside in zip(("peaked", "flat", "both"), alone, rows, strict=True):
                found["differences"] += [f"{name}, step {step}: {what}" for what in unlike(own[step][0], beside)]
        found["moves"] = unlike(together[0][0], together[-1][0], ["entropy"])
    return found


if __name__ == "__main__":
    rows = {sampler: some_rows(sys.argv[1], sampler) for sampler in ("host", "operators", "kernels")}
    print(json.dumps({"some rows": rows, "flat beside": flat_beside(sys.argv[2])}))
