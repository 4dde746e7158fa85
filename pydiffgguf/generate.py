"""A whole generation: the prompt into the cache, canvas after canvas out of it, until an end token or a limit.

Events tell what happens: a DenoiseStep after every step, a Block after every canvas. `DiffusionModel.generate` is the
stream, drained.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pydiffgguf._binding.records import BoolArray, Float64Array, Int32Array, RawStep, Sampling
from pydiffgguf._log import logger
from pydiffgguf.errors import CancelledError, ContextOverflowError
from pydiffgguf.session import CanvasBatch, CanvasSpec, Noise, Session
from pydiffgguf.text.chat import CLOSE, OPEN, StopStrings, split_reasoning
from pydiffgguf.text.tokenizer import Tokenizer

__all__ = [
    "Block",
    "DenoiseStep",
    "Event",
    "FinishReason",
    "Generation",
    "Request",
    "Stats",
    "TextView",
    "common_head",
    "encode_prompt",
    "run",
]

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class DenoiseStep:
    """One step of one canvas. `canvas` and `step` count from 0; `total_steps` is the most there can be.

    `tokens` int32 [C]: the argmax canvas. `accepted` bool [C], `entropy` float64 [C] in nats. `pinned` bool [C], or
    None where no row is. `text`: the draft, up to its first end token. `elapsed_s`: since the generation began.
    """

    canvas: int
    step: int
    total_steps: int
    tokens: Int32Array
    accepted: BoolArray
    entropy: Float64Array
    text: str
    elapsed_s: float
    pinned: BoolArray | None = None


@dataclass(frozen=True)
class Block:
    """A finished canvas: the text that it adds, and its tokens up to the end token or the limit. A stop string that
    straddles two canvases is found with the second: the result's text then ends inside the first's."""

    text: str
    tokens: list[int]


Event = DenoiseStep | Block


@dataclass
class Stats:
    """What a generation cost; also an edit and a choice, whose canvases and prompts add up.

    `steps`: denoise steps of each canvas. `prompt_tokens`: length of the prompt, of which `reused_tokens` were still
    in the cache from an earlier call. `prefill_s`: encoding the prompt and finished canvases. `denoise_s`: the steps.
    `seed`: what to pass to get the same text again.
    """

    seed: int
    prompt_tokens: int
    reused_tokens: int = 0
    steps: list[int] = field(default_factory=list)
    prefill_s: float = 0.0
    denoise_s: float = 0.0
    generated_tokens: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """Tokens of the result for each denoise step; 0 without any."""
        forwards = sum(self.steps)
        return self.generated_tokens / forwards if forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the result for each second of encoding and denoising; 0 without any."""
        seconds = self.prefill_s + self.denoise_s
        return self.generated_tokens / seconds if seconds else 0.0


@dataclass(frozen=True)
class Generation:
    """A result. `tokens` ends before the end token; `text` is the answer, `reasoning` the thought channel apart from
    it ("" without one). `finish_reason`: "stop" at an end token or stop string, "length" at max_tokens, the end of the
    context or the time limit, "cancelled"."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    stats: Stats
    reasoning: str = ""


@dataclass(frozen=True)
class Request:
    """What `run` needs to know, checked by its maker."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    time_limit_s: float | None
    stop: StopStrings
    seed: int
    noise: Noise | None
    end_ids: frozenset[int]
    watched: bool = True  # somebody looks at the steps; else no DenoiseStep is made


