"""Whole generations, step by step: transformers' `generate()` and this engine on the same handed-in draws.

Every step of every canvas must accept the same rows, have the same argmax canvas and stop at the same time. Two
float32 programs can only be held to that where rounding does not decide: a seed on which this engine leaves
transformers' path must be one on which transformers' own eager and sdpa runs part, which on these nets is rare. Those
are counted, printed, and at most one in ten. The CPU takes all of 20 seeds, every other place five of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from demo_tasks import Demo, tasks
from nets import Net, Report, relative_error
from once import once
from places import Place
from reference import (
    HandedNoise,
    Model,
    ReferenceCanvas,
    ReferencePrefix,
    ReferenceStep,
    Sampling,
    attention,
    pinned_loop,
    reference_generate,
    same_path,
    takes_path,
)

from pydiffgguf import DenoiseStep, DiffusionModel
from pydiffgguf.session import Step

pytestmark = pytest.mark.parity

SEEDS, SEEDS_ELSEWHERE, CANVASES = 20, 5, 3

# Along a whole path rounding is fed back by self-conditioning, so entropies drift apart while every decision is the
# same. Measured on the demo model, worst of 20 seeds: 1.1e-3 nats on a canvas past the end of its answer, where
# transformers' eager and sdpa runs are 2.5e-4 apart; elsewhere at most 1.1e-4 against 1.3e-4. A single step from the
# reference's own state has nothing to drift: there the logits agree to 5e-7 and the entropies to 3e-6.
PATH_ENTROPY = 5e-3
STEP_ENTROPY = 2e-5


def options(sampling: Sampling) -> dict[str, Any]:
    """The sampling as keyword arguments of this project; what is None stays with the file."""
    return {name: value for name, value in asdict(sampling).items() if value is not None}


def check_step(got: Step | DenoiseStep, expected: ReferenceStep, where: str, entropy: float = PATH_ENTROPY) -> None:
    """One step of the engine against one of the reference; `entropy`: how far apart the rows' entropies may be."""
    argmax = got.tokens if isinstance(got, DenoiseStep) else got.argmax
    assert np.array_equal(argmax, expected.argmax), f"{where}: the argmax canvas differs"
    assert np.array_equal(got.accepted, expected.accepted), f"{where}: other rows were accepted"
    np.testing.assert_allclose(got.entropy, expected.entropy, rtol=0, atol=entropy, err_msg=where)
    if isinstance(got, Step):
        assert np.array_equal(got.canvas, expected.canvas), f"{where}: the next canvas differs"


def check_stream(
    model: DiffusionModel,
    prompt: Sequence[int],
    noise: HandedNoise,
    sampling: Sampling,
    expected: list[ReferenceCanvas],
) -> None:
    """`model.stream` walks the reference's steps, and its result is the reference's canvases one after another."""
    canvas_length = model.config.canvas_length
    events: list[DenoiseStep] = []
    stream = model.stream(prompt, noise=noise, max_tokens=CANVASES * canvas_length, **options(sampling))
    for event in stream:
        if isinstance(event, DenoiseStep):
            events.append(event)
    result = stream.result
    for event in events:
        where = f"canvas {event.canvas}, step {event.step}"
        assert event.canvas < len(expected) and event.step < len(expected[event.canvas].steps), f"{where}: one too many"
        check_step(event, expected[event.canvas].steps[event.step], where)
    assert result.stats.steps == [len(canvas.steps) for canvas in expected]
    assert len(events) == sum(result.stats.steps)
    whole = np.concatenate([canvas.tokens for canvas in expected]).tolist()
    assert result.tokens == whole[: len(result.tokens)]
    if result.finish_reason == "length":
        assert len(result.tokens) == CANVASES * canvas_length
    else:
        assert whole[len(result.tokens)] in model.tokenizer.end_ids


def noise_for(model: Model, seed: int) -> HandedNoise:
    return HandedNoise(seed, model.config.canvas_length, model.config.text_config.vocab_size)


@once
def path_of(model: Model, prompt: tuple[int, ...], seed: int, sampling: Sampling, attn: str) -> list[ReferenceCanvas]:
    """The reference's path, once for all places."""
    return reference_generate(model, prompt, noise_for(model, seed), CANVASES, sampling, attn=attn)


