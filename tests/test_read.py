"""Typed questions, answered by probabilities that are read off the canvas."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pydiffgguf import DiffusionModel, demo_model_path

STATE = "The red box has 5 coins. Emma took the box home."
QUESTIONS: dict[str, dict[str, Any]] = {
    "red": {"type": "noul", "instructions": "Is the box red?"},
    "who": {
        "type": "choice",
        "instructions": "Who took it?",
        "criteria": {"Emma": None, "Leo": "her friend", "Mia": ""},
    },
    "size": {"type": "score", "instructions": "How big is it?", "criteria": ["tiny", "small", "big"]},
    "coins": {"type": "number", "instructions": "How many coins?", "minimum": 0, "maximum": 9},
}


@pytest.fixture(scope="module")
def model() -> Iterator[DiffusionModel]:
    with DiffusionModel(demo_model_path()) as model:
        yield model


def test_each_type_has_its_value(model: DiffusionModel) -> None:
    """Probabilities sum to one; value, confidence and error follow from them."""
    answers = model.read(STATE, QUESTIONS)
    assert list(answers) == list(QUESTIONS)
    for answer in answers.values():
        p = np.array(list(answer.probabilities.values()))
        assert p.sum() == pytest.approx(1.0)
        entropy = -(p * np.log(p)).sum()
        assert answer.confidence == pytest.approx(1 - entropy / math.log(len(p)))
        assert (answer.standard_error is None) == (answer.draws == 1)
    red, who, size, coins = answers.values()
    assert list(red.probabilities) == ["yes", "no"] and red.value == red.probabilities["yes"]
    assert who.value == max(who.probabilities, key=lambda name: who.probabilities[name])
    assert list(who.probabilities) == ["Emma", "Leo", "Mia"]
    assert size.value == pytest.approx(sum(i * p for i, p in enumerate(size.probabilities.values())))
    assert list(coins.probabilities) == [str(i) for i in range(10)]
    assert model.read(STATE, {"x": {**QUESTIONS["red"], "type": "boolean"}})["x"].type == "noul"


def test_probabilities_are_those_that_choose_weighs(model: DiffusionModel) -> None:
    """The softmax over the labels in the slot, as `choose` has it, averaged over the draws."""
    question = {"type": "choice", "instructions": "Which?", "criteria": ["one", "two", "three"]}
    read = model.read("x", {"q": question}, samples=3, seed=7)["q"]
    prompt = model.detokenize(model._engine.pool.sessions()[-1].tokens().tolist())
    engine = model._engine
    ids = model.tokenize(prompt)
    with engine.pool.take(ids, _call()) as session:
        assert session.n_past  # the prompt is there
        stats = _stats(len(ids))
        from pydiffgguf.generate import encode_prompt
        from pydiffgguf.read import log_probabilities

        for _ in encode_prompt(session, ids, stats, _call()):
            pass
        head, tail = model.tokenize("q1: ", special=False), model.tokenize("\n", special=False)
        labels = [model.tokenize(text, special=False)[0] for text in "ABC"]
        table = []
        for draw in range(3):
            logs = log_probabilities(session, [*head, -1, *tail], [len(head)], 7, draw, stats)[0, labels]
            table.append(np.exp(logs) / np.exp(logs).sum())
    np.testing.assert_allclose(list(read.probabilities.values()), np.mean(table, axis=0), rtol=1e-12)


def _call() -> Any:
    from pydiffgguf.engine.call import Call

    return Call(None)


def _stats(n: int) -> Any:
    from pydiffgguf import Stats

    return Stats(seed=7, prompt_tokens=n)


def test_more_draws_are_made_where_it_is_unsure(model: DiffusionModel) -> None:
    """Four where a slot's entropy is over a tenth of a nat, else one; or as many as were asked for."""
    unsure = model.read("x", {"q": {"type": "noul", "instructions": "?"}})
    assert unsure["q"].draws == 4 and unsure.stats.steps == [1] * 4
    sure = model.read("x", {"q": {"type": "choice", "criteria": ["the only one"]}})
    assert sure["q"].draws == 1 and sure["q"].confidence == 1.0 and sure["q"].value == "the only one"
    assert model.read("x", {"q": {"type": "noul"}}, samples=2)["q"].draws == 2


