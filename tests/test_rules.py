"""Pins and masks that change between the steps of a canvas, on every sampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from pydiffgguf import CanvasBatch, CanvasSpec, DiffusionModel, Session, demo_model_path
from pydiffgguf._binding.records import RawStep


@pytest.fixture(scope="module")
def model() -> Iterator[DiffusionModel]:
    with DiffusionModel(demo_model_path()) as model:
        yield model


@pytest.fixture(scope="module", params=["host", "operators"])
def session(request: pytest.FixtureRequest, model: DiffusionModel) -> Iterator[Session]:
    with model.session(sampler=request.param, n_rows=2 * model.config.canvas_length) as session:
        session.encode(model.chat_tokens([{"role": "user", "content": "Compare 3 and 5."}]))
        yield session


def mask_of(session: Session, ids: Sequence[int]) -> npt.NDArray[np.uint32]:
    bits = np.zeros(-(-session.config.n_vocab // 32) * 32, dtype=np.bool_)
    bits[list(ids)] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


def pins(session: Session, **rows: int) -> npt.NDArray[np.int32]:
    made = np.full(session.config.canvas_length, -1, dtype=np.int32)
    for row, id_ in rows.items():
        made[int(row[1:])] = id_
    return made


def assert_same(a: RawStep, b: RawStep) -> None:
    for name in ("argmax", "canvas", "accepted", "entropy"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def steps_of(session: Session, n: int = 6, spec: CanvasSpec | None = None) -> CanvasBatch:
    return CanvasBatch(session, [spec or CanvasSpec(seed=1)], replace(session._defaults, steps=n))


def run(batch: CanvasBatch) -> list[RawStep]:
    steps = []
    while not batch.finished:
        steps += batch.step()
    return steps


def test_rules_before_the_first_step_are_those_of_the_spec(session: Session) -> None:
    """Bit for bit: pins and masks given later are pins and allowed ids given at once."""
    pinned, ids = pins(session, r3=77), [300, 400, 12]
    expected = run(steps_of(session, 4, CanvasSpec(seed=1, pinned=pinned, allowed={5: ids, 6: ids})))
    batch = steps_of(session, 4)
    mask = mask_of(session, ids)
    batch.rules(0, pinned, {5: mask, 6: mask})
    for a, b in zip(expected, run(batch), strict=True):
        assert_same(a, b)


def test_rules_that_change_nothing_change_nothing(session: Session) -> None:
    """Except when the canvas is stable, which is counted anew."""
    expected = run(steps_of(session))
    batch = steps_of(session)
    steps = batch.step()
    batch.rules(0, None, {})
    for a, b in zip(expected, [*steps, *run(batch)], strict=False):
        assert_same(a, b)


def test_masks_hold_from_the_next_step_on(session: Session) -> None:
    """Nothing else is ever drawn or the argmax; a row that was masked may be free again; a pin is there at once."""
    ids = [300, 400]
    mask = mask_of(session, ids)
    for seed in range(4):
        batch = steps_of(session, 5, CanvasSpec(seed=seed))
        batch.step()
        batch.rules(0, pins(session, r0=77), {2: mask, 63: mask})
        held = batch.rows(0)
        assert held.canvas[0] == held.argmax[0] == 77
        for _ in range(2):
            if batch.finished:
                break
            [step] = batch.step()
            assert step.canvas[0] == step.argmax[0] == 77
            assert {int(step.argmax[2]), int(step.argmax[63])} <= set(ids)
            assert all(step.canvas[row] in ids for row in (2, 63) if step.accepted[row])
    batch = steps_of(session, 5)
    batch.rules(0, None, {2: mask})
    batch.step()
    batch.rules(0, None, {})
    free = batch.step()[0]
    assert free.entropy[2] != 0 or free.argmax[2] not in ids


def test_a_converged_canvas_goes_on(session: Session) -> None:
    """With its step count, while it has steps; not beyond them."""
    batch = CanvasBatch(session, [CanvasSpec(seed=1)], session._defaults)
    while not batch.finished:
        [step] = batch.step()
    assert step.converged and step.step + 1 < step.steps
    row = int(np.flatnonzero(step.argmax != 300)[0])
    batch.rules(0, None, {row: mask_of(session, [300])})
    [further] = batch.step()
    assert further.step == step.step + 1 and further.argmax[row] == 300
    short = steps_of(session, 1)
    short.step()
    if not short.rows(0).converged:
        with pytest.raises(ValueError, match="canvas 0 makes no further step"):
            short.rules(0, None, {})


def test_canvases_side_by_side_have_rules_of_their_own(session: Session) -> None:
    specs = [CanvasSpec(seed=1), CanvasSpec(seed=2)]
    alone = CanvasBatch(session, specs, replace(session._defaults, steps=3, confidence_threshold=0.0))
    expected = alone.step()[0]
    batch = CanvasBatch(session, specs, replace(session._defaults, steps=3, confidence_threshold=0.0))
    batch.rules(1, pins(session, r1=77), {})
    one, other = batch.step()
    assert_same(expected, one)
    assert other.argmax[1] == 77


def test_wrong_rules_change_nothing(session: Session) -> None:
    """An empty mask, a pin outside of its mask, a mask of another size, a canvas that is not there."""
    plain_step = steps_of(session).step()[0]
    batch = steps_of(session)
    with pytest.raises(ValueError, match="the mask of row 2 is empty"):
        batch.rules(0, None, {2: mask_of(session, [])})
    with pytest.raises(ValueError, match="row 2 is pinned to 77, which its mask leaves out"):
        batch.rules(0, pins(session, r2=77), {2: mask_of(session, [5])})
    with pytest.raises(ValueError, match=r"masks\[2\] has shape \[3\]"):
        batch.rules(0, None, {2: np.zeros(3, dtype=np.uint32)})
    with pytest.raises(ValueError, match=r"a row of masks is 64: it must be from 0 to 63"):
        batch.rules(0, None, {64: mask_of(session, [5])})
    with pytest.raises(ValueError, match=r"pinned\[0\] is 896"):
        batch.rules(0, pins(session, r0=896), {})
    with pytest.raises(ValueError, match="canvas 7 is not under way"):
        batch._session.canvas_rules(7, 64, None, {})
    assert_same(plain_step, batch.step()[0])
