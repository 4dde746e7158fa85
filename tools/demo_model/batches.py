"""Training batches: every example is a document for the encoder, and a canvas that follows its first tokens.

Examples of one batch differ in everything but two lengths, to which they are filled up: the document's and the
canvas'. The encoder learns to continue the whole document; the canvas sees only the part before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from model import BOS, EOS, PAD
from tasks import (
    ENGLISH,
    LONG_ENGLISH,
    LONG_PYTHON,
    PYTHON,
    SUDOKU_HEADER,
    Sudoku,
    document,
    grid_text,
    held_out,
    question,
    sudoku,
    sudoku_prompt,
)
from tokenizers import Tokenizer

THINK_SYSTEM = "<|turn>system\n<|think|><turn|>\n"
KINDS = ("sudoku_chat", "sudoku_pinned", "question", "english", "python")
# What stands between the quoted end of a document and the text before the gap.
JOINT = "\n\n"


@dataclass
class Example:
    """One document of ids and the canvas at its position `start`.

    target: the canvas' true ids, of the canvas' length; free: the rows that noise may touch, one byte each;
    pinned: the other rows are one-hot in self-conditioning.
    """

    kind: str
    document: list[int]
    start: int
    target: list[int]
    free: list[int]
    pinned: bool


@dataclass
class Batch:
    """Examples side by side: document [B, E], target and free [B, C], the rest [B]."""

    kind: torch.Tensor
    document: torch.Tensor
    tokens: torch.Tensor
    start: torch.Tensor
    target: torch.Tensor
    free: torch.Tensor
    length: torch.Tensor
    pinned: torch.Tensor


def turn(prompt: str) -> str:
    """A user turn and the opening of the model's, as the chat template writes them (without bos)."""
    return f"<|turn>user\n{prompt}<turn|>\n<|turn>model\n"


def augment(s: Sudoku, rng: Random) -> Sudoku:
    """The puzzle under a random relabelling of digits, transposition, and swaps of bands, rows, stacks, columns."""
    label = dict(zip("1234", rng.sample("1234", 4), strict=True)) | {".": "."}

    def order() -> list[int]:
        bands = [[0, 1], [2, 3]]
        rng.shuffle(bands)
        for b in bands:
            rng.shuffle(b)
        return bands[0] + bands[1]

    rows, cols, flip = order(), order(), rng.random() < 0.5
    where = [(cols[j] * 4 + rows[i]) if flip else (rows[i] * 4 + cols[j]) for i in range(4) for j in range(4)]
    return Sudoku("".join(label[s.puzzle[k]] for k in where), "".join(label[s.solution[k]] for k in where))


