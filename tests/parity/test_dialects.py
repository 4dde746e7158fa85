"""Files that say the same in other words, and files that lack what can be lacked: what they compute.

Made from a converted random net by tests/gguf_rewrite.py. Which of them warn is tested in tests/test_bad_files.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf_rewrite import DROP, read_tensor, rewrite
from nets import Net, relative_error
from rebuild import read_tensors
from reference import Model, reference_logits

from pydiffgguf import DiffusionModel

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::pydiffgguf.ModelWarning")]

Logits = npt.NDArray[np.float32]


@pytest.fixture
def a_net(net: Callable[[str], Net]) -> Net:
    return net("full_first")


def logits(path: Path, net: Net, conditioning: Logits | None) -> Logits:
    with DiffusionModel(path, type_kv="f32", n_ctx=512, n_threads=1) as model:
        session = model.session()
        session.encode(net.ids(1, 50))
        return session.denoise(net.ids(2, net.canvas_length), conditioning)


def expected(model: Model, net: Net, conditioning: Logits | None) -> Logits:
    return reference_logits(model, net.ids(1, 50), net.ids(2, net.canvas_length), conditioning)


def conditioning(net: Net) -> Logits:
    return np.random.default_rng(3).standard_normal((net.canvas_length, net.vocab_size)).astype(np.float32) * 5


def test_split_experts_give_the_same_logits(a_net: Net, tmp_path: Path) -> None:
    """`ffn_gate_exps` and `ffn_up_exps` in place of `ffn_gate_up_exps`, whose first half of rows is the gate."""
    tensors: dict[str, Any] = {}
    for name, tensor in read_tensors(a_net.gguf()).items():
        if name.endswith("ffn_gate_up_exps.weight"):
            half = tensor.values.shape[1] // 2
            tensors[name] = DROP
            tensors[name.replace("gate_up", "gate")] = tensor.values[:, :half]
            tensors[name.replace("gate_up", "up")] = tensor.values[:, half:]
    rewrite(a_net.gguf(), tmp_path / "split.gguf", tensors=tensors)
    fused = logits(a_net.gguf(), a_net, conditioning(a_net))
    assert relative_error(logits(tmp_path / "split.gguf", a_net, conditioning(a_net)), fused) < 1e-6


def test_the_rivals_name_of_the_self_conditioning_norm_is_read(a_net: Net, tmp_path: Path) -> None:
    """`self_cond_norm.weight` for `self_cond_pre_norm.weight`: the same bits."""
    rewrite(
        a_net.gguf(),
        tmp_path / "rival.gguf",
        rename=lambda name: name.replace("self_cond_pre_norm", "self_cond_norm"),
    )
    ours = logits(a_net.gguf(), a_net, conditioning(a_net))
    assert np.array_equal(logits(tmp_path / "rival.gguf", a_net, conditioning(a_net)), ours)


def test_without_encoder_scalars_the_decoders_serve(a_net: Net, tmp_path: Path) -> None:
    """What transformers gives when the encoder's scalars are set to the decoder's; far from what it gave before."""
    missing = {name: DROP for name in read_tensors(a_net.gguf()) if "enc_layer_output_scale" in name}
    rewrite(a_net.gguf(), tmp_path / "bare.gguf", tensors=missing)
    model = copy.deepcopy(a_net.model)
    for encoder, decoder in zip(model.model.encoder.language_model.layers, model.model.decoder.layers, strict=True):
        encoder.layer_scalar.copy_(decoder.layer_scalar)
    got = logits(tmp_path / "bare.gguf", a_net, None)
    assert relative_error(got, expected(model, a_net, None)) <= 2e-5
    assert relative_error(got, expected(a_net.model, a_net, None)) > 1e-2


def test_without_self_conditioning_the_signal_is_zero(a_net: Net, tmp_path: Path) -> None:
    """Conditioned or not, the logits are those of a first step; the input norm still applies."""
    missing = {name: DROP for name in read_tensors(a_net.gguf()) if name.startswith("self_cond")}
    rewrite(a_net.gguf(), tmp_path / "bare.gguf", tensors=missing)
    first_step = expected(a_net.model, a_net, None)
    for signal in (None, conditioning(a_net)):
        assert relative_error(logits(tmp_path / "bare.gguf", a_net, signal), first_step) <= 2e-5
    assert relative_error(expected(a_net.model, a_net, conditioning(a_net)), first_step) > 1e-2


def test_rotary_factors_come_from_the_file(a_net: Net, tmp_path: Path) -> None:
    """Twice as many rotating pairs in `rope_freqs.weight` as the net was made with: transformers with its inverse
    frequencies extended in the same way."""
    factors = read_tensor(a_net.gguf(), "rope_freqs.weight")
    rotating = int((factors == 1).sum())
    changed = factors.copy()
    changed[: 2 * rotating] = 1
    rewrite(a_net.gguf(), tmp_path / "rope.gguf", tensors={"rope_freqs.weight": changed})
    model = copy.deepcopy(a_net.model)
    head_dim = 2 * len(factors)
    for rotary in (model.model.decoder.rotary_emb, model.model.encoder.language_model.rotary_emb):
        inverse = rotary.full_attention_inv_freq
        exponents = torch.arange(0, 4 * rotating, 2, dtype=torch.float32) / head_dim
        extended = 1.0 / (1_000_000.0**exponents)
        assert torch.equal(inverse[:rotating], extended[:rotating])
        inverse[: 2 * rotating] = extended
    got = logits(tmp_path / "rope.gguf", a_net, None)
    assert relative_error(got, expected(model, a_net, None)) <= 2e-5
    assert relative_error(got, expected(a_net.model, a_net, None)) > 1e-3


def test_reading_the_file_gives_the_bits_of_mapping_it(a_net: Net) -> None:
    """use_mmap off: the weights lie elsewhere, the logits do not move."""
    mapped = logits(a_net.gguf(), a_net, None)
    with DiffusionModel(a_net.gguf(), type_kv="f32", n_ctx=512, n_threads=1, use_mmap=False) as model:
        session = model.session()
        session.encode(a_net.ids(1, 50))
        assert np.array_equal(session.denoise(a_net.ids(2, a_net.canvas_length)), mapped)
