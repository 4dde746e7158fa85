"""Whatever a file does ends in a typed error of one line, with the process alive."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType
from gguf_rewrite import DROP, Typed, read_tensor, rewrite

from pydiffgguf import DiffusionModel, ModelFormatError, ModelWarning, UnsupportedError
from pydiffgguf.convert import convert, inspect_file

NUMBERS = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.key_length_swa",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.freq_base_swa",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "final_logit_softcapping",
]
# A file without these works, with a warning or with less.
OPTIONAL_TENSORS = re.compile(r"enc_layer_output_scale|self_cond_")


def open_fails(path: Path, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        DiffusionModel(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_file_not_found(tmp_path: Path) -> None:
    open_fails(tmp_path / "none.gguf", FileNotFoundError, "none.gguf")


def test_a_directory_is_said_to_be_one(tmp_path: Path) -> None:
    open_fails(tmp_path, IsADirectoryError, str(tmp_path.name))


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"", "empty"), (b"GG", "not a GGUF"), (b"PK\x03\x04" + b"\0" * 100, "not a GGUF"), (b"GGUF", "GGUF header")],
)
def test_what_is_no_gguf_is_told_so(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    open_fails(path, ModelFormatError, match)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer .* `git lfs pull`"),
        (b"\n<!DOCTYPE html><html><head>", "an HTML page, .* write resolve in place of blob"),
        (b"\x40\0\0\0\0\0\0\0{" + b" " * 63, "a safetensors file: `pydiffgguf convert` .* the folder"),
        (b"PK\x03\x04" + b"\0" * 100, "a zip archive"),
    ],
)
def test_what_people_have_in_a_models_place_is_named(tmp_path: Path, content: bytes, match: str) -> None:
    """With what to do about it, by `inspect` and `convert` too."""
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    open_fails(path, ModelFormatError, match)
    for use in (inspect_file, lambda source: convert(source, tmp_path / "out.gguf")):
        with pytest.raises(ModelFormatError, match=match):
            use(path)


@pytest.mark.parametrize(
    ("kind", "architecture", "match"),
    [
        ("adapter", "diffusion-gemma", "a LoRA adapter, not a model: .* --lora"),
        ("mmproj", "clip", r"an image encoder \(mmproj\), not a model: .* --mmproj"),
        ("model", "clip", r"an image encoder \(mmproj\)"),
        ("imatrix", "", "an importance matrix, not a model: .* --imatrix"),
        ("model", "qwen3", '"qwen3", expected "diffusion-gemma"; other models run in llama.cpp or Ollama'),
    ],
)
def test_a_gguf_that_is_no_model_says_what_it_is(tmp_path: Path, kind: str, architecture: str, match: str) -> None:
    """By its own keys, with the option that takes it."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", architecture)
    writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    open_fails(tmp_path / "x.gguf", ModelFormatError, match)
    with pytest.raises(ModelFormatError, match=match):
        inspect_file(tmp_path / "x.gguf")


@pytest.mark.parametrize("use_mmap", [True, False])
def test_a_file_cut_anywhere_is_refused(tiny_gguf: Path, tmp_path: Path, use_mmap: bool) -> None:
    """200 places, most of them in the header, where each one hits another structure."""
    path = tmp_path / "cut.gguf"
    shutil.copy(tiny_gguf, path)
    reader = gguf.GGUFReader(tiny_gguf)
    header = reader.data_offset
    size = max(int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors)  # padding may stand behind
    places = {int(x) for x in np.linspace(0, header, 150)} | {int(x) for x in np.linspace(header, size - 1, 50)}
    for place in sorted(places, reverse=True):
        with path.open("r+b") as file:
            file.truncate(place)
        with pytest.raises(ModelFormatError) as caught:
            DiffusionModel(path, use_mmap=use_mmap)
        assert "\n" not in str(caught.value)
    assert len(places) >= 195


