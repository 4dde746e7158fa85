"""Requests and replies as the dictionaries of the OpenAI API: `create_chat_completion` and `create_completion`.

A reply object makes the dictionaries of one request, of events while they come, or of the whole result at once.
"""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydiffgguf._arguments import flag, int32
from pydiffgguf._binding.records import BoolArray
from pydiffgguf.chat import chat_prompt
from pydiffgguf.engine.call import Stream, drain
from pydiffgguf.engine.core import Engine
from pydiffgguf.engine.options import ChatOptions, GenerateOptions, InfillOptions, check_names
from pydiffgguf.errors import UnsupportedError
from pydiffgguf.generate import Block, DenoiseStep, Event, Generation, Prefill, Stats, stream_ids
from pydiffgguf.infill import Infill, stream_infill
from pydiffgguf.text.stop import StopStrings
from pydiffgguf.text.tokenizer import Tokenizer

__all__ = [
    "IGNORED",
    "ChatReply",
    "CompletionStream",
    "OptionWarning",
    "Reply",
    "Shared",
    "TextReply",
    "as_generation",
    "create_chat_completion",
    "create_completion",
    "finish_reason",
    "frame",
    "shared_options",
    "timings",
    "total",
    "usage",
]

Dictionary = dict[str, Any]

#: Fields that clients send and that have no meaning here: a canvas is not drawn token by token. They have no effect.
IGNORED = frozenset(
    {
        "dynatemp_exponent",
        "dynatemp_range",
        "frequency_penalty",
        "metadata",
        "min_p",
        "mirostat_eta",
        "mirostat_mode",
        "mirostat_tau",
        "parallel_tool_calls",
        "presence_penalty",
        "repeat_penalty",
        "service_tier",
        "store",
        "temperature",
        "tfs_z",
        "top_k",
        "top_p",
        "typical_p",
        "user",
        "verbosity",
    }
)
#: Fields that would change what the caller gets, and cannot be had.
REFUSED = {
    "audio": "sound output is not offered",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "logit_bias": "a canvas has no next token to be biased; use a constraint",
    "logits_processor": "logits do not come to Python",
    "modalities": "only text is offered",
    "prediction": "it is not offered",
    "stopping_criteria": "use stop, or cancel",
}


class OptionWarning(UserWarning):
    """A field that other models know has no effect on this one."""


@dataclass
class Shared:
    """What both kinds of requests have besides `generate`'s options: `options` are those. `id`, `created`,
    `fingerprint`: the same in all dictionaries of a request."""

    model: str
    include_usage: bool
    options: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    fingerprint: str | None = None


def _split_options(call: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that have an effect. A field of `IGNORED` is left out, with an OptionWarning that names it; None
    counts as not given.

    Raises UnsupportedError for a field that would change the result, and cannot be had.
    """
    kept = {}
    ignored = []
    for name, value in given.items():
        if value is None or (name in REFUSED and not value) or (name == "modalities" and value == ["text"]):
            continue
        if name in REFUSED:
            raise UnsupportedError(f"{name}: {REFUSED[name]}")
        if name in IGNORED:
            ignored.append(name)
        else:
            kept[name] = value
    if given.get("temperature") == 0 and kept.get("seed") is None:
        kept["seed"] = 0  # who asks for no randomness wants the same text again
    if ignored:
        warnings.warn(
            f"{call}: no effect of {', '.join(sorted(ignored))}: the sampler draws whole canvases by a schedule of its "
            "own (t_min, t_max, entropy_bound)",
            OptionWarning,
            stacklevel=5,
        )
    return kept


def shared_options(call: str, name: str, given: Mapping[str, Any]) -> Shared:
    """Reads the fields that both kinds of requests have. Raises TypeError and ValueError for wrong ones."""
    options = _split_options(call, given)
    if "max_completion_tokens" in options:
        options["max_tokens"] = options.pop("max_completion_tokens")
    if options.get("max_tokens") in (-1, 0) and not isinstance(options["max_tokens"], bool):
        del options["max_tokens"]  # llama.cpp's word for no limit; here the default
    if isinstance(options.get("seed"), int) and options["seed"] == 0xFFFFFFFF:
        del options["seed"]  # llama.cpp's word for a fresh one
    if int32("n", options.pop("n", 1), 1) != 1:
        raise UnsupportedError("n: one choice is made at a time; call again with another seed")
    stream_options = options.pop("stream_options", {})
    if not isinstance(stream_options, Mapping):
        raise TypeError(f"stream_options must be a dict, not {type(stream_options).__name__}")
    model = options.pop("model", name)
    if not isinstance(model, str):
        raise TypeError(f"model must be a str, not {type(model).__name__}")
    include_usage = flag("stream_options.include_usage", stream_options.get("include_usage", False))
    return Shared(model or name, include_usage, options)


def usage(stats: Stats) -> Dictionary:
    """Tokens of the prompt, of the result, of both; what was in the cache already; what thoughts took."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.generated_tokens,
        "total_tokens": stats.prompt_tokens + stats.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.reused_tokens},
        "completion_tokens_details": {"reasoning_tokens": stats.reasoning_tokens},
    }


