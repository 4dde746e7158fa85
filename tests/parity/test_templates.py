"""Chat templates as transformers renders them: the forms in use, and the tag that training writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from pydiffgguf.text.rendering import render

pytestmark = pytest.mark.parity

TEMPLATES = sorted((Path(__file__).parent / "templates").glob("*.jinja"))

QUESTION = {"role": "user", "content": "  Why is the sky <b>blue</b>?\n"}
ANSWER = {"role": "assistant", "content": "Because of Rayleigh.\n"}
CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "one turn": [QUESTION],
    "three turns": [QUESTION, ANSWER, {"role": "user", "content": "夕焼け?"}],
    "a system turn": [{"role": "system", "content": "Be brief.\n"}, QUESTION],
    "two answers": [QUESTION, ANSWER, {"role": "assistant", "content": "And of dust."}, QUESTION],
    "an empty answer": [QUESTION, {"role": "assistant", "content": ""}, QUESTION],
}


def outcome(make: Any) -> str:
    try:
        return str(make())
    except Exception as error:
        return "refused: " + str(error).removeprefix("the chat template refuses the messages: ")


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_renders_as_in_transformers(path: Path, conversation: str) -> None:
    """With and without thinking, with and without the opening of the answer; also what a template refuses."""
    source = path.read_text(encoding="utf-8")
    messages = CONVERSATIONS[conversation]
    for thinking in (False, True):
        for opening in (False, True):
            options = {"enable_thinking": thinking, "add_generation_prompt": opening}
            expected = outcome(
                lambda options=options: _compile_jinja_template(source).render(
                    messages=messages, bos_token="<bos>", eos_token="<eos>", **options
                )
            )
            got = outcome(
                lambda options=options: render(source, messages, bos_token="<bos>", eos_token="<eos>", **options)
            )
            assert got == expected
            assert "sky" in expected or expected.startswith("refused")


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_thousand_turns_fit_the_allowance(path: Path) -> None:
    """Also where a template looks ahead over all messages at each of them."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(1001)]
    assert render(path.read_text(encoding="utf-8"), turns).count("turn 1000") == 1
