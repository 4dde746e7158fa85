"""A whole generation: the prompt into the cache, canvas after canvas out of it, until an end token or a limit.

Events tell what happens: a DenoiseStep after every step, a Block after every canvas. `DiffusionModel.generate` is the
stream, drained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pydiffgguf._arguments import flag, integer, seed_of
from pydiffgguf._binding.records import (
    ArrayRecord,
    BoolArray,
    Float64Array,
    Int32Array,
    RawStep,
    Sampling,
)
from pydiffgguf._log import logger
from pydiffgguf.engine.call import Call, OutOfTime, Stream
from pydiffgguf.engine.core import Engine
from pydiffgguf.engine.options import Noise
from pydiffgguf.engine.pool import common_head
from pydiffgguf.errors import CancelledError, ContextOverflowError
from pydiffgguf.session import CanvasBatch, CanvasSpec, Session, resolve_sampling
from pydiffgguf.structured.constraint import Constraint, Grammar, read_constraint
from pydiffgguf.structured.steering import ConstraintStats, Steering
from pydiffgguf.text.stop import StopStrings
from pydiffgguf.text.tools import Tool
from pydiffgguf.text.turn import TextView, Turn, until_end

__all__ = [
    "Block",
    "DenoiseStep",
    "Event",
    "FinishReason",
    "Generation",
    "Prefill",
    "Stats",
    "encode_prompt",
    "stream_ids",
]

DEFAULT_MAX_TOKENS = 256
#: With `narrow`: steps that the first end token is at its place before rows behind it leave the canvas, and how many of
#: them stay. With none, 1 of 60 questions took all 48 steps; after one step instead of two, 18 did
#: (benchmarks/results/canvas_length.md).
NARROW_STEPS = 2
NARROW_MARGIN = 8

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Prefill:
    """The prompt is being read: `done` of its `total` tokens are in the cache. The first event of every call, and one
    more after each n_batch tokens. `elapsed_s`: since the call began."""

    done: int
    total: int
    elapsed_s: float = field(compare=False, repr=False)


@dataclass(frozen=True, eq=False, repr=False)
class DenoiseStep(ArrayRecord):
    """One step of one canvas. `canvas` and `step` count from 0; `total_steps` is the most there can be.

    `tokens` int32 [C], fewer once `narrow` has left rows out: the argmax canvas. `accepted` bool [C], `entropy` float64
    [C] in nats. `pinned` bool [C], or None where no row is. `text`: the draft of the answer, up to its first end token;
    `reasoning`: that of the thoughts.
    `valid_tokens`: how many of the first a constraint takes, None without one.
    `elapsed_s`: since the generation began.
    """

    canvas: int
    step: int
    total_steps: int
    tokens: Int32Array
    accepted: BoolArray
    entropy: Float64Array
    text: str
    elapsed_s: float = field(compare=False)
    pinned: BoolArray | None = None
    reasoning: str = field(default_factory=str)  # a factory leaves no attribute of the class: see `__getattr__`
    valid_tokens: int | None = None

    def read_late(self, read: Callable[[], tuple[str, str]]) -> DenoiseStep:
        """This step with the (text, reasoning) that `read` returns once somebody asks for either. Behind 1,800 tokens
        reading a draft takes 2.5 ms, as much as a step of a small model, and a server shows few of them."""
        late = replace(self)
        values = vars(late)
        del values["text"], values["reasoning"]
        values["_read"] = read
        return late

    if not TYPE_CHECKING:  # or every misspelt attribute would pass as a string

        def __getattr__(self, name: str) -> str:
            read = vars(self).get("_read")
            if name not in ("text", "reasoning") or read is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            vars(self).update(zip(("text", "reasoning"), read(), strict=True))
            return vars(self)[name]

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def __repr__(self) -> str:
        free = len(self.tokens) - (0 if self.pinned is None else int(self.pinned.sum()))
        return (
            f"DenoiseStep(canvas={self.canvas}, step={self.step + 1}/{self.total_steps}, {int(self.accepted.sum())} of "
            f"{free} accepted, text={self.text!r}, {self.elapsed_s:.3f} s)"
        )


@dataclass(frozen=True)
class Block:
    """A finished canvas: the text and the `reasoning` that it adds, and its tokens up to the end token or the limit.
    With `settle` a canvas has several: one whenever more of its head has settled, and the rest at its end. What may
    still turn out to be a thought or a tool call comes with a later canvas. A stop string that straddles two canvases
    is found with the second: the result's text then ends inside the first's."""

    text: str
    tokens: list[int]
    reasoning: str = ""


Event = Prefill | DenoiseStep | Block


@dataclass
class Stats:
    """What a generation cost; also an edit and a choice, whose canvases and prompts add up.

    `steps`: denoise steps of each canvas. `prompt_tokens`: length of the prompt, of which `reused_tokens` were still
    in the cache from an earlier call. `prefill_s`: encoding the prompt and finished canvases. `denoise_s`: the steps.
    `reasoning_tokens`: those of `generated_tokens` that thoughts took. `constraint`: what a constraint did, None
    without one. `lora`: the adapters that ran, with their scales. `seed`: what to pass to get the same text again.
    """

    seed: int
    prompt_tokens: int
    reused_tokens: int = 0
    steps: list[int] = field(default_factory=list)
    prefill_s: float = 0.0
    denoise_s: float = 0.0
    generated_tokens: int = 0
    reasoning_tokens: int = 0
    constraint: ConstraintStats | None = None
    lora: dict[str, float] = field(default_factory=dict)

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
    it ("" without one). `tool_calls`: the calls that the model asks for, as dictionaries of the OpenAI API with their
    arguments as JSON; a call that was cut is text. `logprobs`, where asked for: of each token, the natural log of its
    probability at temperature 1 in the last step of its canvas. `answer_rows`: which tokens `text` is made of.
    `parsed`: the value of the text where it had to be JSON; None otherwise, and where the answer was cancelled.
    `finish_reason`: "stop" at an end token or stop string, "length" at max_tokens, the end of the context or the time
    limit, "cancelled"."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    stats: Stats
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[float] | None = field(default=None, repr=False)
    answer_rows: list[int] = field(default_factory=list, repr=False)
    parsed: Any = None


@dataclass(frozen=True)
class _Request:
    """Checked arguments of a generation."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop: StopStrings
    seed: int
    noise: Noise | None
    n_rows: int  # of each canvas
    narrow: bool
    thought_tokens: int | None  # the most of a thought
    logprobs: bool
    steering: Steering | None
    settle: int | None  # steps after which a row that stays as it is is pinned
    watched: bool  # somebody looks at the steps; else no DenoiseStep is made


