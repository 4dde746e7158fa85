"""Canvases whose last rows leave while they are denoised: `CanvasBatch.narrow`, and `narrow=True` of `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import canvas_length
import numpy as np
import pytest

from pydiffgguf import DenoiseStep, DiffusionModel, Session, cli, demo_model_path
from pydiffgguf._binding import functions
from pydiffgguf.generate import NARROW_MARGIN
from pydiffgguf.session import CanvasBatch, CanvasSpec, SamplingOptions, resolve_sampling

PROMPT = "Put in order: 9 7 1."
STEPS = 6


@pytest.fixture(scope="module")
def model() -> Iterator[DiffusionModel]:
    with DiffusionModel(demo_model_path(), n_gpu_layers=0, n_threads=1) as model:
        yield model


@pytest.fixture(params=["host", "operators"])
def session(model: DiffusionModel, request: pytest.FixtureRequest) -> Iterator[Session]:
    with model.session(n_rows=2 * model.config.canvas_length, sampler=request.param) as session:
        session.encode([2, 40, 41, 42])
        yield session


def batch_of(session: Session, *seeds: int, **options: Any) -> CanvasBatch:
    """Canvases that make all their steps."""
    given: SamplingOptions = {"steps": STEPS, "stability_threshold": STEPS}
    sampling, _ = resolve_sampling(session._defaults, given)
    return CanvasBatch(session, [CanvasSpec(seed=seed, **options) for seed in seeds], sampling)


@pytest.mark.parametrize("n", [1, 17, 63])
def test_rows_that_stay_go_on_from_what_they_have(model: DiffusionModel, n: int) -> None:
    """The step after is that of a canvas of these rows with their signal, and their draws."""
    c = model.config
    with model.session() as session:
        session.encode([2, 40, 41, 42])
        first = session.denoise(functions.noise_canvas(5, 0, c.canvas_length, c.n_vocab))
        batch = batch_of(session, 5)
        [before] = batch.step()
        batch.narrow(0, n)
        [after] = batch.step()
        processed = first[:n] / np.float32(session._defaults.t_max)
        z = session.denoise(before.canvas[:n], processed, n_rows=n)
        sampling, _ = resolve_sampling(session._defaults, {"steps": STEPS})
        uniform = functions.noise_uniform(5, 0, 1, n)
        renoise = functions.noise_renoise(5, 0, 1, n, c.n_vocab)
        expected = functions.sample(z, sampling, step=1, uniform=uniform, renoise=renoise)
    for name in ("argmax", "canvas", "accepted", "entropy"):
        np.testing.assert_array_equal(getattr(after, name), getattr(expected, name))


def test_a_neighbour_does_not_notice(session: Session) -> None:
    """The second of two canvases has the numbers that it has alone, though its rows move up."""
    alone = batch_of(session, 2)
    expected = [alone.step()[0] for _ in range(STEPS)]
    both = batch_of(session, 1, 2)
    for number, one in enumerate(expected):
        narrowed, other = both.step()
        assert len(narrowed.argmax) == (64 if number < 2 else 20 if number < 4 else 7)
        np.testing.assert_array_equal(other.canvas, one.canvas)
        np.testing.assert_array_equal(other.entropy, one.entropy)
        if number in (1, 3):
            both.narrow(0, 20 if number == 1 else 7)
    assert both.finished


def test_rules_are_those_of_the_rows_that_stay(session: Session) -> None:
    """Pins, watched ids and allowed sets of rows that left are gone with them."""
    rows = np.arange(64, dtype=np.int32)
    batch = batch_of(session, 3, pinned=np.where(rows % 3 == 0, rows, -1), watched=rows, allowed={62: [4, 5], 4: [6]})
    batch.step()
    batch.narrow(0, 10)
    [step] = batch.step()
    np.testing.assert_array_equal(step.argmax[[0, 3, 6, 9]], [0, 3, 6, 9])
    assert step.argmax[4] == 6
    assert step.logprob is not None and len(step.logprob) == 10
    batch.rules(0, np.full(10, 7, np.int32), {})
    np.testing.assert_array_equal(batch.step()[0].argmax, np.full(10, 7))


@pytest.mark.parametrize("n", [0, -1, 65])
def test_a_number_of_rows_that_cannot_be_is_refused(session: Session, n: int) -> None:
    """And the canvas is as it was; so is one that has finished."""
    batch = batch_of(session, 3)
    batch.step()
    with pytest.raises(ValueError, match=f"n_rows is {n}: it must be from 1 to 64"):
        batch.narrow(0, n)
    batch.narrow(0, 64)
    while not batch.finished:
        assert len(batch.step()[0].argmax) == 64
    with pytest.raises(ValueError, match="makes no further step"):
        batch.narrow(0, 3)
    again = batch_of(session, 3)
    again.step()
    again.narrow(0, 9)
    with pytest.raises(ValueError, match="n_rows is 10: it must be from 1 to the rows of canvas 0, 9"):
        again.narrow(0, 10)


def test_an_answer_is_the_same_on_fewer_rows(model: DiffusionModel) -> None:
    """Once its end has stayed for two steps, the rows behind it leave, except a margin; log-probabilities come too."""
    options: dict[str, Any] = {"seed": 7, "stability_threshold": 6}
    whole = model.generate(PROMPT, **options)
    stream = model.stream(PROMPT, narrow=True, **options)
    rows = [len(event.tokens) for event in stream if isinstance(event, DenoiseStep)]
    assert stream.result is not None
    assert stream.result.text == whole.text == "1 7 9"
    kept = len(whole.tokens) + 1 + NARROW_MARGIN
    assert rows[:2] == [64, 64] and set(rows[2:]) == {kept}
    assert model.generate(PROMPT, narrow=True, **options).tokens == whole.tokens


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"narrow": 1}, TypeError, "narrow must be True or False"),
        ({"narrow": True, "choices": ["a"]}, ValueError, "narrow cannot be given beside a constraint"),
    ],
)
def test_what_narrow_cannot_be(model: DiffusionModel, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model.generate(PROMPT, **options)


def test_the_command_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(demo_model_path()), "-p", PROMPT, "--seed", "7", "--narrow", "--no-live"]
    assert cli.main(command) == 0
    assert "1 7 9" in capsys.readouterr().out


def test_steps_of_shorter_canvases_can_be_timed(capsys: pytest.CaptureFixture[str]) -> None:
    """benchmarks/canvas_length.py --model times each length that it is asked for."""
    assert canvas_length.main(["--model", str(demo_model_path()), "--lengths", "16,8", "--repeat", "1"]) == 0
    assert [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]] == ["16", "8"]
