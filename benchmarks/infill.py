"""How well a model fills gaps: HumanEval-Infilling and SantaCoder-FIM, or any file in their formats.

    python benchmarks/infill.py model.gguf HumanEval-SingleLineInfilling.jsonl.gz --limit 100 --json out.json
    python benchmarks/infill.py hf:OWNER/REPO:Q4_K_M benchmark.jsonl --known-too
    python benchmarks/infill.py pydiffgguf/data/demo.gguf benchmarks/data/infill_demo.jsonl --execute

The files are the user's: nothing is downloaded but the model, when it is named by hf:. What is measured, in all and by
the length of the right gap in the model's own tokens:

exact       the text is the right one, to the byte
stripped    the same without white space at both ends, as SantaCoder-FIM counts
similarity  1 - Levenshtein distance / the longer length, in characters (rapidfuzz); the mean
parses      of the Python items: prefix, text and suffix together are valid syntax
length      mean difference between the number of tokens that was found and the right one; and how often it is 0
pass@1      with --execute: the item's tests pass; of the items that have tests
passes      denoise passes, each over all the lengths that are tried; `rows` in all of them; and seconds (s); means

An item that the model refuses (a suffix that cannot fit, say) counts as wrong everywhere, and its message is kept.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import sandbox
from infill_items import Item, ItemFile, ItemFileError, read_items
from rapidfuzz.distance import Levenshtein
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pydiffgguf import DiffGGUFError, DiffusionModel
from pydiffgguf.cli.arguments import MODEL_HELP, add_model_options
from pydiffgguf.cli.commands import SAMPLING, open_model
from pydiffgguf.cli.parser import flag
from pydiffgguf.gap.search import Gap

__all__ = ["BUCKETS", "Answer", "Result", "judge", "parses", "run", "summarise"]

#: Lengths of the right gap in tokens: least and most of each bucket.
BUCKETS: tuple[tuple[int, int | None], ...] = ((1, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, None))

KNOWN: Final = "known"
AUTO: Final = "auto"


@dataclass(frozen=True)
class Answer:
    """What a model made of one item. `tokens`: free ones that the text took; `passes` and `rows`: denoise passes, and
    rows in all of them; `error`: why there is no text."""

    text: str = ""
    tokens: int = 0
    passes: int = 0
    rows: int = 0
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Result:
    """One item, judged. `gap`: tokens of the right text. `parses` and `passed` are None where they do not apply."""

    id: str
    line: int
    language: str
    gap: int
    answer: Answer
    exact: bool
    stripped: bool
    similarity: float
    parses: bool | None
    passed: bool | None = None
    failure: str = ""


def parses(text: str) -> bool:
    """Whether `text` is the source of a Python module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes and the like, which are valid syntax
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # a NUL; too deeply nested
            return False
    return True


def judge(item: Item, gap: int, answer: Answer, limits: sandbox.Limits | None = None) -> Result:
    """Compares an answer with the item's own text. `limits`: run its tests, if it has any, within these."""
    refused = answer.error is not None
    program = item.program(answer.text) if limits is not None else None
    outcome = None
    if program is not None:
        outcome = sandbox.Outcome(False, "refused") if refused else sandbox.execute(program, limits)
    return Result(
        id=item.id,
        line=item.line,
        language=item.language,
        gap=gap,
        answer=answer,
        exact=not refused and answer.text == item.middle,
        stripped=not refused and answer.text.strip() == item.middle.strip(),
        similarity=0.0 if refused else Levenshtein.normalized_similarity(answer.text, item.middle),
        parses=(not refused and parses(item.prefix + answer.text + item.suffix)) if item.is_python else None,
        passed=None if outcome is None else outcome.passed,
        failure="" if outcome is None else outcome.reason,
    )


@dataclass(frozen=True)
class Summary:
    """Some results together; shares and means, None where no item has the figure. `refused`: how many had no answer;
    they are wrong in all shares, and left out of the means of length, passes, rows and seconds."""

    items: int
    refused: int
    exact: float
    stripped: float
    similarity: float
    parses: float | None
    length_error: float | None
    length_exact: float | None
    passed: float | None
    passes: float | None
    rows: float | None
    seconds: float | None


def mean(values: Iterable[float]) -> float | None:
    """The mean; None of nothing."""
    listed = list(values)
    return fmean(listed) if listed else None


def summarise(results: Sequence[Result]) -> Summary:
    """The figures of the results, of which there must be one."""
    if not results:
        raise ValueError("there are no results to summarise")
    answered = [r for r in results if r.answer.error is None]
    return Summary(
        items=len(results),
        refused=len(results) - len(answered),
        exact=fmean(r.exact for r in results),
        stripped=fmean(r.stripped for r in results),
        similarity=fmean(r.similarity for r in results),
        parses=mean(r.parses for r in results if r.parses is not None),
        length_error=mean(abs(r.answer.tokens - r.gap) for r in answered),
        length_exact=mean(r.answer.error is None and r.answer.tokens == r.gap for r in results),
        passed=mean(r.passed for r in results if r.passed is not None),
        passes=mean(r.answer.passes for r in answered),
        rows=mean(r.answer.rows for r in answered),
        seconds=mean(r.answer.seconds for r in answered),
    )


