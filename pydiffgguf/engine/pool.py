"""The sessions of a model: each call has one of its own, and finds the prefix that it can go on from.

A chat and an autocompleter that take turns would empty each other's cache if there were one session. Each call takes
the idle session whose prefix has the most in common with its prompt.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from pydiffgguf._binding.records import Int32Array
from pydiffgguf._log import logger
from pydiffgguf.engine.call import Call
from pydiffgguf.errors import ModelClosedError, OutOfMemoryError
from pydiffgguf.session import Session

__all__ = ["SessionPool", "common_head"]

#: Seconds between looks at whether a call that waits for a session was cancelled.
LOOK_S = 0.02
#: Seconds without work on any session in use, after which a call no longer waits: they belong to iterators that
#: somebody left open, perhaps the very thread that waits.
PATIENCE_S = 1.0


def common_head(session: Session, prompt: Int32Array) -> int:
    """How many of the prompt's first tokens the session's prefix begins with."""
    held = session.tokens()
    n = min(len(held), len(prompt))
    different = np.nonzero(held[:n] != prompt[:n])[0]
    return int(different[0]) if different.size else n


class SessionPool:
    """At most `size` sessions, made when they are needed, each lent to one call at a time.

    A call gets the idle session that shares the longest head with its prompt, if that is at least half of the prompt or
    of the session's prefix; else a new one while there are fewer than `size`; else the one that was idle for longest.
    While all are at work it waits in line, which cancelling it or its time limit ends. Where nobody works on them for a
    second, it gets one beyond `size`, which is closed afterwards. Where memory for another is refused, `size` shrinks
    to those that there are.

    Args:
        make: makes a session.
        size: the most sessions that are kept.
        name: the model's, for messages.
    """

    def __init__(self, make: Callable[[], Session], size: int, name: str) -> None:
        self.size = size
        self._make = make
        self._name = name
        self._closed = False
        self._process = os.getpid()
        self._turn = threading.Condition()
        self._idle: list[Session] = []  # the one that was used last at the end
        self._lent: dict[Session, Call] = {}
        self._keys: dict[Session, int] = {}  # of all sessions: those of the adapters that they ran last
        self._being_made = 0
        self._line: deque[Call] = deque()

    @contextmanager
    def take(self, prompt: Sequence[int], call: Call) -> Iterator[Session]:
        """A session for a call, which runs the call's adapters. One that ran others, whose prefix depends on them,
        shares nothing with the prompt, and is lent with an empty prefix.

        Raises:
            CancelledError, OutOfTime: the call ended while it waited.
            ModelClosedError, OutOfMemoryError
        """
        key = call.adapters.key
        session = self._acquire(np.asarray(prompt, dtype=np.int32), call, key)
        try:
            if self._keys[session] != key:
                session.reset()
            session.use(call.adapters)
            self._keys[session] = key
            session.stop_when(call.cancelled)
            yield session
        finally:
            session.stop_when(None)
            self._give_back(session)

    def _acquire(self, prompt: Int32Array, call: Call, key: int) -> Session:
        session = self._wait(prompt, call, key)
        while session is None:
            session = self._new(call, key)
            if session is None:  # no memory for another, so one of those at work it is
                session = self._wait(prompt, call, key, first=True)
        return session

    def _wait(self, prompt: Int32Array, call: Call, key: int, first: bool = False) -> Session | None:
        """An idle session, taken; None: one is to be made. `first`: the call goes to the head of the line."""
        with self._turn:
            self._leave_parent()
            self._line.insert(0 if first else len(self._line), call)
            try:
                worked = time.monotonic()
                while True:
                    self._check_open()
                    call.check_cancelled()
                    now = time.monotonic()
                    worked = now if self._at_work() else worked
                    left_open = now - worked > PATIENCE_S
                    if self._line[0] is call and (self._idle or self._room() or left_open):
                        session = self._choose(prompt, key)
                        break
                    call.check()
                    self._turn.wait(LOOK_S)
                if session is None:
                    self._being_made += 1
                else:
                    self._lent[session] = call
                return session
            finally:
                self._line.remove(call)
                self._turn.notify_all()

    def _at_work(self) -> bool:
        return self._being_made > 0 or any(call.running for call in self._lent.values())

    def _room(self) -> bool:
        return len(self._idle) + len(self._lent) + self._being_made < self.size

    def _choose(self, prompt: Int32Array, key: int) -> Session | None:
        """Takes an idle session; None: a new one is to be made."""
        best, longest = None, -1
        for session in self._idle:
            if self._keys[session] == key:
                common = common_head(session, prompt)
                if 2 * common >= min(session.n_past, len(prompt)) and common > longest:
                    best, longest = session, common
        if best is None and not self._room() and self._idle:
            best = self._idle[0]
        if best is not None:
            self._idle.remove(best)
        return best

    def _new(self, call: Call, key: int) -> Session | None:
        """A session that was made, or an idle one where memory for another is refused; None: wait for one."""
        session: Session | None = None
        refusal: OutOfMemoryError | None = None
        try:
            session = self._make()
        except OutOfMemoryError as error:
            refusal = error
        finally:
            with self._turn:
                self._being_made -= 1
                self._turn.notify_all()
        with self._turn:
            if refusal is not None:
                if not self._idle and not self._at_work():
                    raise refusal
                self.size = max(1, len(self._idle) + len(self._lent) + self._being_made)
                logger.warning("%s: no memory for another session: %d serve", self._name, self.size)
                session = self._idle.pop(0) if self._idle else None
                if session is None:
                    return None
            assert session is not None
            self._keys.setdefault(session, key)
            self._lent[session] = call
            closed = self._closed
        if closed:  # meanwhile
            self._give_back(session)
            self._check_open()
        return session

    def _give_back(self, session: Session) -> None:
        with self._turn:
            self._lent.pop(session, None)
            surplus = [session]
            if not self._closed:
                self._idle.append(session)
                beyond = len(self._idle) + len(self._lent) + self._being_made - self.size
                surplus = self._idle[: max(0, min(beyond, len(self._idle)))]
                del self._idle[: len(surplus)]
            for each in surplus:
                self._keys.pop(each, None)
            self._turn.notify_all()
        for each in surplus:
            each.close()

    def _leave_parent(self) -> None:
        """In a forked child: the calls that the parent's other threads were in do not go on here."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._lent.clear()
            self._line.clear()
            self._being_made = 0

    def _check_open(self) -> None:
        if self._closed:
            raise ModelClosedError(f"{self._name} is closed")

    def sessions(self) -> list[Session]:
        """All that there are, the one that was lent last at the end."""
        with self._turn:
            return [*self._idle, *self._lent]

    def cancel(self) -> None:
        """Ends the calls that have a session or wait for one."""
        with self._turn:
            for call in (*self._lent.values(), *self._line):
                call.cancel()

    def close(self) -> None:
        """Closes idle sessions, and ends the calls that use the others. Every later call raises ModelClosedError."""
        with self._turn:
            self._closed = True
            idle, self._idle = self._idle, []
            self._turn.notify_all()
        self.cancel()
        for session in idle:
            session.close()
