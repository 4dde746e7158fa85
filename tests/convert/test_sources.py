"""The many forms of one checkpoint: shards, spellings of the config, names of tied weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint
from convert_files import Weights, edit_json
from tiny_checkpoint import write_weights

from pydiffgguf.convert import convert
from pydiffgguf.errors import UnsupportedError


def test_two_runs_and_shards_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    """Output depends on the weights alone: not on the run, nor on how the checkpoint is cut into files."""
    tiny_checkpoint.make_checkpoint(tmp_path / "sharded" / "tiny", tokenizer=True, sharded=True)
    assert len(list((tmp_path / "sharded" / "tiny").glob("model-*.safetensors"))) > 3
    for kind in ("f32", "q8_0"):
        outputs = []
        for i, path in enumerate([source, source, tmp_path / "sharded" / "tiny"]):
            convert(path, tmp_path / f"{i}.gguf", type=kind)
            outputs.append((tmp_path / f"{i}.gguf").read_bytes())
        assert outputs[0] == outputs[1] == outputs[2]


def test_both_spellings_of_the_config_give_the_same_bytes(source: Path, copy: Path, tmp_path: Path) -> None:
    """per_layer_config, and global_head_dim with num_global_key_value_heads; the former wins where both stand."""
    convert(source, tmp_path / "a.gguf", type="f32")

    def other_spelling(config: dict[str, Any]) -> None:
        assert config["text_config"].pop("per_layer_config") == {"5": {"head_dim": 64, "num_key_value_heads": 1}}
        config["text_config"] |= {"global_head_dim": 64, "num_global_key_value_heads": 1}

    edit_json(copy / "config.json", other_spelling)
    convert(copy, tmp_path / "b.gguf", type="f32")
    overrides = {"5": {"head_dim": 64, "num_key_value_heads": 1}}
    edit_json(
        copy / "config.json",
        lambda c: c["text_config"].update(per_layer_config=overrides, global_head_dim=8, num_global_key_value_heads=4),
    )
    convert(copy, tmp_path / "c.gguf", type="f32")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


def test_a_bare_text_config_is_read_too(source: Path, copy: Path, tmp_path: Path) -> None:
    """The text part alone, with canvas_length beside, means the same model."""
    convert(source, tmp_path / "a.gguf", type="f32")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config["text_config"] | {"canvas_length": config["canvas_length"]}))
    convert(copy, tmp_path / "b.gguf", type="f32")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def rename(weights: Weights, rule: Callable[[str], list[str]]) -> Weights:
    return {new: tensor.copy() for name, tensor in weights.items() for new in rule(name)}


def tied_places(name: str) -> list[str]:
    """The decoder's name and the encoder's of a tied pair; names that are not tied alone."""
    tied = name.startswith("model.decoder.") and "self_conditioning" not in name and "layer_scalar" not in name
    other = name.replace("model.decoder.", "model.encoder.language_model.")
    head = ["lm_head.weight"] if name.endswith("embed_tokens.weight") else []
    return [name, other, *head] if tied else [name]


@pytest.mark.parametrize("place", ["encoder only", "head only", "copies"])
def test_any_name_of_a_tied_pair_will_do(
    source: Path, copy: Path, weights: Weights, tmp_path: Path, place: str
) -> None:
    """Whatever names a writer left, the result is the same."""
    pick = {
        "encoder only": lambda name: tied_places(name)[1:2] or [name],
        "head only": lambda name: tied_places(name)[-1:] if "embed_tokens" in name else [name],
        "copies": tied_places,
    }[place]
    write_weights(copy / "model.safetensors", rename(weights, pick))
    convert(source, tmp_path / "a.gguf", type="f32")
    convert(copy, tmp_path / "b.gguf", type="f32")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("name", ["lm_head.weight", "model.encoder.language_model.layers.3.mlp.up_proj.weight"])
def test_a_copy_that_differs_is_refused(copy: Path, weights: Weights, tmp_path: Path, name: str) -> None:
    """The reference unties such a pair; one stack of weights could not hold it."""
    changed = rename(weights, tied_places)
    changed[name][0, 0] += 1
    write_weights(copy / "model.safetensors", changed)
    with pytest.raises(UnsupportedError, match=re.escape(f"'{name}' differs from")):
        convert(copy, tmp_path / "x.gguf")
