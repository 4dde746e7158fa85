"""The demo model as it ships (Q8_0, its own sampler values, built-in draws) on its held-out tasks.

tests/parity/test_demo_tasks.py holds the same tasks to transformers, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pydiffgguf import DiffusionModel, demo_model_path

TASKS = Path(__file__).parent / "data" / "demo_tasks.jsonl"


def tasks(kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in TASKS.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["kind"] == kind]


@pytest.fixture(scope="module")
def model() -> Iterator[DiffusionModel]:
    with DiffusionModel(demo_model_path()) as model:
        yield model


def test_the_file_stays_small() -> None:
    assert demo_model_path().stat().st_size < 4_000_000


@pytest.mark.parametrize("kind", ["sudoku_chat", "question"])
def test_95_of_100_prompts_are_answered_exactly(model: DiffusionModel, kind: str) -> None:
    rows = tasks(kind)
    assert len({row["prompt"] for row in rows}) == 100
    right = sum(model.generate(row["prompt"], seed=row["id"]).text.strip() == row["answer"] for row in rows)
    assert right >= 95


def test_95_of_100_grids_are_solved_and_no_given_is_changed(model: DiffusionModel) -> None:
    right = changed = 0
    with model.session() as session:
        for row in tasks("sudoku_pinned"):
            grid = model.tokenize(row["grid"])
            assert len(grid) == len(row["grid"])  # a cell is a token
            pinned = np.full(model.config.canvas_length, model.tokenizer.pad_id, np.int32)
            pinned[: len(grid)] = [-1 if cell == "." else id_ for cell, id_ in zip(row["grid"], grid, strict=True)]
            pinned[len(grid)] = model.tokenizer.eos_id
            session.reset()
            session.encode(model.tokenize(row["prefix"], add_bos=True))
            tokens = session.run_canvas(seed=row["id"], pinned=pinned).tokens
            changed += int((tokens != pinned)[pinned >= 0].sum())
            right += model.detokenize(tokens[: len(grid)].tolist()) == row["answer"]
    assert changed == 0
    assert right >= 95