def bucket_name(bucket: tuple[int, int | None]) -> str:
    """`5-8`, or `65+` for the last one."""
    low, high = bucket
    return f"{low}+" if high is None else f"{low}-{high}"


def by_length(results: Sequence[Result]) -> dict[str, Summary]:
    """The summary of each bucket that has results, then of `all`."""
    summaries = {}
    for low, high in BUCKETS:
        inside = [r for r in results if low <= r.gap and (high is None or r.gap <= high)]
        if inside:
            summaries[bucket_name((low, high))] = summarise(inside)
    return {**summaries, "all": summarise(results)}


# ----------------------------------------------------------------------------------------------------------- running


def answer(model: DiffusionModel, item: Item, gap: Gap, options: dict[str, Any]) -> Answer:
    """One call of `model.infill`; what it refuses becomes an Answer with an error."""
    began = time.perf_counter()
    try:
        filled = model.infill(item.prefix, item.suffix, gap=gap, **options)
    except (DiffGGUFError, ValueError) as error:
        return Answer(seconds=time.perf_counter() - began, error=f"{type(error).__name__}: {error}")
    stats = filled.stats
    return Answer(filled.text, filled.gap_tokens, stats.forwards, stats.rows, time.perf_counter() - began)


@dataclass
class Run:
    """The results of a mode, `known` or `auto`, in the file's order; fewer than items where it was interrupted."""

    mode: str
    results: list[Result] = field(default_factory=list)


def run(
    model: DiffusionModel,
    items: Sequence[Item],
    modes: Sequence[str],
    *,
    options: dict[str, Any],
    limits: sandbox.Limits | None = None,
    progress: Callable[[], None] | None = None,
) -> list[Run]:
    """Fills every item's gap in each mode: all modes of an item before the next item, so that an interruption leaves
    them comparable. Ctrl-C ends it early, and what was done by then is returned.

    Args:
        modes: "known" hands in the number of the right text's tokens, "auto" lets the length be found.
        options: keyword arguments of DiffusionModel.infill.
        limits: execute the tests of items that have any, within these; None: execute nothing.
        progress: called after each call of the model.
    """
    runs = [Run(mode) for mode in modes]
    try:
        for item in items:
            gap = len(model.tokenize(item.middle, special=False))
            judged = []
            for mode in modes:
                given = answer(model, item, gap if mode == KNOWN else AUTO, options)
                judged.append(judge(item, gap, given, limits))
                if progress:
                    progress()
            for each, result in zip(runs, judged, strict=True):
                each.results.append(result)
    except KeyboardInterrupt:
        print("interrupted: what follows is of the items done so far", file=sys.stderr)
    return runs


# ---------------------------------------------------------------------------------------------------------- reporting

COLUMNS: tuple[tuple[str, Callable[[Summary], float | None], str], ...] = (
    ("exact", lambda s: s.exact, ".1%"),
    ("stripped", lambda s: s.stripped, ".1%"),
    ("similarity", lambda s: s.similarity, ".3f"),
    ("parses", lambda s: s.parses, ".1%"),
    ("length off by", lambda s: s.length_error, ".2f"),
    ("length exact", lambda s: s.length_exact, ".1%"),
    ("pass@1", lambda s: s.passed, ".1%"),
    ("passes", lambda s: s.passes, ".1f"),
    ("rows", lambda s: s.rows, ".0f"),
    ("s", lambda s: s.seconds, ".2f"),
)


def new_table(title: str, first: str) -> Table:
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column(first, no_wrap=True)
    out.add_column("items", justify="right")
    return out


def shown(value: float | None, fmt: str) -> str:
    return "" if value is None else format(value, fmt)


def table(each: Run) -> Table:
    """One mode: a row a bucket. Figures that no item has get no column."""
    summaries = by_length(each.results)
    columns = [c for c in COLUMNS if any(c[1](s) is not None for s in summaries.values())]
    refused = any(s.refused for s in summaries.values())
    length = "handed in" if each.mode == KNOWN else "to be found"
    out = new_table(f"length {length}", "tokens")
    for name, _, _ in columns:
        out.add_column(name, justify="right")
    if refused:
        out.add_column("refused", justify="right")
    for bucket, summary in summaries.items():
        if bucket == "all":
            out.add_section()
        row = [shown(value(summary), fmt) for _, value, fmt in columns]
        out.add_row(bucket, str(summary.items), *row, *([str(summary.refused)] if refused else []))
    return out


