"""The command ``demo``: the bundled toy answers a question, fills a gap in a program and solves a Sudoku, on the
canvas, and is checked."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from pydiffgguf._text import escape
from pydiffgguf.cli.talk import follow, make_output
from pydiffgguf.cli.terminal import LiveCanvas, Output, SilentOutput, infill_summary, is_live_terminal, summary
from pydiffgguf.generate import DenoiseStep
from pydiffgguf.hub import demo_model_path
from pydiffgguf.model import DiffusionModel

if TYPE_CHECKING:
    from pydiffgguf._binding.records import RawStep

__all__ = ["run_demo"]

SEED = 1
#: Asked of the model in its own words, and not in its training data (tools/demo_model).
QUESTION = "Put in order: 9 7 1."
ANSWER = "1 7 9"
#: A program with a gap whose length is not told, in the toy's own words (the template "operator" of tools/demo_model;
#: not in its training data), put to it as a document.
BEFORE_GAP = 'def mul_width_price(width, price):\n    """Multiply width and price."""\n    return '
GAP = "width * price"
BEHIND_GAP = "\n\nassert mul_width_price(5, 8) == 5 * 8\n"
LONGEST_GAP = 16
#: Each row, column and quarter of the only solution holds 1 to 4; dots are for the model to fill.
PUZZLE = "4..2\n....\n2.41\n..2.\n"
HEADER = "Sudoku:\n"
#: Least time that a step stays on a terminal: the toy's own steps take milliseconds.
PACE_S = 0.15


def run_demo(live: bool) -> int:
    """Shows all three; returns 0 when the answers are right, else 1.

    Args:
        live: draw the canvas, where stdout is a terminal that can show it.
    """
    live = live and is_live_terminal(sys.stdout)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with DiffusionModel(demo_model_path(), n_threads=1) as model:
        config = model.config
        console.print(
            f"A toy DiffusionGemma: {config.n_layer} layers, {config.n_expert} experts, canvas {config.canvas_length}."
            + (" Accepted tokens are plain, uncertain ones dim, fixed ones coloured." if live else ""),
            style="dim",
        )
        right = [_question(model, console, live), _gap(model, console, live), _sudoku(model, console, live)]
    if not all(right):
        print("pydiffgguf: error: an answer of the demo model is wrong", file=sys.stderr)
        return 1
    console.print("All answers are right.", style="green")
    return 0


def _question(model: DiffusionModel, console: Console, live: bool) -> bool:
    console.print(f"\n> {QUESTION}", style="bold")
    result = follow(model.stream(QUESTION, seed=SEED), make_output(model, live, pace_s=PACE_S))
    console.print(summary(result), style="dim")
    return result.text.strip() == ANSWER


def _gap(model: DiffusionModel, console: Console, live: bool) -> bool:
    """The middle of a program, from the text before and behind it."""
    console.print(Text(f"\n> {BEFORE_GAP}...{BEHIND_GAP}".rstrip("\n"), "bold"))
    stream = model.stream_infill(BEFORE_GAP, BEHIND_GAP, max_gap=LONGEST_GAP, seed=SEED, mode="raw")
    output = make_output(model, live, prefix=BEFORE_GAP, pace_s=PACE_S)
    result = follow(stream, output, lambda infill: infill.text)
    console.print(infill_summary([result]), style="dim")
    return result.text == GAP


def _sudoku(model: DiffusionModel, console: Console, live: bool) -> bool:
    """The grid as a document whose givens are pinned rows of the canvas."""
    tokenizer = model.tokenizer
    console.print(f"\n> {HEADER}{PUZZLE}".rstrip("\n"), style="bold")
    grid = model.tokenize(PUZZLE)
    blank = np.array([cell == "." for cell in PUZZLE])
    rows = np.full(model.config.canvas_length, 0 if tokenizer.pad_id is None else tokenizer.pad_id, np.int32)
    rows[: len(grid)] = np.where(blank, -1, grid)  # a digit and a newline are one token each
    rows[len(grid)] = min(tokenizer.end_ids)
    pinned = rows >= 0
    began = time.monotonic()
    drawing: Output = LiveCanvas(console, tokenizer, pace_s=PACE_S, keep_last=True) if live else SilentOutput()
    with model.session() as session, drawing as output:
        session.encode(model.tokenize(HEADER, add_bos=True))

        def show(step: RawStep) -> None:
            output.step(
                DenoiseStep(
                    canvas=0,
                    step=step.step,
                    total_steps=step.steps,
                    tokens=step.argmax,
                    accepted=step.accepted,
                    entropy=step.entropy,
                    text="",
                    elapsed_s=time.monotonic() - began,
                    pinned=pinned,
                )
            )

        canvas = session.run_canvas(seed=SEED, pinned=rows, on_step=show)
    solved = tokenizer.decode(canvas.tokens[: len(grid)].tolist())
    if not live:
        console.print(Text(escape(solved)), end="")
    free = int((~pinned).sum())
    console.print(f"{free} free cells in {canvas.steps} steps, the givens pinned", style="dim")
    return bool((canvas.tokens[pinned] == rows[pinned]).all()) and is_solution(solved, PUZZLE)


def is_solution(grid: str, puzzle: str) -> bool:
    """Whether a 4x4 grid agrees with a puzzle and each row, column and quarter holds 1 to 4."""
    lines = grid.split()
    if [len(line) for line in lines] != [4] * 4 or len(grid) != len(puzzle):
        return False
    columns = ["".join(column) for column in zip(*lines, strict=True)]
    quarters = [
        lines[row][column : column + 2] + lines[row + 1][column : column + 2] for row in (0, 2) for column in (0, 2)
    ]
    return all(sorted(part) == list("1234") for part in (*lines, *columns, *quarters)) and all(
        given in (".", cell) for given, cell in zip(puzzle, grid, strict=True)
    )
