"""The entropy-bound sampler: pure functions over rows of logits, then the loop's rules for stopping.

The reference is written out here in numpy and float64. Draws and acceptance are decided by comparing sums with a bound,
where the last bits may fall either way, so they are checked as intervals: a drawn id must be one whose cumulative
interval holds u, and the accepted rows one set that the bound allows, both up to 1e-6.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiffgguf import DiffusionModel
from pydiffgguf._binding.functions import sample
from pydiffgguf._binding.records import RawSample, Sampling
from pydiffgguf.session import Canvas, Session

Logits = npt.NDArray[np.float32]

RELEASED = Sampling(
    steps=48,
    max_steps=0,
    stability_threshold=1,
    t_min=0.4,
    t_max=0.8,
    entropy_bound=0.1,
    confidence_threshold=0.005,
)


def sampling(**changed: Any) -> Sampling:
    """The released options with some of them changed."""
    return Sampling(**{**vars(RELEASED), **changed})


def at_temperature(t: float, **changed: Any) -> Sampling:
    """Options whose only step runs at temperature t."""
    return sampling(steps=1, t_min=t, t_max=t, **changed)


def run(z: Logits, options: Sampling, step: int = 0, seed: int = 0, **given_draws: Any) -> RawSample:
    """The sampler on z [C, V]; draws come from a seed unless given. The renoise ids are V - 1 downwards, so that they
    are told apart from draws."""
    n_rows, n_vocab = z.shape
    draws = {
        "uniform": np.random.default_rng(seed).random(n_rows),
        "renoise": (n_vocab - 1 - np.arange(n_rows) % n_vocab).astype(np.int32),
        **given_draws,
    }
    return sample(z, options, step=step, **draws)


def log_probabilities(z: Logits, t: float) -> npt.NDArray[np.float64]:
    """log softmax(z / t) in float64; the division in float32, as the logits are float32."""
    x = (z / np.float32(t)).astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def entropies(z: Logits, t: float) -> npt.NDArray[np.float64]:
    """Nats per row, float64."""
    logp = log_probabilities(z, t)
    p = np.exp(logp)
    return -np.where(p > 0, p * np.where(np.isneginf(logp), 0.0, logp), 0.0).sum(-1)


def accepted_by(entropy: npt.NDArray[np.float64], free: npt.NDArray[np.bool_], bound: float) -> npt.NDArray[np.bool_]:
    """Free rows by rising entropy, lower rows first among equals, while what was spent before is within the bound."""
    accepted = np.zeros(len(entropy), bool)
    spent = 0.0
    for row in sorted(np.flatnonzero(free), key=lambda i: (entropy[i], i)):
        if spent > bound:
            break
        accepted[row] = True
        spent += entropy[row]
    return accepted


def check_against_numpy(z: Logits, options: Sampling, step: int, got: RawSample, u: Any, renoise: Any) -> None:
    """Everything that a sample says about free rows."""
    t = options.t_min + (options.t_max - options.t_min) * (options.steps - step) / options.steps
    n_rows = len(z)
    processed = z / np.float32(t)
    assert np.array_equal(got.argmax, processed.argmax(-1))  # numpy's argmax is the lowest id of equals, too
    np.testing.assert_allclose(got.entropy, entropies(z, t), rtol=2e-6, atol=2e-7)
    assert np.array_equal(got.accepted, accepted_by(got.entropy, np.ones(n_rows, bool), options.entropy_bound))
    assert got.accepted.any()
    assert np.array_equal(got.canvas[~got.accepted], renoise[~got.accepted])
    cumulative = np.exp(log_probabilities(z, t)).cumsum(-1)
    for row in np.flatnonzero(got.accepted):
        drawn = got.canvas[row]
        below = cumulative[row, drawn - 1] if drawn else 0.0
        assert below - 1e-6 <= u[row] < cumulative[row, drawn] + 1e-6
        assert np.isfinite(processed[row, drawn])


# ----------------------------------------------------------------------------------------------------- rows of logits


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_rows=st.integers(1, 40),
    n_vocab=st.sampled_from([1, 2, 7, 8, 9, 31, 300, 1023, 1024, 1025, 2500]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 5.0, 30.0]),
    bound=st.sampled_from([0.0, 0.1, 2.0, 1e6]),
    steps=st.integers(1, 60),
    data=st.data(),
)
def test_random_rows_equal_numpy(
    seed: int, n_rows: int, n_vocab: int, spread: float, bound: float, steps: int, data: st.DataObject
) -> None:
    """Flat to one-hot, one token to several blocks of the vocabulary, any step of any schedule."""
    rng = np.random.default_rng(seed)
    z = (rng.standard_normal((n_rows, n_vocab)) * spread).astype(np.float32)
    z[rng.random(z.shape) < 0.1] = -np.inf
    z[np.arange(n_rows), rng.integers(n_vocab, size=n_rows)] = np.float32(spread)
    step = data.draw(st.integers(0, steps - 1))
    u, renoise = rng.random(n_rows), rng.integers(n_vocab, size=n_rows, dtype=np.int32)
    options = sampling(steps=steps, entropy_bound=bound)
    check_against_numpy(z, options, step, run(z, options, step, uniform=u, renoise=renoise), u, renoise)


def test_confident_rows_do_not_spend_less_than_they_are_worth() -> None:
    """The budget sums many small entropies, so a bias that no single row shows counts: 200 rows of a trained net's
    kind, one token far above a long flat tail, sum to float64's value within 1e-6."""
    rng = np.random.default_rng(1)
    z = (rng.standard_normal((200, 5000)) * 1.5 - 12).astype(np.float32)
    z[np.arange(200), rng.integers(5000, size=200)] = rng.uniform(3, 8, 200)
    got = run(z, at_temperature(1.0))
    assert 0.01 < got.entropy.sum() < 10
    assert abs(got.entropy.sum() - entropies(z, 1.0).sum()) < 1e-6
    assert np.abs(got.entropy - entropies(z, 1.0)).max() < 1e-7


