"""Steps, prefill and turns against transformers, and what a step costs by prefix and canvas, on the speed shape.

    python benchmarks/shapes.py 724m -o f32.gguf --type f32                # and q8_0.gguf, q4_k_m.gguf, q4_0.gguf
    python benchmarks/speed.py compare f32.gguf q8_0.gguf q4_k_m.gguf q4_0.gguf
    python benchmarks/speed.py turns q8_0.gguf
    python benchmarks/speed.py curves q8_0.gguf --svg docs/img

`compare` rebuilds the first file's net in transformers (float32, as many threads) and takes everything in turns in one
run: a denoise step with self-conditioning behind 256 tokens, and a prefill of 2,048. What is printed are medians, and
ratios of medians to transformers'. Its step is the model's forward pass alone; ours is a whole step, sampler included.
`compare --cpu avx2` holds both sides to that level of instructions.
`turns` says when the first step of a second turn begins, behind 2,000 tokens that the first turn left in the cache.
`curves` times a step behind prefixes of 256 to 16,384 tokens and for canvases of 32 to 256 rows, as tables and SVG.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pydiffgguf import DiffusionModel
from pydiffgguf._binding.records import Sampling
from pydiffgguf.session import CanvasBatch, CanvasSpec, Session

ROOT = Path(__file__).parents[1]
PREFIX = 256
PREFILL = 2048
FIRST_TURN, SECOND_TURN = 2000, 64
PREFIXES = (256, 512, 1024, 2048, 4096, 8192, 16_384)
ROWS = (32, 64, 96, 128, 160, 192, 224, 256)


#: What torch, oneDNN and MKL call the levels that a model can be held to.
TORCH_LEVELS = {
    "sse4": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx_vnni": ("avx2", "AVX2_VNNI", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE_VNNI", "AVX512"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
    "amx": ("avx512", "AVX512_CORE_AMX", "AVX512"),
}

#: What times are taken by; `--processor-time` makes it the time of this process on the processor.
clock: Callable[[], float] = time.perf_counter


def ids(n: int, n_vocab: int, first: int = 0) -> npt.NDArray[np.int32]:
    """The same tokens every time, spread over the vocabulary: experts are chosen by token."""
    return np.array([(7919 * (first + i) + 5) % n_vocab for i in range(n)], dtype=np.int32)


def endless() -> Sampling:
    """The released sampler without an early end, for as many steps as a run makes."""
    return Sampling(
        steps=48,
        max_steps=0,
        t_min=0.4,
        t_max=0.8,
        entropy_bound=0.1,
        stability_threshold=1,
        confidence_threshold=0.0,  # a mean entropy is never below it
    )


class Ours:
    """One file, with a canvas under way behind a prefix."""

    def __init__(self, path: Path, n_ctx: int, threads: int, cpu: str | None = None) -> None:
        self.name = path.stem
        self.model = DiffusionModel(path, n_ctx=n_ctx, n_threads=threads, cpu=cpu)
        self.session: Session = self.model.session()

    def begin(self, prefix: int, rows: int | None = None) -> None:
        """Encodes the prefix, or cuts it, and makes the first step, which has no self-conditioning."""
        n_vocab = self.model.config.n_vocab
        if self.session.n_past > prefix:
            self.session.truncate(prefix)
        elif self.session.n_past < prefix:
            self.session.encode(ids(prefix - self.session.n_past, n_vocab, self.session.n_past))
        self.batch = CanvasBatch(self.session, [CanvasSpec(n_rows=rows, seed=1)], endless())
        self.batch.step()

    def step(self) -> float:
        began = clock()
        self.batch.step()
        return clock() - began

    def prefill(self) -> float:
        self.session.reset()
        began = clock()
        self.session.encode(ids(PREFILL, self.model.config.n_vocab))
        return clock() - began

    def close(self) -> None:
        self.session.close()
        self.model.close()


class Transformers:
    """The first file's net in transformers."""

    name = "transformers"

    def __init__(self, path: Path, threads: int) -> None:
        sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "parity")]
        import torch
        from rebuild import model_from_gguf
        from reference import ReferencePrefix

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = model_from_gguf(path)
        self.prefix_type = ReferencePrefix
        self.n_vocab = int(self.model.config.text_config.vocab_size)
        self.rows = int(self.model.config.canvas_length)

    def begin(self, prefix: int) -> None:
        self.prefix = self.prefix_type(self.model)
        self.prefix.encode(ids(prefix, self.n_vocab))
        self.signal = self.prefix.denoise(ids(self.rows, self.n_vocab)) / 0.6

    def step(self) -> float:
        began = clock()
        self.prefix.denoise(ids(self.rows, self.n_vocab), self.signal)
        return clock() - began

    def prefill(self) -> float:
        prefix = self.prefix_type(self.model)
        began = clock()
        prefix.encode(ids(PREFILL, self.n_vocab))
        return clock() - began


