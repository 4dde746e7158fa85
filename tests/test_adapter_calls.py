"""Adapters as users meet them: loading, naming, scales, which prefix may be gone on from, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_folders import Array, pair, write_folder
from canvas_batches import own_steps

from pydiffgguf import DiffusionModel, ModelFormatError, UnsupportedError, demo_model_path
from pydiffgguf.cli import main
from pydiffgguf.convert import convert
from pydiffgguf.engine.adapters import bytes_of, find
from pydiffgguf.session import CanvasSpec

FAST: dict[str, Any] = {"seed": 3, "max_tokens": 40, "steps": 4}
PROMPT = [2, *range(20, 60)]
HIDDEN, FFN, EXPERT, N_EXPERT = 128, 96, 64, 8


def large(tensors: dict[str, Array], factor: float = 20.0) -> dict[str, Array]:
    """With B so large that texts change."""
    return {key: value * np.float32(factor) if "lora_B" in key else value for key, value in tensors.items()}


def decoder_only() -> dict[str, Array]:
    return large(
        pair("decoder.layers.1.self_attn.q_proj", HIDDEN, 128, seed=1)
        | pair("decoder.layers.2.mlp.down_proj", FFN, HIDDEN)
    )


def two_regions() -> dict[str, Array]:
    return decoder_only() | large(pair("encoder.language_model.layers.0.self_attn.k_proj", HIDDEN, 64, seed=2))


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """An adapter of the decoder alone, one of two regions, and a second of the decoder."""
    other = large(pair("decoder.layers.1.self_attn.q_proj", HIDDEN, 128, rank=4, seed=7))
    return {
        "decoder": write_folder(tmp_path / "decoder", decoder_only()),
        "both": write_folder(tmp_path / "both", two_regions()),
        "other": write_folder(tmp_path / "other", other),
    }


@pytest.fixture
def model(tiny_gguf: Path) -> Iterator[DiffusionModel]:
    with DiffusionModel(tiny_gguf, n_threads=1, type_kv="f32") as model:
        yield model


def tokens(model: DiffusionModel, **options: Any) -> list[int]:
    return model.generate(PROMPT, **{**FAST, **options}).tokens


# --------------------------------------------------------------------------------------------------- loading, naming


def test_a_loaded_adapter_runs_in_every_call_that_does_not_say_otherwise(
    model: DiffusionModel, folders: dict[str, Path]
) -> None:
    """Its scale is the call's where the call names it; what is not named is off."""
    bare = tokens(model)
    adapter = model.load_lora(folders["both"])
    assert (adapter.name, adapter.regions, adapter.ranks, adapter.n_pairs) == ("both", ("decoder", "encoder"), (4,), 3)
    changed = model.generate(PROMPT, **FAST)
    assert changed.tokens != bare
    assert changed.stats.lora == {"both": 1.0}
    assert tokens(model, lora={"both": 1.0}) == changed.tokens
    assert tokens(model, lora={}) == tokens(model, lora={"both": 0}) == bare
    adapter.scale = 0.0
    assert tokens(model) == bare
    adapter.scale = -0.5
    assert tokens(model) == tokens(model, lora={"both": -0.5})
    model.unload_lora("both")
    assert dict(model.adapters) == {}
    assert tokens(model) == bare


def test_every_kind_of_call_runs_what_it_is_told_to(model: DiffusionModel, folders: dict[str, Path]) -> None:
    """Infill, fill, edit, choose and chat, each under an adapter, under none, and under what the model has."""
    calls = (
        lambda **lora: model.infill("one two ", " four", gap=4, **lora),
        lambda **lora: model.fill("one <gap len=2/> three <gap len=2/> five", **lora),
        lambda **lora: model.edit("one two three", [(4, 7)], **lora),
        lambda **lora: model.choose("one <a/> three", {"a": ["two", "four"]}, **lora),
        lambda **lora: model.chat([{"role": "user", "content": "one"}], max_tokens=8, seed=1, **lora),
    )
    model.load_lora(folders["both"])
    for call in calls:
        assert call().stats.lora == call(lora={"both": 1}).stats.lora == {"both": 1.0}
        assert call(lora={}).stats.lora == {}


