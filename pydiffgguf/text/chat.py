"""Messages to a prompt through the file's chat template, the thought channel, and stop strings."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydiffgguf.text.template import ChatTemplate

__all__ = ["ROLES", "StopStrings", "render", "split_reasoning", "strip_reasoning"]

#: Roles a message can have; ``model`` is Gemma's own word for ``assistant``.
ROLES = ("system", "developer", "user", "assistant", "model")

OPEN = "<|channel>"
CLOSE = "<channel|>"
THOUGHT = "thought"


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
    enable_thinking: bool = False,
    bos_token: str = "",
    eos_token: str = "",
) -> str:
    """The prompt that a chat template makes of messages. Thoughts in earlier answers are left out (`strip_reasoning`).
    A template usually writes the bos token itself.

    Args:
        template: Jinja source, ``tokenizer.chat_template`` of the file; rendered in a sandbox with bounded work.
        messages: dicts with ``role`` (one of `ROLES`) and ``content`` (str).
        add_generation_prompt: end with the opening of the model's turn.
        enable_thinking: ask the model to write down its thoughts first.
        bos_token, eos_token: their texts, for templates that name them.

    Raises:
        TypeError, ValueError: a message is not of that form, or the template itself refuses the messages.
        ModelFormatError: the template is broken, or takes too much work.
    """
    from pydiffgguf.text.template import TemplateRefusal

    plain = strip_reasoning(messages)
    variables: dict[str, Any] = {
        "messages": plain,
        "add_generation_prompt": add_generation_prompt,
        "enable_thinking": enable_thinking,
        "bos_token": bos_token,
        "eos_token": eos_token,
    }
    size = len(template) + sum(len(message["content"]) for message in plain)
    try:
        return _compiled(template).render(variables, size)
    except TemplateRefusal as refusal:
        raise ValueError(f"the chat template refuses the messages: {' '.join(str(refusal).split())}") from None


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> ChatTemplate:
    from pydiffgguf.text.template import ChatTemplate

    return ChatTemplate(source)


def _check(messages: Sequence[Mapping[str, str]]) -> None:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a list of dicts, not {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"messages[{index}] must be a dict, not {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f"messages[{index}] has no {key!r}")
            if not isinstance(message[key], str):
                raise TypeError(f"messages[{index}][{key!r}] must be a str, not {type(message[key]).__name__}")
        unknown = [key for key in message if key not in ("role", "content")]
        if unknown:
            raise ValueError(f"messages[{index}] has an unknown key {unknown[0]!r}")
        if message["role"] not in ROLES:
            raise ValueError(f"messages[{index}]['role'] is {message['role']!r}, expected one of {', '.join(ROLES)}")


def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a model's turn, decoded with its special tokens: what stands in
    ``<|channel>thought\\n...<channel|>`` goes into the first, the rest into the second.

    Without a channel all is answer. An empty thought gives ``("", answer)``; an unfinished one, as while streaming or
    when the tokens ran out, gives ``(so far, "")``. Several channels are joined by a newline.
    """
    thoughts: list[str] = []
    answer: list[str] = []
    rest = text
    while True:
        before, opened, rest = rest.partition(OPEN)
        answer.append(before.lstrip("\n") if thoughts else before)
        if not opened:
            break
        body, _, rest = rest.partition(CLOSE)
        name, newline, thought = body.partition("\n")
        # only the channel's name stands on the first line; while streaming it may be half there
        known = name.strip() == THOUGHT if newline else THOUGHT.startswith(name.strip())
        thoughts.append((thought if known else body).strip())
    return "\n".join(thought for thought in thoughts if thought), "".join(answer).replace(CLOSE, "")


def strip_reasoning(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The same messages with the thoughts cut out of the model's turns: the model was trained without its earlier
    thoughts in the history. New dicts; what was handed in is not changed.

    Raises:
        TypeError, ValueError: a message is not of the form that `render` takes.
    """
    _check(messages)
    return [
        {
            "role": message["role"],
            "content": split_reasoning(message["content"])[1]
            if message["role"] in ("assistant", "model")
            else message["content"],
        }
        for message in messages
    ]


class StopStrings:
    """Strings that end a text before the first of them.

    Raises:
        TypeError: not a string or a sequence of strings.
        ValueError: an empty string among them.
    """

    def __init__(self, stop: str | Sequence[str] = ()) -> None:
        stops: Sequence[object] = (stop,) if isinstance(stop, str) else stop
        if isinstance(stops, bytes) or not isinstance(stops, Sequence):
            raise TypeError(f"stop must be a str or a list of them, not {type(stop).__name__}")
        self.stops: tuple[str, ...] = ()
        for text in stops:
            if not isinstance(text, str):
                raise TypeError(f"stop must hold strings, not {type(text).__name__}")
            if not text:
                raise ValueError("stop: an empty string would end every text before it begins")
            self.stops += (text,)

    def find(self, text: str, start: int = 0) -> int | None:
        """Where the earliest stop string at or after `start` begins, or None. To search a text that grows, go back by
        `overlap` characters: a stop string may straddle the seam."""
        found = [at for at in (text.find(stop, start) for stop in self.stops) if at >= 0]
        return min(found) if found else None

    @property
    def overlap(self) -> int:
        """Length of the longest stop string, less one."""
        return max((len(stop) for stop in self.stops), default=1) - 1
