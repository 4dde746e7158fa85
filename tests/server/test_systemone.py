"""Typed reads over HTTP, with the bodies that clients of this interface send and what they read of replies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from serving import Running, running

from pydiffgguf import DiffusionModel, demo_model_path
from pydiffgguf.server.settings import digest

QUESTIONS: dict[str, Any] = {
    "angry": {"type": "noul", "instructions": "Is the writer angry?", "criteria": {"true": "yes, very", "false": None}},
    "team": {"type": "choice", "instructions": None, "criteria": {"billing": None, "shipping": {"of": "parcels"}}},
    "urgency": {"type": "score", "instructions": ["How", "urgent?"], "criteria": ["not at all", "somewhat", "very"]},
}
STATE = {"mail": "My parcel has not arrived!", "lines": [1, 2]}
BODY: dict[str, Any] = {"model": "jev-latest", "state": STATE, "questions": QUESTIONS}


@pytest.fixture(scope="module")
def model() -> Iterator[DiffusionModel]:
    with DiffusionModel(demo_model_path(), n_threads=1) as one:
        yield one


def test_every_type_is_answered_in_the_order_asked(server: Running) -> None:
    """With probabilities, their confidence, and a score's mean level with its legend."""
    answer = server.post("/v1/systemone", BODY)
    assert answer.status_code == 200 and answer.headers["x-typesafe-request-id"].startswith("req_")
    assert answer.headers["server-timing"].startswith("model;dur=") and "total;dur=" in answer.headers["server-timing"]
    body = answer.json()
    assert body["model"] == "demo" and list(body["answers"]) == list(QUESTIONS)
    assert body["usage"]["input_tokens"] > 10 and body["usage"]["output_tokens"] == 0
    angry, team, urgency = body["answers"].values()
    assert set(angry) == {"type", "noul"} and 0 <= angry["noul"] <= 1
    assert set(team) == {"type", "choice", "probabilities", "confidence"}
    assert team["choice"] == max(team["probabilities"], key=team["probabilities"].get)
    assert set(urgency) == {"type", "score", "legend", "probabilities", "confidence"}
    assert urgency["legend"] == {"0": "not at all", "1": "somewhat", "2": "very"}
    mean = sum(int(level) * share for level, share in urgency["probabilities"].items())
    assert urgency["score"] == pytest.approx(mean, abs=1e-6)
    for each in (team, urgency):
        assert sum(each["probabilities"].values()) == pytest.approx(1) and 0 <= each["confidence"] <= 1


def test_the_same_request_gets_the_same_answer(server: Running) -> None:
    """The draws are keyed by what is asked."""
    first, second = (server.post("/v1/systemone", BODY).json()["answers"] for _ in range(2))
    assert first == second


def test_one_option_is_certain(server: Running) -> None:
    """Whatever the text is."""
    body = {**BODY, "questions": {"only": {"type": "choice", "instructions": "x", "criteria": {"this": None}}}}
    (answer,) = server.post("/v1/systemone", body).json()["answers"].values()
    assert answer["choice"] == "this" and answer["probabilities"] == {"this": 1.0} and answer["confidence"] == 1.0


@pytest.mark.parametrize("model", ["demo", "jev-preview", "openjev-latest", "openjev-0.1"])
def test_the_names_that_clients_send_are_known(server: Running, model: str) -> None:
    """Besides the server's own."""
    assert server.post("/v1/systemone", {**BODY, "model": model, "verbosity": None}).status_code == 200


def one(question: Any) -> dict[str, Any]:
    return {**BODY, "questions": {"q": question}}


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({**BODY, "model": "gpt-4"}, {"error_type": "api_usage_error", "message": "Unknown model: gpt-4"}),
        (one({"type": "essay"}), {"error_type": "api_usage_error", "message": "Invalid request."}),
        (
            one({"type": "score", "criteria": list("abcdefghijk")}),
            "Too many score levels. Must have at most 10 levels.",
        ),
        (
            one({"type": "choice", "criteria": {str(i): None for i in range(256)}}),
            "Too many choices. Must have at most 255 choices.",
        ),
        (one({"type": "choice", "criteria": {}}), "Choice question must have at least one choice: q"),
        (one({"type": "box"}), "images are not supported"),
        ({**BODY, "images": ["data:"]}, "images are not supported"),
    ],
)
def test_what_makes_no_sense_is_refused_in_these_words(server: Running, body: Any, detail: Any) -> None:
    """Status 400, under "detail"."""
    answer = server.post("/v1/systemone", body)
    assert answer.status_code == 400 and answer.json() == {"detail": detail}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"state": None}, "state"),
        ({"state": 5}, "state"),
        ({"questions": []}, "questions"),
        ({"questions": {}}, "questions"),
    ],
)
def test_a_wrong_shape_is_told_as_a_list(server: Running, change: Any, place: str) -> None:
    """Status 422, each fault with its place."""
    answer = server.post("/v1/systemone", {**BODY, **change})
    (fault,) = answer.json()["detail"]
    assert answer.status_code == 422 and fault["loc"] == ["body", place] and {"type", "msg", "input"} <= set(fault)


def test_a_fields_range_is_checked(server: Running) -> None:
    """Samples, steps and thoughts."""
    for change in ({"samples": 33}, {"steps": 0}, {"think": -1}):
        answer = server.post("/v1/systemone", {**BODY, **change})
        assert answer.status_code == 400 and next(iter(change)) in answer.json()["detail"]["message"]


def test_a_missing_key_is_403_here_and_a_wrong_one_401() -> None:
    """Under "detail", as its client reads it."""
    with running(key_digests=(digest("k"),)) as locked:
        missing = locked.post("/v1/systemone", BODY)
        wrong = locked.post("/v1/systemone", BODY, Authorization="Bearer x")
        right = locked.post("/v1/systemone", BODY, Authorization="Bearer k")
    assert missing.status_code == 403 and missing.json()["detail"]["error_type"] == "authentication_error"
    assert wrong.status_code == 401 and right.status_code == 200
