"""GGUF files of a known shape with random weights: what speed is measured on where no checkpoint is at hand.

    python benchmarks/shapes.py 724m -o 724m.gguf --type q8_0
    python benchmarks/shapes.py 26b-a4b -o full.gguf --type q4_k_m
    python benchmarks/shapes.py 26b-a4b -o head.gguf --type q4_k_m --head-only

Nothing is trained and there is no tokenizer; the time of a pass does not depend on what the weights say. They are drawn
so that every layer's output keeps its size (a deviation of one over the root of the inputs; norms, router and scalars
near those of tests/tiny_checkpoint.py), and the logits stay finite. Float types are Gaussian; a quantized type gets
random bytes as its quants, and scales that give those the same deviation, so that 16 GB are written at the disk's
speed, in pieces of a few MiB. The same shape, types and seed give the same bytes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from pydiffgguf._text import human
from pydiffgguf.convert.output import whole_or_nothing
from pydiffgguf.convert.quantize import encode
from pydiffgguf.convert.recipes import RECIPES, ModelFacts, Override, Recipe, TypeRules, model_facts, recipe
from pydiffgguf.convert.source.checkpoint import CheckpointTensor, rope_freqs, wanted_tensors
from pydiffgguf.convert.source.config import FULL, SLIDING, CheckpointConfig, parse_config
from pydiffgguf.convert.source.hf_to_gguf import metadata
from pydiffgguf.convert.source.pieces import Piece
from pydiffgguf.convert.writing import Keys, PlannedTensor, header_writer, pad, padded, plan_tensors, write_header

__all__ = ["SHAPES", "plan", "shape", "write", "write_head"]

#: Bytes of one piece of a tensor.
PIECE = 8 << 20

# Text configs in transformers' words, and the canvas. The first is the project's speed benchmark: 724 M parameters, of
# which a token uses 192 M. The second is the released checkpoint's.
SHAPES: dict[str, dict[str, Any]] = {
    "724m": dict(
        vocab_size=16_384,
        hidden_size=1024,
        intermediate_size=1536,
        layer_types=[*[SLIDING] * 5, FULL] * 2,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        num_global_key_value_heads=2,
        global_head_dim=256,
        sliding_window=256,
        num_experts=32,
        top_k_experts=4,
        moe_intermediate_size=512,
        canvas_length=256,
        max_position_embeddings=32_768,
    ),
    "26b-a4b": dict(
        vocab_size=262_144,
        hidden_size=2816,
        intermediate_size=2112,
        layer_types=[*[SLIDING] * 5, FULL] * 5,
        num_hidden_layers=30,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        num_global_key_value_heads=2,
        global_head_dim=512,
        sliding_window=1024,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
        canvas_length=256,
        max_position_embeddings=262_144,
    ),
}


@dataclass(frozen=True)
class Blocks:
    """Where a quantized type keeps its float16 scale, and its minimum if it has one, in bytes from a block's beginning.

    `minimum`: how many scales the minimum must be for random quants to have a mean of zero. Where the minimum is
    subtracted (K types: minimum times a random factor as large as the scale's) it is positive, where it is added
    negative.
    """

    scale: int
    at: int | None = None
    minimum: float = 0.0


T = GGMLQuantizationType
BLOCKS: dict[GGMLQuantizationType, Blocks] = {
    T.Q4_0: Blocks(0),
    T.Q4_1: Blocks(0, 2, -7.5),
    T.Q5_0: Blocks(0),
    T.Q5_1: Blocks(0, 2, -15.5),
    T.Q8_0: Blocks(0),
    T.Q2_K: Blocks(80, 82, 1.5),
    T.Q3_K: Blocks(108),
    T.Q4_K: Blocks(0, 2, 7.5),
    T.Q5_K: Blocks(0, 2, 15.5),
    T.Q6_K: Blocks(208),
    T.IQ4_NL: Blocks(0),
    T.IQ4_XS: Blocks(0),
    T.IQ3_S: Blocks(0),
    T.IQ3_XXS: Blocks(0),
    T.IQ2_S: Blocks(0),
    T.IQ2_XS: Blocks(0),
    T.IQ2_XXS: Blocks(0),
    T.IQ1_S: Blocks(0),
    T.TQ1_0: Blocks(52),
    T.TQ2_0: Blocks(64),
}


def set_exponents(blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32]) -> None:
    """MXFP4 begins with the scale's exponent alone: the nearest power of two."""
    blocks[:, 0] = np.rint(np.log2(scales)) + 128


def set_small_floats(blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32]) -> None:
    """NVFP4 begins with four scales of 4 bits of exponent and 3 of mantissa, without a sign: the nearest below."""
    exponents, mantissas = np.divmod(np.arange(0x7F), 8)
    values = np.where(exponents == 0, mantissas / 512, (1 + mantissas / 8) * 2.0 ** (exponents - 7))
    blocks[:, :4] = (np.searchsorted(values, scales, side="right") - 1).clip(1)[:, None]