def test_the_same_request_has_the_same_answer(model: DiffusionModel) -> None:
    first, second = model.read(STATE, QUESTIONS), model.read(STATE, QUESTIONS)
    assert first == second
    assert model.read(STATE, QUESTIONS, seed=1) != first


def test_answers_that_are_known_are_in_sight(model: DiffusionModel) -> None:
    """depends_on and sequential put them on the canvas; several questions at once take one pass, in order three."""
    dependent = {**QUESTIONS, "who": {**QUESTIONS["who"], "depends_on": ["red"]}}
    together, chained = model.read(STATE, QUESTIONS, samples=1), model.read(STATE, dependent, samples=1)
    assert len(together.stats.steps) == 1 and len(chained.stats.steps) == 2
    assert chained["who"] != together["who"]
    assert list(chained) == list(QUESTIONS)
    one_by_one = model.read(STATE, QUESTIONS, samples=1, sequential=True)
    assert len(one_by_one.stats.steps) == len(QUESTIONS)


def test_more_questions_than_a_canvas_holds(model: DiffusionModel) -> None:
    questions = {f"q{i}": {"type": "noul", "instructions": "Is it?"} for i in range(30)}
    answers = model.read("x", questions, samples=1)
    assert list(answers) == list(questions) and len(answers.stats.steps) > 1


def test_a_thought_and_more_steps(model: DiffusionModel) -> None:
    answers = model.read(STATE, QUESTIONS, think=20, steps=3, samples=1)
    assert answers.stats.steps == [3]
    assert sum(answers["who"].probabilities.values()) == pytest.approx(1.0)


def test_a_question_costs_little_beside_the_pass(model: DiffusionModel) -> None:
    """31 ms a question at most, measured with four of them."""
    model.read(STATE, QUESTIONS, samples=1)
    began = time.perf_counter()
    answers = model.read(STATE, QUESTIONS, samples=1)
    spent = time.perf_counter() - began - answers.stats.denoise_s - answers.stats.prefill_s
    assert spent / len(QUESTIONS) < 0.031


@pytest.mark.parametrize(
    ("questions", "error", "text"),
    [
        ([], TypeError, "questions must be a dict"),
        ({}, ValueError, "there are 0 questions"),
        ({"a": "x"}, TypeError, r"questions\['a'\] must be a dict"),
        ({"a": {"type": "box"}}, ValueError, r"questions\['a'\].type is 'box': it must be one of noul"),
        ({"a": {"type": "noul", "criterion": 1}}, ValueError, "unknown key 'criterion'"),
        ({"a": {"type": "choice", "criteria": {}}}, ValueError, "has 0 choices: it must be from 1 to 255"),
        ({"a": {"type": "choice"}}, TypeError, "criteria must be a dict of descriptions by name"),
        ({"a": {"type": "score", "criteria": ["x"] * 11}}, ValueError, "has 11 levels: it must be from 1 to 10"),
        ({"a": {"type": "number", "minimum": 1, "maximum": 1}}, ValueError, "must be below maximum"),
        ({"a": {"type": "noul", "depends_on": ["b"]}}, ValueError, "names 'b', which is no other question"),
        (
            {"a": {"type": "noul", "depends_on": ["b"]}, "b": {"type": "noul", "depends_on": ["a"]}},
            ValueError,
            "'a' depends on itself, by way of others",
        ),
    ],
)
def test_wrong_questions_are_named(model: DiffusionModel, questions: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        model.read("x", questions)


def test_options_out_of_range_are_refused(model: DiffusionModel) -> None:
    question = {"q": {"type": "noul"}}
    for options, text in [
        ({"steps": 0}, "steps is 0"),
        ({"samples": 0}, "samples is 0"),
        ({"think": -1}, "think is -1"),
    ]:
        with pytest.raises(ValueError, match=text):
            model.read("x", question, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="state must be a str or a JSON value"):
        model.read(1, question)  # type: ignore[arg-type]
