"""Hashes of what the engine and the converter compute: `python tools/hashes.py`, before a change and after it.

For the demo model and three random nets (tests/parity/nets.py), each as a file of floats and as quantized ones, a line
for each result: the logits of a pass, with a prefix in chunks and a self-conditioning signal; a canvas's trajectory,
every step of it; three canvases side by side; scores of texts; the same with ggml's operators and with each sampler
that the CPU has; an infill's text and scores; what the converter wrote. A refactoring changes none of them. They differ
between processors, compilers and builds, so compare runs on one machine.

It uses the public interface alone, so that one copy of it serves two checkouts: run it with each one's interpreter.
`--write FILE` keeps the lines, `--against FILE` compares and exits with 1 where a line differs.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pydiffgguf import DiffusionModel, demo_model_path
from pydiffgguf.convert import convert
from pydiffgguf.session import CanvasBatch, CanvasSpec

ROOT = Path(__file__).resolve().parents[1]
NETS = ("one_kv_head", "full_first", "many_experts")
#: Rows of a random net are no multiple of 256, so a recipe of K-quants gives it types with blocks of 32.
TYPES = ("f32", "f16", "q8_0", "q4_k_m")
#: Options of the model and of the session; "kernels" is left out, which only a build for CUDA has.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "own": ({}, {}),
    "ggml": ({}, {"ggml_operators": True}),
    "operators": ({}, {"sampler": "operators"}),
    "f32 cache": ({"type_kv": "f32", "n_batch": 7}, {}),
}


def digest(*parts: object) -> str:
    """Sixteen digits of the SHA-256 of arrays, bytes and texts, one after the other."""
    hashed = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            hashed.update(np.ascontiguousarray(part).tobytes())
        else:
            hashed.update(part if isinstance(part, bytes) else repr(part).encode())
    return hashed.hexdigest()[:16]


def of_step(step: Any) -> list[object]:
    """What one step left."""
    return [step.argmax, step.canvas, step.accepted, step.entropy, step.mean_entropy, step.converged, step.finished]


def of_model(model: DiffusionModel, options: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The results of one way to compute, as (what, hash)."""
    c = model.config
    rng = np.random.default_rng(5)
    ids = rng.integers(c.n_vocab, size=2 * c.canvas_length + 41, dtype=np.int32)
    canvas = ids[: c.canvas_length]
    with model.session(n_rows=3 * c.canvas_length, **options) as session:
        session.encode(ids[:19])
        session.encode(ids[19:])
        first = session.denoise(canvas)
        yield "logits", digest(first)
        yield "logits, conditioned", digest(session.denoise(canvas, first / np.float32(0.7)))
        short = max(1, c.canvas_length // 3)
        yield "logits of a short canvas", digest(session.denoise(canvas[:short], first[:short], n_rows=short))
        trajectory: list[object] = []
        session.run_canvas(seed=3, steps=6, on_step=lambda step: trajectory.extend(of_step(step)))
        yield "trajectory", digest(*trajectory)
        pinned = np.where(np.arange(c.canvas_length) % 3 == 0, canvas, -1).astype(np.int32)
        watched = np.where(np.arange(c.canvas_length) % 5 == 0, canvas, -1).astype(np.int32)
        specs = [
            CanvasSpec(pinned=pinned, watched=watched, seed=1),
            CanvasSpec(n_rows=short, seed=2),
            CanvasSpec(seed=3, canvas_index=4),
        ]
        batch = CanvasBatch(session, specs, session._defaults)
        together: list[object] = []
        for number in range(5):
            for step in batch.step():
                together += of_step(step)
            if number == 2:
                batch.drop(1)
        yield "three side by side", digest(*together)
        restricted: list[object] = []
        allowed = {row: canvas[row : row + 4] for row in range(0, c.canvas_length, 4)}
        session.run_canvas(seed=6, steps=3, allowed=allowed, on_step=lambda step: restricted.extend(of_step(step)))
        yield "restricted rows", digest(*restricted)
        yield "scores", digest(*session.score([canvas[:5], canvas[:1], canvas[3 : 3 + short]]))


def of_text(model: DiffusionModel) -> Iterator[tuple[str, str]]:
    """Texts that the demo model makes."""
    yield "generated", digest(model.generate("Put in order: 9 7 1.", seed=7).text)
    done = model.infill("Put in order: 9 7 1.\n", "\n", seed=7)
    yield "infill", digest(done.text, [getattr(one, "score", None) for one in getattr(done, "candidates", [])])


def lines() -> Iterator[str]:
    """All of them, in order."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/parity")]
    from nets import make_net

    with tempfile.TemporaryDirectory() as folder:
        files = {"demo": demo_model_path()}
        for kind in ("q4_k_m", "q6_k", "f16"):
            files[f"demo {kind}"] = Path(folder) / f"demo.{kind}.gguf"
            convert(demo_model_path(), files[f"demo {kind}"], type=kind)
        for name in NETS:
            net = make_net(name, Path(folder), sc_scale=0.3, sharpen=4.0)
            files |= {f"{name} {kind}": net.gguf(kind) for kind in TYPES}
        for name, path in files.items():
            yield f"{digest(path.read_bytes())}  {name}: file"
            for way, (placed, options) in WAYS.items():
                with DiffusionModel(path, n_gpu_layers=0, n_threads=2, **placed) as model:
                    for what, found in of_model(model, options):
                        yield f"{found}  {name}: {way}: {what}"
            if name == "demo":
                with DiffusionModel(path, n_gpu_layers=0) as model:
                    for what, found in of_text(model):
                        yield f"{found}  {name}: {what}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", metavar="FILE", type=Path, help="keep the lines in FILE")
    parser.add_argument("--against", metavar="FILE", type=Path, help="compare with the lines in FILE")
    args = parser.parse_args()
    found = list(lines())
    if args.write:
        args.write.write_text("\n".join(found) + "\n")
    if not args.against:
        print("\n".join(found))
        return 0
    expected = args.against.read_text().splitlines()
    differing = [line for line in found if line not in expected] + [line for line in expected if line not in found]
    print("\n".join(differing) if differing else f"all {len(found)} are the same; together {digest(*found)}")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
