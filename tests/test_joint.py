"""Texts alone: what a filling repeats of what follows it, where a text is complete, and places in other units."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pydiffgguf import Document
from pydiffgguf.text.document import from_units, newline_of, plain, to_units
from pydiffgguf.text.joint import complete, without_indentation, without_repeat

TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


@pytest.mark.parametrize(
    ("prefix", "text", "suffix", "kept"),
    [
        # Pairs that public reports about completion plug-ins give (minuet, copilot-cmp, Zed, llama.vscode).
        ("function f(", "{ person: string }) {", ") {\n  return 1;\n}", "{ person: string }"),
        ("", "{ person: string }) {", ") {\n", "{ person: string }"),
        ("<div>\n", "<p>Hello</p></div>", "</div>", "<p>Hello</p>"),
        ("if (x) {\n  ", "foo();\n}", "\n}\n", "foo();"),
        ("", "foo();\n}", "}", "foo();\n"),
        ("if (a", " )  {", ") {\n}", " "),
        ("【", "你好世界】", "】结尾", "你好世界"),
        ("x = '", "abc'", "'\n", "abc"),
        ("a[", "0]", "][1]", "0"),
        ("", "return a\n\ndef g(b):", "\n\ndef g(b):\n    pass", "return a"),
        ("the cat", " sat on the mat yesterday", " on the mat yesterday, and", " sat"),
        # And what must stay.
        ("print(", "foo(bar)", ")", "foo(bar)"),
        ("bar(foo(", "a)", ")", "a)"),
        ("<b>", "<b>a</b>", "</b>", "<b>a</b>"),
        ("x = ", "'abc'", "\n", "'abc'"),
        ("", "that ", " that", "that "),
        ("a", " very", " very good", " very"),
        ("{", "{}", "}", "{}"),
        ("x<y ", "a", "b", "a"),
        ("", "", "", ""),
    ],
)
def test_what_follows_is_not_repeated_and_nothing_else_is_cut(prefix: str, text: str, suffix: str, kept: str) -> None:
    assert without_repeat(prefix, text, suffix) == kept


@given(prefix=TEXT, text=TEXT, suffix=TEXT)
def test_only_an_end_that_repeats_is_cut(prefix: str, text: str, suffix: str) -> None:
    """Whatever the texts: a beginning is left, and what is cut off is, white space aside, how the suffix begins."""
    kept = without_repeat(prefix, text, suffix)
    assert text.startswith(kept)
    assert "".join(suffix.split()).startswith("".join(text[len(kept) :].split()))


@pytest.mark.parametrize(
    ("prefix", "text", "line", "block"),
    [
        ("x = ", "1 + 2\ny = 3\n", "1 + 2", None),
        ("x = ", "1 + 2", None, None),
        ("x = ", "1\n\ny", "1", "1"),
        ("def f(a):\n    ", "return a\n\n\nprint(1)\n", "return a", "return a"),
        ("def f(a):\n", "    x = 1\n\n    return x\n\ndef g", "    x = 1", "    x = 1\n\n    return x"),
        ("def f(a):\n    ", "\n    return a\nprint", "\n    return a", "\n    return a"),
        ("", "\n\nTwo lines\nof text.\n\nMore", "\n\nTwo lines", "\n\nTwo lines\nof text."),
        ("Tw", "o lines\nof text.\n\nMore", "o lines", "o lines\nof text."),
        ("done", "\nmore\n", "", None),
        ("", "\n \n", None, None),
    ],
)
def test_a_text_is_complete_with_its_line_or_block(prefix: str, text: str, line: str | None, block: str | None) -> None:
    for until, expected in (("line", line), ("block", block)):
        n = complete(prefix, text, until)  # type: ignore[arg-type]
        assert (None if n is None else text[:n]) == expected
    assert complete(prefix, text, "end") is None


@pytest.mark.parametrize(
    ("prefix", "text", "kept"),
    [
        ("def f():\n    ", "    return 1", "return 1"),
        ("def f():\n\t", "\treturn 1", "return 1"),
        ("def f():\n    ", "\n    return 1", "return 1"),
        ("if a:\n        b\n    ", "\nelse:", "\nelse:"),
        ("def f():\n    ", "return 1", "return 1"),
        ("def f():\n", "    return 1", "    return 1"),
        ("a ", " b", " b"),
    ],
)
def test_indentation_is_there_once(prefix: str, text: str, kept: str) -> None:
    assert without_indentation(prefix, text) == kept


# ----------------------------------------------------------------------------------------------- line ends, places


@pytest.mark.parametrize(
    ("text", "newline"),
    [
        ("", "\n"),
        ("a", "\n"),
        ("a\nb", "\n"),
        ("a\r\nb", "\r\n"),
        ("a\rb", "\r"),
        ("a\r\nb\nc\r\n", "\r\n"),
        ("\r\n\n", "\n"),
    ],
)
def test_the_most_frequent_line_end_counts(text: str, newline: str) -> None:
    assert newline_of(text) == newline
    assert "\r" not in plain(text) and len(plain(text)) == len(text) - text.count("\r\n")


@given(text=TEXT, n=st.integers(0, 40))
def test_units_go_there_and_back(text: str, n: int) -> None:
    for unit in ("characters", "utf-8", "utf-16"):
        offset = min(n, len(text))
        assert from_units(text, to_units(text, offset, unit), unit) == offset  # type: ignore[arg-type]


def test_a_place_within_a_character_is_refused() -> None:
    text = "a😀é"
    assert [to_units(text, 2, unit) for unit in ("characters", "utf-8", "utf-16")] == [2, 5, 3]  # type: ignore[arg-type]
    for n, unit in ((3, "utf-8"), (2, "utf-16"), (6, "utf-8")):
        with pytest.raises(ValueError, match=f"the offset is {n} in {unit}: that is within a character"):
            from_units(text, n, unit)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the offset is 8: it must be from 0 to 7 in utf-8"):
        from_units(text, 8, "utf-8")
    with pytest.raises(ValueError, match="unit is 'bytes': it must be"):
        from_units(text, 0, "bytes")  # type: ignore[arg-type]


def test_a_document_knows_places_of_editors(tmp_path: Path) -> None:
    """Counted in the file as it is: line ends of two characters, without the byte order mark."""
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffé\r\n😀b\rc".encode())
    document = Document(str(path))
    assert document.text == "é\n😀b\nc"
    assert [document.offset_at(n) for n in range(8)] == [0, 1, 1, 2, 3, 4, 5, 6]
    assert [document.offset_at(n, "utf-8") for n in (0, 2, 4, 8, 9, 10)] == [0, 1, 2, 3, 4, 5]
    assert [document.offset_at(n, "utf-16") for n in (1, 3, 5, 6, 8)] == [1, 2, 3, 4, 6]


@pytest.mark.parametrize("data", [b"a\rb\rc", b"a\r\nb\rc\n", b"a\nb\r\nc\r\n", b"\r\n\r\n", b"abc"])
def test_an_insertion_leaves_every_line_end(tmp_path: Path, data: bytes) -> None:
    """At each place of the text; lone carriage returns too."""
    for offset in range(len(plain(data.decode())) + 1):
        path = tmp_path / "x.txt"
        path.write_bytes(data)
        document = Document(str(path))
        document.insert(offset, "X")
        written = path.read_bytes()
        assert written.replace(b"X", b"") == data
        assert plain(written.decode()) == document.text
        assert document.text.index("X") == offset
