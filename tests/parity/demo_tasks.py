"""The bundled demo model on both sides, and its own held-out tasks (tests/data/demo_tasks.jsonl)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from reference import HandedNoise, Ids, Model, Sampling

from pydiffgguf import DiffusionModel

TASKS = Path(__file__).parents[1] / "data" / "demo_tasks.jsonl"


@dataclass(frozen=True)
class Demo:
    """The demo file twice, both with its dequantized tensors in float32: opened by this engine, and as transformers'
    model."""

    opened: DiffusionModel
    reference: Model

    @property
    def sampling(self) -> Sampling:
        """The file's own sampler values."""
        file = self.opened.sampling
        return Sampling(
            steps=file.steps,
            t_min=file.t_min,
            t_max=file.t_max,
            entropy_bound=file.entropy_bound,
            stability_threshold=file.stability_threshold,
            confidence_threshold=file.confidence_threshold,
        )

    def noise(self, seed: int) -> HandedNoise:
        return HandedNoise(seed, self.opened.config.canvas_length, self.opened.config.n_vocab)

    def chat_prompt(self, text: str) -> list[int]:
        """One user turn through the file's chat template, as token ids."""
        template = ImmutableSandboxedEnvironment().from_string(str(self.opened.metadata["tokenizer.chat_template"]))
        messages = [{"role": "user", "content": text}]
        return self.opened.tokenize(template.render(messages=messages, add_generation_prompt=True, bos_token="<bos>"))

    def answer(self, canvas: Ids) -> str:
        """The text of a finished canvas, up to its first end token."""
        tokens = canvas.tolist()
        end = next((i for i, token in enumerate(tokens) if token in self.opened.tokenizer.end_ids), len(tokens))
        return self.opened.detokenize(tokens[:end]).strip()

    def pinned_grid(self, grid: str, answer: str) -> tuple[Ids, Ids]:
        """(pinned rows, solved canvas) of a Sudoku on the canvas: a row a character, dots free, then the end token and
        padding, which are pinned too."""
        tokens = self.opened.tokenize(answer)
        assert len(tokens) == len(grid), "a cell of the grid is not one token"
        metadata = self.opened.metadata
        n = self.opened.config.canvas_length - len(tokens) - 1
        tail = [metadata["tokenizer.ggml.eos_token_id"], *[metadata["tokenizer.ggml.padding_token_id"]] * n]
        solved = np.array([*tokens, *tail], np.int32)
        free = np.array([*(cell == "." for cell in grid), *[False] * (n + 1)])
        return np.where(free, -1, solved).astype(np.int32), solved

    def gap(self, task: dict[str, Any]) -> tuple[list[int], Ids, Ids]:
        """(prompt, pinned rows, right canvas) of an infill task: the gap first, then suffix, end token and padding;
        what does not fit of the suffix is quoted before the prefix, an empty line between."""
        prefix, gap, suffix = (self.opened.tokenize(task[key]) for key in ("prefix", "gap", "suffix"))
        rows = self.opened.config.canvas_length
        if far := suffix[rows - len(gap) :]:
            prefix = [*far, *self.opened.tokenize("\n\n"), *prefix]
        metadata = self.opened.metadata
        padding = [metadata["tokenizer.ggml.padding_token_id"]] * rows
        whole = [*gap, *suffix, metadata["tokenizer.ggml.eos_token_id"], *padding][:rows]
        right = np.array(whole, np.int32)
        free = np.arange(rows) < len(gap)
        return [self.opened.tokenizer.bos_id, *prefix], np.where(free, -1, right).astype(np.int32), right


def tasks(kind: str) -> list[dict[str, Any]]:
    """All held-out tasks of a kind, in the file's order."""
    lines = [json.loads(line) for line in TASKS.read_text(encoding="utf-8").splitlines()]
    return [task for task in lines if task["kind"] == kind]
