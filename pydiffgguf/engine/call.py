"""One call under way: when it must end, who may end it, and the iterator through which its events come."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

from pydiffgguf.engine.adapters import NONE, Chosen
from pydiffgguf.engine.options import Cancel
from pydiffgguf.errors import CancelledError

__all__ = ["Call", "OutOfTime", "Stream", "drain"]

_Event = TypeVar("_Event", covariant=True)
_Result = TypeVar("_Result", covariant=True)


class OutOfTime(Exception):
    """The time limit passed before there was anything to return; no caller of the library sees it."""


class Call:
    """What may end a call before it is done.

    Args:
        cancel: the caller's; see `Cancel`.
        time_limit_s: seconds from `begin`.
        adapters: what runs beside the weights.
    """

    def __init__(
        self, cancel: Cancel | None = None, time_limit_s: float | None = None, adapters: Chosen = NONE
    ) -> None:
        if cancel is not None and not callable(getattr(cancel, "is_set", None)):
            raise TypeError(f"cancel must have a method is_set(), as a threading.Event has, but is {cancel!r:.60}")
        self._cancel = cancel
        self._requested = False
        self._time_limit_s = time_limit_s
        #: What its session runs beside the weights.
        self.adapters = adapters
        #: On time.monotonic.
        self.began = time.monotonic()
        self.deadline: float | None = None
        #: A thread is computing for it, or will as soon as it has a session: it is no iterator that somebody left open.
        self.running = True

    def begin(self) -> None:
        """From now on the time counts."""
        self.began = time.monotonic()
        self.deadline = None if self._time_limit_s is None else self.began + self._time_limit_s

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began

    def late(self) -> bool:
        """Whether the time is over."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def cancel(self) -> None:
        """Ends the call, from any thread: at once where it has not begun, else within 20 ms and an operator."""
        self._requested = True

    def cancelled(self) -> bool:
        return self._requested or (self._cancel is not None and self._cancel.is_set())

    def check_cancelled(self) -> None:
        """Raises CancelledError where the call was cancelled."""
        if self.cancelled():
            raise CancelledError("the call was cancelled")

    def check(self) -> None:
        """The same, and raises OutOfTime where the time is over."""
        self.check_cancelled()
        if self.late():
            raise OutOfTime


#: What a thread brings in place of an event after the last.
_END: Any = object()


class Stream(Iterator[_Event], Generic[_Event, _Result]):
    """The events of one call, and then its `result`.

        stream = model.stream("Why is the sky blue?")
        for event in stream:
            ...
        print(stream.result.text)

    ``async for`` takes the events as well, each computed on another thread. Nothing is computed between two events.
    Leaving the loop early and dropping the stream ends the call, as `close()` does. `cancel()` ends it with a result:
    that of the canvases that were finished.
    """

    def __init__(self, events: Generator[_Event, None, _Result], call: Call) -> None:
        self._events = events
        self._call = call
        call.running = False
        self._turn = threading.RLock()
        self._ended = False
        self._results: list[_Result] = []

    def __iter__(self) -> Stream[_Event, _Result]:
        return self

    def __next__(self) -> _Event:
        """The next event; StopIteration, whose `value` is the result, after the last. A second thread waits."""
        with self._turn:
            self._call.running = True
            try:
                return next(self._events)
            except StopIteration as end:
                if not self._ended:
                    self._results.append(end.value)
                self._ended = True
                raise
            except BaseException:
                self._ended = True
                raise
            finally:
                self._call.running = False

    def __aiter__(self) -> Stream[_Event, _Result]:
        return self

    async def __anext__(self) -> _Event:
        """The next event, computed on a thread of asyncio's. Where the task is cancelled, so is the call; the task goes
        on once the thread has left the engine, at most 20 ms and an operator later."""
        import asyncio

        work = asyncio.get_running_loop().run_in_executor(None, next, self, _END)
        try:
            event = await asyncio.shield(work)
        except asyncio.CancelledError:
            self.cancel()
            while not work.done():
                try:
                    await asyncio.wait([work])
                except asyncio.CancelledError:  # once more: the thread still has to be waited for
                    continue
            work.exception()  # looked at, so that asyncio does not report it
            self.close()
            raise
        if event is _END:
            raise StopAsyncIteration
        return event

    @property
    def result(self) -> _Result:
        """What the call returns, once its last event was taken, or it was cancelled.

        Raises RuntimeError before that, and where the call was closed or failed.
        """
        if not self._results and self._call.cancelled():
            for _ in self:  # little is left: the call ends where it would go on
                pass
        if not self._results:
            raise RuntimeError(
                "the stream was closed, or failed: there is no result"
                if self._ended
                else "the stream has not ended: take its events to the last, or cancel() it, before its result"
            )
        return self._results[0]

    def cancel(self) -> None:
        """Ends this call and no other, from any thread, also before its first event. `result` is then what there is,
        with finish_reason "cancelled"."""
        self._call.cancel()

    def close(self) -> None:
        """Ends the call without a result, from any thread. Idempotent."""
        if not self._ended:
            self._call.cancel()
        with self._turn:
            self._ended = True
            self._events.close()

    async def aclose(self) -> None:
        """`close`, for ``contextlib.aclosing``."""
        self.close()

    def __enter__(self) -> Stream[_Event, _Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Stream{' (ended)' if self._ended else ''}>"


def drain(stream: Stream[Any, _Result]) -> _Result:
    """The result of a stream whose events nobody wants."""
    for _ in stream:
        pass
    return stream.result