def test_equal_logits_give_the_lowest_id() -> None:
    """Two, many, or all entries equal, within a block of the vocabulary and across blocks."""
    z = np.zeros((4, 3000), np.float32)
    z[1, [5, 9]] = 3
    z[2, [1500, 2900]] = 3
    z[3, 7:] = 1
    assert run(z, RELEASED).argmax.tolist() == [0, 5, 1500, 7]


def test_equal_entropies_at_the_edge_of_the_budget_favour_lower_rows() -> None:
    """Ten rows of ln 2 nats each and a bound of 2: three are paid for and the fourth is begun, rows 0 to 2."""
    z = np.full((10, 64), -np.inf, np.float32)
    z[:, [3, 40]] = 0
    got = run(z, sampling(entropy_bound=2.0))
    np.testing.assert_allclose(got.entropy, np.log(2), rtol=1e-7)
    assert got.accepted.tolist() == [True] * 3 + [False] * 7


def test_bound_is_on_what_was_spent_before_a_row() -> None:
    """Rows of ln 2, bound exactly ln 2: the second row is accepted, since one ln 2 was spent before it; not the
    third. The dearest accepted row is not counted."""
    z = np.full((5, 8), -np.inf, np.float32)
    z[:, :2] = 0
    spent = float(run(z, sampling(entropy_bound=0.0)).entropy[0])
    assert run(z, sampling(entropy_bound=spent)).accepted.tolist() == [True, True, False, False, False]
    assert run(z, sampling(entropy_bound=np.nextafter(spent, 0))).accepted.tolist() == [True] + [False] * 4


def test_at_least_one_row_is_always_accepted() -> None:
    """A bound of 0 on rows far above it accepts the one of least entropy, wherever it stands."""
    rng = np.random.default_rng(2)
    z = rng.standard_normal((30, 500)).astype(np.float32)
    z[17] *= 2
    got = run(z, sampling(entropy_bound=0.0))
    assert np.flatnonzero(got.accepted).tolist() == [17] == [int(got.entropy.argmin())]