def timings(stats: Stats, canvas_length: int) -> Dictionary:
    """By the names of llama.cpp's server, and what a diffusion has besides."""
    n_encoded = stats.prompt_tokens - stats.reused_tokens
    steps = sum(stats.steps)

    def per(amount: float, count: float) -> float:
        return amount / count if count else 0.0

    return {
        "cache_n": stats.reused_tokens,
        "prompt_n": n_encoded,
        "prompt_ms": 1e3 * stats.prefill_s,
        "prompt_per_token_ms": per(1e3 * stats.prefill_s, n_encoded),
        "prompt_per_second": per(n_encoded, stats.prefill_s),
        "predicted_n": stats.generated_tokens,
        "predicted_ms": 1e3 * stats.denoise_s,
        "predicted_per_token_ms": per(1e3 * stats.denoise_s, stats.generated_tokens),
        "predicted_per_second": per(stats.generated_tokens, stats.denoise_s),
        "diffusion": True,
        "diffusion_blocks": len(stats.steps),
        "diffusion_steps": steps,
        "diffusion_canvas": canvas_length,
        "diffusion_step_ms": per(1e3 * stats.denoise_s, steps),
        "seed": stats.seed,
    }


def total(parts: Sequence[Stats]) -> Stats:
    """The cost of several generations; the seed is the first one's."""
    sums = {
        name: sum(getattr(part, name) for part in parts)
        for name in ("prompt_tokens", "reused_tokens", "prefill_s", "denoise_s", "generated_tokens", "reasoning_tokens")
    }
    return Stats(seed=parts[0].seed, steps=[n for part in parts for n in part.steps], **sums)


def frame(step: DenoiseStep, piece: Callable[[int], str] | None = None) -> Dictionary:
    """A draft, as a chunk has it beside its empty choice.

    Args:
        piece: what a token looks like; with it the canvas too, an entry for each row.
    """
    words: Dictionary = {
        "type": "diffusion_frame",
        "block": step.canvas,
        "step": step.step + 1,
        "total": step.total_steps,
        "text": step.text,
        "reasoning": step.reasoning,
    }
    if piece is not None:
        words["diffusion"] = {
            "tokens": [piece(token) for token in step.tokens.tolist()],
            "accepted": _bits(step.accepted),
            "entropy": [round(value, 4) for value in step.entropy.tolist()],
            "elapsed_s": round(step.elapsed_s, 4),
        }
        if step.pinned is not None:
            words["diffusion"]["pinned"] = _bits(step.pinned)
    return words


def _bits(values: BoolArray) -> str:
    return "".join("1" if value else "0" for value in values.tolist())


class _Growing:
    """A text on its way out: the end that a stop string may reach into is held back.

    Args:
        back: characters of it.
    """

    def __init__(self, back: int = 0) -> None:
        self._back = back
        self._text = ""
        self._sent = 0

    def add(self, text: str) -> str:
        """What may go out now."""
        self._text += text
        upto = max(self._sent, len(self._text) - self._back)
        out, self._sent = self._text[self._sent : upto], upto
        return out

    def rest(self, whole: str) -> str:
        """What has not gone out of the whole text."""
        return whole[self._sent :]


