"""What the machine does without this project: copies and products, by torch on a GPU and by numpy on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from first_hour.stages import NOT_MEASURED, Context

GIB = 1 << 30
N = 8192
#: Rows of a product that is as wide as the others: a canvas.
ROWS = 256
#: Short kernels in one captured graph.
KERNELS = 1000


def median_s(work: Callable[[], Any], wait: Callable[[], Any], repeat: int = 7) -> float:
    """Median seconds of one run; a first one, untimed, loads what it takes."""
    times = []
    for i in range(repeat + 1):
        wait()
        began = time.perf_counter()
        work()
        wait()
        if i > 0:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def on_cpu() -> dict[str, float]:
    """GB/s read and written, and operations a second of numpy's float32 product."""
    import numpy as np

    from pydiffgguf.cli.bench import ceiling

    source = np.ones(GIB // 4, dtype=np.uint8)
    target = np.empty_like(source)
    seconds = median_s(lambda: np.copyto(target, source), lambda: None)
    return {"copy_gb_s": 2 * source.nbytes / seconds / 1e9, "f32_tflops": ceiling() / 1e12}


def on_cuda(record: Callable[..., None]) -> None:
    """Copies on the card and over the bus, products by type, and what a launch costs; each kept at once."""
    import torch

    card = torch.device("cuda")
    wait = torch.cuda.synchronize
    found: dict[str, float] = {}

    def keep(name: str, value: float) -> None:
        found[name] = value
        record(cuda=found)

    source = torch.ones(GIB, dtype=torch.uint8, device=card)
    target = torch.empty_like(source)
    keep("copy_gb_s", 2 * GIB / median_s(lambda: target.copy_(source), wait) / 1e9)
    for name, pinned in (("pinned_gb_s", True), ("pageable_gb_s", False)):
        host = torch.ones(GIB, dtype=torch.uint8, pin_memory=pinned)
        keep(name, GIB / median_s(lambda host=host: target.copy_(host, non_blocking=True), wait, 3) / 1e9)
    for name, kind in (("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)):
        a, b = (torch.randn(N, N, device=card, dtype=kind) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = False
        keep(f"{name}_tflops", 2 * N**3 / median_s(lambda a=a, b=b: a @ b, wait, 3) / 1e12)
        keep(f"{name}_{ROWS}_rows_tflops", 2 * N * N * ROWS / median_s(lambda a=a, b=b: a[:ROWS] @ b, wait) / 1e12)
        if kind == torch.float32:
            torch.backends.cuda.matmul.allow_tf32 = True
            keep("tf32_tflops", 2 * N**3 / median_s(lambda a=a, b=b: a @ b, wait, 3) / 1e12)
    a, b = (torch.randint(-127, 128, (N, N), dtype=torch.int8, device=card) for _ in range(2))
    keep("int8_tops", 2 * N**3 / median_s(lambda: torch._int_mm(a, b.t()), wait, 3) / 1e12)
    small = torch.zeros(256, device=card)
    small.add_(1.0)
    wait()
    keep("eager_launch_us", median_s(lambda: [small.add_(1.0) for _ in range(KERNELS)], wait) / KERNELS * 1e6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(KERNELS):
            small.add_(1.0)
    keep("replayed_launch_us", median_s(graph.replay, wait) / KERNELS * 1e6)


def run(context: Context) -> None:
    """The place's own; the other one's are not measured."""
    context.record(cpu=on_cpu() if context.place == "cpu" else NOT_MEASURED, cuda=NOT_MEASURED)
    if context.place == "cuda":
        on_cuda(context.record)