def in_turns(engines: Sequence[Any], what: Callable[[Any], float], repeat: int) -> dict[str, list[float]]:
    """name -> times; each repetition meets every engine, in an order that turns."""
    times: dict[str, list[float]] = {e.name: [] for e in engines}
    for i in range(repeat):
        for engine in (*engines[i % len(engines) :], *engines[: i % len(engines)]):
            times[engine.name].append(what(engine))
    return times


def hold_torch_to(level: str) -> None:
    """Keeps torch's own kernels, oneDNN and MKL, which read these when they are loaded, from what the level lacks."""
    aten, onednn, mkl = TORCH_LEVELS[level]
    os.environ.update(ATEN_CPU_CAPABILITY=aten, ONEDNN_MAX_CPU_ISA=onednn, MKL_ENABLE_INSTRUCTIONS=mkl)


def compare(paths: Sequence[Path], threads: int, repeat: int, prefills: int, cpu: str | None) -> dict[str, Any]:
    """Times in seconds by name, of steps and of prefills. `cpu`: a level that both sides are held to."""
    if cpu is not None:
        hold_torch_to(cpu)
    reference = Transformers(paths[0], threads)
    engines: list[Any] = [reference, *(Ours(p, PREFILL + 512, threads, cpu) for p in paths)]
    for engine in engines:
        engine.begin(PREFIX)
    steps = in_turns(engines, lambda e: e.step(), repeat)
    prefill = in_turns(engines, lambda e: e.prefill(), prefills) if prefills else {}
    return {"threads": threads, "step": steps, "prefill": prefill}


def print_compare(result: dict[str, Any]) -> None:
    print(f"{result['threads']} threads; medians of {len(result['step']['transformers'])} steps", end="")
    print(f" and {len(result['prefill']['transformers'])} prefills" if result["prefill"] else "")
    print(
        "\n| | step, s | of transformers' | prefill of 2,048, s | of transformers' |\n| --- | --- | --- | --- | --- |"
    )
    base = {k: statistics.median(result[k]["transformers"]) for k in ("step", "prefill") if result[k]}
    for name in result["step"]:
        cells = []
        for kind in ("step", "prefill"):
            if result[kind]:
                median = statistics.median(result[kind][name])
                cells += [f"{median:.3f}", f"{median / base[kind]:.2f}"]
            else:
                cells += ["", ""]
        print(f"| {name} | {' | '.join(cells)} |")


def turns(path: Path, threads: int, repeat: int) -> dict[str, float]:
    """Seconds, medians: of encoding a second turn's tokens alone behind the first, and from handing over the whole
    conversation to the beginning of its first step."""
    with DiffusionModel(path, n_ctx=FIRST_TURN + SECOND_TURN + 512, n_threads=threads) as model:
        n_vocab = model.config.n_vocab
        first, second = ids(FIRST_TURN, n_vocab), ids(SECOND_TURN, n_vocab, FIRST_TURN)
        whole = [int(i) for i in np.concatenate([first, second])]
        alone, begins = [], []
        with model.session() as session:
            session.encode(first)
            for _ in range(repeat):
                session.truncate(FIRST_TURN)
                began = clock()
                session.encode(second)
                alone.append(clock() - began)
        for _ in range(repeat):
            model.generate([int(i) for i in first], max_tokens=1, max_steps=1, seed=1)
            began = clock()
            result = model.generate(whole, max_tokens=1, max_steps=1, seed=1)
            begins.append(clock() - began - result.stats.denoise_s)
    return {"alone_s": statistics.median(alone), "first_step_begins_s": statistics.median(begins)}


