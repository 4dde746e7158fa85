"""``infill --stdio``: a process that stays, for editors. Requests come as JSON lines on stdin, events go to stdout.

A request fills one gap:

    {"id": 1, "prefix": "...", "suffix": "...", "options": {"max_gap": 32}, "supersede": true, "drafts": false}

`id` is a number or a string of the client's; `options` are keyword arguments of DiffusionModel.infill; `supersede` ends
the requests before it; `drafts` asks for a line for every denoise step. ``{"cancel": 1}`` ends a request. The last line
of each request is its result or its error:

    {"id": 1, "event": "result", "text": "...", ...}
    {"id": 1, "event": "error", "error": "ContextOverflowError", "message": "..."}

A request that was ended has a result with finish_reason "cancelled". Requests are worked off one after the other. The
end of stdin ends the process, after what was asked for.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydiffgguf.cli.json_lines import JsonLines, LineWriter
from pydiffgguf.cli.talk import follow, infill_dict
from pydiffgguf.cli.terminal import Output, SilentOutput

if TYPE_CHECKING:
    from pydiffgguf.model import DiffusionModel

__all__ = ["Stdio"]


@dataclass(frozen=True)
class _Request:
    id: int | str
    prefix: str
    suffix: str
    options: dict[str, Any]
    drafts: bool
    cancel: threading.Event = field(default_factory=threading.Event)


class Stdio:
    """Answers requests until their stream ends.

    Args:
        model: what fills.
        options: keyword arguments of infill that a request's own go before.
        lines: the requests, in UTF-8.
        writer: where answers go.
    """

    def __init__(
        self, model: DiffusionModel, options: Mapping[str, Any], lines: Iterable[bytes], writer: LineWriter
    ) -> None:
        self._model = model
        self._options = dict(options)
        self._lines = lines
        self._writer = writer
        self._waiting: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._open: dict[int | str, _Request] = {}
        self._lock = threading.Lock()

    def run(self) -> None:
        """Reads on this thread, fills on another."""
        self._writer.write({"event": "ready", "model": str(self._model.path), "n_ctx": self._model.n_ctx})
        worker = threading.Thread(target=self._work, name="infill", daemon=True)
        worker.start()
        try:
            for line in self._lines:
                if line.strip():
                    self._read(line)
        except BaseException:  # Ctrl-C: what runs ends within a step
            self._end_all()
            raise
        finally:
            self._waiting.put(None)
            worker.join()

    def _read(self, line: bytes) -> None:
        id: int | str | None = None
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise TypeError("a request is an object")
            if "cancel" in value:
                self._cancel(value)
                return
            id = _id(value.get("id"))
            self._accept(id, value)
        except (TypeError, ValueError) as error:
            self._fail(id, error)

    def _accept(self, id: int | str, value: dict[str, Any]) -> None:
        unknown = set(value) - {"id", "prefix", "suffix", "options", "supersede", "drafts"}
        if unknown:
            raise TypeError(f"unknown field {sorted(unknown)[0]!r}")
        for name, kind in (("prefix", str), ("suffix", str), ("options", dict)):
            if not isinstance(value.get(name, kind()), kind):
                raise TypeError(f"{name} must be {'a string' if kind is str else 'an object'}")
        for name in ("supersede", "drafts"):
            if not isinstance(value.get(name, False), bool):
                raise TypeError(f"{name} must be true or false")
        options = value.get("options", {})
        if "cancel" in options:
            raise TypeError('a request is cancelled by {"cancel": ID}')
        request = _Request(
            id, value.get("prefix", ""), value.get("suffix", ""), self._options | options, value.get("drafts", False)
        )
        with self._lock:
            if id in self._open:
                raise ValueError(f"request {id!r} is not answered yet")
            if value.get("supersede", False):
                for earlier in self._open.values():
                    earlier.cancel.set()
            self._open[id] = request
        self._waiting.put(request)

    def _cancel(self, value: dict[str, Any]) -> None:
        if set(value) != {"cancel"}:
            raise TypeError('a cancellation is {"cancel": ID} and nothing else')
        with self._lock:
            request = self._open.get(_id(value["cancel"]))
        if request is not None:  # one that was answered meanwhile is no mistake of the client's
            request.cancel.set()

    def _end_all(self) -> None:
        with self._lock:
            for request in self._open.values():
                request.cancel.set()

    def _work(self) -> None:
        while (request := self._waiting.get()) is not None:
            output: Output = JsonLines(self._writer, {"id": request.id}) if request.drafts else SilentOutput()
            try:
                stream = self._model.stream_infill(
                    request.prefix, request.suffix, cancel=request.cancel, **request.options
                )
                result = follow(stream, output)
                answer = {"id": request.id, "event": "result", **infill_dict(result)}
            except Exception as error:  # a worker always answers: an editor would wait for ever
                self._fail(request.id, error, request)
                continue
            self._close(request)
            self._writer.write(answer)

    def _close(self, request: _Request) -> None:
        with self._lock:
            del self._open[request.id]

    def _fail(self, id: int | str | None, error: Exception, request: _Request | None = None) -> None:
        if request is not None:
            self._close(request)
        text = " ".join(str(error).split()) or type(error).__name__
        self._writer.write({"id": id, "event": "error", "error": type(error).__name__, "message": text})


def _id(value: Any) -> int | str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError("id must be a number or a string")
    return value
