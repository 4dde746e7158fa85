"""A DiffusionGemma checkpoint as one GGUF file, tensor by tensor, a few MiB of weights in memory at a time."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from .checkpoint import Checkpoint, SourceTensor
from .names import ARCHITECTURE, KEYS, full_key
from .output import PartialFile, whole_or_nothing
from .quantize import Recipe, choose_type, encode, recipe, row_bytes
from .vocabulary import SCORE, Vocabulary, read_vocabulary

ALIGNMENT = 32  # bytes; GGUF's default, so that no key has to say it

# The version of ggml's quantized formats; 2 since 2023.
QUANTIZATION_VERSION = 2

VALUE_TYPES = {
    "str": GGUFValueType.STRING,
    "bool": GGUFValueType.BOOL,
    "u32": GGUFValueType.UINT32,
    "i32": GGUFValueType.INT32,
    "f32": GGUFValueType.FLOAT32,
}


@dataclass(frozen=True)
class ConvertProgress:
    """Handed to the progress callback before each tensor, and every few MiB within one.

    `index` counts from 0 to `count` (at the end, with an empty `tensor`); bytes are those of the output's tensor data;
    `elapsed_s` counts from the first byte.
    """

    tensor: str
    index: int
    count: int
    bytes_done: int
    bytes_total: int
    elapsed_s: float


@dataclass(frozen=True)
class Fallback:
    """A tensor whose rows do not divide into the wanted type's blocks: name, row length, wanted and written type."""

    tensor: str
    row: int
    wanted: str
    written: str


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote: `types` counts tensors by type; `notes` are things worth a look, one line each."""

    path: Path
    type: str
    n_bytes: int
    n_tensors: int
    types: dict[str, int]
    fallbacks: tuple[Fallback, ...]
    notes: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output: `n_bytes` without padding."""

    tensor: SourceTensor
    kind: GGMLQuantizationType
    n_bytes: int


def convert(
    src: str | Path,
    out: str | Path,
    *,
    type: str = "q8_0",
    name: str | None = None,
    allow_missing_tokenizer: bool = False,
    progress: Callable[[ConvertProgress], None] | None = None,
) -> ConversionReport:
    """Converts the checkpoint folder `src` (config.json, safetensors, tokenizer files) into the GGUF `out`.

    `type`: "f32", "f16", "bf16" or "q8_0", of the big tensors; 1-D tensors, norms and the router stay F32, and a tensor
    whose rows do not divide into blocks becomes F16 (see `fallbacks` of the report). `name`: general.name, by default
    the folder's name. `allow_missing_tokenizer`: a folder without tokenizer.json gives a file without the tokenizer
    keys instead of an error. `progress` is called often; what it raises ends the conversion.

    The same input gives the same bytes. `out` appears only when it is whole; whatever ends the conversion early, Ctrl-C
    included, leaves an old `out` as it was and no partial file. Raises ValueError for an unknown type, OSError for
    files that cannot be read or written (no room on the disk: errno ENOSPC), ModelFormatError for a broken checkpoint
    and UnsupportedError for one of another kind.
    """
    wanted = recipe(type)
    src, out = Path(src), Path(out)
    started = time.monotonic()
    with Checkpoint(src) as checkpoint:
        vocabulary = None
        if not allow_missing_tokenizer or (src / "tokenizer.json").exists():
            vocabulary = read_vocabulary(src, checkpoint.config.vocab_size)
        plan, fallbacks = plan_tensors(checkpoint, wanted)
        values = metadata(checkpoint, vocabulary, wanted, name or src.resolve().name)
        writer = header_writer(plan, values)
        # Names, keys and offsets come to about as much as the vocabulary's text; the check for room need be no closer.
        headers = 1_000_000 + sum(len(v) * 40 for v in values.values() if isinstance(v, list))
        with whole_or_nothing(out, sum(padded(p.n_bytes) for p in plan) + headers) as file:
            file.append_by(lambda part: write_header(writer, part))
            write_tensors(file, checkpoint, plan, progress)
            n_bytes = file.tell()

    notes = list(vocabulary.notes) if vocabulary else ["no tokenizer: the file can only be used with token ids"]
    if not checkpoint.sampler:
        notes.append("no sampler values in generation_config.json: a reader will use its defaults")
    return ConversionReport(
        path=out,
        type=type,
        n_bytes=n_bytes,
        n_tensors=len(plan),
        types=dict(sorted(Counter(p.kind.name for p in plan).items())),
        fallbacks=tuple(fallbacks),
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )


def plan_tensors(checkpoint: Checkpoint, wanted: Recipe) -> tuple[list[PlannedTensor], list[Fallback]]:
    """The type and size of every tensor of the output, in order."""
    plan = []
    fallbacks = []
    for tensor in checkpoint.tensors:
        kind, fell_back = choose_type(tensor.rule, tensor.shape, wanted)
        row = tensor.shape[-1]
        plan.append(PlannedTensor(tensor, kind, tensor.n_elements // row * row_bytes(row, kind)))
        if fell_back:
            fallbacks.append(Fallback(tensor.name, row, wanted.big.name, kind.name))
    return plan, fallbacks


def metadata(checkpoint: Checkpoint, vocabulary: Vocabulary | None, wanted: Recipe, name: str) -> dict[str, Any]:
    """GGUF key, as in names.KEYS -> value; but for general.size_label, which needs the tensors counted."""
    c = checkpoint.config
    values: dict[str, Any] = {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        # A folder's name may hold bytes that are no text.
        "general.name": name.encode("utf-8", errors="replace").decode("utf-8"),
        "general.file_type": int(wanted.file_type),
        "general.quantization_version": QUANTIZATION_VERSION,
        ".block_count": len(c.layers),
        ".context_length": c.context_length,
        ".embedding_length": c.hidden_size,
        ".feed_forward_length": c.ffn_size,
        ".attention.head_count": c.heads,
        ".attention.head_count_kv": [layer.kv_heads for layer in c.layers],
        ".attention.key_length": c.full.head_dim,
        ".attention.value_length": c.full.head_dim,
        ".attention.key_length_swa": c.sliding.head_dim,
        ".attention.value_length_swa": c.sliding.head_dim,
        ".attention.sliding_window": c.sliding_window,
        ".attention.sliding_window_pattern": [layer.sliding for layer in c.layers],
        ".attention.shared_kv_layers": 0,
        ".embedding_length_per_layer_input": 0,
        ".attention.layer_norm_rms_epsilon": c.rms_eps,
        ".attention.causal": False,
        ".rope.freq_base": c.rope_base,
        ".rope.freq_base_swa": c.rope_base_sliding,
        ".rope.dimension_count": c.full.head_dim,
        ".rope.dimension_count_swa": c.sliding.head_dim,
        ".expert_count": c.experts,
        ".expert_used_count": c.experts_used,
        ".expert_feed_forward_length": c.expert_ffn_size,
        ".final_logit_softcapping": c.softcap,
        "diffusion.canvas_length": c.canvas_length,
        **checkpoint.sampler,
    }
    # A reader finds the end tokens by their text, so the list is worth a key only where it says something else.
    by_text = vocabulary.end_ids() if vocabulary else set()
    if checkpoint.eos_ids and set(checkpoint.eos_ids) != by_text:
        values["diffusion.eos_token_ids"] = checkpoint.eos_ids
    if checkpoint.infill_mode:
        values["diffusion.infill_mode"] = checkpoint.infill_mode
    if vocabulary:
        values |= {
            "tokenizer.ggml.model": "gemma4",
            "tokenizer.ggml.tokens": vocabulary.tokens,
            "tokenizer.ggml.scores": [SCORE] * len(vocabulary.tokens),
            "tokenizer.ggml.token_type": vocabulary.types,
            "tokenizer.ggml.merges": vocabulary.merges,
            **vocabulary.special_ids,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_space_prefix": False,
        }
        if vocabulary.chat_template:
            values["tokenizer.chat_template"] = vocabulary.chat_template
    return values


def header_writer(plan: list[PlannedTensor], values: dict[str, Any]) -> gguf.GGUFWriter:
    """A writer that knows every key and tensor, and holds none of the tensors' data."""
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    for p in plan:
        writer.add_tensor_info(p.tensor.name, p.tensor.shape, np.dtype(np.float32), p.n_bytes, raw_dtype=p.kind)
    values = {**values, "general.size_label": gguf.size_label(*writer.get_total_parameter_count())}
    for key, kind in KEYS.items():
        if key == "general.architecture" or values.get(key) in (None, []):  # the writer adds the first itself
            continue
        element = VALUE_TYPES[kind.removeprefix("arr[").removesuffix("]")]
        if kind.startswith("arr["):
            writer.add_key_value(full_key(key), values[key], GGUFValueType.ARRAY, sub_type=element)
        else:
            writer.add_key_value(full_key(key), values[key], element)
    return writer


def write_tensors(
    file: PartialFile,
    checkpoint: Checkpoint,
    plan: list[PlannedTensor],
    progress: Callable[[ConvertProgress], None] | None,
) -> None:
    """Appends the tensors' data in order, each padded to the alignment."""
    pad(file)
    started = time.monotonic()
    bytes_total = sum(padded(p.n_bytes) for p in plan)
    bytes_done = 0

    def report(tensor: str, index: int) -> None:
        if progress:
            elapsed = time.monotonic() - started
            progress(ConvertProgress(tensor, index, len(plan), bytes_done, bytes_total, elapsed))

    for i, p in enumerate(plan):
        report(p.tensor.name, i)
        for rows in checkpoint.rows(p.tensor):
            data = encode(rows, p.kind, p.tensor.name)
            file.append(data.data.cast("B"))
            bytes_done += data.nbytes
            report(p.tensor.name, i)
        bytes_done += pad(file)
    report("", len(plan))


def write_header(writer: gguf.GGUFWriter, path: Path) -> None:
    """Header, keys and tensor infos, through gguf's writer."""
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
    except BaseException:
        with contextlib.suppress(OSError):  # closing flushes, and fails once more on a full disk
            writer.close()
        raise


def padded(n: int) -> int:
    """`n` bytes, rounded up to the alignment."""
    return -(-n // ALIGNMENT) * ALIGNMENT


def pad(file: PartialFile) -> int:
    """Fills up to the alignment; returns how many bytes that took."""
    at = file.tell()
    file.append(memoryview(bytes(padded(at) - at)))
    return padded(at) - at
