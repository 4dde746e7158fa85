"""Answers that obey a schema, an expression, a grammar or choices, whatever the model writes."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemas import FIXED, REGEXES, SCHEMAS

from pydiffgguf import DenoiseStep, DiffusionModel, Generation, UnsupportedError, demo_model_path
from pydiffgguf import generate as generate_module
from pydiffgguf._binding.records import Mask, RawStep
from pydiffgguf.engine.call import drain
from pydiffgguf.generate import stream_ids
from pydiffgguf.structured.automaton import compile_automaton
from pydiffgguf.text.tools import check_tool_choice, check_tools

TASKS = Path(__file__).parent / "data" / "demo_tasks.jsonl"


@pytest.fixture(scope="module")
def model() -> Iterator[DiffusionModel]:
    with DiffusionModel(demo_model_path()) as model:
        yield model


class Random:
    """Stands in for a CanvasBatch whose model knows nothing: every step's argmax is drawn anew, within the rules. Each
    canvas makes a few steps, and often says that it has converged."""

    seed = 0
    n_vocab = 896
    n_rows = 64
    made = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        Random.made += 1
        self._rng = np.random.default_rng([Random.seed, Random.made])
        self._step = 0
        self._pinned = np.full(self.n_rows, -1, dtype=np.int32)
        self._masks: dict[int, Mask] = {}

    def rules(self, index: int, pinned: Any, masks: dict[int, Mask]) -> None:
        assert index == 0
        for row, mask in masks.items():
            assert mask.any() and (pinned[row] < 0)
        assert (self._pinned[self._pinned >= 0] == pinned[self._pinned >= 0]).all(), "a pin was taken back"
        self._pinned, self._masks = pinned, masks

    def step(self) -> list[RawStep]:
        argmax = self._rng.integers(0, self.n_vocab, self.n_rows).astype(np.int32)
        argmax[self._rng.random(self.n_rows) < 0.2] = 106  # an end, here and there
        for row, mask in self._masks.items():
            argmax[row] = self._rng.choice(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")))
        argmax = np.where(self._pinned >= 0, self._pinned, argmax)
        self._step += 1
        last = self._step == 6
        converged = bool(self._rng.random() < 0.5)
        zeros = np.zeros(self.n_rows)
        self._last = RawStep(
            argmax, argmax, zeros > 0, zeros, self._step - 1, 6, last or converged, converged, 0.0, None
        )
        return [self._last]

    def rows(self, index: int) -> RawStep:
        return self._last


@pytest.fixture
def knows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_module, "CanvasBatch", Random)


def shortest(model: DiffusionModel, **constraint: Any) -> int:
    """Tokens of the shortest answer, as the refusal of fewer tells; 1 where nothing is shorter."""
    try:
        model.generate("x", max_tokens=1, **constraint)
    except ValueError as error:
        found = re.search(r"needs at least (\d+)$", str(error))
        assert found, error
        return int(found[1])
    return 1


def json_format(schema: dict[str, Any], compact: bool = False) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}, "compact": compact}


def check_json(result: Generation, schema: dict[str, Any]) -> None:
    assert result.parsed == json.loads(result.text)
    jsonschema.Draft202012Validator(schema).validate(result.parsed)
    assert result.stats.constraint is not None
    assert result.finish_reason in ("stop", "length")


def check_budgets(model: DiffusionModel, constraint: dict[str, Any], check: Any) -> None:
    """Valid at the shortest budget, a little above it, and over more than one canvas."""
    least = shortest(model, **constraint)
    for seed, budget in enumerate((least, least + 1, least + 7, 64, 96)):
        if budget >= least:
            Random.seed = seed
            result = model.generate("x", seed=seed, max_tokens=budget, **constraint)
            assert len(result.tokens) <= budget
            check(result)


@pytest.mark.usefixtures("knows_nothing")
@pytest.mark.parametrize("compact", [False, True], ids=["spaces", "compact"])
@pytest.mark.parametrize("name", FIXED)
def test_schemas_hold_for_a_model_that_knows_nothing(model: DiffusionModel, name: str, compact: bool) -> None:
    schema = FIXED[name]
    form = json_format(schema, compact)
    check_budgets(model, {"response_format": form}, lambda result: check_json(result, schema))


@pytest.mark.usefixtures("knows_nothing")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS)
def test_random_schemas_hold_for_a_model_that_knows_nothing(model: DiffusionModel, schema: dict[str, Any]) -> None:
    """benchmarks/structured.py does the same a thousand times, on nets too."""
    check_budgets(model, {"response_format": json_format(schema)}, lambda result: check_json(result, schema))


@pytest.mark.usefixtures("knows_nothing")
@pytest.mark.parametrize("regex", REGEXES)
def test_expressions_hold_for_a_model_that_knows_nothing(model: DiffusionModel, regex: str) -> None:
    def check(result: Generation) -> None:
        assert re.fullmatch(regex, result.text)
        assert result.parsed is None

    check_budgets(model, {"regex": regex}, check)


@pytest.mark.usefixtures("knows_nothing")
def test_grammars_and_choices_hold_for_a_model_that_knows_nothing(model: DiffusionModel) -> None:
    sums = 'start: sum\nsum: NUM | "(" sum "+" sum ")"\nNUM: /[0-9]+/\n'

    def is_sum(text: str) -> bool:
        while (less := re.sub(r"\(\d+\+\d+\)", "1", text)) != text:
            text = less
        return text.isdecimal()

    check_budgets(model, {"grammar": sums}, lambda result: is_sum(result.text) or pytest.fail(result.text))
    choices = ["yes", "no", "I don't know", 'a "quoted" one', "yes, but"]
    check_budgets(model, {"choices": choices}, lambda result: result.text in choices or pytest.fail(result.text))


def tool(name: str, parameters: dict[str, Any] | None) -> dict[str, Any]:
    function = {"name": name, "description": "x", **({} if parameters is None else {"parameters": parameters})}
    return {"type": "function", "function": function}


PLACE = {
    "type": "object",
    "properties": {"lat": {"type": "number"}, "at sea": {"type": "boolean"}},
    "required": ["lat"],
}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": ["integer", "null"]},
        "unit": {"type": "string", "enum": ["C", "F", ""]},
        "where": {"$ref": "#/$defs/place"},
        "tags": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"const": 7}]}},
    },
    "required": ["city", "where"],
    "$defs": {"place": PLACE},
}


@pytest.mark.usefixtures("knows_nothing")
@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_forced_call_is_one(model: DiffusionModel, tmp_path: Path, choice: str) -> None:
    """Of a model that knows nothing: exactly one, of a tool that was offered, with arguments of its types, whatever the
    budget; a tool without parameters is called without."""
    tools = [tool("get_weather", PARAMETERS), tool("now", None)]
    forced = "required" if choice == "required" else tools[0]
    offered = check_tool_choice(forced, check_tools(tools)).forced
    ids = model.chat_tokens([{"role": "user", "content": "Rain?"}])
    names = set()
    for seed in range(8):
        Random.seed = seed
        result = drain(stream_ids(model._engine, ids, {"seed": seed, "max_tokens": 60 + seed}, forced=offered))
        [call] = result.tool_calls
        assert result.text == ""
        names.add(call["function"]["name"])
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "now":
            assert arguments == {}
        else:
            jsonschema.Draft202012Validator({**PARAMETERS, "additionalProperties": False}).validate(arguments)
    assert names <= {made.name for made in offered}


def test_a_call_cannot_be_forced_into_a_form(model: DiffusionModel) -> None:
    ids = model.chat_tokens([{"role": "user", "content": "Rain?"}])
    with pytest.raises(ValueError, match="tool_choice forces a call: no other constraint"):
        stream_ids(model._engine, ids, {"regex": "a"}, forced=check_tools([tool("now", None)]))


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}, "why": {"type": "string"}},
    "required": ["answer", "why"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("constraint", "check"),
    [
        ({"response_format": json_format(SCHEMA)}, lambda r: check_json(r, SCHEMA)),
        ({"response_format": {"type": "json_object"}}, lambda r: check_json(r, {"type": "object"})),
        ({"regex": r"\d+ is (more|less) than \d+\."}, lambda r: re.fullmatch(r"\d+ is (more|less) than \d+\.", r.text)),
        ({"choices": ["yes", "no"]}, lambda r: r.text in ("yes", "no") or pytest.fail(r.text)),
    ],
)
def test_the_demo_model_obeys(model: DiffusionModel, constraint: Any, check: Any) -> None:
    """In chat, in generate, in a stream whose drafts say how much is valid; the same seed gives the same text."""
    messages = [{"role": "user", "content": "Compare 3 and 5."}]
    result = model.chat(messages, seed=3, max_tokens=60, **constraint)
    check(result)
    stream = model.stream_chat(messages, seed=3, max_tokens=60, **constraint)
    drafts = [event for event in stream if isinstance(event, DenoiseStep)]
    assert stream.result.text == result.text
    assert all(draft.valid_tokens is not None for draft in drafts)
    assert stream.result.stats.constraint is not None
    assert stream.result.stats.constraint.engine.startswith("llguidance")


def test_what_the_model_writes_anyway_costs_little(model: DiffusionModel) -> None:
    """Questions whose answers match the expression: as many are right with it as without, with at most a step more for
    each: a first step's refusals are masked from the second on."""
    rows = [json.loads(line) for line in TASKS.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["kind"] == "question"][:20]
    right, steps = [0, 0], [0, 0]
    for row in rows:
        for i, constraint in enumerate(({}, {"regex": r"[A-Za-z0-9 .,']+"})):
            result = model.generate(row["prompt"], seed=row["id"], **constraint)  # type: ignore[arg-type]
            right[i] += result.text.strip() == row["answer"]
            steps[i] += sum(result.stats.steps)
    assert right[1] >= right[0] >= 18
    assert steps[1] <= steps[0] + len(rows)