def test_certain_rows_cost_nothing() -> None:
    """One-hot rows have entropy exactly 0, draw their id for any u, and are all accepted at any bound."""
    ids = np.array([0, 5, 299, 1, 1], np.int32)
    z = np.full((5, 300), -np.inf, np.float32)
    z[np.arange(5), ids] = [0, -80, 1e30, 3, -1e30]
    for u in (0.0, 0.5, 1 - 2**-53):
        got = run(z, sampling(entropy_bound=0.0), uniform=np.full(5, u))
        assert (got.entropy == 0).all()
        assert got.accepted.all()
        assert np.array_equal(got.canvas, ids) and np.array_equal(got.argmax, ids)


def test_ids_without_probability_are_never_drawn() -> None:
    """u = 0 gives the first id that is not -inf, the greatest u the last one; so do entries that underflow."""
    z = np.full((2, 2100), -np.inf, np.float32)
    z[0, [700, 1024, 1500]] = 0
    z[1] = -1e4
    z[1, [3, 2050]] = 0
    for u, expected in ((0.0, [700, 3]), (0.5, [1024, 2050]), (1 - 2**-53, [1500, 2050])):
        got = run(z, at_temperature(1.0, entropy_bound=100.0), uniform=np.full(2, u))
        assert got.accepted.all()
        assert got.canvas.tolist() == expected


def test_u_on_a_boundary_belongs_to_the_next_id() -> None:
    """Probabilities 1/4 1/4 1/2: the first id whose cumulative probability exceeds u, so u = 1/4 draws id 1."""
    z = np.full((5, 3), 0, np.float32)
    z[:, 2] = np.log(2)
    got = run(z, at_temperature(1.0, entropy_bound=100.0), uniform=np.array([0, 0.2499, 0.2501, 0.4999, 0.5001]))
    assert got.canvas.tolist() == [0, 0, 1, 1, 2]
    flat = np.zeros((4, 4), np.float32)
    got = run(flat, at_temperature(1.0, entropy_bound=100.0), uniform=np.array([0.0, 0.25, 0.5, 0.75]))
    assert got.canvas.tolist() == [0, 1, 2, 3]


def test_draws_have_the_frequencies_of_softmax() -> None:
    """200,000 draws from one distribution: every id within five standard deviations."""
    p = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])
    n = 200_000
    z = np.tile(np.log(p).astype(np.float32), (n, 1))
    got = run(z, at_temperature(1.0, entropy_bound=1e12), seed=3)
    counts = np.bincount(got.canvas, minlength=5)
    assert (np.abs(counts - n * p) < 5 * np.sqrt(n * p * (1 - p))).all()


def test_huge_logits_are_no_trouble() -> None:
    """1e37 at t = 0.4 is still a float32; the gap to the rest is certainty."""
    z = np.full((3, 50), -1e37, np.float32)
    z[:, 11] = 1e37
    got = run(z, at_temperature(0.4))
    assert (got.entropy == 0).all() and (got.argmax == 11).all() and (got.canvas == 11).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 1023, 1024, 1999])
def test_broken_logits_are_an_error(value: float, place: int) -> None:
    """NaN or +inf anywhere in a row, also when it would vanish behind a greater entry."""
    z = np.zeros((2, 2000), np.float32)
    z[1, 500] = 50
    z[1, place] = value
    with pytest.raises(ValueError, match="NaN or has no finite maximum"):
        run(z, RELEASED)


def test_a_row_of_nothing_but_minus_infinity_is_an_error() -> None:
    with pytest.raises(ValueError, match="NaN or has no finite maximum"):
        run(np.full((1, 10), -np.inf, np.float32), RELEASED)


