"""Requests and replies as the dictionaries of the OpenAI API: `create_chat_completion` and `create_completion`.

A reply object makes the dictionaries of one request, of events while they come, or of the whole result at once.
"""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydiffgguf._arguments import flag, int32
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
    "Shared",
    "TextReply",
    "create_chat_completion",
    "create_completion",
    "shared_options",
    "timings",
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
    """What both kinds of requests have besides `generate`'s options: `options` are those."""

    model: str
    include_usage: bool
    options: dict[str, Any] = field(default_factory=dict)


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


class _Reply:
    """The dictionaries of one request: same id and time in all of them."""

    KIND = ""
    PREFIX = ""
    CHUNK = ""

    def __init__(self, shared: Shared, canvas_length: int, tokenizer: Tokenizer) -> None:
        self._shared = shared
        self._canvas_length = canvas_length
        self._tokenizer = tokenizer
        self._id = f"{self.PREFIX}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def _base(self, kind: str, choices: list[Dictionary]) -> Dictionary:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._shared.model,
            "choices": choices,
        }

    def _whole(self, choice: Dictionary, stats: Stats) -> Dictionary:
        counts = {"usage": usage(stats), "timings": timings(stats, self._canvas_length)}
        return {**self._base(self.KIND, [choice]), **counts}

    def _last(self, choice: Dictionary, stats: Stats) -> list[Dictionary]:
        """The chunk that says why it ended, with the timings, and one for the usage where that was asked for."""
        chunk = self._base(self.CHUNK, [choice])
        took = {"timings": timings(stats, self._canvas_length)}
        if not self._shared.include_usage:
            return [{**chunk, **took}]
        return [chunk, {**self._base(self.CHUNK, []), "usage": usage(stats), **took}]

    def _pieces(self, result: Generation) -> Iterator[tuple[str, float]]:
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


class ChatReply(_Reply):
    """The dictionaries of a chat completion.

    Args:
        shared: from `shared_options`.
        canvas_length, tokenizer: the model's.
        frames: a chunk with the draft after each denoise step, too.
    """

    KIND = "chat.completion"
    CHUNK = "chat.completion.chunk"
    PREFIX = "chatcmpl"

    def __init__(self, shared: Shared, canvas_length: int, tokenizer: Tokenizer, *, frames: bool = False) -> None:
        super().__init__(shared, canvas_length, tokenizer)
        self._frames = frames

    def whole(self, result: Generation) -> Dictionary:
        """The reply at once."""
        content = None if result.tool_calls and not result.text.strip() else result.text
        message: Dictionary = {"role": "assistant", "content": content}
        if result.reasoning:
            message["reasoning_content"] = result.reasoning
        if result.tool_calls:
            message["tool_calls"] = result.tool_calls
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(result),
            "finish_reason": finish_reason(result),
        }
        return self._whole(choice, result.stats)

    def first(self) -> Dictionary:
        """The chunk before any event."""
        return self._chunk({"role": "assistant", "content": ""})

    def of(self, event: Event) -> list[Dictionary]:
        """The chunks of an event, often none."""
        if isinstance(event, Block):
            delta = {"reasoning_content": event.reasoning, "content": event.text}
            return [self._chunk({name: text}) for name, text in delta.items() if text]
        if isinstance(event, DenoiseStep) and self._frames:
            frame = {
                "type": "diffusion_frame",
                "block": event.canvas,
                "step": event.step + 1,
                "total": event.total_steps,
                "text": event.text,
                "reasoning": event.reasoning,
            }
            return [{**self._chunk({}), **frame}]
        return []

    def end(self, result: Generation) -> list[Dictionary]:
        """The chunks behind the last event: tool calls, each whole, why it ended, the usage."""
        calls = [self._chunk({"tool_calls": [{"index": i, **call}]}) for i, call in enumerate(result.tool_calls)]
        last = {"index": 0, "delta": {}, "logprobs": self._logprobs(result), "finish_reason": finish_reason(result)}
        return [*calls, *self._last(last, result.stats)]

    def _chunk(self, delta: Dictionary) -> Dictionary:
        return self._base(self.CHUNK, [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _logprobs(self, result: Generation) -> Dictionary | None:
        if result.logprobs is None:
            return None
        content = [
            {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
            for text, logprob in self._pieces(result)
        ]
        return {"content": content, "refusal": None}


class TextReply(_Reply):
    """The dictionaries of a completion. `echo`: what the text begins with."""

    KIND = CHUNK = "text_completion"
    PREFIX = "cmpl"

    def __init__(self, shared: Shared, canvas_length: int, tokenizer: Tokenizer, *, echo: str = "") -> None:
        super().__init__(shared, canvas_length, tokenizer)
        self._echo = echo

    def whole(self, result: Generation) -> Dictionary:
        return self._whole(self._choice(self._echo + result.text, result), result.stats)

    def first(self) -> list[Dictionary]:
        return [self._chunk(self._echo)] if self._echo else []

    def of(self, event: Event) -> list[Dictionary]:
        return [self._chunk(event.text)] if isinstance(event, Block) and event.text else []

    def end(self, result: Generation) -> list[Dictionary]:
        return self._last(self._choice("", result), result.stats)

    def _chunk(self, text: str) -> Dictionary:
        return self._base(self.CHUNK, [{"index": 0, "text": text, "logprobs": None, "finish_reason": None}])

    def _choice(self, text: str, result: Generation) -> Dictionary:
        return {
            "index": 0,
            "text": text,
            "logprobs": self._logprobs(result),
            "finish_reason": finish_reason(result),
        }

    def _logprobs(self, result: Generation) -> Dictionary | None:
        if result.logprobs is None:
            return None
        pieces = list(self._pieces(result))
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
        stats = Stats(
            seed=gap.stats.seed,
            prompt_tokens=gap.stats.prompt_tokens,
            reused_tokens=gap.stats.reused_tokens,
            steps=[gap.stats.forwards],
            prefill_s=gap.stats.prefill_s,
            denoise_s=gap.stats.search.denoise_s + gap.stats.search.score_s,
            generated_tokens=gap.gap_tokens,
        )
        at = self._stop.find(gap.text)
        return Generation(gap.text[:at], [], gap.finish_reason, stats)


class CompletionStream(Iterator[Dictionary]):
    """The chunks of one reply. `cancel()` and `close()` are those of the events' `Stream`; so is `result`, the
    Generation behind them."""

    def __init__(self, stream: _Events, reply: ChatReply | TextReply) -> None:
        self._stream = stream
        self._chunks = self._run(reply)

    def _run(self, reply: ChatReply | TextReply) -> Generator[Dictionary, None, None]:
        first = reply.first()
        yield from first if isinstance(first, list) else [first]
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