def test_a_thought_may_come_before_the_answer(model: DiffusionModel) -> None:
    messages = [{"role": "user", "content": "Compare 3 and 5."}]
    for seed in range(3):
        for thinking in (True, 20):
            result = model.chat(messages, seed=seed, thinking=thinking, regex="[ab]+c")
            assert re.fullmatch("[ab]+c", result.text)


class Thinker(Random):
    """Thinks first: a thought of some tokens, which may go on over several canvases or stop short at an end token."""

    def step(self) -> list[RawStep]:
        [step] = super().step()
        assert self._last is step
        opening, closing, end = self.markers
        length = int(self._rng.integers(2, 80))
        thought = np.full(self.n_rows, 300, dtype=np.int32)
        if Random.made == 1:
            thought[0] = opening
        if length < self.n_rows:
            thought[length] = closing if self._rng.random() < 0.7 else end
        rows = np.arange(self.n_rows) <= length
        free = (self._pinned < 0) & ~np.isin(np.arange(self.n_rows), list(self._masks))
        argmax = np.where(rows & free & (Random.thinks > 0), thought, step.argmax)
        Random.thinks -= int(step.finished and closing in argmax)
        self._last = replace(step, argmax=argmax)
        return [self._last]


@pytest.mark.parametrize("thinking", [True, 20])
def test_thoughts_of_a_model_that_knows_nothing(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch, thinking: bool | int
) -> None:
    """Whatever it thinks, for however long, the answer obeys, the thought is closed once and keeps its limit."""
    tokenizer = model.tokenizer
    opening, closing = (tokenizer.token_id(marker) for marker in ("<|channel>", "<channel|>"))
    monkeypatch.setattr(Thinker, "markers", (opening, closing, 106), raising=False)
    monkeypatch.setattr(generate_module, "CanvasBatch", Thinker)
    for seed in range(40):
        monkeypatch.setattr(Random, "seed", seed)
        monkeypatch.setattr(Random, "made", 0)
        monkeypatch.setattr(Random, "thinks", 1, raising=False)
        messages = [{"role": "user", "content": "x"}]
        result = model.chat(messages, seed=seed, thinking=thinking, max_tokens=150, regex="[ab]+c[0-9]{2,20}d")
        assert re.fullmatch("[ab]+c[0-9]{2,20}d", result.text), result.text
        thought = result.tokens.index(closing) if closing in result.tokens else 0
        assert closing not in result.tokens[thought + 1 :]
        assert thinking is True or thought <= thinking


