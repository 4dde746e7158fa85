"""Logits for those rows that somebody reads: the same numbers as with all rows', in less time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pydiffgguf import DiffusionModel, Session, demo_model_path
from pydiffgguf._binding import functions
from pydiffgguf.session import SamplingOptions, resolve_sampling

PROMPT = [2, 40, 41, 42, 43, 60, 61]
STEPS = 5


@pytest.fixture(scope="module")
def model() -> Iterator[DiffusionModel]:
    with DiffusionModel(demo_model_path(), n_gpu_layers=0) as model:
        yield model


@pytest.fixture(params=["own", "ggml"])
def session(model: DiffusionModel, request: pytest.FixtureRequest) -> Iterator[Session]:
    with model.session(ggml_operators=request.param == "ggml") as session:
        session.encode(PROMPT)
        yield session


def some_canvas(model: DiffusionModel) -> np.ndarray:
    c = model.config
    return np.random.default_rng(0).integers(0, c.n_vocab, c.canvas_length, dtype=np.int32)


@pytest.mark.parametrize("rows", [[0], [63], [40, 3, 41], [*range(20, 44)], [*range(64)]])
def test_the_logits_of_some_rows_are_those_of_all(model: DiffusionModel, session: Session, rows: list[int]) -> None:
    """In the order asked, to the last bit, with a self-conditioning signal too."""
    canvas = some_canvas(model)
    first = session.denoise(canvas)
    second = session.denoise(canvas, first)
    np.testing.assert_array_equal(session.denoise(canvas, rows=rows), first[rows])
    np.testing.assert_array_equal(session.denoise(canvas, first, rows=rows), second[rows])


@pytest.mark.parametrize("rows", [[], [64], [-1], [0] * 65])
def test_rows_that_are_not_there_are_refused(model: DiffusionModel, session: Session, rows: list[int]) -> None:
    with pytest.raises(ValueError, match=r"rows\[0\]|n_out"):
        session.denoise(some_canvas(model), rows=np.array(rows, np.int32))


@pytest.mark.parametrize("n_free", [0, 17, 40])  # tests/test_kernel_stepper.py has more of them
def test_a_canvas_with_pins_is_that_of_all_rows_logits(model: DiffusionModel, session: Session, n_free: int) -> None:
    """Step for step what the sampler alone makes of passes that give all rows' logits."""
    c = model.config
    pinned = some_canvas(model)
    pinned[np.random.default_rng(n_free).permutation(c.canvas_length)[:n_free]] = -1
    run = session.run_canvas(seed=9, pinned=pinned, trace=True, steps=STEPS, stability_threshold=STEPS)
    options: SamplingOptions = {"steps": STEPS}
    sampling, _ = resolve_sampling(session._defaults, options)
    canvas = np.where(pinned < 0, functions.noise_canvas(9, 0, c.canvas_length, c.n_vocab), pinned)
    processed = None
    for number, step in enumerate(run.trace):
        z = session.denoise(canvas.astype(np.int32), processed)
        uniform = functions.noise_uniform(9, 0, number, c.canvas_length)
        renoise = functions.noise_renoise(9, 0, number, c.canvas_length, c.n_vocab)
        made = functions.sample(z, sampling, step=number, uniform=uniform, renoise=renoise, pinned=pinned)
        np.testing.assert_array_equal(step.canvas, made.canvas)
        np.testing.assert_array_equal(step.argmax, made.argmax)
        np.testing.assert_array_equal(step.entropy, made.entropy)
        t = sampling.t_min + (sampling.t_max - sampling.t_min) * ((STEPS - number) / STEPS)
        processed = z / np.float32(t)
        processed[pinned >= 0] = -np.inf
        processed[pinned >= 0, pinned[pinned >= 0]] = 0.0
        canvas = made.canvas


def test_pinned_rows_cost_no_head() -> None:
    """With 48 of 64 rows pinned the head takes a third of its time; 0.6 leaves room for a busy machine."""
    with DiffusionModel(demo_model_path(), n_gpu_layers=0, n_threads=1) as model, model.session() as session:
        session.encode(PROMPT)

        def head(pinned: np.ndarray) -> float:
            session.profile()
            session.run_canvas(seed=1, steps=3, pinned=pinned, stability_threshold=3)
            return session.timings.head

        none = np.full(model.config.canvas_length, -1, np.int32)
        most = np.where(np.arange(len(none)) < 48, 7, none).astype(np.int32)
        alone, fewer = np.min([[head(none), head(most)] for _ in range(5)], axis=0)
        assert fewer < 0.6 * alone