def comparison(known: Run, auto: Run) -> Table:
    """Both modes side by side; differences are auto less known, in percentage points where they are shares."""
    out = new_table("known length against unknown", "tokens")
    for name in ("exact, known", "auto", "points", "similarity, known", "auto", "difference"):
        out.add_column(name, justify="right")
    mine, theirs = by_length(known.results), by_length(auto.results)
    for bucket, a in mine.items():
        b = theirs[bucket]
        if bucket == "all":
            out.add_section()
        out.add_row(
            bucket,
            str(a.items),
            f"{a.exact:.1%}",
            f"{b.exact:.1%}",
            f"{100 * (b.exact - a.exact):+.1f}",
            f"{a.similarity:.3f}",
            f"{b.similarity:.3f}",
            f"{b.similarity - a.similarity:+.3f}",
        )
    return out


def report(file: ItemFile, model: str, options: dict[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """Everything, as JSON types."""
    return {
        "file": str(file.path),
        "format": file.format,
        "model": model,
        "options": options,
        "modes": {
            each.mode: {
                "by_length": {bucket: asdict(summary) for bucket, summary in by_length(each.results).items()},
                "items": [asdict(result) for result in each.results],
            }
            for each in runs
        },
    }


# --------------------------------------------------------------------------------------------------------- arguments


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="infill.py",
        description=(__doc__ or "").splitlines()[0],
        epilog="\n".join((__doc__ or "").splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    out.add_argument("file", metavar="FILE", type=Path, help="tasks: .jsonl or .jsonl.gz")
    lengths = out.add_mutually_exclusive_group()
    lengths.add_argument("--gap", choices=(AUTO, KNOWN), default=AUTO, help="find the length (default), or hand it in")
    lengths.add_argument("--known-too", action="store_true", help="both, side by side")
    out.add_argument("--max-gap", type=int, metavar="N", help="the longest gap to try, in tokens")
    out.add_argument("--mode", choices=("auto", "raw", "chat"), help="how the file is put to the model")
    out.add_argument("--limit", type=positive, metavar="N", help="the first N tasks only")
    out.add_argument("--seed", type=int, default=0, metavar="N", help="of every item (0)")
    out.add_argument("--json", type=Path, metavar="OUT", help="write everything, item by item")
    out.add_argument("--debug", action="store_true", help="show an error's traceback")
    group = out.add_argument_group(
        "execution",
        "Runs code that a model wrote, as you, in a child process with limits on time and memory. That is no sandbox: "
        "it can read your files, and nothing is promised about the network. Use a container for what you do not trust.",
    )
    group.add_argument("--execute", action="store_true", help="run the items' tests, for pass@1")
    group.add_argument("--timeout", type=float, default=sandbox.Limits.seconds, metavar="S", help="of one program (10)")
    group.add_argument(
        "--memory", type=positive, default=1024, metavar="MB", help="address space of one program (1024)"
    )
    group = out.add_argument_group("sampling", "What is not given comes from the file, then from the released model.")
    for name, kind, text in SAMPLING:
        group.add_argument(flag(name), type=kind, metavar="N" if kind is int else "X", help=text)
    add_model_options(out)
    return out


def positive(text: str) -> int:
    """An argument that is an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def infill_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of DiffusionModel.infill, from the flags that were given."""
    names = ["max_gap", "mode", "seed", *(name for name, _, _ in SAMPLING)]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def benchmark(args: argparse.Namespace) -> None:
    """Reads, runs, reports."""
    limits = None
    if args.execute:
        sandbox.check_available()
        limits = sandbox.Limits(args.timeout, args.timeout, args.memory * 10**6)
        print("warning: --execute runs code that the model writes, on this machine, as you", file=sys.stderr)
    file = read_items(args.file, args.limit)
    print(f"{file.path.name}: {len(file.items)} tasks in the format of {file.format}", file=sys.stderr)
    modes = [KNOWN, AUTO] if args.known_too else [args.gap]
    options = infill_options(args)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with open_model(args) as model, Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("filling", total=len(file.items) * len(modes))
        runs = run(
            model, file.items, modes, options=options, limits=limits, progress=lambda: bar.update(task, advance=1)
        )
    if not runs[0].results:
        raise KeyboardInterrupt
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    for each in runs:
        out.print(table(each))
    if args.known_too:
        out.print(comparison(*runs))
    if args.json:
        written = json.dumps(report(file, args.model, options, runs), indent=2, ensure_ascii=False, allow_nan=False)
        args.json.write_text(written + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes as those of the command `pydiffgguf`."""
    args = parser().parse_args(argv)
    try:
        benchmark(args)
    except KeyboardInterrupt:
        return 130
    except (DiffGGUFError, ItemFileError, OSError, ValueError, TypeError) as error:
        if args.debug:
            raise
        print(f"infill.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
