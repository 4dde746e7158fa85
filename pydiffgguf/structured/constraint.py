"""Constraints on an answer: a request's schema, regular expression, grammar or choices, checked and compiled."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydiffgguf.errors import UnsupportedError
from pydiffgguf.structured.automaton import Automaton, compile_automaton
from pydiffgguf.structured.calls import calls_grammar
from pydiffgguf.structured.completion import Endings, ends_of_automaton, ends_of_choices, search_endings
from pydiffgguf.structured.tables import Symbols, Tables, engine
from pydiffgguf.text.calls import CALL_CLOSE, CALL_OPEN, QUOTE
from pydiffgguf.text.messages import check_json

if TYPE_CHECKING:
    import llguidance

__all__ = ["CONSTRAINTS", "Constraint", "Grammar", "read_constraint"]

#: The options that constrain an answer; a call takes one of them.
CONSTRAINTS = ("response_format", "regex", "grammar", "choices")

#: White space between JSON's tokens. The engine's default has no limit, and models that are not sure fill canvases.
SPACE = r"(\n {0,40}| )?"

#: Keywords that narrow a schema and that the engine does not enforce: a schema with one is refused.
NOT_ENFORCED = frozenset(
    [
        "$dynamicRef",
        "$recursiveRef",
        "contains",
        "contentSchema",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "if",
        "maxContains",
        "minContains",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
    ]
)
_SCHEMAS = ("additionalItems", "additionalProperties", "items")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_DICTS = ("$defs", "definitions", "patternProperties", "properties")


@dataclass(frozen=True)
class Constraint:
    """A checked request. `kind`: "json", "regex", "grammar", "choices" or "calls"; `value`: the schema, the expression,
    the grammar in Lark's notation, the texts, or the tools of which one is to be called. `compact`: JSON without white
    space."""

    kind: str
    value: Any
    compact: bool = False


def read_constraint(options: Mapping[str, Any]) -> Constraint | None:
    """The constraint that the options ask for, or None.

    Raises TypeError and ValueError for a wrong or a second one; UnsupportedError, with its name, for a keyword of a
    schema that cannot be enforced.
    """
    given = {name: options[name] for name in CONSTRAINTS if options.get(name) is not None}
    form = given.get("response_format")
    if isinstance(form, Mapping) and form.get("type") == "text":
        del given["response_format"]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} cannot be given together: an answer has one form")
    if not given:
        return None
    [(name, value)] = given.items()
    if name == "response_format":
        return _format(value)
    if name == "choices":
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
            raise TypeError("choices must be a list of strings")
        if not value or not all(value):
            raise ValueError("choices is empty, or holds an empty string: give the texts that the answer may be")
        return Constraint("choices", list(dict.fromkeys(value)))
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} is empty")
    return Constraint(name, value)


def _format(form: object) -> Constraint:
    if not isinstance(form, Mapping):
        raise TypeError(f"response_format must be a dict, not {type(form).__name__}")
    kind = form.get("type")
    if kind not in ("json_object", "json_schema"):
        raise ValueError(f"response_format.type is {kind!r:.60}: it must be 'text', 'json_object' or 'json_schema'")
    compact = form.get("compact", False)
    if not isinstance(compact, bool):
        raise TypeError(f"response_format.compact must be True or False, but is {compact!r:.60}")
    inner = form.get("json_schema")
    # llama.cpp and others have the schema at the top, also beside json_object.
    path, schema = "response_format.schema", form.get("schema")
    if inner is not None:
        if not isinstance(inner, Mapping):
            raise TypeError(f"response_format.json_schema must be a dict, not {type(inner).__name__}")
        path, schema = "response_format.json_schema.schema", inner.get("schema")
    if schema is None and kind == "json_object":
        return Constraint("json", {"type": "object"}, compact)
    if schema is None:
        raise ValueError("response_format has no schema: it belongs at json_schema.schema")
    if not isinstance(schema, (Mapping, bool)):
        raise TypeError(f"{path} must be a dict, not {type(schema).__name__}")
    checked = check_json(path, schema)
    check_schema(path, checked)
    return Constraint("json", checked, compact)


def check_schema(path: str, schema: Any) -> None:
    """Raises UnsupportedError for a keyword that cannot be enforced, TypeError for anything but a schema."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise TypeError(f"{path} must be a dict, not {type(schema).__name__}")
    for key in schema:
        if key in NOT_ENFORCED and not (key == "uniqueItems" and schema[key] is False):
            raise UnsupportedError(f"{path}: the keyword {key!r} cannot be enforced")
    least = schema.get("minProperties", 0)
    if isinstance(least, int) and least > max(1, len(schema.get("required", []))):
        # Members of one name would count twice.
        raise UnsupportedError(f"{path}: the keyword 'minProperties' cannot be enforced above the required properties")
    for key in _SCHEMAS:
        if isinstance(schema.get(key), dict):
            check_schema(f"{path}.{key}", schema[key])
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            for i, item in enumerate(schema[key]):
                check_schema(f"{path}.{key}[{i}]", item)
    for key in _DICTS:
        if isinstance(schema.get(key), dict):
            for name, item in schema[key].items():
                check_schema(f"{path}.{key}.{name}", item)