def test_opening_takes_paths_and_scales(tiny_gguf: Path, folders: dict[str, Path]) -> None:
    """lora= of the constructor; the names are the folders'."""
    with DiffusionModel(tiny_gguf, n_threads=1, lora=[folders["decoder"], (folders["other"], 0.25)]) as model:
        assert {name: a.scale for name, a in model.adapters.items()} == {"decoder": 1.0, "other": 0.25}
        assert model.memory().adapters == sum(a.n_bytes for a in model.adapters.values()) > 0


def test_an_adapters_memory_is_told_before_it_is_loaded(
    model: DiffusionModel, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """By the headers of both forms, within 3 % of what it then takes; `inspect --fit` counts it among the rest."""
    convert(folders["both"], folders["both"].with_suffix(".gguf"), type="f16")
    for path in (*folders.values(), folders["both"].with_suffix(".gguf")):
        predicted = bytes_of([find(path)])
        with DiffusionModel(model.path, n_threads=1, lora=[path]) as other, other.session() as session:
            assert predicted == pytest.approx(other.memory().adapters, rel=0.03)
            assert predicted == pytest.approx(session.memory.adapters, rel=0.03)
    fit = []
    for lora in ([], ["--lora", str(folders["both"])]):
        assert main(["inspect", str(model.path), "--fit", "4GB", "--json", *lora]) == 0
        fit.append(json.loads(capsys.readouterr().out)["fit"])
    bare, adapted = fit
    [share] = [share for share in adapted["shares"] if share["what"] == "adapters"]
    assert share["device"] == pytest.approx(bytes_of([find(folders["both"])]), rel=0.03)
    assert bare["free"] - adapted["free"] == share["device"]
    with pytest.raises(SystemExit):
        main(["inspect", str(model.path), "--lora", "x"])


def test_a_gguf_and_its_folder_are_the_same_adapter(model: DiffusionModel, folders: dict[str, Path]) -> None:
    """Equal tokens, and the prefix of the one serves the other: it goes by content."""
    convert(folders["both"], folders["both"].with_suffix(".gguf"))
    model.load_lora(folders["both"], name="folder")
    model.load_lora(folders["both"].with_suffix(".gguf"), name="file")
    first = model.generate(PROMPT, lora={"folder": 1.0}, **FAST)
    second = model.generate(PROMPT, lora={"file": 1.0}, **FAST)
    assert first.tokens == second.tokens
    assert second.stats.reused_tokens == len(PROMPT)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m, f: m.generate(PROMPT, lora={"x": 1}), ValueError, "no adapter is named 'x': loaded are 'decoder'"),
        (lambda m, f: m.generate(PROMPT, lora={"decoder": float("nan")}), ValueError, "must be a finite number"),
        (lambda m, f: m.generate(PROMPT, lora={"decoder": "1"}), TypeError, "the scale of 'decoder' must be a number"),
        (lambda m, f: m.generate(PROMPT, lora=["decoder"]), TypeError, "lora must be a dict"),
        (lambda m, f: m.load_lora(f["decoder"]), ValueError, "an adapter named 'decoder' is loaded"),
        (
            lambda m, f: m.load_lora(f["both"], region="decoder"),
            ValueError,
            "has a set for each of decoder and encoder",
        ),
        (lambda m, f: m.load_lora(f["other"], region="left"), ValueError, "region is 'left'"),
        (lambda m, f: m.load_lora("nowhere"), FileNotFoundError, "no such adapter"),
        (lambda m, f: m.load_lora(demo_model_path()), ModelFormatError, "demo: is a model, not an adapter"),
        (lambda m, f: m.unload_lora("x"), ValueError, "no adapter is named 'x'"),
        (lambda m, f: m.session(lora={"x": 1}), ValueError, "no adapter is named 'x'"),
    ],
)
def test_what_a_caller_gets_wrong_is_told(
    model: DiffusionModel, folders: dict[str, Path], call: Any, kind: type[Exception], message: str
) -> None:
    """One exception of the right kind; the model stays usable."""
    model.load_lora(folders["decoder"])
    with pytest.raises(kind, match=message):
        call(model, folders)
    assert list(model.adapters) == ["decoder"]


def test_an_adapter_is_no_model(model: DiffusionModel, folders: dict[str, Path]) -> None:
    """Opening its GGUF says what it is and how it is run."""
    with pytest.warns(UserWarning, match="llama.cpp"):
        convert(folders["decoder"], folders["decoder"].with_suffix(".gguf"))
    with pytest.raises(ModelFormatError, match=r"a LoRA adapter, not a model: .*--lora"):
        DiffusionModel(folders["decoder"].with_suffix(".gguf"))


