"""The adapters of a model: which are loaded, under which names, and which of them a call runs."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from pydiffgguf._arguments import real
from pydiffgguf._binding.adapters import NativeAdapter, encoder_key
from pydiffgguf._binding.library import StrPath
from pydiffgguf._binding.native import NativeModel
from pydiffgguf._log import logger

__all__ = [
    "NONE",
    "Adapter",
    "AdapterSource",
    "Adapters",
    "Chosen",
    "Found",
    "Region",
    "bytes_of",
    "find",
    "find_all",
]

#: In which passes an adapter's layers act.
Region: TypeAlias = Literal["decoder", "encoder", "both"]

#: An adapter's file or folder or name on a hub; with its scale.
AdapterSource: TypeAlias = "StrPath | tuple[StrPath, float]"


@dataclass(frozen=True)
class Chosen:
    """The adapters that a call runs, in the order in which they were loaded, each with a scale that is not 0. `key`:
    what a prefix depends on besides its tokens; 0 where it is the bare model's. `names`: for a call's stats."""

    pairs: tuple[tuple[NativeAdapter, float], ...] = ()
    key: int = 0
    names: Mapping[str, float] = field(default_factory=dict)


NONE = Chosen()


class Found(NamedTuple):
    """An adapter that is on this machine, not yet loaded."""

    path: Path
    name: str
    scale: float


class Adapter:
    """A loaded adapter. `scale` is what it is multiplied by where a call does not say; setting it changes later calls.

    `path`: where it came from. `base`: the model that it was trained on, where it says so. `regions`: which sets its
    layers' pairs are in: "both", or "decoder" and "encoder". `ranks`: of its pairs, ascending. `n_pairs`: matrices that
    it adapts. `n_bytes`: what it takes in memory. `left_out`: what of it does nothing here, one line each.
    """

    def __init__(
        self, native: NativeAdapter, name: str, path: Path, scale: float, base: str | None, left_out: tuple[str, ...]
    ) -> None:
        self.name = name
        self.path = path
        self.base = base
        self.regions = native.regions
        self.ranks = native.ranks
        self.n_pairs = native.n_pairs
        self.n_bytes = native.n_bytes
        self.left_out = left_out
        self._native = native
        self.scale = scale

    @property
    def scale(self) -> float:
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = check_scale("scale", value)

    def __repr__(self) -> str:
        return f"<Adapter {self.name}: {self.n_pairs} pairs, scale {self.scale:g}>"


def check_scale(name: str, value: object) -> float:
    """A scale: any finite number, negative ones too."""
    scale = real(name, value)
    if not math.isfinite(scale) or abs(scale) > 1e30:
        raise ValueError(f"{name} is {scale}: it must be a finite number, at most 1e30 in size")
    return scale


class Adapters(Mapping[str, Adapter]):
    """A model's loaded adapters by their names. Safe from any thread."""

    def __init__(self, model: NativeModel) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._loaded: dict[str, Adapter] = {}

    def __getitem__(self, name: str) -> Adapter:
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._loaded))

    def __len__(self) -> int:
        return len(self._loaded)

    def __repr__(self) -> str:
        return repr(self._loaded)

    @property
    def n_bytes(self) -> int:
        return sum(adapter.n_bytes for adapter in tuple(self._loaded.values()))

    def load(self, found: Found, region: Region | None = None) -> Adapter:
        """See `DiffusionModel.load_lora`."""
        path, name, scale = found
        self._check_free(name)
        made = self._open(path, name, scale, region)
        with self._lock:
            self._check_free(name)
            self._loaded[name] = made
        logger.info("adapter %s: %d pairs, %d bytes", name, made.n_pairs, made.n_bytes)
        return made

    def _check_free(self, name: str) -> None:
        if name in self._loaded:
            raise ValueError(f"an adapter named {name!r} is loaded: unload it, or give name= another one")

    def _open(self, path: Path, name: str, scale: float, region: Region | None) -> Adapter:
        if not path.is_dir():
            native = NativeAdapter(self._model, path, name, region=region)
            return Adapter(native, name, path, scale, native.base, _zero(native.n_zero))
        from pydiffgguf.convert.adapter.gguf_adapter import to_gguf
        from pydiffgguf.convert.adapter.opening import read_adapter
        from pydiffgguf.convert.adapter.pairs import with_region
        from pydiffgguf.convert.adapter.peft import BaseShape

        config = self._model.config
        table = read_adapter(path, name=name, base=BaseShape(config.n_embd, config.n_ff_exp, config.n_expert))
        if region is not None:
            table = with_region(table, region)
        native = NativeAdapter(self._model, path, name, data=b"".join(to_gguf(table).pieces()))
        for note in table.notes:
            logger.warning("%s: %s", name, note)
            if "vision" in note:
                warnings.warn(f"{name}: {note}", stacklevel=5)
        return Adapter(native, name, path, scale, table.base, (*table.notes, *_zero(table.n_zero)))

    def unload(self, name: str) -> None:
        """Forgets an adapter; calls under way keep it. ValueError for a name that is not loaded."""
        with self._lock:
            self._known(name)
            del self._loaded[name]

    def clear(self) -> None:
        with self._lock:
            self._loaded.clear()

    def _known(self, name: str) -> Adapter:
        found = self._loaded.get(name)
        if found is None:
            loaded = ", ".join(map(repr, self._loaded)) or "none"
            raise ValueError(f"no adapter is named {name!r}: loaded are {loaded}")
        return found

    def choose(self, lora: Mapping[str, float] | None = None) -> Chosen:
        """What a call runs. None: all that are loaded, each at its own scale; else what is named, and nothing else.

        Raises TypeError for anything but a mapping, ValueError for an unknown name or a scale that is not finite.
        """
        if lora is not None and not isinstance(lora, Mapping):
            raise TypeError(f"lora must be a dict of names and scales, but is {lora!r:.60}")
        if lora is None and not self._loaded:
            return NONE
        with self._lock:
            if lora is None:
                scales = {name: adapter.scale for name, adapter in self._loaded.items()}
            else:
                scales = {name: check_scale(f"the scale of {name!r}", scale) for name, scale in lora.items()}
                for name in scales:
                    self._known(name)
            wanted = {name: scales[name] for name in self._loaded if scales.get(name)}
            pairs = tuple((self._loaded[name]._native, scale) for name, scale in wanted.items())
        return Chosen(pairs, encoder_key(pairs), wanted) if pairs else NONE


