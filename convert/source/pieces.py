"""Tensors as they stream through the converter: a few MiB at a time, in the type they are stored in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from ..recipes import ModelFacts

Item = TypeVar("Item")

# Elements of a piece: 4 MiB of BF16, so that the converter's memory does not depend on a tensor's size.
PIECE_ELEMENTS = 2 * 1024 * 1024


@dataclass(frozen=True)
class Piece:
    """Whole rows of one matrix: their bytes in type `kind`, uint8 [bytes]; `matrix` counts a tensor's matrices, which
    are its experts."""

    kind: GGMLQuantizationType
    data: npt.NDArray[np.uint8]
    matrix: int = 0


class SourceTensor(Protocol):
    """What the converter asks of a tensor: its name in the output, its row-major shape, and where it comes from, for
    messages (`model.safetensors: tensor 'x'`)."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def origin(self) -> str: ...


class Source(Protocol):
    """An opened checkpoint or GGUF file."""

    @property
    def path(self) -> Path: ...
    @property
    def tensors(self) -> Sequence[SourceTensor]: ...

    def facts(self) -> ModelFacts:
        """What recipes go by."""
        ...

    def pieces(self, index: int) -> Iterator[Piece]:
        """The `index`-th tensor in order. ModelFormatError when the file ends early, OSError when it cannot be read."""
        ...


@dataclass(frozen=True)
class Span:
    """Rows `first` to `first + count` of a tensor, all in matrix `matrix`."""

    matrix: int
    first: int
    count: int


def spans(shape: tuple[int, ...]) -> Iterator[Span]:
    """The tensor's rows in order, cut so that a piece lies in one matrix and has about PIECE_ELEMENTS elements."""
    row = shape[-1]
    rows = shape[-2] if len(shape) > 1 else 1
    step = max(1, PIECE_ELEMENTS // row)
    for matrix in range(math.prod(shape[:-2])):
        for first in range(0, rows, step):
            yield Span(matrix, matrix * rows + first, min(step, rows - first))


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; each next one is made on a thread of its own while the caller works on the last.

    What making one raises is raised in its place. Reading from a disk costs no processor time, and quantizing nothing
    else: one after the other would be the sum of both.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        end = object()
        coming = pool.submit(next, items, end)
        while True:
            item = coming.result()
            if item is end:
                return
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]  # it is not `end`