def stream_ids(
    engine: Engine,
    prompt: list[int],
    options: Mapping[str, Any],
    *,
    thought_tokens: int | None = None,
    logprobs: bool = False,
    forced: Sequence[Tool] = (),
    watched: bool = True,
) -> Stream[Event, Generation]:
    """A generation from token ids. Afterwards the session's prefix holds the prompt and every canvas except the last.

    Args:
        options: `GenerateOptions`; other names are not looked at.
        thought_tokens: a thought that takes as many is closed; None: it may take any number.
        logprobs: report each token's log-probability.
        forced: the answer must be a call of one of these tools.
        watched: somebody takes the events; else there are no DenoiseSteps.

    Raises, before the first event, ValueError and TypeError for an option; at the first, ContextOverflowError when the
    prompt and one canvas do not fit.
    """
    sampling, time_limit = resolve_sampling(engine.sampling, options)
    max_tokens, canvas = options.get("max_tokens"), engine.config.canvas_length
    n_rows = options.get("canvas_length")
    n_rows = canvas if n_rows is None else integer("canvas_length", n_rows, 1, canvas)
    most = integer("max_tokens", DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens, 1, 2**31 - 1)
    stop = StopStrings(options.get("stop") or ())
    settle = options.get("settle")
    settle = None if settle is None else integer("settle", settle, 1, 2**31 - 1)
    constraint = read_constraint(options)
    if settle is not None and (constraint is not None or forced):
        raise ValueError("settle cannot be given beside a constraint, which pins rows by rules of its own")
    if forced:
        if constraint is not None:
            raise ValueError("tool_choice forces a call: no other constraint can be given beside it")
        constraint = Constraint("calls", list(forced))
    if constraint is not None and stop.stops:
        raise ValueError("stop cannot be given beside a constraint, which says where the text ends")
    narrow = flag("narrow", options.get("narrow", False))
    if settle is not None and narrow:
        raise ValueError("settle cannot be given beside narrow: pins are for all rows of a canvas")
    if constraint is not None and narrow:
        raise ValueError("narrow cannot be given beside a constraint, which says where the text ends")
    request = _Request(
        prompt=prompt,
        max_tokens=most,
        sampling=sampling,
        stop=stop,
        seed=seed_of(options.get("seed")),
        noise=_check_noise(options.get("noise")),
        n_rows=n_rows,
        narrow=narrow,
        thought_tokens=thought_tokens,
        logprobs=logprobs,
        steering=None if constraint is None else _steering(engine, prompt, constraint, most, n_rows, thought_tokens),
        settle=settle,
        watched=watched,
    )
    call = engine.call(options, time_limit)
    return Stream(_run(engine, request, call), call)


