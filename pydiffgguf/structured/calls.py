"""A grammar of tool calls in Gemma's notation, from the JSON schemas of the tools' parameters.

Types, enums, constants, required and optional members are enforced, to any depth; other keywords are left to the model,
as they are where nothing is forced. Members come in the order in which templates write them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydiffgguf.text.calls import CALL_CLOSE, CALL_OPEN, QUOTE
from pydiffgguf.text.tools import Tool

__all__ = ["calls_grammar"]

_TERMINALS = r"""
TEXT: /(.|\n)*/
INTEGER: /-?(0|[1-9][0-9]*)/
NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/
KEY: /[A-Za-z_][A-Za-z0-9_]*/
"""
_PLAIN_KEY = re.compile(r"[\w.$-]+", re.ASCII)


def calls_grammar(tools: Sequence[Tool], marker: Callable[[str], str]) -> str:
    """Lark for one call of one of the tools.

    Args:
        marker: how the grammar names a marker of structure, by its text.
    """
    writer = _Writer(marker(QUOTE))
    # A function without parameters takes none, where a nested object without properties takes any.
    schemas = [{"properties": {}, **tool.parameters} for tool in tools]
    names = [f'"{tool.name}" {writer.of_object(schema, schema)}' for tool, schema in zip(tools, schemas, strict=True)]
    start = f'start: {marker(CALL_OPEN)} "call:" ({" | ".join(names)}) {marker(CALL_CLOSE)}\n'
    return start + "\n".join(f"{name}: {body}" for name, body in writer.rules.items()) + _TERMINALS


class _Writer:
    """Collects rules; each schema becomes one."""

    def __init__(self, quote: str) -> None:
        self._quote = quote
        self.rules: dict[str, str] = {
            "string": f"{quote} TEXT {quote}",
            "any": 'string | NUMBER | "true" | "false" | "null" | "[" (any ("," any)*)? "]" | any_object',
            "any_object": '"{" (KEY ":" any ("," KEY ":" any)*)? "}"',
        }
        self._references: dict[str, str] = {}

    def _rule(self, body: str) -> str:
        name = f"r{len(self.rules)}"
        self.rules[name] = body
        return name

    def _of(self, schema: Any, root: Mapping[str, Any]) -> str:
        """The name of the rule for a value."""
        if not isinstance(schema, Mapping):
            return "any"
        if isinstance(schema.get("$ref"), str):
            return self._of_reference(schema["$ref"], root)
        if "const" in schema:
            return self._rule(self._literal(schema["const"]))
        if isinstance(schema.get("enum"), list) and schema["enum"]:
            return self._rule(" | ".join(self._literal(value) for value in schema["enum"]))
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list) and schema[key]:
                return self._rule(" | ".join(self._of(option, root) for option in schema[key]))
        kinds = schema.get("type")
        kinds = list(kinds) if isinstance(kinds, list) else [kinds]
        if schema.get("nullable") is True:
            kinds.append("null")
        if len(kinds) > 1:
            return self._rule(" | ".join(self._of_kind(kind, schema, root) for kind in kinds))
        return self._rule(self._of_kind(kinds[0], schema, root))

    def _of_kind(self, kind: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        if kind == "array":
            item = self._of(schema.get("items"), root)
            return f'"[" ({item} ("," {item})*)? "]"'
        if kind == "object" or (kind is None and isinstance(schema.get("properties"), Mapping)):
            return self.of_object(schema, root)
        known = {"string": "string", "integer": "INTEGER", "number": "NUMBER", "boolean": '"true" | "false"'}
        return f"({known[kind]})" if kind in known else '"null"' if kind == "null" else "any"

    def _of_reference(self, reference: str, root: Mapping[str, Any]) -> str:
        if reference not in self._references:
            target: Any = root
            for part in reference.removeprefix("#").strip("/").split("/"):
                target = target.get(part) if isinstance(target, Mapping) else None
            if not isinstance(target, Mapping):
                return "any"
            name = self._rule("any")
            self._references[reference] = name  # before its body: it may hold itself
            self.rules[name] = self._of(target, root)
        return self._references[reference]

    def of_object(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        """What writes an object, braces included."""
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            return "any_object" if schema.get("additionalProperties", True) and properties is None else '"{" "}"'
        required = schema.get("required") or []
        members = sorted(properties.items(), key=lambda member: member[0].lower())
        # From the last member on: what may follow where nothing, or something, was written before.
        first, further = '""', '""'
        for key, value in reversed(members):
            name = json.dumps(key, ensure_ascii=False)
            label = f'{name} ":"' if _PLAIN_KEY.fullmatch(key) else f'{self._quote} {name} {self._quote} ":"'
            member = f"{label} {self._of(value, root)}"
            alone, behind = f"{member} {further}", f'"," {member} {further}'
            if key not in required:
                alone, behind = f"{alone} | {first}", f"{behind} | {further}"
            first, further = self._rule(alone), self._rule(behind)
        return f'"{{" {first} "}}"'

    def _literal(self, value: Any) -> str:
        if isinstance(value, str):
            return (
                f"{self._quote} {json.dumps(value, ensure_ascii=False)} {self._quote}"
                if value
                else f"{self._quote} {self._quote}"
            )
        if isinstance(value, (Mapping, list)):
            return "any"
        return json.dumps(json.dumps(value))
