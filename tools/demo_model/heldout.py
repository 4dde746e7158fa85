"""Write the held-out tasks: one JSON object a line.

    python heldout.py --tokenizer DIR --out ../../tests/data/demo_tasks.jsonl [--seed 2026]

kind        fields beside kind and id
sudoku_chat     prompt (a user turn), answer (four lines of four digits)
sudoku_pinned   prefix, grid (as answer, `.` where a cell is free), answer; both end in a newline
question        form, prompt, answer
infill          language ("english", "python"), form (the template), prefix, gap, suffix, gap_tokens, suffix_tokens

An infill gap begins and ends at token joints: encoding prefix, gap and suffix apart gives the ids of the whole text.
No other text of any template, with a middle of any length, fits its prefix and suffix (`tasks.determined`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

from batches import JOINT, Example
from model import BOS, CANVAS, EOS, PAD
from tasks import (
    ENGLISH,
    LONG_ENGLISH,
    LONG_PYTHON,
    PYTHON,
    SUDOKU_HEADER,
    Template,
    determined,
    document,
    grid_text,
    question,
    sudoku,
    sudoku_prompt,
)
from tokenizers import Tokenizer

LENGTHS = [(1, 2), (3, 4), (5, 8), (9, 16), (17, 32)]


def gap(
    rng: Random, tok: Tokenizer, templates: list[Template], lengths: tuple[int, int], far: bool = False
) -> dict[str, Any]:
    """One determined gap of `lengths` (inclusive range, tokens) in a held-out document.

    far: more than a canvas of tokens follows the gap.
    """
    while True:
        form, text = document(rng, "test", templates)
        enc = tok.encode(text, add_special_tokens=False)
        n = rng.randint(*lengths)
        last = len(enc.ids) - n - (CANVAS + 1 if far else 1)
        if last < 1:
            continue
        a = rng.randint(1, last)
        start, end = enc.offsets[a][0], enc.offsets[a + n - 1][1]
        prefix, middle, suffix = text[:start], text[start:end], text[end:]
        parts = [tok.encode(s, add_special_tokens=False).ids for s in (prefix, middle, suffix)]
        if [i for p in parts for i in p] != enc.ids or len(parts[1]) != n or not determined(prefix, middle, suffix):
            continue
        return {
            "form": form,
            "prefix": prefix,
            "gap": middle,
            "suffix": suffix,
            "gap_tokens": n,
            "suffix_tokens": len(parts[2]),
        }


def gap_example(tok: Tokenizer, task: dict[str, Any]) -> Example:
    """An infill task as training has it: gap first on the canvas, then suffix, end token and pad.

    What does not fit of the suffix is quoted before the prefix.
    """
    prefix, middle, suffix = (tok.encode(task[k], add_special_tokens=False).ids for k in ("prefix", "gap", "suffix"))
    room = CANVAS - len(middle)
    quoted = [*suffix[room:], *tok.encode(JOINT, add_special_tokens=False).ids] if len(suffix) > room else []
    before = [BOS, *quoted, *prefix]
    target = [*middle, *suffix, EOS, *[PAD] * CANVAS][:CANVAS]
    free = [int(i < len(middle)) for i in range(CANVAS)]
    return Example("infill", [*before, *middle, *suffix, EOS], len(before), target, free, True)


def tasks(tok: Tokenizer, seed: int, each: int) -> list[dict[str, Any]]:
    """`each` tasks of every kind (English and Python count as two kinds); one gap in five is far from the end."""
    rng = Random(seed)
    out: list[dict[str, Any]] = []
    for _ in range(each):
        s = sudoku(rng, "test")
        out.append({"kind": "sudoku_chat", "prompt": sudoku_prompt(s), "answer": grid_text(s.solution)})
    for _ in range(each):
        s = sudoku(rng, "test")
        grid, answer = grid_text(s.puzzle) + "\n", grid_text(s.solution) + "\n"
        out.append({"kind": "sudoku_pinned", "prefix": SUDOKU_HEADER, "grid": grid, "answer": answer})
    asked: set[str] = set()
    while len(asked) < each:
        q = question(rng, "test")
        if q.prompt not in asked:
            asked.add(q.prompt)
            out.append({"kind": "question", "form": q.kind, "prompt": q.prompt, "answer": q.answer})
    for language, short, long in (("english", ENGLISH, LONG_ENGLISH), ("python", PYTHON, LONG_PYTHON)):
        for i in range(each):
            far = i // len(LENGTHS) % 5 == 4
            task = gap(rng, tok, long if far else short, LENGTHS[i % len(LENGTHS)], far)
            out.append({"kind": "infill", "language": language, **task})
    return [{"kind": t.pop("kind"), "id": i, **t} for i, t in enumerate(out)]


def main() -> None:
    """Write the file."""
    ap = argparse.ArgumentParser()
    ap.add_argument("--tokenizer", type=Path, required=True)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--seed", type=int, default=2026)
    ap.add_argument("--each", type=int, default=100)
    args = ap.parse_args()
    rows = tasks(Tokenizer.from_file(str(args.tokenizer / "tokenizer.json")), args.seed, args.each)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
