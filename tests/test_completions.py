"""Replies as the dictionaries of the OpenAI API, read by OpenAI's own types."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from pydiffgguf import DiffusionModel, UnsupportedError, demo_model_path
from pydiffgguf.completions import ChatReply, CompletionStream, OptionWarning, Shared, TextReply
from pydiffgguf.generate import Block, Generation, Stats

ASK = [{"role": "user", "content": "Compare 3 and 5."}]


@pytest.fixture(scope="module")
def model() -> Iterator[DiffusionModel]:
    with DiffusionModel(demo_model_path()) as model:
        yield model


def as_dict(reply: object) -> dict[str, Any]:
    assert isinstance(reply, dict)
    return reply


def chunks_of(reply: object) -> list[dict[str, Any]]:
    assert isinstance(reply, CompletionStream)
    return list(reply)


def strict(kind: Any, reply: dict[str, Any]) -> Any:
    """As the SDK reads it; JSON on the way, so that nothing but JSON is in it."""
    return kind.model_validate_json(json.dumps(reply, allow_nan=False), strict=True)


def test_a_chat_completion_is_what_chat_says(model: DiffusionModel) -> None:
    reply = strict(ChatCompletion, as_dict(model.create_chat_completion(ASK, seed=3, max_tokens=40)))
    result = model.chat(ASK, seed=3, max_tokens=40)
    [choice] = reply.choices
    assert choice.message.content == result.text
    assert choice.message.role == "assistant"
    assert choice.message.tool_calls is None and choice.logprobs is None
    assert choice.finish_reason == ("stop" if result.finish_reason == "stop" else "length")
    assert reply.model == "demo.gguf" and reply.id.startswith("chatcmpl-")
    assert reply.usage.prompt_tokens == len(model.chat_tokens(ASK))
    assert reply.usage.completion_tokens == len(result.tokens)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_adds_up_to_the_reply(model: DiffusionModel) -> None:
    """Role first, then text, then why it ended, then the usage where it is asked for; one id in all."""
    model.chat(ASK, seed=3, max_tokens=1)  # the usage counts what the cache had: both find the prompt there
    whole = as_dict(model.create_chat_completion(ASK, seed=3, max_tokens=100))
    made = chunks_of(
        model.create_chat_completion(
            ASK, seed=3, max_tokens=100, stream=True, frames=True, stream_options={"include_usage": True}, model="x"
        )
    )
    chunks = [strict(ChatCompletionChunk, chunk) for chunk in made]
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.model for chunk in chunks} == {"x"}
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole["choices"][0]["message"]["content"]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole["choices"][0]["finish_reason"]
    assert chunks[-1].choices == [] and chunks[-1].usage.model_dump(exclude_none=True) == whole["usage"]
    frames = [chunk for chunk in made if chunk.get("type") == "diffusion_frame"]
    assert len(frames) == whole["timings"]["diffusion_steps"]
    assert frames[0]["step"] == 1 and frames[0]["total"] == model.sampling.steps
    assert frames[-1]["text"].startswith(text[:5])


def some_result(**changes: Any) -> Generation:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    stats = Stats(seed=1, prompt_tokens=5, steps=[2], generated_tokens=9, reasoning_tokens=4)
    values: dict[str, Any] = {"reasoning": "Hm.", "tool_calls": [call], **changes}
    return Generation(values.pop("text", ""), values.pop("tokens", []), values.pop("reason", "stop"), stats, **values)


def test_calls_and_thoughts_have_their_fields(model: DiffusionModel) -> None:
    """finish_reason is tool_calls if and only if there are calls; content is null where there is nothing else."""
    reply = ChatReply(Shared("m", False), 64, model.tokenizer)
    whole = strict(ChatCompletion, reply.whole(some_result()))
    message = whole.choices[0].message
    assert message.content is None and message.tool_calls[0].function.name == "f"
    assert message.reasoning_content == "Hm."
    assert whole.choices[0].finish_reason == "tool_calls"
    assert whole.usage.completion_tokens_details.reasoning_tokens == 4
    [thought] = [strict(ChatCompletionChunk, chunk) for chunk in reply.of(Block("", [], "Hm."))]
    assert thought.choices[0].delta.reasoning_content == "Hm."
    called, ended = (strict(ChatCompletionChunk, chunk) for chunk in reply.end(some_result()))
    assert called.choices[0].delta.tool_calls[0].function.arguments == '{"x": 1}'
    assert ended.choices[0].finish_reason == "tool_calls"
    for reason, expected in [("stop", "stop"), ("length", "length"), ("cancelled", "length")]:
        result = some_result(tool_calls=[], text="a", reason=reason)
        assert reply.whole(result)["choices"][0]["finish_reason"] == expected


def test_log_probabilities_are_those_of_the_text(model: DiffusionModel) -> None:
    """Of each token of the answer, in the last step; their pieces make the text."""
    reply = strict(ChatCompletion, as_dict(model.create_chat_completion(ASK, seed=3, logprobs=True)))
    entries = reply.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == reply.choices[0].message.content
    assert all(entry.logprob <= 0 for entry in entries)
    assert sum(entry.logprob > -0.1 for entry in entries) > len(entries) / 2  # the canvas has converged
    completion = strict(Completion, as_dict(model.create_completion("The boxes", seed=3, logprobs=1, max_tokens=20)))
    found = completion.choices[0].logprobs
    assert "".join(found.tokens) == completion.choices[0].text
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(len(found.tokens))]
    with pytest.raises(UnsupportedError, match="top_logprobs: there are log-probabilities of the tokens that were"):
        model.create_chat_completion(ASK, logprobs=True, top_logprobs=2)


def test_a_completion_goes_on_with_plain_text(model: DiffusionModel) -> None:
    """Without the chat template; echo repeats the prompt; ids are taken as they are."""
    prompt = "def half(x):\n"
    reply = strict(Completion, as_dict(model.create_completion(prompt, seed=1, max_tokens=20)))
    assert reply.choices[0].text == model.generate(prompt, raw=True, seed=1, max_tokens=20).text
    echoed = strict(Completion, as_dict(model.create_completion(prompt, seed=1, max_tokens=20, echo=True)))
    assert echoed.choices[0].text == prompt + reply.choices[0].text
    chunks = [
        strict(
            Completion,
            {**chunk, "choices": [{**c, "finish_reason": c["finish_reason"] or "stop"} for c in chunk["choices"]]},
        )
        for chunk in chunks_of(model.create_completion(prompt, seed=1, max_tokens=20, echo=True, stream=True))
    ]
    assert "".join(chunk.choices[0].text for chunk in chunks) == echoed.choices[0].text
    ids = model.tokenize(prompt, add_bos=True)
    assert as_dict(model.create_completion(ids, seed=1, max_tokens=20))["choices"][0]["text"] == reply.choices[0].text


def test_a_suffix_makes_it_a_gap(model: DiffusionModel) -> None:
    options: dict[str, Any] = {"seed": 1, "max_tokens": 8}
    before, behind = "def half(x):\n    return ", " / 2\n"
    reply = strict(Completion, as_dict(model.create_completion(before, suffix=behind, **options)))
    filled = model.infill(before, behind, seed=1, max_gap=8)
    assert reply.choices[0].text == filled.text
    assert reply.usage.completion_tokens == filled.gap_tokens
    chunks = chunks_of(model.create_completion(before, suffix=behind, stream=True, **options))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == filled.text
    last = filled.text[-1]
    cut = as_dict(model.create_completion(before, suffix=behind, stop=last, **options))
    assert cut["choices"][0]["text"] == filled.text[: filled.text.index(last)]


def test_what_has_no_effect_is_told(model: DiffusionModel) -> None:
    """Options of next-token samplers, as programs send them, change nothing; at the caller's own line."""
    with pytest.warns(OptionWarning, match="create_chat_completion: no effect of temperature, top_p") as warned:
        reply = as_dict(model.create_chat_completion(ASK, seed=3, temperature=0.7, top_p=0.9, max_tokens=10))
    assert warned[0].filename == __file__
    plain = as_dict(model.create_chat_completion(ASK, seed=3, max_completion_tokens=10, user=None, n=1))
    assert reply["choices"] == plain["choices"]
    with pytest.warns(OptionWarning):
        cold = as_dict(model.create_chat_completion(ASK, temperature=0, max_tokens=10))
    assert cold["timings"]["seed"] == 0


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"nmae": 1}, TypeError, r"unknown option 'nmae'; create_chat_completion\(\) takes "),
        ({"n": 2}, UnsupportedError, "n: one choice is made at a time"),
        ({"logit_bias": {"5": 1}}, UnsupportedError, "logit_bias: a canvas has no next token"),
        ({"functions": [{}]}, UnsupportedError, "functions: use tools"),
        ({"modalities": ["audio"]}, UnsupportedError, "modalities: only text"),
        ({"stream": 1}, TypeError, "stream must be True or False"),
        ({"stream_options": 1}, TypeError, "stream_options must be a dict"),
        ({"model": 1}, TypeError, "model must be a str"),
        ({"max_tokens": 1.5}, TypeError, "max_tokens must be an integer"),
    ],
)
def test_wrong_fields_are_named(model: DiffusionModel, options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        model.create_chat_completion(ASK, **options)


def test_empty_fields_are_as_good_as_none(model: DiffusionModel) -> None:
    options: dict[str, Any] = {"tools": None, "functions": [], "logit_bias": {}, "modalities": ["text"], "stop": None}
    assert as_dict(model.create_chat_completion(ASK, seed=1, max_tokens=8, **options))["choices"]


def test_a_stream_can_be_cancelled_and_closed(model: DiffusionModel) -> None:
    """As the events' own: cancelled, it ends with what there is; closed, it ends."""
    chunks = model.create_chat_completion(ASK, stream=True, frames=True, seed=1)
    assert isinstance(chunks, CompletionStream)
    next(chunks)
    threading.Timer(0.0, chunks.cancel).run()
    rest = list(chunks)
    assert rest[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks.result.finish_reason == "cancelled"
    other = model.create_chat_completion(ASK, stream=True, frames=True)
    assert isinstance(other, CompletionStream)
    next(other)
    other.close()
    assert list(other) == []


def test_a_completion_without_logprobs_has_none(model: DiffusionModel) -> None:
    reply = TextReply(Shared("m", False), 64, model.tokenizer)
    assert reply.whole(some_result(text="a", tool_calls=[]))["choices"][0]["logprobs"] is None
