"""Messages as programs send them, brought into the one form that chat templates read.

The shapes are those of the OpenAI API, with what clients add on their own. What carries no meaning for a prompt is
dropped; what would change it and cannot be kept is refused, with its path (``messages[2].content[1].type``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pydiffgguf.errors import UnsupportedError

__all__ = ["Call", "Conversation", "Message", "check_json", "check_name", "conversation", "text_of", "without_thoughts"]

#: What a sender's word is for templates; ``model`` is Gemma's own for ``assistant``.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
}
ASSISTANT_ONLY = ("tool_calls", "function_call")

#: Keys that clients echo or add, and that say nothing to the model. `reasoning`: earlier thoughts are never fed back.
HARMLESS = frozenset(
    {
        "annotations",
        "cache_control",
        "created",
        "created_at",
        "finish_reason",
        "id",
        "index",
        "logprobs",
        "metadata",
        "name",
        "object",
        "provider_specific_fields",
        "reasoning",
        "reasoning_content",
        "reasoning_details",
        "reasoning_signature",
        "refusal",
        "status",
        "thinking",
        "thinking_blocks",
        "timestamp",
        "tool_call_id",
        "type",
        "usage",
    }
)
TEXT_PARTS = ("text", "input_text", "output_text")
PARTS_BY_KIND = {
    "image": ("image", "image_url", "input_image", "image_file"),
    "audio": ("audio", "audio_url", "input_audio"),
    "video": ("video", "video_url", "input_video"),
    "file": ("file", "file_url", "input_file"),
}
_NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)
MAX_DEPTH = 64

#: A thought that opens a message, as a client has it that took a turn for plain text.
_THOUGHT = re.compile(r"\s*<\|channel>thought\n.*?<channel\|>\n*", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A tool call of an earlier turn."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass
class Message:
    """`role`: system, user, assistant or tool. `path`: where the caller's message is. `id`, `name`: of the call that a
    tool message answers."""

    role: str
    content: str
    path: str
    calls: list[Call] = field(default_factory=list)
    id: str = ""
    name: str = ""


@dataclass(frozen=True)
class Conversation:
    """`messages` for the template; `head`: the text that the model's answer begins with, "" for none."""

    messages: list[Message]
    head: str = ""


def conversation(messages: object) -> Conversation:
    """Checks messages and brings them into one form.

    System messages at the beginning become one, as assistant messages in a row do, a blank line between. Thoughts that
    open an assistant's message are left out. A last message of the assistant is the head of the answer.

    Raises:
        TypeError, ValueError: a message is not of a known form; names its path.
        UnsupportedError: images, audio, video and files.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a list of dicts, not {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty")
    merged: list[Message] = []
    unanswered: list[tuple[str, Call]] = []
    for index, given in enumerate(messages):
        message, raw_calls = _read(f"messages[{index}]", given)
        if message.role == "tool":
            _resolve(message, unanswered)
        elif unanswered:
            raise ValueError(f"{unanswered[0][0]} is answered by no tool message before {message.path}")
        unanswered += raw_calls
        last = merged[-1] if merged else None
        if last and message.role == "assistant" == last.role and not last.calls:
            last.content = _joined(last.content, message.content)
            last.calls = message.calls
        elif last and message.role == "system" == last.role and len(merged) == 1:
            last.content = _joined(last.content, message.content)
        else:
            merged.append(message)
    if unanswered:
        raise ValueError(f"{unanswered[0][0]} is answered by no tool message")
    head = ""
    if merged[-1].role == "assistant" and not merged[-1].calls:
        head = merged.pop().content
        if not merged:
            raise ValueError("messages holds nothing except an assistant's: there is nothing to answer")
    return Conversation(merged, head)


def _joined(first: str, second: str) -> str:
    return f"{first}\n\n{second}" if first and second else first or second


def _read(path: str, given: object) -> tuple[Message, list[tuple[str, Call]]]:
    """One message, and its calls with their paths."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{path} must be a dict, not {type(given).__name__}")
    if "role" not in given:
        raise ValueError(f"{path} has no 'role'")
    if not isinstance(given["role"], str):
        raise TypeError(f"{path}.role must be a str, not {type(given['role']).__name__}")
    if given["role"] not in ROLES:
        raise ValueError(f"{path}.role is {given['role']!r:.60}: it must be one of {', '.join(ROLES)}")
    role = ROLES[given["role"]]
    for key in given:
        _check_key(path, role, key, given[key])
    calls = _calls(path, given)
    content = _content(path, role, given, has_calls=bool(calls))
    if role == "assistant":
        content = without_thoughts(content)
    message = Message(role, content, path, [call for _, call in calls])
    if role == "tool":
        message.id = _optional_text(path, given, "tool_call_id")
        message.name = _optional_text(path, given, "name")
    return message, calls


