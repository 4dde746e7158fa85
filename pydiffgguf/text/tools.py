"""Tools that a program offers, in the form of the OpenAI API, and its choice among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydiffgguf.text.messages import check_json, check_name

__all__ = ["Tool", "ToolChoice", "check_tool_choice", "check_tools"]


@dataclass(frozen=True)
class Tool:
    """`declaration`: what templates read. `parameters`: the JSON schema of its arguments, as it was given."""

    name: str
    declaration: dict[str, Any]
    parameters: dict[str, Any]


@dataclass(frozen=True)
class ToolChoice:
    """`offered`: the tools that the prompt declares. `forced`: the answer must be a call of one of these; none: it may
    be anything."""

    offered: list[Tool]
    forced: list[Tool]


def check_tools(tools: object) -> list[Tool]:
    """Raises TypeError or ValueError, with the path, for anything but a list of tools."""
    if tools is None:
        return []
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise TypeError(f"tools must be a list of dicts, not {type(tools).__name__}")
    checked: list[Tool] = []
    for i, tool in enumerate(tools):
        path = f"tools[{i}]"
        if not isinstance(tool, Mapping):
            raise TypeError(f"{path} must be a dict, not {type(tool).__name__}")
        if tool.get("type", "function") != "function":
            raise ValueError(f"{path}.type is {tool['type']!r:.60}: it must be 'function'")
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise TypeError(f"{path}.function must be a dict, not {type(function).__name__}")
        checked.append(_function(f"{path}.function", function))
        if any(checked[-1].name == other.name for other in checked[:-1]):
            raise ValueError(f"{path}.function.name is {checked[-1].name!r}, as that of a tool before it")
    return checked


def _function(path: str, function: Mapping[str, Any]) -> Tool:
    unknown = [key for key in function if key not in ("name", "description", "parameters", "response", "strict")]
    if unknown:
        raise ValueError(f"{path} has an unknown key {unknown[0]!r:.60}")
    name = check_name(f"{path}.name", function.get("name"))
    description = function.get("description") or ""
    if not isinstance(description, str):
        raise TypeError(f"{path}.description must be a str, not {type(description).__name__}")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, Mapping):
        raise TypeError(f"{path}.parameters must be a dict, not {type(parameters).__name__}")
    schema = check_json(f"{path}.parameters", parameters)
    if schema.get("type", "object") != "object":
        raise ValueError(f"{path}.parameters.type is {schema['type']!r:.60}: it must be 'object'")
    declaration: dict[str, Any] = {
        "name": name,
        "description": check_json(f"{path}.description", description),
        # Templates write what is here without asking whether it is.
        "parameters": {"properties": {}, **_for_templates(schema), "type": "object"},
    }
    if isinstance(function.get("response"), Mapping):
        declaration["response"] = check_json(f"{path}.response", function["response"])
    return Tool(name, {"type": "function", "function": declaration}, schema)


def _for_templates(schema: Any) -> Any:
    """Gemma's templates know one type and `nullable`: ``["string", "null"]`` is written so."""
    if isinstance(schema, list):
        return [_for_templates(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _for_templates(value) for key, value in schema.items()}
    kinds = schema.get("type")
    if isinstance(kinds, list) and len(kinds) == 2 and "null" in kinds:
        made |= {"type": next(kind for kind in kinds if kind != "null"), "nullable": True}
    return made


def check_tool_choice(choice: object, tools: list[Tool]) -> ToolChoice:
    """What "none", "auto", "required" or one function, by its dict, means. Raises TypeError or ValueError for anything
    else, and for a choice among no tools."""
    if choice is None or choice == "auto":
        return ToolChoice(tools, [])
    if choice == "none":
        return ToolChoice([], [])
    if not tools:
        raise ValueError(f"tool_choice is {choice!r:.60}, but there are no tools")
    if choice in ("required", "any"):
        return ToolChoice(tools, tools)
    if isinstance(choice, str):
        raise ValueError(f"tool_choice is {choice!r:.60}: it must be 'none', 'auto', 'required' or a function's dict")
    if not isinstance(choice, Mapping):
        raise TypeError(f"tool_choice must be a str or a dict, not {type(choice).__name__}")
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else choice.get("name")
    chosen = [tool for tool in tools if tool.name == name]
    if not chosen:
        raise ValueError(f"tool_choice.function.name is {name!r:.60}: no tool has that name")
    return ToolChoice(tools, chosen)
