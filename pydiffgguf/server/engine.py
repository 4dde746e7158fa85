"""One engine, many requests: a thread that makes every model call, one denoise step at a time, and chooses anew after
each whose turn it is.

A request's work is a generator: one ``next()`` is one denoise step, or one chunk of a prompt. So a keystroke runs
inside a long chat, and what nobody waits for any longer ends after the step under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from pydiffgguf.server.errors import ApiError

__all__ = ["Engine", "Job", "Kind", "Mailbox", "Outcome", "Why"]

logger = logging.getLogger("pydiffgguf.server")

#: Of this many seconds one goes to a class that would have to wait: every fifth step, where all take as long. A chat's
#: step takes 3 to 5 times as long as a gap's once its text has grown, and by number made a gap wait for four of them.
FAIR = 5


class Kind(IntEnum):
    """Whose turn comes first: the lowest."""

    KEYSTROKE = 0
    CHAT = 1
    WARM_UP = 2


class Why(IntEnum):
    """Why a job ended before its work did."""

    LEFT = 0  # the client has closed the connection
    SUPERSEDED = 1  # the same client has asked anew
    STOPPING = 2  # the server is


@dataclass(frozen=True)
class Outcome:
    """How a job ended: with a result, an exception, or before its end."""

    result: Any = None
    error: Exception | None = None
    ended: Why | None = None


class Mailbox:
    """Events from the engine's thread to a coroutine. Of drafts only the newest is kept, everything else in order: a
    slow reader loses drafts, and never text."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._lock = threading.Lock()
        self._items: deque[tuple[bool, Any]] = deque()

    def put(self, item: Any, draft: bool = False) -> None:
        """From any thread. A draft replaces one that still waits as the last item."""
        with self._lock:
            was_empty = not self._items
            if draft and self._items and self._items[-1][0]:
                self._items.pop()
            self._items.append((draft, item))
        if was_empty:
            try:
                self._loop.call_soon_threadsafe(self._ready.set)
            except RuntimeError:  # the loop has ended: nobody reads any longer
                logger.debug("an event came after the end of the loop")

    async def get(self, timeout: float | None = None) -> Any:
        """The next item. Raises TimeoutError where none comes within `timeout` seconds."""
        while True:
            with self._lock:
                if self._items:
                    return self._items.popleft()[1]
                self._ready.clear()
            try:
                await asyncio.wait_for(self._ready.wait(), timeout)
            except asyncio.TimeoutError:  # not the built-in's name before Python 3.11
                raise TimeoutError from None


@dataclass(eq=False)
class Job:
    """One request's work.

    Args:
        work: not begun; every ``next()`` makes a step.
        kind: its class.
        mailbox: gets every event of `work` that `wanted` lets through (None: none), and the Outcome last.
        client: who asks; None for nobody in particular.
        supersedes: ends older jobs of the same client that supersede, too.
        cancel: makes the step under way, and with it `work`, end soon with a result of what there is; from any thread.
    """

    work: Generator[Any, None, Any]
    kind: Kind
    mailbox: Mailbox
    client: str | None = None
    supersedes: bool = False
    wanted: Callable[[Any], bool | None] | None = None
    cancel: Callable[[], None] | None = None
    steps: int = 0
    number: int = 0
    took: float | None = None  # seconds, of its last step
    ended: Why | None = None
    done: bool = field(default=False)