def test_temperature_falls_from_t_max_to_just_above_t_min() -> None:
    """Step k of N, from 0, runs at t_min + (t_max - t_min) (N - k) / N: the first at t_max, the last a step above
    t_min. The entropy of a fixed row says which temperature it was."""
    z = np.random.default_rng(4).standard_normal((1, 100)).astype(np.float32) * 3
    for steps in (1, 4, 48):
        for step in range(steps):
            t = 0.4 + 0.4 * (steps - step) / steps
            got = run(z, sampling(steps=steps), step)
            np.testing.assert_allclose(got.entropy, entropies(z, t), rtol=1e-5)
            if step == steps - 1:
                np.testing.assert_allclose(got.entropy, entropies(z, 0.4 + 0.4 / steps), rtol=1e-5)


def test_input_is_not_changed() -> None:
    """The sampler scales logits in place inside; the caller's array is its own."""
    z = np.random.default_rng(5).standard_normal((3, 40)).astype(np.float32)
    before = z.copy()
    run(z, RELEASED, pinned=np.array([-1, 4, -1], np.int32))
    assert np.array_equal(z, before)


# -------------------------------------------------------------------------------------------------------- pinned rows


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_rows=st.integers(1, 30), bound=st.sampled_from([0.0, 0.5, 3.0]))
def test_pinned_rows_are_out_of_everything(seed: int, n_rows: int, bound: float) -> None:
    """Free rows get what they would get if the pinned rows were not there at all; pinned rows get their id."""
    rng = np.random.default_rng(seed)
    z = (rng.standard_normal((n_rows, 60)) * 4).astype(np.float32)
    u, renoise = rng.random(n_rows), rng.integers(60, size=n_rows, dtype=np.int32)
    pinned = np.where(rng.random(n_rows) < 0.5, rng.integers(60, size=n_rows), -1).astype(np.int32)
    free = pinned < 0
    options = sampling(entropy_bound=bound)
    got = run(z, options, uniform=u, renoise=renoise, pinned=pinned)
    assert np.array_equal(got.canvas[~free], pinned[~free]) and np.array_equal(got.argmax[~free], pinned[~free])
    assert not got.accepted[~free].any() and (got.entropy[~free] == 0).all()
    if free.any():
        alone = run(z[free], options, uniform=u[free], renoise=renoise[free])
        for name in ("canvas", "argmax", "accepted", "entropy"):
            assert np.array_equal(getattr(got, name)[free], getattr(alone, name)), name


def test_logits_of_pinned_rows_are_not_read() -> None:
    """Not even NaN in them is seen."""
    z = np.zeros((2, 10), np.float32)
    z[1] = np.nan
    got = run(z, RELEASED, pinned=np.array([-1, 6], np.int32))
    assert got.canvas[1] == got.argmax[1] == 6 and got.entropy[1] == 0


def test_all_rows_pinned_accepts_none() -> None:
    got = run(np.zeros((3, 10), np.float32), RELEASED, pinned=np.array([1, 2, 3], np.int32))
    assert got.canvas.tolist() == [1, 2, 3] and not got.accepted.any()


# ------------------------------------------------------------------------------------------------- the loop's stopping


@pytest.fixture(scope="module")
def session(tiny_gguf: Path) -> Iterator[Session]:
    """A random model behind a prompt."""
    with DiffusionModel(tiny_gguf, type_kv="f32", n_ctx=256, n_threads=1) as model:
        opened = model.session()
        opened.encode(np.arange(20, 40))
        yield opened


# A pinned canvas settles quickly on any net: few free rows, all of them accepted at once.
def few_free_rows(session: Session, n: int = 6) -> npt.NDArray[np.int32]:
    pinned = np.arange(100, 100 + session.config.canvas_length, dtype=np.int32)
    pinned[:n] = -1
    return pinned


LOOP: dict[str, Any] = {"steps": 30, "entropy_bound": 1e6, "t_min": 0.1, "t_max": 0.2, "seed": 2, "trace": True}


def first_stable(canvas: Canvas, threshold: int) -> int | None:
    """The first step whose argmax canvas equals those of the `threshold` steps before it; None if there is none."""
    steps = [step.argmax for step in canvas.trace]
    for n in range(threshold, len(steps)):
        if all(np.array_equal(steps[n], steps[m]) for m in range(n - threshold, n)):
            return n
    return None


