"""The kernels of csrc/cuda: their bodies on the host against the C++ sampler, and, on a GPU, the kernels themselves,
with the time of each against its floor."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import performance_model as paper

from first_hour import cards, checks
from first_hour.stages import NOT_MEASURED, REPOSITORY, Context, StageError
from pydiffgguf._binding.functions import sample
from pydiffgguf._binding.records import Sampling

CAPACITY = 8192  # csrc/cuda/step.h
Q6_K = 6  # RowType in csrc/cuda/dequantize.h
REPEAT = 50


def compile_kernels(capability: str, folder: Path) -> ctypes.CDLL:
    """csrc/cuda and gpu_kernels.cu as a library."""
    library = folder / "gpu_kernels.so"
    sources = ("benchmarks/gpu_kernels.cu", "csrc/cuda/cuda_device.cu", "csrc/base/gpu_failure.cpp")
    options = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-shared", "-Xcompiler", "-fPIC"]
    includes = [f"-I{REPOSITORY / 'csrc'}", f"-I{REPOSITORY / 'csrc/cuda'}"]
    target = f"-gencode=arch=compute_{capability},code=sm_{capability}"
    paths = [str(REPOSITORY / source) for source in sources]
    words = [str(cards.tool("nvcc")), *options, target, *includes, *paths, "-o", str(library)]
    subprocess.run(words, check=True)
    return ctypes.CDLL(str(library))


def random_embedding(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The released embedding's bytes in Q6_K with random quants: uint8 [vocab, bytes of a row]."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q6_K]
    rows = rng.integers(0, 256, (paper.CONFIG.vocab_size, paper.CONFIG.hidden_size // block, size), np.uint8)
    rows[:, :, -2:] = np.array([0.001], dtype="<f2").view(np.uint8)  # the block's scale: random bytes may be NaN
    return rows.reshape(paper.CONFIG.vocab_size, -1)


def measure(kernels: ctypes.CDLL, bandwidth: float | None, repeat: int = REPEAT) -> list[dict[str, Any]]:
    """Time and floor of each kernel in ms; the floor is None where nobody knows the card's bandwidth (bytes a second).
    Raises StageError when the device's results are not the C++ sampler's."""
    rng = np.random.default_rng(1)
    n, vocab, hidden, t = paper.CANVAS, paper.CONFIG.vocab_size, paper.CONFIG.hidden_size, 0.6
    z = (rng.standard_normal((n, vocab), np.float32) * np.float32(3)).astype(np.float32)
    z[np.arange(n), rng.integers(0, vocab, n)] = 30.0  # rows as they are when a canvas settles
    uniform, renoise = rng.random(n), rng.integers(0, vocab, n).astype(np.int32)
    embedding = random_embedding(rng)
    argmax, ids, counts = (np.empty(n, dtype=np.int32) for _ in range(3))
    entropy, soft, ms = np.empty(n), np.empty((n, hidden), dtype=np.float32), np.empty(4)
    message = ctypes.create_string_buffer(256)

    def at(values: npt.NDArray[Any]) -> ctypes.c_void_p:
        return ctypes.c_void_p(values.ctypes.data)

    number = ctypes.c_double
    sizes = (Q6_K, hidden, CAPACITY, repeat)
    failed = kernels.gpu_step(
        *(at(z), n, vocab, number(t), number(0.1), at(uniform), at(renoise), at(embedding), *sizes),
        *(at(argmax), at(ids), at(entropy), at(counts), at(soft), at(ms), message),
    )
    if failed:
        raise StageError(message.value.decode())
    options = Sampling(1, 0, 1, t, t, 0.1, 0.005)
    expected = sample(z, options, step=0, uniform=uniform, renoise=renoise)
    for name, ours, theirs in (("argmax", argmax, expected.argmax), ("ids", ids, expected.canvas)):
        if not np.array_equal(ours, theirs):
            raise StageError(f"{name} differ from the C++ sampler's on {(ours != theirs).sum()} rows")
    off = np.abs(entropy - expected.entropy) - np.maximum(1e-7, 1e-6 * expected.entropy)
    if off.max() > 0:
        raise StageError(f"an entropy is {off.max():.1e} nat beyond its tolerance")
    logits = 4.0 * n * vocab
    gathered = float(counts[counts <= CAPACITY].sum()) * embedding.shape[1]
    floors = (2 * logits, logits, 0.0, gathered + 4 * n * hidden)
    names = ("dg_sample_rows, keeping logits", "dg_sample_rows", "dg_finish_canvases", "dg_gather_signal")
    return [
        {"kernel": name, "ms": time, "floor_ms": n_bytes / bandwidth * 1e3 if bandwidth else None}
        for name, time, n_bytes in zip(names, ms.tolist(), floors, strict=True)
    ]


def run(context: Context) -> None:
    """The host twins' tests at any place; the kernels' results and times on a GPU."""
    context.record(twins=checks.pytest(["tests/test_kernels.py"]), kernels=NOT_MEASURED)
    if context.place == "cuda":
        gpu = cards.find_gpu()
        device = paper.card(gpu.name)
        library = compile_kernels(gpu.capability, context.work)
        context.record(kernels=measure(library, device.bandwidth if device else None))
    checks.require(context.result["twins"])