def test_another_architecture_is_named(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "llama.gguf"
    rewrite(tiny_gguf, path, keys={"general.architecture": Typed("llama", GGUFValueType.STRING)})
    open_fails(path, ModelFormatError, '"llama", expected "diffusion-gemma"')


def test_a_missing_key_that_nothing_tells_is_named(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    rewrite(tiny_gguf, path, keys={"diffusion-gemma.expert_used_count": DROP})
    open_fails(path, ModelFormatError, "key diffusion-gemma.expert_used_count is missing")


def logits_of(path: Path) -> np.ndarray[Any, Any]:
    with DiffusionModel(path, n_ctx=400) as model, model.session() as session:
        session.encode(range(2, 40))
        return session.denoise(np.arange(model.config.canvas_length) % 500)


def test_every_key_but_one_may_be_missing(tiny_gguf: Path, tmp_path: Path) -> None:
    """The file opens with one warning, which names the key, and gives the logits of the whole file: from what the
    tensors say, or, here with the same values in the whole file, from the defaults of transformers."""
    whole, path = tmp_path / "whole.gguf", tmp_path / "x.gguf"
    defaults = {"attention.sliding_window": 512, "context_length": 131_072}
    values = {f"diffusion-gemma.{k}": v for k, v in defaults.items()}
    rewrite(tiny_gguf, whole, keys=values | {"diffusion.canvas_length": 256})
    expected = logits_of(whole)
    names = [f"diffusion-gemma.{key}" for key in NUMBERS if key != "expert_used_count"]
    for name in [*names, "diffusion.canvas_length"]:
        rewrite(whole, path, keys={name: DROP})
        with pytest.warns(ModelWarning, match=f"key {re.escape(name)} is missing: ") as caught:
            got = logits_of(path)
        assert len(caught) == 1
        assert np.array_equal(got, expected), name


@pytest.mark.parametrize("name", [*(f"diffusion-gemma.{key}" for key in NUMBERS), "diffusion.canvas_length"])
def test_a_key_of_the_wrong_type_is_named(tiny_gguf: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.gguf"
    rewrite(tiny_gguf, path, keys={name: Typed("seven", GGUFValueType.STRING)})
    open_fails(path, ModelFormatError, f"key {re.escape(name)} has type str, expected")


U32, F32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("diffusion.canvas_length", Typed(0, U32)),
        ("diffusion-gemma.block_count", Typed(0, U32)),
        ("diffusion-gemma.block_count", Typed(4_000_000_000, U32)),
        ("diffusion-gemma.expert_used_count", Typed(9, U32)),
        ("diffusion-gemma.attention.sliding_window", Typed(0, U32)),
        ("diffusion-gemma.attention.key_length", Typed(63, U32)),
        ("diffusion-gemma.attention.layer_norm_rms_epsilon", Typed(float("nan"), F32)),
        ("diffusion-gemma.rope.freq_base", Typed(float("inf"), F32)),
        ("diffusion-gemma.final_logit_softcapping", Typed(-1.0, F32)),
        ("diffusion-gemma.attention.head_count_kv", Typed([1] * 5, GGUFValueType.ARRAY, GGUFValueType.INT32)),
        ("diffusion-gemma.attention.head_count_kv", Typed([3] * 6, GGUFValueType.ARRAY, GGUFValueType.INT32)),
        ("diffusion-gemma.attention.sliding_window_pattern", Typed([True], GGUFValueType.ARRAY, GGUFValueType.BOOL)),
        ("diffusion.eb_t_max", Typed(float("nan"), F32)),
        ("diffusion.eb_max_steps", Typed(0, U32)),
    ],
)
def test_a_key_out_of_range_is_refused(tiny_gguf: Path, tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "x.gguf"
    rewrite(tiny_gguf, path, keys={name: value})
    open_fails(path, ModelFormatError, "key|layer|sampler")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("diffusion-gemma.attention.shared_kv_layers", Typed(2, U32)),
        ("diffusion-gemma.embedding_length_per_layer_input", Typed(256, U32)),
        ("diffusion-gemma.attention.value_length", Typed(32, U32)),
        ("diffusion-gemma.rope.dimension_count", Typed(32, U32)),
    ],
)
def test_what_is_not_built_is_unsupported(tiny_gguf: Path, tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "x.gguf"
    rewrite(tiny_gguf, path, keys={name: value})
    open_fails(path, UnsupportedError, re.escape(name))


def all_tensors(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    return [(t.name, tuple(int(n) for n in reversed(t.shape))) for t in gguf.GGUFReader(path).tensors]


def test_a_missing_tensor_is_named_whichever_it_is(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    checked = 0
    for name, _ in all_tensors(tiny_gguf):
        layer = re.match(r"blk\.(\d+)\.", name)
        if OPTIONAL_TENSORS.search(name) or (layer and layer[1] not in "15"):  # one sliding and one full layer
            continue
        rewrite(tiny_gguf, path, tensors={name: DROP})
        open_fails(path, ModelFormatError, f"tensor {re.escape(name)} is missing")
        checked += 1
    assert checked > 40


def test_a_wrong_shape_is_named_with_both_shapes(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    checked = 0
    for name, shape in all_tensors(tiny_gguf):
        layer = re.match(r"blk\.(\d+)\.", name)
        if name == "token_embd.weight" or (layer and layer[1] not in "15"):
            continue
        wrong = np.zeros((*shape[:-1], shape[-1] + 32), np.float32)
        rewrite(tiny_gguf, path, tensors={name: wrong})
        ne = ", ".join(str(n) for n in reversed(wrong.shape))
        open_fails(path, ModelFormatError, rf"tensor {re.escape(name)} has shape \[{ne}\], expected")
        checked += 1
    assert checked > 40


def test_a_tokenizer_that_cannot_be_used_leaves_token_ids(tiny_gguf: Path, tmp_path: Path) -> None:
    """The file opens with a warning, generates from ids, and says why when text is asked for."""
    path = tmp_path / "x.gguf"
    embedding = read_tensor(tiny_gguf, "token_embd.weight")
    rewrite(tiny_gguf, path, tensors={"token_embd.weight": np.vstack([embedding, embedding[:3]])})
    with pytest.warns(ModelWarning, match="tokenizer.ggml.tokens has 512 entries, .* 515") as caught:
        model = DiffusionModel(path)
    assert len(caught) == 1
    with model:
        assert model.generate([2, 5, 6], max_tokens=8, steps=2, seed=1).tokens
        for ask in (lambda: model.generate("hello"), lambda: model.tokenize("hello"), lambda: model.tokenizer):
            with pytest.raises(UnsupportedError, match=r"cannot be used .* 512 entries.*: pass token ids"):
                ask()


def test_an_untied_head_and_a_v_on_a_full_layer_are_unsupported(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    embedding = read_tensor(tiny_gguf, "token_embd.weight")
    rewrite(tiny_gguf, path, tensors={"output.weight": embedding})
    open_fails(path, UnsupportedError, "output.weight")
    k = read_tensor(tiny_gguf, "blk.5.attn_k.weight")
    rewrite(tiny_gguf, path, tensors={"blk.5.attn_v.weight": k})
    open_fails(path, UnsupportedError, "attn_v")


def test_files_without_encoder_scalars_or_self_conditioning_work_and_warn(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    missing = {name: DROP for name, _ in all_tensors(tiny_gguf) if OPTIONAL_TENSORS.search(name)}
    rewrite(tiny_gguf, path, tensors=missing)
    with pytest.warns(ModelWarning) as caught:
        model = DiffusionModel(path)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert any("encoder scalars" in text for text in texts)
    assert any("self-conditioning" in text for text in texts)
    with model:
        assert not model.config.has_self_conditioning
        assert not model.config.has_encoder_scalars
        assert model.generate("hello", max_tokens=8, steps=2, seed=1).tokens


def test_gpu_layers_on_a_cpu_build_raise_with_the_cure(tiny_gguf: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"CMAKE_ARGS=.*pip install"):
        DiffusionModel(tiny_gguf, n_gpu_layers=3)
