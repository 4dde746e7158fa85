"""Spans written anew, and the probabilities of given options."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pydiffgguf import ContextOverflowError, DiffusionModel, demo_model_path
from pydiffgguf._binding.functions import noise_canvas
from pydiffgguf.edit import _renoised

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[DiffusionModel]:
    with DiffusionModel(tiny_gguf, n_ctx=512, type_kv="f32", n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def demo() -> Iterator[DiffusionModel]:
    with DiffusionModel(demo_model_path(), type_kv="f32", n_threads=1) as model:
        yield model


# ---------------------------------------------------------------------------------------------------------------- edit


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT, data=st.data())
def test_text_outside_of_the_spans_stays_as_it_is(model: DiffusionModel, text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), min_size=2, max_size=4)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    result = model.edit(text, spans, steps=2, seed=3)
    at, expected = 0, ""
    for (start, end), new in zip(spans, result.spans, strict=True):
        expected += text[at:start] + new
        at = end
    assert result.text == expected + text[at:]


def test_the_demo_model_mends_a_word(demo: DiffusionModel) -> None:
    """The wrong colour contradicts the rest of the story, whether it starts from noise or as it stands."""
    text = "On Sunday Emma found a red cup in the school. Emma gave the white cup to Mia. Mia took the cup home"
    at = text.index("red")
    result = demo.edit(text, [(at - 1, at + 3)])
    assert result.spans == [" white"] and result.finish_reason == "stop" and len(result.stats.steps) == 1


def test_spans_on_several_canvases(model: DiffusionModel) -> None:
    text = "word and more words. " * 12
    result = model.edit(text, [(0, 4), (100, 110), (200, 204)], steps=2)
    assert len(result.stats.steps) > 1 and len(result.spans) == 3
    assert result.text[len(result.spans[0]) :].startswith(text[4:100])


def test_an_edit_goes_by_the_seed_and_the_rows_it_keeps(model: DiffusionModel) -> None:
    """One step from the present tokens of all rows but one, against the same canvas at the low level."""
    text, span = "(1 + 2) * 3", (1, 6)
    result = model.edit(text, [span], strength=0.01, seed=4, steps=1)
    assert result.text == model.edit(text, [span], strength=0.01, seed=4, steps=1).text
    before, inside, behind = (model.tokenize(part, special=False) for part in (text[:1], text[1:6], text[6:]))
    ids = np.array([*inside, *behind], dtype=np.int32)
    free = np.arange(len(ids)) < len(inside)
    with model.session() as session:
        session.encode([2, *before])
        start = _renoised(ids, free, 0.01, 4, 0, 512)
        pinned = np.where(free, -1, ids)
        canvas = session.run_canvas(seed=4, steps=1, n_rows=len(ids), canvas=start, pinned=pinned)
    assert np.count_nonzero(start != ids) <= 1
    assert result.spans == [model.tokenizer.decode(canvas.tokens[free].tolist(), skip_special=True)]


def test_strength_is_the_share_of_rows_that_start_as_noise() -> None:
    ids = np.arange(100, 140, dtype=np.int32)
    free = np.zeros(40, dtype=bool)
    free[10:30] = True
    noise = noise_canvas(7, 1, 40, 512)
    seen: set[int] = set()
    for share, n in ((1.0, 20), (0.5, 10), (0.01, 1)):
        start = _renoised(ids, free, share, 7, 1, 512)
        changed = np.flatnonzero(start != ids)
        assert set(changed) <= set(range(10, 30))
        assert np.array_equal(start[changed], noise[changed])
        assert len(changed) in (n, n - 1)  # a random id may be the row's own
        assert not seen or set(changed) <= seen, "a smaller share takes rows of the larger one"
        seen = set(changed)
        assert np.array_equal(start, _renoised(ids, free, share, 7, 1, 512))


@pytest.mark.parametrize(
    ("spans", "changes", "error", "message"),
    [
        ([], {}, ValueError, "spans is empty"),
        ([(2, 2)], {}, ValueError, "its start must be before its end"),
        ([(0, 3), (2, 5)], {}, ValueError, "two spans overlap: one ends at 3, the next begins at 2"),
        ([(0, 99)], {}, ValueError, r"the end of spans\[0\] is 99: it must be from 0 to 11"),
        ([(-1, 2)], {}, ValueError, r"the start of spans\[0\] is -1"),
        ([3], {}, TypeError, r"spans\[0\] must be a pair"),
        (3, {}, TypeError, r"spans must be a list of pairs \(start, end\), not int"),
        ([(0, 3)], {"strength": 0}, ValueError, r"strength is 0.0: it must be in \(0, 1\]"),
        ([(0, 3)], {"strength": 1.5}, ValueError, "strength is 1.5"),
        ([(0, 3)], {"stepz": 1}, TypeError, "unknown option 'stepz'"),
    ],
)
def test_spans_that_cannot_be_edited_say_why(
    model: DiffusionModel, spans: Any, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.edit("hello world", spans, **changes)


def test_a_span_longer_than_a_canvas_takes_several(model: DiffusionModel) -> None:
    text = "many words " * 12
    result = model.edit(text, [(0, 110)], steps=2)
    assert len(result.stats.steps) == -(-len(model.tokenize(text[:110], special=False)) // 32) > 2
    assert result.text == result.spans[0] + text[110:]


def test_a_time_limit_leaves_the_rest_as_it_was(model: DiffusionModel) -> None:
    text = "many words " * 12
    result = model.edit(text, [(0, 4), (100, 110)], time_limit_s=1e-6)
    assert result.finish_reason == "length" and len(result.stats.steps) == 1
    assert result.text == result.spans[0] + text[4:]


def test_text_that_n_ctx_has_no_room_for_is_counted(model: DiffusionModel) -> None:
    """An edit leaves the text's beginning out, and says so; probabilities would be of another text than was asked."""
    text = "many words " * 100
    assert model.edit("words words", [(0, 5)], steps=1).dropped_tokens == 0
    result = model.edit(text, [(len(text) - 6, len(text))], steps=1)
    before = len(model.tokenize(text[:-6], special=False))
    assert result.dropped_tokens == 1 + before - (model.n_ctx - 32) > 0
    assert result.text == text[:-6] + result.spans[0]
    with pytest.raises(ContextOverflowError, match=r"before the first slot has .* tokens, but n_ctx 512 leaves room"):
        model.choose(text + "<x/>", {"x": ["a", "b"]})


