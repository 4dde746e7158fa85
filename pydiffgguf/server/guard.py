"""The checks before every request: who may ask, from where, how much; the headers of every answer; the log line.

Plain ASGI throughout: Starlette's middleware classes hide that a client has left.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pydiffgguf.server.errors import ApiError, worded
from pydiffgguf.server.metrics import Metrics
from pydiffgguf.server.settings import Settings, digest, is_loopback
from pydiffgguf.server.wire import dump, inflate, show

__all__ = ["Guard", "Note", "note_of", "read_body"]

logger = logging.getLogger("pydiffgguf.server")

PUBLIC = ("/health", "/v1/health")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFE = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


@dataclass
class Note:
    """What the log says of a request, besides what the guard sees itself."""

    id: str
    endpoint: str = "other"
    tokens_in: int = 0
    tokens_out: int = 0
    steps: int = 0
    ended: str = ""
    began: float = field(default_factory=time.monotonic)


def note_of(scope: Scope) -> Note:
    note: Note = scope["pydiffgguf.note"]
    return note


class Guard:
    """The outermost application."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._names = {name.casefold() for name in (*settings.names, *settings.allowed_hosts)}
        self._open = not is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        note = Note(id="req_" + secrets.token_hex(8))
        scope["pydiffgguf.note"] = note
        headers = _Headers(scope["headers"])
        status = 0

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    *SAFE,
                    (b"x-request-id", note.id.encode()),
                    *self._cors(headers),
                ]
            await send(message)

        try:
            try:
                self._check(scope, headers)
            except ApiError as error:
                await refuse(error, scope, guarded)
                return
            if scope["method"] == "OPTIONS" and self._cors(headers):
                await _empty(guarded)
                return
            await self._app(scope, receive, guarded)
        except Exception:
            logger.exception("%s: a defect", note.id)
            if not status:
                await refuse(ApiError(500, "a defect of the server; its log has the traceback"), scope, guarded)
        finally:
            self._metrics.request(note.endpoint, status)
            self._log(scope, note, status)

    # --------------------------------------------------------------------------------------------------------- checks

    def _check(self, scope: Scope, headers: _Headers) -> None:
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size + len(scope["raw_path"]) + len(scope["query_string"]) > self._settings.headers:
            raise ApiError(431, f"the headers have over {self._settings.headers} bytes")
        self._check_host(headers)
        self._check_origin(scope, headers)
        path = scope["path"]
        page = path == "/" or path.startswith("/ui/")
        if self._settings.key_digests and path not in PUBLIC and not page and scope["method"] != "OPTIONS":
            self._check_key(path, headers)

    def _check_host(self, headers: _Headers) -> None:
        hosts = headers.all(b"host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else ""
        if name in self._names or (self._open and _is_address(name)):
            return
        raise ApiError(
            403, "the Host header names no host of this server; pydiffgguf serve --allowed-host NAME lets one in"
        )

    def _check_origin(self, scope: Scope, headers: _Headers) -> None:
        origins = headers.all(b"origin")
        if origins:
            own = f"{scope['scheme']}://{headers.first(b'host')}".casefold()
            listed = origins[0] in self._settings.cors_origins
            if len(origins) > 1 or not (listed or origins[0].casefold() == own):
                raise ApiError(403, "pages of this Origin may not ask; pydiffgguf serve --cors-origin ORIGIN lets them")
            kind = headers.first(b"content-type").partition(";")[0].strip().casefold()
            if scope["method"] == "POST" and kind != "application/json":
                raise ApiError(415, "a page must send its body as application/json")
            if listed:
                return
        site = headers.first(b"sec-fetch-site") or "none"
        navigation = (
            scope["method"] == "GET" and scope["path"] == "/" and headers.first(b"sec-fetch-mode") == "navigate"
        ) and headers.first(b"sec-fetch-dest") == "document"
        if site not in ("none", "same-origin") and not navigation:
            raise ApiError(403, "pages of other sites may not ask")

    def _check_key(self, path: str, headers: _Headers) -> None:
        given = headers.first(b"x-api-key")
        scheme, _, token = headers.first(b"authorization").partition(" ")
        if not given and scheme.casefold() == "bearer":
            given = token.strip()
        mine = digest(given.encode("latin-1"))
        # All of them, whichever fits: the time taken tells nothing.
        right = [hmac.compare_digest(mine, theirs) for theirs in self._settings.key_digests]
        if given and any(right):
            return
        # The typed reads' own client takes 403 for a key that is missing, and 401 for one that is wrong.
        status = 403 if path == "/v1/systemone" and not given else 401
        raise ApiError(
            status,
            "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY",
            type="authentication_error",
            headers={"www-authenticate": "Bearer"},
        )

    def _cors(self, headers: _Headers) -> list[tuple[bytes, bytes]]:
        origin = headers.first(b"origin")
        if not origin or origin not in self._settings.cors_origins:
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", b"authorization, content-type, x-api-key, x-client-id"),
            (b"access-control-expose-headers", b"x-ignored-params, x-request-id, retry-after"),
            (b"vary", b"Origin"),
        ]

    # ------------------------------------------------------------------------------------------------------------ log

    @staticmethod
    def _log(scope: Scope, note: Note, status: int) -> None:
        path = scope["path"].encode("unicode_escape").decode("ascii")[:200]
        took = (time.monotonic() - note.began) * 1000
        logger.info(
            "%s %s %s %d %.1f ms, in %d, out %d, steps %d%s",
            note.id,
            scope["method"],
            path,
            status,
            took,
            note.tokens_in,
            note.tokens_out,
            note.steps,
            f", {note.ended}" if note.ended else "",
        )


class _Headers:
    """A request's headers by lower-case name."""

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        self._pairs = list(pairs)

    def all(self, name: bytes) -> list[str]:
        return [value.decode("latin-1") for key, value in self._pairs if key == name]

    def first(self, name: bytes) -> str:
        return next(iter(self.all(name)), "")


def _host_name(host: str) -> str:
    """A Host header without its port and brackets."""
    host = host.strip().casefold()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def refuse(error: ApiError, scope: Scope, send: Send) -> None:
    """Answers with an error, in the shape that the path's clients read."""
    status, words = worded(error, scope["path"])
    body = dump(words)
    headers = [(name.encode(), value.encode("latin-1")) for name, value in error.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body if scope["method"] != "HEAD" else b""})


async def _empty(send: Send) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": [(b"access-control-max-age", b"600")]})
    await send({"type": "http.response.body", "body": b""})


async def read_body(scope: Scope, receive: Receive, settings: Settings) -> bytes:
    """A request's body, unpacked, within the limits of size and time whatever its Content-Length says."""
    deadline = time.monotonic() + settings.arrival
    body = bytearray()
    while True:
        try:
            message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body took over {settings.arrival:g} s", headers={"connection": "close"}) from None
        if message["type"] == "http.disconnect":
            raise Disconnected
        body += message.get("body", b"")
        if len(body) > settings.max_body:
            raise ApiError(413, f"the body has over {settings.max_body} bytes", headers={"connection": "close"})
        if not message.get("more_body", False):
            break
    headers = _Headers(scope["headers"])
    raw = inflate(bytes(body), headers.first(b"content-encoding").strip().casefold(), settings.max_body)
    if settings.log_bodies:
        logger.info("%s body %s", note_of(scope).id, show(raw.decode("utf-8", "replace")))
    return raw


class Disconnected(Exception):
    """The client has left: there is nobody to answer."""
