"""What a model wrote, read from its tokens: thoughts, answer, tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pydiffgguf import DiffusionModel, demo_model_path
from pydiffgguf.text.calls import parse_calls
from pydiffgguf.text.tokenizer import Tokenizer
from pydiffgguf.text.turn import TextView

ROWS = json.loads((Path(__file__).parent / "data" / "turns.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Tokenizer]:
    with DiffusionModel(demo_model_path()) as model:
        yield model.tokenizer


def ids_of(pieces: list[Any], tokenizer: Tokenizer) -> list[int]:
    """Pieces of a table: markup is tokens, but text where it is in {"text": ...}."""
    ids = []
    for piece in pieces:
        ids += tokenizer.encode(piece) if isinstance(piece, str) else tokenizer.encode(piece["text"], special=False)
    return ids


@pytest.mark.parametrize("row", ROWS, ids=[row["what"] for row in ROWS])
def test_the_table_of_turns(row: dict[str, Any], tokenizer: Tokenizer) -> None:
    """What each list of tokens says."""
    turn = TextView(tokenizer).read(ids_of(row["tokens"], tokenizer))
    assert turn.text == row["text"]
    assert turn.reasoning == row.get("reasoning", "")
    assert [[call.name, call.arguments] for call in turn.calls] == row.get("calls", [])


def test_the_table_is_long_enough() -> None:
    assert len(ROWS) >= 60
    assert len({row["what"] for row in ROWS}) == len(ROWS)


TOKENS = ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "thought", "\n", "a", "call:f{a:", "}"]


@given(st.lists(st.sampled_from(TOKENS), max_size=12))
def test_no_thought_reaches_the_answer(tokenizer: Tokenizer, pieces: list[str]) -> None:
    """Whatever order the markers come in, a thought that was not closed stays out of the text."""
    ids = ids_of([*pieces, "<|channel>thought\nsecret"], tokenizer)
    for ended in (False, True):
        turn = TextView(tokenizer).read(ids, ended=ended)
        assert "secret" not in turn.text
        assert "secret" in turn.reasoning


@given(st.lists(st.sampled_from(TOKENS[:5]), max_size=8), st.text("ab {}:,", max_size=5))
def test_markers_as_text_are_text(tokenizer: Tokenizer, markers: list[str], between: str) -> None:
    """Ordinary tokens are never structure, whatever they spell."""
    text = "x" + between.join(markers)
    turn = TextView(tokenizer).read(tokenizer.encode(text, special=False))
    assert (turn.text, turn.reasoning, turn.calls) == (text, "", [])


def test_a_thought_that_the_prompt_opened(tokenizer: Tokenizer) -> None:
    """The answer's tokens go on with it, and its own tokens alone are counted."""
    prompt = tokenizer.encode("<|turn>model\n<|channel>thought\n")
    answer = tokenizer.encode("Hm.\n<channel|>Blue.")
    view = TextView(tokenizer).behind(prompt)
    turn = view.read(answer)
    assert (turn.text, turn.reasoning) == ("Blue.", "Hm.")
    assert turn.n_thought == answer.index(tokenizer.token_id("<channel|>")) + 1
    assert view.read(answer[:2], ended=False).thinks
    closed = tokenizer.encode("<|channel>thought\n<channel|>")
    assert TextView(tokenizer).behind(closed).read(answer[:2]).text == "Hm"
    assert view.behind(closed).read(answer[:2]).text == "Hm"


def test_what_may_still_be_closed_is_held_back(tokenizer: Tokenizer) -> None:
    """While tokens come, a stream shows nothing that it would have to take back."""
    whole = ids_of(["thought\nHm.", "<channel|>", "So: ", "<|tool_call>", "call:f{}", "<tool_call|>", "ok"], tokenizer)
    view = TextView(tokenizer)
    texts = [view.read(whole[:n], ended=False).text for n in range(len(whole) + 1)]
    assert texts[-1] == view.read(whole).text == "So: ok"
    assert all(texts[-1].startswith(text) for text in texts[9:])
    assert not any("call" in text for text in texts)


def test_thoughts_are_cut_at_their_limit(tokenizer: Tokenizer) -> None:
    """Counted with their markers; closed ones within the limit stay."""
    view = TextView(tokenizer)
    ids = ids_of(["<|channel>", "thought\na b c d e f", "<channel|>", "Yes"], tokenizer)
    n = view.read(ids).n_thought
    assert view.thought_limit(ids, n) is None
    for limit in range(1, n):
        assert view.thought_limit(ids, limit) == limit
    assert view.thought_limit(ids[: n - 1], n - 1) == n - 1
    assert view.thought_limit(tokenizer.encode("Yes, it is."), 1) is None


@given(st.lists(st.text("cal:f{}[],\"'0-1.eNul x\n", max_size=12), min_size=1, max_size=5))
def test_any_text_between_call_markers_is_a_call_or_text(quoted: list[str]) -> None:
    """Nothing that a model writes raises."""
    parse_calls(["call:f{" + quoted[0], *quoted[1:]])


def test_nesting_has_a_limit() -> None:
    assert parse_calls(["call:f{a:" + "[" * 60 + "]" * 60 + "}"])
    assert parse_calls(["call:f{a:" + "[" * 100_000]) is None
