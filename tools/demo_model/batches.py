"""Training batches: every example is a prefix for the encoder, a canvas for the decoder, and which rows are free.

One batch holds prefixes of one length, so nothing is padded on the left and no mask is needed.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from model import CANVAS, EOS, PAD
from tasks import (
    PYTHON,
    STORIES,
    SUDOKU_HEADER,
    Question,
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


@dataclass
class Batch:
    """One batch; every prefix has the same length.

    kind names the task; prefix [B, P] int64; target [B, C] int64; free [B, C] bool: the rows that noise may touch;
    pinned [B] bool: the examples whose other rows are treated as pinned (one-hot in self-conditioning).
    """

    kind: str
    prefix: torch.Tensor
    target: torch.Tensor
    free: torch.Tensor
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
    """An endless source of batches for one rank; `budget` is the number of tokens (prefix + canvas) of a
    batch, `drill` the share of copying drills among questions."""

    def __init__(self, tokenizer: Path, seed: int, budget: int, drill: float) -> None:
        self.rng = Random(seed)
        self.tok = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self.budget = budget
        self.drill = drill
        self.puzzles = [sudoku(self.rng, "train") for _ in range(3000)]
        self.chats: dict[int, list[tuple[list[int], list[int]]]] = defaultdict(list)
        self.header = self.ids("<bos>" + SUDOKU_HEADER)

    def ids(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens recognised, no bos added."""
        return self.tok.encode(text, add_special_tokens=False).ids

    def puzzle(self) -> Sudoku:
        """A training puzzle: one of the pool, augmented, never one of the held-out split."""
        while True:
            s = augment(self.rng.choice(self.puzzles), self.rng)
            if not held_out(s.puzzle):
                return s

    def canvas(self, answer: list[int], length: int) -> list[int]:
        """`answer` cut or filled with pad to `length` rows."""
        return (answer + [PAD] * length)[:length]

    def pack(self, kind: str, rows: list[tuple[list[int], list[int], list[int], bool]]) -> Batch:
        """Tensors from (prefix, target, free, pinned) rows."""
        p, t, f, k = zip(*rows, strict=True)
        return Batch(kind, torch.tensor(p), torch.tensor(t), torch.tensor(f, dtype=torch.bool), torch.tensor(k))

    def size(self, prefix: int, canvas: int) -> int:
        """Examples that fit the budget."""
        return max(4, self.budget // (prefix + canvas))

    def sudoku_chat(self, length: int) -> Batch:
        """Puzzle in the user's turn, solved grid on the canvas."""
        rows = []
        while True:
            s = self.puzzle()
            p = self.ids("<bos>" + turn(sudoku_prompt(s)))
            rows.append((p, self.canvas(self.ids(grid_text(s.solution) + "<turn|>"), length), [1] * length, False))
            if len(rows) >= self.size(len(p), length):
                return self.pack("sudoku_chat", rows)

    def sudoku_raw(self, length: int) -> Batch:
        """The solved grid as a document whose blanks are free; a third leaves the rows after the grid free too."""
        rows = []
        for _ in range(self.size(len(self.header), length)):
            s = self.puzzle()
            grid = self.ids(grid_text(s.solution) + "\n")
            target = self.canvas([*grid, EOS], length)
            blanks = self.ids(grid_text(s.puzzle) + "\n")
            tail = int(self.rng.random() < 0.35)
            free = [int(a != b) for a, b in zip(grid, blanks, strict=True)] + [tail] * (length - len(grid))
            rows.append((self.header, target, free, True))
        return self.pack("sudoku_raw", rows)

    def chat(self, length: int) -> Batch:
        """One-answer questions; some after an earlier exchange, some with the thought channel switched on."""
        while True:
            text = ""
            q: Question = question(self.rng, "train", self.drill)
            if self.rng.random() < 0.12:
                before = question(self.rng, "train")
                text = turn(before.prompt) + before.answer + "<turn|>\n"
            if self.rng.random() < 0.08:
                prompt = self.ids("<bos>" + THINK_SYSTEM + text + turn(q.prompt))
                answer = self.ids(f"<|channel>thought\n{q.thought}<channel|>{q.answer}<turn|>")
            else:
                prompt = self.ids("<bos>" + text + turn(q.prompt))
                answer = self.ids(q.answer + "<turn|>")
            bucket = self.chats[len(prompt)]
            bucket.append((prompt, answer))
            if len(bucket) >= self.size(len(prompt), length):
                rows = [(p, self.canvas(a, length), [1] * length, False) for p, a in bucket]
                self.chats[len(prompt)] = []
                return self.pack("chat", rows)

    def text(self) -> list[int]:
        """A whole training document, ended by eos."""
        return [*self.ids(document(self.rng, "train", STORIES if self.rng.random() < 0.45 else PYTHON)[1]), EOS]

    def documents(self, length: int) -> Batch:
        """Stories and Python, cut at random; in most examples one span alone is free, else the whole canvas.

        Where the prefix is to be longer than the text before the cut, the end of another document (or, one time in
        three, of the same: a far suffix that is quoted) stands before it.
        """
        r = self.rng
        p = 1 if r.random() < 0.4 else r.randint(2, 80)
        rows = []
        for _ in range(self.size(p, length)):
            doc = self.text()
            room = min(p - 1, len(doc) - 4)
            cut = room if r.random() < 0.6 else r.randint(0, room)
            before: list[int] = []
            while len(before) < p - 1 - cut:
                other = doc if r.random() < 0.33 else self.text()
                before = [*other[:-1], *self.ids("\n"), *before]
            prefix = [2, *before[len(before) - (p - 1 - cut) :], *doc[:cut]]
            rest = doc[cut:]
            target = self.canvas(rest, length)
            inside = min(len(rest), length)
            if r.random() < 0.85:
                n = min(r.randint(1, 8) if r.random() < 0.4 else r.randint(1, 34), inside)
                a = r.randint(0, inside - n)
                tail = int(r.random() < 0.3)
                free = [int(a <= i < a + n or (i >= inside and tail)) for i in range(length)]
                rows.append((prefix, target, free, True))
            else:
                rows.append((prefix, target, [1] * length, False))
        return self.pack("documents", rows)

    def draw(self, group: str, share: tuple[float, float]) -> Batch:
        """A batch of group "grid" or "text"; `share` is the probability of the chat form and of a short canvas."""
        r = self.rng
        short = r.random() < share[1]
        length = r.choice([24, 32]) if short else CANVAS
        if group == "grid":
            return self.sudoku_chat(length) if r.random() < share[0] else self.sudoku_raw(length)
        if r.random() < share[0]:
            return self.chat(length)
        return self.documents(r.choice([32, 48]) if short else CANVAS)
