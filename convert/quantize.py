"""Rows of weights from one ggml type to another: ggml's own row functions, on all cores."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from pydiffgguf._binding import functions
from pydiffgguf.errors import DiffGGUFError


def encode(
    rows: npt.NDArray[np.generic],
    source: GGMLQuantizationType,
    target: GGMLQuantizationType,
    row: int,
    what: str,
    *,
    importance: npt.NDArray[np.float32] | None = None,
    threads: int = 0,
) -> npt.NDArray[np.uint8]:
    """`rows` of `row` elements in type `source`, any array of their bytes -> the bytes in `target`, uint8 [n, row
    bytes].

    `importance` float32 [row]: mean squares of what each column is multiplied by; types that take none ignore it.
    `threads` 0: all cores; the bytes do not depend on it. ModelFormatError for NaN or infinity, UnsupportedError for a
    value beyond the type's range and for a type that ggml cannot write; both begin with `what`.
    """
    try:
        return functions.quantize_rows(rows, int(source), int(target), row, importance=importance, n_threads=threads)
    except DiffGGUFError as error:
        raise type(error)(f"{what}: {error}") from None


def decode(rows: npt.NDArray[np.generic], source: GGMLQuantizationType, row: int, what: str) -> npt.NDArray[np.float32]:
    """The bytes of rows in type `source` -> float32 [n, row]. Errors as `encode`."""
    return encode(rows, source, GGMLQuantizationType.F32, row, what).view(np.float32)


def check_target(kind: GGMLQuantizationType, what: str, with_importance: bool) -> None:
    """UnsupportedError when ggml cannot write `kind`, or not without an importance matrix: asked with one block,
    before the first byte of the output, instead of found out in the middle."""
    block = GGML_QUANT_SIZES[kind][0]
    ones = np.ones(block, dtype=np.float32)
    try:
        encode(ones, GGMLQuantizationType.F32, kind, block, what, importance=ones if with_importance else None)
    except DiffGGUFError as error:
        hint = "" if with_importance or "importance" not in str(error) else " (--imatrix FILE)"
        raise type(error)(f"{error}{hint}") from None
