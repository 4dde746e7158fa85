"""Many gaps in one text: what markers say, and that nothing between them changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pydiffgguf import DenoiseStep, DiffusionModel, demo_model_path
from pydiffgguf.infill import parse_template

LITERAL = st.text(st.characters(codec="utf-8"), min_size=1, max_size=25).filter(lambda text: "<gap" not in text)


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[DiffusionModel]:
    with DiffusionModel(tiny_gguf, n_ctx=512, n_threads=1) as model:
        yield model


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(LITERAL, min_size=2, max_size=4), length=st.integers(1, 3), mode=st.sampled_from(["raw", "chat"]))
def test_text_between_gaps_stays_as_it_is(model: DiffusionModel, parts: list[str], length: int, mode: str) -> None:
    result = model.fill(f"<gap len={length}/>".join(parts), steps=2, mode=mode)
    assert len(result.gaps) == len(parts) - 1 and result.finish_reason == "stop"
    expected = parts[0] + "".join(gap.text + part for gap, part in zip(result.gaps, parts[1:], strict=True))
    assert result.text == expected
    assert all(gap.gap_tokens == length for gap in result.gaps)


def test_the_demo_model_fills_two_gaps() -> None:
    """Each filled word stands elsewhere in the text, before or behind its gap."""
    text = "On Sunday Emma found a<gap max=4/> in the school. Emma gave the white cup to<gap/>. Mia took the cup home"
    with DiffusionModel(demo_model_path(), n_threads=1) as demo:
        result = demo.fill(text + " that Sunday and never went back to the school.", max_gap=8)
    assert [gap.text for gap in result.gaps] == [" white cup", " Mia"]


def test_text_that_only_looks_like_a_marker_is_text(model: DiffusionModel) -> None:
    result = model.fill("a < b <gapped/> <gap> </gap><gap len=1/>/> <gap", steps=1)
    assert result.text == f"a < b <gapped/> <gap> </gap>{result.gaps[0].text}/> <gap"


def test_a_time_limit_fills_all_gaps(model: DiffusionModel) -> None:
    result = model.fill("a<gap len=3/>b<gap/>c", time_limit_s=1e-6)
    assert result.finish_reason == "length" and len(result.gaps) == 2
    assert result.text == f"a{result.gaps[0].text}b{result.gaps[1].text}c"


def test_a_cancel_leaves_the_other_markers_in_the_text(model: DiffusionModel) -> None:
    stream = model.stream_fill("a<gap len=3/>b<gap len=2/>c", steps=3, mode="raw", confidence_threshold=0.0)
    for event in stream:
        if isinstance(event, DenoiseStep) and event.pinned is not None and (~event.pinned).sum() == 2:
            model.cancel()
    result = stream.result
    assert result.finish_reason == "cancelled" and len(result.gaps) == 1
    assert result.text == f"a{result.gaps[0].text}b<gap len=2/>c"


def test_markers_say_their_lengths() -> None:
    one, two, three, four = parse_template("a<gap/>b<gap max=8/>c<gap min=2  max=5 />d<gap len=3/>e", 1, 20)
    assert (one.gap, one.min_gap, one.max_gap) == ("auto", 1, 20)
    assert (two.gap, two.min_gap, two.max_gap) == ("auto", 1, 8)
    assert (three.gap, three.min_gap, three.max_gap) == ("auto", 2, 5)
    assert (four.gap, four.nominal) == (3, 3)
    assert "a<gap/>b"[one.start : one.end] == "<gap/>"


def test_a_text_may_hold_a_marker_of_its_own(model: DiffusionModel) -> None:
    """With a backslash before it; one with a backslash already takes another."""
    result = model.fill(r"<\gap/> is <gap len=2/>, not <\\gap max=x/> and <gap len=1/>.", steps=2, mode="raw")
    first, second = (gap.text for gap in result.gaps)
    assert result.text == rf"<gap/> is {first}, not <\gap max=x/> and {second}."


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no gap here", "the template has no gap: mark it with <gap/>"),
        ("a<gap mx=3/>b", "unknown attribute 'mx'; there are min, max and len"),
        ("a<gap 3/>b", "'3' is no attribute; write <gap/>"),
        ("a<gap max=x/>b", "max is 'x': it must be a number of tokens"),
        ("a<gap len=0/>b", "len of <gap len=0/> is 0: it must be from 1"),
        ("a<gap min=9 max=3/>b", "min is 9: it must be at most max, 3"),
        ("a<gap/><gap/>b", "two gaps are side by side"),
        ("a<gap len=3 max=5/>b", "<gap len=3 max=5/>: len says how long the gap is; leave out min and max"),
        ("a<gap max=3 max=5/>b", "max is given twice"),
        ("a<\\gap/>b", "the template has no gap"),
    ],
)
def test_a_template_that_cannot_be_filled_says_why(model: DiffusionModel, template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        model.fill(template)
    with pytest.raises(TypeError, match="template must be a str"):
        model.fill(3)  # type: ignore[arg-type]
