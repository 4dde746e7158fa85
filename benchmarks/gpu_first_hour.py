"""Everything to check and to time when a GPU is at hand for an hour, as one command that takes less than 25 minutes.

    python benchmarks/gpu_first_hour.py --out DIR                   # on a machine with CUDA
    python benchmarks/gpu_first_hour.py --place cpu --out DIR       # the same stages, the GPU's figures "not measured"

Stages follow one another, each in a process of its own with a limit on its time (`--list` shows them): the machine,
the build for its card, kernels against their host twins, logits and trajectories against transformers,
compute-sanitizer, ceilings of copies and products, steps by part at two shapes with three samplers, launches and
captures, tokens a second, candidates a row. A stage that fails or takes too long does not stop the next one.
DIR/results.json is written after each of them; DIR/table.md is the table; DIR/stages/ has every stage's output.
`--only STAGE` into the same DIR runs a stage again and keeps the others' results, the build among them.

It builds into an environment in DIR: on a machine without a network from the archive of tools/gpu_archive.py, elsewhere
with pip's packages; with --installed it takes the pydiffgguf that this Python has. With --place cuda it refuses to run
without an NVIDIA GPU and nvcc: nothing here falls back to the CPU and calls it a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from first_hour import cards, report, runner
from first_hour.stages import PLACES, REPOSITORY, STAGES, Context, StageError, stage


def archive() -> Path | None:
    """The folder of the unpacked archive that this repository is in, or None."""
    folder = REPOSITORY.parent
    return folder if (folder / "MANIFEST.json").is_file() and (folder / "wheels").is_dir() else None


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description="The first hour on a GPU: checks, then times, in less than 25 minutes.")
    out.add_argument("--out", type=Path, metavar="DIR", help="results.json, table.md and every stage's output go there")
    out.add_argument("--place", choices=PLACES, default="cuda", help="where models are computed (cuda)")
    out.add_argument(
        "--only", action="append", metavar="STAGE", help="run this stage (repeatable) and keep what DIR has of others"
    )
    out.add_argument("--model", type=Path, metavar="FILE", help="a trained GGUF file to count candidates of (the demo)")
    out.add_argument("--installed", action="store_true", help="take the pydiffgguf that this Python has, build nothing")
    out.add_argument("--list", action="store_true", help="print the stages with their limits, and run nothing")
    out.add_argument("--stage", help=argparse.SUPPRESS)  # this process runs one stage
    out.add_argument("--limit", type=float, default=60.0, help=argparse.SUPPRESS)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    options = parser()
    args = options.parse_args(argv)
    if args.list:
        for one in STAGES:
            print(f"{one.name:16} {one.limit:4.0f} s  {one.title}" + ("" if "cpu" in one.places else " (cuda alone)"))
        return 0
    if args.out is None:
        options.error("--out: where the results go")
    if args.model is not None and not args.model.is_file():
        options.error(f"--model: {args.model} is no file")
    try:
        named = {stage(name) for name in args.only or ()}
    except ValueError as error:
        options.error(str(error))
    if args.place == "cuda":
        cards.find_gpu()
    context = Context(
        name=args.stage or "",
        place=args.place,
        out=args.out.resolve(),
        archive=archive(),
        installed=args.installed,
        model=args.model.resolve() if args.model else None,
        limit=args.limit,
    )
    if args.stage:
        try:
            runner.run_here(context)
        except StageError as error:
            raise SystemExit(f"{args.stage}: {error}") from None
        return 0
    context.out.mkdir(parents=True, exist_ok=True)
    before = runner.earlier(context.out, context.place) if named else None
    there = {name for name, found in (before or {"stages": {}})["stages"].items() if found["status"] == "done"}
    needed = named | {stage(one.needs) for one in named if one.needs and one.needs not in there}
    run = runner.run_all([one for one in STAGES if not named or one in needed], context, before=before)
    text = report.table(run)
    (context.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(found["status"] in ("done", "not for this place") for found in run["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
