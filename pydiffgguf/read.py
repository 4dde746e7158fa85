"""Typed questions read off the canvas: no text is written, the probabilities of given labels are.

The questions are in the prompt, the answers' labels are free rows of a canvas whose other rows are pinned, and one
denoise pass says how probable each label is. `choose` reads options of several tokens in the same way, with a pass for
each length that they have.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pydiffgguf._arguments import int32, integer, real, seed_of
from pydiffgguf._binding import functions
from pydiffgguf._binding.records import Float64Array
from pydiffgguf._log import logger
from pydiffgguf.engine.call import drain
from pydiffgguf.engine.core import Engine
from pydiffgguf.engine.options import Cancel
from pydiffgguf.errors import ContextOverflowError, UnsupportedError
from pydiffgguf.generate import Stats, encode_prompt, stream_ids
from pydiffgguf.session import Session
from pydiffgguf.text.tokenizer import Tokenizer

__all__ = ["Answer", "Reading", "log_probabilities", "read"]

#: With more entropy in a slot than this, in nats, more draws are made: this many in all.
UNSURE = 0.1
DRAWS = 4
MOST_QUESTIONS = 256
MOST_CHOICES = 255
MOST_LEVELS = 10

#: Words that the API has for the types.
TYPES = {"noul": "noul", "boolean": "noul", "choice": "choice", "score": "score", "number": "number"}


@dataclass(frozen=True)
class Answer:
    """`value`: of a noul the probability of yes; of a choice its most probable name; of a score the mean level, from 0;
    of a number the mean. `probabilities`: by label: "yes" and "no", the names, the levels from "0", the numbers that
    were offered. `confidence`: 1 - H / ln K, H being the entropy of K labels; 1 where there is one label.
    `standard_error`: of the most probable label's probability, over `draws`; None with one draw. `criteria`: what was
    asked."""

    type: str
    value: float | str
    probabilities: dict[str, float]
    confidence: float
    standard_error: float | None
    draws: int


class Reading(dict[str, Answer]):
    """Question -> answer, in the order asked, with what it cost in `stats`."""

    def __init__(self, answers: Mapping[str, Answer], stats: Stats) -> None:
        super().__init__(answers)
        self.stats = stats


@dataclass(frozen=True)
class _Question:
    id: str
    type: str
    instructions: str
    labels: list[str]  # what the answer's probabilities are called
    meanings: list[str]
    values: list[float]
    depends_on: list[str] = field(default_factory=list)


def log_probabilities(
    session: Session, pinned: Sequence[int], rows: Sequence[int], seed: int, draw: int, stats: Stats, steps: int = 1
) -> Float64Array:
    """Natural logs of the probabilities of all ids on some rows, float64 [len(rows), V], at temperature 1, after a
    denoise pass over a canvas whose free rows (-1) hold the noise of a seed and a draw.

    Args:
        steps: with more than one, the canvas is denoised before, by one step less.
    """
    began = time.monotonic()
    n = len(pinned)
    fixed = np.asarray(pinned, dtype=np.int32)
    canvas = np.where(fixed >= 0, fixed, functions.noise_canvas(seed, draw, n, session.config.n_vocab))
    if steps > 1:
        run = session.run_canvas(
            seed=seed, canvas_index=draw, pinned=fixed, n_rows=n, max_steps=steps - 1, trace=True, canvas=canvas
        )
        canvas = run.trace[-1].canvas
    z = session.denoise(canvas.astype(np.int32), n_rows=n, rows=list(rows)).astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    z -= np.log(np.exp(z).sum(axis=-1, keepdims=True))
    stats.denoise_s += time.monotonic() - began
    stats.steps.append(steps)
    made: Float64Array = z
    return made


def read(
    engine: Engine,
    state: object,
    questions: Mapping[str, Mapping[str, Any]],
    *,
    steps: int,
    samples: int | None,
    sequential: bool,
    think: int,
    seed: int | None,
    cancel: Cancel | None,
    lora: Mapping[str, float] | None,
) -> Reading:
    """See `DiffusionModel.read`."""
    integer("steps", steps, 1, 64)
    if samples is not None:
        integer("samples", samples, 1, 1024)
    int32("think", think)
    seed = seed_of(seed)
    call = engine.call({"cancel": cancel, "lora": lora})
    asked = _check(questions)
    shown = _shown(state)
    labels = _Labels(engine.tokenizer)
    prompt = _prompt(engine, asked, labels, shown, think, seed, cancel, lora)
    stats = Stats(seed=seed, prompt_tokens=len(prompt), lora=dict(call.adapters.names))
    answers: dict[str, Answer] = {}
    with engine.pool.take(prompt, call) as session:
        for _ in encode_prompt(session, prompt, stats, call):
            pass
        for group in _groups(asked, sequential):
            for part in _canvases(engine.tokenizer, asked, group, answers, labels, session.config.canvas_length):
                call.check_cancelled()
                answers |= _read_canvas(session, part, seed, steps, samples, stats)
    logger.debug("read: %s", stats)
    return Reading({question.id: answers[question.id] for question in asked}, stats)


# ---------------------------------------------------------------------------------------------------- the questions


def _check(questions: object) -> list[_Question]:
    if not isinstance(questions, Mapping):
        raise TypeError(f"questions must be a dict of questions by id, not {type(questions).__name__}")
    if not 1 <= len(questions) <= MOST_QUESTIONS:
        raise ValueError(f"there are {len(questions)} questions: it must be from 1 to {MOST_QUESTIONS}")
    checked = [_question(id_, question) for id_, question in questions.items()]
    known = {question.id for question in checked}
    for question in checked:
        for other in question.depends_on:
            if other not in known or other == question.id:
                raise ValueError(f"questions[{question.id!r}].depends_on names {other!r}, which is no other question")
    return checked


def _question(id_: object, question: object) -> _Question:
    path = f"questions[{id_!r}]"
    if not isinstance(id_, str):
        raise TypeError(f"{path}: an id must be a str, not {type(id_).__name__}")
    if not isinstance(question, Mapping):
        raise TypeError(f"{path} must be a dict, not {type(question).__name__}")
    unknown = sorted(set(question) - {"type", "instructions", "criteria", "depends_on", "minimum", "maximum"})
    if unknown:
        raise ValueError(f"{path} has an unknown key {unknown[0]!r}")
    kind = TYPES.get(question.get("type"))  # type: ignore[arg-type]
    if kind is None:
        raise ValueError(f"{path}.type is {question.get('type')!r:.60}: it must be one of {', '.join(TYPES)}")
    instructions = _text(question.get("instructions"))
    depends_on = question.get("depends_on") or []
    if isinstance(depends_on, str) or not isinstance(depends_on, Sequence):
        raise TypeError(f"{path}.depends_on must be a list of ids, not {type(depends_on).__name__}")
    names, meanings, values = _options(path, kind, question)
    return _Question(id_, kind, instructions, names, meanings, values, list(depends_on))


def _options(path: str, kind: str, question: Mapping[str, Any]) -> tuple[list[str], list[str], list[float]]:
    """(labels, what they mean, their values)"""
    criteria = question.get("criteria")
    if kind == "noul":
        given = criteria if isinstance(criteria, Mapping) else {}
        if criteria is not None and not isinstance(criteria, Mapping):
            raise TypeError(f"{path}.criteria must be a dict with true and false, not {type(criteria).__name__}")
        meanings = [_text(given.get(key, given.get(bool(key == "true")))) for key in ("true", "false")]
        return ["yes", "no"], meanings, [1.0, 0.0]
    if kind == "number":
        low, high = real(f"{path}.minimum", question.get("minimum")), real(f"{path}.maximum", question.get("maximum"))
        if not low < high:
            raise ValueError(f"{path}.minimum is {low}: it must be below maximum, {high}")
        whole = low.is_integer() and high.is_integer()
        n = min(MOST_LEVELS, int(high - low) + 1) if whole else MOST_LEVELS
        values = [low + (high - low) * i / (n - 1) for i in range(n)]
        values = [float(round(value)) for value in values] if whole else values
        return [f"{value:g}" for value in values], [f"{value:g}" for value in values], values
    if kind == "choice":
        if isinstance(criteria, Sequence) and not isinstance(criteria, str):
            criteria = dict.fromkeys(criteria)
        if not isinstance(criteria, Mapping):
            raise TypeError(f"{path}.criteria must be a dict of descriptions by name, not {type(criteria).__name__}")
        if not 1 <= len(criteria) <= MOST_CHOICES:
            raise ValueError(f"{path} has {len(criteria)} choices: it must be from 1 to {MOST_CHOICES}")
        names = [str(name) for name in criteria]
        texts = [name if not _text(text) else f"{name}: {_text(text)}" for name, text in criteria.items()]
        return names, texts, [float(i) for i in range(len(names))]
    if not isinstance(criteria, Sequence) or isinstance(criteria, str):
        raise TypeError(f"{path}.criteria must be a list of levels, the lowest first, not {type(criteria).__name__}")
    if not 1 <= len(criteria) <= MOST_LEVELS:
        raise ValueError(f"{path} has {len(criteria)} levels: it must be from 1 to {MOST_LEVELS}")
    levels = [str(i) for i in range(len(criteria))]
    return levels, [_text(level) for level in criteria], [float(i) for i in range(len(levels))]


def _text(value: object) -> str:
    """Instructions and descriptions: text as it is, other values as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shown(state: object) -> str:
    if isinstance(state, str):
        return state
    if not isinstance(state, (Mapping, list, tuple)):
        raise TypeError(f"state must be a str or a JSON value, not {type(state).__name__}")
    return json.dumps(state, ensure_ascii=False)


