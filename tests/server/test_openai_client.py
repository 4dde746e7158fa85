"""The openai package, with its strict validation and without its retries, against the server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
from serving import QUESTION, Running, running

from pydiffgguf import Block, DiffusionModel, Generation, Stats, demo_model_path
from pydiffgguf.engine.options import GenerateOptions


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with (
        httpx.Client(trust_env=False) as http,
        openai.OpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            max_retries=0,
            _strict_response_validation=True,
            http_client=http,
        ) as one,
    ):
        yield one


@pytest.fixture(scope="module")
def model() -> Iterator[DiffusionModel]:
    """The same model without a server between."""
    with DiffusionModel(demo_model_path(), n_threads=1) as one:
        yield one


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    """Under its name, which can also be asked for by itself."""
    (entry,) = client.models.list().data
    assert entry.id == "demo" and client.models.retrieve("demo").owned_by == "pydiffgguf"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_chat_is_what_the_python_interface_answers(client: openai.OpenAI, model: DiffusionModel) -> None:
    """The same seed, the same text; any model name will do."""
    answer = client.chat.completions.create(model="whatever", messages=QUESTION, seed=1)
    expected = model.chat(QUESTION, seed=1)
    (choice,) = answer.choices
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == "stop" == expected.finish_reason
    assert answer.model == "demo" and answer.id.startswith("chatcmpl-") and abs(answer.created - time.time()) < 60
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.stats.prompt_tokens
    assert answer.usage.completion_tokens == expected.stats.generated_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_several_choices_have_seeds_of_their_own(client: openai.OpenAI, model: DiffusionModel) -> None:
    """Choice i has the seed plus i."""
    answer = client.chat.completions.create(model="", messages=QUESTION, seed=5, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [c.message.content for c in answer.choices] == [model.chat(QUESTION, seed=5 + i).text for i in range(3)]


@pytest.mark.parametrize("frames", [False, True, "tokens"])
def test_a_stream_is_its_reply_in_pieces(client: openai.OpenAI, model: DiffusionModel, frames: Any) -> None:
    """With drafts or without, which an ordinary client takes for empty pieces."""
    chunks = list(
        client.chat.completions.create(
            model="",
            messages=QUESTION,
            seed=2,
            stream=True,
            n=2,
            stream_options={"include_usage": True},
            extra_body={"diffusion": {"frames": frames}},
        )
    )
    assert len({(chunk.id, chunk.created, chunk.object) for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0
    for index in range(2):
        pieces = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
        assert pieces[0].delta.role == "assistant"
        assert "".join(piece.delta.content or "" for piece in pieces) == model.chat(QUESTION, seed=2 + index).text
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]
    drafts = [chunk.model_extra for chunk in chunks if "type" in (chunk.model_extra or {})]
    assert bool(drafts) == bool(frames)
    for draft in drafts:
        assert draft is not None and draft["type"] == "diffusion_frame" and 1 <= draft["step"] <= draft["total"] == 48
        if frames == "tokens":
            canvas = draft["diffusion"]
            assert len(canvas["tokens"]) == len(canvas["accepted"]) == len(canvas["entropy"]) == 64


def test_the_stream_helper_takes_it(client: openai.OpenAI, model: DiffusionModel) -> None:
    """chat.completions.stream() puts the pieces together again."""
    with client.chat.completions.stream(model="", messages=QUESTION, seed=3) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == model.chat(QUESTION, seed=3).text


def test_settled_text_comes_ahead_of_its_canvas(server: Running, model: DiffusionModel) -> None:
    """With diffusion.settle; all pieces are the text of the same call. A gap's text comes as one piece."""
    body = {"prompt": "On Sunday Emma found a", "max_tokens": 60, "seed": 1, "stream": True}
    pieces = {}
    for settle in (None, 2):
        events = server.events("/v1/completions", {**body, "stop": "lamp", "diffusion": {"settle": settle}})
        pieces[settle] = [choice["text"] for event in events[:-1] for choice in event["choices"] if choice["text"]]
    ids = model.tokenize("On Sunday Emma found a", add_bos=True)
    assert "".join(pieces[2]) == model.generate(ids, max_tokens=60, seed=1, settle=2, stop="lamp").text
    assert len(pieces[2]) > len(pieces[None])
    refused = server.post("/v1/completions", {**body, "suffix": "x", "diffusion": {"settle": 2}})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "diffusion.settle"


