"""Which session a call gets: the prefix that fits, a bounded number, and a place in the line."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from streams import busy

from pydiffgguf import DiffusionModel, ModelClosedError, OutOfMemoryError
from pydiffgguf.engine import pool as pool_module
from pydiffgguf.engine.adapters import Chosen
from pydiffgguf.engine.call import Call

FAST: dict[str, Any] = {"seed": 1, "steps": 2, "max_tokens": 4}
ENDLESS: dict[str, Any] = {"seed": 1, "steps": 100_000, "confidence_threshold": 0.0}


@pytest.fixture
def model(tiny_gguf: Path) -> Iterator[DiffusionModel]:
    with DiffusionModel(tiny_gguf, n_ctx=512, n_threads=1) as model:
        yield model


def ids(n: int, first: int) -> list[int]:
    return [2, *range(first, first + n - 1)]


def n_sessions(model: DiffusionModel) -> int:
    return len(model._engine.pool.sessions())


def test_a_chat_and_an_autocompleter_keep_their_prefixes(model: DiffusionModel) -> None:
    """In turns, each with a text that grows: what it has read is not read again."""
    messages = [{"role": "user", "content": "one two three four five six seven eight nine ten"}]
    prefix = "alpha beta gamma delta epsilon zeta eta theta"
    model.chat(messages, **FAST)
    model.infill(prefix, " end", gap=2, steps=2, mode="raw")
    for turn in range(3):
        messages += [{"role": "assistant", "content": "x"}, {"role": "user", "content": f"more {turn}"}]
        prefix += " iota"
        chat = model.chat(messages, **FAST).stats
        infill = model.infill(prefix, " end", gap=2, steps=2, mode="raw").stats
        assert chat.reused_tokens > 0.6 * chat.prompt_tokens
        assert infill.reused_tokens > 0.6 * infill.prompt_tokens
    assert n_sessions(model) == 2


def test_prompts_with_little_in_common_take_the_session_that_was_idle_longest(model: DiffusionModel) -> None:
    first, second, third = (ids(40, start) for start in (20, 120, 220))
    for prompt in (first, second, third):
        assert model.generate(prompt, **FAST).stats.reused_tokens <= 1
    assert n_sessions(model) == 2
    assert model.generate(second, **FAST).stats.reused_tokens == 40
    assert model.generate(third, **FAST).stats.reused_tokens == 40
    assert model.generate(first, **FAST).stats.reused_tokens <= 1


def test_memory_counts_every_session_once_and_the_weights_once(model: DiffusionModel) -> None:
    before = model.memory()
    model.generate(ids(40, 20), **FAST)
    one = model.memory()
    assert one.kv_cache == before.kv_cache
    model.generate(ids(40, 220), **FAST)
    two = model.memory()
    assert (two.kv_cache, two.logits) == (2 * one.kv_cache, 2 * one.logits)
    assert two.weights == one.weights


def test_one_session_serves_many_threads_in_turn(tiny_gguf: Path) -> None:
    """Nobody gets a second one, nobody is refused, and all write what they would write alone."""
    with DiffusionModel(tiny_gguf, n_ctx=256, n_threads=1, n_sessions=1) as model:
        expected = {n: model.generate(ids(9, 20 + n), **FAST).tokens for n in range(8)}
        got: dict[int, list[int]] = {}
        most = []

        def work(n: int) -> None:
            got[n] = model.generate(ids(9, 20 + n), **FAST).tokens
            most.append(n_sessions(model))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert got == expected and set(most) == {1}


def working(model: DiffusionModel) -> tuple[threading.Thread, threading.Event]:
    """A thread that has the model's session until the event is set."""
    stop = threading.Event()
    options = {**ENDLESS, "cancel": stop}
    thread = threading.Thread(target=lambda: model.generate(ids(9, 20), **options))
    thread.start()
    while not busy(model):
        time.sleep(0.001)
    return thread, stop