class _Labels:
    """Single tokens for answers on the canvas, with their ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        letters = [chr(code) for code in (*range(65, 91), *range(97, 123))]
        pairs = (a + b for a in letters[:26] for b in letters[:26])
        single = [(text, self._id(text)) for text in (*letters, *pairs)]
        self._letters = [(text, id_) for text, id_ in single if id_ is not None]
        self._digits = [(text, self._id(text)) for text in "0123456789"]

    def _id(self, text: str) -> int | None:
        ids = self._tokenizer.encode(text, special=False)
        return ids[0] if len(ids) == 1 else None

    def of(self, question: _Question) -> list[tuple[str, int]]:
        """(text, id) of each label. Raises UnsupportedError where the vocabulary has too few single tokens."""
        n = len(question.labels)
        if question.type == "noul":
            words = [(text, self._id(text)) for text in ("yes", "no")]
            if all(id_ is not None for _, id_ in words):
                return [(text, id_) for text, id_ in words if id_ is not None]
        elif question.type in ("score", "number") and all(id_ is not None for _, id_ in self._digits):
            return [(text, id_) for text, id_ in self._digits if id_ is not None][:n]
        if n > len(self._letters):
            raise UnsupportedError(
                f"question {question.id!r}: this vocabulary has labels of one token for "
                f"{len(self._letters)} choices, not for {n}"
            )
        return self._letters[:n]


# -------------------------------------------------------------------------------------------------------- the prompt


def _prompt(
    engine: Engine,
    asked: Sequence[_Question],
    labels: _Labels,
    shown: str,
    think: int,
    seed: int,
    cancel: Cancel | None,
    lora: Mapping[str, float] | None,
) -> list[int]:
    lines = ["Answer each question about what follows with one of its labels, and nothing else."]
    for i, question in enumerate(asked, 1):
        lines += ["", f"q{i}: {question.instructions}".rstrip()]
        pairs = zip(labels.of(question), question.meanings, strict=True)
        lines += [f"{text}: {meaning}" if meaning else text for (text, _), meaning in pairs]
    system = "\n".join(lines)
    prompts = engine.prompts
    if not prompts.template:
        if think:
            raise UnsupportedError("think: the file has no chat template, and so no thoughts")
        return prompts.of(f"{system}\n\n{shown}\n\n", raw=True)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": shown}]
    ids = prompts.chat(messages, thinking=think > 0)
    channel = engine.view.channel_ids
    if not think or channel is None:
        return ids
    options = {"max_tokens": think + 1, "seed": seed, "cancel": cancel, "lora": lora}
    thought = drain(stream_ids(engine, ids, options, thought_tokens=think, watched=False)).tokens
    if channel[1] in thought:
        return [*ids, *thought[: thought.index(channel[1]) + 1]]
    return [*ids, *thought, channel[1]] if channel[0] in thought else ids


# ------------------------------------------------------------------------------------------------------ the canvases


@dataclass(frozen=True)
class _Part:
    """A canvas: `pinned` ids, -1 in the slots; for each question its row, and the ids of its labels."""

    pinned: list[int]
    slots: list[tuple[_Question, int, list[int]]]


def _groups(asked: Sequence[_Question], sequential: bool) -> list[list[_Question]]:
    """Questions that are read together, in an order in which each comes behind what it depends on."""
    left = list(asked)
    done: set[str] = set()
    groups = []
    while left:
        ready = [question for question in left if done.issuperset(question.depends_on)]
        if not ready:
            raise ValueError(f"depends_on: {left[0].id!r} depends on itself, by way of others")
        groups += [[question] for question in ready] if sequential else [ready]
        done |= {question.id for question in ready}
        left = [question for question in left if question.id not in done]
    return groups


def _canvases(
    tokenizer: Tokenizer,
    asked: Sequence[_Question],
    group: Sequence[_Question],
    answers: Mapping[str, Answer],
    labels: _Labels,
    canvas: int,
) -> list[_Part]:
    """As many questions on a canvas as have room, behind the answers that are known."""
    number = {question.id: i for i, question in enumerate(asked, 1)}
    newline = tokenizer.encode("\n", special=False)

    def head(question: _Question) -> list[int]:
        return tokenizer.encode(f"q{number[question.id]}: ", special=False)

    known: list[int] = []
    for question in asked:
        if question.id in answers:
            probabilities = list(answers[question.id].probabilities.values())
            label = labels.of(question)[int(np.argmax(probabilities))][1]
            known += [*head(question), label, *newline]
    parts: list[_Part] = []
    for question in group:
        line = [*head(question), -1, *newline]
        if not parts or len(parts[-1].pinned) + len(line) > canvas:
            # Of many answers the last ones stay in sight.
            parts.append(_Part(known[max(0, len(known) - (canvas - len(line))) :], []))
        if len(line) > canvas:
            raise ContextOverflowError(f"a question takes {len(line)} rows, but the canvas has {canvas}")
        ids = [id_ for _, id_ in labels.of(question)]
        parts[-1].slots.append((question, len(parts[-1].pinned) + len(line) - 1 - len(newline), ids))
        parts[-1].pinned.extend(line)
    return parts


def _read_canvas(
    session: Session, part: _Part, seed: int, steps: int, samples: int | None, stats: Stats
) -> dict[str, Answer]:
    tables: list[list[Float64Array]] = [[] for _ in part.slots]
    draw = 0
    while draw < (samples or 1) or (samples is None and 1 <= draw < DRAWS and _unsure(tables)):
        rows = [row for _, row, _ in part.slots]
        logs = log_probabilities(session, part.pinned, rows, seed, draw, stats, steps)
        for i, (table, (_, _, ids)) in enumerate(zip(tables, part.slots, strict=True)):
            table.append(_normalised(logs[i, ids]))
        draw += 1
    answers = {}
    for table, (question, _, _) in zip(tables, part.slots, strict=True):
        answers[question.id] = _answer(question, np.array(table))
    return answers


def _normalised(logs: npt.NDArray[np.float64]) -> Float64Array:
    weights = np.exp(logs - logs.max())
    made: Float64Array = weights / weights.sum()
    return made


def _entropy(probabilities: Float64Array) -> float:
    held = probabilities[probabilities > 0]
    return float(-(held * np.log(held)).sum())


def _unsure(tables: Sequence[Sequence[Float64Array]]) -> bool:
    return any(_entropy(np.mean(table, axis=0)) > UNSURE for table in tables)


def _answer(question: _Question, table: Float64Array) -> Answer:
    mean: Float64Array = table.mean(axis=0)
    best = int(mean.argmax())
    n = len(table)
    error = float(table[:, best].std(ddof=1) / math.sqrt(n)) if n > 1 else None
    confidence = 1.0 if len(mean) == 1 else max(0.0, 1.0 - _entropy(mean) / math.log(len(mean)))
    expected = float((mean * np.array(question.values)).sum())
    value: float | str = question.labels[best] if question.type == "choice" else expected
    probabilities = dict(zip(question.labels, mean.tolist(), strict=True))
    return Answer(question.type, value, probabilities, confidence, error, n)
