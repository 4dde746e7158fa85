"""Canvases side by side: each has the numbers that it has alone, whatever its neighbours do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from canvas_batches import own_steps
from places import Place

from pydiffgguf import ContextOverflowError, DiffusionModel, Session
from pydiffgguf._binding import functions
from pydiffgguf._binding.records import RawStep, Sampling
from pydiffgguf.session import CanvasBatch, CanvasSpec

PROMPT = [2, 40, 41, 42, 43, 60, 61]
ROWS = 128  # four canvases of the tiny net


@pytest.fixture(scope="module")
def model(tiny_gguf: Path, place: Place) -> Iterator[DiffusionModel]:
    with place.open(tiny_gguf, n_ctx=512, type_kv="f32", n_threads=2) as model:
        yield model


@pytest.fixture(params=[len(PROMPT), 100], ids=["short prefix", "prefix beyond the window"])
def session(model: DiffusionModel, request: pytest.FixtureRequest) -> Iterator[Session]:
    with model.session(n_rows=ROWS) as session:
        session.encode((PROMPT * 20)[: request.param])
        yield session


@pytest.fixture
def rounding(place: Place) -> float:
    """How far apart, relatively, a canvas's numbers may be alone and in company. A GPU takes other kernels for other
    numbers of rows, which sum in another order: measured 2e-6 on Vulkan. A CPU does not."""
    return 1e-5 if place.may_be_a_gpu else 0.0


def some_specs(restricted: bool = True) -> list[CanvasSpec]:
    """Canvases of several lengths with pins, watched ids, restricted rows (on one of them) and seeds of their own."""
    allowed = {0: [5, 6, 7], 19: [400]} if restricted else None
    return [
        CanvasSpec(seed=1),
        CanvasSpec(n_rows=9, pinned=[-1, -1, 7, -1, 8, 8, 8, -1, -1], seed=2, watched=[-1] * 9),
        CanvasSpec(n_rows=20, allowed=allowed, seed=3, canvas_index=4),
        CanvasSpec(n_rows=2, seed=4, watched=[77, 78]),
        CanvasSpec(n_rows=31, canvas=[9] * 31, seed=5),
    ]


def other_sampler(session: Session, specs: Sequence[CanvasSpec]) -> float:
    """How far apart, relatively, a canvas's sums may be alone and among these. The operators know no restricted rows: a
    canvas that has some takes the logits of its whole batch to the CPU, where the C++ sampler sums in double precision
    what the operators sum in single. Measured 4e-7."""
    return 1e-6 if session.sampler == "operators" and any(spec.allowed for spec in specs) else 0.0


def assert_equal(a: RawStep, b: RawStep, rtol: float = 0.0) -> None:
    """To the bit; but entropies and log-probabilities within rtol."""
    for name in RawStep.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        if x is not None and name in ("entropy", "mean_entropy", "logprob"):
            np.testing.assert_allclose(x, y, rtol=rtol, err_msg=name)
        else:
            np.testing.assert_array_equal(x, y, err_msg=name)


def easily_confident(session: Session) -> Sampling:
    """Random nets stay unsure. With this, half of the canvases stop early and leave gaps between those that go on."""
    endless = replace(session._defaults, steps=12, confidence_threshold=0.0, stability_threshold=0)
    third = sorted(steps[2].mean_entropy for steps in own_steps(session, some_specs(), endless))
    return replace(endless, confidence_threshold=(third[2] + third[3]) / 2)  # so that rounding decides nothing


@pytest.mark.parametrize("restricted", [False, True], ids=["free", "one restricted"])
def test_each_canvas_has_the_numbers_it_has_alone(session: Session, restricted: bool, rounding: float) -> None:
    """Ids, entropies and log-probabilities to the bit, on CPUs, also after neighbours have stopped."""
    sampling, specs = easily_confident(session), some_specs(restricted)
    together = own_steps(session, specs, sampling)
    assert len({len(steps) for steps in together}) > 1, "all stopped at once: the test shows nothing"
    for spec, steps in zip(specs, together, strict=True):
        [alone] = own_steps(session, [spec], sampling)
        assert len(alone) == len(steps)
        for a, b in zip(alone, steps, strict=True):
            assert_equal(a, b, max(rounding, other_sampler(session, specs)))


def test_a_dropped_canvas_takes_no_more_steps_and_disturbs_none(session: Session, rounding: float) -> None:
    sampling = replace(session._defaults, steps=6)
    specs = some_specs()
    [expected] = own_steps(session, [specs[4]], sampling)
    batch = CanvasBatch(session, specs, sampling)
    batch.drop(3)  # before its first step
    seen = [batch.step() for _ in range(2)]
    batch.drop(0)
    batch.drop(0)
    while not batch.finished:
        seen.append(batch.step())
    assert [steps[0].step for steps in seen] == [0, 1, 1, 1, 1, 1]
    assert seen[0][3].argmax.shape == (2,)
    for step, steps in zip(expected, seen, strict=True):
        assert_equal(step, steps[4], max(rounding, other_sampler(session, specs)))


def test_the_order_and_the_company_do_not_matter(session: Session) -> None:
    sampling = replace(session._defaults, steps=4)
    forwards, backwards = own_steps(session, some_specs(), sampling), own_steps(session, some_specs()[::-1], sampling)
    for a, b in zip(forwards, backwards[::-1], strict=True):
        assert_equal(a[-1], b[-1])


def test_a_short_canvas_is_the_head_of_no_longer_one(session: Session) -> None:
    """All rows see each other, so a shorter canvas has other logits; its draws are the same."""
    long = session.denoise([5] * 32)
    short = session.denoise([5] * 10, n_rows=10)
    assert short.shape == (10, 512)
    assert np.abs(short - long[:10]).max() > 1e-3


def test_restricted_rows_take_only_what_they_may(session: Session) -> None:
    """Whatever is accepted, and every argmax."""
    batch = CanvasBatch(
        session,
        [CanvasSpec(n_rows=16, allowed={3: [10, 500], 7: [9]}, seed=s) for s in range(8)],
        replace(session._defaults, steps=5),
    )
    seen: set[int] = set()
    while not batch.finished:
        for step in batch.step():
            seen.add(int(step.argmax[3]))
            if step.accepted[3]:
                seen.add(int(step.canvas[3]))
            assert step.canvas[7] == step.argmax[7] == 9
    assert seen == {10, 500}


def test_noise_ignores_what_a_row_may_take(session: Session) -> None:
    """First canvas and renoise are the draws of a canvas without restrictions: noise from a small set looks like an
    answer. A row with one id holds it at once."""
    sets = (None, {3: [10, 500], 7: [9]})
    specs = [CanvasSpec(n_rows=16, seed=s, allowed=allowed) for s in range(4) for allowed in sets]
    batch = CanvasBatch(session, specs, replace(session._defaults, steps=3))
    first = [batch.rows(i).canvas for i in range(len(specs))]
    for free, restricted in zip(first[::2], first[1::2], strict=True):
        assert free[3] == restricted[3]
        assert restricted[7] == 9
    renoised = 0
    for n in range(3):
        for spec, step in zip(specs, batch.step(), strict=True):
            if spec.allowed and not step.accepted[3]:
                assert step.canvas[3] == functions.noise_renoise(spec.seed, 0, n, 16, 512)[3]
                renoised += 1
    assert renoised > 0


def test_watched_ids_report_their_log_probability(session: Session) -> None:
    """Against log-softmax of the same logits, at temperature 1 whatever the step's own is, and before restrictions."""
    canvas = np.arange(32, dtype=np.int32)
    z = session.denoise(canvas).astype(np.float64)
    expected = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
    watched = np.arange(32, dtype=np.int32) * 7
    watched[5] = -1
    pinned = np.full(32, -1, dtype=np.int32)
    pinned[9] = canvas[9]
    spec = CanvasSpec(canvas=canvas, watched=watched, pinned=pinned, allowed={0: [3], 1: [4, 5]})
    first = CanvasBatch(session, [replace(spec, pinned=None, allowed=None)], session._defaults).step()[0]
    assert first.logprob is not None
    wanted = np.array([row[id_] if id_ >= 0 else row.max() for row, id_ in zip(expected, watched, strict=True)])
    # float32 terms in a sum of 512: a few 1e-7 of the sum.
    np.testing.assert_allclose(first.logprob, wanted, atol=2e-6)
    # Rows 0 and 1 start from other ids when they are restricted, so the pass differs; the pinned row reports 0.
    restricted = CanvasBatch(session, [spec], session._defaults).step()[0]
    assert restricted.logprob is not None and restricted.logprob[9] == 0
    assert restricted.logprob[0] < 0


