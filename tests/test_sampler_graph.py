"""The sampler made of ggml's operators, which works where a device's logits are, against the one in C++."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from shapes import write_head

from pydiffgguf._binding.functions import sample
from pydiffgguf._binding.native import NativeModel
from pydiffgguf._binding.records import RawSample, Sampling

# All rows are accepted, so that the canvas holds every row's draw.
OPTIONS = Sampling(
    steps=1,
    max_steps=0,
    stability_threshold=1,
    t_min=0.6,
    t_max=0.6,
    entropy_bound=1e9,
    confidence_threshold=0.0,
)

# The graph sums in float32, over blocks of 512 ids and then over the blocks: with some thousand additions of 6e-8 each,
# a cumulative probability is off by less than this. A u so near to one may draw the neighbour.
ROUNDING = 2e-6

Logits = npt.NDArray[np.float32]


def both(z: Logits, uniform: npt.NDArray[np.float64]) -> tuple[RawSample, RawSample]:
    renoise = np.zeros(len(z), dtype=np.int32)
    ours, graphs = (
        sample(z, OPTIONS, step=0, uniform=uniform, renoise=renoise, ggml_operators=flag) for flag in (False, True)
    )
    return ours, graphs


def near_a_tie(z: Logits, uniform: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Rows whose u lies within rounding of a cumulative probability."""
    x = (z / np.float32(0.6)).astype(np.float64)
    p = np.exp(x - x.max(-1, keepdims=True))
    cumulative = np.cumsum(p / p.sum(-1, keepdims=True), -1)
    return np.abs(cumulative - uniform[:, None]).min(-1) <= ROUNDING


@pytest.mark.parametrize("n_vocab", [2, 511, 512, 513, 4099, 32_003])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0], ids=["flat", "usual", "sharp"])
def test_random_rows_are_sampled_alike(n_vocab: int, scale: float) -> None:
    """Argmax of every row, the draw of every row whose u is not within rounding of a cumulative sum, the entropy."""
    rng = np.random.default_rng(n_vocab)
    n_rows = min(1000, 4_000_000 // n_vocab)
    z = (scale * rng.standard_normal((n_rows, n_vocab))).astype(np.float32)
    uniform = rng.random(n_rows)
    ours, graphs = both(z, uniform)
    np.testing.assert_array_equal(graphs.argmax, ours.argmax)
    clear = ~near_a_tie(z, uniform)
    assert clear.mean() > (0.5 if scale < 1 else 0.8)
    np.testing.assert_array_equal(graphs.canvas[clear], ours.canvas[clear])
    assert np.abs(graphs.canvas - ours.canvas)[~clear].max(initial=0) <= 1 or scale > 1
    np.testing.assert_allclose(graphs.entropy, ours.entropy, rtol=2e-6, atol=2e-7)


def test_odd_rows_are_sampled_alike() -> None:
    """Ties for the greatest, one-hot rows, nearly one-hot rows, ids that cannot be drawn at both ends."""
    n_vocab = 1500
    z = np.full((6, n_vocab), -np.inf, dtype=np.float32)
    z[0] = 0.0
    z[1, 700] = 3.0
    z[2, [3, 900, 1400]] = 5.0
    z[3], z[3, 20] = 0.0, 12.0
    z[4, 600:610] = np.arange(10) / 4
    z[5], z[5, -1] = -3.0, 7.0
    for u in (0.0, 1e-9, 0.25, 0.5001, 0.999, np.nextafter(1.0, 0.0)):
        uniform = np.full(len(z), u)
        ours, graphs = both(z, uniform)
        assert graphs.argmax.tolist() == ours.argmax.tolist() == [0, 700, 3, 20, 609, 1499]
        clear = ~near_a_tie(z, uniform)
        np.testing.assert_array_equal(graphs.canvas[clear], ours.canvas[clear])
        assert np.isfinite(z[np.arange(len(z)), graphs.canvas]).all()
        np.testing.assert_allclose(graphs.entropy, ours.entropy, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_logits_are_an_error(value: float) -> None:
    z = np.zeros((3, 600), dtype=np.float32)
    z[1, 550] = value
    with pytest.raises(ValueError, match="z: row 1 holds NaN or has no finite maximum"):
        both(z, np.full(3, 0.5))[1]
    with pytest.raises(ValueError, match="z: row 1 holds NaN or has no finite maximum"):
        sample(z, OPTIONS, step=0, uniform=[0.5] * 3, renoise=[0] * 3, ggml_operators=True)


def test_logits_that_the_temperature_makes_infinite_are_an_error_of_the_caller() -> None:
    """3e38 is finite, and divided by 0.4 it is not."""
    z = np.zeros((3, 600), dtype=np.float32)
    z[1, 550] = 3e38
    with pytest.raises(ValueError, match="z: row 1 is not finite when it is divided by the temperature"):
        both(z, np.full(3, 0.5))


def test_rows_in_several_slices_are_sampled_alike() -> None:
    """At the released vocabulary's size, rows are sampled some 40 at a time."""
    rng = np.random.default_rng(1)
    z = (3.0 * rng.standard_normal((90, 200_003))).astype(np.float32)
    ours, graphs = both(z, rng.random(90))
    np.testing.assert_array_equal(graphs.argmax, ours.argmax)
    np.testing.assert_array_equal(graphs.canvas, ours.canvas)  # none of these draws is near a tie
    np.testing.assert_allclose(graphs.entropy, ours.entropy, rtol=2e-6)


def test_graphs_of_the_released_shape_have_room(tmp_path: Path) -> None:
    """Predicting a session's memory builds its largest graphs: 262,144 tokens are 176 slices of the dense signal and
    eight of the sampler."""
    write_head(tmp_path / "head.gguf", "26b-a4b", type="q4_k_m")
    kinds: list[dict[str, Any]] = [{}, {"ggml_operators": True}, {"sampler": "operators"}]
    model = NativeModel(tmp_path / "head.gguf")
    for options in kinds:
        memory = model.memory(n_ctx=8192, n_rows=512, **options)
        assert 500e6 < memory.compute + memory.logits < 4e9
