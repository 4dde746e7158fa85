"""The page: a fixed table of files, which are read once."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["page_routes"]

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
#: Path to file.
FILES = {
    "/": "index.html",
    "/ui/app.css": "app.css",
    **{f"/ui/{name}.js": f"{name}.js" for name in ("app", "canvas", "chat", "facts", "infill", "net", "reads")},
}


def page_routes() -> list[Route]:
    """One route for each file. None is sent with a wider policy than the page's own."""
    return [_route(path, name) for path, name in FILES.items()]


def _route(path: str, name: str) -> Route:
    from pydiffgguf.server.guard import POLICY, note_of

    body = (files(__name__) / name).read_bytes()
    kind = KINDS["." + name.rpartition(".")[2]]

    async def endpoint(request: Request) -> Response:
        note_of(request.scope).endpoint = path
        return Response(body, media_type=kind, headers={"content-security-policy": POLICY, "cache-control": "no-cache"})

    return Route(path, endpoint, methods=["GET"])
