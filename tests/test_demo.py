"""The command demo: right answers, and a check that knows them."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from pseudo_terminal import Pty

from pydiffgguf import DiffusionModel, demo_model_path
from pydiffgguf.cli import demo


def test_the_demo_shows_right_answers() -> None:
    """Without arguments or network, in seconds: a question, a gap in a program, a Sudoku with its givens."""
    process = subprocess.run(
        [sys.executable, "-m", "pydiffgguf", "demo"], capture_output=True, text=True, timeout=120, check=False
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.endswith("All answers are right.\n")
    assert demo.QUESTION in process.stdout
    assert f"\n{demo.ANSWER}\n" in process.stdout
    assert f"\n> {demo.BEFORE_GAP}...{demo.BEHIND_GAP}" in process.stdout
    grids = re.findall(r"(?:^[1-4]{4}\n){4}", process.stdout, re.MULTILINE)
    assert len(grids) == 1
    assert demo.is_solution(grids[0], demo.PUZZLE)


def test_the_demo_on_a_terminal() -> None:
    """The canvas is drawn for all three, the solved grid stays, the cursor is back."""
    child = Pty("demo")
    assert child.wait() == 0
    assert child.shown.count("\x1b[?25l") == child.shown.count("\x1b[?25h") == 3
    assert "10 free cells" in child.shown


def test_the_program_of_the_demo_runs() -> None:
    """With the right text in the gap, whose length is in reach."""
    exec(demo.BEFORE_GAP + demo.GAP + demo.BEHIND_GAP, {})
    with DiffusionModel(demo_model_path()) as model:
        assert len(model.tokenize(demo.GAP)) <= demo.LONGEST_GAP


def test_the_demo_puzzle_has_one_solution() -> None:
    """And the check accepts it alone."""
    from itertools import permutations, product

    rows = ["".join(row) for row in permutations("1234")]
    fitting = [[row for row in rows if re.fullmatch(line, row)] for line in demo.PUZZLE.split()]
    grids = ("\n".join(four) + "\n" for four in product(*fitting))
    assert sum(demo.is_solution(grid, demo.PUZZLE) for grid in grids) == 1


@pytest.mark.parametrize(
    "grid", ["", "1234\n3412\n2143\n4321", "1234\n3412\n2143\n4312\n", "1234\n1234\n1234\n1234\n", "12345\n"]
)
def test_other_grids_are_not_solutions(grid: str) -> None:
    """Too short, a wrong last row, wrong columns."""
    assert demo.is_solution("1234\n3412\n2143\n4321\n", "1...\n....\n....\n...1\n")
    assert not demo.is_solution("1234\n3412\n2143\n4321\n", "2...\n....\n....\n...1\n")
    assert not demo.is_solution(grid, "....\n....\n....\n....\n")
