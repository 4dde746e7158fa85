"""The released checkpoint's files without their weights: names, shapes, types and keys, as they are published.

    python benchmarks/released.py -o header.gguf --type q4_k_m

What a plan of memory (`pydiffgguf inspect --fit`) or a model of speed (performance_model.py) needs is in a file's head.
The file written here has the published one's tensors, byte for byte as large, behind a head without the tokenizer; its
data is a hole, so it takes a few kilobytes on a disk that knows sparse files. The engine opens it, and would compute
nonsense.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from pydiffgguf.convert.names import ARCHITECTURE, GLOBAL_TENSORS, Tensor, layer_name, layer_tensors

__all__ = ["TYPES", "ReleasedTensor", "tensors", "write_head"]

T = GGMLQuantizationType

N_LAYERS = 30
WINDOW = 1024
CANVAS = 256
CONTEXT = 262_144
N_EXPERTS_USED = 8
#: Sizes by the names that convert/names.py gives to dimensions; those of a layer come with the layer.
SIZES = {
    "vocab": 262_144,
    "hidden": 2816,
    "ffn": 2112,
    "experts": 128,
    "expert_ffn": 704,
    "gate_up": 1408,
    "pairs": 256,
    "one": 1,
}
N_HEADS = 16

#: Layers whose `attn_v` is Q6_K, and whose down projections are Q8_0 (else Q5_0), in the published Q4_K_M.
Q6_VALUES = {0, 1, 2, 6, 9, 13, 16, 20, 24, 25, 26, 27, 28}
Q8_DOWN = {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29}

#: Output type -> general.file_type.
TYPES = {"q4_k_m": LlamaFileType.MOSTLY_Q4_K_M, "q8_0": LlamaFileType.MOSTLY_Q8_0}


@dataclass(frozen=True)
class ReleasedTensor:
    """One tensor; `shape` row-major, `kind` its class in convert/names.py, `layer` None for the global ones."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    kind: str
    layer: int | None

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return self.n_elements // block * size


def is_sliding(layer: int) -> bool:
    """Five sliding layers, then a full one."""
    return layer % 6 != 5


def kv_heads(layer: int) -> int:
    return 8 if is_sliding(layer) else 2


def head_dim(layer: int) -> int:
    return 256 if is_sliding(layer) else 512


def tensor_type(rule: Tensor, layer: int | None, type: str) -> GGMLQuantizationType:
    """The type that a tensor has in the published file."""
    if len(rule.dims) == 1 or rule.kind == "router":
        return T.F32
    if type == "q8_0":
        return T.Q8_0
    if rule.kind == "embedding":
        return T.Q6_K
    if rule.name in ("ffn_down.weight", "ffn_down_exps.weight"):
        return T.Q8_0 if layer in Q8_DOWN else T.Q5_0
    if rule.name == "self_cond_down.weight":
        return T.Q5_0
    if rule.name == "attn_v.weight" and layer in Q6_VALUES:
        return T.Q6_K
    return T.Q4_K


def tensors(type: str) -> Iterator[ReleasedTensor]:
    """All tensors of the published file of that type, a key of TYPES."""
    if type not in TYPES:
        raise ValueError(f"type: {type!r}, expected one of {', '.join(TYPES)}")
    for rule in GLOBAL_TENSORS:
        shape = tuple(SIZES[d] for d in rule.dims)
        yield ReleasedTensor(rule.name, shape, tensor_type(rule, None, type), rule.kind, None)
    for layer in range(N_LAYERS):
        head = head_dim(layer)
        sizes = {**SIZES, "head": head, "q": N_HEADS * head, "kv": kv_heads(layer) * head}
        for rule in layer_tensors(is_sliding(layer)):
            shape = tuple(sizes[d] for d in rule.dims)
            kind = tensor_type(rule, layer, type)
            yield ReleasedTensor(layer_name(layer, rule.name), shape, kind, rule.kind, layer)


def write_head(path: Path, type: str) -> int:
    """Writes the head of the published file of that type, and a hole for its data; returns the bytes of tensor data,
    each tensor padded to 32. Raises ValueError for an unknown type, OSError where it cannot be written."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_type("model")
    writer.add_name("released head")
    writer.add_file_type(TYPES[type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(SIZES["hidden"])
    writer.add_feed_forward_length(SIZES["ffn"])
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv([kv_heads(i) for i in range(N_LAYERS)])
    writer.add_key_length(512)
    writer.add_value_length(512)
    writer.add_key_length_swa(256)
    writer.add_value_length_swa(256)
    writer.add_sliding_window(WINDOW)
    writer.add_sliding_window_pattern([is_sliding(i) for i in range(N_LAYERS)])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_causal_attention(False)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_freq_base_swa(1e4)
    writer.add_rope_dimension_count(512)
    writer.add_rope_dimension_count_swa(256)
    writer.add_expert_count(SIZES["experts"])
    writer.add_expert_used_count(N_EXPERTS_USED)
    writer.add_expert_feed_forward_length(SIZES["expert_ffn"])
    writer.add_final_logit_softcapping(30.0)
    writer.add_uint32("diffusion.canvas_length", CANVAS)
    n_data = 0
    for tensor in tensors(type):
        *rows, width = tensor.shape
        block, size = GGML_QUANT_SIZES[tensor.type]
        # GGUFWriter takes a quantized tensor's shape in bytes.
        shape = [*rows, width // block * size] if tensor.type not in (T.F32, T.F16) else tensor.shape
        dtype = np.dtype(np.float32 if tensor.type == T.F32 else np.uint8)
        raw = None if tensor.type == T.F32 else tensor.type
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.n_bytes, raw_dtype=raw)
        n_data += -(-tensor.n_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as file:
        at = -(-path.stat().st_size // 32) * 32
        file.truncate(at + n_data)
        for tensor in tensors(type):
            # The engine looks at these: divisors of angles (NaN or 0 are refused), and the factors of layers.
            if tensor.kind in ("rope", "scalar"):
                values = np.ones(tensor.shape, dtype="<f4")
                values[64:] = 1e30  # the quarter of a full layer's pairs that is rotated comes first
                file.seek(at)
                file.write(values.tobytes())
            at += -(-tensor.n_bytes // 32) * 32
    return n_data


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the head of a published GGUF, with a hole for its weights.")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument(
        "--type", choices=TYPES, default="q4_k_m", help="which of the published files (default: q4_k_m)"
    )
    args = parser.parse_args(argv)
    print(f"{args.out}: {write_head(args.out, args.type):,} bytes of tensor data, as a hole")
    return 0


if __name__ == "__main__":
    sys.exit(main())
