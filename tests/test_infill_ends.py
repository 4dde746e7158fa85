"""Infill where an editor asks: at the end of a text, on an empty line, between line ends of any kind, in long lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from streams import last_session, taken

from pydiffgguf import DiffusionModel, demo_model_path

BEFORE = "On Sunday Emma found a"
BEHIND = " in the school. Emma gave the white cup to Mia."


@pytest.fixture(scope="module")
def demo() -> Iterator[DiffusionModel]:
    with DiffusionModel(demo_model_path(), n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def random(tiny_gguf: Path) -> Iterator[DiffusionModel]:
    """A random net, which seldom ends a text of its own accord; canvas 32."""
    with DiffusionModel(tiny_gguf, n_ctx=512, n_threads=1, type_kv="f32") as model:
        yield model


# ------------------------------------------------------------------------------------------------ the end of a text


def test_a_text_without_a_suffix_goes_on_to_its_end(demo: DiffusionModel) -> None:
    result = demo.infill(BEFORE, "")
    assert result.finish_reason == "stop" and result.text.endswith(".") and len(result.text) > 60
    assert result.gap_tokens == len(demo.tokenize(result.text, special=False))


def test_a_text_ends_with_its_line_or_block(demo: DiffusionModel) -> None:
    head = 'def mul_width_price(width, price):\n    """Multiply width and price."""\n'
    line = demo.infill(head + "    ret", "", until="line")
    assert (line.text, line.finish_reason) == ("urn width * price", "stop")
    block = demo.infill(head, "", until="block")
    assert (block.text, block.finish_reason) == ("    return width * price", "stop")
    whole = demo.infill(head, "")
    assert whole.text.startswith(block.text + "\n")


def test_a_blank_suffix_counts_as_none_where_until_says_so(demo: DiffusionModel) -> None:
    ended = demo.infill(BEFORE, "", until="line")
    assert demo.infill(BEFORE, "\n", until="line").text == ended.text
    with pytest.raises(ValueError, match="until is for the end of a text"):
        demo.infill(BEFORE, BEHIND, until="line")
    with pytest.raises(ValueError, match="until is 'word': it must be 'line', 'block' or 'end'"):
        demo.infill(BEFORE, "", until="word")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="until is 'line', but the gap is to have 3 tokens"):
        demo.infill(BEFORE, "", until="line", gap=3)


def test_an_empty_prefix_and_an_empty_text_are_filled(demo: DiffusionModel) -> None:
    assert demo.infill("", BEHIND).text.endswith("white cup")
    assert demo.infill("", "", until="line").text.strip()


def test_max_gap_ends_what_does_not_end(random: DiffusionModel) -> None:
    """Over several canvases; the prefix is as it was afterwards, and the events count the canvases."""
    stream = random.stream_infill("one two", "", max_gap=80, steps=2, mode="raw")
    events, result = taken(stream)
    assert (result.finish_reason, result.gap_tokens) == ("length", 80)
    assert [event.canvas for event in events] == sorted(event.canvas for event in events)
    assert events[-1].canvas == 2
    assert last_session(random).n_past == result.stats.prompt_tokens
    again = random.infill("one two", "", max_gap=80, steps=2, mode="raw")
    assert (again.text, again.stats.reused_tokens) == (result.text, result.stats.prompt_tokens)


@pytest.mark.parametrize("mode", ["raw", "chat"])
def test_the_context_ends_a_text_too(random: DiffusionModel, mode: Any) -> None:
    with DiffusionModel(random.path, n_ctx=256, n_threads=1) as small:
        result = small.infill("one two", "", max_gap=1000, steps=1, seed=3, mode=mode)
        assert result.finish_reason == "length" and 0 < result.gap_tokens < 256


def test_candidates_of_an_open_end_are_ranked(demo: DiffusionModel) -> None:
    result = demo.infill(BEFORE, "", until="line", n=3)
    texts = [candidate.text for candidate in result.candidates]
    assert 1 < len(texts) <= 3 and len(set(texts)) == len(texts)
    assert all("\n" not in text for text in texts) and result.text == texts[0]


def test_a_cancel_and_a_time_limit_end_an_open_end(random: DiffusionModel) -> None:
    stream = random.stream_infill("one two", "", max_gap=200, steps=1000, confidence_threshold=0.0, mode="raw")
    for event in stream:
        if getattr(event, "step", 0) == 3:
            stream.cancel()
    assert stream.result.finish_reason == "cancelled"
    limited = random.infill("one two", "", max_gap=200, steps=100_000, confidence_threshold=0.0, time_limit_s=0.2)
    assert limited.finish_reason == "length" and limited.text


def test_a_template_may_end_with_a_gap(demo: DiffusionModel) -> None:
    result = demo.fill(BEFORE + "<gap/>")
    assert result.text == BEFORE + demo.infill(BEFORE, "").text and result.finish_reason == "stop"
    assert demo.fill("On Sunday<gap len=2/> found a<gap/>").text.startswith("On Sunday")


# -------------------------------------------------------------------------------------------- lines and their ends


@pytest.mark.parametrize("newline", ["\r\n", "\r"])
def test_line_ends_are_read_as_newlines_and_written_as_they_were(demo: DiffusionModel, newline: str) -> None:
    """The filling of the same text with newlines, with the line ends that are around it."""
    prefix = 'def mul_width_price(width, price):\n    """Multiply width and price."""\n'
    suffix = "\n\nassert mul_width_price(5, 8) == 5 * 8\n"
    plain = demo.infill(prefix + "    ", suffix)
    other = demo.infill((prefix + "    ").replace("\n", newline), suffix.replace("\n", newline))
    assert other.text == plain.text == "return width * price"
    ended, plain_end = (demo.infill(text, "", max_gap=60) for text in (prefix.replace("\n", newline), prefix))
    assert ended.text == plain_end.text.replace("\n", newline) and newline in ended.text
    stream = demo.stream_infill(prefix.replace("\n", newline), "", max_gap=60)
    drafts = [event.text for event in taken(stream)[0]]
    assert any(newline in draft for draft in drafts)
    assert not any("\n" in draft.replace(newline, "") for draft in drafts)
    filled = demo.fill((prefix + "    <gap/>" + suffix).replace("\n", newline))
    assert filled.text == (prefix + "    return width * price" + suffix).replace("\n", newline)


@pytest.mark.parametrize("indentation", ["    ", "\t", "        "])
@pytest.mark.parametrize("suffix", ["", "\n", "\n\nassert f(1, 2) == 3\n"])
def test_a_line_of_white_space_gets_a_text_without_that_white_space(
    demo: DiffusionModel, indentation: str, suffix: str
) -> None:
    result = demo.infill(f"def f(a, b):\n{indentation}", suffix, max_gap=24)
    assert result.text.strip() and not result.text.startswith((" ", "\t"))


# ------------------------------------------------------------------------------------------------------ long lines


def test_two_megabytes_in_one_line_cost_a_window(demo: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made into tokens is bounded by n_ctx, and the next keystroke finds its beginning in the cache."""
    read: list[int] = []
    encode = type(demo.tokenizer).encode

    def count(self: Any, text: str, *arguments: Any, **options: Any) -> list[int]:
        read.append(len(text))
        return encode(self, text, *arguments, **options)

    monkeypatch.setattr(type(demo.tokenizer), "encode", count)
    filler = "x=1;" * 250_000
    began = time.monotonic()
    first = demo.infill(filler + BEFORE, BEHIND + filler, gap=2, steps=4)
    assert sum(read) < 150_000
    assert time.monotonic() - began < 20
    assert first.stats.dropped_tokens > 500_000
    again = demo.infill(filler + BEFORE + " white", BEHIND + filler, gap=2, steps=4)
    assert again.stats.encoded_tokens < 20
    others = [("big.txt", filler), ("small.txt", "a cup")]
    extra = demo.infill(BEFORE, BEHIND, gap=2, steps=4, extra=others)
    assert extra.stats.prompt_tokens < 100 and extra.stats.dropped_tokens > 100_000
    assert sum(read) < 500_000


def test_in_the_chat_form_the_end_of_the_block_is_the_end_of_the_text(random: DiffusionModel) -> None:
    """The answer quotes the file between rows of backquotes, more of them than the file has itself."""
    from pydiffgguf.infill import _check, _Place

    options, _ = _check(random._engine, {"mode": "chat"})
    place = _Place.of("a\n", "", open_end=True)
    assert place.finished("b\nc\n```\nThat is all.", options) == "b\nc"
    quoting = _Place.of("```\na\n", "", open_end=True)
    assert quoting.finished("b\n```\nc\n````\nThat is all.", options) == "b\n```\nc"
    assert place.finished("b\n```\n", _check(random._engine, {"mode": "raw"})[0]) == "b\n```\n"
