"""Broken and foreign checkpoints: each error says what and where, in one line, and leaves no file."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoint
from convert_files import Weights, edit_json, header_of, read_keys
from tiny_checkpoint import write_safetensors, write_weights

from pydiffgguf.convert import convert
from pydiffgguf.errors import ModelFormatError, UnsupportedError

ConfigEdit = Callable[[dict[str, Any]], object]
BROKEN_CONFIGS: dict[str, tuple[ConfigEdit, type[Exception], str]] = {
    "canvas 0": (lambda c: c.update(canvas_length=0), ModelFormatError, "'canvas_length'"),
    "another model": (lambda c: c.update(model_type="gemma3"), ModelFormatError, "got 'gemma3'"),
    "no experts": (lambda c: c["text_config"].pop("num_experts"), ModelFormatError, "'text_config.num_experts'"),
    "a string": (lambda c: c["text_config"].update(head_dim="32"), ModelFormatError, "'text_config.head_dim'"),
    "a boolean": (lambda c: c["text_config"].update(head_dim=True), ModelFormatError, "got True"),
    "too big": (lambda c: c["text_config"].update(vocab_size=2**40), ModelFormatError, "'text_config.vocab_size'"),
    "many layers": (lambda c: c["text_config"].update(num_hidden_layers=10**9), ModelFormatError, "num_hidden_layers"),
    "eps inf": (lambda c: c["text_config"].update(rms_norm_eps=float("inf")), ModelFormatError, "rms_norm_eps"),
    "eps huge": (lambda c: c["text_config"].update(rms_norm_eps=10**400), ModelFormatError, "rms_norm_eps"),
    "too many experts": (lambda c: c["text_config"].update(top_k_experts=9), ModelFormatError, "from 1 to 8, got 9"),
    "heads": (lambda c: c["text_config"].update(num_key_value_heads=3), ModelFormatError, "do not divide"),
    "odd head": (lambda c: c["text_config"].update(head_dim=31), ModelFormatError, "even"),
    "types too short": (lambda c: c["text_config"]["layer_types"].pop(), ModelFormatError, "list of 6"),
    "odd type": (
        lambda c: c["text_config"]["layer_types"].__setitem__(2, "linear_attention"),
        ModelFormatError,
        "layer 2",
    ),
    "layer index": (
        lambda c: c["text_config"]["per_layer_config"].update({"6": {}}),
        ModelFormatError,
        "'6' is not a layer index",
    ),
    "layer key": (
        lambda c: c["text_config"]["per_layer_config"].update({"5": {"intermediate_size": 7}}),
        UnsupportedError,
        "per_layer_config.5.intermediate_size",
    ),
    "full layers differ": (
        lambda c: c["text_config"].update(
            layer_types=["full_attention"] * 6,
            per_layer_config={"0": {"head_dim": 64}, "5": {"head_dim": 64, "num_key_value_heads": 1}},
        ),
        UnsupportedError,
        "full layers differ",
    ),
    "all": (lambda c: c["text_config"].update(use_bidirectional_attention="all"), UnsupportedError, "'all'"),
    "biases": (lambda c: c["text_config"].update(attention_bias=True), UnsupportedError, "attention_bias"),
    "untied": (lambda c: c.update(tie_word_embeddings=False), UnsupportedError, "tie_word_embeddings"),
    "text untied": (
        lambda c: c["text_config"].update(tie_word_embeddings=False),
        UnsupportedError,
        "text_config.tie_word_embeddings",
    ),
    "silu": (lambda c: c["text_config"].update(hidden_activation="silu"), UnsupportedError, "'silu'"),
    "no softcap": (lambda c: c["text_config"].update(final_logit_softcapping=None), UnsupportedError, "softcap"),
    "yarn": (
        lambda c: c["text_config"]["rope_parameters"]["full_attention"].update(rope_type="yarn"),
        UnsupportedError,
        "'yarn'",
    ),
    "rope factor": (
        lambda c: c["text_config"]["rope_parameters"]["full_attention"].update(factor=8.0),
        UnsupportedError,
        "factor 8.0",
    ),
    "rope gone": (
        lambda c: c["text_config"]["rope_parameters"].pop("sliding_attention"),
        ModelFormatError,
        "rope_parameters.sliding_attention",
    ),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_broken_or_foreign_configs_say_which_key(copy: Path, tmp_path: Path, case: str) -> None:
    """One line, with the file, the key, and what was expected; nothing is written."""
    edit, error, text = BROKEN_CONFIGS[case]
    edit_json(copy / "config.json", edit)
    with pytest.raises(error, match=re.escape(text)) as caught:
        convert(copy, tmp_path / "x.gguf")
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("x.gguf*"))


@pytest.mark.parametrize(
    ("edit", "error", "text"),
    [
        ({"t_min": "hot"}, ModelFormatError, "'t_min'"),
        ({"t_max": -1}, ModelFormatError, "'t_max'"),
        ({"max_denoising_steps": 0}, ModelFormatError, "'max_denoising_steps'"),
        ({"stability_threshold": 1.5}, ModelFormatError, "'stability_threshold'"),
        ({"sampler_config": {"_cls_name": "OtherSamplerConfig"}}, UnsupportedError, "OtherSamplerConfig"),
        ({"sampler_config": 3}, ModelFormatError, "'sampler_config'"),
        ({"eos_token_id": [1, 512]}, ModelFormatError, "'eos_token_id'"),
        ({"eos_token_id": "<eos>"}, ModelFormatError, "'eos_token_id'"),
    ],
)
def test_broken_generation_configs_say_which_key(
    copy: Path, tmp_path: Path, edit: dict[str, Any], error: type[Exception], text: str
) -> None:
    edit_json(copy / "generation_config.json", lambda c: c.update(edit))
    with pytest.raises(error, match=re.escape(text)) as caught:
        convert(copy, tmp_path / "x.gguf")
    assert "generation_config.json" in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_files_that_are_no_json_objects_are_named(copy: Path, tmp_path: Path, file: str, content: bytes) -> None:
    (copy / file).write_bytes(content)
    with pytest.raises(ModelFormatError, match=re.escape(str(copy / file))) as caught:
        convert(copy, tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


NORM = "model.decoder.layers.2.input_layernorm.weight"
HeaderEdit = Callable[[dict[str, Any]], object]
BROKEN_HEADERS: dict[str, tuple[HeaderEdit, str]] = {
    "missing tensor": (lambda h: h.pop(NORM), f"'{NORM}' is missing"),
    "missing encoder scalar": (
        lambda h: h.pop("model.encoder.language_model.layers.0.layer_scalar"),
        "'model.encoder.language_model.layers.0.layer_scalar' is missing",
    ),
    "wrong dtype": (lambda h: h[NORM].update(dtype="I32"), "expected dtype F32, F16, BF16, got I32"),
    "wrong shape": (lambda h: h[NORM].update(shape=[2, 64]), "expected shape [128], got [2, 64]"),
    "short data": (lambda h: h[NORM].update(shape=[64]), "needs 256 bytes, got 512"),
    "past the end": (lambda h: h[NORM].update(data_offsets=[10**9, 10**9 + 512]), "cut short: tensor"),
    "backwards": (lambda h: h[NORM].update(data_offsets=[512, 0]), "broken header"),
    "no shape": (lambda h: h[NORM].pop("shape"), "broken header"),
    "odd shape": (lambda h: h[NORM].update(shape=[-128]), "broken header"),
    "no object": (lambda h: h.update({NORM: 3}), "broken header"),
    "name of two lines": (lambda h: h.update({f"a\n{NORM}": h[NORM]}), "broken header"),
    "dtype that colours": (lambda h: h[NORM].update(dtype="\x1b[31mF32"), "broken header"),
}


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_broken_safetensors_say_what_and_where(copy: Path, tmp_path: Path, case: str) -> None:
    edit, text = BROKEN_HEADERS[case]
    header, body = header_of(copy / "model.safetensors")
    edit(header)
    write_safetensors(copy / "model.safetensors", header, body)
    with pytest.raises(ModelFormatError, match=re.escape(text)) as caught:
        convert(copy, tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("x.gguf*"))


def test_a_cut_safetensors_file_is_noticed_wherever_it_ends(copy: Path, tmp_path: Path) -> None:
    """Every one of 60 places, the header's included, is a ModelFormatError before anything is written."""
    file = copy / "model.safetensors"
    size = file.stat().st_size
    for cut in sorted({*range(0, 12), *np.linspace(12, size - 1, 48).astype(int).tolist()}, reverse=True):
        os.truncate(file, cut)
        with pytest.raises(ModelFormatError, match=r"cut short|not a safetensors file"):
            convert(copy, tmp_path / "x.gguf")
    assert not list(tmp_path.glob("x.gguf*"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded") / "tiny"
    tiny_checkpoint.make_checkpoint(path, sharded=True, num_hidden_layers=2)
    return path


def test_a_missing_or_cut_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    """The message has the shard's name, and how much of the model is in it."""
    path = Path(shutil.copytree(sharded, tmp_path / "src"))
    shard = sorted(path.glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ModelFormatError, match=rf"{shard.name}: cut short"):
        convert(path, tmp_path / "x.gguf", allow_missing_tokenizer=True)
    shard.unlink()
    with pytest.raises(ModelFormatError, match=rf"{shard.name}: the shard is missing; .* expects \d+ tensors in it"):
        convert(path, tmp_path / "x.gguf", allow_missing_tokenizer=True)


def test_a_broken_index_is_named(sharded: Path, tmp_path: Path) -> None:
    """A tensor in another shard than the index says, a path for a file name, no index at all."""
    path = Path(shutil.copytree(sharded, tmp_path / "src"))
    index = path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    name = "model.decoder.norm.weight"
    other = next(f for f in sorted(set(good["weight_map"].values())) if f != good["weight_map"][name])
    for value, text in [(other, f"'{name}' is missing, though"), ("../x", "not a file name"), (3, "not a file name")]:
        index.write_text(json.dumps({"weight_map": good["weight_map"] | {name: value}}))
        with pytest.raises(ModelFormatError, match=re.escape(text)):
            convert(path, tmp_path / "x.gguf", allow_missing_tokenizer=True)
    index.write_text("{}")
    with pytest.raises(ModelFormatError, match="weight_map"):
        convert(path, tmp_path / "x.gguf", allow_missing_tokenizer=True)
    index.unlink()
    with pytest.raises(ModelFormatError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        convert(path, tmp_path / "x.gguf", allow_missing_tokenizer=True)


def test_a_source_that_is_no_checkpoint_folder_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        convert(tmp_path / "nowhere", tmp_path / "x.gguf")
    with pytest.raises(ModelFormatError, match="not a GGUF file"):
        convert(source / "model.safetensors", tmp_path / "x.gguf")
    with pytest.raises(ModelFormatError, match=r"no config.json"):
        convert(tmp_path, tmp_path / "x.gguf")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any bytes")
def test_a_folder_name_that_is_no_text_is_no_obstacle(source: Path, tmp_path: Path) -> None:
    """Bytes that are not UTF-8 become question marks in general.name."""
    path = shutil.copytree(source, os.fsdecode(bytes(tmp_path) + b"/a\xff"))
    convert(path, tmp_path / "x.gguf", type="f32")
    assert read_keys(tmp_path / "x.gguf")["general.name"] == ("STRING", "a?")


@pytest.mark.parametrize(
    ("value", "kind", "error", "text"),
    [
        (float("nan"), "q8_0", ModelFormatError, "is NaN or infinity"),
        (float("-inf"), "f32", ModelFormatError, "is NaN or infinity"),
        (-70000.0, "f16", UnsupportedError, "beyond the range of f16"),
        (1e7, "q8_0", UnsupportedError, "beyond the range of q8_0"),
    ],
)
def test_values_that_cannot_be_written_leave_no_file(
    copy: Path, weights: Weights, tmp_path: Path, value: float, kind: str, error: type[Exception], text: str
) -> None:
    """NaN in the checkpoint, or a value that the type would turn into infinity, ends the conversion and names it."""
    changed = {name: tensor.copy() for name, tensor in weights.items()}
    changed["model.decoder.layers.4.mlp.up_proj.weight"][5, 7] = value
    write_weights(copy / "model.safetensors", changed)
    with pytest.raises(error, match=rf"tiny: tensor 'model.*up_proj\.weight': a weight .*{text}"):
        convert(copy, tmp_path / "x.gguf", type=kind)
    assert not list(tmp_path.glob("x.gguf*"))
