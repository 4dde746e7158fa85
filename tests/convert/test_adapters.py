"""Adapters as files: PEFT folders and GGUF files read into one table, written, inspected, and refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_folders import PREFIX, Array, factors, pair, write_folder
from gguf import GGUFReader, GGUFWriter
from hostile_headers import gguf_bytes, gguf_text, tensor_info

from pydiffgguf.cli import main
from pydiffgguf.convert import convert, inspect_adapter
from pydiffgguf.convert.adapter.opening import read_adapter
from pydiffgguf.convert.adapter.pairs import Adapter, with_region
from pydiffgguf.convert.adapter.peft import BaseShape
from pydiffgguf.errors import DiffGGUFError, ModelFormatError, UnsupportedError

Q = "layers.0.self_attn.q_proj"


def both_regions(equal: bool = False) -> dict[str, Array]:
    """A decoder and an encoder set of two matrices, and self-conditioning."""
    tensors: dict[str, Array] = {}
    for seed, region in enumerate(("decoder.", "encoder.language_model.")):
        at = 0 if equal else seed
        tensors |= pair(region + Q, 64, 32, seed=at) | pair(region + "layers.1.mlp.down_proj", 48, 64, seed=10 + at)
    return tensors | pair("decoder.self_conditioning.up_proj", 64, 48, seed=5)


def places(adapter: Adapter) -> list[tuple[str, str]]:
    return [(p.target, p.region) for p in adapter.pairs]


# ---------------------------------------------------------------------------------------------------------- reading


def test_a_folder_of_two_regions_is_read_as_two_sets(tmp_path: Path) -> None:
    """Independent factors for decoder and encoder; self-conditioning is the decoder's."""
    adapter = read_adapter(write_folder(tmp_path / "mine", both_regions(), base_model_name_or_path="some/base"))
    assert (adapter.name, adapter.base) == ("mine", "some/base")
    assert sorted(places(adapter)) == [
        ("blk.0.attn_q", "decoder"),
        ("blk.0.attn_q", "encoder"),
        ("blk.1.ffn_down", "decoder"),
        ("blk.1.ffn_down", "encoder"),
        ("self_cond_up", "decoder"),
    ]
    assert {p.scale for p in adapter.pairs} == {2.0}


def test_two_equal_sets_are_read_as_one_for_both_modes(tmp_path: Path) -> None:
    """What a model with tied factors trains is held once."""
    adapter = read_adapter(write_folder(tmp_path / "tied", both_regions(equal=True)))
    assert sorted(places(adapter)) == [
        ("blk.0.attn_q", "both"),
        ("blk.1.ffn_down", "both"),
        ("self_cond_up", "decoder"),
    ]


@pytest.mark.parametrize(
    ("key", "region"),
    [
        (f"base_model.model.model.decoder.{Q}.lora_{{}}.default.weight", "decoder"),
        (f"model.encoder.language_model.{Q}.lora_{{}}.weight", "encoder"),
        (f"base_model.model.model.language_model.{Q}.lora_{{}}.weight", "both"),
        (f"base_model.model.{Q}.lora_{{}}.weight", "both"),
        (f"{Q}.lora_{{}}.weight", "both"),
    ],
)
def test_every_spelling_of_a_key_is_understood(tmp_path: Path, key: str, region: str) -> None:
    """With and without PEFT's prefix, the adapter's name and the region."""
    a, b = factors(0, 64, 32, 4)
    adapter = read_adapter(write_folder(tmp_path / "x", {key.format("A"): a, key.format("B"): b}))
    assert places(adapter) == [("blk.0.attn_q", region)]


def test_nemos_single_stack_acts_in_both_modes(tmp_path: Path) -> None:
    """Its second config says so, whatever its keys do."""
    folder = write_folder(tmp_path / "nemo", pair("decoder." + Q, 64, 32))
    (folder / "automodel_peft_config.json").write_text("{}")
    assert places(read_adapter(folder)) == [("blk.0.attn_q", "both")]


