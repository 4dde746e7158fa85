"""The requests of editors' plug-ins, written down field by field, and what each plug-in reads of a reply."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import QUESTION, Running, parse_events

from pydiffgguf import DiffusionModel, demo_model_path
from pydiffgguf.server.endpoints.gaps import Trimmed, trim

PREFIX = "def add_scores(scores):\n    total = 0\n    for score in scores:\n        total"
SUFFIX = "\n    return total\n"


@pytest.fixture(scope="module")
def model() -> Iterator[DiffusionModel]:
    with DiffusionModel(demo_model_path(), n_threads=1) as one:
        yield one


def llama_vim(**fields: Any) -> dict[str, Any]:
    """A suggestion's request as llama.vim (a1c8e6e) sends it."""
    lines, _, line = PREFIX.rpartition("\n")
    return {
        "id_slot": 7,
        "input_prefix": lines + "\n",
        "input_suffix": SUFFIX,
        "input_extra": [{"text": "def twice(x):\n    return x + x\n", "time": 1, "filename": "other.py"}],
        "prompt": line,
        "n_predict": 24,
        "stop": [],
        "n_indent": 8,
        "top_k": 40,
        "top_p": 0.9,
        "samplers": ["top_k", "top_p", "infill"],
        "stream": False,
        "cache_prompt": True,
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": 1000,
        "response_fields": [
            "content",
            "timings/prompt_n",
            "timings/prompt_ms",
            "timings/prompt_per_token_ms",
            "timings/prompt_per_second",
            "timings/predicted_n",
            "timings/predicted_ms",
            "timings/predicted_per_token_ms",
            "timings/predicted_per_second",
            "truncated",
            "tokens_cached",
        ],
        "model": "",
        **fields,
    }


def test_llama_vim_gets_text_at_once_behind_the_colon(server: Running, model: DiffusionModel) -> None:
    """The fields that it named, slashes kept in their keys; a quote right behind "content":; all numbers."""
    answer = server.client.post("/infill", json=llama_vim(), headers={"Authorization": "Bearer"})
    assert answer.status_code == 200 and answer.text.startswith("{") and '"content":"' in answer.text
    body = answer.json()
    assert list(body) == llama_vim()["response_fields"]
    assert all(isinstance(value, (int, float)) for key, value in body.items() if key.startswith("timings/"))
    assert body["truncated"] is False and body["tokens_cached"] > 0
    extra = [("other.py", "def twice(x):\n    return x + x\n")]
    filled = model.infill(PREFIX, SUFFIX, max_gap=24, extra=extra)
    assert body["content"] == trim(filled.text, [], 8).text
    ignored = "id_slot, top_k, top_p, samplers, cache_prompt, t_max_prompt_ms"
    assert answer.headers["x-ignored-params"].startswith(ignored)


def test_the_same_request_gives_the_same_suggestion(server: Running) -> None:
    """The seed is 0 unless it is given: plug-ins remember suggestions by their request."""
    first, second = (server.post("/infill", llama_vim()).json()["content"] for _ in range(2))
    assert first == second


def test_a_warm_up_answers_with_nothing(server: Running) -> None:
    """n_predict 0 with empty sides and response_fields [""]: an empty object. The files are in the cache then."""
    body = llama_vim(input_prefix="", input_suffix="", prompt="", n_predict=0, response_fields=[""])
    answer = server.post("/infill", body)
    assert answer.status_code == 200 and answer.text == "{}"
    extra = [{"text": "TWICE = 2\n" * 20, "filename": "warm.py"}]
    warmed = server.post("/infill", {**body, "input_extra": extra, "response_fields": ["timings/prompt_n"]}).json()
    real = server.post("/infill", llama_vim(input_extra=extra)).json()
    assert warmed["timings/prompt_n"] > 60 and real["timings/prompt_n"] < warmed["timings/prompt_n"]


def test_llama_vscode_gets_a_list_of_candidates(server: Running) -> None:
    """n_cmpl 3 is its default; 1 gives an object, whose context its status bar shows."""
    body = llama_vim(n_cmpl=3, top_p=0.99)
    del body["response_fields"]
    several = server.post("/infill", body).json()
    assert isinstance(several, list) and 1 <= len(several) <= 3
    assert [each["index"] for each in several] == list(range(len(several)))
    assert len({each["content"] for each in several}) == len(several)
    one = server.post("/infill", {**body, "n_cmpl": 1}).json()
    assert one["generation_settings"]["n_ctx"] == 2048 and one["stop"] is True and one["stop_type"] in ("eos", "word")
    assert {"predicted_ms", "prompt_ms", "prompt_per_second", "predicted_per_second"} <= set(one["timings"])


