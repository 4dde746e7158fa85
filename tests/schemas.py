"""Random JSON schemas of the kind that constraints enforce, each satisfiable."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

NAMES = st.sampled_from(["a", "b", "id", "name", "value", "x-y", "größe", 'q"t', "kids"])
PATTERNS = ["^[A-Z]{2}-\\d{3}$", "needle", "^(ab|c)+$", "^x?y*z$", "\\d"]
FORMATS = ["date", "time", "date-time", "email", "uuid", "ipv4", "hostname", "uri"]

TEXTS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({"type": "string"}),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 6),
        st.integers(0, 5),
    ),
    st.builds(lambda pattern: {"type": "string", "pattern": pattern}, st.sampled_from(PATTERNS)),
    st.builds(lambda form: {"type": "string", "format": form}, st.sampled_from(FORMATS)),
)
NUMBERS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({"type": "integer"}),
    st.just({"type": "number"}),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-50, 2000),
        st.integers(0, 99),
    ),
    st.builds(lambda by: {"type": "integer", "multipleOf": by, "minimum": 1}, st.integers(1, 12)),
    st.builds(lambda low: {"type": "number", "exclusiveMinimum": low, "maximum": low + 1}, st.integers(-3, 9)),
)
CONSTANTS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": "fixed"}, {"const": 7}]),
    st.lists(st.sampled_from(["red", "green", 'a"b', 1, 2.5, None, True]), min_size=1, max_size=4, unique_by=repr).map(
        lambda values: {"enum": values}
    ),
)


def _object(properties: dict[str, Any], n_required: int, closed: bool) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "object", "properties": properties, "required": list(properties)[:n_required]}
    return {**made, "additionalProperties": False} if closed else made


def _compound(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.builds(_object, st.dictionaries(NAMES, inner, max_size=4), st.integers(0, 4), st.booleans()),
        st.builds(
            lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
            inner,
            st.integers(0, 3),
            st.integers(0, 2),
        ),
        st.builds(
            lambda items: {"type": "array", "prefixItems": items, "minItems": len(items)}, st.lists(inner, max_size=3)
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    )


#: Any of them.
SCHEMAS: st.SearchStrategy[dict[str, Any]] = st.recursive(TEXTS | NUMBERS | CONSTANTS, _compound, max_leaves=8)

#: Some by hand: recursion, many fields, one branch far longer than the other.
FIXED: dict[str, dict[str, Any]] = {
    "any object": {"type": "object"},
    "a list of numbers": {"type": "array", "items": {"type": "number"}, "minItems": 2},
    "a linked list": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "integer"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "a tree": {
        "$defs": {
            "t": {
                "type": "object",
                "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/t"}}},
                "required": ["kids"],
            }
        },
        "$ref": "#/$defs/t",
    },
    "twenty fields": {
        "type": "object",
        "properties": {f"p{i}": {"type": "string"} for i in range(20)},
        "required": [f"p{i}" for i in range(20)],
        "additionalProperties": False,
    },
    "one long branch": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"k": {"type": "array", "items": {"type": "string", "minLength": 5}, "minItems": 12}},
                "required": ["k"],
            },
            {"type": "string"},
        ]
    },
    "all of two": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "string", "format": "email"}}, "required": ["b"]},
        ]
    },
}

#: Expressions in Rust's and Python's syntax alike, `.` for anything but a line end.
REGEXES = [
    r"\d{4}-\d{2}-\d{2}",
    r"[a-c]+(x|yy)?",
    r".*needle.*",
    r"(yes|no|maybe), because .{10,}\.",
    r"[\w.+-]+@[a-z]+\.[a-z]{2,3}",
    r"-?\d+(\.\d+)?([eE]-?\d+)?",
    r"(ab{2,4}c?){3}",
    "[äöü]+ß",
]
