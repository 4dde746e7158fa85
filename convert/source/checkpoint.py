"""A checkpoint folder, opened lazily: config, sampler values, tokenizer files, and the tensors of the text model.

`save_pretrained` of transformers 5.23 writes one name of each tied pair: the decoder's weights, and of the encoder only
the vision part and the layer scalars. Other writers keep the copies, or the encoder's names alone; the reference reads
these too as long as the copies are equal, and so does this reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from pydiffgguf.errors import ModelFormatError, UnsupportedError

from ..names import DECODER, EMBEDDING, ENCODER, GLOBAL_TENSORS, HEAD, SAMPLER_KEYS, Tensor, layer_name, layer_tensors
from ..quantize import decode
from ..recipes import F32, ModelFacts, model_facts
from .config import CheckpointConfig, Reader, parse_config, read_json
from .pieces import Piece, Span, spans
from .shards import DTYPES, ITEM_SIZE, Shard, StoredTensor

Bytes = npt.NDArray[np.uint8]

SINGLE = "model.safetensors"
INFILL_MODES = ("raw", "chat")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor to convert: its name in the GGUF, its rule, its row-major shape, and the checkpoint's name for it.

    `copies`: other names under which a tied copy stands; `source` is empty for a computed tensor (rope_freqs).
    """

    name: str
    rule: Tensor
    shape: tuple[int, ...]
    source: str
    copies: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """For messages."""
        return f"tensor '{self.source or self.name}'"


class Checkpoint:
    """An open checkpoint folder. Use it as a context manager, or call close().

    `config`: the figures. `sampler`: GGUF key -> value for the sampler values that generation_config.json holds.
    `infill_mode`: ours, of config.json: "raw" or "chat", the form in which the model was trained to fill gaps, or None.
    `eos_ids`: its list of end tokens, empty when it has none. `tensors`: what to convert, in the GGUF's order.
    """

    def __init__(self, path: Path) -> None:
        """Opens `path` and checks config, shards, names, dtypes and shapes, without reading any weight.

        FileNotFoundError or NotADirectoryError when there is no such folder; ModelFormatError, with file and key or
        tensor, for what is missing or broken; UnsupportedError for variants that are not computed here.
        """
        if not path.is_dir():
            if not path.exists():
                raise FileNotFoundError(2, "no such checkpoint folder", str(path))
            raise NotADirectoryError(20, "not a checkpoint folder", str(path))
        config_path = path / "config.json"
        if not config_path.is_file():
            raise ModelFormatError(f"{path}: no config.json: not a checkpoint folder")
        self.path = path
        config = Reader(str(config_path), read_json(config_path))
        self.config: CheckpointConfig = parse_config(config.values, config.where)
        self.infill_mode = config.choice("infill_mode", INFILL_MODES)
        self.sampler, self.eos_ids = read_generation_config(path / "generation_config.json", self.config.vocab_size)
        self.shards: dict[str, Shard] = {}
        try:
            self.files = self._find_files()
            self.tensors = [self._resolve(*wanted) for wanted in wanted_tensors(self.config)]
        except BaseException:
            self.close()
            raise

    def facts(self) -> ModelFacts:
        """What recipes go by."""
        c = self.config
        return model_facts(len(c.layers), c.experts, c.heads, c.layers[0].kv_heads, (t.name for t in self.tensors))

    def close(self) -> None:
        for shard in self.shards.values():
            shard.close()
        self.shards.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _find_files(self) -> dict[str, str]:
        """Tensor name -> file name, from the one file's header or from the index."""
        if (self.path / SINGLE).is_file():
            return dict.fromkeys(self._shard(SINGLE).tensors, SINGLE)
        index_path = self.path / INDEX
        if not index_path.is_file():
            raise ModelFormatError(f"{self.path}: neither {SINGLE} nor {INDEX} is there")
        files = Reader(str(index_path), read_json(index_path)).mapping("weight_map")
        for name, file in files.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ModelFormatError(f"{index_path}: tensor '{name:.100}': {file!r:.60} is not a file name")
        return files

    def _shard(self, file: str) -> Shard:
        if file not in self.shards:
            path = self.path / file
            if not path.is_file():
                count = sum(1 for f in self.files.values() if f == file)
                raise ModelFormatError(f"{path}: the shard is missing; {INDEX} expects {count} tensors in it")
            self.shards[file] = Shard(path)
        return self.shards[file]

    def _resolve(
        self, name: str, rule: Tensor, shape: tuple[int, ...], candidates: tuple[str, ...]
    ) -> CheckpointTensor:
        """Finds the checkpoint's name for a wanted tensor, and checks dtype and shape of it and of its copies."""
        if not candidates:
            return CheckpointTensor(name, rule, shape, "")
        found = [c for c in candidates if c in self.files]
        if not found:
            raise ModelFormatError(f"{self.path}: tensor '{candidates[0]}' is missing")
        for source in found:
            stored = self.stored(source)
            where = f"{self.path / self.files[source]}: tensor '{source}'"
            if stored.dtype not in ITEM_SIZE:
                raise ModelFormatError(f"{where}: expected dtype {', '.join(ITEM_SIZE)}, got {stored.dtype}")
            # A scalar may be stored without its one dimension.
            if stored.shape != shape and not (shape == (1,) and stored.shape == ()):
                raise ModelFormatError(f"{where}: expected shape {list(shape)}, got {list(stored.shape)}")
        return CheckpointTensor(name, rule, shape, found[0], tuple(found[1:]))

    def stored(self, source: str) -> StoredTensor:
        """The header entry of the checkpoint's tensor `source`."""
        shard = self._shard(self.files[source])
        if source not in shard.tensors:
            raise ModelFormatError(f"{shard.path}: tensor '{source}' is missing, though {INDEX} puts it there")
        return shard.tensors[source]

    def pieces(self, index: int) -> Iterator[Piece]:
        """The `index`-th of `tensors`, in order. UnsupportedError when a tied copy differs (the reference unties)."""
        tensor = self.tensors[index]
        if not tensor.source:
            yield Piece(F32, rope_freqs(self.config).view(np.uint8))
            return
        for span in spans(tensor.shape):
            kind, data = self._read(tensor, tensor.source, span)
            for name in tensor.copies:
                other, copy = self._read(tensor, name, span)
                row = tensor.shape[-1]
                same = np.array_equal(data, copy) or np.array_equal(
                    decode(data, kind, row, tensor.origin), decode(copy, other, row, f"tensor '{name}'")
                )
                if not same:
                    raise UnsupportedError(
                        f"{self.path}: '{name}' differs from '{tensor.source}': untied weights are not supported"
                    )
            yield Piece(kind, data, span.matrix)

    def _read(self, tensor: CheckpointTensor, source: str, span: Span) -> tuple[GGMLQuantizationType, Bytes]:
        stored = self.stored(source)
        row = tensor.shape[-1] * ITEM_SIZE[stored.dtype]
        return DTYPES[stored.dtype], self._shard(self.files[source]).read(stored, span.first * row, span.count * row)