# ------------------------------------------------------------------------------------------------------------ numbers


def logits(model: DiffusionModel, lora: dict[str, float], **options: Any) -> Array:
    with model.session(lora=lora, **options) as session:
        session.encode(PROMPT)
        return session.denoise(np.arange(32, dtype=np.int32))


def test_a_stack_of_adapters_is_their_sum(model: DiffusionModel, folders: dict[str, Path]) -> None:
    """Two on one matrix, each with its scale, whatever order they were loaded in, as one whose factors are theirs."""
    model.load_lora(folders["decoder"])
    model.load_lora(folders["other"])
    both = logits(model, {"decoder": 0.5, "other": -0.25})
    q = "decoder.layers.1.self_attn.q_proj"
    one, two = (pair(q, HIDDEN, 128, seed=seed) for seed in (1, 7))
    a_key, b_key = one
    stacked = {
        a_key: np.concatenate([one[a_key], two[a_key]]),
        b_key: np.concatenate([one[b_key] * np.float32(10.0), two[b_key] * np.float32(-5.0)], axis=1),
    }
    down = pair("decoder.layers.2.mlp.down_proj", FFN, HIDDEN)
    stacked |= {key: value * np.float32(10.0) if "lora_B" in key else value for key, value in down.items()}
    summed = folders["decoder"].with_name("summed")
    write_folder(summed, stacked, r=8, lora_alpha=16, rank_pattern={"down_proj": 4}, alpha_pattern={"down_proj": 8})
    model.load_lora(summed)
    expected = logits(model, {"summed": 1.0})
    assert np.linalg.norm(both - expected) / np.linalg.norm(expected) < 5e-6
    assert np.linalg.norm(both - logits(model, {})) / np.linalg.norm(expected) > 0.01


def test_threads_change_no_bit(tiny_gguf: Path, folders: dict[str, Path]) -> None:
    """1, 2 and 5 threads."""
    texts = []
    for n_threads in (1, 2, 5):
        with DiffusionModel(tiny_gguf, n_threads=n_threads, lora=[folders["both"], folders["other"]]) as model:
            texts.append((tokens(model), logits(model, {"both": 1.0, "other": 0.5}).tobytes()))
    assert texts[0] == texts[1] == texts[2]


def test_adapted_canvases_side_by_side_are_what_each_is_alone(model: DiffusionModel, folders: dict[str, Path]) -> None:
    """Four of several lengths with pins and seeds of their own, under two adapters, step by step to the bit."""
    model.load_lora(folders["both"])
    model.load_lora(folders["other"])
    specs = [
        CanvasSpec(seed=1),
        CanvasSpec(n_rows=9, pinned=[-1, -1, 7, -1, 8, 8, 8, -1, -1], seed=2),
        CanvasSpec(n_rows=20, seed=3, canvas_index=4),
        CanvasSpec(n_rows=31, canvas=[9] * 31, seed=5),
    ]
    sampling = replace(model.sampling, steps=4)

    def steps_of(some: list[CanvasSpec], lora: dict[str, float]) -> list[list[bytes]]:
        with model.session(n_rows=96, lora=lora) as session:
            session.encode(PROMPT)
            steps = own_steps(session, some, sampling)
            return [[step.argmax.tobytes() + step.entropy.tobytes() for step in own] for own in steps]

    both = {"both": 1.0, "other": 0.5}
    together = steps_of(specs, both)
    assert together == [steps_of([spec], both)[0] for spec in specs]
    assert all(a != b for a, b in zip(together, steps_of(specs, {}), strict=True))


