"""Several threads, cancelling at any moment, asyncio, fork and the interpreter's end; small versions of what
benchmarks/robustness.py counts."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from robustness import DEMO, cancel_at_random, collide, generate_in_threads, memory_over_rounds
from streams import busy

from pydiffgguf import DiffusionModel, Generation

ENDLESS: dict[str, Any] = {"steps": 100_000, "confidence_threshold": 0.0}


@pytest.fixture
def model(tiny_gguf: Path) -> Iterator[DiffusionModel]:
    with DiffusionModel(tiny_gguf, n_ctx=256, n_threads=1) as model:
        yield model


def test_eight_threads_on_one_model_write_what_one_writes() -> None:
    """48 of the 1,000 generations in benchmarks/results/robustness.md."""
    assert generate_in_threads(DEMO, 48) == 0


def test_of_two_threads_on_one_session_one_works_and_one_is_told_so() -> None:
    seen = collide(DEMO, 200)
    assert seen["wrong"] == 0
    assert seen["busy"] >= 200


def test_cancels_at_random_moments_leave_the_state_that_is_documented() -> None:
    """200 of the 100,000: none may change a number that comes after it."""
    seen = cancel_at_random(DEMO, 200, rows=16, seed=int(time.time()))
    assert seen.wrong == []
    assert seen.met.total() == 200
    assert seen.met["step"] > 0
    # Far from a bound on speed (benchmarks/results/robustness.md has that): a cancel is not waited out.
    assert sorted(seen.latencies)[len(seen.latencies) // 2] < 0.05


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_opening_generating_and_closing_leaks_nothing() -> None:
    """60 of the 500 rounds; a leaked session of this model would be 2 MiB a round."""
    sizes = memory_over_rounds(DEMO, 60)
    assert sizes[-1] - sizes[20] < 4 << 20, [size >> 20 for size in sizes]


# ----------------------------------------------------------------------------------------------------------- asyncio


async def generate(model: DiffusionModel, prompt: str, **options: Any) -> Generation:
    """As in docs/ROBUSTNESS.md."""
    work = asyncio.ensure_future(asyncio.to_thread(model.generate, prompt, **options))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():  # a cancel() that comes before the call has begun is forgotten
            model.cancel()
            await asyncio.wait([work], timeout=0.02)
        raise


def test_asyncio_goes_on_while_a_thread_generates(model: DiffusionModel) -> None:
    """The event loop's other tasks run, and the result is that of the plain call."""
    expected = model.generate("Why?", seed=1, steps=20, max_tokens=32).tokens

    async def main() -> tuple[Generation, int]:
        work = asyncio.ensure_future(generate(model, "Why?", seed=1, steps=20, max_tokens=32))
        turns = 0
        while not work.done():
            await asyncio.sleep(0.001)
            turns += 1
        return await work, turns

    result, turns = asyncio.run(main())
    assert result.tokens == expected
    assert turns > 3


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.1])
def test_cancelling_a_task_ends_the_generation(model: DiffusionModel, delay: float) -> None:
    """At once, also when the thread has not begun yet; the model works on."""

    async def main() -> float:
        task = asyncio.ensure_future(generate(model, "Why?", seed=1, **ENDLESS))
        await asyncio.sleep(delay)
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - began

    assert asyncio.run(main()) < 10
    assert not busy(model)
    assert model.generate("Why?", seed=1, steps=2, max_tokens=4).finish_reason in ("stop", "length")


def test_a_timeout_of_asyncio_ends_the_generation(model: DiffusionModel) -> None:
    with pytest.raises((TimeoutError, asyncio.TimeoutError)):
        asyncio.run(asyncio.wait_for(generate(model, "Why?", seed=1, **ENDLESS), timeout=0.1))
    assert not busy(model)


# --------------------------------------------------------------------------------------------------- callbacks, exit


def test_cancel_from_inside_the_stream(model: DiffusionModel) -> None:
    """On the thread that is generating, between two of its events."""
    stream = model.stream("Why?", seed=1, **ENDLESS)
    for _ in stream:
        model.cancel()
    assert stream.result.finish_reason == "cancelled"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_generates_with_what_its_parent_opened(tiny_gguf: Path, n_threads: int) -> None:
    """The child has none of the parent's threads: its sessions start their own. Both write the same, and both end."""
    done = run(
        """
        import os, sys
        from pydiffgguf import DiffusionModel
        model = DiffusionModel(sys.argv[1], n_ctx=256, n_threads=int(sys.argv[2]))
        session = model.session()
        session.encode([2, 20, 21])
        def work():
            tokens = model.generate("hello", max_tokens=32, steps=4, seed=1).tokens
            session.truncate(1)
            session.encode([22, 23])
            return tokens, session.tokens().tolist()
        expected = work()
        child = os.fork()
        if child == 0:
            assert work() == expected
            session.close()
            print("child is right", flush=True)
            sys.exit(0)
        assert work() == expected
        assert os.waitpid(child, 0)[1] == 0
        print("parent is right")
        """,
        tiny_gguf,
        n_threads,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "child is right\nparent is right\n", "")


@pytest.mark.parametrize("daemon", [True, False])
def test_the_interpreter_ends_quietly_while_a_thread_generates(tiny_gguf: Path, daemon: bool) -> None:
    """A daemon thread is left behind in the midst of a call; one that is no daemon is ended by cancel()."""
    done = run(
        """
        import sys, threading, time
        from pydiffgguf import DiffusionModel
        model = DiffusionModel(sys.argv[1], n_ctx=256)
        daemon = sys.argv[2] == "True"
        options = dict(seed=1, steps=100000, confidence_threshold=0.0)
        thread = threading.Thread(target=model.generate, args=("hello",), kwargs=options, daemon=daemon)
        thread.start()
        time.sleep(0.3)
        stream = model.stream("hello", **options)
        next(stream), next(stream), next(stream)
        if not daemon:
            model.cancel()
        """,
        tiny_gguf,
        daemon,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_closing_the_model_from_another_thread_ends_every_generation(tiny_gguf: Path) -> None:
    model = DiffusionModel(tiny_gguf, n_ctx=256, n_threads=1)
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(model.generate("Why?", seed=1, **ENDLESS).finish_reason)
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    model.close()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert len(results) == 4
    assert all(result == "cancelled" or type(result).__name__ == "ModelClosedError" for result in results), results
