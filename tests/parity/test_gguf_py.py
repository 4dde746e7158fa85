"""Files made by the rules of the dialect with gguf-py alone, from a transformers model's weights: the converter has no
hand in them. They load and give transformers' logits, in the dialect of the published files and in the rival one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from nets import SHAPES, Net, relative_error
from rebuild import tensor_names
from reference import reference_logits

from pydiffgguf import DiffusionModel, ModelWarning

pytestmark = pytest.mark.parity

SCALAR = "enc_layer_output_scale"
VOCABULARY = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "ab", "\u2581"]


def write_keys(writer: gguf.GGUFWriter, net: Net, rival: bool) -> None:
    """The dialect's keys, each through gguf-py's function for it where there is one."""
    c, shape = net.model.config.text_config, SHAPES[net.name]
    sliding = [kind == "sliding_attention" for kind in shape["layer_types"]]
    writer.add_name("made by hand")
    writer.add_block_count(len(sliding))
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    kv_heads = {True: shape["num_key_value_heads"], False: shape["num_global_key_value_heads"]}
    writer.add_head_count_kv([kv_heads[flag] for flag in sliding])
    writer.add_key_length(shape["global_head_dim"])
    writer.add_value_length(shape["global_head_dim"])
    writer.add_key_length_swa(shape["head_dim"])
    writer.add_value_length_swa(shape["head_dim"])
    writer.add_sliding_window(shape["sliding_window"])
    writer.add_sliding_window_pattern(sliding)
    writer.add_shared_kv_layers(0)
    writer.add_embedding_length_per_layer_input(0)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_causal_attention(False)
    writer.add_rope_freq_base(c.rope_parameters["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(c.rope_parameters["sliding_attention"]["rope_theta"])
    writer.add_rope_dimension_count(shape["global_head_dim"])
    writer.add_rope_dimension_count_swa(shape["head_dim"])
    writer.add_expert_count(shape["num_experts"])
    writer.add_expert_used_count(shape["top_k_experts"])
    writer.add_expert_feed_forward_length(shape["moe_intermediate_size"])
    writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if not rival:
        writer.add_uint32("diffusion.canvas_length", net.canvas_length)
    writer.add_tokenizer_model("gemma4")
    unused = [f"<unused{i}>" for i in range(net.vocab_size - len(VOCABULARY))]
    writer.add_token_list([*VOCABULARY, *unused])
    writer.add_token_scores([-1000.0] * net.vocab_size)
    types = [gguf.TokenType.NORMAL] * net.vocab_size
    types[:260] = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.UNKNOWN] + [gguf.TokenType.BYTE] * 256
    writer.add_token_types(types)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def write(path: Path, net: Net, *, rival: bool = False, split_experts: bool = False) -> Path:
    """The net in float32. `rival`: no canvas key, no encoder scalars, and another name for a norm."""
    writer = gguf.GGUFWriter(path, "diffusion-gemma")
    write_keys(writer, net, rival)
    state = net.model.state_dict()
    tensors: dict[str, Any] = {}
    for name, source in tensor_names(net.model).items():
        values = state[source].numpy()
        if rival and SCALAR in name:
            continue
        if split_experts and name.endswith("ffn_gate_up_exps.weight"):
            half = values.shape[1] // 2
            tensors[name.replace("gate_up", "gate")] = values[:, :half]
            tensors[name.replace("gate_up", "up")] = values[:, half:]
        else:
            tensors[name.replace("self_cond_pre_norm", "self_cond_norm") if rival else name] = values
    pairs = SHAPES[net.name]["global_head_dim"] // 2
    factors = np.full(pairs, 1e30, np.float32)
    factors[: int((net.model.model.decoder.rotary_emb.full_attention_inv_freq > 0).sum())] = 1
    tensors["rope_freqs.weight"] = factors
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32).reshape(values.shape or (1,)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check(path: Path, net: Net, model: Any) -> None:
    prefix, canvas = net.ids(1, 50), net.ids(2, net.canvas_length)
    conditioning = np.random.default_rng(3).standard_normal((len(canvas), net.vocab_size), np.float32) * 5
    with DiffusionModel(path, type_kv="f32", n_ctx=512, n_threads=1) as opened:
        assert opened.config.canvas_length == net.canvas_length
        assert opened.sampling.steps == 48 and opened.sampling.entropy_bound == 0.1  # the released values: no keys
        assert opened.tokenize("ab a") == [262, 263, 260]
        session = opened.session()
        session.encode(prefix)
        got = session.denoise(canvas, conditioning)
    assert relative_error(got, reference_logits(model, prefix, canvas, conditioning)) <= 2e-5


@pytest.mark.parametrize("split_experts", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("name", ["full_first", "many_experts"])
def test_a_file_by_the_rules_gives_transformers_logits(
    net: Callable[[str], Net], tmp_path: Path, name: str, split_experts: bool
) -> None:
    """Without a warning, and with no key for the sampler."""
    path = write(tmp_path / "x.gguf", net(name), split_experts=split_experts)
    check(path, net(name), net(name).model)


def test_a_file_of_the_rival_dialect_gives_transformers_logits(net: Callable[[str], Net], tmp_path: Path) -> None:
    """Its canvas is the built-in 256. The decoder's scalars serve for the encoder, in transformers as well; that they
    and the canvas are not in the file is said once each."""
    model = copy.deepcopy(net("long_canvas").model)
    for encoder, decoder in zip(model.model.encoder.language_model.layers, model.model.decoder.layers, strict=True):
        encoder.layer_scalar.copy_(decoder.layer_scalar)
    path = write(tmp_path / "x.gguf", net("long_canvas"), rival=True, split_experts=True)
    with pytest.warns(ModelWarning) as caught:
        check(path, net("long_canvas"), model)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert "diffusion.canvas_length is missing" in texts[0] and "encoder scalars are missing" in texts[1]