@pytest.mark.parametrize("suffix", ["", "\n"])
def test_at_the_end_of_a_file_the_block_is_finished(server: Running, model: DiffusionModel, suffix: str) -> None:
    """Editors send the rest of the line, a newline or nothing; `until` asks for the line, or for all that comes."""
    head = 'def mul_width_price(width, price):\n    """Multiply width and price."""\n'
    body = {"input_prefix": head, "input_suffix": suffix, "prompt": "", "n_predict": 60}
    texts = {}
    for until in ("line", "block", "end"):
        answer = server.post("/infill", {**body, "diffusion": {"until": until}})
        texts[until] = answer.json()["content"]
        assert texts[until] == model.infill(head, suffix, max_gap=60, until=until).text  # type: ignore[arg-type]
    assert texts["end"].startswith(texts["block"] + "\n") and texts["block"] == "    return width * price"
    assert server.post("/infill", body).json()["content"] == texts["block"]
    fim = {"prompt": f"<|fim_prefix|>{head}<|fim_suffix|>{suffix}<|fim_middle|>", "max_tokens": 60, "seed": 0}
    assert server.post("/v1/completions", fim).json()["choices"][0]["text"] == texts["block"]
    wrong = server.post("/infill", {**body, "diffusion": {"until": "word"}})
    assert wrong.status_code == 400 and "until is 'word'" in wrong.json()["error"]["message"]


@pytest.mark.parametrize("name", ["n_cmpl", "n"])
def test_too_many_candidates_are_refused_in_the_words_it_looks_for(server: Running, name: str) -> None:
    """llama.vscode falls back to one where the message begins so."""
    answer = server.post("/infill", llama_vim(**{name: 7}))
    message = f"Field '{name}': Value must be between 1 <= value <= 4, but got 7"
    assert answer.status_code == 400 and answer.json()["error"]["message"] == message


@pytest.mark.parametrize("name", ["input_prefix", "input_suffix"])
def test_both_sides_are_needed(server: Running, name: str) -> None:
    """And named where one is missing."""
    body = llama_vim()
    del body[name]
    answer = server.post("/infill", body)
    assert answer.status_code == 400 and answer.json()["error"]["message"] == f'"{name}" is required'


def test_an_infill_streams_one_text_and_then_everything_else(server: Running) -> None:
    """Drafts where they are wanted; no [DONE]."""
    body = llama_vim(stream=True, diffusion={"frames": True})
    del body["response_fields"]
    *pieces, last = server.events("/infill", body)
    whole = server.post("/infill", llama_vim()).json()["content"]
    assert [piece["content"] for piece in pieces if "type" not in piece] == [whole]
    assert all(piece["stop"] is False for piece in pieces) and last["stop"] is True and last["content"] == ""
    drafts = [piece for piece in pieces if "type" in piece]
    assert drafts and all(draft["content"] == "" for draft in drafts)


@pytest.mark.parametrize(
    ("text", "stop", "n_indent", "expected"),
    [
        ("a + b", [], 4, Trimmed("a + b", "eos")),
        ("a + b\nnext", ["\n"], 0, Trimmed("a + b", "word", "\n")),
        ("abc", ["c", "b"], 0, Trimmed("a", "word", "b")),
        ("x\n    y\n\n    z\nend", [], 4, Trimmed("x\n    y\n\n    z", "word")),
        ("x\n\ty", [], 1, Trimmed("x\n\ty", "eos")),
        ("", ["x"], 4, Trimmed("", "eos")),
    ],
)
def test_a_gap_ends_at_stops_and_at_less_indentation(
    text: str, stop: list[str], n_indent: int, expected: Trimmed
) -> None:
    """The first line is not measured: the cursor stood in it."""
    assert trim(text, stop, n_indent) == expected


ZED_STOPS = [
    "<|endoftext|>",
    "<|file_separator|>",
    "<|fim_pad|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<fim_prefix>",
    "<fim_middle>",
    "<fim_suffix>",
    "<PRE>",
    "<SUF>",
    "<MID>",
    "[PREFIX]",
    "[SUFFIX]",
]