def _check_noise(noise: Noise | None) -> Noise | None:
    missing = [name for name in ("canvas", "uniform", "renoise") if not callable(getattr(noise, name, None))]
    if noise is not None and missing:
        raise TypeError(
            f"noise must have the methods canvas, uniform and renoise; {type(noise).__name__} lacks {missing[0]}"
        )
    return noise


def _steering(
    engine: Engine,
    prompt: Sequence[int],
    constraint: Constraint,
    max_tokens: int,
    canvas: int,
    thought_tokens: int | None,
) -> Steering:
    """Raises ValueError where no answer fits the tokens that there are."""
    room = max(1, 1 + (engine.n_ctx - len(prompt) - engine.config.canvas_length) // canvas) * canvas
    view = engine.view.behind(prompt)
    return Steering(
        Grammar(constraint, engine.tables),
        min(max_tokens, room),
        canvas,
        markers=view.channel_ids,
        open_thought=view.in_thought,
        thought_tokens=thought_tokens,
    )


def _run(engine: Engine, request: _Request, call: Call) -> Generator[Event, None, Generation]:
    call.begin()
    view, end_ids = engine.view.behind(request.prompt), engine.prompts.end_ids
    stats = Stats(seed=request.seed, prompt_tokens=len(request.prompt), lora=dict(call.adapters.names))
    done: list[int] = []
    logprobs: list[float] = []
    turn = Turn()
    reason: FinishReason = "length"
    limit = request.thought_tokens if request.steering is None else None  # steering closes thoughts itself
    told = _Told()
    try:
        with engine.pool.take(request.prompt, call) as session:
            yield from encode_prompt(session, request.prompt, stats, call)
            canvas_index = 0
            while True:
                told = _Told()
                draft = _Draft(view, end_ids, done, turn, request.stop, request.max_tokens, told, limit is None)
                step = yield from _denoise(session, request, canvas_index, call, stats, draft)
                seen, n_before = turn, len(done)
                if request.steering is None:
                    tokens, ended = until_end(step.argmax.tolist(), end_ids)
                else:
                    tokens, ended = request.steering.commit()
                done = [*done, *tokens]
                if step.logprob is not None:
                    logprobs += step.logprob[: len(tokens)].tolist()
                    logprobs += [0.0] * (len(done) - len(logprobs))  # of an ending that nobody drew
                cut = None if limit is None else view.thought_limit(done, limit)
                if cut is not None and view.close_id is not None:
                    ended, done, limit = False, [*done[:cut], view.close_id], None
                    logprobs[cut:] = [0.0] if request.logprobs else []  # nobody drew the marker
                if len(done) > request.max_tokens:
                    ended, done = False, done[: request.max_tokens]
                last = (
                    ended
                    or len(done) >= request.max_tokens
                    or call.late()
                    or not _fits_another(session, request.n_rows)
                )
                if request.steering is not None:
                    if last and not request.steering.finished:
                        done += request.steering.close()
                    last = request.steering.finished
                turn = view.read(done, ended=last)
                stop_at = request.stop.find(turn.text, max(0, len(seen.text) - request.stop.overlap))
                if stop_at is not None:
                    # A token that the stop string cuts in two is not counted; its characters before the cut are.
                    ended, last, text = True, True, turn.text[:stop_at]
                    done = view.tokens_within(done, stop_at)
                    turn = replace(view.read(done), text=text)
                stats.generated_tokens, stats.reasoning_tokens = len(done), turn.n_thought
                text, tokens = turn.text[len(seen.text) + len(told.text) :], done[n_before + len(told.tokens) :]
                yield Block(text, tokens, turn.reasoning[len(seen.reasoning) :])
                told = _Told()
                if last:
                    reason = "stop" if ended else "length"
                    break
                # Of a thought that was closed here, what the canvas has behind it is forgotten.
                _timed_encode(session, done[n_before:], stats)
                canvas_index += 1
    except CancelledError:
        reason = "cancelled"
        if told.tokens:
            done = [*done, *told.tokens]
            turn = replace(view.read(done, ended=False), text=turn.text + told.text)
            stats.generated_tokens = len(done)
            logprobs += [0.0] * (len(done) - len(logprobs))  # the canvas was not read out
    except OutOfTime:
        reason = "length"
        if request.steering is not None and not request.steering.finished:
            done = [*done, *request.steering.close()]
            turn = view.read(done)
            stats.generated_tokens = len(done)
    if request.steering is not None:
        stats.constraint = request.steering.stats
    whole = request.steering is not None and request.steering.finished and reason != "cancelled"
    logger.debug("generated: %s, %s", reason, stats)
    calls = [made.as_openai(f"{request.seed} {i}") for i, made in enumerate(turn.calls)]
    return Generation(
        turn.text,
        done,
        reason,
        stats,
        turn.reasoning,
        calls,
        logprobs[: len(done)] if request.logprobs else None,
        turn.rows,
        request.steering.parsed() if request.steering is not None and whole else None,
    )


@dataclass
class _Told:
    """Of the canvas under way, what settled and was told in a Block."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Draft:
    """Reads the canvas under way behind what is done: `turn` is what that says."""

    view: TextView
    end_ids: frozenset[int]
    done: list[int]
    turn: Turn
    stop: StopStrings
    max_tokens: int
    told: _Told
    goes_on: bool  # nothing of a canvas will be forgotten, as what is behind a thought that was too long

    def settled(self, head: Int32Array) -> Block | None:
        """What a head of the canvas says beyond what was `told` of it; None where that is nothing, or may be cut."""
        tokens, _ = until_end(head.tolist(), self.end_ids)
        tokens = [*self.done, *tokens[: self.max_tokens - len(self.done)]]
        text = self.view.read(tokens, ended=False).text
        n_told = len(self.turn.text) + len(self.told.text)
        upto = len(text) - self.stop.overlap
        if not self.goes_on or upto <= n_told or not text.startswith(self.turn.text + self.told.text):
            return None
        if self.stop.find(text, max(0, len(self.turn.text) - self.stop.overlap)) is not None:
            return None
        tokens = self.view.tokens_within(tokens, upto)
        block = Block(text[n_told:upto], tokens[len(self.done) + len(self.told.tokens) :])
        self.told.text += block.text
        self.told.tokens += block.tokens
        return block

    def read(self, argmax: Int32Array) -> tuple[str, str]:
        """(text, reasoning) that the canvas adds."""
        tokens, ended = until_end(argmax.tolist(), self.end_ids)
        turn = self.view.read([*self.done, *tokens], ended=ended)
        return turn.text[len(self.turn.text) :], turn.reasoning[len(self.turn.reasoning) :]


class _Settling:
    """The head of a canvas that has settled: rows whose draw was accepted, and whose argmax stayed, for so many steps.
    They are pinned, so that what they say is true whatever the rest becomes."""

    def __init__(self, n_rows: int, steps: int) -> None:
        self._steps = steps
        self._same = np.zeros(n_rows, dtype=np.int64)
        self._argmax = np.full(n_rows, -1, dtype=np.int32)
        self.pinned: Int32Array = np.full(n_rows, -1, dtype=np.int32)
        self.n = 0

    @property
    def head(self) -> Int32Array:
        return self.pinned[: self.n]

    def after(self, step: RawStep) -> bool:
        """Takes a step in; whether there are more of these rows now. The last row is never one."""
        stayed = step.accepted & (step.argmax == self._argmax)
        self._same = np.where(stayed, self._same + 1, 0)
        self._argmax = step.argmax
        moving = np.flatnonzero(self._same[self.n : -1] < self._steps)
        n = self.n + int(moving[0]) if len(moving) else len(self._same) - 1
        grew = n > self.n
        self.pinned[self.n : n] = step.argmax[self.n : n]
        self.n = n
        return grew


def _fits_another(session: Session, n_rows: int) -> bool:
    """Whether the finished canvas can go into the cache and leave the room that a session keeps for the next, which is
    that of the file's canvas."""
    return session.n_past + n_rows + session.config.canvas_length <= session.n_ctx


def _timed_encode(session: Session, ids: Sequence[int] | Int32Array, stats: Stats) -> None:
    began = time.monotonic()
    try:
        session.encode(ids)
    finally:
        stats.prefill_s += time.monotonic() - began


def encode_prompt(session: Session, prompt: Sequence[int], stats: Stats, call: Call) -> Generator[Prefill, None, None]:
    """Brings the prefix to the prompt, keeping what they have in common, n_batch tokens at a time.

    Raises OutOfTime, after the chunk under way, when the call's time is over before the whole prompt is encoded;
    ContextOverflowError, with the prefix as it was, when the prompt and one canvas do not fit; CancelledError.
    """
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
    yield Prefill(common, len(ids), call.elapsed_s)
    for first in range(common, len(ids), session.n_batch):
        call.check()
        _timed_encode(session, ids[first : first + session.n_batch], stats)
        yield Prefill(min(first + session.n_batch, len(ids)), len(ids), call.elapsed_s)


class _Ending:
    """Where the first end token of a canvas is, and since how many steps."""

    def __init__(self, end_ids: frozenset[int]) -> None:
        self._end_ids = list(end_ids)
        self._row = -1
        self._steps = 0

    def rows_kept(self, argmax: Int32Array) -> int:
        """How many rows somebody may still read, after a step."""
        ends = np.flatnonzero(np.isin(argmax, self._end_ids))
        row = int(ends[0]) if ends.size else -1
        self._steps = self._steps + 1 if row == self._row else 1
        self._row = row
        settled = row >= 0 and self._steps >= NARROW_STEPS
        return min(len(argmax), row + 1 + NARROW_MARGIN) if settled else len(argmax)


def _denoise(
    session: Session, request: _Request, canvas_index: int, call: Call, stats: Stats, draft: _Draft
) -> Generator[DenoiseStep | Block, None, RawStep]:
    steering = request.steering
    settling = None if request.settle is None else _Settling(request.n_rows, request.settle)
    spec = CanvasSpec(
        n_rows=request.n_rows,
        seed=request.seed,
        canvas_index=canvas_index,
        quiet=not request.watched and steering is None and settling is None and not request.narrow,
        watched=[-1] * request.n_rows if request.logprobs else None,
    )
    batch = CanvasBatch(session, [spec], request.sampling, noise=request.noise)
    rules = None
    ending = _Ending(draft.end_ids) if request.narrow else None
    if steering is not None:
        rules = steering.rules()
        batch.rules(0, rules.pinned, rules.masks)
    stats.steps.append(0)
    while True:
        step_began = time.monotonic()
        [step] = batch.step()
        now = time.monotonic()
        stats.denoise_s += now - step_began
        stats.steps[-1] += 1
        goes_on = not step.finished
        if steering is not None:
            following = steering.after(step.argmax, step.finished, step.converged and step.step + 1 < step.steps)
            goes_on = following is not None
            # Rules that are said again would begin the test of stability anew.
            if following is not None and (step.finished or following != rules):
                batch.rules(0, following.pinned, following.masks)
                rules = following
        if ending is not None and goes_on:
            kept = ending.rows_kept(step.argmax)
            if kept < len(step.argmax):
                batch.narrow(0, kept)
        if request.watched:
            shown = DenoiseStep(
                canvas_index,
                step.step,
                step.steps,
                step.argmax,
                step.accepted,
                step.entropy,
                "",
                now - call.began,
                valid_tokens=None if steering is None else steering.valid_tokens,
            )
            yield shown.read_late(partial(draft.read, step.argmax))
        if settling is not None and goes_on and settling.after(step):
            batch.rules(0, settling.pinned, {})
            block = draft.settled(settling.head) if request.watched else None
            if block is not None:
                yield block
        if not goes_on or (call.deadline is not None and now >= call.deadline):
            return batch.rows(0)
