"""What tests/test_cuda_stand_in.py runs in a process of its own, on the stand-in device: prints one JSON object.

`python steps.py MODEL OPTIONS`: OPTIONS is a JSON object of DiffusionModel's options, and "only_launches": whether the
steps of one canvas are all.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pydiffgguf import CanvasBatch, CanvasSpec, DiffusionModel
from pydiffgguf._binding.functions import noise_renoise, noise_uniform, sample

#: Counts in runtime.cpp, in its order.
COUNTS = (
    "to_host",
    "to_device",
    "n_to_host",
    "n_to_device",
    "n_allocations",
    "n_foreign_kernels",
    "n_row_kernels",
    "n_canvas_kernels",
    "n_gather_kernels",
    "n_captures",
    "n_instances",
    "n_updates",
    "n_graph_launches",
    "n_captured",
    "held",
    "n_sgemm",
)


def counts() -> dict[str, int]:
    values = (ctypes.c_longlong * len(COUNTS))()
    ctypes.CDLL(None).stand_in_counts(values)
    return dict(zip(COUNTS, values, strict=True))


def changes(before: dict[str, int]) -> dict[str, int]:
    return {name: value - before[name] for name, value in counts().items() if value != before[name]}


def logits(n_rows: int, n_vocab: int, launch: int, softcap: float) -> np.ndarray:
    """What the stand-in writes before the rows of a step are sampled, softcapped: float32 [n_rows, n_vocab]."""
    x = np.arange(n_rows * n_vocab, dtype=np.uint32) + np.uint32(launch * 7919)
    x = x * np.uint32(2654435761)
    x ^= x >> np.uint32(16)
    x = x * np.uint32(2246822519)
    x ^= x >> np.uint32(13)
    z = ((x % 8192).astype(np.float32) / np.float32(128) - np.float32(32)).reshape(n_rows, n_vocab)
    return np.tanh(z * np.float32(1 / softcap)) * np.float32(softcap) if softcap else z


def steps_of(session: Any, model: DiffusionModel, specs: list[CanvasSpec]) -> list[dict[str, int]]:
    """What each of six steps asked of the device."""
    batch = CanvasBatch(session, specs, model.sampling)
    asked = []
    for _ in range(6):
        before = counts()
        batch.step()
        asked.append(changes(before))
    return asked


def differences(session: Any, model: DiffusionModel) -> list[str]:
    """Steps of two canvases side by side, one of them pinned, against the C++ sampler on the same logits."""
    c, v = model.config.canvas_length, model.config.n_vocab
    pinned = np.where(np.arange(c) % 3 == 0, -1, np.arange(c) % v).astype(np.int32)
    specs = [CanvasSpec(seed=5), CanvasSpec(seed=6, canvas_index=2, pinned=pinned)]
    # Free rows, and the first pinned ones up to the next quarter of the pass, one after the other.
    free = np.concatenate([np.full(c, True), pinned < 0])
    n_others = -free.sum() % (2 * c // 4)
    with_logits = np.sort(np.concatenate([np.flatnonzero(free), np.flatnonzero(~free)[:n_others]]))
    assert len(with_logits) < 2 * c
    batch = CanvasBatch(session, specs, model.sampling)
    found = []
    for step in range(4):
        launch = counts()["n_row_kernels"]
        steps = batch.step()
        z = np.zeros((2 * c, v), dtype=np.float32)
        z[with_logits] = logits(len(with_logits), v, launch, model.config.logit_softcap)
        for spec, got, rows in zip(specs, steps, (z[:c], z[c:]), strict=True):
            expected = sample(
                rows,
                model.sampling,
                step=step,
                uniform=noise_uniform(spec.seed, spec.canvas_index, step, c),
                renoise=noise_renoise(spec.seed, spec.canvas_index, step, c, v),
                pinned=spec.pinned,
            )
            found += [
                f"step {step}, seed {spec.seed}: {name}"
                for name in ("argmax", "canvas", "accepted")
                if not np.array_equal(getattr(got, name), getattr(expected, name))
            ]
            # numpy's tanh and the kernel's softcap to float32's last bits: measured 6.3e-7 apart, of 4.4 nats.
            if not np.allclose(got.entropy, expected.entropy, rtol=1e-6, atol=1e-6):
                found.append(f"step {step}, seed {spec.seed}: entropy")
    return found


def launches(model: DiffusionModel) -> list[dict[str, int]]:
    """The steps of one canvas behind 1,024 tokens."""
    with model.session() as session:
        session.encode(np.arange(2, 1026))
        return steps_of(session, model, [CanvasSpec(seed=1, quiet=True)])


def main() -> None:
    out: dict[str, Any] = {}
    options = json.loads(sys.argv[2])
    only_launches = options.pop("only_launches", False)
    with DiffusionModel(sys.argv[1], type_kv="f16", **options) as model:
        if only_launches:
            print(json.dumps({"quiet": launches(model)}))
            return
        out["devices"] = [asdict(device) for device in model.devices()]
        before = counts()
        c = model.config.canvas_length
        with model.session(n_rows=2 * c) as session:
            out["sampler"], out["fallbacks"] = session.sampler, session.fallbacks
            out["held"] = counts()["held"] - before["held"]
            out["memory"] = asdict(session.memory)
            session.encode(np.arange(2, 40))
            out["quiet"] = steps_of(session, model, [CanvasSpec(seed=1, quiet=True)])
            out["watched"] = steps_of(session, model, [CanvasSpec(seed=1)])
            session.encode(np.arange(2, 2 + c))  # as the canvas that is finished, behind which the next one begins
            out["next"] = steps_of(session, model, [CanvasSpec(seed=2, quiet=True)])
            before = counts()
            session.encode(np.arange(2, 2 + c))
            out["second_encode"] = changes(before)
            out["after"] = steps_of(session, model, [CanvasSpec(seed=3, quiet=True)])
            before = counts()
            session.encode(np.arange(2, 2 + c))
            out["third_encode"] = changes(before)
            pinned = np.where(np.arange(c) < c // 4, -1, 7).astype(np.int32)
            out["pinned"] = steps_of(session, model, [CanvasSpec(seed=4, pinned=pinned, quiet=True)])
            if session.sampler == "kernels":
                out["differences"] = differences(session, model)
            with tempfile.TemporaryDirectory() as folder:
                session.save(Path(folder) / "prefix")
                session.truncate(10)
                session.load(Path(folder) / "prefix")
            out["n_past"] = session.n_past
            out["logits"] = list(session.denoise(np.zeros(c, dtype=np.int32)).shape)
        with model.session(n_rows=8 * c) as session:
            session.encode(np.arange(2, 40))
            out["many"] = steps_of(session, model, [CanvasSpec(seed=i, quiet=True) for i in range(8)])
        out["text"] = model.generate([2, 5, 6], seed=3, max_tokens=20, max_steps=4).tokens
    out["left"] = counts()["held"]
    print(json.dumps(out))


if __name__ == "__main__":
    main()
