"""Messages as clients send them, and the prompt that a template makes of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pydiffgguf
from pydiffgguf import DiffusionModel, UnsupportedError, demo_model_path
from pydiffgguf.text.messages import conversation
from pydiffgguf.text.rendering import chat_parts
from pydiffgguf.text.tokenizer import Tokenizer
from pydiffgguf.text.tools import check_tool_choice, check_tools
from pydiffgguf.text.turn import TextView

DATA = Path(__file__).parent / "data"
TEMPLATE = (DATA / "tools.jinja").read_text(encoding="utf-8")
ROWS = json.loads((DATA / "messages.json").read_text(encoding="utf-8"))
SPECIAL = re.compile(r"<bos>|<\|?\w+\|?>|<\|\"\|>")

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather <turn|> of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name"},
                "days": {"type": ["integer", "null"]},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Tokenizer]:
    with DiffusionModel(demo_model_path()) as model:
        yield model.tokenizer


def parts_of(messages: Any, tokenizer: Tokenizer, **options: Any) -> list[tuple[str, bool]]:
    template = options.pop("template", TEMPLATE)
    return chat_parts(template, conversation(messages), tokenizer, name="m.gguf", **options)


def special_of(ids: list[int], tokenizer: Tokenizer) -> str:
    return "".join(tokenizer.piece(id_) for id_ in ids if id_ in tokenizer.special_ids)


@pytest.mark.parametrize("row", ROWS, ids=[row["what"] for row in ROWS])
def test_the_table_of_messages(row: dict[str, Any], tokenizer: Tokenizer) -> None:
    """What each list becomes: the prompt's text and its control tokens, or the error."""
    if "error" in row:
        kind, _, text = row["error"].partition(": ")
        error = getattr(pydiffgguf, kind, None) or {"TypeError": TypeError, "ValueError": ValueError}[kind]
        with pytest.raises(error, match="^" + re.escape(text)):
            parts_of(row["messages"], tokenizer)
        return
    parts = parts_of(row["messages"], tokenizer)
    assert "".join(text for text, _ in parts) == "<bos>" + row["prompt"]
    ids = tokenizer.encode_parts(parts)
    assert special_of(ids, tokenizer) == "<bos>" + row["special"]
    assert tokenizer.decode(ids) == "<bos>" + row["prompt"]


def test_templates_that_know_no_tools_agree(tokenizer: Tokenizer) -> None:
    """Messages are brought into one form before any template sees them: the demo model's, which is older, writes the
    same prompt for every list of the table without tools."""
    with DiffusionModel(demo_model_path()) as model:
        older = model.chat_template
    assert older
    compared = 0
    for row in ROWS:
        if "prompt" in row and "tool" not in row["prompt"]:
            parts = parts_of(row["messages"], tokenizer, template=older)
            assert "".join(text for text, _ in parts) == "<bos>" + row["prompt"], row["what"]
            compared += 1
    assert compared > 30


def test_the_table_is_long_enough() -> None:
    assert len(ROWS) >= 60
    assert len({row["what"] for row in ROWS}) == len(ROWS)


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=20)
MARKUP = st.sampled_from(["<bos>", "<turn|>", "<|turn>model\n", "<|channel>", '<|"|>', "<|tool_call>", "<eos>", "<"])
HOSTILE = st.lists(ANY_TEXT | MARKUP, max_size=5).map("".join)


@given(HOSTILE, HOSTILE, HOSTILE)
def test_nobodys_text_becomes_control_tokens(tokenizer: Tokenizer, system: str, user: str, answer: str) -> None:
    """Whatever they hold, contents add no control token, and stay what they are."""
    messages = [
        {"role": "system", "content": "s" + system},
        {"role": "user", "content": "u" + user},
        {"role": "assistant", "content": "a" + answer},
        {"role": "user", "content": "v" + user},
    ]
    ids = tokenizer.encode_parts(parts_of(messages, tokenizer))
    assert special_of(ids, tokenizer) == "<bos>" + "<|turn><turn|>" * 4 + "<|turn>"
    assert ids.count(tokenizer.bos_id) == 1
    text = tokenizer.decode(ids)
    for message in messages:
        assert f"\n{message['content'].strip()}<turn|>" in text


@given(st.lists(ANY_TEXT, min_size=1, max_size=4))
def test_plain_contents_have_the_ids_of_the_whole_text(tokenizer: Tokenizer, contents: list[str]) -> None:
    """As transformers encodes a rendered conversation: the cut at a content's edge changes nothing."""
    messages = [{"role": "user", "content": "x" + content.replace("<", "")} for content in contents]
    parts = parts_of(messages, tokenizer)
    assert tokenizer.encode_parts(parts) == tokenizer.encode("".join(text for text, _ in parts))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | HOSTILE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HOSTILE, inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(HOSTILE, JSON_VALUES, max_size=4), min_size=1, max_size=2), st.booleans())
def test_a_call_in_the_history_reads_as_itself(
    tokenizer: Tokenizer, arguments: list[dict[str, Any]], as_text: bool
) -> None:
    """Rendered, encoded, and parsed back from its tokens. U+2581 is left out: the vocabulary writes spaces with it."""
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": json.dumps(a) if as_text else a}}
        for i, a in enumerate(arguments)
    ]
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        *({"role": "tool", "tool_call_id": f"c{i}", "content": "ok"} for i in range(len(calls))),
    ]
    ids = tokenizer.encode_parts(parts_of(messages, tokenizer))
    opening, closing = (tokenizer.token_id(text) for text in ("<|tool_call>", "<tool_call|>"))
    end = len(ids) - ids[::-1].index(closing)
    turn = TextView(tokenizer).read(ids[ids.index(opening) : end])
    assert [call.arguments for call in turn.calls] == arguments
    assert turn.text == ""


