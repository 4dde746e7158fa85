"""``/v1/chat/completions`` and ``/v1/completions``, and the forms that other vendors' clients want of the latter."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from pydiffgguf import Block, DenoiseStep
from pydiffgguf.server import fim
from pydiffgguf.server.engine import Job, Kind, Mailbox
from pydiffgguf.server.errors import overflow
from pydiffgguf.server.fields import Fields
from pydiffgguf.server.frames import Frames, wanted
from pydiffgguf.server.gaps import DEFAULT_GAP, Asked
from pydiffgguf.server.generations import How, Part, Series, timings, usage
from pydiffgguf.server.looking import MAX_IDS, chat_options, check_ids, messages_of
from pydiffgguf.server.service import EventStream, Service, client_of, count, reply

if TYPE_CHECKING:
    from pydiffgguf import DiffusionModel

__all__ = ["OpenAI", "plain_series", "prompts_of", "refuse_completion"]


@dataclass(frozen=True)
class _Answer:
    """How the chunks and choices of one request are worded."""

    service: Service
    id: str
    created: int
    chat: bool
    how: How
    both: bool = False  # text as in a completion and as in a chat, for /v1/fim/completions
    echoed: tuple[tuple[str, str], ...] = ()  # for each prompt

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.service.name,
            "system_fingerprint": self.service.fingerprint,
        }

    def chunk(
        self,
        index: int,
        text: str,
        reason: str | None,
        *,
        role: bool = False,
        thought: str = "",
        call: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A chunk of a stream."""
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if role else {}
        if call is not None:
            delta["tool_calls"] = [call]
        if thought:
            delta["reasoning_content"] = thought
        if text:
            delta["content"] = text
        choice: dict[str, Any] = {"index": index}
        if self.chat or self.both:
            choice["delta"] = delta
        if not self.chat:
            choice["text"] = text
            choice["logprobs"] = None
        choice["finish_reason"] = reason
        return {**self.head("chat.completion.chunk" if self.chat else "text_completion"), "choices": [choice]}

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a choice."""
        return self.chunk(index, "", None, role=True) if self.chat else self.chunk(index, self.echo(index)[0], None)

    def choice(self, index: int, part: Part) -> dict[str, Any]:
        """A choice of a reply that does not stream."""
        choice: dict[str, Any] = {"index": index}
        before, behind = self.echo(index)
        text = before + part.text + behind
        if self.chat or self.both:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if part.reasoning:
                message["reasoning_content"] = part.reasoning
            if part.tool_calls:
                message["tool_calls"] = list(part.tool_calls)
                message["content"] = text if text.strip() else None
            choice["message"] = message
        if not self.chat:
            choice["text"] = text
        choice["logprobs"] = None
        choice["finish_reason"] = part.finish_reason
        return choice

    def echo(self, index: int) -> tuple[str, str]:
        """What stands before and behind a choice's text."""
        return self.echoed[index // self.how.n] if self.echoed else ("", "")


class OpenAI:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service

    # ----------------------------------------------------------------------------------------------------------- chat

    async def chat(self, request: Request) -> Response:
        service = self._service
        model = service.model
        fields = await service.fields(request)
        fields.take("model")
        messages, options = messages_of(fields), chat_options(fields)
        how = How.read(fields, service.settings, ("n_predict", "max_completion_tokens", "max_tokens"), 2**31)
        _refuse_chat(fields)
        headers = service.headers(fields)

        def prepare() -> Series:
            check_room(model, len(model.chat_tokens(messages, **options)))
            makers = [
                partial(how.limited, partial(model.stream_chat, messages, seed=seed, **options)) for seed in how.seeds()
            ]
            return Series(makers, service.settings.time_limit)

        series = await service.text(prepare)
        answer = _Answer(service, "chatcmpl-" + secrets.token_hex(12), int(time.time()), True, how)
        if how.warm_up:
            return await self._respond(request, series, answer, Part.of_warm_up, Kind.WARM_UP, headers)
        return await self._respond(request, series, answer, Part.of, Kind.CHAT, headers)

    # ---------------------------------------------------------------------------------------------------- completions

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, both=False)

    async def fim_completions(self, request: Request) -> Response:
        return await self._complete(request, both=True)

    async def _complete(self, request: Request, both: bool) -> Response:
        service = self._service
        fields = await service.fields(request)
        fields.take("model")
        model, settings = service.model, service.settings
        prompts = prompts_of(fields, model.config.n_vocab)
        gap = _gap(fields, prompts)
        how = How.read(fields, settings, ("n_predict", "max_tokens"), 256 if gap is None else DEFAULT_GAP)
        echo = fields.boolean("echo")
        refuse_completion(fields, how)
        headers = service.headers(fields)
        echoed: list[tuple[str, str]] = []
        if echo and gap is not None:
            echoed = [(gap.prefix, gap.suffix)]
        elif echo:
            echoed = [(p if isinstance(p, str) else await service.text(model.detokenize, p), "") for p in prompts]
        now = int(time.time())
        answer = _Answer(service, "cmpl-" + secrets.token_hex(12), now, False, how, both, tuple(echoed))
        if gap is None:
            series = await service.text(plain_series, model, prompts, how, settings.time_limit)
            return await self._respond(request, series, answer, Part.of, Kind.CHAT, headers)
        asked = Asked.of(gap, how, settings)
        makers = [partial(_gap_stream, model, replace(asked, seed=seed)) for seed in how.seeds()]
        series = await service.text(Series, makers, asked.diffusion.time_limit)
        return await self._respond(request, series, answer, asked.part, Kind.KEYSTROKE, headers)

    # ---------------------------------------------------------------------------------------------------------- both

    async def _respond(
        self,
        request: Request,
        series: Series,
        answer: _Answer,
        part_of: Callable[[Any], Part],
        kind: Kind,
        headers: dict[str, str],
    ) -> Response:
        service, how = self._service, answer.how
        job = Job(
            series.work(),
            kind,
            Mailbox(),
            client=client_of(request),
            wanted=None if how.warm_up else partial(wanted, frames=how.stream and how.diffusion.frames is not None),
            cancel=series.cancel,
        )
        if how.stream:
            service.engine.submit(job)
            events = partial(self._stream, request, answer, part_of)
            return EventStream(service, job, events, headers)
        parts = [part_of(result) for result in await service.run(request, job)]
        count(service, request, parts)
        body = answer.head("chat.completion" if answer.chat else "text_completion")
        body["choices"] = [answer.choice(i, part) for i, part in enumerate(parts)]
        body["usage"] = usage(parts)
        body["timings"] = timings(parts, service.model.config.canvas_length)
        return reply(body, headers)

    async def _stream(
        self, request: Request, answer: _Answer, part_of: Callable[[Any], Part], items: AsyncIterator[Any]
    ) -> AsyncIterator[Any]:
        """The chunks of a stream, in the order that docs/SERVER.md tells."""
        service, how = self._service, answer.how
        frames = Frames(service.model, how.diffusion.frames)
        back = max((len(stop) for stop in how.stop), default=1) - 1
        texts: dict[int, _Held] = {}
        thoughts: dict[int, _Held] = {}
        parts: list[Part] = []
        async for item in items:
            if isinstance(item, list):
                parts = [part_of(result) for result in item]
                break
            index, event = item
            if index not in texts:
                texts[index], thoughts[index] = _Held(back), _Held(0)
                yield answer.opening(index)
            frame = frames.take(event) if isinstance(event, DenoiseStep) else frames.flush()
            if frame is not None:
                yield {**answer.chunk(index, "", None), **frame}
            if isinstance(event, Block):
                text, thought = texts[index].add(event.text), thoughts[index].add(event.reasoning)
                if text or thought:
                    yield answer.chunk(index, text, None, thought=thought)
        count(service, request, parts)
        costs = {"timings": timings(parts, service.model.config.canvas_length)}
        for index, part in enumerate(parts):
            if index not in texts:
                texts[index], thoughts[index] = _Held(back), _Held(0)
                yield answer.opening(index)
            if (frame := frames.flush()) is not None:
                yield {**answer.chunk(index, "", None), **frame}
            rest = texts[index].rest(part.text) + answer.echo(index)[1]
            thought = thoughts[index].rest(part.reasoning)
            if rest or thought:
                yield answer.chunk(index, rest, None, thought=thought)
            for i, call in enumerate(part.tool_calls):
                yield answer.chunk(index, "", None, call={"index": i, **call})
            last = answer.chunk(index, "", part.finish_reason)
            yield {**last, **costs} if index == len(parts) - 1 and not how.include_usage else last
        if how.include_usage:
            head = answer.head("chat.completion.chunk" if answer.chat else "text_completion")
            yield {**head, "choices": [], "usage": usage(parts), **costs}
        yield b"data: [DONE]\n\n"


