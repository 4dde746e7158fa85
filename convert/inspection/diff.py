"""What two GGUF files have in common and what not: keys, tensors, types, shapes, and, when asked for, the weights."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .gguf_file import GGUFHead, TensorInfo, Value, read_head

CHUNK = 1 << 20


@dataclass(frozen=True)
class FileDiff:
    """What compare_files() found in the files `a` and `b`, each list in `a`'s order, or else in `b`'s.

    `changed_tensors`: of another type or shape. `changed_data`: tensors of the same type and shape whose bytes differ;
    None when the weights were not compared.
    """

    a: GGUFHead
    b: GGUFHead
    keys_only_a: tuple[str, ...]
    keys_only_b: tuple[str, ...]
    changed_keys: tuple[str, ...]
    tensors_only_a: tuple[str, ...]
    tensors_only_b: tuple[str, ...]
    changed_tensors: tuple[str, ...]
    changed_data: tuple[str, ...] | None

    @property
    def same(self) -> bool:
        """Whether nothing differs of what was compared."""
        return not any(
            (
                self.keys_only_a,
                self.keys_only_b,
                self.changed_keys,
                self.tensors_only_a,
                self.tensors_only_b,
                self.changed_tensors,
                self.changed_data,
            )
        )


def compare_files(a: str | Path, b: str | Path, *, data: bool = False) -> FileDiff:
    """Compares two GGUF files, of any architecture, whole or split; the order of keys and tensors does not matter.

    `data`: also the weights of tensors that have the same type and shape, which reads both files. Raises OSError and
    ModelFormatError as inspect_file() does.
    """
    first, second = read_head(Path(a)), read_head(Path(b))
    with ExitStack() as stack:
        ours = {path: stack.enter_context(open(path, "rb")) for path in first.parts}
        theirs = {path: stack.enter_context(open(path, "rb")) for path in second.parts}

        def same_value(name: str) -> bool:
            one, other = first.keys[name], second.keys[name]
            return one.type == other.type and one.data == other.data

        def same_data(name: str) -> bool:
            one, other = first.tensors[name], second.tensors[name]
            return same_bytes(ours[one.path], one.offset, theirs[other.path], other.offset, one.n_bytes)

        shared = [name for name in first.tensors if name in second.tensors]
        alike = [name for name in shared if kind(first.tensors[name]) == kind(second.tensors[name])]
        return FileDiff(
            a=first,
            b=second,
            keys_only_a=tuple(name for name in first.keys if name not in second.keys),
            keys_only_b=tuple(name for name in second.keys if name not in first.keys),
            changed_keys=tuple(name for name in first.keys if name in second.keys and not same_value(name)),
            tensors_only_a=tuple(name for name in first.tensors if name not in second.tensors),
            tensors_only_b=tuple(name for name in second.tensors if name not in first.tensors),
            changed_tensors=tuple(name for name in shared if name not in set(alike)),
            changed_data=tuple(name for name in alike if not same_data(name)) if data else None,
        )


def kind(tensor: TensorInfo) -> tuple[str, tuple[int, ...]]:
    """Type and shape."""
    return tensor.type, tensor.shape


def same_bytes(one: BinaryIO, one_start: int, other: BinaryIO, other_start: int, size: int) -> bool:
    """Whether `size` bytes from the two places are equal."""
    one.seek(one_start)
    other.seek(other_start)
    while size > 0:
        n = min(size, CHUNK)
        if one.read(n) != other.read(n):
            return False
        size -= n
    return True


def first_difference(one: Value, other: Value) -> int | None:
    """The index of the first entry in which two arrays differ, as far as their beginnings are kept; None when there is
    none, or no two arrays."""
    if not isinstance(one.value, list) or not isinstance(other.value, list):
        return None
    pairs = enumerate(zip(one.value, other.value, strict=False))
    return next((i for i, (x, y) in pairs if x != y and repr(x) != repr(y)), None)