def test_scores_are_those_of_one_token_after_the_other(
    model: DiffusionModel, session: Session, rounding: float
) -> None:
    """Each head of a text scores the same, and nothing is left behind. A shorter text reads fewer cache rows:
    masked ones count for nothing, but the sums over the others are cut elsewhere (measured 2e-7 of the result)."""
    text = [11, 300, 12, 45, 200, 201, 202, 7]
    before = session.denoise([5] * 32)
    held = session.tokens()
    whole, *parts = session.score([text, *(text[:n] for n in range(2, 8)), text[::-1]])
    for n, part in enumerate(parts[:-1], start=2):
        np.testing.assert_allclose(part, whole[:n], rtol=max(rounding, 2e-6))
    [alone] = session.score([text])
    np.testing.assert_allclose(alone, whole, rtol=rounding)
    np.testing.assert_array_equal(session.tokens(), held)
    np.testing.assert_array_equal(session.denoise([5] * 32), before)
    # The chain rule against a longer prefix: what was scored behind it scores the same when half of it is encoded.
    session.encode(text[:4])
    [rest] = session.score([text[4:]])
    np.testing.assert_allclose(rest, whole[4:], atol=1e-5)  # other chunks, other rounding; measured 8e-7


def test_more_texts_than_rows_are_scored_in_turns(session: Session, rounding: float) -> None:
    """One row takes ggml's matrix-vector kernels, whose sums differ in the last bits: measured 4e-7 of the result."""
    texts = [[(i * 37 + k) % 512 for k in range(1 + i % 32)] for i in range(0, 60, 3)]
    assert sum(map(len, texts)) > 2 * ROWS
    together = session.score(texts)
    for text, scores in zip(texts, together, strict=True):
        np.testing.assert_allclose(
            session.score([text])[0], scores, rtol=max(rounding, 1e-6 if len(text) == 1 else 0.0)
        )