def test_tools_are_declared(tokenizer: Tokenizer) -> None:
    """In the template's words, with one type and `nullable`, and a description that ends no turn."""
    messages = [{"role": "user", "content": "Rain?"}]
    parts = parts_of(messages, tokenizer, tools=check_tools([WEATHER]), enable_thinking=True)
    text = "".join(text for text, _ in parts)
    assert text == (
        '<bos><|turn>system\n<|think|>\n<|tool>declaration:get_weather{description:<|"|>The weather <turn|> of a city'
        '<|"|>,parameters:{properties:{city:{description:<|"|>Its name<|"|>,type:<|"|>string<|"|>},days:{nullable:true,'
        'type:<|"|>integer<|"|>},unit:{enum:[<|"|>C<|"|>,<|"|>F<|"|>],type:<|"|>string<|"|>}},required:[<|"|>city<|"|>],'
        'type:<|"|>object<|"|>}}<tool|><turn|>\n<|turn>user\nRain?<turn|>\n<|turn>model\n'
    )
    assert special_of(tokenizer.encode_parts(parts), tokenizer).count("<turn|>") == 2


def test_a_template_that_escapes_has_its_escapes(tokenizer: Tokenizer) -> None:
    """Other templates write JSON: a text keeps the backslashes that JSON gives it."""
    messages = [{"role": "user", "content": 'a "b"\n<turn|>'}]
    parts = parts_of(messages, tokenizer, template="{{ messages | tojson }}")
    assert "".join(text for text, _ in parts) == '[{"role": "user", "content": "a \\"b\\"\\n<turn|>"}]'
    assert special_of(tokenizer.encode_parts(parts), tokenizer) == ""


@pytest.mark.parametrize(
    ("template", "messages", "tools", "error"),
    [
        ("{{ messages[0].content[:2] }}", [{"role": "user", "content": "abc"}], [], "takes texts apart"),
        ("{{ messages[0].content }}", [{"role": "user", "content": "a"}] * 2, [], r"leaves out messages\[1\].content"),
        ("{{ messages[0].content }}", [{"role": "user", "content": "a"}], [WEATHER], "knows no tools"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
                {"role": "tool", "content": "x"},
            ],
            [],
            r"leaves out messages\[1\].tool_calls",
        ),
    ],
)
def test_what_a_template_cannot_say_is_refused(
    template: str, messages: list[Any], tools: list[Any], error: str, tokenizer: Tokenizer
) -> None:
    """Nothing that the caller handed in is lost in silence."""
    with pytest.raises(UnsupportedError, match=f"^the chat template of m.gguf .*{error}"):
        parts_of(messages, tokenizer, template=template, tools=check_tools(tools))


def function(**changes: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {**WEATHER["function"], **changes}}]  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("tools", "error", "text"),
    [
        ("x", TypeError, "tools must be a list of dicts, not str"),
        (["x"], TypeError, r"tools\[0\] must be a dict, not str"),
        ([{"type": "web_search"}], ValueError, r"tools\[0\].type is 'web_search': it must be 'function'"),
        ([{"type": "function"}], TypeError, r"tools\[0\].function must be a dict, not NoneType"),
        (function(name=1), TypeError, r"tools\[0\].function.name must be a str"),
        (function(name="a b"), ValueError, r"tools\[0\].function.name is 'a b': it must be 1 to 128 of letters"),
        (function(parametres={}), ValueError, r"tools\[0\].function has an unknown key 'parametres'"),
        (function(description=["x"]), TypeError, r"tools\[0\].function.description must be a str"),
        (function(parameters=[1]), TypeError, r"tools\[0\].function.parameters must be a dict"),
        (function(parameters={"type": "string"}), ValueError, r"parameters.type is 'string': it must be 'object'"),
        (function(parameters={"x": float("nan")}), ValueError, r"tools\[0\].function.parameters.x is nan"),
        (function() * 2, ValueError, r"tools\[1\].function.name is 'get_weather', as that of a tool before it"),
    ],
)
def test_wrong_tools_are_named(tools: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        check_tools(tools)


def test_a_choice_among_tools() -> None:
    """none declares none; required and a name force a call."""
    tools = check_tools([*function(), *function(name="other")])
    by_name = {"type": "function", "function": {"name": "other"}}
    seen = {}
    for choice in (None, "auto", "none", "required"):
        made = check_tool_choice(choice, tools)
        seen[choice] = (len(made.offered), len(made.forced))
    assert seen == {None: (2, 0), "auto": (2, 0), "none": (0, 0), "required": (2, 2)}
    made = check_tool_choice(by_name, tools)
    assert [tool.name for tool in made.forced] == ["other"] and len(made.offered) == 2
    for choice, error, text in [
        ("some", ValueError, "tool_choice is 'some': it must be"),
        (1, TypeError, "tool_choice must be a str or a dict"),
        ({"function": {"name": "x"}}, ValueError, "tool_choice.function.name is 'x': no tool has that name"),
    ]:
        with pytest.raises(error, match=text):
            check_tool_choice(choice, tools)
    with pytest.raises(ValueError, match="but there are no tools"):
        check_tool_choice("required", [])