def set_scattered(blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32]) -> None:
    """IQ1_M keeps the four digits of its float16 scale in the highest ones of its last four 16-bit numbers."""
    halves = scales.astype("<f2").view("<u2").astype(np.uint16)
    tail = np.ascontiguousarray(blocks[:, 48:56]).view("<u2") & 0x0FFF
    for i in range(4):
        tail[:, i] |= (halves >> 4 * i & 0xF) << 12
    blocks[:, 48:56] = tail.view(np.uint8)


# Types whose scale is no float16 in one place.
ODD_SCALES: dict[GGMLQuantizationType, Callable[[npt.NDArray[np.uint8], npt.NDArray[np.float32]], None]] = {
    T.MXFP4: set_exponents,
    T.NVFP4: set_small_floats,
    T.IQ1_M: set_scattered,
}

FLOATS = (T.F32, T.F16, T.BF16)
# What a file can be written in. Not the types of ODD_SCALES, whose scales are too coarse for a given deviation, and not
# TQ2_0, whose four quants stand for -1, 0, 1 and 2: their mean is not zero.
TYPES = {kind.name.lower(): kind for kind in (*FLOATS, *BLOCKS) if kind != T.TQ2_0}


def shape(name: str) -> CheckpointConfig:
    """The figures of a shape. Raises ValueError, with the choices, for an unknown name."""
    if name not in SHAPES:
        raise ValueError(f"shape: {name!r}, expected one of {', '.join(SHAPES)}")
    return parse_config({"model_type": "diffusion_gemma_text", **SHAPES[name]}, name)


def tensors(config: CheckpointConfig) -> list[CheckpointTensor]:
    """The tensors of a file, in its order."""
    return [CheckpointTensor(name, rule, dims, rule.source) for name, rule, dims, _ in wanted_tensors(config)]


@dataclass(frozen=True)
class RandomCheckpoint:
    """What the converter asks a checkpoint for, but for the weights."""

    config: CheckpointConfig
    tensors: list[CheckpointTensor]
    sampler: dict[str, int | float] = field(default_factory=dict)
    eos_ids: list[int] = field(default_factory=list)
    infill_mode: str | None = None

    def facts(self) -> ModelFacts:
        c = self.config
        return model_facts(len(c.layers), c.experts, c.heads, c.layers[0].kv_heads, (t.name for t in self.tensors))

    def pieces(self, index: int) -> Iterator[Piece]:
        raise NotImplementedError("a random checkpoint has no weights: blocks are drawn")


def rules(type: str, facts: ModelFacts, tensor_types: Sequence[str]) -> TypeRules:
    """The converter's rules for one of its recipes; or, for a plain ggml type, that type in all matrices."""
    overrides = [Override.parse(text) for text in tensor_types]
    if type in RECIPES:
        return TypeRules(recipe(type), facts, overrides)
    kind = parse_type(type)
    pure = Recipe(type, kind, LlamaFileType.GUESSED)
    # Blocks are drawn, not quantized: types that ggml writes with an importance matrix only are as good as others.
    return TypeRules(pure, facts, [*overrides, Override("", kind)], with_importance=True)


