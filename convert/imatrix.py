"""Importance matrices: for each weight matrix, the mean square of every column of what it is multiplied by.

Quantizers that take one spend their precision on the columns that matter. The file format is llama.cpp's imatrix GGUF:
for a tensor `X`, `X.in_sum2` F32 [n_matrices, row] holds sums of squares and `X.counts` F32 [n_matrices, 1] how many
rows were summed (both row-major), for each expert its own; `imatrix.datasets`, `imatrix.chunk_count` and
`imatrix.chunk_size` say what was run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from pydiffgguf.errors import ModelFormatError

from .inspection.gguf_file import GGUFHead, TensorInfo, read_head
from .output import whole_or_nothing
from .source.shards import read_bytes

Float32Array = npt.NDArray[np.float32]

SUMS = ".in_sum2"
COUNTS = ".counts"


@dataclass
class Importance:
    """An importance matrix. `means`: tensor name -> float32 [n_matrices, row]; a matrix that never met a row, an expert
    that was never chosen, has ones: no column of it matters more than another.

    `used` collects the names that were asked for.
    """

    path: Path
    means: dict[str, Float32Array]
    used: set[str] = field(default_factory=set)

    @staticmethod
    def load(path: Path) -> Importance:
        """Reads a file of the format above. OSError when it cannot be opened; ModelFormatError for anything else: not a
        GGUF, not an imatrix, sums without counts, negative or not finite."""
        head = read_head(path)
        kind = head.keys.get("general.type")
        if kind is None or kind.value != "imatrix":
            raise ModelFormatError(f"{path}: not an importance matrix: key 'general.type' is not 'imatrix'")
        means = {}
        with open(path, "rb", buffering=0) as file:

            def read(info: TensorInfo) -> Float32Array:
                if info.type != "F32":
                    raise ModelFormatError(f"{path}: tensor '{info.name:.100}' has type {info.type}: expected F32")
                values = read_bytes(path, file, info.offset, info.n_bytes, info.name).view("<f4")
                if not np.isfinite(values).all() or (values < 0).any():
                    raise ModelFormatError(f"{path}: tensor '{info.name:.100}' holds negative values, NaN or infinity")
                return values.reshape(math.prod(info.shape[1:]), info.shape[0])

            for name, info in head.tensors.items():
                if name.endswith(SUMS):
                    tensor = name.removesuffix(SUMS)
                    means[tensor] = mean(read(info), read(counts_of(head, tensor)), path, tensor)
        if not means:
            raise ModelFormatError(f"{path}: no tensor ends in '{SUMS}': the importance matrix is empty")
        return Importance(path, means)

    def of(self, name: str, matrix: int) -> Float32Array | None:
        """The means of a tensor's `matrix`-th matrix, float32 [row]; None when there are none of the tensor."""
        means = self.means.get(name)
        if means is None:
            return None
        self.used.add(name)
        # Some writers sum over all experts.
        row: Float32Array = means[matrix if means.shape[0] > 1 else 0]
        return row

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """ModelFormatError when what is held of a tensor has another shape than its rows ask for."""
        means = self.means.get(name)
        if means is not None and (means.shape[1] != shape[-1] or means.shape[0] not in (1, math.prod(shape[:-2]))):
            raise ModelFormatError(
                f"{self.path}: '{name}' has {means.shape[0]} x {means.shape[1]} values: the tensor has "
                f"{math.prod(shape[:-2])} matrices with rows of {shape[-1]}"
            )


def counts_of(head: GGUFHead, tensor: str) -> TensorInfo:
    info = head.tensors.get(tensor + COUNTS)
    if info is None:
        raise ModelFormatError(f"{head.path}: tensor '{tensor + COUNTS:.100}' is missing")
    return info


def mean(sums: Float32Array, counts: Float32Array, path: Path, tensor: str) -> Float32Array:
    """sums [n, row] by counts [n, 1]; ones where nothing was counted."""
    if counts.shape != (sums.shape[0], 1):
        raise ModelFormatError(
            f"{path}: '{tensor + COUNTS:.100}' has shape {list(counts.shape)}: expected {[sums.shape[0], 1]}"
        )
    return np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)


def save(
    path: Path,
    sums: Mapping[str, npt.NDArray[np.float64]],
    counts: Mapping[str, npt.NDArray[np.int64]],
    datasets: Sequence[str],
    chunks: int,
    chunk_size: int,
) -> None:
    """Writes sums [n_matrices, row] and counts [n_matrices] by tensor name; `path` appears when it is whole.

    OSError when it cannot be written.
    """
    size = sum(4 * s.size + 4 * counts[name].size + 256 for name, s in sums.items()) + 4096
    with whole_or_nothing(path, size) as part:

        def write(place: Path) -> None:
            writer = gguf.GGUFWriter(place, "")
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", list(datasets))
            writer.add_uint32("imatrix.chunk_count", chunks)
            writer.add_uint32("imatrix.chunk_size", chunk_size)
            for name in sorted(sums):
                writer.add_tensor(name + SUMS, sums[name].astype(np.float32))
                writer.add_tensor(name + COUNTS, counts[name].astype(np.float32).reshape(-1, 1))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()

        part.append_by(write)