def _check_key(path: str, role: str, key: object, value: object) -> None:
    known = key in ("role", "content") or key in HARMLESS or (role == "assistant" and key in ASSISTANT_ONLY)
    # What is empty says nothing, whatever it is called.
    if known or value is None or value is False or (isinstance(value, (str, list, tuple, dict)) and not value):
        return
    if key in ("images", "image"):
        _refuse_kind(f"{path}.{key}", "image")
    if key in ("audio", "video", "files"):
        _refuse_kind(f"{path}.{key}", str(key))
    if key in ASSISTANT_ONLY:
        raise ValueError(f"{path}.{key} belongs to an assistant's message, but the role is {role!r}")
    raise ValueError(f"{path} has an unknown key {key!r:.60}")


def _refuse_kind(what: str, kind: str) -> NoReturn:
    raise UnsupportedError(f"{what}: {kind} input is not supported")


def _optional_text(path: str, given: Mapping[str, Any], key: str) -> str:
    value = given.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"{path}.{key} must be a str, not {type(value).__name__}")
    return value


def _content(path: str, role: str, given: Mapping[str, Any], *, has_calls: bool) -> str:
    if "content" not in given and not has_calls:
        raise ValueError(f"{path} has no 'content'")
    content = given.get("content")
    if content is None:
        refusal = given.get("refusal")
        if role == "assistant" and isinstance(refusal, str) and refusal:
            return text_of(f"{path}.refusal", refusal)
        if not has_calls:
            raise TypeError(f"{path}.content is None: that is possible only beside tool_calls")
        return ""
    if isinstance(content, str):
        return text_of(f"{path}.content", content)
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Sequence):
        raise TypeError(f"{path}.content must be a str or a list of parts, not {type(content).__name__}")
    return "".join(_part(f"{path}.content[{i}]", role, part) for i, part in enumerate(content))


def _part(path: str, role: str, part: object) -> str:
    if isinstance(part, str):
        return text_of(path, part)
    if not isinstance(part, Mapping):
        raise TypeError(f"{path} must be a dict, not {type(part).__name__}")
    kind = part.get("type")
    if not isinstance(kind, str):
        raise TypeError(f"{path}.type must be a str, not {type(kind).__name__}")
    for name, kinds in PARTS_BY_KIND.items():
        if kind in kinds:
            _refuse_kind(f"{path}.type is {kind!r}", name)
    key = "refusal" if kind == "refusal" and role == "assistant" else "text"
    if kind not in TEXT_PARTS and key == "text":
        raise ValueError(f"{path}.type is {kind!r:.60}: it must be 'text'")
    if not isinstance(part.get(key), str):
        raise TypeError(f"{path}.{key} must be a str, not {type(part.get(key)).__name__}")
    return text_of(f"{path}.{key}", part[key])


