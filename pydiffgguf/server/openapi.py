"""The server's description of itself, by OpenAPI 3.1: its paths, and of each body what its reading asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydiffgguf.server.endpoints.looking import SCALE, read_detokenize, read_template, read_tokenize
from pydiffgguf.server.endpoints.native import read_infill, read_native
from pydiffgguf.server.endpoints.openai import read_chat, read_completion
from pydiffgguf.server.endpoints.systemone import read_questions
from pydiffgguf.server.fields import Fields, described
from pydiffgguf.server.service import Service

__all__ = ["description"]

_TURN = {"role": "user", "content": "What comes after 3?"}
_READ = {"state": "3 is odd.", "questions": {"odd": {"type": "noul", "instructions": "Is 3 odd?"}}}

#: What reads the body of a path, and a body that it takes.
BODIES: dict[str, tuple[Callable[[Fields, Service], Any], Mapping[str, Any]]] = {
    "/v1/chat/completions": (read_chat, {"messages": [_TURN], "max_tokens": 16}),
    "/chat/completions": (read_chat, {"messages": [_TURN], "max_tokens": 16}),
    "/v1/completions": (read_completion, {"prompt": "def ", "max_tokens": 16}),
    "/v1/fim/completions": (read_completion, {"prompt": "def ", "suffix": "return", "max_tokens": 16}),
    "/fim/completions": (read_completion, {"prompt": "def ", "suffix": "return", "max_tokens": 16}),
    "/completion": (read_native, {"prompt": "def ", "n_predict": 16}),
    "/completions": (read_native, {"prompt": "def ", "n_predict": 16}),
    "/infill": (read_infill, {"input_prefix": "def ", "input_suffix": "return", "n_predict": 16}),
    "/tokenize": (read_tokenize, {"content": "Hello"}),
    "/detokenize": (read_detokenize, {"tokens": [5]}),
    "/apply-template": (read_template, {"messages": [_TURN]}),
    "/v1/systemone": (read_questions, {"model": "jev-latest", **_READ}),
}
#: Bodies that are lists.
LISTS = {"/lora-adapters": SCALE}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "type", "param"],
            "properties": {
                "code": {"type": "integer"},
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
            },
        }
    },
}


def description(service: Service, routes: Iterable[tuple[str, str, str]]) -> dict[str, Any]:
    """The whole document.

    Args:
        routes: (method, path, what it does) of what is offered.
    """
    from pydiffgguf import __version__

    paths: dict[str, dict[str, Any]] = {}
    for method, path, summary in routes:
        paths.setdefault(path.replace(":path}", "}"), {})[method.lower()] = _operation(service, method, path, summary)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "pydiffgguf",
            "version": __version__,
            "description": "Fields that are not named here have no effect; the header x-ignored-params names them.",
        },
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }
    if service.settings.key_digests:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _operation(service: Service, method: str, path: str, summary: str) -> dict[str, Any]:
    error = {"description": "a refusal", "content": {"application/json": {"schema": _error_of(path)}}}
    found: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "the reply"}, "default": error}}
    if "{name" in path:
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        found["parameters"] = [name]
    if method == "POST":
        content = {"application/json": {"schema": _body(service, path)}}
        found["requestBody"] = {"required": True, "content": content}
    return found


def _body(service: Service, path: str) -> dict[str, Any]:
    if path in LISTS:
        return {"type": "array", "items": LISTS[path]}
    read, example = BODIES[path]
    return described(lambda fields: read(fields, service), example)


def _error_of(path: str) -> dict[str, Any]:
    """`errors.worded` says why there are two."""
    if path == "/v1/systemone":
        return {"type": "object", "required": ["detail"], "properties": {"detail": {}}}
    return {"$ref": "#/components/schemas/Error"}