@pytest.mark.parametrize(
    "form",
    [
        "<|fim_prefix|>{p}<|fim_suffix|>{s}<|fim_middle|>",
        "<fim_prefix>{p}<fim_suffix>{s}<fim_middle>",
        "<PRE> {p} <SUF>{s} <MID>",
        "<｜fim▁begin｜>{p}<｜fim▁hole｜>{s}<｜fim▁end｜>",  # noqa: RUF001
        "[SUFFIX]{s}[PREFIX]{p}",
        "<|code_prefix|>{p}<|code_suffix|>{s}<|code_middle|>",
    ],
)
def test_zed_gets_its_struct(server: Running, model: DiffusionModel, form: str) -> None:
    """Its body has exactly four fields, and it cannot read a reply that lacks one of its own."""
    body = {"model": "qwen2.5-coder", "prompt": form.format(p=PREFIX, s=SUFFIX), "max_tokens": 64, "stop": ZED_STOPS}
    answer = server.post("/v1/completions", {**body, "seed": 3}).json()
    assert {"id", "object", "created", "model", "choices", "usage"} <= set(answer)
    assert answer["object"] == "text_completion" and isinstance(answer["created"], int)
    (choice,) = answer["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}
    assert choice["text"] == model.infill(PREFIX, SUFFIX, max_gap=64, seed=3).text
    assert all(
        isinstance(answer["usage"][name], int) for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    )


def test_continue_streams_markers_through_completion(server: Running) -> None:
    """Its provider for llama.cpp knows that path alone; it reads "content" of each event."""
    prompt = f"<|fim_prefix|>{PREFIX}<|fim_suffix|>{SUFFIX}<|fim_middle|>"
    *pieces, last = server.events("/completion", {"prompt": prompt, "stream": True, "n_predict": 32, "seed": 3})
    assert "".join(piece["content"] for piece in pieces) and last["stop"] is True
    plain = server.post("/completion", {"prompt": "def ", "n_predict": 8, "seed": 3}).json()
    assert plain["content"] and plain["stop_type"] == "limit" and plain["tokens_predicted"] == 8


def test_inceptions_clients_get_text_and_message(server: Running) -> None:
    """Mistral's read message.content, Inception's text; the bare end of text stands for no suffix."""
    body = {"prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 32, "stop": ["\n\n"], "seed": 3}
    (choice,) = server.post("/v1/fim/completions", body).json()["choices"]
    assert choice["text"] and choice["message"]["content"] == choice["text"]
    *pieces, done = server.events("/v1/fim/completions", {**body, "stream": True})
    assert done == "[DONE]"
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in pieces if p["choices"]) == choice["text"]
    none = {**body, "suffix": "<|endoftext|>", "max_tokens": 4}
    assert server.post("/v1/completions", none).json()["usage"]["completion_tokens"] == 4


def test_a_newer_suggestion_supersedes_the_clients_older_one(server: Running) -> None:
    """Which says so with status 200 and no content; another client's is answered."""
    slow = llama_vim(diffusion={"steps": 4000, "confidence_threshold": 0.0}, max_gap=1)
    with (
        server.client.stream("POST", "/infill", json={**slow, "stream": True}, headers={"x-client-id": "a"}) as old,
        server.client.stream("POST", "/infill", json={**slow, "stream": True}, headers={"x-client-id": "b"}) as other,
    ):
        assert server.service.engine.running == 2
        new = server.post("/infill", llama_vim(), **{"x-client-id": "a"})
        assert new.json()["content"]
        raw = b"".join(old.iter_raw())
        assert parse_events(raw) == [{"superseded": True, "stop": True, "stop_type": "none"}]
        assert server.service.engine.running == 1
        other.close()
    assert server.at_rest()


def test_a_client_that_hangs_up_ends_its_work(server: Running) -> None:
    """While it streams, while it waits for a whole reply, while it stands in the queue."""
    slow = {"messages": QUESTION, "max_tokens": 1500, "diffusion": {"steps": 4000, "confidence_threshold": 0.0}}
    before = server.service.engine.cancelled
    for stream in (True, False):
        sockets = []
        for _ in range(3):  # one runs, the others wait
            body = json.dumps({**slow, "stream": stream}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            sockets.append(server.connect())
            sockets[-1].sendall(head.encode() + body)
        for _ in range(500):
            if server.service.engine.waiting == 2:
                break
            server.client.get("/health")
        assert (server.service.engine.running, server.service.engine.waiting) == (1, 2)
        for sock in sockets:
            sock.close()
        assert server.at_rest()
    assert server.service.engine.cancelled == before + 6
    assert server.post("/infill", llama_vim()).status_code == 200