def test_adapted_experts_run_beside_either_spelling(model: DiffusionModel, tmp_path: Path) -> None:
    """Gate and up as one pair in the file, or as two: the same logits."""
    from gguf import GGUFWriter

    rng = np.random.default_rng(5)
    a = rng.standard_normal((N_EXPERT, 2, HIDDEN)).astype(np.float32)
    b = rng.standard_normal((N_EXPERT, 2 * EXPERT, 2)).astype(np.float32)

    def write(name: str, tensors: dict[str, Array]) -> None:
        writer = GGUFWriter(tmp_path / f"{name}.gguf", "diffusion-gemma")
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 2.0)
        for key, value in tensors.items():
            writer.add_tensor(f"blk.2.{key}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        model.load_lora(tmp_path / f"{name}.gguf")

    write("fused", {"ffn_gate_up_exps.weight.lora_a": a, "ffn_gate_up_exps.weight.lora_b": b})
    write(
        "split",
        {
            "ffn_gate_exps.weight.lora_a": a,
            "ffn_gate_exps.weight.lora_b": np.ascontiguousarray(b[:, :EXPERT]),
            "ffn_up_exps.weight.lora_a": a,
            "ffn_up_exps.weight.lora_b": np.ascontiguousarray(b[:, EXPERT:]),
        },
    )
    for operators in (False, True):
        fused, split = (logits(model, {name: 1.0}, ggml_operators=operators) for name in ("fused", "split"))
        assert np.linalg.norm(fused - split) / np.linalg.norm(fused) < 2e-6
        assert np.linalg.norm(fused - logits(model, {}, ggml_operators=operators)) / np.linalg.norm(fused) > 0.01


# ------------------------------------------------------------------------------------------------------------ prefixes


def test_a_prefix_is_gone_on_from_where_the_encoder_is_the_same(
    model: DiffusionModel, folders: dict[str, Path]
) -> None:
    """The bare model's serves an adapter of the decoder, whose cache is the same; one of two regions reads anew."""
    model.load_lora(folders["decoder"])
    model.load_lora(folders["both"])

    def encoded(**lora: float) -> int:
        stats = model.generate(PROMPT, lora=lora, **FAST).stats
        return stats.prompt_tokens - stats.reused_tokens

    assert encoded() == len(PROMPT)
    assert encoded(decoder=1.0) == encoded() == encoded(decoder=0.3) == 0
    assert encoded(both=1.0) == len(PROMPT)
    assert encoded(both=1.0) == 0


def test_a_session_encodes_again_what_depends_on_the_set(model: DiffusionModel, folders: dict[str, Path]) -> None:
    """set_lora tells how many tokens that were; the cache is then what it would have been from the start."""
    model.load_lora(folders["decoder"])
    model.load_lora(folders["both"])
    with model.session(lora={}) as session:
        session.encode(PROMPT)
        bare = session.denoise(np.arange(32))
        assert session.set_lora({"decoder": 1.0}) == 0
        assert session.set_lora({"both": 0.5}) == len(PROMPT)
        assert session.lora == {"both": 0.5}
        assert np.array_equal(session.denoise(np.arange(32)), logits(model, {"both": 0.5}))
        assert session.set_lora({}) == len(PROMPT)
        assert np.array_equal(session.denoise(np.arange(32)), bare)


def test_a_saved_prefix_knows_its_adapters(model: DiffusionModel, folders: dict[str, Path], tmp_path: Path) -> None:
    """Under others, or another scale, it is refused; those of the decoder alone do not matter."""
    model.load_lora(folders["decoder"])
    model.load_lora(folders["both"])
    with model.session(lora={"both": 1.0}) as session:
        session.encode(PROMPT)
        session.save(tmp_path / "adapted")
        session.set_lora({})
        session.save(tmp_path / "bare")
        session.set_lora({"decoder": 2.0})
        session.load(tmp_path / "bare")
        for lora in ({}, {"both": 0.5}):
            session.set_lora(lora)
            with pytest.raises(ModelFormatError, match="saved with other adapters"):
                session.load(tmp_path / "adapted")
        session.set_lora({"both": 1.0, "decoder": 1.0})
        session.load(tmp_path / "adapted")
        assert session.n_past == len(PROMPT)
        with pytest.raises(ModelFormatError, match="saved with other adapters"):
            session.load(tmp_path / "bare")


def test_a_call_under_way_keeps_an_adapter_that_is_unloaded(model: DiffusionModel, folders: dict[str, Path]) -> None:
    """The rest of its canvases are computed as if nothing had happened."""
    model.load_lora(folders["both"])
    expected = tokens(model)
    stream = model.stream(PROMPT, **FAST)
    next(stream)
    model.unload_lora("both")
    for _ in stream:
        pass
    assert stream.result.tokens == expected


def test_importance_is_of_the_bare_model(model: DiffusionModel, folders: dict[str, Path]) -> None:
    """A session does not collect while it runs adapters, nor the other way round."""
    model.load_lora(folders["decoder"])
    with model.session() as session, pytest.raises(ValueError, match="importance is collected of the bare model"):
        session.collect(True)
    with model.session(lora={}) as session:
        session.collect(True)
        with pytest.raises(ValueError, match="importance is collected of the bare model"):
            session.set_lora({"decoder": 1.0})


# ------------------------------------------------------------------------------------------------------------ refusals

Q = "decoder.layers.0.self_attn.q_proj"
FULL = 5  # a full layer, which has no V


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair(Q, 96, 128), "blk.0.attn_q: made for 96 inputs and 128 outputs, this base has 128 and 128: another base"),
        (pair("decoder.layers.9.self_attn.q_proj", HIDDEN, 128), "blk.9: this base has no attn_q there"),
        (pair(f"decoder.layers.{FULL}.self_attn.v_proj", HIDDEN, 64), f"blk.{FULL}: this base has no attn_v there"),
    ],
)
def test_an_adapter_for_another_base_is_refused(
    model: DiffusionModel, tmp_path: Path, tensors: dict[str, Array], message: str
) -> None:
    """By its widths, its layers, a V where full layers have none."""
    with pytest.raises(ModelFormatError, match=message):
        model.load_lora(write_folder(tmp_path / "it", tensors))
    assert not model.adapters


