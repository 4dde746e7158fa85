"""``/infill`` and ``/completion``: llama-server's own forms, which editors speak."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pydiffgguf import Block, DenoiseStep, Generation, Infill, Stats
from pydiffgguf.completions import timings, total
from pydiffgguf.server.endpoints import fim
from pydiffgguf.server.endpoints.frames import Frames, wanted
from pydiffgguf.server.endpoints.gaps import CUT_SUFFIX, DEFAULT_GAP, Asked
from pydiffgguf.server.endpoints.generations import MAX_STOP, MAX_STOPS, Diffusion, How, Series, seed_of
from pydiffgguf.server.endpoints.looking import lora_options
from pydiffgguf.server.endpoints.openai import plain_series, prompts_of, refuse_completion
from pydiffgguf.server.engine import Job, Kind, Mailbox
from pydiffgguf.server.fields import Fields
from pydiffgguf.server.service import EventStream, Service, client_of, count, reply

__all__ = ["Native", "read_infill", "read_native"]


class Native:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def infill(self, request: Request) -> Response:
        """Text between two sides, as editors ask for it."""
        service = self._service
        service.check_loaded()
        fields = await service.fields(request)
        asked, form, stream, warm_up = read_infill(fields, service)
        headers = service.headers(fields)
        if warm_up:
            return await self._warm_up(request, asked, form, headers)
        return await self._fill(request, asked, form, stream, headers, supersedes=True)

    async def completion(self, request: Request) -> Response:
        """Text behind a prompt, or a gap where the prompt has a family's markers: all that Continue's provider for
        llama.cpp uses."""
        service = self._service
        model, settings = service.model, service.settings
        fields = await service.fields(request)
        prompt, gap, how, form = read_native(fields, service)
        headers = service.headers(fields)
        if gap is not None:
            return await self._fill(request, Asked.of(gap, how, settings), form, how.stream, headers, supersedes=False)
        with service.engine.place(Kind.CHAT):
            series = await service.text(plain_series, model, [prompt], how, settings.time_limit)
        job = Job(
            series.work(),
            Kind.CHAT,
            Mailbox(),
            wanted=partial(wanted, frames=how.stream and how.diffusion.frames is not None),
            cancel=series.cancel,
        )

        def whole(results: Sequence[Generation]) -> dict[str, Any]:
            count(service, request, total([result.stats for result in results]))
            return form.of_generation(results[0])

        if how.stream:
            service.engine.submit(job)
            return EventStream(service, job, lambda items: form.stream(items, how.diffusion.frames, whole), headers)
        return reply(whole(await service.run(request, job)), headers)

    async def _warm_up(self, request: Request, asked: Asked, form: _Form, headers: dict[str, str]) -> Response:
        """An empty answer, and the prompt in the cache: llama.vim sends the other files ahead of the first keystroke.
        One step is made, and thrown away."""
        service = self._service
        stats = Stats(seed=asked.seed, prompt_tokens=0)
        if asked.gap != fim.Gap("", ""):
            step = replace(asked.diffusion, sampling={**asked.diffusion.sampling, "max_steps": 1})
            job = await self._job(
                request, replace(asked, max_gap=1, n=1, diffusion=step), Kind.WARM_UP, supersedes=True
            )
            [result] = await service.run(request, job)
            stats = replace(asked.generation(result).stats, generated_tokens=0)
            count(service, request, stats)
        took = timings(stats, service.model.config.canvas_length)
        return reply(form.only({"content": "", "stop": True, "timings": took}), headers)

    async def _job(self, request: Request, asked: Asked, kind: Kind, supersedes: bool, frames: bool = False) -> Job:
        """The work of a gap."""
        model = self._service.model
        makers = [lambda left: asked.stream(model, left)]
        with self._service.engine.place(kind):
            series = await self._service.text(Series, makers, asked.diffusion.time_limit)
        return Job(
            series.work(),
            kind,
            Mailbox(),
            client=client_of(request),
            supersedes=supersedes,
            wanted=partial(wanted, frames=frames),
            cancel=series.cancel,
        )

    async def _fill(
        self, request: Request, asked: Asked, form: _Form, stream: bool, headers: dict[str, str], supersedes: bool
    ) -> Response:
        service = self._service
        frames = asked.diffusion.frames
        job = await self._job(request, asked, Kind.KEYSTROKE, supersedes, stream and frames is not None)

        def objects(results: Sequence[Infill]) -> list[dict[str, Any]]:
            [result] = results
            made = asked.generation(result)
            count(service, request, made.stats)
            return [form.of_gap(asked, result, made, i) for i in range(max(1, len(result.candidates)))]

        def whole(results: Sequence[Infill]) -> dict[str, Any]:
            """The end of a stream: the best, and all of them beside it where several were asked for."""
            found = objects(results)[: asked.n]
            if asked.n == 1 or form.fields is not None:
                return found[0]
            names = ("content", "tokens_predicted", "score")
            return {**found[0], "candidates": [{name: each[name] for name in names} for each in found]}

        if stream:
            service.engine.submit(job)
            return EventStream(service, job, lambda items: form.stream(items, frames, whole), headers)
        found = objects(await service.run(request, job))
        return reply(found[0] if asked.n == 1 else found[: asked.n], headers)


@dataclass(frozen=True)
class _Form:
    """How a reply is worded. `fields`: those that are wanted; None for all."""

    service: Service
    fields: Sequence[str] | None
    return_tokens: bool
    slot: int

    @classmethod
    def read(cls, service: Service, fields: Fields) -> _Form:
        slot = fields.peek("id_slot")  # left to be named as ignored: it chooses nothing
        return cls(
            service,
            _response_fields(fields),
            fields.boolean("return_tokens"),
            slot if isinstance(slot, int) and not isinstance(slot, bool) else -1,
        )

    def of_gap(self, asked: Asked, result: Infill, made: Generation, index: int) -> dict[str, Any]:
        """The reply for one candidate."""
        best = result.candidates[index] if index < len(result.candidates) else result
        trimmed = asked.trim(best.text)
        return self._object(
            made,
            index=index,
            content=trimmed.text,
            tokens_predicted=best.gap_tokens,
            truncated=result.stats.dropped_tokens > 0,
            stop_type=trimmed.kind if made.finish_reason == "stop" else "limit",
            stopping_word=trimmed.word,
            score=best.score if best.score > float("-inf") else 0.0,
        )

    def of_generation(self, made: Generation) -> dict[str, Any]:
        """The reply for a text behind a prompt."""
        return self._object(made, content=made.text, stop_type="eos" if made.finish_reason == "stop" else "limit")

    def _object(self, made: Generation, **values: Any) -> dict[str, Any]:
        model = self.service.model
        text = values["content"]
        whole = {
            "index": 0,
            "content": text,
            "tokens": model.tokenize(text, special=False) if self.return_tokens else [],
            "id_slot": self.slot,
            "stop": True,
            "model": self.service.name,
            "tokens_predicted": made.stats.generated_tokens,
            "tokens_evaluated": made.stats.prompt_tokens,
            "generation_settings": {"n_ctx": model.n_ctx, "seed": made.stats.seed},
            "prompt": "",
            "has_new_line": "\n" in text,
            "truncated": False,
            "stop_type": "eos",
            "stopping_word": "",
            "tokens_cached": made.stats.prompt_tokens,
            "timings": timings(made.stats, model.config.canvas_length),
        }
        return self.only({**whole, **values})

    def only(self, values: dict[str, Any]) -> dict[str, Any]:
        """The fields that were asked for; ``timings/prompt_n`` under that very key."""
        if self.fields is None:
            return values
        out: dict[str, Any] = {}
        for name in self.fields:
            value: Any = values
            for part in name.split("/"):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is not None:
                out[name] = value
        return out

    async def stream(self, items: AsyncIterator[Any], kind: str | None, whole: Any) -> AsyncIterator[Any]:
        """Drafts, blocks as they are finished, then the whole reply with no content."""
        frames = Frames(self.service.model, kind)
        empty = {"content": "", "tokens": [], "stop": False}
        sent = 0
        async for item in items:
            if isinstance(item, list):
                if (draft := frames.flush()) is not None:
                    yield {**empty, **draft}
                last = whole(item)
                rest = last.get("content", "")[sent:]
                if rest:
                    yield {**empty, "content": rest}
                yield {**last, "content": "", "stop": True}
            elif isinstance(item[1], DenoiseStep):
                if (draft := frames.take(item[1])) is not None:
                    yield {**empty, **draft}
            elif isinstance(item[1], Block) and (draft := frames.flush()) is not None:
                yield {**empty, **draft}


# ------------------------------------------------------------------------------------------------------------ fields


def read_infill(fields: Fields, service: Service) -> tuple[Asked, _Form, bool, bool]:
    """The gap, how its reply is worded, whether it is streamed, and whether only its prompt is wanted in the cache."""
    settings = service.settings
    fields.take("model")
    fields.need("input_prefix", "input_suffix")
    prefix, suffix = fields.string("input_prefix") or "", fields.string("input_suffix") or ""
    # llama-server puts the line before the cursor behind the prefix, whatever its manual says.
    prefix += fields.string("prompt") or ""
    form = _Form.read(service, fields)
    n_predict = fields.integer("n_predict", -1, 2**31 - 1)
    asked = Asked(
        gap=fim.Gap(prefix, suffix, _extra(fields)),
        max_gap=min(DEFAULT_GAP if n_predict in (None, -1, 0) else n_predict, settings.infill_max),
        n=_candidates(fields),
        seed=seed_of(fields, default=0),
        stop=fields.strings("stop", MAX_STOPS, MAX_STOP),
        n_indent=fields.integer("n_indent", 0, 2**16) or 0,
        ends=suffix.count("\n") < CUT_SUFFIX,
        diffusion=Diffusion.read(fields, settings.infill_time_limit, _gap_options),
        lora=lora_options(fields, service.model),
    )
    return asked, form, fields.boolean("stream"), n_predict == 0


def read_native(fields: Fields, service: Service) -> tuple[Any, fim.Gap | None, How, _Form]:
    """The prompt, or the gap that it is, how to go on, and how the reply is worded."""
    model = service.model
    fields.take("model")
    prompts = prompts_of(fields, model.config.n_vocab)
    if len(prompts) != 1:
        raise fields.refuse("prompt", "prompt: one at a time is answered here; /v1/completions takes several")
    gap = fim.split(prompts[0]) if isinstance(prompts[0], str) else None
    how = How.read(fields, service, ("n_predict", "max_tokens"), 256 if gap is None else DEFAULT_GAP)
    if how.diffusion.extra and how.stream:
        raise fields.refuse(
            "diffusion.settle", "diffusion.settle: text comes at the end here; /v1/completions streams it"
        )
    form = _Form.read(service, fields)
    refuse_completion(fields, how)
    return prompts[0], gap, how, form


def _gap_options(fields: Fields) -> dict[str, Any]:
    return {
        "mode": fields.string("mode"),
        "heal": fields.boolean("heal", True),
        "min_gap": fields.integer("min_gap", 0, 2**31 - 1),
        "until": fields.string("until"),
    }


def _candidates(fields: Fields) -> int:
    """The message's head is what llama.vscode looks for."""
    given = {name: fields.take(name, type="integer", minimum=1, maximum=4) for name in ("n_cmpl", "n")}
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise fields.wrong(name, "an integer", value)
        if not 1 <= value <= 4:
            raise fields.refuse(name, f"Field '{name}': Value must be between 1 <= value <= 4, but got {value}")
    return given["n_cmpl"] or given["n"] or 1


#: Another file around a gap, as `_extra` checks it.
FILE = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "filename": {"type": ["string", "null"]}},
    "required": ["text"],
}


def _extra(fields: Fields) -> tuple[tuple[str, str], ...]:
    files = []
    for i, item in enumerate(fields.items("input_extra", of=FILE) or []):
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise fields.wrong(f"input_extra[{i}]", 'an object with a string "text"', item)
        name = item.get("filename")
        if name is not None and not isinstance(name, str):
            raise fields.wrong(f"input_extra[{i}].filename", "a string", name)
        files.append((" ".join((name or "tmp").split()), item["text"]))
    return tuple(files)


def _response_fields(fields: Fields) -> list[str] | None:
    names: list[str] | None = fields.items("response_fields", of={"type": "string"})
    for i, name in enumerate(names or []):
        if not isinstance(name, str):
            raise fields.wrong(f"response_fields[{i}]", "a string", name)
    return names
