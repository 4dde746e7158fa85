"""What a step asks of CUDA's runtime: launches, captures, graphs, copies, waits. Counted by a library of this folder
that is loaded before the runtime (cuda_calls.cpp), step by step over two canvases."""

from __future__ import annotations

import ctypes
import json
import subprocess
from pathlib import Path
from typing import Any

from first_hour import checks
from first_hour.stages import Context, StageError

#: In the order of cuda_calls.cpp.
COUNTS = (
    "launches",
    "captured_launches",
    "graph_launches",
    "captures",
    "instantiations",
    "updates",
    "bytes_to_device",
    "bytes_to_host",
    "waits",
    "allocations",
)
STEPS = 5


def compile_counter(folder: Path) -> Path:
    """The library, made with the machine's own compiler; it needs no header of CUDA's."""
    library = folder / "cuda_calls.so"
    source = Path(__file__).with_name("cuda_calls.cpp")
    words = [
        "c++",
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Wextra",
        str(source),
        "-ldl",
        "-o",
        str(library),
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise StageError(f"the counter does not compile:\n{done.stderr}")
    return library


def counts() -> dict[str, int]:
    """Since the process began."""
    values = (ctypes.c_longlong * len(COUNTS))()
    ctypes.CDLL(None).cuda_calls(values)
    return dict(zip(COUNTS, values, strict=True))


def changes(before: dict[str, int]) -> dict[str, int]:
    """What came since, without zeros."""
    return {name: value - before[name] for name, value in counts().items() if value != before[name]}


def two_canvases(path: str) -> list[dict[str, Any]]:
    """Calls of each step of a canvas, of encoding it, and of each step of a second one."""
    from speed import endless, ids

    from pydiffgguf import CanvasBatch, CanvasSpec, DiffusionModel

    found: list[dict[str, Any]] = []
    with DiffusionModel(path, n_ctx=4096) as model, model.session() as session:
        n_vocab, canvas = model.config.n_vocab, model.config.canvas_length
        session.encode(ids(2 * canvas, n_vocab))
        for number in range(2):
            batch = CanvasBatch(session, [CanvasSpec(seed=number, canvas_index=number, quiet=True)], endless())
            for step in range(STEPS):
                before = counts()
                batch.step()
                found.append({"what": f"canvas {number + 1}, step {step + 1}", **changes(before)})
            before = counts()
            session.encode(ids(canvas, n_vocab, session.n_past))
            found.append({"what": f"canvas {number + 1}, encoded", **changes(before)})
    return found


def run(context: Context) -> None:
    """On the 724M shape where its file is there, else on the demo model."""
    library = compile_counter(context.work)
    model = context.work / "724m.gguf"
    chosen = f"{str(model)!r}" if model.exists() else "pydiffgguf.demo_model_path()"
    code = (
        f"import json, pydiffgguf; from first_hour import launches; print(json.dumps(launches.two_canvases({chosen})))"
    )
    context.record(model=model.name if model.exists() else "demo.gguf")
    context.record(calls=json.loads(checks.child(code, {"LD_PRELOAD": str(library)})))