def parse_type(name: str) -> GGMLQuantizationType:
    """The type called `name`, in either case; ValueError, with the choices, when there is none."""
    try:
        return TYPES[name.lower()]
    except KeyError:
        raise ValueError(f"type: {name!r}, expected one of {', '.join(TYPES)}") from None


def deviation(tensor: CheckpointTensor) -> float:
    """The standard deviation of a matrix."""
    by_inputs = 1.0 / math.sqrt(tensor.shape[-1])
    if tensor.rule.kind == "embedding":
        return 2.5 * by_inputs
    if tensor.rule.kind == "router":
        return 2.0  # its input carries a factor hidden^-0.5
    if tensor.name == "self_cond_down.weight":
        return 0.3 * by_inputs  # undamped, a random net doubles its rounding errors at every step
    return by_inputs


def bounds(tensor: CheckpointTensor) -> tuple[float, float]:
    """The range of a vector's entries, which are uniform."""
    if tensor.rule.encoder_only:
        return 0.25, 0.55
    if tensor.rule.kind == "scalar":
        return 0.8, 1.3
    if tensor.name.endswith(("attn_q_norm.weight", "attn_k_norm.weight")):
        return 0.30, 0.40  # attention has no 1/sqrt(d) factor
    if tensor.name.endswith("ffn_down_exps.scale"):
        return 0.5, 1.5
    return 0.6, 1.4


def unit_blocks(rng: np.random.Generator, kind: GGMLQuantizationType, n: int) -> npt.NDArray[np.uint8]:
    """n blocks of random quants with scale 1: uint8 [n, bytes of a block]."""
    blocks = rng.integers(0, 256, (n, GGML_QUANT_SIZES[kind][1]), np.uint8)
    set_scales(blocks, kind, np.ones(n, np.float32))
    return blocks


def set_scales(blocks: npt.NDArray[np.uint8], kind: GGMLQuantizationType, scales: npt.NDArray[np.float32]) -> None:
    """Writes a scale, and the minimum that belongs to it, into each block."""
    if kind in ODD_SCALES:
        ODD_SCALES[kind](blocks, scales)
        return
    layout = BLOCKS[kind]
    blocks[:, layout.scale : layout.scale + 2] = scales.astype("<f2")[:, None].view(np.uint8)
    if layout.at is not None:
        minimum = (scales * np.float32(layout.minimum)).astype("<f2")
        blocks[:, layout.at : layout.at + 2] = minimum[:, None].view(np.uint8)


@cache
def unit_deviation(kind: GGMLQuantizationType) -> float:
    """The standard deviation of what random quants with scale 1 stand for; over 2,048 blocks, within a percent."""
    values = gguf.quants.dequantize(unit_blocks(np.random.default_rng(0), kind, 2048), kind)
    return float(values.std())