def test_threads_change_nothing(model: DiffusionModel) -> None:
    texts = []
    for n_threads in (1, 3):
        with DiffusionModel(demo_model_path(), n_threads=n_threads) as other:
            texts.append(other.generate("Hi", seed=5, response_format=json_format(SCHEMA), max_tokens=80).text)
    assert texts[0] == texts[1]


def test_a_time_limit_leaves_a_document(model: DiffusionModel) -> None:
    """After the step under way, or none at all."""
    for limit in (1e-9, 0.02):
        result = model.generate("Hi", seed=1, time_limit_s=limit, response_format=json_format(SCHEMA), max_tokens=500)
        check_json(result, SCHEMA)
        assert result.finish_reason == "length"


def test_a_cancelled_answer_is_no_document(model: DiffusionModel) -> None:
    cancel = threading.Event()
    cancel.set()
    result = model.generate("Hi", cancel=cancel, response_format=json_format(SCHEMA))
    assert result.finish_reason == "cancelled"
    assert result.parsed is None


def test_a_gap_obeys(model: DiffusionModel) -> None:
    """Fillings that fit come first; others are changed into the nearest text that does, of at most max_gap tokens."""
    before, behind = "The box has ", " coins.\n"
    for regex in (r"\d+", r"[a-z]+ing", "(x|yy){2}"):
        filled = model.infill(before, behind, max_gap=8, n=3, seed=2, regex=regex)
        assert filled.candidates
        for candidate in filled.candidates:
            assert re.fullmatch(regex, candidate.text)
            assert len(model.tokenize(candidate.text)) <= 8
        assert filled.text == filled.candidates[0].text
    chosen = model.infill(before, behind, gap=2, seed=1, choices=["five", "no", "a lot of"])
    assert chosen.text in ("five", "no", "a lot of")
    free = model.infill(before, behind, gap=2, seed=1)
    assert model.infill(before, behind, gap=2, seed=1, choices=["?", free.text]).text == free.text
    with pytest.raises(ValueError, match="max_gap is 2, but the constraint's shortest text has"):
        model.infill(before, behind, gap=2, regex="[a-c]{40}")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"regex": "a", "choices": ["b"]}, ValueError, "regex and choices cannot be given together"),
        ({"regex": "a", "stop": "b"}, ValueError, "stop cannot be given beside a constraint"),
        ({"regex": ""}, ValueError, "regex is empty"),
        ({"regex": 1}, TypeError, "regex must be a str"),
        ({"regex": "("}, ValueError, "regex cannot be met, or does not compile"),
        ({"regex": "(?=a)b"}, ValueError, "regex cannot be met, or does not compile"),
        ({"grammar": "start: nothing"}, ValueError, "grammar cannot be met, or does not compile"),
        ({"choices": "yes"}, TypeError, "choices must be a list of strings"),
        ({"choices": []}, ValueError, "choices is empty"),
        ({"response_format": "json"}, TypeError, "response_format must be a dict"),
        ({"response_format": {"type": "xml"}}, ValueError, "response_format.type is 'xml'"),
        ({"response_format": {"type": "json_schema"}}, ValueError, "response_format has no schema"),
        ({"response_format": {"type": "json_object", "compact": 1}}, TypeError, "compact must be True or False"),
        (
            {"response_format": json_format({"type": "string", "minLength": 5, "maxLength": 3})},
            ValueError,
            "Unsatisfiable",
        ),
        (
            {"response_format": json_format({"type": "string", "minLength": 50}), "max_tokens": 9},
            ValueError,
            "at least",
        ),
        ({"response_format": json_format({"type": "string", "format": "postcode"})}, UnsupportedError, "postcode"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    model: DiffusionModel, options: Any, error: type[Exception], text: str
) -> None:
    """Before the first event, with the reason."""
    with pytest.raises(error, match=text):
        model.stream("Hi", **options)


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {"type": "string"}},
        {"type": "array", "uniqueItems": True},
        {"type": "array", "contains": {"type": "integer"}},
        {"type": "object", "properties": {"a": {"if": {"type": "string"}}}},
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        {"anyOf": [{"type": "object", "propertyNames": {"pattern": "x"}}]},
        {"$defs": {"x": {"unevaluatedProperties": False}}, "type": "string"},
        {"type": "object", "minProperties": 3},
    ],
)
def test_keywords_that_cannot_be_enforced_are_named(model: DiffusionModel, schema: dict[str, Any]) -> None:
    """With the path; nothing is ignored."""
    with pytest.raises(
        UnsupportedError, match=r"^response_format\.json_schema\.schema.*keyword '\w+' cannot be enforced"
    ):
        model.stream("Hi", response_format=json_format(schema))


@given(st.sampled_from([*REGEXES, r"a{0,3}b?", r"(a|ab)(c|bcd)d*", "[^a-z]{2}", "(?i)yes|no"]), st.binary(max_size=6))
def test_an_automaton_knows_the_shortest_way_out(pattern: str, head: bytes) -> None:
    """Its ending makes a match of whatever can be made one, and of nothing else."""
    automaton = compile_automaton(pattern)
    assert automaton is not None
    text = head.decode(errors="ignore")
    assert automaton.matches(text) == bool(re.fullmatch(pattern, text))
    ending = automaton.ending(text.encode())
    if ending is not None:
        assert re.fullmatch(pattern, text + ending.decode())
        if ending:
            assert not re.fullmatch(pattern, text)


def test_llguidance_is_asked_for_where_it_is_missing(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with DiffusionModel(demo_model_path()) as other, pytest.raises(UnsupportedError, match=r"pip install .*structured"):
        other.stream("Hi", regex="a")
