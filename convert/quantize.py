"""Which type each tensor gets, and how rows become that type's bytes.

1-D tensors, norms and the router stay F32: they are small, and the router's choice hangs on their last bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize

from pydiffgguf.errors import UnsupportedError

from .names import Tensor

F32 = GGMLQuantizationType.F32
F16 = GGMLQuantizationType.F16
BF16 = GGMLQuantizationType.BF16
Q8_0 = GGMLQuantizationType.Q8_0


@dataclass(frozen=True)
class Recipe:
    """An output type of the converter: the type of the big tensors, and `general.file_type`."""

    big: GGMLQuantizationType
    file_type: LlamaFileType


RECIPES: dict[str, Recipe] = {
    "f32": Recipe(F32, LlamaFileType.ALL_F32),
    "f16": Recipe(F16, LlamaFileType.MOSTLY_F16),
    "bf16": Recipe(BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": Recipe(Q8_0, LlamaFileType.MOSTLY_Q8_0),
}

# The largest magnitudes that do not round to infinity: of Q8_0 the scale, max/127, is an F16.
LARGEST: dict[GGMLQuantizationType, float] = {
    F16: 65519.0,
    BF16: 3.39e38,
    Q8_0: 65504.0 * 127,
}


def recipe(name: str) -> Recipe:
    """The recipe called `name`; ValueError, with the choices, when there is none."""
    try:
        return RECIPES[name]
    except KeyError:
        raise ValueError(f"type: {name!r}, expected one of {', '.join(RECIPES)}") from None


def choose_type(rule: Tensor, shape: tuple[int, ...], wanted: Recipe) -> tuple[GGMLQuantizationType, bool]:
    """(type, fell back): the tensor's type in the output; `fell back` when its rows do not divide into the recipe's
    blocks and it becomes F16 instead. `shape` is row-major."""
    if len(shape) == 1 or rule.kind in ("norm", "router"):
        return F32, False
    block = GGML_QUANT_SIZES[wanted.big][0]
    if shape[-1] % block:
        return F16, True
    return wanted.big, False


def row_bytes(row: int, kind: GGMLQuantizationType) -> int:
    """The size in bytes of a row of `row` elements, a multiple of the type's block."""
    block, size = GGML_QUANT_SIZES[kind]
    return row // block * size


def encode(rows: npt.NDArray[np.float32], kind: GGMLQuantizationType, name: str) -> npt.NDArray[np.uint8]:
    """float32 [n, row] as the bytes of `kind`, [n, row_bytes]. UnsupportedError, naming the tensor, when a value is
    beyond the type's range."""
    largest = LARGEST.get(kind)
    if largest is not None and rows.size and max(rows.max(), -rows.min()) > largest:
        raise UnsupportedError(f"tensor '{name}' holds values beyond the range of {kind.name}; use bf16 or f32")
    # A block whose largest magnitude is under 127 * 2^-128 has a scale of 0 and reads back as zeros whatever its
    # quants are; gguf's inverse of such a scale overflows, harmlessly.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(quantize(rows, kind)).view(np.uint8).reshape(rows.shape[0], -1)