class TextView:
    """How tokens read: answer and reasoning apart, structure left out. Without a tokenizer everything reads ""."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._hidden: frozenset[int] = frozenset()
        if tokenizer is not None:
            channel = {tokenizer.token_id(OPEN), tokenizer.token_id(CLOSE)}
            self._hidden = tokenizer.special_ids - channel

    def split(self, tokens: Sequence[int]) -> tuple[str, str]:
        """(reasoning, answer)"""
        if self._tokenizer is None:
            return "", ""
        return split_reasoning(self._tokenizer.decode(token for token in tokens if token not in self._hidden))

    def answer(self, tokens: Sequence[int]) -> str:
        return self.split(tokens)[1]

    def tokens_within(self, tokens: list[int], n_characters: int) -> list[int]:
        """The longest head of `tokens` whose answer has at most so many characters."""
        n = bisect.bisect_right(range(len(tokens) + 1), n_characters, key=lambda i: len(self.answer(tokens[:i])))
        return tokens[: n - 1]


def until_end(tokens: Sequence[int], end_ids: frozenset[int]) -> tuple[list[int], bool]:
    """The tokens before the first end token, and whether there was one."""
    for i, token in enumerate(tokens):
        if token in end_ids:
            return list(tokens[:i]), True
    return list(tokens), False


def run(session: Session, request: Request, view: TextView) -> Generator[Event, None, Generation]:
    """Generates on a session, whose prefix may hold a head of the prompt already. Afterwards the prefix holds the
    prompt and every canvas but the last.

    Raises:
        ContextOverflowError: the prompt and one canvas do not fit; the prefix is as it was.
    """
    began = time.monotonic()
    deadline = None if request.time_limit_s is None else began + request.time_limit_s
    stats = Stats(seed=request.seed, prompt_tokens=len(request.prompt))
    done: list[int] = []
    text = ""
    reason: FinishReason = "length"
    try:
        if not encode_prompt(session, request.prompt, stats, deadline):
            return Generation("", [], reason, stats)
        canvas_index = 0
        while True:
            step = yield from _denoise(session, request, canvas_index, began, deadline, stats, view)
            tokens, ended = until_end(step.argmax.tolist(), request.end_ids)
            before, n_before = text, len(done)
            done += tokens
            if len(done) > request.max_tokens:
                ended, done = False, done[: request.max_tokens]
            text = view.answer(done)
            stop_at = request.stop.find(text, max(0, len(before) - request.stop.overlap))
            if stop_at is not None:
                # A token that the stop string cuts in two is not counted; its characters before the cut are.
                ended, done, text = True, view.tokens_within(done, stop_at), text[:stop_at]
            stats.generated_tokens = len(done)
            yield Block(text[len(before) :], done[n_before:])
            if ended:
                reason = "stop"
                break
            late = deadline is not None and time.monotonic() >= deadline
            if len(done) >= request.max_tokens or late or not _fits_another(session):
                break
            _timed_encode(session, step.argmax, stats)
            canvas_index += 1
    except CancelledError:
        reason = "cancelled"
    logger.debug("generated: %s, %s", reason, stats)
    return Generation(text, done, reason, stats, view.split(done)[0])


def common_head(session: Session, prompt: Int32Array) -> int:
    """How many of the prompt's first tokens the session's prefix begins with."""
    held = session.tokens()
    n = min(len(held), len(prompt))
    different = np.nonzero(held[:n] != prompt[:n])[0]
    return int(different[0]) if different.size else n


def _fits_another(session: Session) -> bool:
    """Whether the finished canvas can go into the cache and leave room for the next."""
    return session.n_past + 2 * session.config.canvas_length <= session.n_ctx


def _timed_encode(session: Session, ids: Sequence[int] | Int32Array, stats: Stats) -> None:
    began = time.monotonic()
    try:
        session.encode(ids)
    finally:
        stats.prefill_s += time.monotonic() - began


def encode_prompt(session: Session, prompt: Sequence[int], stats: Stats, deadline: float | None = None) -> bool:
    """Brings the prefix to the prompt, keeping what they have in common. Without the whole prompt, at `deadline` (on
    time.monotonic), it ends after the chunk under way and returns False."""
    room = session.n_ctx - session.config.canvas_length
    if len(prompt) > room:
        raise ContextOverflowError(
            f"the prompt has {len(prompt)} tokens, but n_ctx {session.n_ctx} leaves room for {room} before a canvas of "
            f"{session.config.canvas_length}; open the model with a larger n_ctx"
        )
    ids = np.asarray(prompt, dtype=np.int32)
    common = common_head(session, ids)
    began = time.monotonic()
    session.truncate(common)
    stats.prefill_s += time.monotonic() - began
    stats.reused_tokens += common
    chunk = len(ids) if deadline is None else session.n_batch
    for first in range(common, len(ids), max(chunk, 1)):
        if deadline is not None and time.monotonic() >= deadline:
            return False
        _timed_encode(session, ids[first : first + chunk], stats)
    return True


def _denoise(
    session: Session,
    request: Request,
    canvas_index: int,
    began: float,
    deadline: float | None,
    stats: Stats,
    view: TextView,
) -> Generator[DenoiseStep, None, RawStep]:
    spec = CanvasSpec(seed=request.seed, canvas_index=canvas_index, quiet=not request.watched)
    batch = CanvasBatch(session, [spec], request.sampling, noise=request.noise)
    stats.steps.append(0)
    while True:
        step_began = time.monotonic()
        [step] = batch.step()
        now = time.monotonic()
        stats.denoise_s += now - step_began
        stats.steps[-1] += 1
        if request.watched:
            draft, _ = until_end(step.argmax.tolist(), request.end_ids)
            yield DenoiseStep(
                canvas_index,
                step.step,
                step.steps,
                step.argmax,
                step.accepted,
                step.entropy,
                view.answer(draft),
                now - began,
            )
        if step.finished or (deadline is not None and now >= deadline):
            return batch.rows(0)
