"""Bodies in and out: what Python's JSON would let through, and fields by name and type."""

from __future__ import annotations

import pytest

from pydiffgguf.server.errors import ApiError
from pydiffgguf.server.fields import Fields, ignored_header
from pydiffgguf.server.wire import dump, inflate, parse


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'"a"', "must be a JSON object"),
        (b'{"a":NaN}', "NaN is not JSON"),
        (b'{"a":-Infinity}', "-Infinity is not JSON"),
        (b'{"a":1e999}', "beyond what a number can be"),
        (b'{"a":1,"a":2}', 'the key "a" is twice'),
        (b'{"a":{"b":1,"b":1}}', "is twice in"),
        (b'{"a":' + b"9" * 21 + b"}", "21 digits"),
        (b'{"a":"\\ud800"}', "half a surrogate pair"),
        (b'{"\\udfff":1}', "half a surrogate pair"),
        (b'{"a":' + b"[" * 65 + b"]" * 65 + b"}", "nests deeper than 64"),
        (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nests deeper than 64"),
        (b'{"a":"\xff"}', "not UTF-8"),
        (b'{"a":1} x', "not JSON"),
    ],
)
def test_what_is_no_clean_json_object_is_refused(body: bytes, said: str) -> None:
    """With status 400 and a reason, and never by an exception of Python's."""
    with pytest.raises(ApiError, match=said) as error:
        parse(body)
    assert error.value.status == 400


def test_what_is_clean_json_is_read() -> None:
    """A surrogate pair is a character; 64 levels and 20 digits are within the limits."""
    assert parse(b'{"a":"\\ud83d\\ude00","b":null}') == {"a": "\U0001f600", "b": None}
    assert parse(b'{"a":' + b"9" * 20 + b"}") == {"a": int("9" * 20)}
    assert parse(b'{"a":' + b"[" * 63 + b"]" * 63 + b"}")


def test_json_out_has_no_space_behind_a_colon() -> None:
    """llama.vim looks for the quote right there."""
    assert dump({"content": "é\n", "n": [1, 2]}) == '{"content":"é\\n","n":[1,2]}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump({"a": float("nan")})


def test_an_unknown_encoding_is_refused() -> None:
    """415 says what was not understood."""
    assert inflate(b"{}", "identity", 10) == b"{}"
    with pytest.raises(ApiError, match="gzip") as error:
        inflate(b"{}", "gzip", 10)
    assert error.value.status == 415


def test_zstd_is_cut_off_at_the_limit() -> None:
    """A small body may unpack to a large one."""
    zstd = pytest.importorskip("backports.zstd", reason="zstd needs Python 3.14 or backports.zstd")
    assert inflate(zstd.compress(b"{}"), "zstd", 10) == b"{}"
    with pytest.raises(ApiError, match="over 10 bytes") as error:
        inflate(zstd.compress(b"x" * 10_000_000), "zstd", 10)
    assert error.value.status == 413
    with pytest.raises(ApiError, match="not zstd"):
        inflate(b"no", "zstd", 10)
    with pytest.raises(ApiError, match="cut"):
        inflate(zstd.compress(b"{}")[:-3], "zstd", 10)


@pytest.mark.parametrize(
    ("take", "value", "said"),
    [
        ("integer", "abc", 'n: it must be an integer, but is "abc"'),
        ("integer", True, "n: it must be an integer, but is true"),
        ("integer", 1.0, "n: it must be an integer, but is 1.0"),
        ("integer", 9, "n: it must be from 0 to 8, but is 9"),
        ("boolean", 1, "n: it must be true or false, but is 1"),
        ("string", 1, "n: it must be a string, but is 1"),
        ("items", {}, "n: it must be a list, but is {}"),
        ("object", [], r"n: it must be an object, but is \[\]"),
        ("number", "1", 'n: it must be a number, but is "1"'),
        ("number", False, "n: it must be a number, but is false"),
    ],
)
def test_a_wrong_type_names_field_and_value(take: str, value: object, said: str) -> None:
    """Booleans are no integers, and strings no numbers."""
    fields = Fields({"n": value})
    with pytest.raises(ApiError, match=f"^{said}$") as error:
        fields.integer("n", 0, 8) if take == "integer" else getattr(fields, take)("n")
    assert error.value.param == "n"


def test_null_is_absent() -> None:
    """For every type."""
    fields = Fields(dict.fromkeys("abcdef"))
    assert fields.integer("a", 0, 8) is fields.string("c") is fields.items("d") is fields.object("e") is None
    assert fields.boolean("b", True) is True and fields.strings("f", 1, 1) == []
    assert fields.rest(strict=True) == []


def test_what_nobody_took_is_named() -> None:
    """In a header, without what does not belong into one; refused where that is wanted."""
    fields = Fields({"top_k": 1, "bad\r\nname": 2, "ok": 3, "n": None})
    fields.take("ok")
    assert ignored_header(fields.rest(strict=False)) == "top_k, 1 more"
    with pytest.raises(ApiError, match="top_k"):
        Fields({"top_k": 1}).rest(strict=True)


def test_a_long_value_is_cut_in_the_message() -> None:
    """At most 80 characters of it come back."""
    with pytest.raises(ApiError) as error:
        Fields({"n": "x" * 10_000}).integer("n", 0, 1)
    assert len(error.value.message) < 130
