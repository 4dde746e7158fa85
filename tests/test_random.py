"""Philox4x32-10 and the draws made from it: which bits of which counter become which id or u.

The generator is written here once more in numpy, checked against the known answers that its authors publish
(Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the file kat_vectors of their
library Random123), and the engine's draws are then checked against it bit by bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiffgguf._binding import functions

Words = npt.NDArray[np.uint32]

CANVAS, UNIFORM, RENOISE = 0, 1, 2  # the streams

SEEDS = [0, 1, 7, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63, 2**64 - 1]


def philox4x32(counter: npt.ArrayLike, key: npt.ArrayLike, rounds: int = 10) -> Words:
    """counter: uint32 [..., 4], key: uint32 [..., 2] -> uint32 [..., 4]."""
    c = np.asarray(counter, dtype=np.uint32).astype(np.uint64)
    k = np.asarray(key, dtype=np.uint32)
    c0, c1, c2, c3 = (c[..., i] for i in range(4))
    k0, k1 = k[..., 0].astype(np.uint64), k[..., 1].astype(np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(rounds):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def words(seed: int, stream: int, canvas: int, step: int, n_rows: int) -> Words:
    """The four words of each row: key = the seed's low and high half, counter = (row, step, canvas, stream)."""
    counter = np.array([[row, step, canvas, stream] for row in range(n_rows)], dtype=np.uint32)
    return philox4x32(counter, [seed & 0xFFFFFFFF, seed >> 32])


def ids(w: Words, n_vocab: int) -> npt.NDArray[np.int32]:
    """The high word of the first word times V."""
    return ((w[:, 0].astype(np.uint64) * np.uint64(n_vocab)) >> np.uint64(32)).astype(np.int32)


def uniforms(w: Words) -> npt.NDArray[np.float64]:
    """53 bits: 27 of the first word, 26 of the second."""
    high, low = (w[:, 0] >> np.uint32(5)).astype(np.float64), (w[:, 1] >> np.uint32(6)).astype(np.float64)
    return (high * 2.0**26 + low) / 2.0**53


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_numpy_philox_gives_the_published_known_answers(
    counter: list[int], key: list[int], expected: list[int]
) -> None:
    """The three vectors for philox4x32-10 in Random123: all zeros, all ones, the digits of pi."""
    assert philox4x32(counter, key).tolist() == expected


def test_engine_gives_the_published_known_answer() -> None:
    """Seed 0, canvas 0, row 0 of stream 0 is the all-zero vector: id = 0x6627e8d5 * V >> 32."""
    assert functions.noise_canvas(0, 0, 1, 262144)[0] == (0x6627E8D5 * 262144) >> 32
    assert words(0, CANVAS, 0, 0, 1)[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("canvas", [0, 1, 5, 2**32 - 1])
def test_draws_are_a_pure_function_of_seed_canvas_step_row(seed: int, canvas: int) -> None:
    """Every draw equals the numpy generator at its own counter; the first canvas stands at step 0."""
    n_rows, n_vocab = 24, 509
    got = functions.noise_canvas(seed, canvas, n_rows, n_vocab)
    assert got.dtype == np.int32 and got.shape == (n_rows,)
    assert np.array_equal(got, ids(words(seed, CANVAS, canvas, 0, n_rows), n_vocab))
    for step in (0, 1, 47, 2**32 - 1):
        u = functions.noise_uniform(seed, canvas, step, n_rows)
        assert u.dtype == np.float64 and u.shape == (n_rows,)
        assert np.array_equal(u, uniforms(words(seed, UNIFORM, canvas, step, n_rows)))
        renoise = functions.noise_renoise(seed, canvas, step, n_rows, n_vocab)
        assert renoise.dtype == np.int32 and renoise.shape == (n_rows,)
        assert np.array_equal(renoise, ids(words(seed, RENOISE, canvas, step, n_rows), n_vocab))


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    canvas=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**32 - 1),
    n_rows=st.integers(1, 300),
    n_vocab=st.integers(1, 2**31 - 1),
)
def test_draws_equal_numpy_for_any_arguments(seed: int, canvas: int, step: int, n_rows: int, n_vocab: int) -> None:
    """Also at vocabularies that do not divide 2^32, and at the largest an int32 can name."""
    expected = words(seed, RENOISE, canvas, step, n_rows)
    assert np.array_equal(functions.noise_renoise(seed, canvas, step, n_rows, n_vocab), ids(expected, n_vocab))
    expected = words(seed, UNIFORM, canvas, step, n_rows)
    assert np.array_equal(functions.noise_uniform(seed, canvas, step, n_rows), uniforms(expected))
    expected = words(seed, CANVAS, canvas, 0, n_rows)
    assert np.array_equal(functions.noise_canvas(seed, canvas, n_rows, n_vocab), ids(expected, n_vocab))


def test_a_row_does_not_depend_on_how_many_rows_are_asked_for() -> None:
    """Batch and canvas length never change a row's draw."""
    few, many = functions.noise_uniform(3, 1, 4, 10), functions.noise_uniform(3, 1, 4, 256)
    assert np.array_equal(few, many[:10])
    assert np.array_equal(functions.noise_canvas(3, 1, 10, 99), functions.noise_canvas(3, 1, 256, 99)[:10])


def test_streams_steps_canvases_and_seed_halves_are_apart() -> None:
    """No two of the draws that one generation uses are the same; the seed's high half counts."""
    rows, vocab = 64, 2**31 - 1
    draws = [functions.noise_canvas(9, c, rows, vocab) for c in range(3)]
    draws += [functions.noise_renoise(9, c, s, rows, vocab) for c in range(3) for s in range(3)]
    draws += [functions.noise_renoise(9 + 2**32, 0, 0, rows, vocab)]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


def test_ids_and_uniforms_are_uniform() -> None:
    """A million draws in 256 cells: chi-squared within six standard deviations of its mean, for ids and for u."""
    n_rows, n_vocab, steps = 4096, 256, 256
    id_counts = np.zeros(n_vocab)
    u_counts = np.zeros(256)
    for step in range(steps):
        drawn = functions.noise_renoise(12345, 0, step, n_rows, n_vocab)
        assert drawn.min() >= 0 and drawn.max() < n_vocab
        id_counts += np.bincount(drawn, minlength=n_vocab)
        u = functions.noise_uniform(12345, 0, step, n_rows)
        assert u.min() >= 0.0 and u.max() < 1.0
        u_counts += np.bincount((u * 256).astype(int), minlength=256)
    for counts in (id_counts, u_counts):
        expected = n_rows * steps / 256
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi2 - 255) < 6 * np.sqrt(2 * 255)
