"""Adapters by their names on a hub, which tests/hub_server.py plays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from adapter_folders import pair, write_folder
from hub_server import COMMIT, Repo, environment, serve

from pydiffgguf import demo_model_path
from pydiffgguf.convert import convert

LOAD = """
import json, sys
from pydiffgguf import DiffusionModel, demo_model_path

with DiffusionModel(demo_model_path(), n_threads=1) as model:
    for spec in sys.argv[1:]:
        try:
            adapter = model.load_lora(spec)
            print(json.dumps([adapter.name, adapter.n_pairs]))
        except Exception as error:
            print(json.dumps([type(error).__name__, str(error)]))
"""


def load(url: str, home: Path, *specs: str) -> list[list[Any]]:
    """[name, pairs] or [exception, message] of each, loaded beside the demo model in a process of its own."""
    command = [sys.executable, "-c", LOAD, *specs]
    env = environment(url, home)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_adapters_of_a_hub_load_by_their_names(tmp_path: Path) -> None:
    """A repository's folder, a folder in it, a GGUF, a revision; nothing else is fetched. What is no adapter, and what
    is not there, is said in one line."""
    folder = write_folder(tmp_path / "one", pair("decoder.layers.1.self_attn.q_proj", 128, 256, rank=2), r=2)
    with pytest.warns(UserWarning, match="llama.cpp"):
        convert(folder, tmp_path / "one.gguf")
    peft = {file.name: file.read_bytes() for file in folder.iterdir()}
    files = {**peft, **{f"checkpoint-9/{name}": data for name, data in peft.items()}}
    files |= {"quick.gguf": (tmp_path / "one.gguf").read_bytes(), "optimizer.pt": b"large", "README.md": b"# it"}
    repos = {
        "a/lora": Repo(files),
        "a/model": Repo({"config.json": b"{}"}),
        "a/demo": Repo({"demo.gguf": demo_model_path().read_bytes()}),
    }
    good = ["hf:a/lora", "hf:a/lora:checkpoint-9", "hf:a/lora:quick.gguf"]
    with serve(repos) as hub:
        found = load(
            hub.url,
            tmp_path / "home",
            *good,
            f"hf:a/lora@{COMMIT}:quick.gguf",
            "hf:a/model",
            "hf:a/none",
            "hf:a/demo:demo.gguf",
        )
        assert {*peft, "quick.gguf"} <= set(hub.downloaded())
        assert not {"optimizer.pt", "README.md"}.intersection(hub.downloaded())
    assert found[:3] == [["lora", 1], ["checkpoint-9", 1], ["quick", 1]]
    assert found[3][0] == "ValueError" and "an adapter named 'quick' is loaded" in found[3][1]
    assert found[4][1] == ("hf:a/model holds no adapter_config.json: name a folder that has one, or a .gguf file")
    assert found[5][0] == "FileNotFoundError" and "no such repository" in found[5][1]
    assert found[6] == ["ModelFormatError", "demo: is a model, not an adapter"]
