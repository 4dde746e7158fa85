"""``/v1/chat/completions`` and ``/v1/completions``, and the forms that other vendors' clients want of the latter."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from pydiffgguf import Block, DenoiseStep, Generation
from pydiffgguf.completions import ChatReply, Reply, Shared, TextReply, total
from pydiffgguf.server.endpoints import fim
from pydiffgguf.server.endpoints.frames import Frames, wanted
from pydiffgguf.server.endpoints.gaps import DEFAULT_GAP, Asked
from pydiffgguf.server.endpoints.generations import How, Series
from pydiffgguf.server.endpoints.looking import IDS, MAX_IDS, check_ids, read_template
from pydiffgguf.server.engine import Job, Kind, Mailbox
from pydiffgguf.server.errors import overflow
from pydiffgguf.server.fields import Fields
from pydiffgguf.server.service import EventStream, Service, client_of, count, reply

if TYPE_CHECKING:
    from pydiffgguf import DiffusionModel

__all__ = ["OpenAI", "plain_series", "prompts_of", "read_chat", "read_completion", "refuse_completion"]


class _FimReply(TextReply):
    """A completion whose text is also where Mistral's clients look for it: ``message`` and ``delta``."""

    def _choice(self, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {**super()._choice(text, logprobs, reason), "delta": {"content": text}}

    def choice(self, result: Generation) -> dict[str, Any]:
        choice = super().choice(result)
        del choice["delta"]
        return {**choice, "message": {"role": "assistant", "content": choice["text"]}}


def _same(result: Generation) -> Generation:
    return result


def _warmed(result: Generation) -> Generation:
    """The empty answer to a request that only wants its prompt in the cache."""
    stats = replace(result.stats, generated_tokens=0, reasoning_tokens=0)
    return Generation("", [], "length", stats)


class OpenAI:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service

    # ----------------------------------------------------------------------------------------------------------- chat

    async def chat(self, request: Request) -> Response:
        """A chat's next turn."""
        service = self._service
        model = service.model
        fields = await service.fields(request)
        messages, options, how = read_chat(fields, service)
        headers = service.headers(fields)

        def prepare() -> Series:
            ids = model.chat_tokens(messages, **options)
            check_room(model, len(ids))
            if options.get("tool_choice") in (None, "auto", "none"):
                return series_of(model, [ids], how, service.settings.time_limit)
            # A call that is forced is a constraint, which belongs to the conversation and not to its tokens.
            chat = partial(model.stream_chat, messages, **options)
            makers = [partial(how.limited, partial(chat, seed=seed)) for seed in how.seeds()]
            return Series(makers, service.settings.time_limit)

        with service.engine.place(Kind.WARM_UP if how.warm_up else Kind.CHAT):
            series = await service.text(prepare)
        shared = self._shared(how)
        replies: list[Reply] = [
            ChatReply(shared, model.config.canvas_length, model.tokenizer, index=i) for i in range(how.n)
        ]
        if how.warm_up:
            return await self._respond(request, series, how, replies, _warmed, Kind.WARM_UP, headers)
        return await self._respond(request, series, how, replies, _same, Kind.CHAT, headers)

    def _shared(self, how: How) -> Shared:
        """What all dictionaries of one request have in common."""
        service = self._service
        return Shared(service.name, how.include_usage, {"stop": how.stop}, fingerprint=service.fingerprint)

    # ---------------------------------------------------------------------------------------------------- completions

    async def completions(self, request: Request) -> Response:
        """Text behind a prompt, or in the gap before a suffix."""
        return await self._complete(request, both=False)

    async def fim_completions(self, request: Request) -> Response:
        """The same, also in the form of Mistral's interface."""
        return await self._complete(request, both=True)

    async def _complete(self, request: Request, both: bool) -> Response:
        service = self._service
        model, settings = service.model, service.settings
        fields = await service.fields(request)
        prompts, gap, how, echo = read_completion(fields, service)
        headers = service.headers(fields)
        echoed: list[tuple[str, str]] = []
        if echo and gap is not None:
            echoed = [(gap.prefix, gap.suffix)]
        elif echo:
            echoed = [(p if isinstance(p, str) else await service.text(model.detokenize, p), "") for p in prompts]
        shared, kind = self._shared(how), _FimReply if both else TextReply
        replies: list[Reply] = []
        for i in range(len(prompts) * how.n):
            before, behind = echoed[i // how.n] if echo else ("", "")
            length = model.config.canvas_length
            replies.append(kind(shared, length, model.tokenizer, index=i, echo=before, behind=behind))
        if gap is None:
            with service.engine.place(Kind.CHAT):
                series = await service.text(plain_series, model, prompts, how, settings.time_limit)
            return await self._respond(request, series, how, replies, _same, Kind.CHAT, headers)
        asked = Asked.of(gap, how, settings)
        makers = [partial(_gap_stream, model, replace(asked, seed=seed)) for seed in how.seeds()]
        with service.engine.place(Kind.KEYSTROKE):
            series = await service.text(Series, makers, asked.diffusion.time_limit)
        return await self._respond(request, series, how, replies, asked.generation, Kind.KEYSTROKE, headers)

    # ---------------------------------------------------------------------------------------------------------- both

    async def _respond(
        self,
        request: Request,
        series: Series,
        how: How,
        replies: Sequence[Reply],
        generation: Callable[[Any], Generation],
        kind: Kind,
        headers: dict[str, str],
    ) -> Response:
        """Runs the series; `generation`: what each of its results is."""
        service = self._service
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
            events = partial(self._stream, request, how, replies, generation)
            return EventStream(service, job, events, headers)
        results = [generation(result) for result in await service.run(request, job)]
        costs = total([result.stats for result in results])
        count(service, request, costs)
        choices = [one.choice(result) for one, result in zip(replies, results, strict=False)]
        return reply(replies[0].together(choices, costs), headers)

    async def _stream(
        self,
        request: Request,
        how: How,
        replies: Sequence[Reply],
        generation: Callable[[Any], Generation],
        items: AsyncIterator[Any],
    ) -> AsyncIterator[Any]:
        """The chunks of a stream, in the order that docs/SERVER.md tells."""
        frames = Frames(self._service.model, how.diffusion.frames)
        begun: set[int] = set()

        def draft(index: int, words: dict[str, Any] | None) -> list[dict[str, Any]]:
            return [] if words is None else [replies[index].draft(words)]

        def opening(index: int) -> list[dict[str, Any]]:
            if index in begun:
                return []
            begun.add(index)
            return replies[index].first()

        async for item in items:
            if isinstance(item, list):
                results = [generation(result) for result in item]
                costs = total([result.stats for result in results])
                count(self._service, request, costs)
                for index, result in enumerate(results):
                    last = index == len(results) - 1
                    ends = replies[index].end(result, last=last, costs=costs)
                    for chunk in [*opening(index), *draft(index, frames.flush()), *ends]:
                        yield chunk
                yield b"data: [DONE]\n\n"
                return
            index, event = item
            words = None
            if isinstance(event, DenoiseStep):
                words = frames.take(event)
            elif isinstance(event, Block):
                words = frames.flush()
            for chunk in [*opening(index), *draft(index, words), *replies[index].of(event)]:
                yield chunk


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


def read_chat(fields: Fields, service: Service) -> tuple[list[Any], dict[str, Any], How]:
    """A chat's messages, the options that its prompt depends on, and how to go on."""
    fields.take("model")
    messages, options = read_template(fields, service)
    how = How.read(fields, service, ("n_predict", "max_completion_tokens", "max_tokens"), 2**31)
    if fields.boolean("logprobs"):
        raise fields.refuse("logprobs", "logprobs: a diffusion model has no next-token probabilities")
    if fields.integer("top_logprobs", 0, 2**31):
        raise fields.refuse("top_logprobs", "top_logprobs: a diffusion model has no next-token probabilities")
    modalities = fields.items("modalities", of={"const": "text"})
    if modalities and modalities != ["text"]:
        raise fields.refuse("modalities", "modalities beyond text is not offered")
    fields.not_offered("logit_bias", "functions", "grammar", "audio")
    return messages, options, how


def read_completion(fields: Fields, service: Service) -> tuple[list[Any], fim.Gap | None, How, bool]:
    """The prompts, or the gap that they are, how to go on, and whether to repeat them."""
    fields.take("model")
    prompts = prompts_of(fields, service.model.config.n_vocab)
    gap = _gap(fields, prompts)
    how = How.read(fields, service, ("n_predict", "max_tokens"), 256 if gap is None else DEFAULT_GAP)
    echo = fields.boolean("echo")
    refuse_completion(fields, how)
    return prompts, gap, how, echo


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
    fields.need("prompt")
    one = ({"type": "string"}, IDS)
    prompt = fields.take("prompt", anyOf=[*one, {"type": "array", "minItems": 1, "items": {"anyOf": [*one]}}])
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


def refuse_completion(fields: Fields, how: How) -> None:
    logprobs = fields.take("logprobs", enum=[None, False])
    if logprobs is not None and logprobs is not False:
        raise fields.refuse("logprobs", "logprobs: a diffusion model has no next-token probabilities")
    best_of = fields.integer("best_of", 1, 2**31)
    if best_of is not None and best_of > how.n:
        raise fields.refuse("best_of", f"best_of is not offered beyond n, which is {how.n}")
    fields.not_offered("logit_bias", "grammar")
