"""The same seed gives the same text: on one build, whatever the number of threads and whatever was computed before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nets import Net

from pydiffgguf import DenoiseStep, DiffusionModel, demo_model_path
from pydiffgguf._binding import functions
from pydiffgguf.session import Canvas


def trace(net: Net, n_threads: int, seed: int = 3, n_batch: int = 16) -> Canvas:
    """One canvas behind a prompt of 70 tokens, every step kept."""
    with DiffusionModel(net.gguf(), n_ctx=512, n_batch=n_batch, n_threads=n_threads) as model:
        session = model.session()
        assert session.n_threads == n_threads
        session.encode(net.ids(1, 70))
        return session.run_canvas(seed=seed, steps=6, entropy_bound=4.0, trace=True)


def check_identical(a: Canvas, b: Canvas) -> None:
    """Bit by bit, entropies included."""
    assert a.steps == b.steps and np.array_equal(a.tokens, b.tokens)
    for x, y in zip(a.trace, b.trace, strict=True):
        for name in ("argmax", "accepted", "entropy", "canvas"):
            assert np.array_equal(getattr(x, name), getattr(y, name)), name


@pytest.mark.parametrize(("name", "n_threads"), [("one_kv_head", 2), ("one_kv_head", 3), ("many_experts", 2)])
def test_thread_count_never_changes_a_bit(net: Callable[[str], Net], name: str, n_threads: int) -> None:
    """Two and three threads against one, on rows that do not divide by the threads."""
    check_identical(trace(net(name), n_threads), trace(net(name), 1))


def test_runs_repeat_and_seeds_differ(net: Callable[[str], Net]) -> None:
    """The same seed twice, then another one."""
    n = net("one_kv_head")
    check_identical(trace(n, 1), trace(n, 1))
    assert not np.array_equal(trace(n, 1).trace[0].canvas, trace(n, 1, seed=4).trace[0].canvas)


def test_seed_is_philox_noise_by_canvas_and_step(net: Callable[[str], Net]) -> None:
    """Handing in the published draws of a seed gives what the seed gives: the loop counts canvases and steps right."""
    n = net("one_kv_head")
    seed = 2**40 + 5

    class Drawn:
        def canvas(self, c: int) -> np.ndarray:
            return functions.noise_canvas(seed, c, n.canvas_length, n.vocab_size)

        def uniform(self, c: int, step: int) -> np.ndarray:
            return functions.noise_uniform(seed, c, step, n.canvas_length)

        def renoise(self, c: int, step: int) -> np.ndarray:
            return functions.noise_renoise(seed, c, step, n.canvas_length, n.vocab_size)

    with DiffusionModel(n.gguf(), n_ctx=512, n_threads=1) as model:
        session = model.session()
        session.encode(n.ids(1, 20))
        options = {"steps": 5, "canvas_index": 7, "trace": True}
        check_identical(session.run_canvas(seed=seed, **options), session.run_canvas(noise=Drawn(), **options))

        prompt = n.ids(1, 20).tolist()
        by_seed, by_noise = (
            [
                (event.canvas, event.step, event.tokens.tolist(), event.accepted.tolist())
                for event in model.stream(prompt, max_tokens=3 * n.canvas_length, steps=4, **draws)
                if isinstance(event, DenoiseStep)
            ]
            for draws in ({"seed": seed}, {"noise": Drawn()})
        )
        assert by_seed == by_noise and {canvas for canvas, *_ in by_seed} == {0, 1, 2}


@pytest.fixture
def demo_path() -> Path:
    return demo_model_path()


def test_same_seed_same_text_for_one_and_two_threads(demo_path: Path) -> None:
    """The demo model on its own kind of prompt, at its own defaults."""
    texts = set()
    for n_threads in (1, 2, 1):
        with DiffusionModel(demo_path, n_threads=n_threads) as model:
            result = model.generate("Rosa asks: which month is right after October?", seed=11, max_tokens=64)
            texts.add((result.text, tuple(result.tokens), tuple(result.stats.steps)))
    assert len(texts) == 1


def test_a_generation_does_not_depend_on_the_one_before(demo_path: Path) -> None:
    """The model keeps its session and the prefix in it; a prompt that shares a head with the last reuses it. The text
    is what a fresh model gives."""
    prompts = ["Rosa asks: which month is right after October?", "Rosa asks: which month is right after May?"]
    with DiffusionModel(demo_path, n_threads=1) as model:
        warm = [model.generate(prompt, seed=1, max_tokens=64) for prompt in (*prompts, *prompts)]
    assert warm[1].stats.reused_tokens > 0
    for prompt, result in zip((*prompts, *prompts), warm, strict=True):
        with DiffusionModel(demo_path, n_threads=1) as model:
            fresh = model.generate(prompt, seed=1, max_tokens=64)
        assert (fresh.text, fresh.tokens) == (result.text, result.tokens)
