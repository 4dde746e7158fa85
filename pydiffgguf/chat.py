"""A conversation with its tools and its room for thoughts, as the prompt that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydiffgguf._arguments import int32
from pydiffgguf.text.prompts import Prompts
from pydiffgguf.text.tools import Tool, check_tool_choice, check_tools

__all__ = ["ChatPrompt", "chat_prompt"]


@dataclass(frozen=True)
class ChatPrompt:
    """`thought_tokens`: the most of a thought, None for any number. `forced`: the answer must be a call of one of
    these tools; none: it may be anything."""

    ids: list[int]
    thought_tokens: int | None
    forced: list[Tool]


def chat_prompt(prompts: Prompts, messages: object, options: Mapping[str, Any]) -> ChatPrompt:
    """Checks messages and `ChatOptions`; other options are not looked at. Raises what `DiffusionModel.chat` raises."""
    thinking = options.get("thinking", False)
    if thinking is None:
        thinking = False
    limit = None if isinstance(thinking, bool) else int32("thinking", thinking)
    choice = check_tool_choice(options.get("tool_choice"), check_tools(options.get("tools")))
    ids = prompts.chat(messages, thinking=bool(thinking), tools=choice.offered)
    return ChatPrompt(ids, limit or None, choice.forced)
