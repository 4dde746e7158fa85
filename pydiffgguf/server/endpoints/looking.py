"""What a client asks before it asks for text: health, models, properties, tokens."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from pydiffgguf.server.errors import ApiError
from pydiffgguf.server.fields import Fields, described
from pydiffgguf.server.service import Service, reply

if TYPE_CHECKING:
    from pydiffgguf import DiffusionModel

__all__ = [
    "IDS",
    "MAX_IDS",
    "SCALE",
    "Looking",
    "check_ids",
    "lora_options",
    "read_detokenize",
    "read_template",
    "read_tokenize",
]

MAX_IDS = 2**20
#: A list of token ids.
IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1, "maxItems": MAX_IDS}
MAX_MESSAGES = 4096


class Looking:
    """The endpoints that take no engine time."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, request: Request) -> Response:
        """Whether the model is loaded."""
        self._service.check_loaded()
        return reply({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """Two contracts in one body: OpenAI's ``data``, and ``models`` as the typed reads' client wants it."""
        entries = [self._entry(name) for name in self._service.settings.aliases]
        described = [
            {"name": name, "description": "a DiffusionGemma model, served by pydiffgguf", "release_date": None}
            for name in self._service.settings.aliases
        ]
        return reply({"object": "list", "data": entries, "models": described})

    async def model(self, request: Request) -> Response:
        """One model."""
        name = request.path_params["name"]
        if name not in self._service.settings.aliases:
            raise ApiError(404, "there is no such model; /v1/models lists those that are", param="model")
        return reply(self._entry(name))

    def _entry(self, name: str) -> dict[str, Any]:
        model = self._service.model
        config = model.config
        return {
            "id": name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "pydiffgguf",
            "meta": {
                "n_ctx": model.n_ctx,
                "n_ctx_train": config.n_ctx_train,
                "n_vocab": config.n_vocab,
                "n_embd": config.n_embd,
                "size": sum(tensor.n_bytes for tensor in model.tensors()),
            },
        }

    async def props(self, request: Request) -> Response:
        """What the model and its sampler are."""
        model, settings = self._service.model, self._service.settings
        template = model.chat_template or ""
        tokenizer = model.tokenizer
        sampling = model.sampling
        return reply(
            {
                "default_generation_settings": {"n_ctx": model.n_ctx, "params": {}},
                "total_slots": settings.sessions,
                "model_alias": self._service.name,
                "model_path": model.path.name,
                "modalities": {"vision": False, "audio": False},
                "chat_template": template,
                "chat_template_caps": {
                    "supports_tools": "tools" in template,
                    "supports_tool_calls": "tool_calls" in template,
                    "supports_system_role": "system" in template,
                },
                "bos_token": "" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id),
                "eos_token": "" if tokenizer.eos_id is None else tokenizer.piece(tokenizer.eos_id),
                "build_info": self._service.fingerprint,
                "is_sleeping": False,
                "diffusion": {
                    "canvas_length": model.config.canvas_length,
                    **{name: getattr(sampling, name) for name in sampling.__dataclass_fields__},
                    "infill_mode": str(model.metadata.get("diffusion.infill_mode", "auto")),
                    "memory": self._memory(),
                },
            }
        )

    def _memory(self) -> dict[str, int]:
        """Bytes by kind, of one session."""
        memory = self._service.model.memory()
        return {name: int(getattr(memory, name)) for name in memory.__dataclass_fields__}

    async def adapters(self, request: Request) -> Response:
        """The loaded adapters, numbered in the order in which they were loaded."""
        adapters = self._service.model.adapters.values()
        return reply([{"id": i, "path": each.path.name, "scale": each.scale} for i, each in enumerate(adapters)])

    async def set_adapters(self, request: Request) -> Response:
        """Sets scales, between two steps; those that the list does not name are set to 0, as llama-server does it."""
        service = self._service
        adapters = list(service.model.adapters.values())
        scales = scales_of(await service.items(request), len(adapters))

        def change() -> None:
            for i, adapter in enumerate(adapters):
                adapter.scale = scales.get(i, 0.0)

        await asyncio.wrap_future(service.engine.call(change))
        return reply({"success": True})

    async def metrics(self, request: Request) -> Response:
        """Counts, for Prometheus."""
        engine = self._service.engine
        text = self._service.metrics.text(
            waiting=engine.waiting, running=engine.running, cancelled=engine.cancelled, superseded=engine.superseded
        )
        return Response(text, media_type="text/plain; version=0.0.4")

    # --------------------------------------------------------------------------------------------------------- tokens

    async def tokenize(self, request: Request) -> Response:
        """The ids of a text."""
        fields = await self._service.fields(request)
        model = self._service.model
        content, bos, special, pieces = read_tokenize(fields, self._service)
        headers = self._service.headers(fields)

        def work() -> list[Any]:
            ids = model.tokenize(content, add_bos=bos and model.tokenizer.add_bos, special=special)
            return [{"id": i, "piece": model.tokenizer.piece(i)} for i in ids] if pieces else ids

        return reply({"tokens": await self._service.text(work)}, headers)

    async def detokenize(self, request: Request) -> Response:
        """The text of ids."""
        fields = await self._service.fields(request)
        model = self._service.model
        ids = read_detokenize(fields, self._service)
        headers = self._service.headers(fields)
        return reply({"content": await self._service.text(model.detokenize, ids)}, headers)

    async def apply_template(self, request: Request) -> Response:
        """The prompt that a conversation becomes, as text."""
        fields = await self._service.fields(request)
        model = self._service.model
        messages, options = read_template(fields, self._service)
        headers = self._service.headers(fields)

        def work() -> str:
            return model.detokenize(model.chat_tokens(messages, **options))

        return reply({"prompt": await self._service.text(work)}, headers)


def read_tokenize(fields: Fields, service: Service) -> tuple[str, bool, bool, bool]:
    """The text; whether a beginning is put before it, markers are read, pieces are wanted."""
    fields.need("content")
    return (
        fields.string("content") or "",
        fields.boolean("add_special"),
        fields.boolean("parse_special", True),
        fields.boolean("with_pieces"),
    )


def read_detokenize(fields: Fields, service: Service) -> list[int]:
    """Token ids."""
    fields.need("tokens")
    ids: list[int] = fields.items("tokens", 0, MAX_IDS, of=IDS["items"])
    check_ids(fields, "tokens", ids, service.model.config.n_vocab)
    return ids


def read_template(fields: Fields, service: Service) -> tuple[list[Any], dict[str, Any]]:
    """A conversation, and the options that its prompt depends on."""
    options = chat_options(fields)
    return messages_of(fields), options


def scales_of(items: list[Any], n: int) -> dict[int, float]:
    """Scales by an adapter's number, of ``[{"id":0,"scale":0.5}]``."""
    scales: dict[int, float] = {}
    for i, item in enumerate(items):
        where = f"[{i}]."
        number, scale = scale_of(Fields(item if isinstance(item, dict) else {}, where))
        if number >= n:
            raise ApiError(400, f"no LoRA adapter with id {number}", param="id")
        scales[number] = scale
    return scales


def scale_of(fields: Fields) -> tuple[int, float]:
    """One of them: the adapter's number, and its scale."""
    fields.need("id", "scale")
    number, scale = fields.integer("id", 0, 2**31), fields.number("scale")
    assert number is not None and scale is not None
    return number, float(scale)


#: What `scale_of` reads.
SCALE = described(scale_of, {"id": 0, "scale": 1.0})


def lora_options(fields: Fields, model: DiffusionModel) -> dict[str, Any]:
    """The adapters of one request, which other adapters do not act on; nothing where it does not say, or the model has
    none: editors send the field to whatever answers."""
    names = list(model.adapters)
    if not names:
        return {}
    items = fields.items("lora", of=SCALE)
    if items is None:
        return {}
    return {"lora": {names[i]: scale for i, scale in scales_of(items, len(names)).items()}}


def messages_of(fields: Fields) -> list[Any]:
    """A conversation, whose messages are looked at where they become a prompt."""
    fields.need("messages")
    messages: list[Any] = fields.items("messages", 1, MAX_MESSAGES, of={"type": "object"})
    return messages


def chat_options(fields: Fields) -> dict[str, Any]:
    """The options that a conversation's prompt depends on: thoughts and tools."""
    given = fields.inside("chat_template_kwargs")
    effort = fields.string("reasoning_effort")
    thinking = given.boolean("enable_thinking") or effort not in (None, "none", "minimal")
    options: dict[str, Any] = {"thinking": thinking}
    tools = fields.items("tools", of={"type": "object"})
    choice = fields.take("tool_choice")
    if tools:
        options["tools"] = tools
        if choice is not None:
            options["tool_choice"] = choice
    return options


def check_ids(fields: Fields, name: str, ids: list[Any], n_vocab: int) -> None:
    """Raises ApiError unless all are ids of the vocabulary."""
    for i, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < n_vocab:
            raise fields.wrong(f"{name}[{i}]", f"a token id from 0 to {n_vocab - 1}", token)