def test_the_first_pattern_that_matches_gives_rank_and_alpha(tmp_path: Path) -> None:
    """In the file's order, from the start of a module's name; rslora divides by the root."""
    tensors = pair("decoder." + Q, 64, 32, rank=2) | pair("decoder.layers.0.self_attn.k_proj", 64, 16, rank=3)
    patterns = {"q_proj": 2, "layers.0.self_attn.k_proj": 3, "k_proj": 7}
    alphas = {"v_proj": 99, r"self_attn\.q_proj": 5, "q_proj": 7}
    folder = write_folder(tmp_path / "p", tensors, rank_pattern=patterns, alpha_pattern=alphas, use_rslora=True)
    scales = {p.target: p.scale for p in read_adapter(folder).pairs}
    assert scales == pytest.approx({"blk.0.attn_q": 5 / 2**0.5, "blk.0.attn_k": 8 / 3**0.5})


def test_pairs_whose_product_is_zero_are_left_out_and_counted(tmp_path: Path) -> None:
    """The last encoder layer's never get a gradient."""
    tensors = both_regions()
    tensors[f"{PREFIX}encoder.language_model.layers.1.mlp.down_proj.lora_B.weight"][:] = 0
    adapter = read_adapter(write_folder(tmp_path / "zero", tensors))
    assert (len(adapter.pairs), adapter.n_zero) == (4, 1)


E_, HIDDEN, FFN, RANK = 3, 20, 6, 2


def expert_delta(a: Array, b: Array) -> Array:
    """B A of every expert: [E, out, in]."""
    return np.einsum("eor,eri->eoi", b, a)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("with_base", [False, True])
def test_experts_are_told_apart_by_their_widths(tmp_path: Path, swapped: bool, with_base: bool) -> None:
    """Gate_up and down, as PEFT writes them and as 0.17 and 0.18 did, with the delta of the formula."""
    tensors, expected = {}, {}
    for seed, (suffix, target, n_in, n_out) in enumerate(
        ((".base_layer", "gate_up", HIDDEN, 2 * FFN), ("", "down", FFN, HIDDEN))
    ):
        rng = np.random.default_rng(seed)
        a = rng.standard_normal((E_ * RANK, n_out if swapped else n_in)).astype(np.float32)
        b = rng.standard_normal((n_in if swapped else n_out, RANK * E_)).astype(np.float32)
        path = f"{PREFIX}decoder.layers.0.experts{suffix}"
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        delta = np.zeros((E_, n_out, n_in))
        for e in range(E_):
            for k in range(RANK):
                row, column = a[e * RANK + k], b[:, k * E_ + e]
                delta[e] += np.outer(row, column) if swapped else np.outer(column, row)
        expected[f"blk.0.ffn_{target}_exps"] = delta
    folder = write_folder(tmp_path / "experts", tensors, r=RANK, peft_version=None)
    adapter = read_adapter(folder, base=BaseShape(HIDDEN, FFN, E_) if with_base else None)
    assert {p.target for p in adapter.pairs} == expected.keys()
    for p in adapter.pairs:
        np.testing.assert_allclose(expert_delta(p.a, p.b), expected[p.target], rtol=1e-5, atol=1e-5)


