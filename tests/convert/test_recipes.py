"""Which type each tensor gets: llama.cpp's mixtures at the released shape, fallbacks, overrides; and what it makes."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
import shapes
import tiny_checkpoint
from convert_files import read_keys, read_tensors
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from pydiffgguf import DiffusionModel, demo_model_path
from pydiffgguf._binding import functions
from pydiffgguf.convert import convert, imatrix
from pydiffgguf.convert.recipes import RECIPES, Override, TypeRules, fallback
from pydiffgguf.convert.writing import PlannedTensor, padded, plan_tensors
from pydiffgguf.errors import ModelFormatError, UnsupportedError

T = GGMLQuantizationType


def released(kind: str, **options: bool) -> dict[str, PlannedTensor]:
    """The plan for the released model's shape, by tensor name."""
    config = shapes.shape("26b-a4b")
    source = shapes.RandomCheckpoint(config, shapes.tensors(config))
    plan, _ = plan_tensors(source, TypeRules(RECIPES[kind], source.facts(), **options))
    return {p.tensor.name: p for p in plan}


def counts(plan: dict[str, PlannedTensor]) -> dict[str, int]:
    return dict(Counter(p.kind.name for p in plan.values()))


def layers(plan: dict[str, PlannedTensor], name: str, kind: GGMLQuantizationType) -> list[int]:
    """The layers whose tensor `name` has that type."""
    return [i for i in range(30) if f"blk.{i}.{name}" in plan and plan[f"blk.{i}.{name}"].kind is kind]


def test_q4_k_m_is_the_published_file_to_the_byte() -> None:
    """Types by tensor, and 16,790,985,600 bytes of tensor data, as in the published DiffusionGemma Q4_K_M."""
    plan = released("q4_k_m")
    assert counts(plan) == {"F32": 423, "Q4_K": 194, "Q5_0": 33, "Q8_0": 28, "Q6_K": 14}
    assert sum(padded(p.n_bytes) for p in plan.values()) == 16_790_985_600
    assert plan["token_embd.weight"].kind is T.Q6_K
    assert layers(plan, "attn_v.weight", T.Q6_K) == [0, 1, 2, 6, 9, 13, 16, 20, 24, 25, 26, 27, 28]
    more = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    assert layers(plan, "ffn_down.weight", T.Q8_0) == layers(plan, "ffn_down_exps.weight", T.Q8_0) == more
    assert plan["self_cond_down.weight"].kind is T.Q5_0


@pytest.mark.parametrize(
    ("kind", "gigabytes"), [("q8_0", 26.86), ("q6_k", 22.64), ("q5_k_m", 19.14), ("q4_k_m", 16.79)]
)
def test_sizes_are_those_of_the_published_files(kind: str, gigabytes: float) -> None:
    """26.9, 22.6, 19.1 and 16.8 GB, as the repository lists them."""
    assert sum(p.n_bytes for p in released(kind).values()) / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize(
    ("kind", "attn_v", "attn_output", "ffn_down"),
    [
        ("q3_k_m", {"Q5_K": 2, "Q4_K": 23}, {"Q4_K": 30}, {"Q5_1": 1, "Q5_0": 29}),
        ("q2_k", {"Q3_K": 25}, {"Q3_K": 30}, {"Q4_0": 30}),
        ("q4_k_s", {"Q5_K": 4, "Q4_K": 21}, {"Q4_K": 30}, {"Q5_1": 3, "Q5_0": 27}),
        ("q5_k_s", {"Q5_K": 25}, {"Q5_K": 30}, {"Q5_1": 30}),
        ("q4_0", {"Q4_0": 25}, {"Q4_0": 30}, {"Q4_0": 30}),
        ("iq4_xs", {"IQ4_XS": 25}, {"IQ4_XS": 30}, {"Q5_1": 3, "IQ4_NL": 27}),
        ("iq4_nl", {"IQ4_NL": 25}, {"IQ4_NL": 30}, {"Q5_1": 3, "IQ4_NL": 27}),
        ("mxfp4", {"Q8_0": 25}, {"Q8_0": 30}, {"Q8_0": 30}),
    ],
)
def test_mixtures_give_better_types_where_llama_cpp_does(
    kind: str, attn_v: dict[str, int], attn_output: dict[str, int], ffn_down: dict[str, int]
) -> None:
    plan = released(kind)

    def of(name: str) -> dict[str, int]:
        return counts({n: p for n, p in plan.items() if n.endswith("." + name)})

    assert (of("attn_v.weight"), of("attn_output.weight"), of("ffn_down.weight")) == (attn_v, attn_output, ffn_down)


