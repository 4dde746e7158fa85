"""Streams: their events, their results, and the cancelling of one call while others go on."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from streams import busy

from pydiffgguf import Block, CancelledError, DenoiseStep, DiffusionModel, Generation, Prefill, Stream, demo_model_path

ENDLESS: dict[str, Any] = {"steps": 100_000, "confidence_threshold": 0.0}


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[DiffusionModel]:
    with DiffusionModel(tiny_gguf, n_ctx=512, n_batch=16, n_threads=1) as model:
        yield model


def ids(n: int, first: int = 20) -> list[int]:
    return [2, *(first + i % 300 for i in range(n - 1))]


STREAMS: dict[str, Callable[[DiffusionModel], Stream[Any, Any]]] = {
    "stream": lambda model: model.stream(ids(40), seed=1, **ENDLESS),
    "stream_chat": lambda model: model.stream_chat([{"role": "user", "content": "Why?"}], seed=1, **ENDLESS),
    "stream_infill": lambda model: model.stream_infill("one two", " three", gap=5, mode="raw", **ENDLESS),
    "stream_fill": lambda model: model.stream_fill("one <gap len=5/> three", mode="raw", **ENDLESS),
}


def test_the_prompts_events_come_first_and_count_its_tokens(model: DiffusionModel) -> None:
    """One before anything is read, then one for each n_batch tokens; a prompt in the cache has one."""
    prompt = ids(40, first=50)
    events = list(model.stream(prompt, seed=1, steps=2, max_tokens=4))
    read = [event for event in events if isinstance(event, Prefill)]
    assert events[: len(read)] == read
    assert [(event.done, event.total) for event in read] == [(0, 40), (16, 40), (32, 40), (40, 40)]
    assert [event.elapsed_s for event in read] == sorted(event.elapsed_s for event in read)
    again = [event for event in model.stream(prompt, seed=1, steps=2, max_tokens=4) if isinstance(event, Prefill)]
    assert [(event.done, event.total) for event in again] == [(40, 40)]
    infill = list(model.stream_infill("one two", " three", gap=2, steps=2, mode="raw"))
    assert isinstance(infill[0], Prefill) and isinstance(infill[-1], DenoiseStep)


def test_a_draft_is_read_when_somebody_asks(tiny_gguf: Path) -> None:
    """Also late, copied, pickled, and when its model is closed: the text is that of its own step."""
    with DiffusionModel(tiny_gguf, n_ctx=512, n_threads=1) as one:
        drafts = [e for e in one.stream(ids(9), seed=1, steps=3, max_tokens=200) if isinstance(e, DenoiseStep)]
        at_once = [
            (e.text, e.reasoning)
            for e in one.stream(ids(9), seed=1, steps=3, max_tokens=200)
            if isinstance(e, DenoiseStep)
        ]
    assert len({text for text, _ in at_once}) > 3
    copies = [pickle.loads(pickle.dumps(draft)) for draft in drafts[::2]]
    assert [(draft.text, draft.reasoning) for draft in drafts] == at_once
    assert copies == drafts[::2] and [copy.text for copy in copies] == [text for text, _ in at_once[::2]]
    with pytest.raises(AttributeError, match="'DenoiseStep' object has no attribute 'txet'"):
        drafts[0].txet  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("stop", [(), ("lamp",)])
def test_settled_text_stays(stop: tuple[str, ...]) -> None:
    """A canvas has several Blocks, which add up to the result, also where a stop string cuts it; who looks at no events
    gets the same."""
    early = whole = 0
    with DiffusionModel(demo_model_path(), n_threads=1) as one:
        for seed in range(2):
            options: dict[str, Any] = {"raw": True, "seed": seed, "max_tokens": 120, "settle": 2, "stop": stop}
            stream = one.stream("On Sunday Emma found a", **options)
            blocks: list[Block] = []
            canvas, n_new = -1, 0
            for event in stream:
                if isinstance(event, Block):
                    blocks.append(event)
                    n_new += len(event.text)
                elif isinstance(event, DenoiseStep):
                    early += n_new if event.canvas == canvas else 0
                    canvas, n_new = event.canvas, 0
            said = "".join(block.text for block in blocks)
            assert [token for block in blocks for token in block.tokens] == stream.result.tokens
            assert said == stream.result.text == one.generate("On Sunday Emma found a", **options).text
            whole += len(said)
        with pytest.raises(ValueError, match="settle cannot be given beside a constraint"):
            one.generate("x", settle=2, choices=["a"])
        with pytest.raises(ValueError, match="settle cannot be given beside narrow"):
            one.generate("x", settle=2, narrow=True)
        with pytest.raises(ValueError, match="settle is 0"):
            one.generate("x", settle=0)
    assert early > 0 if stop else early > whole / 4


def test_settled_text_outlives_a_cancel() -> None:
    """What was told is in the result."""
    with DiffusionModel(demo_model_path(), n_threads=1) as one:
        stream = one.stream("On Sunday Emma found a", raw=True, seed=1, max_tokens=60, settle=2)
        told = ""
        for event in stream:
            if isinstance(event, Block):
                told += event.text
            if len(told) > 20:
                break
        stream.cancel()
        result = stream.result
    assert result.text == told and result.finish_reason == "cancelled"
    assert result.stats.generated_tokens == len(result.tokens) > 0


def test_the_result_is_there_after_the_last_event_and_is_the_iterators_value(model: DiffusionModel) -> None:
    stream = model.stream(ids(9), seed=1, steps=2, max_tokens=4)
    with pytest.raises(RuntimeError, match="the stream has not ended: take its events"):
        stream.result  # noqa: B018
    while True:
        try:
            next(stream)
        except StopIteration as end:
            value = end.value
            break
    assert value is stream.result and isinstance(value, Generation)
    assert list(stream) == [] and stream.result is value
    stream.close()
    stream.cancel()
    assert stream.result is value


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_is_cancelled_before_it_begins_computes_nothing(model: DiffusionModel, name: str) -> None:
    stream = STREAMS[name](model)
    stream.cancel()
    result = stream.result
    assert result.finish_reason == "cancelled"
    assert list(stream) == [] and not busy(model)


@pytest.mark.parametrize("name", STREAMS)
def test_a_cancelled_stream_ends_and_the_other_goes_on(model: DiffusionModel, name: str) -> None:
    """From another thread, in the midst of a call."""
    other = model.stream(ids(30, first=100), seed=2, steps=40, max_tokens=8, confidence_threshold=0.0)
    next(other)
    stream = STREAMS[name](model)
    timer = threading.Timer(0.1, stream.cancel)
    timer.start()
    steps = sum(isinstance(event, DenoiseStep) for event in stream)
    timer.join()
    assert stream.result.finish_reason == "cancelled" and 0 < steps < 10_000
    assert sum(isinstance(event, DenoiseStep) for event in other) == 40
    assert other.result.finish_reason == "length"


def test_a_closed_stream_has_no_result(model: DiffusionModel) -> None:
    with model.stream(ids(9), seed=1, **ENDLESS) as stream:
        next(stream)
        assert busy(model) == 1
    assert not busy(model) and list(stream) == []
    with pytest.raises(RuntimeError, match="was closed"):
        stream.result  # noqa: B018


def test_a_stream_is_closed_from_another_thread_in_the_midst_of_a_step(model: DiffusionModel) -> None:
    stream = model.stream(ids(9), seed=1, **ENDLESS)
    timer = threading.Timer(0.1, stream.close)
    timer.start()
    for _ in stream:
        pass
    timer.join()
    assert not busy(model)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, cancel: model.generate(ids(9), seed=1, cancel=cancel, **ENDLESS).finish_reason,
        lambda model, cancel: model.chat([{"role": "user", "content": "x"}], cancel=cancel, **ENDLESS).finish_reason,
        lambda model, cancel: model.infill("a b", " c", gap=4, cancel=cancel, **ENDLESS).finish_reason,
        lambda model, cancel: model.fill("a <gap len=4/> c", cancel=cancel, **ENDLESS).finish_reason,
    ],
    ids=["generate", "chat", "infill", "fill"],
)
def test_an_event_that_is_set_ends_the_call(model: DiffusionModel, call: Any) -> None:
    stop = threading.Event()
    timer = threading.Timer(0.1, stop.set)
    timer.start()
    assert call(model, stop) == "cancelled"
    timer.join()
    assert call(model, stop) == "cancelled"  # it is set from the beginning


def test_edit_and_choose_raise_when_their_event_is_set(model: DiffusionModel) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(CancelledError):
        model.edit("one two three", [(4, 7)], cancel=stop)
    with pytest.raises(CancelledError):
        model.choose("one <x/>", {"x": ["a", "b"]}, cancel=stop)
    assert not busy(model)


def test_a_cancel_is_asked_within_one_c_call(model: DiffusionModel) -> None:
    """A long prompt in one chunk ends in its midst, not after it."""
    with DiffusionModel(model.path, n_ctx=4096, n_batch=3900, n_threads=1) as wide:
        began = time.monotonic()
        wide.generate(ids(3900), seed=1, steps=1, max_tokens=1)
        whole = time.monotonic() - began
    with DiffusionModel(model.path, n_ctx=4096, n_batch=3900, n_threads=1) as wide:
        stop = threading.Event()
        timer = threading.Timer(whole / 10, stop.set)
        began = time.monotonic()
        timer.start()
        result = wide.generate(ids(3900), seed=1, steps=1, max_tokens=1, cancel=stop)
        assert result.finish_reason == "cancelled"
        assert time.monotonic() - began < 0.7 * whole
        timer.join()


class Broken:
    def is_set(self) -> bool:
        raise LookupError("my own mistake")


def test_what_a_callers_cancel_raises_comes_out_of_the_call(model: DiffusionModel) -> None:
    with pytest.raises(LookupError, match="my own mistake"):
        model.generate(ids(9), seed=1, cancel=Broken(), **ENDLESS)
    assert not busy(model)
    with pytest.raises(TypeError, match=r"cancel must have a method is_set\(\)"):
        model.generate(ids(9), cancel=True)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- asyncio


def test_async_for_gives_the_same_events(model: DiffusionModel) -> None:
    expected = list(model.stream(ids(20), seed=3, steps=4, max_tokens=8))

    async def main() -> tuple[list[Any], Generation]:
        stream = model.astream(ids(20), seed=3, steps=4, max_tokens=8)
        return [event async for event in stream], stream.result

    events, result = asyncio.run(main())
    kept = [event for event in events if not isinstance(event, Prefill)]
    assert kept == [event for event in expected if not isinstance(event, Prefill)]
    assert isinstance(kept[-1], Block) and result.finish_reason == "length"


def test_cancelling_one_task_leaves_the_others(model: DiffusionModel) -> None:
    async def consume(stream: Stream[Any, Any]) -> Generation:
        async for _ in stream:
            pass
        result: Generation = stream.result
        return result

    async def main() -> Generation:
        one = asyncio.ensure_future(consume(model.astream(ids(20), seed=1, **ENDLESS)))
        other = asyncio.ensure_future(
            consume(model.astream(ids(20, first=90), seed=1, steps=40, max_tokens=4, confidence_threshold=0.0))
        )
        await asyncio.sleep(0.05)
        began = time.monotonic()
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        assert time.monotonic() - began < 5
        return await other

    assert asyncio.run(main()).finish_reason == "length"
    assert not busy(model)


def test_a_timeout_ends_an_async_stream(model: DiffusionModel) -> None:
    async def consume() -> None:
        async for _ in model.stream(ids(20), seed=1, **ENDLESS):
            pass

    with pytest.raises((TimeoutError, asyncio.TimeoutError)):
        asyncio.run(asyncio.wait_for(consume(), timeout=0.1))
    assert not busy(model)


# ------------------------------------------------------------------------------------------------------ time limits


@pytest.mark.parametrize(
    "call",
    [
        lambda model, text: model.generate(text, raw=True, time_limit_s=0.02, max_tokens=4),
        lambda model, text: model.infill(text, " three", gap=3, mode="raw", time_limit_s=0.02),
        lambda model, text: model.fill(text + "<gap len=3/> three", mode="raw", time_limit_s=0.02),
        lambda model, text: model.edit(text + " three", [(len(text), len(text) + 6)], time_limit_s=0.02),
    ],
    ids=["generate", "infill", "fill", "edit"],
)
def test_the_time_limit_counts_in_the_prompt(tiny_gguf: Path, call: Any) -> None:
    """It ends after the chunk under way, with what there is, which is nothing."""
    with DiffusionModel(tiny_gguf, n_ctx=2048, n_batch=1, n_threads=1) as model:
        text = "one two three four five six seven " * 30
        result = call(model, text)
        assert result.finish_reason == "length"
        assert result.stats.prefill_s < 1.0
        assert not sum(getattr(result.stats, "steps", [])) and not getattr(result.stats, "forwards", 0)