def _zero(n: int) -> tuple[str, ...]:
    return (f"{n} pairs do nothing: their product is zero",) if n else ()


def split_source(source: object) -> tuple[StrPath, float]:
    """(path, scale) of an entry of a list of adapters."""
    if isinstance(source, tuple):
        if len(source) != 2:
            raise ValueError(f"an adapter is a path, or (path, scale), but is {source!r:.80}")
        return source[0], check_scale("an adapter's scale", source[1])
    return source, 1.0  # type: ignore[return-value]  # what is no path is refused where it is opened


def find(source: StrPath, name: str | None = None, scale: float = 1.0) -> Found:
    """The adapter that a caller names; one on a hub is downloaded when it is not in the cache."""
    from pydiffgguf.convert.adapter.opening import adapter_name
    from pydiffgguf.hub import resolve_adapter

    check_scale("scale", scale)
    if name == "":
        raise ValueError("name is empty")
    path, default = resolve_adapter(source)
    return Found(path, name or default or adapter_name(path), scale)


def find_all(sources: Sequence[AdapterSource]) -> list[Found]:
    """The adapters of the constructor's argument, in order."""
    if isinstance(sources, (str, bytes)) or not isinstance(sources, Sequence):
        raise TypeError("lora must be a list of paths, or of (path, scale)")
    return [find(path, None, scale) for path, scale in map(split_source, sources)]


def bytes_of(found: Sequence[Found]) -> int:
    """What they will take in memory at most, by their headers."""
    if not found:
        return 0  # without the converter's imports
    from pydiffgguf.convert.adapter.opening import bytes_in_memory

    return sum(bytes_in_memory(adapter.path) for adapter in found)