# Bounds and thresholds at which these nets accept a growing part of the canvas, and stop early on some canvases.
WALKS = {
    "one_kv_head": Sampling(steps=10, entropy_bound=3.0, confidence_threshold=0.1),
    "alternating": Sampling(steps=10, entropy_bound=6.0, confidence_threshold=0.1, stability_threshold=2),
}


@pytest.mark.parametrize("name", WALKS)
def test_generate_takes_the_references_path_on_random_nets(
    walker: Callable[[str], Net], place: Place, name: str, report: Report
) -> None:
    """20 seeds (5 of them beside the CPU), 3 canvases each, prompts of 5 to 100 tokens."""
    net, sampling = walker(name), WALKS[name]
    seeds, undecided, stops = place.some(range(SEEDS), SEEDS_ELSEWHERE), [], []
    with place.open(net.gguf(), type_kv="f32", n_ctx=1024, n_threads=1) as model:
        for seed in seeds:
            prompt = tuple(net.ids(seed, 5 + 5 * seed).tolist())
            if not takes_path(
                partial(path_of, net.model, prompt, seed, sampling),
                partial(check_stream, model, prompt, noise_for(net.model, seed), sampling),
            ):
                undecided.append(seed)
                continue
            stops += [len(canvas.steps) for canvas in path_of(net.model, prompt, seed, sampling, "sdpa")]
    report(
        f"trajectories, {name}: {len(seeds) - len(undecided)} of {len(seeds)} seeds equal over {CANVASES} canvases, "
        f"{len(undecided)} undecided by the reference itself; {min(stops)} to {max(stops)} of {sampling.steps} steps"
    )
    assert len(undecided) <= len(seeds) // 10
    assert min(stops) < sampling.steps, "no canvas stopped early: the stop rule was not compared"


