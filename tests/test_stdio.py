"""`infill --stdio` and `--json-lines`: every line is an object, and every request is answered."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pydiffgguf import DiffusionModel, cli, demo_model_path
from pydiffgguf.cli.json_lines import LineWriter
from pydiffgguf.cli.stdio import Stdio

MODEL = str(demo_model_path())
PREFIX, SUFFIX = "On Sunday Emma found a", " in the school."


@pytest.fixture(scope="module")
def model() -> Iterator[DiffusionModel]:
    with DiffusionModel(MODEL) as model:
        yield model


def answers(model: DiffusionModel, *requests: Any, **options: Any) -> list[dict[str, Any]]:
    """The lines that come back; a request that is bytes is sent as it is."""
    lines = [request if isinstance(request, bytes) else json.dumps(request).encode() for request in requests]
    out = io.StringIO()
    Stdio(model, options, lines, LineWriter(out)).run()
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_request_gets_what_infill_returns(model: DiffusionModel) -> None:
    """Its own options go before the command line's."""
    expected = model.infill(PREFIX, SUFFIX, gap=3, seed=5)
    ready, answer = answers(
        model, {"id": "a", "prefix": PREFIX, "suffix": SUFFIX, "options": {"gap": 3}}, gap=1, seed=5
    )
    assert ready == {"event": "ready", "model": MODEL, "n_ctx": model.n_ctx}
    assert (answer["id"], answer["event"], answer["text"]) == ("a", "result", expected.text)
    assert answer["gap_tokens"] == expected.gap_tokens == 3


def test_drafts_are_lines(model: DiffusionModel) -> None:
    """First the prompt, then steps, then the block and the result, all with the request's id."""
    lines = answers(model, {"id": 7, "prefix": PREFIX, "suffix": SUFFIX, "options": {"gap": 2}, "drafts": True})[1:]
    assert {line["id"] for line in lines} == {7}
    events = [line["event"] for line in lines]
    assert events[0] == "prefill"
    assert "step" in events
    assert events[-1] == "result"
    step = next(line for line in lines if line["event"] == "step")
    assert step["step"] >= 1
    assert 0 <= step["accepted"] <= step["free"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (b"nonsense", "Expecting value"),
        (b"\xff", "utf-8"),
        ([1], "a request is an object"),
        ({"prefix": "x"}, "id must be a number or a string"),
        ({"id": True}, "id must be a number or a string"),
        ({"id": 1, "prefix": 2}, "prefix must be a string"),
        ({"id": 1, "options": []}, "options must be an object"),
        ({"id": 1, "drafts": 1}, "drafts must be true or false"),
        ({"id": 1, "text": ""}, "unknown field 'text'"),
        ({"id": 1, "options": {"cancel": 1}}, "a request is cancelled by"),
        ({"id": 1, "prefix": PREFIX, "suffix": SUFFIX, "options": {"foo": 1}}, "unknown option 'foo'"),
        ({"id": 1, "prefix": PREFIX, "suffix": SUFFIX, "options": {"steps": 0}}, "steps is 0"),
        ({"cancel": 1, "id": 2}, "a cancellation is"),
    ],
)
def test_a_bad_request_is_answered(model: DiffusionModel, request_: Any, message: str) -> None:
    """With an error, and the next one is filled."""
    good = {"id": 2, "prefix": PREFIX, "suffix": SUFFIX, "options": {"gap": 1}}
    _, *lines = answers(model, request_, good)
    by_event = {line["event"]: line for line in lines}
    assert message in by_event["error"]["message"]
    assert by_event["result"]["id"] == 2


def test_requests_are_cancelled_and_superseded(model: DiffusionModel) -> None:
    """A cancelled one has its result; those behind it are filled; an id may come again once it was answered."""
    long = {"prefix": PREFIX, "suffix": SUFFIX, "options": {"gap": 4, "steps": 3000, "stability_threshold": 2900}}
    out = io.StringIO()
    begun = threading.Event()

    class Writer(LineWriter):
        def write(self, value: Any) -> None:
            super().write(value)
            if value["event"] == "step":
                begun.set()

    def lines() -> Iterator[bytes]:
        yield json.dumps({"id": 1, "drafts": True, **long}).encode()
        assert begun.wait(30)
        yield json.dumps({"id": 1, **long}).encode()
        yield json.dumps({"id": 2, **long}).encode()
        yield json.dumps({"cancel": 2}).encode()
        yield json.dumps({"id": 3, "prefix": PREFIX, "suffix": SUFFIX, "supersede": True}).encode()

    Stdio(model, {}, lines(), Writer(out)).run()
    last = [line for line in map(json.loads, out.getvalue().splitlines()) if line["event"] in ("result", "error")]
    assert "request 1 is not answered yet" in last[0]["message"]
    reasons = {line["id"]: line["finish_reason"] for line in last[1:]}
    assert reasons == {1: "cancelled", 2: "cancelled", 3: "stop"}


def test_the_process_stays_until_stdin_ends() -> None:
    """As an editor starts it."""
    request = json.dumps({"id": 1, "prefix": PREFIX, "suffix": SUFFIX}) + "\n"
    process = subprocess.run(
        [sys.executable, "-m", "pydiffgguf", "infill", "--stdio", MODEL, "--gap", "2"],
        input=request,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (process.returncode, process.stderr) == (0, "")
    ready, answer = map(json.loads, process.stdout.splitlines())
    assert ready["event"] == "ready"
    assert answer["gap_tokens"] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", MODEL, "-p", "Put in order: 9 7 1.", "--seed", "7"],
        ["infill", MODEL, "--template", "On Sunday Emma found a<gap/> in the school."],
        ["infill", MODEL, "--template", "On Sunday<gap max=2/> found a<gap max=2/> in the school."],
    ],
)
def test_json_lines_end_in_the_result(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """Which is the object of --json; the lines before it are events."""
    assert cli.main([*arguments, "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert cli.main([*arguments, "--json-lines"]) == 0
    *events, result = map(json.loads, capsys.readouterr().out.splitlines())
    assert result.pop("event") == "result"
    assert result["text"] == expected["text"]
    assert set(result) == set(expected)
    assert events[0]["event"] == "prefill"
    assert {event["event"] for event in events} >= {"prefill", "step"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["infill", "--stdio", MODEL, "file.txt"],
        ["infill", "--stdio", MODEL, "--json"],
        ["infill", MODEL, "--template", "a<gap/>b", "--json", "--json-lines"],
        ["generate", MODEL, "-p", "x", "--json", "--json-lines"],
    ],
)
def test_outputs_exclude_each_other(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """Bad usage, before the model is opened."""
    with pytest.raises(SystemExit) as info:
        cli.main(arguments)
    assert info.value.code == 2
    assert "leave out" in (err := capsys.readouterr().err) or "exclude each other" in err or "goes with neither" in err
