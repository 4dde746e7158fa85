"""``/v1/systemone``: typed questions about a text, each answered with probabilities."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Generator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from pydiffgguf.server.engine import Job, Kind, Mailbox
from pydiffgguf.server.errors import ApiError
from pydiffgguf.server.fields import NOTHING, Fields
from pydiffgguf.server.guard import note_of
from pydiffgguf.server.service import Service, client_of, count, reply
from pydiffgguf.server.wire import dump

if TYPE_CHECKING:
    from pydiffgguf import Answer

__all__ = ["SystemOne", "read_questions"]

#: Names that clients of this interface send for whatever model there is.
NAMES = ("jev-latest", "jev-preview", "openjev-latest", "openjev-0.1")
TYPES = ("noul", "choice", "score")
MAX_QUESTIONS, MAX_CHOICES, MAX_LEVELS = 256, 255, 10
#: Characters of a wrong value that come back.
MAX_INPUT = 80
#: Questions as `_shape` and `_question` check them.
QUESTIONS: dict[str, Any] = {
    "type": "object",
    "minProperties": 1,
    "maxProperties": MAX_QUESTIONS,
    "additionalProperties": {
        "type": "object",
        "properties": {
            "type": {"enum": [*TYPES]},
            "instructions": {},
            "criteria": {
                "anyOf": [
                    {"type": "object", "maxProperties": MAX_CHOICES},
                    {"type": "array", "minItems": 1, "maxItems": MAX_LEVELS},
                    {"type": "null"},
                ]
            },
        },
        "required": ["type"],
    },
}


class SystemOne:
    """The endpoint."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def read(self, request: Request) -> Response:
        """Typed questions about a text, answered with probabilities."""
        began = time.monotonic()
        service = self._service
        model = service.model
        fields = await service.fields(request)
        state, asked, options = read_questions(fields, service)
        cancelled = threading.Event()
        # The same request has the same draws, and so the same answer.
        options["seed"] = int.from_bytes(hashlib.sha256(dump([state, asked])).digest()[:8], "big")
        headers = service.headers(fields)
        work = partial(model.read, state, asked, cancel=cancelled, **options)
        job = Job(_one_turn(work), Kind.KEYSTROKE, Mailbox(), client=client_of(request), cancel=cancelled.set)
        found = await service.run(request, job)
        stats = found.stats
        count(service, request, stats)
        took, model_ms = (time.monotonic() - began) * 1000, (stats.prefill_s + stats.denoise_s) * 1000
        timing = f"model;dur={model_ms:.1f}, server;dur={took - model_ms:.1f}, total;dur={took:.1f}"
        headers |= {"x-typesafe-request-id": note_of(request.scope).id, "server-timing": timing}
        answers = {id_: _words(answer, asked[id_]) for id_, answer in found.items()}
        usage = {"input_tokens": stats.prompt_tokens, "output_tokens": stats.generated_tokens}
        return reply({"model": service.name, "answers": answers, "usage": usage}, headers)


def read_questions(fields: Fields, service: Service) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """What is asked of, the questions as the Python interface takes them, and its options."""
    state, questions = _shape(fields)
    names = (*service.settings.aliases, *NAMES)
    name = fields.take("model", enum=[*names])
    if name not in names:
        raise _usage(f"Unknown model: {str(name)[:MAX_INPUT]}")
    if any([fields.take(key, enum=NOTHING) for key in ("images", "assets")]):
        raise _meaning("images are not supported")
    asked = {id_: _question(id_, question) for id_, question in questions.items()}
    numbers = {
        "steps": fields.integer("steps", 1, 8),
        "samples": fields.integer("samples", 1, 32),
        "think": fields.integer("think", 0, 4096),
    }
    options: dict[str, Any] = {key: value for key, value in numbers.items() if value is not None}
    return state, asked, {**options, "sequential": fields.boolean("sequential")}


def _one_turn(work: Any) -> Generator[Any, None, Any]:
    """A read is one denoise step, or a few: it is not divided."""
    yield from ()
    return work()


def _meaning(message: str) -> ApiError:
    """A request of the right shape that makes no sense."""
    return ApiError(400, message, extra={"detail": message})


def _usage(message: str) -> ApiError:
    return ApiError(400, message, extra={"detail": {"error_type": "api_usage_error", "message": message}})


def _shape(fields: Fields) -> tuple[Any, Mapping[str, Any]]:
    """State and questions. Raises ApiError 422, with a list of what is wrong."""
    faults = []

    def fault(kind: str, place: list[str], message: str, value: Any) -> None:
        shown = value if value is None or isinstance(value, (bool, int, float)) else str(value)[:MAX_INPUT]
        faults.append({"type": kind, "loc": ["body", *place], "msg": message, "input": shown})

    missing = [name for name in ("state", "questions") if fields.lacks(name)]
    state = fields.take("state", type=["string", "object", "array"])
    questions = fields.take("questions", **QUESTIONS)
    if "state" in missing:
        fault("missing", ["state"], "Field required", None)
    elif not isinstance(state, (str, dict, list)):
        fault("type_error", ["state"], "Input should be a string, an object or a list", state)
    if "questions" in missing:
        fault("missing", ["questions"], "Field required", None)
    elif not isinstance(questions, dict):
        fault("type_error", ["questions"], "Input should be an object", questions)
    elif not 1 <= len(questions) <= MAX_QUESTIONS:
        fault("length_error", ["questions"], f"There should be 1 to {MAX_QUESTIONS} questions", len(questions))
    else:
        for id_, question in questions.items():
            if not isinstance(question, dict):
                fault("type_error", ["questions", id_[:MAX_INPUT]], "Input should be an object", question)
    if faults:
        raise ApiError(422, "the request has not the shape of one", extra={"detail": faults})
    return state, questions


def _question(id_: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A question as the Python interface takes it. Keys that this interface does not know are left out."""
    kind, criteria = given.get("type"), given.get("criteria")
    if kind not in TYPES:
        raise _meaning("images are not supported") if kind == "box" else _usage("Invalid request.")
    if kind == "noul" and not isinstance(criteria, (dict, type(None))):
        raise _usage("Invalid request.")
    if kind == "choice":
        if not isinstance(criteria, dict):
            raise _usage("Invalid request.")
        if not criteria:
            raise _meaning(f"Choice question must have at least one choice: {id_[:MAX_INPUT]}")
        if len(criteria) > MAX_CHOICES:
            raise _meaning(f"Too many choices. Must have at most {MAX_CHOICES} choices.")
    if kind == "score":
        if not isinstance(criteria, list) or not criteria:
            raise _usage("Invalid request.")
        if len(criteria) > MAX_LEVELS:
            raise _meaning(f"Too many score levels. Must have at most {MAX_LEVELS} levels.")
    return {"type": kind, "instructions": given.get("instructions"), "criteria": criteria}


def _words(answer: Answer, question: Mapping[str, Any]) -> dict[str, Any]:
    kind = question["type"]
    words: dict[str, Any] = {"type": kind, kind: answer.value}
    if kind == "score":
        words["legend"] = {str(i): level for i, level in enumerate(question["criteria"])}
    if kind != "noul":
        words |= {"probabilities": answer.probabilities, "confidence": answer.confidence}
    return words