def text_of(path: str, text: str) -> str:
    """The text. Raises ValueError for a lone surrogate, which no token can write."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} holds a lone surrogate at character {error.start}") from None
    return text


def without_thoughts(text: str) -> str:
    """The text without thoughts that open it: the model was trained without its earlier thoughts in the history. A
    marker further on is a quotation, and stays."""
    at = 0
    while found := _THOUGHT.match(text, at):
        at = found.end()
    return text[at:]


# ------------------------------------------------------------------------------------------------------ tool calls


def _calls(path: str, given: Mapping[str, Any]) -> list[tuple[str, Call]]:
    calls = given.get("tool_calls")
    legacy = given.get("function_call")
    if calls and legacy:
        raise ValueError(f"{path} has both tool_calls and function_call")
    if legacy:
        where = f"{path}.function_call"
        return [(where, Call("", *_function(where, legacy)))]
    if not calls:
        return []
    if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Sequence):
        raise TypeError(f"{path}.tool_calls must be a list, not {type(calls).__name__}")
    read = []
    for i, call in enumerate(calls):
        where = f"{path}.tool_calls[{i}]"
        if not isinstance(call, Mapping):
            raise TypeError(f"{where} must be a dict, not {type(call).__name__}")
        if call.get("type", "function") not in ("function", None):
            raise ValueError(f"{where}.type is {call['type']!r:.60}: it must be 'function'")
        id_ = _optional_text(where, call, "id") or f"{path}.{i}"
        read.append((where, Call(id_, *_function(f"{where}.function", call.get("function")))))
    return read


def _function(path: str, function: object) -> tuple[str, dict[str, Any]]:
    if not isinstance(function, Mapping):
        raise TypeError(f"{path} must be a dict, not {type(function).__name__}")
    name = check_name(f"{path}.name", function.get("name"))
    return name, _arguments(f"{path}.arguments", function.get("arguments"))


def check_name(path: str, name: object) -> str:
    """The name of a function. Raises TypeError and ValueError for what templates cannot write."""
    if not isinstance(name, str):
        raise TypeError(f"{path} must be a str, not {type(name).__name__}")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{path} is {name!r:.60}: it must be 1 to 128 of letters, digits, and _ . : / -")
    return name


def _arguments(path: str, arguments: object) -> dict[str, Any]:
    """The object that arguments are, as text, as most clients send them, or as they are."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except RecursionError:
            raise ValueError(f"{path} is nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise ValueError(f"{path} must be a JSON object, but is {json.dumps(arguments):.60}")
    if not isinstance(arguments, Mapping):
        raise TypeError(f"{path} must be a dict or its JSON, not {type(arguments).__name__}")
    checked = check_json(path, arguments)
    assert isinstance(checked, dict)
    return checked


def check_json(path: str, value: object, depth: int = 0) -> Any:
    """A copy of a value that JSON can write: dicts with str keys, lists, str, int, float, bool, None.

    Raises TypeError and ValueError, with the path, for anything else: NaN, lone surrogates, more than 64 levels.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"{path.split('[')[0]} is nested more than {MAX_DEPTH} levels deep")
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return text_of(path, value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value}, which JSON cannot write")
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{path} has a key {key!r:.60}: keys must be strings")
        return {text_of(path, key): check_json(f"{path}.{key}", item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [check_json(f"{path}[{i}]", item, depth + 1) for i, item in enumerate(value)]
    raise TypeError(f"{path} is of type {type(value).__name__}, which JSON cannot write")


def _resolve(message: Message, unanswered: list[tuple[str, Call]]) -> None:
    """Finds the call that a tool message answers, by its id, else its name, else the order, and takes it out."""
    if not unanswered:
        raise ValueError(f"{message.path}: a tool message must follow an assistant's with tool_calls")
    open_calls = [call for _, call in unanswered]
    if message.id:
        found = [call for call in open_calls if call.id == message.id]
        if not found:
            raise ValueError(f"{message.path}.tool_call_id is {message.id!r:.60}: no open call before it has that id")
    elif message.name:
        found = [call for call in open_calls if call.name == message.name]
        if not found:
            raise ValueError(f"{message.path}.name is {message.name!r:.60}: no open call before it has that name")
    else:
        found = open_calls
    message.id, message.name = found[0].id, found[0].name
    del unanswered[open_calls.index(found[0])]
