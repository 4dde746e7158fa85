"""Whatever a body holds, the answer is a refusal or a reply, and the server goes on. `.ci/schemathesis` asks more."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import QUESTION, Running

#: Some fields of every endpoint, a body that is right, and where it goes. One step, a few tokens: no time is spent.
STEP = {"diffusion": {"max_steps": 1}}
RIGHT: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": QUESTION, "max_tokens": 4, **STEP},
    "/v1/completions": {"prompt": "a", "max_tokens": 4, **STEP},
    "/completion": {"prompt": "a", "n_predict": 4, **STEP},
    "/infill": {"input_prefix": "a", "input_suffix": "b", "n_predict": 2, **STEP},
    "/tokenize": {"content": "a"},
    "/detokenize": {"tokens": [5]},
    "/apply-template": {"messages": QUESTION},
    "/v1/systemone": {"model": "demo", "state": "a", "questions": {"q": {"type": "noul", "instructions": "b"}}},
}
NAMES = (
    "messages",
    "prompt",
    "suffix",
    "max_tokens",
    "n_predict",
    "n",
    "n_cmpl",
    "stop",
    "seed",
    "stream",
    "diffusion",
    "stream_options",
    "tools",
    "tool_choice",
    "input_prefix",
    "input_suffix",
    "input_extra",
    "response_fields",
    "content",
    "tokens",
    "echo",
    "logprobs",
    "temperature",
    "reasoning_effort",
    "chat_template_kwargs",
    "n_indent",
    "model",
    "state",
    "questions",
)
LEAVES = st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    LEAVES | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "name", "tool_call_id"]), VALUES, max_size=4)
    | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": VALUES}),
    max_size=3,
)


@pytest.mark.parametrize("path", RIGHT)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3), messages=st.none() | MESSAGES)
def test_no_body_makes_a_500(server: Running, path: str, changes: dict[str, Any], messages: Any) -> None:
    """Fields of any type and value, one at a time or several."""
    body = {**RIGHT[path], **changes, **({} if messages is None else {"messages": messages})}
    body["stream"] = False
    if isinstance(body.get("n"), int):
        body["n"] = min(body["n"], 2)
    answer = server.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 422), (answer.status_code, answer.text)
    if answer.status_code != 200:
        assert answer.json().get("error") or answer.json().get("detail"), answer.text


@pytest.mark.parametrize("path", RIGHT)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60) | st.text(alphabet='{}[]":,0123456789.eE-+truefalsn \\u', max_size=60))
def test_no_bytes_make_a_500(server: Running, path: str, raw: bytes | str) -> None:
    """JSON or not."""
    answer = server.client.post(path, content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400), (answer.status_code, answer.text)