class Reply:
    """The dictionaries of one choice of a request.

    Args:
        shared: from `shared_options`.
        canvas_length, tokenizer: the model's.
        index: of the choice.
    """

    KIND = ""
    PREFIX = ""
    CHUNK = ""

    def __init__(self, shared: Shared, canvas_length: int, tokenizer: Tokenizer, *, index: int = 0) -> None:
        self._shared = shared
        self._canvas_length = canvas_length
        self._tokenizer = tokenizer
        self._index = index
        self._text = _Growing(StopStrings(shared.options.get("stop") or ()).overlap)
        self._reasoning = _Growing()

    def first(self) -> list[Dictionary]:
        """The chunks before any event."""
        raise NotImplementedError

    def draft(self, words: Dictionary) -> Dictionary:
        """A chunk that adds nothing, with a draft, from `frame`, beside its choices."""
        raise NotImplementedError

    def of(self, event: Event) -> list[Dictionary]:
        """The chunks of an event, often none."""
        if not isinstance(event, Block):
            return []
        return self._pieces(self._text.add(event.text), self._reasoning.add(event.reasoning))

    def end(self, result: Generation, *, last: bool = True, costs: Stats | None = None) -> list[Dictionary]:
        """The chunks behind the last event: text that was held back, tool calls, each whole, and why it ended.

        Args:
            last: no choice follows: with the timings, and the usage where that was asked for.
            costs: of all choices; None: of this one.
        """
        chunks = self._pieces(self._text.rest(result.text), self._reasoning.rest(result.reasoning))
        chunks += self._calls(result)
        chunks.append(self._base(self.CHUNK, [self._last(result)]))
        if last:
            costs = costs or result.stats
            took = {"timings": timings(costs, self._canvas_length)}
            if self._shared.include_usage:
                chunks.append({**self._base(self.CHUNK, []), "usage": usage(costs), **took})
            else:
                chunks[-1] |= took
        return chunks

    def choice(self, result: Generation) -> Dictionary:
        """The choice in a reply that comes at once."""
        raise NotImplementedError

    def whole(self, result: Generation) -> Dictionary:
        """The reply at once."""
        return self.together([self.choice(result)], result.stats)

    def together(self, choices: list[Dictionary], costs: Stats) -> Dictionary:
        """The reply at once, of several choices."""
        counts = {"usage": usage(costs), "timings": timings(costs, self._canvas_length)}
        return {**self._base(self.KIND, choices), **counts}

    def _pieces(self, text: str, reasoning: str) -> list[Dictionary]:
        raise NotImplementedError

    def _calls(self, result: Generation) -> list[Dictionary]:
        return []

    def _last(self, result: Generation) -> Dictionary:
        raise NotImplementedError

    def _base(self, kind: str, choices: list[Dictionary]) -> Dictionary:
        base = {
            "id": f"{self.PREFIX}-{self._shared.id}",
            "object": kind,
            "created": self._shared.created,
            "model": self._shared.model,
            "choices": choices,
        }
        return base if self._shared.fingerprint is None else {**base, "system_fingerprint": self._shared.fingerprint}

    def _scored(self, result: Generation) -> Iterator[tuple[str, float]]:
        """(text, log-probability) of the answer's tokens."""
        assert result.logprobs is not None
        for row in result.answer_rows:
            if row < len(result.tokens):
                yield self._tokenizer.piece(result.tokens[row]), result.logprobs[row]


def finish_reason(result: Generation) -> str:
    """The API knows no cancelled answer: it was cut."""
    if result.tool_calls and result.finish_reason == "stop":
        return "tool_calls"
    return "stop" if result.finish_reason == "stop" else "length"


