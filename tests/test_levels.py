"""The levels of the CPU's instructions: which one is used, that answers are right at each, and that a number that is
none does not vanish in any. Products, attention and norms at each level: tests/test_operators.py."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from levels import DISTINCT, LEVELS

from pydiffgguf import DiffGGUFError, DiffusionModel, UnsupportedError, cli, demo_model_path
from pydiffgguf._binding.functions import build_info

PROMPT = "Put in order: 9 7 1."
C = 64

#: A tensor of every kind that a pass reads: what is poisoned is its first number, or the scale of its first block.
TENSORS = (
    "token_embd.weight",
    "output_norm.weight",
    "self_cond_pre_norm.weight",
    "self_cond_gate.weight",
    "self_cond_up.weight",
    "self_cond_down.weight",
    *(
        f"blk.1.{name}"
        for name in (
            "attn_norm.weight",
            "attn_q.weight",
            "attn_k.weight",
            "attn_output.weight",
            "attn_q_norm.weight",
            "attn_k_norm.weight",
            "post_attention_norm.weight",
            "ffn_norm.weight",
            "ffn_gate.weight",
            "ffn_up.weight",
            "ffn_down.weight",
            "post_ffw_norm_1.weight",
            "pre_ffw_norm_2.weight",
            "post_ffw_norm_2.weight",
            "post_ffw_norm.weight",
            "ffn_gate_inp.weight",
            "ffn_gate_inp.scale",
            "ffn_gate_up_exps.weight",
            "ffn_down_exps.weight",
            "ffn_down_exps.scale",
            "layer_output_scale.weight",
            "enc_layer_output_scale.weight",
        )
    ),
)


@cache
def tensors() -> dict[str, gguf.ReaderTensor]:
    """Those of the demo model."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(demo_model_path()).tensors}


def poison(path: Path, name: str, value: float) -> None:
    """Replaces the first number of a tensor, or the scale of its first block of 32, in a copy of the demo model."""
    path.unlink(missing_ok=True)
    shutil.copyfile(demo_model_path(), path)
    tensor = tensors()[name]
    is_float = tensor.tensor_type == gguf.GGMLQuantizationType.F32
    assert is_float or tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
    with path.open("r+b") as file:
        file.seek(tensor.data_offset)
        file.write((np.float32 if is_float else np.float16)(value).tobytes())


def silent_about(tmp_path: Path, name: str, value: float, ggml: bool, **options: Any) -> bool:
    """Whether a prompt and two steps of the demo model, with a number that is none in a tensor, raise nothing."""
    poison(tmp_path / "poisoned.gguf", name, value)
    model = DiffusionModel(tmp_path / "poisoned.gguf", n_gpu_layers=0, n_threads=1, **options)
    with model, model.session(ggml_operators=ggml) as session:
        try:
            session.encode(np.arange(20, 50))
            session.run_canvas(seed=3, steps=2, confidence_threshold=0.0)
        except DiffGGUFError as error:
            assert "NaN or" in str(error)
            return False
    return True


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("level", [*DISTINCT, "ggml"])
def test_a_number_that_is_none_ends_in_an_error(tmp_path: Path, level: str, value: float) -> None:
    """In a weight or a scale of any kind of tensor: the error of the step that meets it, and never a text. At every
    level, and with ggml's operators."""
    options = {} if level == "ggml" else {"cpu": level}
    assert not [name for name in TENSORS if silent_about(tmp_path, name, value, level == "ggml", **options)]


@pytest.mark.parametrize("ggml", [False, True])
def test_a_quantized_cache_hides_no_number_that_is_none(tmp_path: Path, ggml: bool) -> None:
    """Keys are rounded into it, and queries by ggml."""
    names = ("blk.1.attn_k_norm.weight", "blk.1.attn_q_norm.weight")
    assert not [name for name in names if silent_about(tmp_path, name, np.nan, ggml, type_kv="q8_0")]


def test_the_best_level_is_used_unless_another_is_named() -> None:
    """`DiffusionModel.cpu` names it; it is the last that doctor lists as built in and had by this processor."""
    with DiffusionModel(demo_model_path()) as model:
        assert model.cpu == LEVELS[-1]
    for level in LEVELS:
        with DiffusionModel(demo_model_path(), cpu=level) as model:
            assert model.cpu == level


def test_a_level_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """One that this processor lacks, one that nobody knows, and what is no name: each says which there are."""
    names = [level["name"] for level in build_info()["cpu_levels"] if level["name"] not in LEVELS]
    for name in [*names, "avx9"]:
        with pytest.raises(UnsupportedError, match=rf'cpu is "{name}": .+; there are: {", ".join(LEVELS)}'):
            DiffusionModel(demo_model_path(), cpu=name)
    with pytest.raises(ValueError, match="cpu is ''"):
        DiffusionModel(demo_model_path(), cpu="")
    with pytest.raises(TypeError, match="cpu must be a level's name"):
        DiffusionModel(demo_model_path(), cpu=2)  # type: ignore[arg-type]
    assert cli.main(["generate", str(demo_model_path()), "-p", PROMPT, "--cpu", "avx9"]) == 1
    assert 'cpu is "avx9"' in capsys.readouterr().err


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_sorts(level: str) -> None:
    """The demo model's task, with pinned rows that stay pinned, the same on one thread and on two."""
    texts = []
    for n_threads in (1, 2):
        with DiffusionModel(demo_model_path(), n_threads=n_threads, cpu=level) as model, model.session() as session:
            texts.append(model.generate(PROMPT, seed=7).text)
            session.encode(np.arange(20, 50))
            pinned = np.full(C, -1)
            pinned[::3] = np.arange(C)[::3] + 10
            tokens = session.run_canvas(seed=1, pinned=pinned, steps=6).tokens
            assert (tokens[::3] == pinned[::3]).all()
    assert texts[0] == texts[1]
    assert "1 7 9" in texts[0]


def test_levels_leave_no_symbol_that_others_could_use(tmp_path: Path) -> None:
    """What the kernels are compiled to for a level has no weak symbol outside the level's own namespace: the linker
    would keep one of all copies, and might take that of the highest level for everybody."""
    compiler, nm = shutil.which("c++"), shutil.which("nm")
    if not compiler or not nm or platform.machine() != "x86_64":
        pytest.skip("compiles csrc/cpu/kernels for x86-64 with c++, and looks at it with nm")
    root = Path(__file__).resolve().parent.parent
    flags = ["-std=c++17", "-O2", "-mavx2", "-mfma", "-mf16c", "-DDG_LEVEL=avx2", f"-I{root / 'csrc'}"]
    flags += [f"-I{root / 'vendor/ggml/include'}"]
    for source in sorted((root / "csrc/cpu/kernels").glob("*.cpp")):
        subprocess.run([compiler, *flags, "-c", str(source), "-o", str(tmp_path / source.stem)], check=True)
        symbols = subprocess.run([nm, "-C", tmp_path / source.stem], check=True, capture_output=True, text=True).stdout
        shared = [line for line in symbols.splitlines() if re.match(r"[0-9a-f]* [WVu] (?!.*dg::avx2)", line)]
        assert not shared, source.name