def test_a_cut_answer_says_length(client: openai.OpenAI) -> None:
    """By max_completion_tokens, which counts before max_tokens."""
    answer = client.chat.completions.create(model="", messages=QUESTION, seed=1, max_completion_tokens=1, max_tokens=99)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 1


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, model: DiffusionModel) -> None:
    """In the reply and in the stream, which holds back what may be one."""
    whole = model.chat(QUESTION, seed=1).text
    stop = whole[1:]
    for stream in (False, True):
        answer: Any = client.chat.completions.create(
            model="", messages=QUESTION, seed=1, stop=["", stop], stream=stream
        )
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            text = answer.choices[0].message.content
        assert text == whole[:1]


def test_completions_take_text_lists_and_ids(client: openai.OpenAI, model: DiffusionModel) -> None:
    """Every prompt gets n choices, counted on."""
    ids = model.tokenize("def ", add_bos=True, special=False)
    one = client.completions.create(model="", prompt="def ", seed=4, max_tokens=8)
    assert one.choices[0].text == model.generate(ids, seed=4, max_tokens=8).text
    assert client.completions.create(model="", prompt=ids, seed=4, max_tokens=8).choices[0].text == one.choices[0].text
    many = client.completions.create(model="", prompt=["def ", "Tom "], seed=4, max_tokens=8, n=2)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == one.choices[0].text
    echoed = client.completions.create(model="", prompt="def ", seed=4, max_tokens=8, echo=True)
    assert echoed.choices[0].text == "def " + one.choices[0].text