class Engine:
    """The thread and its queue.

    Args:
        sessions: jobs that may be under way together. With two or more, chats leave the last one to keystrokes.
        queue: jobs that may wait besides.
        on_step: told the seconds of every step, on the engine's thread.
        clock: seconds.
    """

    def __init__(
        self,
        sessions: int,
        queue: int,
        on_step: Callable[[float], None] = lambda seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sessions = sessions
        self._queue = queue
        self._on_step = on_step
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._coming: Counter[Kind] = Counter()
        self._calls: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._waited = 0.0  # seconds of others' steps since a lower class had its turn
        self._number = 0
        self._stopping = False
        self._closed = False
        self.cancelled = 0
        self.superseded = 0
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # ------------------------------------------------------------------------------------------------ from any thread

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def call(self, function: Callable[[], None]) -> Future[None]:
        """Runs a function on the engine's thread, between two steps."""
        done: Future[None] = Future()
        with self._changed:
            self._calls.append((function, done))
            self._changed.notify()
        return done

    @contextlib.contextmanager
    def place(self, kind: Kind) -> Iterator[None]:
        """Keeps a place for a job while its text is prepared. Raises ApiError where `submit` would: at once, before a
        template is rendered for nothing. (Unless places are kept, 64 requests of one moment are all prepared before the
        queue is full: a refusal then took 83 ms in place of 0.5.)"""
        with self._changed:
            self._refuse(kind)
            self._coming[kind] += 1
        try:
            yield
        finally:
            with self._changed:
                self._coming[kind] -= 1

    def submit(self, job: Job) -> None:
        """Takes a job, or raises ApiError: 429 where the queue is full, 503 while the server stops."""
        with self._changed:
            if self._stopping:
                self._refuse(job.kind)  # before it ends others
            for older in [*self._waiting, *self._running]:
                if self._ends(job, older):
                    self._end(older, Why.SUPERSEDED)
            self._number += 1
            job.number = self._number
            self._refuse(job.kind)
            (self._running if self._fits(job.kind) else self._waiting).append(job)
            self._changed.notify()

    def end(self, job: Job, why: Why) -> None:
        """Ends a job: at once where it waits, else after the step under way."""
        with self._changed:
            self._end(job, why)

    def stop(self) -> None:
        """Takes no more jobs."""
        with self._changed:
            self._stopping = True

    def end_all(self) -> None:
        """Ends what waits and what runs, which answers with what it has."""
        with self._changed:
            for job in [*self._waiting, *self._running]:
                self._end(job, Why.STOPPING)

    def close(self, timeout: float) -> None:
        """Ends the thread after the step under way; waits this many seconds for it."""
        with self._changed:
            self._stopping = self._closed = True
            self._changed.notify()
        self._thread.join(timeout)

    # --------------------------------------------------------------------------------------------- with the lock held

    def _ends(self, job: Job, older: Job) -> bool:
        if older.kind == Kind.WARM_UP:
            return job.kind != Kind.WARM_UP or job.client == older.client
        return job.supersedes and older.supersedes and job.client == older.client and job.kind != Kind.WARM_UP

    def _end(self, job: Job, why: Why) -> None:
        if job.done or job.ended is not None:
            return
        job.ended = why
        if why == Why.SUPERSEDED:
            self.superseded += 1
        elif why == Why.LEFT:
            self.cancelled += 1
        if job in self._waiting:
            self._waiting.remove(job)
            job.done = True
            job.work.close()  # not begun: nothing of it runs
            job.mailbox.put(Outcome(ended=why))
        else:
            if job.cancel is not None:
                job.cancel()
            self._changed.notify()

    def _refuse(self, kind: Kind) -> None:
        if self._stopping:
            raise ApiError(503, "the server is shutting down", headers={"retry-after": "10"})
        waiting = len(self._waiting) + sum(self._coming.values())
        if waiting >= self._queue + max(0, self._seats(kind)):
            seconds = min(60, 1 + waiting // 8)
            raise ApiError(429, f"the queue is full: {waiting} requests wait", headers={"retry-after": str(seconds)})

    def _seats(self, kind: Kind) -> int:
        """Jobs of a class that can begin by now."""
        free = self._sessions - len(self._running)
        slow = sum(running.kind != Kind.KEYSTROKE for running in self._running)
        return free if kind == Kind.KEYSTROKE else min(free, max(1, self._sessions - 1) - slow)

    def _fits(self, kind: Kind) -> bool:
        return self._seats(kind) > 0

    def _admit(self) -> None:
        for job in sorted(self._waiting, key=self._rank):
            if self._fits(job.kind):
                self._waiting.remove(job)
                self._running.append(job)

    @staticmethod
    def _rank(job: Job) -> tuple[int, int, int]:
        """Lowest class first; of keystrokes the newest, of chats the one with the fewest steps, then the oldest."""
        if job.kind == Kind.KEYSTROKE:
            return (job.kind, -job.number, 0)
        return (job.kind, job.steps, job.number)

    def _next(self) -> Job | None:
        """Whose turn it is."""
        if not self._running:
            return None
        first = min(self._running, key=self._rank)
        lower = [job for job in self._running if job.kind != first.kind]
        if not lower or first.took is None:
            return first
        second = min(lower, key=self._rank)
        step = first.took if second.took is None else second.took
        return second if self._waited >= (FAIR - 1) * step else first

    # --------------------------------------------------------------------------------------------- the engine's thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._running or self._closed)
                if self._closed:
                    jobs = [*self._waiting, *self._running]
                    self._waiting.clear()
                    break
                call = self._calls.popleft() if self._calls else None
                job = None if call else next((job for job in self._running if job.ended is not None), self._next())
            if call is not None:
                function, done = call
                try:
                    function()
                except Exception as error:
                    done.set_exception(error)
                else:
                    done.set_result(None)
            elif job is not None:
                self._advance(job)
        for job in jobs:
            job.work.close()
            job.done = True
            job.mailbox.put(Outcome(ended=Why.STOPPING))

    def _advance(self, job: Job) -> None:
        outcome: Outcome | None = None
        if job.ended is not None and not (job.ended == Why.STOPPING and job.cancel is not None):
            outcome = Outcome(ended=job.ended)
            try:
                job.work.close()
            except Exception as error:
                outcome = Outcome(error=error)
        if outcome is None:
            began = self._clock()
            try:
                event = next(job.work)
            except StopIteration as end:
                outcome = Outcome(result=end.value, ended=job.ended)
            except Exception as error:
                outcome = Outcome(error=error)
            else:
                job.steps += 1
                job.took = self._clock() - began
                self._waited = self._waited + job.took if any(job.kind < one.kind for one in self._running) else 0.0
                self._on_step(job.took)
                draft = None if job.wanted is None else job.wanted(event)
                if draft is not None:
                    job.mailbox.put(event, draft)
        if outcome is not None:
            with self._changed:
                job.done = True
                self._running.remove(job)
                self._admit()
            job.mailbox.put(outcome)
