"""Whole generations: limits, ends, events, options; on a random net, whose text means nothing."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streams import busy, first_step, taken

from pydiffgguf import (
    Block,
    CanvasBatch,
    CanvasSpec,
    ContextOverflowError,
    DenoiseStep,
    DiffusionModel,
    Generation,
    ModelClosedError,
    Prefill,
    UnsupportedError,
)

CANVAS = 32


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[DiffusionModel]:
    with DiffusionModel(tiny_gguf, n_ctx=256) as model:
        yield model


def plain_ids(model: DiffusionModel, n: int = 10) -> list[int]:
    return [2, *range(100, 100 + n - 1)]


def test_the_same_seed_gives_the_same_tokens_and_another_does_not(model: DiffusionModel) -> None:
    runs = [model.generate("Why?", seed=seed, steps=4, max_tokens=CANVAS) for seed in (7, 7, 8)]
    assert runs[0].tokens == runs[1].tokens
    assert runs[0].text == runs[1].text
    assert runs[0].tokens != runs[2].tokens


def test_a_seed_that_was_not_given_is_told_and_repeats_the_run(model: DiffusionModel) -> None:
    first = model.generate("Why?", steps=4, max_tokens=20)
    again = model.generate("Why?", steps=4, max_tokens=20, seed=first.stats.seed)
    assert first.tokens == again.tokens
    assert model.generate("Why?", steps=1, max_tokens=1).stats.seed != first.stats.seed


def test_generate_is_the_stream_drained(model: DiffusionModel) -> None:
    options: dict[str, Any] = {"seed": 3, "steps": 3, "max_tokens": 70}
    events, streamed = taken(model.stream(plain_ids(model), **options))
    drained = model.generate(plain_ids(model), **options)
    assert (streamed.text, streamed.tokens, streamed.finish_reason) == (
        drained.text,
        drained.tokens,
        drained.finish_reason,
    )
    blocks = [event for event in events if isinstance(event, Block)]
    steps = [event for event in events if isinstance(event, DenoiseStep)]
    assert "".join(block.text for block in blocks) == drained.text
    assert [token for block in blocks for token in block.tokens] == drained.tokens
    assert [len([s for s in steps if s.canvas == c]) for c in range(len(blocks))] == drained.stats.steps
    assert [s.step for s in steps if s.canvas == 0] == list(range(drained.stats.steps[0]))
    assert all(len(s.tokens) == len(s.accepted) == len(s.entropy) == CANVAS for s in steps)


def without_ends(model: DiffusionModel, seed: int) -> Generation:
    return model.generate(plain_ids(model), seed=seed, steps=2, max_tokens=100)


def test_max_tokens_cuts_and_says_length(model: DiffusionModel) -> None:
    seed = next(s for s in range(50) if without_ends(model, s).finish_reason == "length")
    whole = without_ends(model, seed)
    assert len(whole.tokens) == 100
    assert len(whole.stats.steps) == 4
    for n in (1, 31, 32, 33, 99):
        cut = model.generate(plain_ids(model), seed=seed, steps=2, max_tokens=n)
        assert cut.tokens == whole.tokens[:n]
        assert cut.finish_reason == "length"
        assert cut.stats.tokens_per_forward == n / sum(cut.stats.steps)


@pytest.mark.parametrize("n_rows", [1, 5, 31, CANVAS])
def test_a_shorter_canvas_goes_on_in_the_next(model: DiffusionModel, n_rows: int) -> None:
    """Each canvas is the one that a batch of that length gives after the canvases before it."""
    prompt, seed = plain_ids(model), next(s for s in range(50) if without_ends(model, s).finish_reason == "length")
    result = model.generate(prompt, seed=seed, steps=2, max_tokens=3 * n_rows, canvas_length=n_rows)
    expected: list[int] = []
    sampling = replace(model.sampling, steps=2)
    with model.session() as session:
        session.encode(prompt)
        for index in range(len(result.stats.steps)):
            batch = CanvasBatch(session, [CanvasSpec(n_rows=n_rows, seed=seed, canvas_index=index)], sampling)
            while not batch.step()[0].finished:
                pass
            tokens = batch.rows(0).argmax.tolist()
            assert len(tokens) == n_rows
            session.encode(tokens)
            expected += tokens
    assert result.tokens == expected[: len(result.tokens)]
    assert len(result.stats.steps) == 3 or result.finish_reason == "stop"
    with_default = [model.generate(prompt, seed=3, steps=2, canvas_length=n).tokens for n in (None, CANVAS)]
    assert with_default[0] == with_default[1]


@pytest.mark.parametrize("n_rows", [0, CANVAS + 1, "x"])
def test_a_canvas_length_out_of_range_is_refused(model: DiffusionModel, n_rows: Any) -> None:
    """With the range."""
    with pytest.raises((ValueError, TypeError), match="canvas_length"):
        model.generate("x", canvas_length=n_rows)


def test_an_end_token_ends_the_text_before_it(model: DiffusionModel) -> None:
    """Every token of a finished run is declared an end token in turn, by the noise that is handed in being the same."""
    ends = model.tokenizer.end_ids
    assert ends
    seed = next(s for s in range(300) if without_ends(model, s).finish_reason == "stop")
    result = without_ends(model, seed)
    assert not ends & set(result.tokens)
    with model.session() as session:
        session.encode(plain_ids(model))
        canvas = session.run_canvas(seed=seed, steps=2).tokens.tolist()
    n = len(result.tokens)
    if n < CANVAS:
        assert canvas[:n] == result.tokens
        assert canvas[n] in ends


def test_stop_strings_cut_the_text_and_its_tokens(model: DiffusionModel) -> None:
    seed = next(s for s in range(50) if len(without_ends(model, s).text) > 40)
    whole = without_ends(model, seed)
    stop = whole.text[20:23]
    cut = model.generate(plain_ids(model), seed=seed, steps=2, max_tokens=100, stop=["never there", stop])
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert len(cut.tokens) < len(whole.tokens)


def test_the_prefix_is_reused_token_by_token(model: DiffusionModel) -> None:
    prompt = plain_ids(model, 60)
    with_room = {"seed": 1, "steps": 2, "max_tokens": 8}
    model.generate(prompt, **with_room)
    longer = model.generate([*prompt, 300, 301, 302], **with_room)
    assert (longer.stats.prompt_tokens, longer.stats.reused_tokens) == (63, 60)
    changed = [*prompt[:30], 400, *prompt[31:]]
    assert model.generate(changed, **with_room).stats.reused_tokens == 30


def test_the_end_of_the_context_is_length(model: DiffusionModel) -> None:
    seed = next(s for s in range(50) if without_ends(model, s).finish_reason == "length")
    prompt = plain_ids(model)
    result = model.generate(prompt, seed=seed, steps=1, max_tokens=10_000)
    assert result.finish_reason in ("length", "stop")
    assert len(prompt) + len(result.tokens) <= 256


def test_a_prompt_that_does_not_fit_says_how_much_would(model: DiffusionModel) -> None:
    with pytest.raises(ContextOverflowError, match=r"300 tokens.*room for 224"):
        model.generate(plain_ids(model, 300))
    assert model.generate("Why?", seed=1, steps=1, max_tokens=4).tokens


@pytest.mark.parametrize("prompt", ["", [], [-1], [512], [1.5], ["a"]])
def test_a_bad_prompt_is_refused(model: DiffusionModel, prompt: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="prompt"):
        model.generate(prompt)


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"steps": 0}, ValueError, "steps is 0: it must be from 1"),
        ({"steps": 1.5}, TypeError, "steps"),
        ({"t_min": float("nan")}, ValueError, "t_min is nan"),
        ({"t_max": float("inf")}, ValueError, "t_max is inf"),
        ({"t_min": 9.0}, ValueError, "t_max is .*: it must be at least t_min"),
        ({"entropy_bound": -1.0}, ValueError, "entropy_bound is -1"),
        ({"confidence_threshold": "low"}, TypeError, "confidence_threshold"),
        ({"stability_threshold": -1}, ValueError, "stability_threshold is -1"),
        ({"max_tokens": 0}, ValueError, "max_tokens is 0"),
        ({"seed": -2}, ValueError, "seed is -2"),
        ({"seed": 2**64}, ValueError, "seed is"),
        ({"time_limit_s": 0}, ValueError, "time_limit_s"),
        ({"stop": [""]}, ValueError, "stop"),
        ({"temperature": 0.7}, TypeError, "unknown option 'temperature'"),
    ],
)
def test_a_bad_option_is_named_before_anything_runs(
    model: DiffusionModel, options: dict[str, Any], kind: type[Exception], match: str
) -> None:
    with pytest.raises(kind, match=match):
        model.generate("Why?", **options)
    with pytest.raises(kind, match=match):
        model.stream("Why?", **options)


def test_closing_the_iterator_cancels_and_frees_the_session(model: DiffusionModel) -> None:
    stream = model.stream("Why?", seed=1, steps=1000, confidence_threshold=0.0)
    first_step(stream)
    stream.close()
    assert not busy(model)
    assert model.generate("Why?", seed=1, steps=2, max_tokens=4).finish_reason in ("length", "stop")


def test_cancel_ends_the_stream_with_what_was_finished(model: DiffusionModel) -> None:
    stream = model.stream(plain_ids(model), seed=1, steps=5, max_tokens=200, confidence_threshold=0.0)
    events = []
    for event in stream:
        events += [] if isinstance(event, Prefill) else [event]
        if len(events) == 8:  # five steps and a block, then inside the second canvas
            model.cancel()
    result = stream.result
    if result.finish_reason != "stop":
        assert result.finish_reason == "cancelled"
        assert result.tokens == [token for event in events if isinstance(event, Block) for token in event.tokens]
    assert model.generate("Why?", seed=1, steps=2, max_tokens=4).finish_reason != "cancelled"


def test_a_cancel_with_nothing_under_way_is_forgotten(model: DiffusionModel) -> None:
    model.cancel()
    assert model.generate("Why?", seed=1, steps=2, max_tokens=4).finish_reason != "cancelled"


def test_a_time_limit_returns_the_best_so_far(model: DiffusionModel) -> None:
    result = model.generate("Why?", seed=1, steps=100_000, confidence_threshold=0.0, time_limit_s=0.2)
    assert result.finish_reason in ("length", "stop")
    assert 1 <= sum(result.stats.steps) < 100_000


def test_a_time_limit_ends_a_long_prompt_within_a_chunk(tiny_gguf: Path) -> None:
    """Nothing is written then, the chunks that were encoded stay for the next call, and a limit changes no number."""
    with DiffusionModel(tiny_gguf, n_ctx=4096, n_batch=32, n_threads=1) as model:
        ids = [2, *(20 + i % 400 for i in range(3000))]
        short = model.generate(ids, seed=1, steps=2, max_tokens=4, time_limit_s=0.02)
        assert (short.tokens, short.text, short.finish_reason) == ([], "", "length")
        whole = model.generate(ids, seed=1, steps=2, max_tokens=4, time_limit_s=1000)
        assert whole.stats.reused_tokens < len(ids)
        assert whole.tokens == model.generate(ids, seed=1, steps=2, max_tokens=4).tokens


def test_handed_in_noise_drives_the_loop(model: DiffusionModel) -> None:
    """Philox's own draws, handed in, give the seed's text."""
    from pydiffgguf._binding import functions

    class Philox:
        def canvas(self, c: int) -> np.ndarray:
            return functions.noise_canvas(11, c, CANVAS, 512)

        def uniform(self, c: int, step: int) -> np.ndarray:
            return functions.noise_uniform(11, c, step, CANVAS)

        def renoise(self, c: int, step: int) -> np.ndarray:
            return functions.noise_renoise(11, c, step, CANVAS, 512)

    options: dict[str, Any] = {"steps": 4, "max_tokens": 70}
    a = model.generate("Why?", noise=Philox(), **options)
    assert a.tokens == model.generate("Why?", seed=11, **options).tokens


def test_a_str_goes_through_the_template_and_raw_does_not(model: DiffusionModel) -> None:
    templated = model.generate("Why?", seed=1, steps=1, max_tokens=1).stats.prompt_tokens
    raw = model.generate("Why?", seed=1, steps=1, max_tokens=1, raw=True).stats.prompt_tokens
    assert raw == len(model.tokenize("Why?", add_bos=True))
    assert templated > raw


def test_chat_renders_the_conversation_and_checks_it(model: DiffusionModel) -> None:
    messages = [{"role": "user", "content": "Why?"}]
    result = model.chat(messages, seed=1, steps=1, max_tokens=4)
    assert result.tokens == model.generate("Why?", seed=1, steps=1, max_tokens=4).tokens
    with pytest.raises(ValueError, match="role"):
        model.chat([{"role": "nobody", "content": ""}])
    with pytest.raises(ValueError, match=r"messages\[0\] has no 'content'"):
        model.chat([{"role": "user"}])
    with pytest.raises(TypeError, match=r"messages\[0\]"):
        model.chat([3])  # type: ignore[list-item]


def test_a_closed_model_says_so(tiny_gguf: Path) -> None:
    model = DiffusionModel(tiny_gguf, n_ctx=256)
    session = model.session()
    session.encode([2, 3])
    model.close()
    model.close()
    for call in (lambda: model.generate("x"), model.session, model.memory, model.tensors, lambda: model.metadata):
        with pytest.raises(ModelClosedError):
            call()
    assert session.run_canvas(seed=1, steps=1).steps == 1  # a session keeps the file
    session.close()
    with pytest.raises(ModelClosedError):
        session.encode([2])


def test_two_threads_generate_on_one_model(model: DiffusionModel) -> None:
    from concurrent.futures import ThreadPoolExecutor

    options: dict[str, Any] = {"steps": 3, "max_tokens": 40}
    expected = [model.generate("Why?", seed=seed, **options).tokens for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda seed: model.generate("Why?", seed=seed, **options).tokens, range(8)))
    assert got == expected


def test_nothing_is_printed_and_objects_die_quietly(tiny_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = DiffusionModel(tiny_gguf, n_ctx=256)
        stream = model.stream("Why?", seed=1, steps=3)
        first_step(stream)
        del stream, model
        gc.collect()
    assert capfd.readouterr() == ("", "")


def test_a_file_without_a_tokenizer_takes_ids_and_refuses_text(tiny_gguf: Path, tmp_path: Path) -> None:
    from gguf_rewrite import DROP, rewrite

    path = tmp_path / "ids.gguf"
    with DiffusionModel(tiny_gguf, n_ctx=256) as model:
        names = [name for name in model.metadata if name.startswith("tokenizer.")]
    rewrite(tiny_gguf, path, keys=dict.fromkeys(names, DROP))
    with DiffusionModel(path, n_ctx=256) as model:
        result = model.generate([2, 3, 4], seed=1, steps=2, max_tokens=5)
        assert (len(result.tokens), result.text) == (5, "")
        with pytest.raises(UnsupportedError, match="no tokenizer"):
            model.generate("Why?")
