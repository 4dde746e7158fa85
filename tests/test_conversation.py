"""Conversations in files: what comes back, what is not read again, and files that are none."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pydiffgguf import DiffusionModel

FAST: dict[str, Any] = {"seed": 1, "steps": 2, "max_tokens": 4}
MESSAGES = [
    {"role": "system", "content": "Be brief, and say no more than you are asked."},
    {"role": "user", "content": "Why is the sky blue? Ümläute and 日本 too."},
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": "And the sea?"},
]


@pytest.fixture
def model(tiny_gguf: Path) -> Iterator[DiffusionModel]:
    with DiffusionModel(tiny_gguf, n_ctx=512, n_threads=1) as model:
        yield model


def test_a_conversation_is_taken_up_where_it_was_left(model: DiffusionModel, tmp_path: Path) -> None:
    """In another process, say: the same messages, nothing of them read again, and the same answer."""
    path = tmp_path / "talk.json"
    first = model.chat(MESSAGES, **FAST)
    assert model.save_conversation(path, MESSAGES)
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with DiffusionModel(model.path, n_ctx=512, n_threads=1) as later:
        messages = later.load_conversation(path)
        assert messages == MESSAGES == json.loads(path.read_text(encoding="utf-8"))["messages"]
        again = later.chat(messages, **FAST)
        assert again.stats.reused_tokens == again.stats.prompt_tokens == first.stats.prompt_tokens
        assert again.tokens == first.tokens


def test_loading_leaves_other_prefixes_alone(model: DiffusionModel, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    model.chat(MESSAGES, **FAST)
    model.save_conversation(path, MESSAGES)
    with DiffusionModel(model.path, n_ctx=512, n_threads=1) as later:
        other = [2, *range(100, 160)]
        later.generate(other, **FAST)
        later.load_conversation(path)
        assert later.generate(other, **FAST).stats.reused_tokens == len(other)
        assert later.chat(MESSAGES, **FAST).stats.reused_tokens == later.chat(MESSAGES, **FAST).stats.prompt_tokens


def test_a_conversation_that_was_not_read_is_saved_without_a_cache(model: DiffusionModel, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    model.generate([2, *range(100, 160)], **FAST)
    assert not model.save_conversation(path, MESSAGES)
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]


@pytest.mark.parametrize("cache", [None, b"no cache", "of another model"])
def test_without_its_cache_a_conversation_is_read_again(
    model: DiffusionModel, tmp_path: Path, cache: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "talk.json"
    model.chat(MESSAGES, **FAST)
    model.save_conversation(path, MESSAGES)
    beside = tmp_path / "talk.json.cache"
    if cache is None:
        beside.unlink()
    elif isinstance(cache, bytes):
        beside.write_bytes(cache)
    options: dict[str, Any] = {"type_kv": "f32"} if isinstance(cache, str) else {}
    with DiffusionModel(model.path, n_ctx=512, n_threads=1, **options) as later:
        assert later.load_conversation(path) == MESSAGES
        assert "talk.json.cache: the conversation will be read again: " in caplog.text
        assert later.chat(MESSAGES, **FAST).finish_reason == "length"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "is no saved conversation"),
        (b'{"messages": 3}', "is no saved conversation"),
        (b'{"messages": ["x"]}', "is no saved conversation"),
        (b'{"messages": [{"role": "nobody", "content": "x"}]}', "role"),
    ],
)
def test_a_file_that_holds_none_says_so(model: DiffusionModel, tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        model.load_conversation(path)
    with pytest.raises(FileNotFoundError):
        model.load_conversation(tmp_path / "missing.json")
