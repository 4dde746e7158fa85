"""The routes: a fixed table. No request names a file, a module or an address."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pydiffgguf.server.endpoints.looking import Looking
from pydiffgguf.server.endpoints.native import Native
from pydiffgguf.server.endpoints.openai import OpenAI
from pydiffgguf.server.endpoints.systemone import SystemOne
from pydiffgguf.server.errors import ApiError, worded
from pydiffgguf.server.guard import Disconnected, Guard, note_of
from pydiffgguf.server.openapi import description
from pydiffgguf.server.page import page_routes
from pydiffgguf.server.service import Service, Superseded, reply

__all__ = ["make_app"]

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]

NOT_OFFERED = (
    "/v1/embeddings",
    "/embeddings",
    "/v1/responses",
    "/responses",
    "/rerank",
    "/v1/rerank",
    "/slots",
    "/v1/messages",
)


def make_app(service: Service) -> Guard:
    """The application: everything behind the guard."""
    looking = Looking(service)
    openai = OpenAI(service)
    native = Native(service)
    systemone = SystemOne(service)

    async def _describe(request: Request) -> Response:
        """This description."""
        service.check_loaded()
        offered = [(method, path, _first_line(what)) for method, path, what in table if what is not _not_offered]
        return reply(description(service, offered))

    table: list[tuple[str, str, Endpoint]] = [
        ("GET", "/health", looking.health),
        ("GET", "/v1/health", looking.health),
        ("GET", "/v1/models", looking.models),
        ("GET", "/models", looking.models),
        ("GET", "/v1/models/{name:path}", looking.model),
        ("GET", "/props", looking.props),
        ("GET", "/openapi.json", _describe),
        ("GET", "/lora-adapters", looking.adapters),
        ("POST", "/lora-adapters", looking.set_adapters),
        ("POST", "/tokenize", looking.tokenize),
        ("POST", "/detokenize", looking.detokenize),
        ("POST", "/apply-template", looking.apply_template),
        ("POST", "/v1/chat/completions", openai.chat),
        ("POST", "/chat/completions", openai.chat),
        ("POST", "/v1/completions", openai.completions),
        ("POST", "/v1/fim/completions", openai.fim_completions),
        ("POST", "/fim/completions", openai.fim_completions),
        ("POST", "/completion", native.completion),
        ("POST", "/completions", native.completion),
        ("POST", "/infill", native.infill),
        ("POST", "/v1/systemone", systemone.read),
        ("POST", "/props", _not_offered),
        *(("POST", path, _not_offered) for path in NOT_OFFERED),
    ]
    if service.settings.metrics:
        table.append(("GET", "/metrics", looking.metrics))
    paths: dict[str, dict[str, Endpoint]] = {}
    for method, path, endpoint in table:
        paths.setdefault(path, {})[method] = endpoint
    routes = [_route(path, by_method) for path, by_method in paths.items()]
    if service.settings.page:
        routes += page_routes()
    app = Starlette(
        routes=routes,
        exception_handlers={
            ApiError: _refused,
            HTTPException: _http_error,
            Disconnected: _left,
            Superseded: _superseded,
        },
    )
    app.router.redirect_slashes = False
    return Guard(app, service.settings, service.metrics)


def _first_line(endpoint: Endpoint) -> str:
    return (endpoint.__doc__ or "").partition("\n")[0]


def _route(path: str, by_method: dict[str, Endpoint]) -> Route:
    async def endpoint(request: Request) -> Response:
        note_of(request.scope).endpoint = path
        method = "GET" if request.method == "HEAD" else request.method
        return await by_method[method](request)

    return Route(path, endpoint, methods=list(by_method))


async def _not_offered(request: Request) -> Response:
    raise ApiError(501, f"{request.url.path} is not offered")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    status, body = worded(error, request.url.path)
    return reply(body, error.headers, status)


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette's router refuses: 404 and 405."""
    assert isinstance(error, HTTPException)
    message = {404: "there is no such path", 405: "this path does not take that method"}
    return await _refused(
        request, ApiError(error.status_code, message.get(error.status_code, error.detail), headers=error.headers)
    )


async def _left(request: Request, error: Exception) -> Response:
    note_of(request.scope).ended = "client left"
    return Response(status_code=499)


async def _superseded(request: Request, error: Exception) -> Response:
    """Neither llama.vim nor llama.vscode takes this for a suggestion, an error, or something to remember."""
    return reply({"superseded": True, "stop": True, "stop_type": "none"})