def test_an_importance_matrix_changes_what_llama_cpp_changes() -> None:
    """IQ4's better first layers are for files without one; Q4_0's are for files with one."""
    assert counts(released("iq4_xs", with_importance=True)).get("Q5_1", 0) == 0
    assert layers(released("q4_0", with_importance=True), "ffn_down.weight", T.Q4_1) == [0, 1, 2]


def test_mxfp4_is_for_the_experts() -> None:
    plan = released("mxfp4")
    assert all(("_exps.weight" in name) == (p.kind is T.MXFP4) for name, p in plan.items())


def test_dg4_spends_its_bits_outside_the_experts_and_is_smaller_than_q4_k_m() -> None:
    """14.6 GB, 4.6 bits a weight, at the released shape."""
    plan, theirs = released("dg4"), released("q4_k_m")
    size = sum(p.n_bytes for p in plan.values())
    assert size < 0.88 * sum(p.n_bytes for p in theirs.values())
    assert 8 * size / 25.25e9 < 4.65
    for name, p in plan.items():
        bits = GGML_QUANT_SIZES[p.kind][1] * 8 / GGML_QUANT_SIZES[p.kind][0]
        assert bits <= 4.5 if "_exps.weight" in name else bits >= 5.5, name


def test_dg4_is_never_larger_than_q4_k_m(wide: Path, tmp_path: Path) -> None:
    """Nor where few weights are experts': the sensitive types go down until it fits."""
    sizes = {}
    for source in (demo_model_path(), wide):
        for kind in ("dg4", "q4_k_m"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                sizes[kind] = convert(source, tmp_path / f"{kind}.gguf", type=kind).n_bytes
        assert 0.8 * sizes["q4_k_m"] < sizes["dg4"] <= sizes["q4_k_m"]


@pytest.mark.parametrize(
    ("wanted", "row", "kind"),
    [
        (T.Q4_K, 704, T.Q5_0),
        (T.Q5_K, 704, T.Q5_1),
        (T.Q6_K, 2112, T.Q8_0),
        (T.Q3_K, 96, T.Q4_0),
        (T.Q2_K, 96, T.Q4_0),
        (T.IQ4_XS, 96, T.IQ4_NL),
        (T.Q4_K, 48, T.F16),
        (T.Q8_0, 40, T.F16),
        (T.Q4_K, 512, T.Q4_K),
    ],
)
def test_rows_that_do_not_divide_fall_back(wanted: GGMLQuantizationType, row: int, kind: GGMLQuantizationType) -> None:
    choice = fallback(wanted, row)
    assert (choice.kind, choice.fell_back) == (kind, kind is not wanted)


# ------------------------------------------------------------------------------------------------- written files


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose rows divide into blocks of 256, but for the experts' down projections (96)."""
    path = tmp_path_factory.mktemp("wide") / "wide"
    tiny_checkpoint.make_checkpoint(
        path, tokenizer=True, hidden_size=256, intermediate_size=256, num_hidden_layers=2, moe_intermediate_size=96
    )
    return path


@pytest.mark.parametrize("kind", [*RECIPES])
def test_every_type_is_written_opened_and_denoised(wide: Path, tmp_path: Path, kind: str) -> None:
    """The types in the file are the planned ones; the bytes do not depend on the number of threads; the engine runs."""
    path, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    report = convert(wide, path, type=kind, threads=1)
    convert(wide, again, type=kind, threads=3)
    assert path.read_bytes() == again.read_bytes()
    assert report.types == dict(Counter(t.tensor_type.name for t in gguf.GGUFReader(path).tensors))
    assert all(f.row % GGML_QUANT_SIZES[T[f.wanted]][0] for f in report.fallbacks)
    with DiffusionModel(path, n_ctx=128) as model, model.session() as session:
        session.encode(np.arange(5, 15))
        assert np.isfinite(session.denoise(np.arange(model.config.canvas_length))).all()


def test_matrices_are_what_ggmls_quantizer_makes_of_their_rows(wide: Path, tmp_path: Path) -> None:
    """Requantizing a Q8_0 file: dequantized, then quantized, row by row, bit for bit; equal types are copied."""
    convert(wide, tmp_path / "q8.gguf", type="q8_0")
    with pytest.warns(UserWarning, match=r"quantized already \(\d+ Q8_0"):
        convert(tmp_path / "q8.gguf", tmp_path / "q4.gguf", type="q4_k_m")
    source, made = read_tensors(tmp_path / "q8.gguf"), read_tensors(tmp_path / "q4.gguf")
    assert source.keys() == made.keys()
    changed = 0
    for name, tensor in made.items():
        was = source[name]
        if tensor.tensor_type == was.tensor_type:
            np.testing.assert_array_equal(tensor.data, was.data, err_msg=name)
            continue
        row = int(was.shape[0])
        floats = gguf.dequantize(was.data, was.tensor_type).astype(np.float32).reshape(-1, row)
        one_by_one = [functions.quantize_rows(r, int(T.F32), int(tensor.tensor_type), row, n_threads=1) for r in floats]
        np.testing.assert_array_equal(np.concatenate(one_by_one).ravel(), tensor.data.view(np.uint8).ravel(), name)
        changed += 1
    assert changed > 10


def test_q8_0_is_ggufs_q8_0(wide: Path, tmp_path: Path) -> None:
    """ggml's rounding of Q8_0 and that of the gguf package agree bit for bit on these weights."""
    convert(wide, tmp_path / "f32.gguf", type="f32")
    convert(tmp_path / "f32.gguf", tmp_path / "q8.gguf", type="q8_0")
    floats = read_tensors(tmp_path / "f32.gguf")
    for name, tensor in read_tensors(tmp_path / "q8.gguf").items():
        if tensor.tensor_type == T.Q8_0:
            np.testing.assert_array_equal(gguf.quantize(floats[name].data, T.Q8_0), tensor.data, err_msg=name)


def test_from_a_gguf_file_is_as_from_the_checkpoint(wide: Path, tmp_path: Path) -> None:
    """A detour over an F32 file changes no byte of any tensor, and no key."""
    convert(wide, tmp_path / "f32.gguf", type="f32")
    convert(wide, tmp_path / "direct.gguf", type="q4_k_m")
    convert(tmp_path / "f32.gguf", tmp_path / "detour.gguf", type="q4_k_m")
    assert read_keys(tmp_path / "direct.gguf") == read_keys(tmp_path / "detour.gguf")
    direct, detour = read_tensors(tmp_path / "direct.gguf"), read_tensors(tmp_path / "detour.gguf")
    assert direct.keys() == detour.keys()
    for name, tensor in direct.items():
        assert tensor.tensor_type == detour[name].tensor_type
        np.testing.assert_array_equal(tensor.data, detour[name].data, err_msg=name)


def test_a_requantized_file_keeps_unknown_keys_and_takes_a_name(wide: Path, tmp_path: Path) -> None:
    convert(wide, tmp_path / "f32.gguf", type="f32")
    convert(tmp_path / "f32.gguf", tmp_path / "named.gguf", type="q8_0", name="other")
    before, after = read_keys(tmp_path / "f32.gguf"), read_keys(tmp_path / "named.gguf")
    assert after["general.name"] == ("STRING", "other")
    assert after["general.file_type"] == ("UINT32", 7)
    for own in ("general.name", "general.file_type"):
        del before[own], after[own]
    assert before == after


# ------------------------------------------------------------------------------------------------------ overrides


def test_the_first_override_that_matches_counts(wide: Path, tmp_path: Path) -> None:
    convert(wide, tmp_path / "x.gguf", type="q4_k_m", tensor_types=[r"blk\.0\.attn_q=q6_k", "attn_q=q5_k"])
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert (types["blk.0.attn_q.weight"], types["blk.1.attn_q.weight"]) == ("Q6_K", "Q5_K")
    assert types["blk.0.attn_q_norm.weight"] == "F32"


def test_overrides_fall_back_and_are_listed(wide: Path, tmp_path: Path) -> None:
    report = convert(wide, tmp_path / "x.gguf", type="q8_0", tensor_types=["ffn_down_exps=q6_k", "ffn_.*_exps=q4_k"])
    assert {(f.tensor, f.wanted, f.written) for f in report.fallbacks} == {
        (f"blk.{i}.ffn_down_exps.weight", "Q6_K", "Q8_0") for i in range(2)
    }


@pytest.mark.parametrize("pattern", ["attn_qq=q6_k", "ffn_gate_inp=q8_0", "attn_norm=q8_0"])
def test_an_override_that_meets_no_tensor_is_an_error(wide: Path, tmp_path: Path, pattern: str) -> None:
    """Misspelt, or met only by what always stays F32."""
    with pytest.raises(ValueError, match=r"matches no tensor that is quantized"):
        convert(wide, tmp_path / "x.gguf", tensor_types=[pattern])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("attn_q", "expected PATTERN=TYPE"),
        ("=q8_0", "expected PATTERN=TYPE"),
        ("attn_(=q8_0", "no regular expression"),
        ("attn_q=q9", "no type 'q9'"),
    ],
)
def test_overrides_that_make_no_sense_say_why(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Override.parse(text)


@pytest.mark.parametrize("kind", ["iq2_xxs", "iq1_s", "q8_1", "i32"])
def test_types_that_cannot_be_made_are_refused_before_anything_is_written(
    wide: Path, tmp_path: Path, kind: str
) -> None:
    with pytest.raises(UnsupportedError):
        convert(wide, tmp_path / "x.gguf", tensor_types=[f"attn_q={kind}"])
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- imatrix


def write_imatrix(path: Path, wide: Path, tmp_path: Path, seed: int = 1) -> dict[str, np.ndarray]:
    """An importance matrix with random values for every matrix of the checkpoint; returns the means."""
    convert(wide, tmp_path / "shape.gguf", type="f32")
    rng = np.random.default_rng(seed)
    sums, met, means = {}, {}, {}
    for name, tensor in read_tensors(tmp_path / "shape.gguf").items():
        if len(tensor.shape) > 1:
            n = int(tensor.shape[2]) if len(tensor.shape) > 2 else 1
            met[name] = np.full(n, 7)
            means[name] = (rng.random((n, int(tensor.shape[0]))) ** 6).astype(np.float32)
            sums[name] = means[name].astype(np.float64) * 7
    imatrix.save(path, sums, met, ["text"], 1, 64)
    return means


def test_an_importance_matrix_reaches_each_experts_rows(wide: Path, tmp_path: Path) -> None:
    """Rows of the n-th expert are quantized with the n-th row of the matrix."""
    means = write_imatrix(tmp_path / "i.gguf", wide, tmp_path)
    convert(wide, tmp_path / "x.gguf", type="q4_k_m", imatrix=tmp_path / "i.gguf")
    floats = read_tensors(tmp_path / "shape.gguf")["blk.1.ffn_gate_up_exps.weight"].data
    made = read_tensors(tmp_path / "x.gguf")["blk.1.ffn_gate_up_exps.weight"]
    weights = imatrix.Importance.load(tmp_path / "i.gguf").means["blk.1.ffn_gate_up_exps.weight"]
    # The file holds float32 sums, which are divided again: two roundings of 6e-8 each.
    np.testing.assert_allclose(weights, means["blk.1.ffn_gate_up_exps.weight"], rtol=1e-6)
    for i, expert in enumerate(floats):
        expected = functions.quantize_rows(expert, int(T.F32), int(T.Q4_K), 256, importance=weights[i])
        np.testing.assert_array_equal(expected, made.data[i])
    plain = functions.quantize_rows(floats, int(T.F32), int(T.Q4_K), 256)
    assert (plain.reshape(made.data.shape) != made.data).any()


def test_types_that_need_importance_get_it(wide: Path, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", wide, tmp_path)
    report = convert(
        wide, tmp_path / "x.gguf", imatrix=tmp_path / "i.gguf", tensor_types=["attn_q=iq2_xxs", "gate_up_exps=iq2_xs"]
    )
    assert report.types["IQ2_XXS"] == 2 and report.types["IQ2_XS"] == 2


def test_an_expert_that_was_never_chosen_has_no_preference(wide: Path, tmp_path: Path) -> None:
    imatrix.save(tmp_path / "i.gguf", {"x": np.array([[3.0, 6.0], [0.0, 0.0]])}, {"x": np.array([3, 0])}, ["t"], 1, 1)
    np.testing.assert_array_equal(imatrix.Importance.load(tmp_path / "i.gguf").means["x"], [[1, 2], [1, 1]])


def test_an_importance_matrix_of_another_model_is_refused(wide: Path, tmp_path: Path) -> None:
    imatrix.save(
        tmp_path / "i.gguf", {"blk.0.attn_q.weight": np.ones((1, 64))}, {"blk.0.attn_q.weight": np.ones(1)}, ["t"], 1, 1
    )
    with pytest.raises(ModelFormatError, match=r"'blk.0.attn_q.weight' has 1 x 64 values.*rows of 256"):
        convert(wide, tmp_path / "x.gguf", type="q4_k_m", imatrix=tmp_path / "i.gguf")
    with pytest.raises(ModelFormatError, match="not an importance matrix"):
        convert(wide, tmp_path / "y.gguf", type="q4_k_m", imatrix=write_f32(wide, tmp_path))


def write_f32(wide: Path, tmp_path: Path) -> Path:
    convert(wide, tmp_path / "model.gguf", type="f32")
    return tmp_path / "model.gguf"


# ------------------------------------------------------------------------------------------------ quantize_rows


def test_rows_are_checked_before_they_are_used() -> None:
    ones = np.ones(256, np.float32)
    with pytest.raises(ValueError, match="not whole rows"):
        functions.quantize_rows(ones[:-1], 0, int(T.Q4_K), 256)
    with pytest.raises(ValueError, match="do not divide"):
        functions.quantize_rows(ones, 0, int(T.Q4_K), 128)
    with pytest.raises(ValueError, match="importance"):
        functions.quantize_rows(ones, 0, int(T.Q4_K), 256, importance=-ones)
    with pytest.raises(ValueError):
        functions.quantize_rows(ones, 0, 9999, 256)
    with pytest.raises(UnsupportedError, match="beyond the range"):
        functions.quantize_rows(ones * np.float32(1e6), 0, int(T.Q4_K), 256)
    assert functions.quantize_rows(ones[:0], 0, int(T.Q4_K), 256).shape == (0, 144)


# ------------------------------------------------------------------------------------------------------- command


def test_the_command_takes_types_overrides_and_an_importance_matrix(wide: Path, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", wide, tmp_path)
    command = [sys.executable, "-m", "pydiffgguf", "convert", str(wide), "-o", str(tmp_path / "x.gguf")]
    options = ["--type", "q4_k_m", "--imatrix", str(tmp_path / "i.gguf"), "--tensor-type", "attn_q=q6_k"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    assert "Q6_K" in done.stdout
    assert "rows of 96 do not divide into blocks of Q4_K; Q5_0 in " in done.stdout
    again = [sys.executable, "-m", "pydiffgguf", "convert", str(tmp_path / "x.gguf"), "-o", str(tmp_path / "y.gguf")]
    done = subprocess.run([*again, "--type", "q2_k"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "warning" in done.stderr and "quantized already" in done.stderr
    done = subprocess.run([*again, "--tensor-type", "nothing=q8_0"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) >= 1 and "matches no tensor" in done.stderr