def curves(path: Path, threads: int, repeat: int, longest: int) -> dict[str, list[tuple[int, float]]]:
    """Median seconds of a step by prefix, with a whole canvas, and by canvas, behind PREFIX tokens."""
    ours = Ours(path, min(longest, max(PREFIXES)) + 512, threads)
    by_rows, by_prefix = [], []
    for rows in ROWS:
        ours.begin(PREFIX, rows)
        by_rows.append((rows, statistics.median(ours.step() for _ in range(repeat))))
    for prefix in PREFIXES:
        if prefix <= longest:
            ours.begin(prefix)
            by_prefix.append((prefix, statistics.median(ours.step() for _ in range(repeat))))
    ours.close()
    return {"prefix": by_prefix, "canvas": by_rows}


def svg(points: Sequence[tuple[int, float]], title: str, unit: str) -> str:
    """A line through the points, both axes from zero."""
    width, height, left, bottom = 560, 300, 60, 40
    most_x, most_y = max(x for x, _ in points), max(y for _, y in points) * 1.15

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / most_x * (width - left - 20), height - bottom - y / most_y * (height - bottom - 30)

    marks = [place(x, y) for x, y in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in marks)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        ' font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{left}" y="18" font-size="13">{title}</text>',
        f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="2"/>',
    ]
    for (x, y), (at_x, at_y) in zip(points, marks, strict=True):
        parts.append(f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="3" fill="#1f6feb"/>')
        parts.append(f'<text x="{at_x:.1f}" y="{at_y - 8:.1f}" text-anchor="middle">{y:.2f}</text>')
        if at_x - left > 12 or x == points[0][0]:
            parts.append(f'<text x="{at_x:.1f}" y="{height - bottom + 16}" text-anchor="middle">{x}</text>')
    origin, end = place(0, 0), place(most_x, most_y)
    parts += [
        f'<path d="M{origin[0]:.1f} {end[1]:.1f}V{origin[1]:.1f}H{end[0]:.1f}" fill="none" stroke="#888888"/>',
        f'<text x="{width - 20}" y="{height - 8}" text-anchor="end">{unit}</text>',
        f'<text x="8" y="{end[1] + 4:.1f}">s</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure steps, prefill and turns.")
    commands = parser.add_subparsers(required=True, dest="command")
    for name in ("compare", "turns", "curves"):
        sub = commands.add_parser(name)
        sub.add_argument("files", type=Path, nargs="+" if name == "compare" else 1)
        sub.add_argument("--threads", type=int, default=2)
        sub.add_argument("--repeat", type=int, default=5)
        sub.add_argument("--json", type=Path, help="the times too")
        sub.add_argument(
            "--processor-time",
            action="store_true",
            help="time on the processor instead of on the clock: for one thread, on a machine that others use",
        )
        if name == "compare":
            sub.add_argument("--prefills", type=int, default=5, help="0: none")
            sub.add_argument("--cpu", choices=TORCH_LEVELS, help="hold both sides to this level of instructions")
        if name == "curves":
            sub.add_argument("--svg", type=Path, help="a folder")
            sub.add_argument("--longest", type=int, default=max(PREFIXES))
    args = parser.parse_args()
    global clock
    if args.processor_time:
        clock = time.process_time
    result: dict[str, Any]
    if args.command == "compare":
        result = compare(args.files, args.threads, args.repeat, args.prefills, args.cpu)
        print_compare(result)
    elif args.command == "turns":
        result = turns(args.files[0], args.threads, args.repeat)
        print(
            f"{args.files[0].stem}: {SECOND_TURN} new tokens behind {FIRST_TURN}: {result['alone_s']:.3f} s alone, "
            f"first step begins after {result['first_step_begins_s']:.3f} s: "
            f"{result['first_step_begins_s'] / result['alone_s']:.2f}"
        )
    else:
        result = curves(args.files[0], args.threads, args.repeat, args.longest)
        for kind, points in result.items():
            print(f"{kind}: " + ", ".join(f"{x}: {y:.3f}" for x, y in points))
        if args.svg:
            args.svg.mkdir(parents=True, exist_ok=True)
            name = args.files[0].stem
            for kind, title in (
                ("prefix", "a step of 256 rows, by prefix"),
                ("canvas", "a step, by rows of the canvas"),
            ):
                unit = "tokens in the cache" if kind == "prefix" else "rows"
                (args.svg / f"step_by_{kind}.svg").write_text(svg(result[kind], f"{name}: {title}", unit))
    if args.json:
        args.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