@pytest.mark.parametrize("threshold", [0, 1, 2, 3])
def test_stops_at_the_first_stable_step(session: Session, threshold: int) -> None:
    """`threshold` argmax canvases before a step must equal its own: 0 stops at once, 1 needs two in a row. Confidence
    is made to hold always."""
    pinned = few_free_rows(session)
    whole = session.run_canvas(pinned=pinned, stability_threshold=25, confidence_threshold=0.0, **LOOP)
    assert whole.steps == 30 and not whole.converged
    expected = first_stable(whole, threshold)
    assert expected is not None and expected + 1 < 30
    got = session.run_canvas(pinned=pinned, stability_threshold=threshold, confidence_threshold=1e6, **LOOP)
    assert got.converged and got.steps == expected + 1
    assert np.array_equal(got.tokens, whole.trace[expected].argmax)
    if threshold == 0:
        assert got.steps == 1


def test_stops_only_below_the_confidence_threshold(session: Session) -> None:
    """With stability out of the way, the first step whose mean entropy over the free rows is below the threshold; at
    the threshold itself it goes on."""
    pinned = few_free_rows(session)
    free = pinned < 0
    whole = session.run_canvas(pinned=pinned, stability_threshold=0, confidence_threshold=0.0, **LOOP)
    assert whole.steps == 30
    means = [step.entropy[free].sum() / free.sum() for step in whole.trace]
    lowest = int(np.argmin(means))
    assert lowest > 0
    at = session.run_canvas(pinned=pinned, stability_threshold=0, confidence_threshold=means[lowest], **LOOP)
    assert at.steps == 30 and not at.converged
    above = np.nextafter(means[lowest], 1)
    just = session.run_canvas(pinned=pinned, stability_threshold=0, confidence_threshold=above, **LOOP)
    assert just.converged and just.steps == lowest + 1


def test_result_is_the_argmax_canvas_not_the_sampled_one(session: Session) -> None:
    """At a high temperature and a low bound the two differ nearly everywhere."""
    got = session.run_canvas(steps=3, entropy_bound=0.0, t_min=1.0, t_max=2.0, seed=1, trace=True)
    assert np.array_equal(got.tokens, got.trace[-1].argmax)
    assert not np.array_equal(got.tokens, got.trace[-1].canvas)


def test_max_steps_leaves_the_temperature_schedule_alone(session: Session) -> None:
    """max_steps=4 of 12 gives the first four steps of 12, bit by bit; steps=4 gives other ones."""
    options = {"entropy_bound": 3.0, "seed": 5, "trace": True}
    whole = session.run_canvas(steps=12, **options)
    capped = session.run_canvas(steps=12, max_steps=4, **options)
    short = session.run_canvas(steps=4, **options)
    assert capped.steps == 4 and len(whole.trace) > 4
    for a, b in zip(capped.trace, whole.trace, strict=False):
        assert np.array_equal(a.entropy, b.entropy) and np.array_equal(a.canvas, b.canvas)
    assert not np.array_equal(capped.trace[1].entropy, short.trace[1].entropy)
    more = session.run_canvas(steps=5, max_steps=100, **options)
    assert more.steps <= 5


def test_session_sample_equals_the_loops_own_step(session: Session) -> None:
    """The sampler alone, on the logits that the loop saw, gives the loop's first step; defaults come from the file."""

    class Draws:
        def canvas(self, c: int) -> npt.NDArray[np.int32]:
            return np.random.default_rng([c, 0]).integers(512, size=32, dtype=np.int32)

        def uniform(self, c: int, step: int) -> npt.NDArray[np.float64]:
            return np.random.default_rng([c, step, 1]).random(32)

        def renoise(self, c: int, step: int) -> npt.NDArray[np.int32]:
            return np.random.default_rng([c, step, 2]).integers(512, size=32, dtype=np.int32)

    for c in (0, 3):
        for options in ({}, {"steps": 7, "entropy_bound": 5.0, "t_max": 1.5}):
            loop = session.run_canvas(noise=Draws(), canvas_index=c, trace=True, max_steps=1, **options).trace[0]
            z = session.denoise(Draws().canvas(c))
            alone = session.sample(z, 0, Draws(), canvas_index=c, **options)
            for name in ("argmax", "accepted", "entropy", "canvas"):
                assert np.array_equal(getattr(loop, name), getattr(alone, name)), name