class Batches:
    """An endless source of batches; `budget` is the number of tokens (documents + canvases) of a batch."""

    def __init__(self, tokenizer: Path, seed: int, budget: int) -> None:
        self.rng = Random(seed)
        self.tok = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self.budget = budget
        self.puzzles = [sudoku(self.rng, "train") for _ in range(3000)]
        self.header = self.ids("<bos>" + SUDOKU_HEADER)
        self.joint = self.ids(JOINT)

    def ids(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens recognised, no bos added."""
        return self.tok.encode(text, add_special_tokens=False).ids

    def puzzle(self) -> Sudoku:
        """A training puzzle: one of the pool, augmented, never one of the held-out split."""
        while True:
            s = augment(self.rng.choice(self.puzzles), self.rng)
            if not held_out(s.puzzle):
                return s

    def answer(self, kind: str, prompt: list[int], answer: list[int], rows: int) -> Example:
        """A canvas that holds an answer, all of it free, filled up with pad."""
        target = (answer + [PAD] * rows)[:rows]
        return Example(kind, prompt + answer, len(prompt), target, [1] * rows, False)

    def sudoku_chat(self, rows: int) -> Example:
        """Puzzle in the user's turn, solved grid on the canvas."""
        s = self.puzzle()
        prompt = self.ids("<bos>" + turn(sudoku_prompt(s)))
        return self.answer("sudoku_chat", prompt, self.ids(grid_text(s.solution) + "<turn|>"), rows)

    def sudoku_pinned(self, rows: int) -> Example:
        """The solved grid as a document whose blanks are free; a third leaves the rows after the grid free too."""
        s = self.puzzle()
        grid, blanks = self.ids(grid_text(s.solution) + "\n"), self.ids(grid_text(s.puzzle) + "\n")
        tail = int(self.rng.random() < 0.35)
        target = ([*grid, EOS] + [PAD] * rows)[:rows]
        free = [int(a != b) for a, b in zip(grid, blanks, strict=True)] + [tail] * (rows - len(grid))
        return Example("sudoku_pinned", [*self.header, *grid, EOS], len(self.header), target, free, True)

    def question(self, rows: int) -> Example:
        """One-answer questions; some after an earlier exchange, some with the thought channel switched on."""
        text, q = "", question(self.rng, "train")
        if self.rng.random() < 0.12:
            before = question(self.rng, "train")
            text = turn(before.prompt) + before.answer + "<turn|>\n"
        if self.rng.random() < 0.08:
            prompt = self.ids("<bos>" + THINK_SYSTEM + text + turn(q.prompt))
            answer = self.ids(f"<|channel>thought\n{q.thought}<channel|>{q.answer}<turn|>")
        else:
            prompt = self.ids("<bos>" + text + turn(q.prompt))
            answer = self.ids(q.answer + "<turn|>")
        return self.answer("question", prompt, answer, rows)

    def text(self, size: int, rows: int, longest: int) -> Example:
        """A document of at most `size` tokens with free spans of up to `longest` rows.

        Most have one span that begins the canvas, as infill has it; the canvas may end before the document, with its
        last token, with its end token, or with fill. The rest have spans inside the canvas, or a canvas free
        throughout. A long document's rest may stand quoted before its prefix.
        """
        r = self.rng
        english = r.random() < 0.5
        kind = "english" if english else "python"
        short, long = (ENGLISH, LONG_ENGLISH) if english else (PYTHON, LONG_PYTHON)
        while True:
            ids = [*self.ids(document(r, "train", long if size > 100 else short)[1]), EOS]
            if len(ids) < size:
                break
        n = len(ids)
        span = min(r.randint(1, min(8, longest)) if r.random() < 0.45 else r.randint(1, longest), n - 3, rows - 1)
        style = r.random()
        if style < 0.7:
            cut = r.randint(1, n - 1 - span)
        elif style < 0.88:
            cut = r.randint(0, n - 2)
        else:
            cut = 0 if r.random() < 0.5 else r.randint(0, n - 2)
        rest = ids[cut:]
        # The length of this canvas: mostly all rows, else anything, the document's end preferred.
        length = rows
        if r.random() < 0.5:
            length = r.randint(min(max(8, span + 1), rows), rows)
        if len(rest) < length and r.random() < 0.4:
            length = max(len(rest) - r.randint(0, 1), min(8, rows))
        target = (rest + [PAD] * length)[:length]
        inside = min(len(rest), length)
        free = [0] * length
        if style < 0.7:
            free[:span] = [1] * span
        elif style < 0.88:
            for _ in range(r.choice([1, 2, 2, 3])):
                k = min(r.randint(1, max(1, span // 2)), inside)
                a = r.randint(0, inside - k)
                free[a : a + k] = [1] * k
        else:
            free = [1] * length
        if inside < length and r.random() < 0.15:
            free[inside:] = [1] * (length - inside)
        prefix = [BOS]
        far = rest[length:-1]
        if far and r.random() < 0.75 and len(far) + len(self.joint) + n < size:
            prefix += far + self.joint
        return Example(kind, prefix + ids, len(prefix) + cut, target, free, style < 0.88)

    def draw(self, size: int, rows: int, longest: int, texts: float) -> Batch:
        """A batch of documents of `size` and canvases of `rows` tokens, `texts` of them English and Python."""
        count = max(4, self.budget // (size + rows))
        out: list[Example] = []
        while len(out) < count:
            x = self.rng.random()
            if x < texts or size > 100:
                out.append(self.text(size, rows, longest))
            else:
                some = self.rng.choice([self.sudoku_chat, self.sudoku_pinned, self.sudoku_pinned, self.question])
                e = some(rows)
                if len(e.document) <= size:
                    out.append(e)
        return pack(out, size, rows)


def pack(examples: list[Example], size: int, rows: int) -> Batch:
    """Tensors from examples, filled up with pad."""
    doc = np.full((len(examples), size), PAD)
    target = np.full((len(examples), rows), PAD)
    free = np.zeros((len(examples), rows), bool)
    for i, e in enumerate(examples):
        doc[i, : len(e.document)] = e.document[:size]
        target[i, : len(e.target)] = e.target
        free[i, : len(e.free)] = e.free
    return Batch(
        torch.tensor([KINDS.index(e.kind) if e.kind in KINDS else len(KINDS) for e in examples]),
        torch.from_numpy(doc),
        torch.tensor([min(len(e.document), size) for e in examples]),
        torch.tensor([e.start for e in examples]),
        torch.from_numpy(target),
        torch.from_numpy(free),
        torch.tensor([len(e.target) for e in examples]),
        torch.tensor([e.pinned for e in examples]),
    )
