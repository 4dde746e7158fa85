"""Whose turn it is on the engine: classes, sessions, superseding, cancelling, limits. Work here is a generator that
counts its steps, so nothing depends on how fast a model is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from serving import soon

from pydiffgguf.server.engine import Engine, Job, Kind, Mailbox, Outcome, Why
from pydiffgguf.server.errors import ApiError


class Steps:
    """Jobs whose steps are let go one at a time, and the order in which they were made."""

    def __init__(self, sessions: int = 2, queue: int = 8) -> None:
        self.order: list[str] = []
        self.closed: list[str] = []
        self.go = threading.Semaphore(0)
        self.now = 0.0
        self.engine = Engine(sessions, queue, clock=lambda: self.now)

    def job(
        self,
        name: str,
        kind: Kind,
        steps: int,
        client: str | None = None,
        supersedes: bool = False,
        seconds: float = 1.0,
    ) -> Job:
        """Steps that take so many seconds by the engine's clock."""

        def work() -> Generator[Any, None, str]:
            try:
                for _ in range(steps):
                    self.go.acquire()
                    self.now += seconds
                    self.order.append(name)
                    yield name
                return name
            except GeneratorExit:
                self.closed.append(name)
                raise

        return Job(work(), kind, Mailbox(), client=client, supersedes=supersedes, wanted=lambda _: False)

    def let(self, steps: int) -> None:
        made = len(self.order) + steps
        for _ in range(steps):
            self.go.release()
        assert soon(lambda: len(self.order) >= made), self.order


@contextmanager
def engine(sessions: int = 2, queue: int = 8) -> Iterator[Steps]:
    steps = Steps(sessions, queue)
    steps.engine.start()
    try:
        yield steps
    finally:
        for _ in range(100):
            steps.go.release()
        steps.engine.close(timeout=5)


def outcome(job: Job) -> Outcome:
    """What a job ended with, which must be there by now or soon."""

    async def last() -> Outcome:
        while not isinstance(item := await job.mailbox.get(5), Outcome):
            pass
        return item

    return asyncio.get_event_loop().run_until_complete(last())


@pytest.fixture(autouse=True)
def loop() -> Iterator[None]:
    """Mailboxes belong to a loop, which runs while a test looks into one."""
    made = asyncio.new_event_loop()
    asyncio.set_event_loop(made)
    with _as_running(made):
        yield
    asyncio.set_event_loop(None)
    made.close()


@contextmanager
def _as_running(made: asyncio.AbstractEventLoop) -> Iterator[None]:
    original = Mailbox.__init__

    def init(self: Mailbox) -> None:
        async def build() -> None:
            original(self)

        made.run_until_complete(build())

    Mailbox.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        Mailbox.__init__ = original  # type: ignore[method-assign]


def test_a_keystroke_runs_inside_a_chat() -> None:
    """It takes the turns except every fifth; the chat goes on afterwards."""
    with engine() as steps:
        chat, key = steps.job("c", Kind.CHAT, 16), steps.job("k", Kind.KEYSTROKE, 6)
        steps.engine.submit(chat)
        steps.let(2)
        steps.engine.submit(key)
        steps.let(20)
        assert outcome(key).result == "k" and outcome(chat).result == "c"
        between = steps.order[steps.order.index("k") : 22 - steps.order[::-1].index("k")]
        assert between.count("k") == 6 and between.count("c") <= 2


def test_a_chat_is_not_starved_by_keystrokes() -> None:
    """Every fifth step is its own."""
    with engine() as steps:
        steps.engine.submit(steps.job("c", Kind.CHAT, 50))
        steps.engine.submit(steps.job("k", Kind.KEYSTROKE, 50))
        steps.let(41)
        assert steps.order.count("c") >= 7