class Grammar:
    """A constraint compiled for a vocabulary.

    Raises ValueError for what does not compile or cannot be met, UnsupportedError for what the engine lacks.
    """

    def __init__(self, constraint: Constraint, tables: Tables) -> None:
        self.constraint = constraint
        self.tables = tables
        source, small = _sources(constraint, tables.symbols, tables)
        self._start: llguidance.LLMatcher = engine().LLMatcher(tables.table, source, log_level=0)
        self._check(self._start)
        self.endings = _endings(constraint, small, tables.symbols)
        self._bytes: llguidance.LLMatcher = engine().LLMatcher(tables.symbols.table, small, log_level=0)

    def _check(self, matcher: llguidance.LLMatcher) -> None:
        if not matcher.is_error():
            return
        message = " ".join(matcher.get_error().split("\n")[0].split())
        if self.constraint.kind == "json" and re.match(r"Unimplemented|Unknown format|oneOf", message):
            raise UnsupportedError(f"the schema cannot be enforced: {message}")
        raise ValueError(f"{_OPTION[self.constraint.kind]} cannot be met, or does not compile: {message}")

    def matcher(self) -> llguidance.LLMatcher:
        """A matcher at the beginning."""
        return self._start.deep_copy()

    def accepts(self, text: str) -> bool:
        """Whether the whole text is one that the constraint takes."""
        data = list(text.encode())
        matcher = self._bytes.deep_copy()
        return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()

    def nearest(self, text: str, most: int) -> str:
        """The text, if the constraint takes it; else its longest head that can be ended, with its ending, of at most
        `most` tokens. Raises ValueError where no text is that short, UnsupportedError where no ending is known."""
        if self.accepts(text):
            return text
        data = list(text.encode())
        n = self._bytes.deep_copy().try_consume_tokens(data)
        back = 1
        while True:
            ending = self.endings(data[:n])
            if ending is not None and len(self.tokens_of([*data[:n], *ending])) <= most:
                return bytes([*data[:n], *ending]).decode()
            if n == 0:
                break
            n, back = max(0, n - back), 2 * back
        if ending is None:
            raise UnsupportedError("no text is known that this constraint takes: it cannot be enforced")
        raise ValueError(
            f"max_gap is {most}, but the constraint's shortest text has {len(self.tokens_of(ending))} tokens"
        )

    def tokens_of(self, symbols: Sequence[int]) -> list[int]:
        """Ids that write these symbols. Raises UnsupportedError where the vocabulary cannot."""
        ids: list[int] = []
        text = bytearray()
        for symbol in symbols:
            if symbol < Symbols.END:
                text.append(symbol)
            else:
                ids += [*self.tables.encode(bytes(text)), self.tables.symbols.markers[symbol - Symbols.END - 1]]
                text.clear()
        return ids + self.tables.encode(bytes(text))

    def parsed(self, data: bytes) -> Any:
        """The value of a finished JSON text; None for other kinds."""
        return json.loads(data) if self.constraint.kind == "json" else None


_OPTION = {
    "json": "response_format",
    "regex": "regex",
    "grammar": "grammar",
    "choices": "choices",
    "calls": "tool_choice",
}


def _sources(constraint: Constraint, symbols: Symbols, tables: Tables) -> tuple[str, str]:
    """The grammar in the engine's notation, for the vocabulary and for bytes."""
    matcher = engine().LLMatcher
    if constraint.kind == "json":
        spaces: dict[str, Any] = {"whitespace_pattern": SPACE}
        if constraint.compact:
            spaces = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
        source = matcher.grammar_from_json_schema(json.dumps(constraint.value), overrides=spaces)
    elif constraint.kind == "regex":
        source = matcher.grammar_from_regex(constraint.value)
    elif constraint.kind == "choices":
        source = matcher.grammar_from_lark("start: " + " | ".join(_literal(text) for text in constraint.value))
    elif constraint.kind == "calls":
        ids = {text: tables.tokenizer.token_id(text) for text in (CALL_OPEN, CALL_CLOSE, QUOTE)}
        if None in ids.values():
            raise UnsupportedError("tool_choice: this vocabulary has no tokens for calls, so that none can be forced")
        large = calls_grammar(constraint.value, lambda text: f"<[{ids[text]}]>")
        small = calls_grammar(constraint.value, lambda text: f"<[{symbols.number[ids[text] or 0]}]>")
        return matcher.grammar_from_lark(large), matcher.grammar_from_lark(small)
    else:
        large = matcher.grammar_from_lark(name_markers(constraint.value, lambda id_: id_, tables))
        return large, matcher.grammar_from_lark(
            name_markers(constraint.value, lambda id_: symbols.number.get(id_, Symbols.END), tables)
        )
    return source, source


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_MARKER = re.compile(r'<\|"\|>|<\|?\w+\|?>')


def name_markers(lark: str, number: Any, tables: Tables) -> str:
    """The grammar with markers of structure (``<|tool_call>``), outside of its strings and expressions, by number."""
    parts = re.split(r'(<\|"\|>|"(?:[^"\\\n]|\\.)*"i?|/(?:[^/\\\n]|\\.)+/[a-z]*|//[^\n]*)', lark)

    def named(found: re.Match[str]) -> str:
        id_ = tables.tokenizer.token_id(found[0])
        return found[0] if id_ is None or id_ not in tables.symbols.number else f"<[{number(id_)}]>"

    return "".join(part if i % 2 and part != QUOTE else _MARKER.sub(named, part) for i, part in enumerate(parts))


def _endings(constraint: Constraint, grammar: str, symbols: Symbols) -> Endings:
    if constraint.kind == "choices":
        return ends_of_choices(constraint.value)
    if constraint.kind == "regex":
        automaton = compile_automaton(constraint.value)
        if automaton is not None:
            return ends_of_automaton(automaton)
    patterns: list[Automaton] = []
    if constraint.kind == "json":
        patterns = [
            found for found in (compile_automaton(p, anywhere=True) for p in _patterns(constraint.value)) if found
        ]
    return search_endings(grammar, symbols, json_text=constraint.kind == "json", patterns=patterns)


def _patterns(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str):
            yield schema["pattern"]
        for value in schema.values():
            yield from _patterns(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _patterns(value)