class _Held:
    """Text on its way out: the end that a stop string may still reach into is held back.

    Args:
        back: characters of it.
    """

    def __init__(self, back: int) -> None:
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
        """What is still missing of the whole text."""
        return whole[self._sent :]


def check_room(model: DiffusionModel, n_prompt: int) -> None:
    """Raises ApiError for a prompt that leaves no room for a canvas."""
    room = model.n_ctx - model.config.canvas_length
    if n_prompt > room:
        raise overflow(n_prompt, room, model.n_ctx)


def series_of(model: DiffusionModel, prompts: Sequence[Sequence[int]], how: How, time_limit: float) -> Series:
    """Generations of token ids: `how.n` of each prompt."""

    makers = [partial(how.limited, partial(model.stream, ids, seed=seed)) for ids in prompts for seed in how.seeds()]
    return Series(makers, time_limit)


def plain_series(model: DiffusionModel, prompts: Sequence[Any], how: How, time_limit: float) -> Series:
    """The same of texts, which stay text, and of ids."""
    ids = [
        model.tokenize(prompt, add_bos=model.tokenizer.add_bos, special=False) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    for one in ids:
        check_room(model, len(one))
    return series_of(model, ids, how, time_limit)


def _gap_stream(model: DiffusionModel, asked: Asked, left: float) -> Any:
    return asked.stream(model, left)


# ------------------------------------------------------------------------------------------------------------ fields


def _gap(fields: Fields, prompts: list[Any]) -> fim.Gap | None:
    """The gap that a completion asks for, by a suffix or by markers in its prompt."""
    suffix = fields.string("suffix")
    one = prompts[0] if len(prompts) == 1 and isinstance(prompts[0], str) else None
    if suffix is not None and suffix.strip() and suffix != fim.END_OF_TEXT:
        if one is None:
            raise fields.refuse("prompt", "prompt: with a suffix it must be one string")
        return fim.Gap(one, suffix)
    return None if one is None else fim.split(one)


def prompts_of(fields: Fields, n_vocab: int) -> list[Any]:
    """Strings or lists of ids."""
    prompt = fields.take("prompt")
    if prompt is None:
        raise fields.refuse("prompt", '"prompt" is required')
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise fields.wrong("prompt", "a string, a list of strings, token ids, or a list of lists of those", prompt)
    if isinstance(prompt[0], (str, list)):
        for i, one in enumerate(prompt):
            if type(one) is not type(prompt[0]):
                raise fields.wrong(f"prompt[{i}]", "like the first", one)
            if isinstance(one, list):
                check_ids(fields, f"prompt[{i}]", one, n_vocab)
        return prompt
    if len(prompt) > MAX_IDS:
        raise fields.wrong("prompt", f"at most {MAX_IDS} ids", f"{len(prompt)} ids")
    check_ids(fields, "prompt", prompt, n_vocab)
    return [prompt]


def _refuse_chat(fields: Fields) -> None:
    if fields.boolean("logprobs"):
        raise fields.refuse("logprobs", "logprobs: a diffusion model has no next-token probabilities")
    if fields.integer("top_logprobs", 0, 2**31):
        raise fields.refuse("top_logprobs", "top_logprobs: a diffusion model has no next-token probabilities")
    modalities = fields.items("modalities")
    if modalities and modalities != ["text"]:
        raise fields.refuse("modalities", "modalities beyond text is not offered")
    fields.not_offered("logit_bias", "functions", "grammar", "audio")


def refuse_completion(fields: Fields, how: How) -> None:
    logprobs = fields.take("logprobs")
    if logprobs is not None and logprobs is not False:
        raise fields.refuse("logprobs", "logprobs: a diffusion model has no next-token probabilities")
    best_of = fields.integer("best_of", 1, 2**31)
    if best_of is not None and best_of > how.n:
        raise fields.refuse("best_of", f"best_of is not offered beyond n, which is {how.n}")
    fields.not_offered("logit_bias", "grammar")