def test_as_many_canvases_and_texts_as_there_are_rows(model: DiffusionModel) -> None:
    """Of one row each, the most that a pass can have."""
    with model.session(n_rows=ROWS) as session:
        session.encode(PROMPT)
        steps = CanvasBatch(session, [CanvasSpec(n_rows=1, seed=s) for s in range(ROWS)], session._defaults).step()
        assert len({int(step.canvas[0]) for step in steps}) > 1
        scores = session.score([[id_] for id_ in range(512)])
        assert abs(np.exp(scores).sum() - 1) <= 1e-5


def test_a_canvas_of_one_row_alone_and_in_company(session: Session, rounding: float) -> None:
    """See above: alone, it takes the matrix-vector kernels."""
    spec = CanvasSpec(n_rows=1, seed=4, watched=[77])
    [alone] = CanvasBatch(session, [spec], session._defaults).step()
    [among, _] = CanvasBatch(session, [spec, CanvasSpec()], session._defaults).step()
    assert alone.argmax == among.argmax
    np.testing.assert_allclose(alone.entropy, among.entropy, rtol=max(rounding, 1e-6))
    assert alone.logprob is not None and among.logprob is not None
    np.testing.assert_allclose(alone.logprob, among.logprob, rtol=max(rounding, 1e-6))


def test_what_does_not_fit_is_refused(model: DiffusionModel, session: Session) -> None:
    sampling = session._defaults
    with pytest.raises(
        ValueError, match=r"128.*|the canvases have 160 rows together: this session was made for n_rows"
    ):
        CanvasBatch(session, [CanvasSpec()] * 5, sampling)
    with pytest.raises(ValueError, match="n_canvases is 0"):
        CanvasBatch(session, [], sampling)
    with pytest.raises(ValueError, match=r"n_rows is 33: it must be from 1 to 32"):
        CanvasBatch(session, [CanvasSpec(n_rows=33)], sampling)
    with pytest.raises(ValueError, match=r"pinned has shape \[3\]: it must be \[4\]"):
        CanvasBatch(session, [CanvasSpec(n_rows=4, pinned=[1, 2, 3])], sampling)
    with pytest.raises(ValueError, match=r"watched\[1\] is 512"):
        CanvasBatch(session, [CanvasSpec(n_rows=2, watched=[0, 512])], sampling)
    with pytest.raises(ValueError, match=r"allowed\[2\] is empty"):
        CanvasBatch(session, [CanvasSpec(allowed={2: []})], sampling)
    with pytest.raises(ValueError, match="row 2 is allowed 512"):
        CanvasBatch(session, [CanvasSpec(allowed={2: [512]})], sampling)
    with pytest.raises(ValueError, match=r"a row of allowed is 32"):
        CanvasBatch(session, [CanvasSpec(allowed={32: [1]})], sampling)
    with pytest.raises(ValueError, match="text 1 has 33 tokens: it must have from 1 to the canvas length, 32"):
        session.score([[1], [2] * 33])
    with pytest.raises(ValueError, match="text 0 has 0 tokens"):
        session.score([[]])
    assert session.score([]) == []
    with pytest.raises(ValueError, match="n_rows is 31: it must be from 32"):
        model.session(n_rows=31)
    session.encode([5] * (session.n_ctx - session.n_past - 32))
    session.score([[1] * 32])
    with pytest.raises(ContextOverflowError):
        session.encode([5])


def test_more_rows_take_the_memory_that_was_foretold(model: DiffusionModel) -> None:
    with model.session(n_rows=ROWS) as session:
        assert session.memory == model.memory(n_rows=ROWS)
        assert session.memory.logits == ROWS * 512 * 4
        assert session.memory.compute > model.memory(n_rows=32).compute
