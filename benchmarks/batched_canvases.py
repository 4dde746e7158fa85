"""What canvases cost side by side, against one after the other, on the project's speed shape (benchmarks/shapes.py).

    python benchmarks/batched_canvases.py --type q8_0                    # writes the file into a temporary folder
    python benchmarks/batched_canvases.py --file 724m.q8_0.gguf --json out.json

Everything is a ratio of two times of one run: together and apart are timed in turns, the order changing from repetition
to repetition, after one untimed round of each, whose numbers are compared; what is printed are medians. The output is
Markdown. With the defaults it takes about ten minutes on two cores, most of them for canvases of 256 rows.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import shapes

from pydiffgguf import DiffusionModel
from pydiffgguf._binding.records import RawStep, Sampling
from pydiffgguf.gap.search import FREE_ROWS, PROBE_STEPS, SUFFIX_ROWS
from pydiffgguf.session import CanvasBatch, CanvasSpec, Session

SHAPE = "724m"
CANVASES = 8

#: The bounds that were set before anything was measured: rows of a canvas -> the most that together may cost of apart.
TARGETS = {32: 0.6, 256: 0.95}
PROBE_TARGET = 16.0


@dataclass
class Pair:
    """Times of one layout, a repetition each, in seconds: of the conditioned steps, and of whole runs of `steps` steps
    with the first one, which has no self-conditioning and builds the graph."""

    rows: int
    together: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
    together_whole: list[float] = field(default_factory=list)
    apart_whole: list[float] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def ratio(self) -> float:
        """Together over apart, conditioned steps: the median over the repetitions."""
        return statistics.median(t / a for t, a in zip(self.together, self.apart, strict=True))

    def whole_ratio(self) -> float:
        return statistics.median(t / a for t, a in zip(self.together_whole, self.apart_whole, strict=True))


def sampling(steps: int) -> Sampling:
    """The released sampler without an early end: every canvas makes all its steps."""
    return Sampling(
        steps=48,
        max_steps=steps,
        t_min=0.4,
        t_max=0.8,
        entropy_bound=0.1,
        stability_threshold=1,
        confidence_threshold=0.0,  # a mean entropy is never below it
    )


def specs(rows: int, n_vocab: int, watched: bool) -> list[CanvasSpec]:
    """Infill canvases: every second half is pinned, as a suffix is; with a log-probability for each row when asked."""
    rng = np.random.default_rng(rows)
    made = []
    for i in range(CANVASES):
        pinned = np.where(np.arange(rows) < rows // 2, -1, rng.integers(n_vocab, size=rows)).astype(np.int32)
        ids = rng.integers(n_vocab, size=rows, dtype=np.int32) if watched else None
        made.append(CanvasSpec(n_rows=rows, pinned=pinned, watched=ids, seed=i))
    return made


def run(session: Session, group: Sequence[CanvasSpec], steps: int) -> tuple[list[list[RawStep]], list[float]]:
    """Denoises the canvases side by side; the steps, and how long each took, the first one with the beginning."""
    taken: list[list[RawStep]] = []
    times: list[float] = []
    began = time.perf_counter()
    batch = CanvasBatch(session, group, sampling(steps))
    while not batch.finished:
        taken.append(batch.step())
        now = time.perf_counter()
        times.append(now - began)
        began = now
    return taken, times


def compare(session: Session, rows: int, n_vocab: int, steps: int) -> dict[str, float]:
    """How far a canvas among others is from the same canvas alone: worst of the canvases.

    Entropies and log-probabilities of the free rows as norm(difference) / norm, over all steps; rows whose argmax or
    next id differ are counted.
    """
    group = specs(rows, n_vocab, watched=True)
    together, _ = run(session, group, steps)
    worst = {"entropy": 0.0, "logprob": 0.0, "differing_rows": 0.0}
    for i, spec in enumerate(group):
        alone, _ = run(session, [spec], steps)
        for many, [single] in zip(together, alone, strict=True):
            mine = many[i]
            for name in ("entropy", "logprob"):
                a, b = getattr(mine, name), getattr(single, name)
                worst[name] = max(worst[name], float(np.linalg.norm(a - b) / np.linalg.norm(b)))
            worst["differing_rows"] += float(((mine.argmax != single.argmax) | (mine.canvas != single.canvas)).sum())
    return worst


def time_pair(
    session: Session, rows: int, n_vocab: int, *, steps: int, repeat: int, say: Callable[[str], None]
) -> Pair:
    """Canvases of `rows` rows together and apart."""
    pair = Pair(rows)
    group = specs(rows, n_vocab, watched=False)

    def together() -> None:
        _, times = run(session, group, steps)
        pair.together.append(sum(times[1:]))
        pair.together_whole.append(sum(times))

    def apart() -> None:
        runs = [run(session, [spec], steps)[1] for spec in group]
        pair.apart.append(sum(sum(times[1:]) for times in runs))
        pair.apart_whole.append(sum(sum(times) for times in runs))

    pair.errors = compare(session, rows, n_vocab, steps)
    for i in range(1, repeat + 1):
        for measured in (together, apart) if i % 2 else (apart, together):
            measured()
        say(f"{rows} rows, {i} of {repeat}: together {pair.together[-1]:.2f} s, apart {pair.apart[-1]:.2f} s")
    return pair


def time_probe(session: Session, lengths: Sequence[int], repeat: int) -> dict[str, Any]:
    """Trying gaps of those lengths as `pydiffgguf.gap.search` does: PROBE_STEPS steps together, each gap followed by
    SUFFIX_ROWS rows of suffix of which the first FREE_ROWS are free; then the causal pass, which there only judges the
    few that were finished, over all of them. Seconds of each repetition."""
    rng = np.random.default_rng(0)
    n_vocab, most = session.config.n_vocab, session.config.canvas_length
    group = []
    for length in lengths:
        rows = min(most, length + SUFFIX_ROWS)
        ids = rng.integers(n_vocab, size=rows)
        pinned = np.where(np.arange(rows) < length + FREE_ROWS, -1, ids).astype(np.int32)
        group.append(CanvasSpec(n_rows=rows, pinned=pinned, watched=ids, seed=length))
    seconds = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        taken, _ = run(session, group, PROBE_STEPS)
        session.score([step.argmax for step in taken[-1]])
        seconds.append(time.perf_counter() - began)
    return {"lengths": list(lengths), "seconds": seconds[1:]}


def machine() -> str:
    """The processor, how many of its cores this process may use, the load that was there before, and the date."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{name}, {cores} cores{load}, {datetime.date.today().isoformat()}"


