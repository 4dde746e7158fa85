"""Sums of squares for importance matrices, against the inputs that transformers' modules get."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from nets import Net, Report
from reference import ReferencePrefix

from pydiffgguf import DiffusionModel, demo_model_path
from pydiffgguf.convert import collect, imatrix

pytestmark = pytest.mark.parity

# The squares of float32 activations that differ by 1e-6 relative, and columns that are nearly zero.
TOLERANCE = 2e-5


def reference_sums(
    net: Net, prompt: npt.NDArray[np.int32], canvas: npt.NDArray[np.int32]
) -> dict[str, npt.NDArray[np.float64]]:
    """Tensor name -> sums [n, row] of one decoder pass; of the experts' down projections their true inputs, computed
    from the gate and up rows of the module."""
    sums: dict[str, npt.NDArray[np.float64]] = {}
    hooks = []

    def add(name: str, x: torch.Tensor, matrix: int = 0, matrices: int = 1) -> None:
        flat = x.detach().double().reshape(-1, x.shape[-1])
        sums.setdefault(name, np.zeros((matrices, x.shape[-1])))[matrix] += (flat**2).sum(0).numpy()

    def watch(module: torch.nn.Module, name: str) -> None:
        hooks.append(module.register_forward_pre_hook(lambda _, args: add(name, args[0])))

    def watch_experts(module: Any, index: int) -> None:
        def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x, chosen = args[0].reshape(-1, args[0].shape[-1]), args[1]
            for e in range(module.num_experts):
                rows = x[(chosen == e).any(-1)]
                gate, up = torch.nn.functional.linear(rows, module.gate_up_proj[e]).chunk(2, dim=-1)
                add(f"blk.{index}.ffn_gate_up_exps.weight", rows, e, module.num_experts)
                add(f"blk.{index}.ffn_down_exps.weight", module.act_fn(gate) * up, e, module.num_experts)

        hooks.append(module.register_forward_pre_hook(hook))

    decoder: Any = net.model.model.decoder
    prefix = ReferencePrefix(net.model)
    prefix.encode(prompt)
    for i, layer in enumerate(decoder.layers):
        watch(layer.self_attn.q_proj, f"blk.{i}.attn_q.weight")
        watch(layer.self_attn.o_proj, f"blk.{i}.attn_output.weight")
        watch(layer.mlp.up_proj, f"blk.{i}.ffn_up.weight")
        watch(layer.mlp.down_proj, f"blk.{i}.ffn_down.weight")
        watch(layer.router.proj, f"blk.{i}.ffn_gate_inp.weight")
        watch_experts(layer.experts, i)
    watch(net.model.lm_head, "token_embd.weight")
    with torch.no_grad():
        signal = prefix.denoise(canvas)
        sums.clear()
        watch(decoder.self_conditioning.down_proj, "self_cond_down.weight")
        prefix.denoise(canvas, signal)
    for handle in hooks:
        handle.remove()
    return sums


@pytest.mark.parametrize("name", ["one_kv_head", "full_first"])
def test_sums_are_those_of_the_modules_inputs(net: Callable[[str], Net], name: str, report: Report) -> None:
    """A denoise step with self-conditioning: every matrix, every expert, every column."""
    a = net(name)
    prompt, canvas = a.ids(1, 40), a.ids(2, a.canvas_length)
    with DiffusionModel(a.gguf(), type_kv="f32", n_ctx=512) as model, model.session() as session:
        session.encode(prompt)
        signal = session.denoise(canvas)
        session.collect(True)
        session.denoise(canvas, signal)
        sums, counts = session.importance()
        session.collect(False)
        with pytest.raises(ValueError, match="nothing is collected"):
            session.importance()
    expected = reference_sums(a, prompt, canvas)
    assert expected.keys() <= sums.keys()
    worst = 0.0
    for tensor, reference in expected.items():
        got = sums[tensor]
        worst = max(worst, float(np.abs(got - reference).max() / np.abs(reference).max()))
        used = int(a.model.config.text_config.top_k_experts) if "_exps" in tensor else 1
        assert counts[tensor].sum() == used * a.canvas_length, tensor
    report(f"importance sums {name}: largest difference {worst:.1e} of a tensor's largest sum")
    assert worst <= TOLERANCE


def test_collecting_changes_no_logit(net: Callable[[str], Net]) -> None:
    """Sums are taken beside ggml's operators, which compute while it is on."""
    a = net("one_kv_head")
    with DiffusionModel(a.gguf(), n_ctx=512) as model, model.session(ggml_operators=True) as session:
        session.encode(a.ids(1, 40))
        before = session.denoise(a.ids(2, a.canvas_length))
        session.collect(True)
        assert np.array_equal(before, session.denoise(a.ids(2, a.canvas_length)))


def test_the_same_text_gives_the_same_file(tmp_path: Path) -> None:
    """Byte for byte; and the file is read back as what was collected, for every matrix of the model."""
    text = "The cat sat on the mat. " * 60
    files = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    with DiffusionModel(demo_model_path()) as model:
        reports = [collect(model, text, path, chunks=1) for path in files]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert reports[0].chunks == 1
    means = imatrix.Importance.load(files[0]).means
    assert len(means) == reports[0].tensors
    assert all(np.isfinite(m).all() and (m >= 0).all() for m in means.values())