def test_special_tokens_in_a_prompt_stay_text(client: openai.OpenAI, model: DiffusionModel) -> None:
    """A completion's prompt cannot hold control tokens."""
    prompt = "<turn|>\n<|turn>model\n"
    answer = client.completions.create(model="", prompt=prompt, max_tokens=1, seed=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(model.tokenize(prompt, add_bos=True, special=False))


def test_a_suffix_makes_a_gap(client: openai.OpenAI, model: DiffusionModel) -> None:
    """Prompt and suffix are its sides; echo gives the whole."""
    prefix, suffix = "def add(a, b):\n    return a", "\n"
    expected = model.infill(prefix, suffix + "x", seed=1, max_gap=16).text
    answer = client.completions.create(model="", prompt=prefix, suffix=suffix + "x", seed=1, max_tokens=16)
    assert answer.choices[0].text == expected and answer.object == "text_completion"
    whole = client.completions.create(model="", prompt=prefix, suffix=suffix + "x", seed=1, max_tokens=16, echo=True)
    assert whole.choices[0].text == prefix + expected + suffix + "x"
    # Strict validation refuses finish_reason null in these chunks, as it would OpenAI's own.
    lax = client.with_options()
    lax._strict_response_validation = False
    chunks = list(lax.completions.create(model="", prompt=prefix, suffix="\nx", seed=1, max_tokens=16, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": "abc"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 5}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["x"] * 33}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"functions": [{}]}, "functions"),
        ({"stream": "yes"}, "stream"),
        ({"diffusion": {"nope": 1}}, "diffusion"),
        ({"diffusion": {"frames": "all"}}, "diffusion.frames"),
        ({"diffusion": {"time_limit_s": 0}}, "diffusion.time_limit_s"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_field_at_fault_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    """BadRequestError.param, and in the message."""
    body = {"messages": QUESTION, **fields}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="", messages=body.pop("messages"), extra_body=body)
    assert error.value.param == param and param.partition(".")[0] in str(error.value)


def test_a_sampling_option_out_of_range_is_refused_before_the_queue(client: openai.OpenAI) -> None:
    """As an HTTP error, for a stream as well."""
    with pytest.raises(openai.BadRequestError, match="steps"):
        client.chat.completions.create(
            model="", messages=QUESTION, stream=True, extra_body={"diffusion": {"steps": -1}}
        )


def test_a_prompt_that_does_not_fit_says_so_in_numbers(client: openai.OpenAI) -> None:
    """In the words that agents look for, before a stream begins."""
    long = [{"role": "user", "content": "x " * 3000}]
    with pytest.raises(
        openai.BadRequestError, match=r"request \(\d+ tokens\) exceeds the available context size"
    ) as error:
        client.chat.completions.create(model="", messages=long, stream=True)  # type: ignore[call-overload]
    body: Any = error.value.body
    assert body["n_ctx"] == 2048 and body["n_prompt_tokens"] > 2000 and body["type"] == "exceed_context_size_error"


def test_fields_without_effect_are_named(server: Running) -> None:
    """In a header; with --strict-params they are refused."""
    body = {"messages": QUESTION, "temperature": 0.1, "top_p": 1, "user": "me", "max_tokens": 1, "top_k": None}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200 and answer.headers["x-ignored-params"] == "temperature, top_p, user"
    with running(strict_params=True) as strict:
        refused = strict.post("/v1/chat/completions", body)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "temperature"


def test_temperature_zero_gives_the_same_answer_each_time(server: Running) -> None:
    """No seed then means seed 0; otherwise every answer has a fresh one, which is told."""

    def seed(**fields: Any) -> int:
        answer = server.post("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 1, **fields})
        return int(answer.json()["timings"]["seed"])

    assert seed(temperature=0) == 0 and seed(seed=7) == 7 and seed(seed=-2) == 2**64 - 2
    assert len({seed(), seed(seed=-1), seed(seed=4294967295)}) == 3


def test_timings_are_finite_numbers(server: Running) -> None:
    """A warm-up too, which encodes the prompt and answers with nothing."""
    for fields in ({}, {"n_predict": 0}):
        answer = server.post("/v1/chat/completions", {"messages": QUESTION, **fields}).json()
        for name, value in answer["timings"].items():
            assert isinstance(value, (int, float)) and value >= 0, name
    assert answer["choices"][0]["message"]["content"] == "" and answer["choices"][0]["finish_reason"] == "length"
    again = server.post("/v1/chat/completions", {"messages": QUESTION}).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses", "/rerank", "/props", "/slots"])
def test_what_is_not_offered_says_so(server: Running, path: str) -> None:
    """501, which no client repeats."""
    answer = server.post(path, {"input": "x"})
    assert answer.status_code == 501 and answer.json()["error"]["type"] == "not_supported_error"


def test_unknown_paths_and_methods_are_told_apart(server: Running) -> None:
    """404; 405 with what is allowed. Both in the shape of every error."""
    assert server.client.get("/v2/models").json()["error"]["code"] == 404
    answer = server.client.get("/v1/chat/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST" and answer.json()["error"]["code"] == 405


TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bern"}'}}


class Canned:
    """A stream with one thought, two blocks of text and a tool call: the demo model writes none."""

    def __init__(self) -> None:
        stats = Stats(seed=1, prompt_tokens=5, generated_tokens=9, reasoning_tokens=4, steps=[2, 3])
        self.result = Generation("Let me see.", [1] * 9, "stop", stats, "hm, hm", [CALL])

    def __enter__(self) -> Canned:
        return self

    def __exit__(self, *_: object) -> None: ...

    def cancel(self) -> None: ...

    def __iter__(self) -> Iterator[Block]:
        yield Block("Let me", [1] * 4, "hm, hm")
        yield Block(" see.", [1] * 5)


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_and_tool_calls_come_apart_from_the_text(
    client: openai.OpenAI, server: Running, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """As reasoning_content and as tool_calls, each whole; the reason says so if and only if there are calls."""
    asked: dict[str, Any] = {}

    def chat_tokens(messages: Any, **options: Any) -> list[int]:
        asked.update(options, messages=messages)
        return [1]

    monkeypatch.setattr(server.service.model, "chat_tokens", chat_tokens)
    monkeypatch.setattr(server.service.model, "stream", lambda ids, **options: Canned())
    request: Any = {"model": "", "messages": QUESTION, "tools": TOOLS, "reasoning_effort": "low", "stop": "see you"}
    if stream:
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**request, stream=True)]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == "Let me see."
        extra = [chunk.delta.model_extra or {} for chunk in chunks]
        assert "".join(each.get("reasoning_content", "") for each in extra) == "hm, hm"
        (calls,) = [chunk.delta.tool_calls for chunk in chunks if chunk.delta.tool_calls]
        assert calls[0].function is not None and calls[0].function.arguments == CALL["function"]["arguments"]  # type: ignore[index]
        assert chunks[-1].finish_reason == "tool_calls"
    else:
        (choice,) = client.chat.completions.create(**request).choices
        assert choice.message.content == "Let me see." and choice.finish_reason == "tool_calls"
        assert choice.message.model_extra == {"reasoning_content": "hm, hm"}
        assert choice.message.tool_calls is not None and choice.message.tool_calls[0].id == "call_1"
    assert asked["tools"] == TOOLS and asked["thinking"] is True and asked["messages"] == QUESTION


def test_a_forced_call_reaches_the_model_as_one(
    client: openai.OpenAI, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its choice is a constraint on the answer, and not on the prompt alone."""
    asked: list[Any] = []

    def stream_chat(messages: Any, **options: Any) -> Canned:
        asked.append(options["tool_choice"])
        return Canned()

    monkeypatch.setattr(server.service.model, "stream_chat", stream_chat)
    monkeypatch.setattr(server.service.model, "chat_tokens", lambda messages, **options: [1])
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        answer = client.chat.completions.create(model="", messages=QUESTION, tools=TOOLS, tool_choice=choice)
        assert answer.choices[0].finish_reason == "tool_calls"
    assert asked == ["required", named]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}], "image"),
        ([{"role": "nobody", "content": "x"}], r"messages\[0\].role"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content"),
        (["x"], r"messages\[0\]"),
    ],
)
def test_a_message_at_fault_is_named(client: openai.OpenAI, messages: Any, said: str) -> None:
    """With its path, as a 400 whose param is messages; no address in it is fetched."""
    with pytest.raises(openai.BadRequestError, match=said) as error:
        client.chat.completions.create(model="", messages=messages)
    assert error.value.param == "messages"


def test_a_conversations_prompt_can_be_looked_at(server: Running, model: DiffusionModel) -> None:
    """Its text is that of the tokens that chat would send."""
    prompt = server.post("/apply-template", {"messages": QUESTION}).json()["prompt"]
    assert model.tokenize(prompt) == model.chat_tokens(QUESTION)
    assert server.post("/tokenize", {"content": prompt}).json()["tokens"] == model.chat_tokens(QUESTION)
    ids = model.chat_tokens(QUESTION)
    assert server.post("/detokenize", {"tokens": ids}).json()["content"] == prompt
    pieces = server.post("/tokenize", {"content": "day", "with_pieces": True}).json()["tokens"]
    assert "".join(each["piece"] for each in pieces) == "day"
    bad = server.post("/detokenize", {"tokens": [10**6]})
    assert bad.status_code == 400 and "tokens[0]" in bad.json()["error"]["message"]


def test_an_answer_obeys_a_schema(client: openai.OpenAI) -> None:
    """That of a pydantic model, and JSON of any form; a broken schema is refused."""
    pytest.importorskip("llguidance", reason="constraints are the extra structured")
    if "response_format" not in GenerateOptions.__annotations__:
        pytest.skip("this build's Python interface has no constraints")

    class Digit(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        digit: int

    schema = {"name": "Digit", "schema": Digit.model_json_schema()}
    form: Any = {"type": "json_schema", "json_schema": schema}
    answer = client.chat.completions.create(model="", messages=QUESTION, response_format=form, seed=1)
    expected = Digit.model_validate_json(answer.choices[0].message.content or "")
    # The package's own helpers, which make the schema strict and the answer an object.
    for parse in (client.chat.completions.parse, client.beta.chat.completions.parse):
        parsed = parse(model="", messages=QUESTION, response_format=Digit, seed=1).choices[0].message.parsed
        assert parsed == expected
    with client.chat.completions.stream(model="", messages=QUESTION, response_format=Digit, seed=1) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == expected
    with pytest.raises(openai.InternalServerError) as refused:
        client.responses.create(model="", input="x")
    assert refused.value.status_code == 501
    anything = client.chat.completions.create(
        model="", messages=QUESTION, response_format={"type": "json_object"}, seed=1, max_tokens=60
    )
    assert isinstance(json.loads(anything.choices[0].message.content or ""), dict)
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            model="",
            messages=QUESTION,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}},
        )
    assert error.value.status_code == 400