def measure(
    model: DiffusionModel, *, prompt: int, steps: int, repeat: int, rows: Sequence[int], say: Callable[[str], None]
) -> dict[str, Any]:
    """All of it, as JSON types."""
    n_vocab, most = model.config.n_vocab, model.config.canvas_length
    ids = np.random.default_rng(1).integers(n_vocab, size=prompt, dtype=np.int32)
    result: dict[str, Any] = {"prompt": prompt, "steps": steps, "repeat": repeat, "canvases": CANVASES, "pairs": []}
    result["canvas_length"] = most
    with model.session(n_rows=CANVASES * most) as session:
        session.encode(ids)
        result["threads"] = session.n_threads
        for n in rows:
            pair = time_pair(session, n, n_vocab, steps=steps, repeat=repeat, say=say)
            result["pairs"].append(
                {"ratio": pair.ratio(), "whole_ratio": pair.whole_ratio(), "target": TARGETS.get(n), **vars(pair)}
            )
        full = [run(session, specs(most, n_vocab, False)[:1], 2)[1][-1] for _ in range(repeat + 1)][1:]
        result["full_step_s"] = statistics.median(full)
        longest = most - SUFFIX_ROWS
        for lengths in ([2**i for i in range(CANVASES)], range(longest - CANVASES + 1, longest + 1)):
            tried = time_probe(session, [min(n, longest) for n in lengths], repeat)
            tried["full_steps"] = statistics.median(tried["seconds"]) / result["full_step_s"]
            result.setdefault("probes", []).append(tried)
    return result