def test_generate_takes_the_references_path_on_the_demo_model(demo: Demo, place: Place, report: Report) -> None:
    """20 seeds (5 of them beside the CPU) on prompts of its own tasks, the file's own sampler values.

    `stream` ends at the first end token, as `generate()` with end tokens does; canvas after canvas of a session goes
    on past it over all three, as `generate()` without them does.
    """
    sampling = demo.sampling
    prompts = [demo.chat_prompt(task["prompt"]) for kind in ("sudoku_chat", "question") for task in tasks(kind)]
    end_ids = demo.opened.tokenizer.end_ids
    seeds, undecided, stops, ended = place.some(range(SEEDS), SEEDS_ELSEWHERE), [], [], 0
    for seed in seeds:
        prompt, noise = prompts[seed * len(prompts) // SEEDS], demo.noise(seed)

        def until_end(expected: list[ReferenceCanvas]) -> int:
            return next((i + 1 for i, c in enumerate(expected) if end_ids & set(c.tokens.tolist())), CANVASES)

        def check(
            expected: list[ReferenceCanvas], prompt: list[int] = prompt, noise: HandedNoise = noise, seed: int = seed
        ) -> None:
            check_stream(demo.opened, prompt, noise, sampling, expected[: until_end(expected)])
            with demo.opened.session() as session:
                session.encode(prompt)
                for c, canvas in enumerate(expected):
                    run = session.run_canvas(noise=noise, canvas_index=c, trace=True, **options(sampling))
                    assert run.steps == len(canvas.steps), f"seed {seed}, canvas {c}"
                    for n, (got, step) in enumerate(zip(run.trace, canvas.steps, strict=True)):
                        check_step(got, step, f"seed {seed}, canvas {c}, step {n}")
                    assert np.array_equal(run.tokens, canvas.tokens)
                    session.encode(run.tokens)

        path = partial(path_of, demo.reference, tuple(prompt), seed, sampling)
        if not takes_path(path, check):
            undecided.append(seed)
            continue
        expected = path("sdpa")
        ended += until_end(expected) < CANVASES
        stops += [len(canvas.steps) for canvas in expected]
    report(
        f"trajectories, demo model: {len(seeds) - len(undecided)} of {len(seeds)} seeds equal over {CANVASES} "
        f"canvases, {len(undecided)} undecided by the reference itself; {min(stops)} to {max(stops)} steps"
    )
    assert len(undecided) <= len(seeds) // 10
    assert ended > len(seeds) // 2, "the demo model hardly ever ends its answer: these are not its prompts"


@cache
def states(model: Model, prompt: tuple[int, ...], seed: int, sampling: Sampling, n: int) -> list[ReferenceCanvas]:
    """n canvases of the reference, each step with its processed logits, once for all places."""
    return reference_generate(model, prompt, noise_for(model, seed), n, sampling, keep_processed=True)


def follow(
    opened: DiffusionModel, reference: Model, prompt: Sequence[int], seed: int, sampling: Sampling, n: int
) -> float:
    """Every step of n canvases from the reference's canvas and logits: `session.sample` must give its rows exactly.
    Returns the worst relative error of `session.denoise`."""
    worst, noise = 0.0, noise_for(reference, seed)
    with opened.session() as session:
        session.encode(prompt)
        for c, canvas in enumerate(states(reference, tuple(prompt), seed, sampling, n)):
            before = None
            for i, step in enumerate(canvas.steps):
                assert step.processed is not None
                raw = step.processed * np.float32(sampling.temperature(i))
                worst = max(worst, relative_error(session.denoise(step.canvas_before, before), raw))
                got = session.sample(raw, i, noise, canvas_index=c, **options(sampling))
                check_step(got, step, f"canvas {c}, step {i}", entropy=STEP_ENTROPY)
                before = step.processed
            session.encode(canvas.tokens)
    return worst


@pytest.mark.parametrize("name", ["full_first", "long_canvas", "many_experts"])
def test_each_step_of_a_chaotic_net_follows_from_the_references_state(
    net: Callable[[str], Net], place: Place, name: str, report: Report
) -> None:
    """Undamped random nets double rounding errors from step to step, so each step starts from the reference's canvas
    and logits: the logits to 2e-5, the rows exactly."""
    n = net(name)
    sampling = Sampling(steps=6, entropy_bound=8.0, confidence_threshold=0.01)
    with place.open(n.gguf(), type_kv="f32", n_ctx=1024, n_threads=1) as model:
        worst = follow(model, n.model, n.ids(1, 50).tolist(), 1, sampling, 2)
    report(f"step by step, {name}: relative error of the logits {worst:.1e} at most")
    assert worst <= 2e-5


def test_each_step_of_the_demo_model_follows_from_the_references_state(demo: Demo, report: Report) -> None:
    """The trained net, within its answer and past it: what a whole path only bounds, a single step pins down."""
    worst = 0.0
    for seed, task in enumerate([*tasks("question")[:2], *tasks("sudoku_chat")[:1]]):
        prompt = demo.chat_prompt(task["prompt"])
        worst = max(worst, follow(demo.opened, demo.reference, prompt, seed, demo.sampling, CANVASES))
    report(f"step by step, demo model: relative error of the logits {worst:.1e} at most")
    assert worst <= 2e-6


def test_a_wrong_self_conditioning_would_be_seen(walker: Callable[[str], Net]) -> None:
    """The comparison can fail: the same loop fed raw logits in place of processed ones leaves the reference's path."""
    net, sampling = walker("one_kv_head"), WALKS["one_kv_head"]
    noise = HandedNoise(0, net.canvas_length, net.vocab_size)
    prompt = net.ids(0, 5).tolist()
    expected = reference_generate(net.model, prompt, noise, 1, sampling)

    class Unprocessed(ReferencePrefix):
        def denoise(self, canvas: Any, self_conditioning: Any = None) -> Any:
            return super().denoise(canvas, None if self_conditioning is None else self_conditioning * 0.6)

    with attention(net.model, "sdpa"):
        right, wrong = ReferencePrefix(net.model), Unprocessed(net.model)
        right.encode(prompt)
        wrong.encode(prompt)
        assert same_path([pinned_loop(right, noise, None, sampling)], expected)
        assert not same_path([pinned_loop(wrong, noise, None, sampling)], expected)
