"""`convert`: a checkpoint, or another GGUF file, as a GGUF file in the types of a recipe."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydiffgguf._arguments import int32

from .adapter.opening import convert_adapter, is_adapter_source
from .imatrix import Importance
from .output import whole_or_nothing
from .recipes import FLOAT_TYPES, Override, Recipe, TypeRules, recipe
from .source.checkpoint import Checkpoint
from .source.hf_to_gguf import QUANTIZATION_VERSION, metadata
from .source.pieces import Source
from .source.requantize import GgufSource
from .source.vocabulary import read_vocabulary
from .writing import (
    ConversionReport,
    ConvertProgress,
    Keys,
    header_writer,
    padded,
    plan_tensors,
    write_header,
    write_tensors,
)


def convert(
    src: str | Path,
    out: str | Path,
    *,
    type: str | None = None,
    tensor_types: Iterable[str] = (),
    imatrix: str | Path | None = None,
    name: str | None = None,
    allow_missing_tokenizer: bool = False,
    threads: int = 0,
    region: str | None = None,
    base: str | Path | None = None,
    progress: Callable[[ConvertProgress], None] | None = None,
) -> ConversionReport:
    """Converts `src` into the GGUF `out`: a checkpoint folder (config.json, safetensors, tokenizer files), or a GGUF
    file, whose keys are kept and whose tensors get other types; or a PEFT adapter's folder (docs/ADAPTERS.md).

    `type`: a recipe of docs/QUANTIZATION.md, "q8_0" by default; of an adapter "f32", "f16", "bf16" or "q8_0", by
    default what its factors are stored in. Those that llama.cpp has too give the types that it gives, tensor by tensor;
    "dg4" is ours. 1-D tensors, norms and the router stay F32. A tensor whose rows do not divide into a type's blocks
    gets the type that llama.cpp falls back to (see `fallbacks` of the report).
    `tensor_types`: "PATTERN=TYPE", a regular expression searched for in tensor names and the ggml type they get
    instead; the first that matches counts, one that meets no tensor is an error. `imatrix`: an importance matrix, of
    `pydiffgguf imatrix` or of llama.cpp's tool in its GGUF format. `name`: general.name, by default the folder's name,
    or what the GGUF has. `allow_missing_tokenizer`: a folder without tokenizer.json gives a file without the tokenizer
    keys instead of an error. `region`, `base`: of adapters alone, as in
    `convert_adapter`. `threads` 0: all cores. `progress` is called often; what it raises ends the conversion.

    The same input gives the same bytes, for any number of threads. Memory does not grow with the model. `out` appears
    only when it is whole; whatever ends the conversion early, Ctrl-C included, leaves an old `out` as it was and no
    partial file. A source that was quantized already is warned of (UserWarning): what its types lost stays lost.

    Raises ValueError for an unknown type or a pattern without a tensor, OSError for files that cannot be read or
    written (no room on the disk: errno ENOSPC), ModelFormatError for a broken source or importance matrix and
    UnsupportedError for a source of another kind, or a type that cannot be made of it.
    """
    src, out = Path(src), Path(out)
    if is_adapter_source(src):
        if list(tensor_types) or imatrix is not None or allow_missing_tokenizer:
            raise ValueError("tensor_types, imatrix and allow_missing_tokenizer are for models, and this is an adapter")
        model = None if base is None else Path(base)
        return convert_adapter(src, out, type=type, region=region, name=name, base=model)
    if region is not None or base is not None:
        raise ValueError("region and base are for adapters, and this is none")
    wanted = recipe(type or "q8_0")
    overrides = [Override.parse(text) for text in tensor_types]
    int32("threads", threads)
    importance = None if imatrix is None else Importance.load(Path(imatrix))

    def write(source: Source, keys: Keys, notes: list[str]) -> ConversionReport:
        rules = TypeRules(wanted, source.facts(), overrides, importance is not None)
        started = time.monotonic()
        if importance:
            for tensor in source.tensors:
                importance.check(tensor.name, tensor.shape)
        plan, fallbacks = plan_tensors(source, rules)
        writer = header_writer(plan, keys)
        with whole_or_nothing(out, sum(padded(p.n_bytes) for p in plan) + keys.size()) as file:
            file.append_by(lambda part: write_header(writer, keys, part))
            write_tensors(file, source, plan, importance, threads, progress)
            n_bytes = file.tell()
        if importance:
            without = sum(p.kind not in FLOAT_TYPES and p.tensor.name not in importance.used for p in plan)
            if without:
                notes = [*notes, f"{importance.path.name} says nothing of {without} of the quantized tensors"]
        return ConversionReport(
            path=out,
            type=wanted.name,
            n_bytes=n_bytes,
            n_tensors=len(plan),
            types=dict(sorted(Counter(p.kind.name for p in plan).items())),
            fallbacks=tuple(fallbacks),
            notes=tuple(notes),
            seconds=time.monotonic() - started,
        )

    if src.is_dir() or not src.exists():
        with Checkpoint(src) as checkpoint:
            vocabulary = None
            if not allow_missing_tokenizer or (src / "tokenizer.json").exists():
                vocabulary = read_vocabulary(src, checkpoint.config.vocab_size)
            values = metadata(checkpoint, vocabulary, wanted, name or src.resolve().name)
            notes = list(vocabulary.notes) if vocabulary else ["no tokenizer: the file can only be used with token ids"]
            if not checkpoint.sampler:
                notes.append("no sampler values in generation_config.json: a reader will use its defaults")
            return write(checkpoint, Keys(values), notes)
    with GgufSource(src) as gguf_source:
        if gguf_source.quantized() and wanted.big not in FLOAT_TYPES:
            warnings.warn(
                f"{src} is quantized already ({gguf_source.quantized()}): the new types lose on top of that; "
                "a bf16 or f32 file, or the checkpoint, is the better source",
                stacklevel=2,
            )
        kept, n_kept = gguf_source.kept_keys(without={"general.name"} if name else set())
        return write(gguf_source, Keys(replaced(wanted, name), kept, n_kept), [])


def replaced(wanted: Recipe, name: str | None) -> dict[str, Any]:
    """The keys that a requantized file does not take from its source."""
    values: dict[str, Any] = {
        "general.file_type": int(wanted.file_type),
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    if name:
        values["general.name"] = name
    return values