def test_turns_are_shared_by_time() -> None:
    """A chat whose steps take four times as long has one for sixteen of a keystroke's."""
    with engine() as steps:
        steps.engine.submit(steps.job("c", Kind.CHAT, 50, seconds=4.0))
        steps.let(1)
        steps.engine.submit(steps.job("k", Kind.KEYSTROKE, 50))
        steps.let(40)
        assert "".join(steps.order).strip("c").count("c") == 2, steps.order


def test_two_chats_take_turns() -> None:
    """With three sessions, the one with fewer steps first."""
    with engine(sessions=3) as steps:
        for name in "ab":
            steps.engine.submit(steps.job(name, Kind.CHAT, 10))
        steps.let(16)
        assert abs(steps.order.count("a") - steps.order.count("b")) <= 1


def test_chats_leave_the_last_session_to_keystrokes() -> None:
    """Two sessions: the second chat waits, a keystroke does not."""
    with engine() as steps:
        for name in "ab":
            steps.engine.submit(steps.job(name, Kind.CHAT, 3))
        assert (steps.engine.running, steps.engine.waiting) == (1, 1)
        steps.engine.submit(steps.job("k", Kind.KEYSTROKE, 3))
        assert (steps.engine.running, steps.engine.waiting) == (2, 1)


def test_one_session_serves_one_at_a_time() -> None:
    """Chats too; a keystroke that waits comes before a chat that waited longer."""
    with engine(sessions=1) as steps:
        for name, kind in (("a", Kind.CHAT), ("b", Kind.CHAT), ("k", Kind.KEYSTROKE)):
            steps.engine.submit(steps.job(name, kind, 2))
        steps.let(6)
        assert steps.order == ["a", "a", "k", "k", "b", "b"]


def test_the_queue_is_bounded() -> None:
    """Beyond it: 429 at once, with when to ask again; nothing of the refused work runs."""
    with engine(queue=2) as steps:
        for i in range(3):
            steps.engine.submit(steps.job(str(i), Kind.CHAT, 1))
        refused = steps.job("x", Kind.CHAT, 1)
        with pytest.raises(ApiError) as error:
            steps.engine.submit(refused)
        assert error.value.status == 429 and 1 <= int(error.value.headers["retry-after"]) <= 60
        steps.let(3)
        assert sorted(steps.order) == ["0", "1", "2"]


def test_a_place_that_is_kept_counts_as_taken() -> None:
    """A request whose text is still prepared: the next is refused before its own is; a place is given back also where
    the preparation fails."""
    with engine(queue=1) as steps:
        steps.engine.submit(steps.job("a", Kind.CHAT, 1))
        with steps.engine.place(Kind.CHAT):
            with pytest.raises(ApiError) as error, steps.engine.place(Kind.CHAT):
                pass
            assert error.value.status == 429
            with steps.engine.place(Kind.KEYSTROKE):  # a session is free for it
                pass
        with pytest.raises(KeyError), steps.engine.place(Kind.CHAT):
            raise KeyError
        steps.engine.submit(steps.job("b", Kind.CHAT, 1))
        steps.let(2)


def test_a_newer_keystroke_supersedes_its_clients_older_one() -> None:
    """Running or waiting; another client's goes on."""
    with engine(sessions=2) as steps:
        old = steps.job("old", Kind.KEYSTROKE, 9, "me", True)
        other = steps.job("other", Kind.KEYSTROKE, 2, "you", True)
        waits = steps.job("waits", Kind.KEYSTROKE, 9, "me", True)
        steps.engine.submit(old)
        steps.let(1)
        steps.engine.submit(other)
        steps.engine.submit(waits)  # ends `old`, and waits for its session
        new = steps.job("new", Kind.KEYSTROKE, 2, "me", True)
        steps.engine.submit(new)
        assert outcome(waits).ended == Why.SUPERSEDED
        steps.let(1)  # the step of `old` that was under way
        assert outcome(old).ended == Why.SUPERSEDED
        steps.let(4)
        assert outcome(new).result == "new" and outcome(other).result == "other"
        assert steps.engine.superseded == 2 and "old" in steps.closed


