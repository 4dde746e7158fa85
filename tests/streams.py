"""Taking events from streams, and what a call left behind in its model's sessions."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from pydiffgguf import DiffusionModel, Prefill, Session, Stream
from pydiffgguf.engine.call import Call


def taken(stream: Stream[Any, Any]) -> tuple[list[Any], Any]:
    """The events without those of the prompt, and the result."""
    events = [event for event in stream if not isinstance(event, Prefill)]
    return events, stream.result


def first_step(stream: Stream[Any, Any]) -> Any:
    """The first event that is none of the prompt's."""
    return next(event for event in stream if not isinstance(event, Prefill))


def last_session(model: DiffusionModel) -> Session:
    """The session that the last call used."""
    return model._engine.pool.sessions()[-1]


def busy(model: DiffusionModel) -> int:
    """How many sessions are in use."""
    return len(model._engine.pool._lent)


def as_stream(play: Callable[[], Generator[Any, None, Any]]) -> Stream[Any, Any]:
    """A stream of made-up events."""
    return Stream(play(), Call())