# -------------------------------------------------------------------------------------------------------------- choose


def test_a_one_token_option_has_the_softmax_of_its_row(model: DiffusionModel) -> None:
    """One draw, one slot: log-softmax of a first denoise step, over the options."""
    options = ["a", "b", "\n"]
    ids = [model.tokenize(option, special=False) for option in options]
    assert all(len(i) == 1 for i in ids)
    chosen = model.choose("x = <answer/> + y", {"answer": options}, draws=1, seed=5)["answer"]
    tail = model.tokenize(" + y", special=False)
    canvas = noise_canvas(5, 0, 1 + len(tail), 512)
    canvas[1:] = tail
    with model.session() as session:
        session.encode([2, *model.tokenize("x = ", special=False)])
        row = session.denoise(canvas, n_rows=len(canvas))[0].astype(np.float64)
    weights = np.exp([row[i[0]] - row.max() for i in ids])
    assert list(chosen) == options
    np.testing.assert_allclose(list(chosen.values()), weights / weights.sum(), rtol=1e-5)


def test_draws_are_averaged_as_probabilities(model: DiffusionModel) -> None:
    """Two slots: for one the other is noise, as long as its first option; the draws' probabilities are averaged."""
    template, slots = "x<a/>(<b/>)", {"b": [".", ":"], "a": ["0", "1", "2"]}
    chosen = model.choose(template, slots, draws=3, seed=9)
    assert list(chosen) == ["a", "b"] and [list(chosen[name]) for name in "ab"] == [slots["a"], slots["b"]]
    between, behind = model.tokenize("(", special=False), model.tokenize(")", special=False)
    rows = {"a": 0, "b": 1 + len(between)}
    with model.session() as session:
        session.encode([2, *model.tokenize("x", special=False)])
        for name, row in rows.items():
            ids = [model.tokenize(option, special=False)[0] for option in slots[name]]
            mean = np.zeros(len(ids))
            for draw in range(3):
                canvas = noise_canvas(9, draw, 2 + len(between) + len(behind), 512)
                canvas[1 : 1 + len(between)], canvas[2 + len(between) :] = between, behind
                z = session.denoise(canvas, n_rows=len(canvas))[row].astype(np.float64)
                mean += np.exp(z[ids] - np.log(np.exp(z).sum()))
            np.testing.assert_allclose(list(chosen[name].values()), mean / mean.sum(), rtol=1e-4)


def test_the_demo_model_knows_the_answer(demo: DiffusionModel) -> None:
    text = "On Sunday Emma found a white<what/> in the school. Emma gave the white cup to<who/>. Mia took the cup home"
    chosen = demo.choose(text + " that Sunday", {"what": [" cup", " hat"], "who": [" Mia", " Finn", " Ben"]})
    assert list(chosen) == ["what", "who"]
    for slot, best in (("what", " cup"), ("who", " Mia")):
        assert sum(chosen[slot].values()) == pytest.approx(1.0)
        assert chosen[slot][best] > 0.9
    assert chosen == demo.choose(text + " that Sunday", {"what": [" cup", " hat"], "who": [" Mia", " Finn", " Ben"]})


def test_options_of_several_lengths_and_many_canvases(model: DiffusionModel) -> None:
    options = ["a", "two words", "three more words"]
    chosen = model.choose("q: <x/>!", {"x": options}, draws=9)["x"]
    assert list(chosen) == options and sum(chosen.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("template", "slots", "error", "message"),
    [
        ("a", {}, ValueError, "slots is empty"),
        ("a", ["x"], TypeError, "slots must be a dict"),
        ("a", {"x": ["b"]}, ValueError, r"slot 'x': the template must hold <x/> once, but holds it 0 times"),
        ("<x/><x/>", {"x": ["b"]}, ValueError, "holds it 2 times"),
        ("<x/>", {"x": []}, ValueError, "slot 'x' has no options"),
        ("<x/>", {"x": ["a", "a"]}, ValueError, "the same option twice"),
        ("<x/>", {"x": "ab"}, TypeError, "the options of slot 'x' must be a list of strings"),
        ("<x/>", {"x y": ["a"]}, ValueError, "a name must be an identifier"),
    ],
)
def test_slots_that_cannot_be_asked_say_why(
    model: DiffusionModel, template: str, slots: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.choose(template, slots)


def test_a_template_longer_than_a_canvas_is_refused(model: DiffusionModel) -> None:
    with pytest.raises(ContextOverflowError, match=r"to the end of slot number 2 takes \d+ tokens"):
        model.choose("<x/>" + " word" * 60 + "<y/>", {"x": ["a"], "y": ["b"]})
