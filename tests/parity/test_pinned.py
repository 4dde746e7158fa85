"""Pinned rows, step by step against the plain loop over transformers' model (tests/reference.py, `pinned_loop`).

transformers itself has no pinned rows. That loop without pins walks `generate()`'s path (test_reference.py), and its
rules for pins are written out in its docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch
from nets import Net, relative_error
from reference import HandedNoise, Ids, ReferencePrefix, Sampling, attention, pinned_loop, same_path

from pydiffgguf import DiffusionModel
from pydiffgguf.session import Canvas, Session

pytestmark = pytest.mark.parity

SAMPLING = Sampling(steps=10, entropy_bound=2.0, confidence_threshold=0.2)


@dataclass(frozen=True)
class Pair:
    """One net on both sides, behind the same prompt."""

    net: Net
    session: Session
    prefix: ReferencePrefix

    def noise(self, seed: int) -> HandedNoise:
        return HandedNoise(seed, self.net.canvas_length, self.net.vocab_size)

    def pins(self, kind: str) -> Ids:
        """A pattern of pinned rows, int32 [C]: the id, or -1 where the row is free."""
        rows = np.arange(self.net.canvas_length)
        c = len(rows)
        pinned = {
            "none": np.zeros(c, bool),
            "first": rows == 0,
            "last": rows == c - 1,
            "suffix": rows >= c // 3,  # an infill: the gap, then what follows it
            "both ends": (rows < c // 4) | (rows >= c - c // 4),
            "every other": rows % 2 == 1,
            "all but one": rows != c // 2,
            "random": np.random.default_rng(9).random(c) < 0.5,
        }[kind]
        return np.where(pinned, self.net.ids(77, c), -1).astype(np.int32)


PATTERNS = ["none", "first", "last", "suffix", "both ends", "every other", "all but one", "random"]


@pytest.fixture(scope="module", params=["one_kv_head", "alternating"])
def pair(request: pytest.FixtureRequest, walker: Callable[[str], Net]) -> Iterator[Pair]:
    net = walker(request.param)
    prompt = net.ids(3, 33)
    with DiffusionModel(net.gguf(), type_kv="f32", n_ctx=512, n_threads=1) as model:
        session, prefix = model.session(), ReferencePrefix(net.model)
        session.encode(prompt)
        prefix.encode(prompt)
        yield Pair(net, session, prefix)


def run(pair: Pair, pins: Ids | None, seed: int, sampling: Sampling = SAMPLING, canvas_index: int = 0) -> Canvas:
    options = {name: value for name, value in asdict(sampling).items() if value is not None}
    return pair.session.run_canvas(
        noise=pair.noise(seed), canvas_index=canvas_index, pinned=pins, trace=True, **options
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pinned_canvas_takes_the_plain_loops_path(pair: Pair, pattern: str) -> None:
    """The same accepted rows, argmax canvas, next canvas and stop at every step, for each pattern and three seeds.

    A seed counts where the plain loop's own eager and sdpa runs agree; at most one of the three may not.
    """
    pins = pair.pins(pattern)
    counted = 0
    for seed in range(3):
        expected = pinned_loop(pair.prefix, pair.noise(seed), pins, SAMPLING, canvas_index=seed)
        with attention(pair.net.model, "eager"):
            eager = pinned_loop(pair.prefix, pair.noise(seed), pins, SAMPLING, canvas_index=seed)
        if not same_path([eager], [expected]):
            continue
        counted += 1
        got = run(pair, pins, seed, canvas_index=seed)
        assert got.steps == len(expected.steps)
        for n, (mine, theirs) in enumerate(zip(got.trace, expected.steps, strict=True)):
            where = f"seed {seed}, step {n}"
            assert np.array_equal(mine.argmax, theirs.argmax), where
            assert np.array_equal(mine.accepted, theirs.accepted), where
            assert np.array_equal(mine.canvas, theirs.canvas), where
            np.testing.assert_allclose(mine.entropy, theirs.entropy, rtol=0, atol=5e-4, err_msg=where)
        assert np.array_equal(got.tokens, expected.tokens)
    assert counted >= 2


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pinned_rows_hold_their_ids_and_take_no_part(pair: Pair, pattern: str) -> None:
    """At every step a pinned row has its id on the next canvas and as its argmax, is not accepted, has entropy 0."""
    pins = pair.pins(pattern)
    fixed = pins >= 0
    for step in run(pair, pins, seed=4).trace:
        assert np.array_equal(step.canvas[fixed], pins[fixed])
        assert np.array_equal(step.argmax[fixed], pins[fixed])
        assert not step.accepted[fixed].any()
        assert (step.entropy[fixed] == 0).all()
        assert step.accepted[~fixed].any()


def test_no_pins_and_pins_of_minus_one_are_the_same(pair: Pair) -> None:
    """pinned=None and all -1 give the same bits."""
    without, free = run(pair, None, 5), run(pair, pair.pins("none"), 5)
    assert without.steps == free.steps
    for a, b in zip(without.trace, free.trace, strict=True):
        assert np.array_equal(a.canvas, b.canvas) and np.array_equal(a.entropy, b.entropy)


def test_first_step_has_no_self_conditioning_from_pins(pair: Pair) -> None:
    """The first pass of a pinned canvas is one decoder pass without any signal over the canvas with the pins on it;
    the second is conditioned by one-hots on the pinned rows."""
    pins = pair.pins("every other")
    fixed = pins >= 0
    noise = pair.noise(6)
    trace = run(pair, pins, 6).trace
    first = np.where(fixed, pins, noise.canvas(0)).astype(np.int32)
    z = pair.session.denoise(first)
    assert np.array_equal(z.argmax(-1)[~fixed], trace[0].argmax[~fixed])

    processed = z / np.float32(SAMPLING.temperature(0))
    processed[fixed] = -np.inf
    processed[fixed, pins[fixed]] = 0.0
    z = pair.session.denoise(trace[0].canvas, processed)
    entropy = pair.session.sample(
        z, 1, noise, SAMPLING.steps, pinned=pins, t_min=SAMPLING.t_min, t_max=SAMPLING.t_max
    ).entropy
    np.testing.assert_allclose(entropy, trace[1].entropy, rtol=0, atol=1e-5)


def test_one_hot_conditioning_equals_the_reference(pair: Pair) -> None:
    """Rows of -inf with a single 0, as pinned rows feed themselves back: finite logits, those of the reference."""
    net = pair.net
    canvas = net.ids(1, net.canvas_length)
    signal = np.full((net.canvas_length, net.vocab_size), -np.inf, np.float32)
    signal[np.arange(net.canvas_length), net.ids(2, net.canvas_length)] = 0.0
    got = pair.session.denoise(canvas, signal)
    assert relative_error(got, pair.prefix.denoise(canvas, torch.from_numpy(signal)).numpy()) <= 2e-5


def test_a_long_pinned_suffix_does_not_make_the_canvas_confident(pair: Pair) -> None:
    """With all rows but one pinned, a stop needs that row's own entropy below the threshold, not the diluted mean."""
    pins = pair.pins("all but one")
    free = pins < 0
    strict = Sampling(steps=10, entropy_bound=2.0, confidence_threshold=1e-6, stability_threshold=0)
    for step in run(pair, pins, 7, strict).trace[:-1]:
        assert step.entropy[free].mean() >= strict.confidence_threshold
    barely = Sampling(
        steps=10, entropy_bound=2.0, confidence_threshold=float(run(pair, pins, 7, strict).trace[0].entropy[free].max())
    )
    run_barely = run(pair, pins, 7, barely)
    assert run_barely.steps > 1  # stability 1: one step is never enough


def test_all_rows_pinned_ends_at_once(pair: Pair) -> None:
    """Nothing is free: the canvas is its pins, its mean entropy is 0, and it stops as soon as stability allows."""
    pins = pair.net.ids(8, pair.net.canvas_length)
    for threshold in (0, 1, 3):
        sampling = Sampling(steps=10, stability_threshold=threshold)
        got = run(pair, pins, 8, sampling)
        assert np.array_equal(got.tokens, pins)
        assert got.steps == threshold + 1
        assert not any(step.accepted.any() for step in got.trace)
        assert got.steps == len(pinned_loop(pair.prefix, pair.noise(8), pins, sampling).steps)


@pytest.mark.parametrize("bad", [-2, 10**6])
def test_a_pin_that_is_no_id_is_refused(pair: Pair, bad: int) -> None:
    """Only -1 means free; the message names the row."""
    pins = pair.pins("none")
    pins[3] = bad
    with pytest.raises(ValueError, match=r"pinned\[3\]"):
        run(pair, pins, 0)


def test_pins_of_another_length_are_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="pinned"):
        run(pair, pair.pins("none")[:-1], 0)