def test_broken_factors_of_a_gguf_are_refused(model: DiffusionModel, tmp_path: Path) -> None:
    """Values that are not finite, a cut file, another method: one error each, which begins with the name."""
    tensors = pair(Q, HIDDEN, 128)
    with pytest.warns(UserWarning, match="llama.cpp"):
        convert(write_folder(tmp_path / "it", tensors), tmp_path / "it.gguf")
    sound = (tmp_path / "it.gguf").read_bytes()
    (tmp_path / "it.gguf").write_bytes(sound[:-4] + b"\xff\xff\xff\xff")
    with pytest.raises(ModelFormatError, match=r"^it: .*lora_b holds values that are not finite"):
        model.load_lora(tmp_path / "it.gguf")
    (tmp_path / "it.gguf").write_bytes(sound[:-64])
    with pytest.raises(ModelFormatError, match=r"^it: .*truncated|^it: .*ends|^it: .*bytes"):
        model.load_lora(tmp_path / "it.gguf")
    with pytest.raises(UnsupportedError, match=r"^it: uses DoRA"):
        model.load_lora(write_folder(tmp_path / "it", tensors, use_dora=True))


def test_mutations_of_a_head_kill_nobody(model: DiffusionModel, tmp_path: Path) -> None:
    """Every byte of a sound head in turn, through the engine's reader: it is read, or refused. tests/fuzz has more."""
    with pytest.warns(UserWarning, match="llama.cpp"):
        convert(write_folder(tmp_path / "x", pair(Q, HIDDEN, 128, rank=1), r=1), tmp_path / "x.gguf")
    sound = (tmp_path / "x.gguf").read_bytes()
    path, outcomes = tmp_path / "m.gguf", {"read": 0, "refused": 0}
    for at in range(len(sound) - 1024):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ (0x01, 0x80, 0xFF)[at % 3]]) + sound[at + 1 :])
        try:
            model.load_lora(path)
            model.unload_lora("m")
            outcomes["read"] += 1
        except (ModelFormatError, UnsupportedError):
            outcomes["refused"] += 1
    assert outcomes["refused"] > 150 and outcomes["read"] > 20


# ------------------------------------------------------------------------------------------------------------ commands


def test_commands_take_adapters(tiny_gguf: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """--lora PATH[:SCALE], repeatable; a scale that is no number belongs to the path."""
    texts = []
    for lora in (
        [],
        [f"{folders['both']}"],
        [f"{folders['both']}:0"],
        [f"{folders['both']}:1", f"{folders['other']}:0"],
    ):
        flags = [word for path in lora for word in ("--lora", path)]
        assert main(["generate", str(tiny_gguf), "-p", "Hello", "-n", "20", "--seed", "1", "--json", *flags]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[2] and texts[1] == texts[3] and texts[0] != texts[1]
    assert main(["generate", str(tiny_gguf), "-p", "Hello", "--lora", "nowhere:half"]) == 1
    assert "nowhere:half: no such adapter" in capsys.readouterr().err