def wanted_tensors(config: CheckpointConfig) -> Iterator[tuple[str, Tensor, tuple[int, ...], tuple[str, ...]]]:
    """(GGUF name, rule, row-major shape, the checkpoint's possible names), in the GGUF's order; no names: computed."""
    for rule in GLOBAL_TENSORS:
        names: tuple[str, ...] = (DECODER + rule.source,) if rule.source else ()
        if names and not rule.source.startswith("self_conditioning."):  # which only the decoder has
            names += (ENCODER + rule.source,)
        if rule.source == EMBEDDING:
            names += (HEAD,)
        yield rule.name, rule, shape_of(rule, config.dims()), names
    for i, layer in enumerate(config.layers):
        dims = config.dims(i)
        for rule in layer_tensors(layer.sliding):
            # The scalars are the one thing of a layer that the modes do not share.
            places = (ENCODER,) if rule.encoder_only else (DECODER,) if rule.kind == "scalar" else (DECODER, ENCODER)
            names = tuple(f"{place}layers.{i}.{rule.source}" for place in places)
            yield layer_name(i, rule.name), rule, shape_of(rule, dims), names


def shape_of(rule: Tensor, dims: dict[str, int]) -> tuple[int, ...]:
    """The rule's row-major shape in numbers."""
    return tuple(dims[d] for d in rule.dims)


def rope_freqs(config: CheckpointConfig) -> npt.NDArray[np.float32]:
    """The divisors of the full layers' frequencies, [full head_dim / 2]: 1 where a pair rotates, 1e30 where it does
    not (its angle is then 0 at every position)."""
    values = np.full(config.full.head_dim // 2, 1e30, dtype=np.float32)
    values[: config.rotating_pairs] = 1.0
    return values


def read_generation_config(path: Path, vocab_size: int) -> tuple[dict[str, int | float], list[int]]:
    """(sampler values by GGUF key, end token ids) of generation_config.json; both empty when there is no such file.

    Values that are null are left out. The names are those of the reference's DiffusionGemmaGenerationConfig.
    """
    if not path.is_file():
        return {}, []
    config = read_json(path)
    reader = Reader(str(path), config)
    if reader.present("sampler_config"):
        sampler_config = reader.mapping("sampler_config")
        kind = sampler_config.get("_cls_name", "EntropyBoundSamplerConfig")
        if kind != "EntropyBoundSamplerConfig":
            raise UnsupportedError(f"{reader.name('sampler_config')}: only the entropy bound sampler, got {kind!r:.60}")
    else:
        sampler_config = {}
    merged: dict[str, Any] = {**config, "entropy_bound": sampler_config.get("entropy_bound")}
    values = Reader(str(path), merged)
    sampler: dict[str, int | float] = {}
    for key, name in SAMPLER_KEYS.items():
        if not values.present(name):
            continue
        if name == "max_denoising_steps":
            sampler[key] = values.integer(name)
        elif name == "stability_threshold":
            sampler[key] = values.integer(name, low=0)
        else:
            sampler[key] = values.real(name, positive=name == "confidence_threshold")
    return sampler, read_eos(reader, vocab_size)


def read_eos(reader: Reader, vocab_size: int) -> list[int]:
    """`eos_token_id`, which is one id, a list of ids, or null."""
    value = reader.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise ModelFormatError(
                f"{reader.name('eos_token_id')}: expected ids from 0 to {vocab_size - 1}, got {i!r:.60}"
            )
    return list(dict.fromkeys(ids))