def markdown(result: dict[str, Any]) -> str:
    """The measurements as a Markdown section."""
    lines = [
        f"{result['machine']}; {result['threads']} threads, {result['type']} weights, F32 cache, prompt of "
        f"{result['prompt']} tokens. Medians of {result['repeat']}.",
        "",
        f"| {result['canvases']} canvases of | together, s | apart, s | together / apart | with first steps | bound |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for pair in result["pairs"]:
        n = result["steps"] - 1
        together, apart = (statistics.median(pair[name]) / n for name in ("together", "apart"))
        bound = "" if pair["target"] is None else f"{pair['target']:.2f}"
        lines.append(
            f"| {pair['rows']} rows | {together:.3f} | {apart:.3f} | **{pair['ratio']:.2f}** | "
            f"{pair['whole_ratio']:.2f} | {bound} |"
        )
    lines += [
        "",
        "Seconds are per step of all canvases, with self-conditioning. Lengths tried together as the search does it: "
        f"denoise steps: {PROBE_STEPS}, rows of suffix: {SUFFIX_ROWS}, and a causal pass over all at the end; in full "
        f"steps of one canvas of {result['canvas_length']} rows ({result['full_step_s']:.3f} s):",
        "",
        "| lengths | s | full steps | bound |",
        "| --- | ---: | ---: | ---: |",
    ]
    for tried in result["probes"]:
        lengths = ", ".join(map(str, tried["lengths"]))
        seconds = statistics.median(tried["seconds"])
        lines.append(f"| {lengths} | {seconds:.2f} | **{tried['full_steps']:.1f}** | {PROBE_TARGET:.0f} |")
    lines += [
        "",
        "A canvas among others against the same canvas alone, worst of the canvases, relative error over all rows:",
        "",
        "| rows | entropies | log-probabilities | rows with another id |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for pair in result["pairs"]:
        e = pair["errors"]
        lines.append(f"| {pair['rows']} | {e['entropy']:.1e} | {e['logprob']:.1e} | {e['differing_rows']:.0f} |")
    return "\n".join(lines)


@contextlib.contextmanager
def model_file(args: argparse.Namespace, say: Callable[[str], None]) -> Iterator[Path]:
    """The file to measure: the given one, or a fresh one in a temporary folder."""
    if args.file is not None:
        yield args.file
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{SHAPE}.{args.type}.gguf"
        say(f"writing {path.name}")
        shapes.write(path, SHAPE, type=args.type, seed=args.seed)
        yield path


def at_least(least: int) -> Callable[[str], int]:
    """An argument type: an integer from `least` on."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return parse


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--file", type=Path, help="a GGUF of benchmarks/shapes.py, or any other; default: write one")
    parser.add_argument("--type", choices=shapes.TYPES, default="q8_0", help="of the file to write (default: q8_0)")
    parser.add_argument("--seed", type=int, default=1, help="of the weights (default: 1)")
    parser.add_argument("--threads", type=at_least(1), help="default: the session's own choice")
    parser.add_argument("--prompt", type=at_least(1), default=256, help="tokens (default: 256)")
    parser.add_argument("--rows", type=at_least(2), nargs="+", default=[32, 256], help="rows of a canvas")
    parser.add_argument(
        "--steps", type=at_least(2), default=2, help="of each canvas, the first one untimed (default: 2)"
    )
    parser.add_argument("--repeat", type=at_least(1), default=5, help="repetitions (default: 5)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything that was measured")
    args = parser.parse_args(argv)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    about = machine()
    with (
        model_file(args, say) as path,
        DiffusionModel(path, type_kv="f32", n_ctx=max(2048, args.prompt + 256), n_threads=args.threads) as model,
    ):
        kind = args.type if args.file is None else args.file.name
        result = {
            "machine": about,
            "type": kind,
            **measure(model, prompt=args.prompt, steps=args.steps, repeat=args.repeat, rows=args.rows, say=say),
        }
    print(markdown(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