def test_who_waits_can_be_cancelled_and_runs_out_of_time(tiny_gguf: Path) -> None:
    with DiffusionModel(tiny_gguf, n_ctx=256, n_threads=1, n_sessions=1) as model:
        thread, stop = working(model)
        began = time.monotonic()
        assert model.generate(ids(9, 50), time_limit_s=0.1, **FAST).finish_reason == "length"
        cancel = threading.Event()
        timer = threading.Timer(0.1, cancel.set)
        timer.start()
        assert model.infill("a b", " c", gap=2, cancel=cancel).finish_reason == "cancelled"
        timer.join()
        assert time.monotonic() - began < 5
        waiting = model.stream(ids(9, 50), **FAST)
        waiting.cancel()
        assert waiting.result.finish_reason == "cancelled"
        stop.set()
        thread.join()
        assert model.generate(ids(9, 50), **FAST).tokens


def test_closing_ends_the_wait(tiny_gguf: Path) -> None:
    model = DiffusionModel(tiny_gguf, n_ctx=256, n_threads=1, n_sessions=1)
    thread, _ = working(model)
    timer = threading.Timer(0.1, model.close)
    timer.start()
    with pytest.raises(ModelClosedError):
        model.generate(ids(9, 50), **FAST)
    timer.join()
    thread.join()


def test_streams_that_are_left_open_hold_nobody_up(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not the thread that left them open; the session beyond n_sessions is closed afterwards."""
    monkeypatch.setattr(pool_module, "PATIENCE_S", 0.1)
    streams = [model.stream(ids(9, start), **ENDLESS) for start in (20, 50)]
    for stream in streams:
        next(stream)
    assert model.generate(ids(9, 90), **FAST).finish_reason == "length"
    assert n_sessions(model) == 2 == busy(model)
    for stream in streams:
        stream.close()
    assert n_sessions(model) == 2 and not busy(model)


def test_memory_for_one_session_is_enough(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a second is refused, the first serves all, and the log says so."""
    model.generate(ids(40, 20), **FAST)

    def refuse() -> Any:
        raise OutOfMemoryError("no room")

    monkeypatch.setattr(model._engine.pool, "_make", refuse)
    said: list[str] = []
    monkeypatch.setattr(pool_module.logger, "warning", lambda line, *arguments: said.append(line % arguments))
    for _ in range(2):
        assert model.generate(ids(40, 220), **FAST).finish_reason == "length"
    assert said == ["tiny.gguf: no memory for another session: 1 serve"] and n_sessions(model) == 1


def test_who_finds_no_memory_waits_for_a_session_at_work(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread, stop = working(model)

    def refuse() -> Any:
        raise OutOfMemoryError("no room")

    monkeypatch.setattr(model._engine.pool, "_make", refuse)
    timer = threading.Timer(0.2, stop.set)
    timer.start()
    assert model.generate(ids(40, 220), **FAST).finish_reason == "length"
    assert stop.is_set() and n_sessions(model) == 1
    timer.join()
    thread.join()


def test_without_any_session_a_refusal_is_told(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise OutOfMemoryError("no room")

    monkeypatch.setattr(model._engine.pool, "_make", refuse)
    with pytest.raises(OutOfMemoryError, match="no room"):
        model.generate(ids(40, 20), **FAST)
    assert not busy(model)


def test_a_prefix_of_another_key_is_not_gone_on_from(model: DiffusionModel) -> None:
    """What a prefix depends on besides its tokens keeps sessions apart."""
    pool, prompt = model._engine.pool, ids(40, 20)
    model.generate(prompt, **FAST)
    with pool.take(prompt, Call(adapters=Chosen(key=1))) as session:
        assert session.n_past == 0
        session.encode(prompt)
    assert model.generate(prompt, **FAST).stats.reused_tokens == 40
    with pool.take(prompt, Call(adapters=Chosen(key=1))) as session:
        assert session.n_past == 40
    with pool.take(prompt, Call(adapters=Chosen(key=2))) as session:
        assert session.n_past == 0


@pytest.mark.parametrize("n", [0, -1])
def test_a_pool_has_one_session_at_least(tiny_gguf: Path, n: int) -> None:
    with pytest.raises(ValueError, match=f"n_sessions is {n}: it must be from 1"):
        DiffusionModel(tiny_gguf, n_sessions=n)