# ------------------------------------------------------------------------------------------------------ bad arguments

OUT_OF_RANGE: list[tuple[str, Any, str]] = [
    ("steps", 0, "1"),
    ("steps", -3, "1"),
    ("max_steps", -1, "0"),
    ("stability_threshold", -1, "0"),
    ("t_min", -0.1, "0"),
    ("t_min", float("nan"), "0"),
    ("t_min", 1.0, "t_min"),
    ("t_max", 0.0, "0"),
    ("t_max", float("inf"), "0"),
    ("t_max", 0.2, "t_min"),
    ("entropy_bound", -0.1, "0"),
    ("entropy_bound", float("nan"), "0"),
    ("confidence_threshold", -1.0, "0"),
    ("confidence_threshold", float("nan"), "0"),
    ("time_limit_s", 0, "0"),
    ("time_limit_s", -1.0, "0"),
    ("time_limit_s", float("nan"), "0"),
]


@pytest.mark.parametrize(("name", "value", "limit"), OUT_OF_RANGE)
def test_options_out_of_range_name_option_value_and_range(session: Session, name: str, value: Any, limit: str) -> None:
    """ValueError with the option, what it was, and what it may be; the same from the loop and from the sampler."""
    with pytest.raises(ValueError, match=name) as error:
        session.run_canvas(**{name: value})
    message = str(error.value)
    assert limit in message
    assert f"{value:g}" in message
    if name != "time_limit_s":
        with pytest.raises(ValueError, match=name):
            run(np.zeros((2, 5), np.float32), sampling(**{name: value}))


@pytest.mark.parametrize("option", ["temperature", "top_k", "step", "entropy_bounds"])
def test_unknown_options_are_type_errors(session: Session, option: str) -> None:
    """Never ignored, and the message says which."""
    with pytest.raises(TypeError, match=option):
        session.run_canvas(**{option: 1})


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 2.5), ("steps", "4"), ("steps", True), ("t_min", "0.4"), ("entropy_bound", [0.1])]
)
def test_options_of_the_wrong_type_are_type_errors(session: Session, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        session.run_canvas(**{name: value})


def test_a_step_outside_of_the_schedule_is_refused() -> None:
    """Steps count from 0 to steps - 1."""
    z = np.zeros((2, 5), np.float32)
    for step in (4, 100, -1):
        with pytest.raises(ValueError, match="step"):
            run(z, sampling(steps=4), step)


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        ({"uniform": np.array([0.5, 1.0])}, r"uniform\[1\]"),
        ({"uniform": np.array([-0.1, 0.5])}, r"uniform\[0\]"),
        ({"uniform": np.array([0.5, np.nan])}, r"uniform\[1\]"),
        ({"renoise": np.array([0, 5], np.int32)}, r"renoise\[1\]"),
        ({"renoise": np.array([-1, 0], np.int32)}, r"renoise\[0\]"),
        ({"uniform": np.array([0.5])}, "uniform"),
        ({"renoise": np.array([1, 1, 1], np.int32)}, "renoise"),
        ({"pinned": np.array([-1, 5], np.int32)}, r"pinned\[1\]"),
        ({"pinned": np.array([-2, 1], np.int32)}, r"pinned\[0\]"),
    ],
)
def test_bad_draws_and_pins_are_refused(draws: dict[str, Any], message: str) -> None:
    """u outside of [0, 1), ids outside of the vocabulary, arrays of another length."""
    with pytest.raises(ValueError, match=message):
        run(np.zeros((2, 5), np.float32), RELEASED, **draws)