def pieces(p: PlannedTensor, config: CheckpointConfig, rng: np.random.Generator) -> Iterator[npt.NDArray[np.uint8]]:
    """The tensor's bytes in order, a few MiB at a time."""
    tensor, row = p.tensor, p.tensor.shape[-1]
    assert isinstance(tensor, CheckpointTensor)
    if not tensor.rule.source:
        yield encode(rope_freqs(config), T.F32, p.kind, row, tensor.origin)
    elif len(tensor.shape) == 1:
        yield encode(rng.uniform(*bounds(tensor), row).astype(np.float32), T.F32, p.kind, row, tensor.origin)
    elif p.kind in FLOATS:
        n_rows, at_once = math.prod(tensor.shape[:-1]), max(1, PIECE // (4 * row))
        for first in range(0, n_rows, at_once):
            rows = rng.standard_normal((min(at_once, n_rows - first), row), np.float32)
            yield encode(rows * np.float32(deviation(tensor)), T.F32, p.kind, row, tensor.origin)
    else:
        size = GGML_QUANT_SIZES[p.kind][1]
        scale = np.float32(deviation(tensor) / unit_deviation(p.kind))
        n_blocks, at_once = p.n_bytes // size, PIECE // size
        for first in range(0, n_blocks, at_once):
            n = min(at_once, n_blocks - first)
            blocks = unit_blocks(rng, p.kind, n)
            set_scales(blocks, p.kind, scale * rng.uniform(0.8, 1.2, n).astype(np.float32))
            yield blocks


def plan(name: str, type: str, tensor_types: Sequence[str] = ()) -> tuple[list[PlannedTensor], Keys]:
    """The tensors of a file, with their types and sizes, and its keys; the arguments are those of `write`."""
    config = shape(name)
    checkpoint: Any = RandomCheckpoint(config, tensors(config))
    chosen = rules(type, checkpoint.facts(), tensor_types)
    planned, _ = plan_tensors(checkpoint, chosen)
    return planned, Keys(metadata(checkpoint, None, chosen.recipe, f"random {name}"))


def write_head(path: Path, name: str, *, type: str = "q8_0") -> int:
    """Writes what stands before the weights, and a hole for them, which takes no room where the disk knows sparse
    files; returns the bytes of tensor data. The engine opens the file, and would compute nonsense: only the divisors of
    angles and the layers' factors, which it looks at, are there. Arguments and errors are those of `write`."""
    config = shape(name)
    planned, keys = plan(name, type)
    path.unlink(missing_ok=True)
    write_header(header_writer(planned, keys), keys, path)
    at = start = padded(path.stat().st_size)
    with open(path, "r+b") as file:
        for p in planned:
            tensor = p.tensor
            assert isinstance(tensor, CheckpointTensor)
            if tensor.rule.kind in ("rope", "scalar"):
                file.seek(at)
                for piece in pieces(p, config, np.random.default_rng(1)):
                    file.write(piece.data.cast("B"))
            at += padded(p.n_bytes)
        file.truncate(at)
    return at - start


def write(
    path: Path,
    name: str,
    *,
    type: str = "q8_0",
    tensor_types: Sequence[str] = (),
    seed: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes a random GGUF of the shape `name` (a key of SHAPES); returns its size in bytes.

    Args:
        type: a recipe of the converter ("q4_k_m"), or one of TYPES, which all matrices get then; the rest is as in a
            conversion.
        tensor_types: overrides, as the converter takes them.
        seed: of all weights; a tensor's depend on it and on the tensor's place in the file.
        progress: called with (bytes done, bytes in all).

    The file appears under its name only when it is whole. Raises ValueError for an unknown shape or type, OSError where
    it cannot be written.
    """
    config = shape(name)
    planned, keys = plan(name, type, tensor_types)
    writer = header_writer(planned, keys)
    total = sum(padded(p.n_bytes) for p in planned)
    with whole_or_nothing(path, total + 1_000_000) as file:
        file.append_by(lambda part: write_header(writer, keys, part))
        pad(file)
        start = file.tell()
        for i, p in enumerate(planned):
            for piece in pieces(p, config, np.random.default_rng([seed, i])):
                file.append(piece.data.cast("B"))
                if progress:
                    progress(file.tell() - start, total)
            pad(file)
        return file.tell()


def count_parameters(config: CheckpointConfig) -> int:
    """All weights of the shape."""
    return sum(math.prod(tensor.shape) for tensor in tensors(config) if tensor.source)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a GGUF of a known shape with random weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--type", default="q8_0", help="a recipe, or a ggml type for all matrices (default: q8_0)")
    parser.add_argument("--tensor-type", action="append", default=[], metavar="PATTERN=TYPE", dest="tensor_types")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--head-only", action="store_true", help="a hole where the weights would be")
    args = parser.parse_args(argv)
    if args.head_only:
        if args.tensor_types:
            parser.error("--head-only takes no --tensor-type")
        print(f"{args.out}: {write_head(args.out, args.shape, type=args.type):,} bytes of tensor data, as a hole")
        return 0
    from rich.console import Console
    from rich.progress import Progress

    began = time.monotonic()
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(str(args.out.name), total=None)
        size = write(
            args.out,
            args.shape,
            type=args.type,
            tensor_types=args.tensor_types,
            seed=args.seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    millions = count_parameters(shape(args.shape)) / 1e6
    print(f"{args.out}: {millions:,.0f} M parameters, {human(size)}, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
