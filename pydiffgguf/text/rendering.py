"""Conversations to prompts through the file's chat template.

What strangers wrote, contents, arguments, descriptions, is not there while the template renders: places stand for it.
Its text comes into the prompt as text, whatever control tokens it spells, and the template's own tokens as tokens.
"""

from __future__ import annotations

import functools
import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydiffgguf.errors import ModelFormatError, UnsupportedError
from pydiffgguf.text.calls import QUOTE
from pydiffgguf.text.messages import Conversation, Message
from pydiffgguf.text.tokenizer import Tokenizer
from pydiffgguf.text.tools import Tool

if TYPE_CHECKING:
    from pydiffgguf.text.template import ChatTemplate

__all__ = ["chat_parts", "render", "template_fault"]

#: Texts in structures that are left to the template: names and words of JSON schemas, which it compares and changes.
_PLAIN = re.compile(r"[\w.:/ -]*", re.ASCII)
_PLAIN_KEY = re.compile(r"[\w.$-]+", re.ASCII)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
    enable_thinking: bool = False,
    bos_token: str = "",
    eos_token: str = "",
) -> str:
    """The text that a chat template makes of messages. A template usually writes the bos token itself.

    Args:
        template: Jinja source, ``tokenizer.chat_template`` of the file; rendered in a sandbox with bounded work.
        messages: dicts as the template reads them.
        tools: declarations, in the form of the OpenAI API.
        add_generation_prompt: end with the opening of the model's turn.
        enable_thinking: ask the model to write down its thoughts first.
        bos_token, eos_token: their texts, for templates that name them.

    Raises:
        ValueError: the template itself refuses the messages.
        ModelFormatError: the template is broken, or takes too much work.
    """
    from pydiffgguf.text.template import TemplateRefusal

    variables: dict[str, Any] = {
        "messages": list(messages),
        "add_generation_prompt": add_generation_prompt,
        "enable_thinking": enable_thinking,
        "bos_token": bos_token,
        "eos_token": eos_token,
    }
    if tools:
        variables["tools"] = list(tools)
    try:
        return _compiled(template).render(variables, len(template) + _size([*messages, *tools]))
    except TemplateRefusal as refusal:
        raise ValueError(f"the chat template refuses the messages: {' '.join(str(refusal).split())}") from None


def template_fault(template: str) -> str | None:
    """What is wrong with a file's chat template, found by rendering one question with it; None when nothing is."""
    question = "Why is the sky blue?"
    try:
        text = render(template, [{"role": "user", "content": question}], bos_token="<bos>", eos_token="<eos>")
    except (ModelFormatError, ValueError) as error:
        return str(error)
    return None if question in text else "the chat template leaves out what the user says"


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> ChatTemplate:
    from pydiffgguf.text.template import ChatTemplate

    return ChatTemplate(source)


def _size(value: object) -> int:
    """Characters of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_size(key) + _size(item) for key, item in value.items())
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else 0


def chat_parts(
    template: str,
    conversation: Conversation,
    tokenizer: Tokenizer,
    *,
    name: str,
    tools: Sequence[Tool] = (),
    enable_thinking: bool = False,
) -> list[tuple[str, bool]]:
    """The prompt of a conversation, with the opening of the model's turn, as pieces (text, whether it is the template's
    own: special tokens are tokens there, and text elsewhere).

    Args:
        name: the file's, for messages.

    Raises what `render` raises; UnsupportedError where the template takes texts apart, or leaves some out.
    """
    places = _Places(template, tokenizer)
    rendered = render(
        template,
        [places.message(message) for message in conversation.messages],
        tools=[places.value(tool.declaration) for tool in tools],
        enable_thinking=enable_thinking,
        bos_token="" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id),
        eos_token="" if tokenizer.eos_id is None else tokenizer.piece(tokenizer.eos_id),
    )
    for tool in tools:
        if tool.name not in rendered:
            raise UnsupportedError(f"the chat template of {name} knows no tools")
    for message in conversation.messages:
        if any(call.name not in rendered for call in message.calls):
            raise UnsupportedError(f"the chat template of {name} leaves out {message.path}.tool_calls")
    parts = places.fill(rendered, name)
    if conversation.head:
        parts.append((conversation.head, False))
    return parts


class _Places:
    """Stands for texts while a template renders. A place is a number between two characters that the template does not
    know, with a quote that tells how the template escaped it."""

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        free = (mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in template)
        self._open, self._close = next(free), next(free)
        self._tokenizer = tokenizer
        self._texts: list[str] = []
        self._keys: set[int] = set()
        self._needed: dict[int, str] = {}  # path by place

    def _place(self, text: str) -> str:
        self._texts.append(text)
        return f'{self._open}{len(self._texts) - 1}"{self._close}'

    def _content(self, text: str, path: str) -> str:
        """White space around stays with the template, which trims it."""
        core = text.strip()
        if not core:
            return text
        self._needed[len(self._texts)] = path
        before, _, behind = text.partition(core)
        return before + self._place(core) + behind

    def message(self, message: Message) -> dict[str, Any]:
        """As templates read it."""
        made: dict[str, Any] = {
            "role": message.role,
            "content": self._content(message.content, f"{message.path}.content"),
        }
        if message.calls:
            made["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": self.value(call.arguments)},
                }
                for call in message.calls
            ]
        if message.role == "tool":
            made |= {"tool_call_id": message.id, "name": message.name}
        return made

    def value(self, value: Any) -> Any:
        """A copy with places for its texts."""
        if isinstance(value, str):
            return value if self._is_plain(_PLAIN, value) else self._place(value)
        if isinstance(value, Mapping):
            return {self._key(key): self.value(item) for key, item in value.items()}
        return [self.value(item) for item in value] if isinstance(value, (list, tuple)) else value

    def _key(self, key: str) -> str:
        if self._is_plain(_PLAIN_KEY, key):
            return key
        self._keys.add(len(self._texts))
        return self._place(key)

    def _is_plain(self, pattern: re.Pattern[str], text: str) -> bool:
        return bool(pattern.fullmatch(text)) and self._tokenizer.special_ids.isdisjoint(self._tokenizer.encode(text))

    def fill(self, rendered: str, name: str) -> list[tuple[str, bool]]:
        """Puts the texts in the places."""
        place = re.compile(rf"{self._open}(\d+)(\\?\"|&#34;|&quot;){self._close}")
        parts: list[tuple[str, bool]] = []
        at = 0
        for found in place.finditer(rendered):
            before, index = rendered[at : found.start()], int(found[1])
            at = found.end()
            text = _ESCAPES[found[2]](self._texts[index])
            bare = index in self._keys and found[2] == '"' and not before.endswith(QUOTE)
            # A key that is no word is told from what is around it by quotes, as keys of declarations have them.
            quote = [(QUOTE, True)] if bare else []
            parts += [(before, True), *quote, (text, False), *quote]
            self._needed.pop(index, None)
        parts.append((rendered[at:], True))
        if any(mark in text for text, own in parts if own for mark in (self._open, self._close)):
            raise UnsupportedError(f"the chat template of {name} takes texts apart: it cannot be used safely")
        if self._needed:
            raise UnsupportedError(f"the chat template of {name} leaves out {next(iter(self._needed.values()))}")
        return parts


_ESCAPES: dict[str, Callable[[str], str]] = {
    '"': str,
    '\\"': lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    "&#34;": html.escape,
    "&quot;": html.escape,
}