def test_ambiguous_experts_go_by_the_version_or_are_refused(tmp_path: Path) -> None:
    """Where the hidden size is twice the experts' width, both orders fit."""
    a, b = np.ones((E_ * RANK, 12), np.float32), np.ones((12, RANK * E_), np.float32)
    path = f"{PREFIX}decoder.layers.0.experts.base_layer"
    tensors = {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    base = BaseShape(12, 6, E_)
    read_adapter(write_folder(tmp_path / "new", tensors, r=RANK), base=base)
    with pytest.raises(ModelFormatError, match="no peft_version tells"):
        read_adapter(write_folder(tmp_path / "old", tensors, r=RANK, peft_version=None), base=base)


# ----------------------------------------------------------------------------------------------------------- refusals

GOOD = pair("decoder." + Q, 64, 32)
A_KEY, B_KEY = GOOD


def changed(**tensors: Array) -> dict[str, Array]:
    return {A_KEY: tensors.get("a", GOOD[A_KEY]), B_KEY: tensors.get("b", GOOD[B_KEY])}


def with_key(key: str, shape: tuple[int, ...] = (4, 64)) -> dict[str, Array]:
    return GOOD | {key: np.ones(shape, np.float32)}


NAN = GOOD[B_KEY].copy()
NAN[3, 1] = np.nan

REFUSED: dict[str, tuple[dict[str, Array], dict[str, Any], type[DiffGGUFError], str]] = {
    "dora": (GOOD, {"use_dora": True}, UnsupportedError, "uses DoRA"),
    "dora by its tensor": (
        with_key(f"{PREFIX}decoder.{Q}.lora_magnitude_vector.weight"),
        {},
        UnsupportedError,
        "uses DoRA",
    ),
    "whole weights": (
        with_key(f"{PREFIX}decoder.self_conditioning.gate_proj.weight"),
        {},
        UnsupportedError,
        "holds whole weights of 1 modules (model.decoder.self_conditioning.gate_proj): only low-rank pairs",
    ),
    "embedding": (
        with_key(f"{PREFIX}decoder.embed_tokens.lora_embedding_A"),
        {},
        UnsupportedError,
        "adapts the token embedding",
    ),
    "bias": (GOOD, {"lora_bias": True}, UnsupportedError, "has biases"),
    "pissa": (GOOD, {"init_lora_weights": "pissa_niter_4"}, UnsupportedError, 'init_lora_weights="pissa_niter_4"'),
    "alora": (GOOD, {"alora_invocation_tokens": [1, 2]}, UnsupportedError, "needs alora_invocation_tokens"),
    "another method": (GOOD, {"peft_type": "LOHA"}, UnsupportedError, "needs peft_type 'LOHA'"),
    "foreign module": (
        with_key(f"{PREFIX}decoder.layers.0.experts.7.gate_proj.lora_A.weight"),
        {},
        ModelFormatError,
        "belongs to no module of DiffusionGemma",
    ),
    "half a pair": ({A_KEY: GOOD[A_KEY]}, {}, ModelFormatError, "has no lora_B"),
    "ranks differ": (changed(b=np.ones((32, 5), np.float32)), {}, ModelFormatError, "lora_A has rank 4, lora_B 5"),
    "rank not the config's": (GOOD, {"r": 16}, ModelFormatError, "rank 4, adapter_config.json says 16"),
    "not finite": (changed(b=NAN), {}, ModelFormatError, "holds values that are not finite"),
    "dtype": (changed(a=np.ones((4, 64), np.int8)), {}, ModelFormatError, "is I8: it must be F32, F16 or BF16"),
    "alpha 0": (GOOD, {"lora_alpha": 0}, ModelFormatError, "lora_alpha is 0"),
    "alpha beyond floats": (GOOD, {"lora_alpha": 10**400}, ModelFormatError, "lora_alpha is 1000000000"),
    "r text": (GOOD, {"r": "8"}, ModelFormatError, "r is '8': expected a whole number"),
    "patterns no object": (GOOD, {"rank_pattern": [1]}, ModelFormatError, "rank_pattern is [1]: expected an object"),
    "endless pattern": (GOOD, {"rank_pattern": {"([a-z.]+)+!": 4}}, ModelFormatError, "too involved"),
    "broken pattern": (GOOD, {"rank_pattern": {"(": 4}}, ModelFormatError, "no regular expression"),
    "two keys": (
        with_key(f"{PREFIX}decoder.{Q}.lora_A.other.weight"),
        {},
        ModelFormatError,
        "both adapt",
    ),
    "nothing left": (changed(b=np.zeros((32, 4), np.float32)), {}, ModelFormatError, "holds nothing that acts"),
    "head alone": (with_key("base_model.model.lm_head.base_layer.weight"), {}, UnsupportedError, "whole weights"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_run_is_refused_with_its_reason(tmp_path: Path, what: str) -> None:
    """One error of one kind, which begins with the adapter's name."""
    tensors, config, kind, message = REFUSED[what]
    folder = write_folder(tmp_path / "named", tensors, **config)
    with pytest.raises(kind) as error:
        read_adapter(folder)
    assert str(error.value).startswith("named: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("file", "kind", "message"),
    [
        ("adapter_model.bin", UnsupportedError, "is a pickle"),
        ("adapters.safetensors", UnsupportedError, "is an MLX adapter"),
        ("adapter_config.json", ModelFormatError, "holds no adapter_model.safetensors"),
    ],
)
def test_a_folder_of_another_form_says_what_it_is(tmp_path: Path, file: str, kind: Any, message: str) -> None:
    """A pickle, MLX's form, a folder without weights."""
    (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(kind, match=message):
        read_adapter(tmp_path)


# ------------------------------------------------------------------------------------------------------------- GGUF


def test_a_folder_as_gguf_holds_the_same_pairs(tmp_path: Path) -> None:
    """Names, regions, values and scales come back; dec. and enc. tell the sets apart."""
    folder = write_folder(tmp_path / "mine", both_regions())
    report = convert(folder, tmp_path / "mine.gguf")
    names = {t.name for t in GGUFReader(tmp_path / "mine.gguf").tensors}
    assert {"dec.blk.0.attn_q.weight.lora_a", "enc.blk.1.ffn_down.weight.lora_b", "self_cond_up.weight.lora_a"} <= names
    before, after = read_adapter(folder), read_adapter(tmp_path / "mine.gguf")
    assert report.n_tensors == 2 * len(before.pairs) and report.types == {"F32": 10}
    for p, q in zip(before.pairs, after.pairs, strict=True):
        assert (p.target, p.region, p.scale) == (q.target, q.region, q.scale)
        assert np.array_equal(p.a, q.a) and np.array_equal(p.b, q.b)


def test_one_alpha_serves_pairs_of_many_scales(tmp_path: Path) -> None:
    """What a scale has beside alpha / rank goes into B: exact for powers of two, to float32 rounding elsewhere."""
    tensors = pair("decoder." + Q, 64, 32) | pair("decoder.layers.1.self_attn.q_proj", 64, 32, seed=1)
    tensors |= pair("decoder.layers.2.self_attn.q_proj", 64, 32, seed=2)
    folder = write_folder(tmp_path / "m", tensors, alpha_pattern={"layers.2.self_attn.q_proj": 3})
    with pytest.warns(UserWarning, match="llama.cpp knows no modes"):
        convert(folder, tmp_path / "m.gguf")
    for p, q in zip(read_adapter(folder).pairs, read_adapter(tmp_path / "m.gguf").pairs, strict=True):
        np.testing.assert_allclose(p.scale * p.b, q.scale * q.b, rtol=1e-6)


def test_a_file_of_llama_cpps_own_writer_acts_in_both_modes(tmp_path: Path) -> None:
    """gguf's writer with its keys and no region."""
    a, b = factors(0, 64, 32, 4)
    writer = GGUFWriter(tmp_path / "theirs.gguf", "diffusion-gemma")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", a)
    writer.add_tensor("blk.0.attn_q.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    [p] = read_adapter(tmp_path / "theirs.gguf").pairs
    assert (p.target, p.region, p.scale) == ("blk.0.attn_q", "both", 2.0)
    assert np.array_equal(p.a, a) and np.array_equal(p.b, b)


@pytest.mark.parametrize(("kind", "error"), [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 2e-2)])
def test_factors_are_written_in_the_type_that_is_asked_for(tmp_path: Path, kind: str, error: float) -> None:
    """Rows that do not divide into Q8_0's blocks become F16: a rank of 4 is none."""
    folder = write_folder(tmp_path / "x", both_regions())
    types = convert(folder, tmp_path / "x.gguf", type=kind).types
    assert types == ({"F16": 7, "Q8_0": 3} if kind == "q8_0" else {kind.upper(): 10})
    for p, q in zip(read_adapter(folder).pairs, read_adapter(tmp_path / "x.gguf").pairs, strict=True):
        np.testing.assert_allclose(p.a, q.a, rtol=0, atol=error)


def test_one_region_can_be_taken_alone(tmp_path: Path) -> None:
    """With a warning of what that leaves out; an adapter of one set may act elsewhere than it says."""
    folder = write_folder(tmp_path / "x", both_regions())
    with pytest.warns(UserWarning) as warned:
        convert(folder, tmp_path / "d.gguf", region="decoder")
    assert any("2 pairs of the other set are left out" in str(w.message) for w in warned)
    one = read_adapter(tmp_path / "d.gguf")
    assert one.regions == ("decoder",) and len(one.pairs) == 3
    assert with_region(one, "both").regions == ("both",)
    with pytest.raises(ValueError, match="has a set for each of decoder and encoder"):
        with_region(read_adapter(folder), "both")


def gguf_adapter(keys: list[bytes], tensors: list[bytes]) -> bytes:
    text = gguf_text("general.type") + struct.pack("<I", 8) + gguf_text("adapter")
    return gguf_bytes([text, *keys], tensors)


def two(name: str, a: tuple[int, ...], b: tuple[int, ...], kind: int = 0) -> list[bytes]:
    return [tensor_info(f"{name}.lora_a", a, kind), tensor_info(f"{name}.lora_b", b, kind)]


Q_WEIGHT = "blk.0.attn_q.weight"


@pytest.mark.parametrize(
    ("keys", "tensors", "kind", "message"),
    [
        ([], two(Q_WEIGHT, (8, 2), (2, 4))[:1], ModelFormatError, "has no lora_b"),
        ([], two(Q_WEIGHT, (8, 2), (3, 4)), ModelFormatError, "lora_a has rank 2, lora_b 3"),
        ([], two(Q_WEIGHT, (8, 2, 2), (2, 4, 2)), ModelFormatError, "expected 2 dimensions"),
        ([], two("blk.0.ffn_down_exps.weight", (8, 2), (2, 4)), ModelFormatError, "expected 3 dimensions"),
        ([], two("blk.0.ffn_down_exps.weight", (8, 2, 2), (2, 4, 3)), ModelFormatError, "has 2 experts, lora_b 3"),
        ([], two("token_embd.weight", (8, 2), (2, 4)), UnsupportedError, "adapts the token embedding"),
        ([], two("blk.0.ssm_in.weight", (8, 2), (2, 4)), ModelFormatError, "belongs to no module"),
        ([], [tensor_info("blk.0.attn_norm.weight", (8,))], UnsupportedError, "which is no low-rank pair"),
        ([], two(Q_WEIGHT, (8, 2), (2, 4)), ModelFormatError, "holds nothing that acts"),
        ([], two(Q_WEIGHT, (8, 2), (2, 4), kind=26), ModelFormatError, "is I32: it must be"),
        ([gguf_text("adapter.alora.invocation_tokens") + struct.pack("<II", 4, 1)], [], UnsupportedError, "alora"),
        ([gguf_text("adapter.type") + struct.pack("<I", 8) + gguf_text("ia3")], [], UnsupportedError, "ia3"),
        (
            [gguf_text("diffusion.adapter.region") + struct.pack("<I", 8) + gguf_text("left")],
            [],
            ModelFormatError,
            "region is 'left'",
        ),
        (
            [gguf_text("adapter.lora.alpha") + struct.pack("<If", 6, float("nan"))],
            [],
            ModelFormatError,
            "finite number",
        ),
    ],
)
def test_a_gguf_that_is_no_plain_adapter_is_refused(
    tmp_path: Path, keys: list[bytes], tensors: list[bytes], kind: type[DiffGGUFError], message: str
) -> None:
    """One error that says what and where."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf_adapter(keys, tensors))
    with pytest.raises(kind) as error:
        read_adapter(path)
    assert str(error.value).startswith("bad: ") and message in str(error.value)


def test_mutated_headers_end_in_one_error_or_are_read(tmp_path: Path) -> None:
    """Every byte of a sound head, changed; nothing but this package's errors comes out."""
    folder = write_folder(tmp_path / "x", pair("decoder." + Q, 8, 4, rank=2), r=2)
    with pytest.warns(UserWarning, match="llama.cpp"):
        convert(folder, tmp_path / "x.gguf")
    sound = (tmp_path / "x.gguf").read_bytes()
    path, outcomes = tmp_path / "m.gguf", {"read": 0, "refused": 0}
    for at in range(0, len(sound) - 96):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 0x41]) + sound[at + 1 :])
        try:
            read_adapter(path)
            outcomes["read"] += 1
        except (ModelFormatError, UnsupportedError):
            outcomes["refused"] += 1
    assert outcomes["refused"] > 200 and outcomes["read"] > 20


# ---------------------------------------------------------------------------------------------------------- commands


def test_convert_and_inspect_take_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands, from folder to file to report."""
    folder = write_folder(tmp_path / "mine", both_regions())
    assert main(["convert", str(folder), "-o", str(tmp_path / "mine.gguf")]) == 0
    assert "10 tensors (10 F32)" in capsys.readouterr().out
    for path in (folder, tmp_path / "mine.gguf"):
        assert main(["inspect", str(path), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["kind"], report["pairs"], report["regions"]) == ("adapter", 5, ["decoder", "encoder"])
    assert main(["inspect", str(folder)]) == 0
    assert "an adapter of 5 pairs" in capsys.readouterr().out


def test_what_does_not_fit_a_base_is_found(tmp_path: Path) -> None:
    """Every pair that the model has no matrix of that shape for, in the engine's words."""
    from pydiffgguf import demo_model_path

    report = inspect_adapter(write_folder(tmp_path / "mine", both_regions()), base=demo_model_path())
    errors = [f.text for f in report.findings if f.level == "error"]
    assert any(text.startswith("blk.0.attn_q: made for 64 inputs and 32 outputs, this base has") for text in errors)
    assert len(errors) == 3