class ChatReply(Reply):
    """The dictionaries of a chat completion.

    Args:
        shared, canvas_length, tokenizer, index: as in `Reply`.
        frames: a chunk with the draft after each denoise step, too.
    """

    KIND = "chat.completion"
    CHUNK = "chat.completion.chunk"
    PREFIX = "chatcmpl"

    def __init__(
        self, shared: Shared, canvas_length: int, tokenizer: Tokenizer, *, index: int = 0, frames: bool = False
    ) -> None:
        super().__init__(shared, canvas_length, tokenizer, index=index)
        self._frames = frames

    def choice(self, result: Generation) -> Dictionary:
        content = None if result.tool_calls and not result.text.strip() else result.text
        message: Dictionary = {"role": "assistant", "content": content}
        if result.reasoning:
            message["reasoning_content"] = result.reasoning
        if result.tool_calls:
            message["tool_calls"] = result.tool_calls
        return {
            "index": self._index,
            "message": message,
            "logprobs": self._logprobs(result),
            "finish_reason": finish_reason(result),
        }

    def first(self) -> list[Dictionary]:
        return [self.chunk({"role": "assistant", "content": ""})]

    def of(self, event: Event) -> list[Dictionary]:
        if isinstance(event, DenoiseStep) and self._frames:
            return [self.draft(frame(event))]
        return super().of(event)

    def draft(self, words: Dictionary) -> Dictionary:
        return {**self.chunk({}), **words}

    def chunk(self, delta: Dictionary) -> Dictionary:
        """A chunk that is not the last."""
        return self._base(self.CHUNK, [{"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _pieces(self, text: str, reasoning: str) -> list[Dictionary]:
        delta = {"reasoning_content": reasoning, "content": text}
        return [self.chunk({name: piece}) for name, piece in delta.items() if piece]

    def _calls(self, result: Generation) -> list[Dictionary]:
        return [self.chunk({"tool_calls": [{"index": i, **call}]}) for i, call in enumerate(result.tool_calls)]

    def _last(self, result: Generation) -> Dictionary:
        logprobs = self._logprobs(result)
        return {"index": self._index, "delta": {}, "logprobs": logprobs, "finish_reason": finish_reason(result)}

    def _logprobs(self, result: Generation) -> Dictionary | None:
        if result.logprobs is None:
            return None
        content = [
            {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
            for text, logprob in self._scored(result)
        ]
        return {"content": content, "refusal": None}


class TextReply(Reply):
    """The dictionaries of a completion.

    Args:
        shared, canvas_length, tokenizer, index: as in `Reply`.
        echo: what the text begins with.
        behind: what it ends with: a gap's suffix, where it is echoed.
    """

    KIND = CHUNK = "text_completion"
    PREFIX = "cmpl"

    def __init__(
        self,
        shared: Shared,
        canvas_length: int,
        tokenizer: Tokenizer,
        *,
        index: int = 0,
        echo: str = "",
        behind: str = "",
    ) -> None:
        super().__init__(shared, canvas_length, tokenizer, index=index)
        self._echo = echo
        self._behind = behind

    def choice(self, result: Generation) -> Dictionary:
        return self._choice(self._echo + result.text + self._behind, self._logprobs(result), finish_reason(result))

    def first(self) -> list[Dictionary]:
        return self._pieces(self._echo, "")

    def draft(self, words: Dictionary) -> Dictionary:
        return {**self.chunk(""), **words}

    def chunk(self, text: str) -> Dictionary:
        """A chunk that is not the last."""
        return self._base(self.CHUNK, [self._choice(text, None, None)])

    def _pieces(self, text: str, reasoning: str) -> list[Dictionary]:
        return [self.chunk(text)] if text else []

    def _calls(self, result: Generation) -> list[Dictionary]:
        return self._pieces(self._behind, "")

    def _last(self, result: Generation) -> Dictionary:
        return self._choice("", self._logprobs(result), finish_reason(result))

    def _choice(self, text: str, logprobs: Dictionary | None, reason: str | None) -> Dictionary:
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, result: Generation) -> Dictionary | None:
        if result.logprobs is None:
            return None
        pieces = list(self._scored(result))
        offsets, at = [], len(self._echo)
        for text, _ in pieces:
            offsets.append(at)
            at += len(text)
        return {
            "tokens": [text for text, _ in pieces],
            "token_logprobs": [logprob for _, logprob in pieces],
            "top_logprobs": None,
            "text_offset": offsets,
        }


def as_generation(gap: Infill, text: str) -> Generation:
    """A gap as a generation of `text`, which is the gap's, cut or not."""
    stats = Stats(
        seed=gap.stats.seed,
        prompt_tokens=gap.stats.prompt_tokens,
        reused_tokens=gap.stats.reused_tokens,
        steps=[gap.stats.forwards],
        prefill_s=gap.stats.prefill_s,
        denoise_s=gap.stats.denoise_s + gap.stats.score_s,
        generated_tokens=gap.gap_tokens,
    )
    return Generation(text, [], gap.finish_reason, stats)


class _Events(Protocol):
    """What a CompletionStream reads: a Stream, or one that becomes one."""

    def __iter__(self) -> Iterator[Event]: ...
    @property
    def result(self) -> Generation: ...
    def cancel(self) -> None: ...
    def close(self) -> None: ...


class _GapEvents:
    """The events of a gap as those of a generation: its text comes at the end."""

    def __init__(self, stream: Stream[Prefill | DenoiseStep, Infill], stop: StopStrings) -> None:
        self._stream = stream
        self._stop = stop
        self.cancel = stream.cancel
        self.close = stream.close

    def __iter__(self) -> Iterator[Event]:
        yield from self._stream
        yield Block(self.result.text, [])

    @property
    def result(self) -> Generation:
        gap = self._stream.result
        return as_generation(gap, gap.text[: self._stop.find(gap.text)])


class CompletionStream(Iterator[Dictionary]):
    """The chunks of one reply. `cancel()` and `close()` are those of the events' `Stream`; so is `result`, the
    Generation behind them."""

    def __init__(self, stream: _Events, reply: Reply) -> None:
        self._stream = stream
        self._chunks = self._run(reply)

    def _run(self, reply: Reply) -> Generator[Dictionary, None, None]:
        yield from reply.first()
        for event in self._stream:
            yield from reply.of(event)
        yield from reply.end(self._stream.result)

    def __next__(self) -> Dictionary:
        return next(self._chunks)

    @property
    def result(self) -> Generation:
        return self._stream.result

    def cancel(self) -> None:
        self._stream.cancel()

    def close(self) -> None:
        self._stream.close()
        self._chunks.close()


def _no_alternatives(key: str, options: dict[str, Any]) -> None:
    """Takes `key` out of the options: the sampler reports the log-probabilities of what it wrote only."""
    if int32(key, options.pop(key, 0)) > 0:
        raise UnsupportedError(f"{key}: there are log-probabilities of the tokens that were written, and no others")


def create_chat_completion(
    engine: Engine, messages: object, stream: bool, given: Mapping[str, Any]
) -> Dictionary | CompletionStream:
    """See `DiffusionModel.create_chat_completion`."""
    name = "create_chat_completion"
    shared = shared_options(name, engine.name, given)
    options = shared.options
    frames = flag("frames", options.pop("frames", False))
    logprobs = flag("logprobs", options.pop("logprobs", False))
    _no_alternatives("top_logprobs", options)
    effort = options.pop("reasoning_effort", None)
    if effort is not None:
        options.setdefault("thinking", effort not in ("none", "minimal"))
    check_names(name, options, ChatOptions, also=("stream", "model", "logprobs", "frames", "reasoning_effort"))
    prompt = chat_prompt(engine.prompts, messages, options)
    events = stream_ids(
        engine,
        prompt.ids,
        options,
        thought_tokens=prompt.thought_tokens,
        forced=prompt.forced,
        logprobs=logprobs,
        watched=stream and frames,
    )
    reply = ChatReply(shared, engine.config.canvas_length, engine.tokenizer, frames=frames)
    return CompletionStream(events, reply) if stream else reply.whole(drain(events))


def create_completion(
    engine: Engine, prompt: object, suffix: str | None, stream: bool, given: Mapping[str, Any]
) -> Dictionary | CompletionStream:
    """See `DiffusionModel.create_completion`."""
    name = "create_completion"
    shared = shared_options(name, engine.name, given)
    options = shared.options
    echo = flag("echo", options.pop("echo", False))
    if int32("best_of", options.pop("best_of", 1), 1) != 1:
        raise UnsupportedError("best_of: one choice is made at a time")
    asked = options.pop("logprobs", None)
    logprobs = asked is not None and asked is not False
    if logprobs and asked is not True and int32("logprobs", asked) > 1:
        raise UnsupportedError("logprobs: there are those of the tokens that were written, and no others: 0, 1 or True")
    if echo and not isinstance(prompt, str):
        raise TypeError(f"echo: the prompt must be a str, not {type(prompt).__name__}")
    reply = TextReply(shared, engine.config.canvas_length, engine.tokenizer, echo=str(prompt) if echo else "")
    events: _Events
    if suffix is None:
        check_names(name, options, GenerateOptions, also=("suffix", "stream", "model", "logprobs", "echo"))
        ids = engine.prompts.of(prompt, raw=True)
        events = stream_ids(engine, ids, options, logprobs=logprobs, watched=False)
    else:
        if not isinstance(prompt, str) or not isinstance(suffix, str):
            raise TypeError("suffix: prompt and suffix must both be str, as they are the text around a gap")
        if logprobs:
            raise UnsupportedError("logprobs: a gap has none, leave out the suffix")
        stop = StopStrings(options.pop("stop", ()))
        if "max_tokens" in options:
            options["max_gap"] = options.pop("max_tokens")
        check_names(name, options, InfillOptions, also=("suffix", "stream", "model", "stop", "max_tokens", "echo"))
        events = _GapEvents(stream_infill(engine, prompt, suffix, options), stop)
    chunks = CompletionStream(events, reply)
    if stream:
        return chunks
    for _ in chunks:
        pass
    return reply.whole(chunks.result)