def test_a_warm_up_gives_way() -> None:
    """To any real request, and to a newer warm-up of the same client."""
    with engine() as steps:
        first, second = (steps.job(name, Kind.WARM_UP, 9, "me", True) for name in ("first", "second"))
        steps.engine.submit(first)
        steps.engine.submit(second)
        key = steps.job("k", Kind.KEYSTROKE, 1, "me", True)
        steps.engine.submit(key)
        steps.let(1)
        steps.go.release()  # a step of the first may have been under way
        assert outcome(first).ended == outcome(second).ended == Why.SUPERSEDED
        assert outcome(key).result == "k"


def test_a_warm_up_ends_no_request() -> None:
    """It waits for its turn."""
    with engine() as steps:
        chat, warm = steps.job("c", Kind.CHAT, 2, "me", True), steps.job("w", Kind.WARM_UP, 1, "me", True)
        steps.engine.submit(chat)
        steps.engine.submit(warm)
        steps.let(3)
        assert outcome(chat).result == "c" and outcome(warm).result == "w"


def test_a_client_that_leaves_frees_its_place_within_a_step() -> None:
    """Whether it waits or runs; what waited behind it runs."""
    with engine() as steps:
        jobs = [steps.job(name, Kind.CHAT, 9) for name in "abc"]
        for job in jobs:
            steps.engine.submit(job)
        steps.let(1)
        steps.engine.end(jobs[1], Why.LEFT)
        assert outcome(jobs[1]).ended == Why.LEFT and steps.engine.waiting == 1
        steps.engine.end(jobs[0], Why.LEFT)
        steps.let(1)  # the step that was under way
        assert outcome(jobs[0]).ended == Why.LEFT
        steps.let(9)
        assert outcome(jobs[2]).result == "c"
        assert steps.order.count("a") <= 2 and "b" not in steps.order
        assert steps.engine.running == 0 and steps.engine.cancelled == 2


def test_an_exception_ends_its_own_job_alone() -> None:
    """The others, and the thread, go on."""
    with engine() as steps:

        def broken() -> Generator[Any, None, None]:
            yield 1
            raise ValueError("broken")

        bad = Job(broken(), Kind.CHAT, Mailbox())
        steps.engine.submit(bad)
        assert str(outcome(bad).error) == "broken"
        good = steps.job("g", Kind.CHAT, 1)
        steps.engine.submit(good)
        steps.let(1)
        assert outcome(good).result == "g"


def test_a_slow_reader_loses_drafts_and_no_text() -> None:
    """Of drafts only the newest is kept; everything else in order."""
    box = Mailbox()
    for i in range(100):
        box.put(f"draft {i}", draft=True)
    box.put("text 1")
    for i in range(100):
        box.put(f"late {i}", draft=True)
    box.put("text 2")

    async def all_of_it() -> list[Any]:
        return [await box.get(1) for _ in range(4)]

    assert asyncio.get_event_loop().run_until_complete(all_of_it()) == ["draft 99", "text 1", "late 99", "text 2"]


def test_stopping_refuses_new_work_and_ends_the_old_with_what_it_has() -> None:
    """503 for the new; the old is told to finish early."""
    with engine() as steps:
        early = threading.Event()

        def work() -> Generator[Any, None, str]:
            while not early.is_set():
                yield "step"
            return "what there was"

        job = Job(work(), Kind.CHAT, Mailbox(), cancel=early.set)
        waits = steps.job("w", Kind.CHAT, 1)
        steps.engine.submit(job)
        steps.engine.submit(waits)
        steps.engine.stop()
        with pytest.raises(ApiError) as error:
            steps.engine.submit(steps.job("x", Kind.CHAT, 1))
        assert error.value.status == 503
        steps.engine.end_all()
        assert outcome(job).result == "what there was"
        assert outcome(waits).ended == Why.STOPPING
