"""Adapters of a served model: listed, scaled, and chosen by a request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_folders import pair, write_folder
from serving import Running, running

from pydiffgguf import DiffusionModel


@pytest.fixture(scope="module")
def adapted(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose model has two adapters, so large that texts change."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, seed in (("one", 1), ("two", 7)):
        tensors = pair("decoder.layers.1.self_attn.q_proj", 128, 128, seed=seed)
        write_folder(folder / name, {k: v * np.float32(20) if "lora_B" in k else v for k, v in tensors.items()})

    def opened(told: Callable[[float], None]) -> DiffusionModel:
        return DiffusionModel(tiny_gguf, n_threads=1, lora=[folder / "one", (folder / "two", 0.5)])

    with running(opened) as one:
        while one.client.get("/health").status_code != 200:
            pass
        yield one


def text(adapted: Running, **fields: Any) -> str:
    body = {"prompt": list(range(20, 60)), "max_tokens": 30, "seed": 3, "diffusion": {"steps": 4}, **fields}
    answer = adapted.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_adapters_are_listed_and_scaled(adapted: Running) -> None:
    """By number, in the order in which they were loaded; a list that leaves one out turns it off."""
    get = adapted.client.get("/lora-adapters").json
    assert get() == [{"id": 0, "path": "one", "scale": 1.0}, {"id": 1, "path": "two", "scale": 0.5}]
    before = text(adapted)
    assert adapted.client.post("/lora-adapters", json=[{"id": 0, "scale": 0.0}]).json() == {"success": True}
    assert [each["scale"] for each in adapted.client.get("/lora-adapters").json()] == [0.0, 0.0]
    off = text(adapted)
    assert off != before and off == text(adapted, lora=[])
    both = [{"id": 0, "scale": 1.0}, {"id": 1, "scale": 0.5}]
    adapted.client.post("/lora-adapters", json=both)
    assert text(adapted) == before and text(adapted, lora=both) == before


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([{"id": 7, "scale": 1}], "no LoRA adapter with id 7"),
        ([{"id": 0}], "scale"),
        ([5], "id"),
        ([{"id": 0, "scale": 1e31}], "scale"),
        ({"id": 0}, "the body must be a list"),
    ],
)
def test_a_wrong_list_changes_nothing(adapted: Running, body: Any, said: str) -> None:
    """And says what is wrong, in a request as in a setting."""
    before = adapted.client.get("/lora-adapters").json()
    answer = adapted.client.post("/lora-adapters", json=body)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]
    assert adapted.client.get("/lora-adapters").json() == before
    if isinstance(body, list):
        refused = adapted.post("/v1/completions", {"prompt": "a", "lora": body})
        assert refused.status_code == 400 and said in refused.json()["error"]["message"]


def test_without_adapters_the_field_has_no_effect(server: Running) -> None:
    """Editors send it to whatever answers; the header names it."""
    answer = server.post("/v1/completions", {"prompt": "a", "max_tokens": 2, "lora": [{"id": 0, "scale": 0.5}]})
    assert answer.status_code == 200 and answer.headers["x-ignored-params"] == "lora"
    assert server.client.get("/lora-adapters").json() == []
