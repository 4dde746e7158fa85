"""A step on a device whose sampler is not CUDA's kernels, by what samples and how the self-conditioning signal is made.

    python benchmarks/device_signal.py -o /tmp/net.gguf

The device is an RPC server on loopback, which computes on the CPU: what counts are the ratios, and the memory of this
process. Writes a net of two layers with the released vocabulary (262,144) and a width of 256 unless the file is there.
Canvases of 64 rows are denoised at a temperature that leaves rows flat, and at one that leaves a few tokens of each;
every way takes its turn before the next repetition.
"""

from __future__ import annotations

import argparse
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import shapes

from pydiffgguf import CanvasBatch, CanvasSpec, DiffusionModel

WAYS: dict[str, dict[str, Any]] = {
    "operators": {"sampler": "operators"},
    "operators, signal_copy": {"sampler": "operators", "signal_copy": True},
    "host": {"sampler": "host"},
    "host, signal_copy": {"sampler": "host", "signal_copy": True},
}
TEMPERATURES = {"flat": 1.0, "peaked": 0.005}


def write(path: Path) -> None:
    """The net, under a name of its own among the shapes."""
    shapes.SHAPES["wide vocabulary"] = shapes.SHAPES["724m"] | {
        "vocab_size": 262_144,
        "hidden_size": 256,
        "intermediate_size": 512,
        "layer_types": [shapes.SLIDING, shapes.FULL],
        "num_hidden_layers": 2,
        "num_experts": 8,
        "moe_intermediate_size": 256,
        "canvas_length": 64,
    }
    shapes.write(path, "wide vocabulary", type="q8_0")


@contextmanager
def server() -> Iterator[str]:
    """An RPC server with one thread, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pydiffgguf", "rpc-server", "--port", str(port), "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            time.sleep(3)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()


def step(session: Any, model: DiffusionModel, temperature: float) -> float:
    """Seconds of a canvas's second step, whose signal the first one left."""
    fixed = {"t_min": temperature, "t_max": temperature, "confidence_threshold": 0.0}
    batch = CanvasBatch(session, [CanvasSpec(seed=1, quiet=True)], replace(model.sampling, steps=3, **fixed))
    batch.step()
    began = time.perf_counter()
    batch.step()
    return time.perf_counter() - began


def held() -> float:
    """MB of this process's anonymous memory."""
    return int(re.findall(r"Anonymous:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text(encoding="ascii"))[0]) / 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the net; made if missing")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="steps of each way (default: 3)")
    args = parser.parse_args()
    if not args.output.exists():
        write(args.output)
    with ExitStack() as stack:
        sessions = {}
        for name, options in WAYS.items():
            address = stack.enter_context(server())
            model = stack.enter_context(DiffusionModel(args.output, n_ctx=256, rpc=[address], n_threads=1, **options))
            session = stack.enter_context(model.session())
            session.encode(range(2, 40))
            sessions[name] = session, model
        seconds: dict[tuple[str, str], list[float]] = {(n, t): [] for n in WAYS for t in TEMPERATURES}
        grown: dict[str, float] = {}
        for _ in range(args.repeat):
            for name, (session, model) in sessions.items():
                before = held()
                for rows, temperature in TEMPERATURES.items():
                    seconds[name, rows].append(step(session, model, temperature))
                grown.setdefault(name, held() - before)
    print("| sampler | flat rows, s | peaked rows, s | memory here, MB |\n| --- | ---: | ---: | ---: |")
    for name in WAYS:
        flat, peaked = (statistics.median(seconds[name, rows]) for rows in TEMPERATURES)
        print(f"| {name} | {flat:.2f} | {peaked:.2f} | {grown[name]:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
