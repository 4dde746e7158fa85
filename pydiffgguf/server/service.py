"""What every endpoint has at hand: the model once it is loaded, the engine's thread, two threads for text; and how a
request's work is run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pydiffgguf.errors import DeviceError
from pydiffgguf.server.engine import Engine, Job, Outcome, Why
from pydiffgguf.server.errors import ApiError, from_exception
from pydiffgguf.server.fields import Fields, ignored_header
from pydiffgguf.server.guard import Disconnected, note_of, read_body
from pydiffgguf.server.metrics import Metrics
from pydiffgguf.server.settings import Settings
from pydiffgguf.server.wire import dump, event, parse

if TYPE_CHECKING:
    from pydiffgguf import DiffusionModel, Stats

__all__ = ["EventStream", "Service", "Superseded", "client_of", "count", "reply"]

logger = logging.getLogger("pydiffgguf.server")

T = TypeVar("T")

#: Bodies above this are parsed off the event loop, which others wait for.
LARGE = 64 * 2**10


class Service:
    """Shared by all requests.

    Args:
        settings: the server's.
        on_failure: called, on the event loop, when a device was lost: nothing can be answered from then on.
    """

    def __init__(self, settings: Settings, on_failure: Callable[[], None] = lambda: None) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.engine = Engine(settings.sessions, settings.queue, self.metrics.step)
        self.created = int(time.time())
        self._on_failure = on_failure
        self._model: DiffusionModel | None = None
        self.progress = 0.0
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="text")

    # ---------------------------------------------------------------------------------------------------------- model

    def loaded(self, model: DiffusionModel) -> None:
        """From here on there is a model."""
        self._model = model
        self.progress = 1.0

    @property
    def model(self) -> DiffusionModel:
        """Raises ApiError 503 while it loads."""
        if self._model is None:
            seconds = {"retry-after": "2"}
            raise ApiError(503, "Loading model", headers=seconds, extra={"progress": round(self.progress, 3)})
        return self._model

    def check_loaded(self) -> None:
        """Raises ApiError 503 while the model loads."""
        _ = self.model

    @property
    def name(self) -> str:
        """The model's id in replies."""
        return self.settings.aliases[0]

    @property
    def fingerprint(self) -> str:
        """Which build of the engine answers."""
        from pydiffgguf import __version__

        return f"pydiffgguf-{__version__}"

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    # --------------------------------------------------------------------------------------------------------- bodies

    async def fields(self, request: Request) -> Fields:
        """A request's body as fields. Raises ApiError for any other body."""
        raw = await read_body(request.scope, request.receive, self.settings)
        body = parse(raw) if len(raw) < LARGE else await self.text(parse, raw)
        return Fields(body)

    async def items(self, request: Request) -> list[Any]:
        """A request's body that is a list."""
        raw = await read_body(request.scope, request.receive, self.settings)
        items: list[Any] = parse(b'{"list":' + raw + b"}")["list"]
        if not isinstance(items, list):
            raise ApiError(400, "the body must be a list")
        return items

    def headers(self, fields: Fields) -> dict[str, str]:
        """Headers of the answer that name the fields which had no effect; called when all others were taken."""
        names = ignored_header(fields.rest(self.settings.strict_params))
        return {"x-ignored-params": names} if names else {}

    async def text(self, function: Callable[..., T], *arguments: Any) -> T:
        """Work on text (a template, a tokenizer), which would keep the event loop, or the engine, waiting. Raises
        ApiError for what the library refuses."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
        except Exception as error:
            raise answer_for(error) from error

    # ----------------------------------------------------------------------------------------------------------- work

    async def run(self, request: Request, job: Job) -> Any:
        """Submits a job and waits for its result. Raises ApiError, also for one that was superseded (status 200)."""
        async with self._watched(request.scope, request.receive, job):
            self.engine.submit(job)
            while not isinstance(item := await job.mailbox.get(), Outcome):
                pass
            return self.result(request.scope, item)

    @contextlib.asynccontextmanager
    async def _watched(self, scope: Scope, receive: Receive, job: Job) -> AsyncIterator[None]:
        """Ends the job when the client leaves, and in any case when this block is left."""

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.engine.end(job, Why.LEFT)

        watcher = asyncio.get_running_loop().create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()
            note_of(scope).steps = job.steps
            self.engine.end(job, Why.LEFT)

    def result(self, scope: Scope, outcome: Outcome) -> Any:
        """An outcome's result; or raises the exception that it is."""
        if outcome.error is not None:
            if isinstance(outcome.error, DeviceError):
                self._on_failure()
            raise answer_for(outcome.error)
        if outcome.ended == Why.LEFT:
            raise Disconnected
        if outcome.ended == Why.SUPERSEDED:
            note_of(scope).ended = "superseded"
            raise Superseded
        if outcome.result is None:
            raise ApiError(503, "the server is shutting down", headers={"retry-after": "10"})
        return outcome.result


def answer_for(error: Exception) -> ApiError:
    """The answer for an exception; a defect goes into the log with its traceback."""
    answer = from_exception(error)
    if answer.status == 500:
        logger.error("%s", answer.message, exc_info=error)
    return answer


class Superseded(Exception):
    """A newer request of the same client has taken this one's place."""


def client_of(request: Request) -> str:
    """Who asks: what a newer request must have in common to take an older one's place."""
    named = request.headers.get("x-client-id")
    if named:
        return "id " + named
    address = request.client.host if request.client else ""
    return "\n".join((address, request.headers.get("authorization", ""), request.headers.get("user-agent", "")))


def count(service: Service, request: Request, stats: Stats) -> None:
    """Tokens of an answer, into the log's line and the metrics."""
    note = note_of(request.scope)
    note.tokens_in += stats.prompt_tokens
    note.tokens_out += stats.generated_tokens
    cached = stats.reused_tokens
    service.metrics.tokens(prompt=stats.prompt_tokens - cached, cached=cached, completion=stats.generated_tokens)


def reply(value: Any, headers: dict[str, str] | None = None, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(dump(value), status, headers, media_type="application/json")


class EventStream(Response):
    """Server-sent events of a job that was submitted.

    Args:
        job: its mailbox is read.
        events: told each item of the mailbox, the Outcome's result last; yields what goes out, as values for JSON or
            as bytes that go out as they are.
    """

    def __init__(
        self,
        service: Service,
        job: Job,
        events: Callable[[AsyncIterator[Any]], AsyncIterator[Any]],
        headers: dict[str, str],
    ) -> None:
        super().__init__(
            b"",
            headers={"cache-control": "no-store", "x-accel-buffering": "no", **headers},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._service = service
        self._job = job
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._service.settings

        async def write(part: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": part, "more_body": more})

        async def items() -> AsyncIterator[Any]:
            while True:
                try:
                    item = await self._job.mailbox.get(settings.heartbeat)
                except TimeoutError:
                    await write(b":\n\n")
                    continue
                if isinstance(item, Outcome):
                    yield self._service.result(scope, item)
                    return
                yield item

        async with self._service._watched(scope, receive, self._job):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for part in self._events(items()):
                    await write(part if isinstance(part, bytes) else event(part))
            except Disconnected:
                note_of(scope).ended = "client left"
            except Superseded:
                await write(event({"superseded": True, "stop": True, "stop_type": "none"}))
            except Exception as error:
                answer = from_exception(error)
                note_of(scope).ended = answer.type
                await write(event(answer.body()))
            await write(b"", more=False)
