"""Records as the C library's structs, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pydiffgguf._arguments import MAX_SEED, float_array, id_array, int32, integer, real, words_array
from pydiffgguf._binding.library import copy_of, ffi, lib, pointer_to
from pydiffgguf._binding.records import CanvasSpec, Device, Mask, Memory, ModelConfig, Needs, RawStep, Sampling, Timings

KV_TYPES: dict[str, int] = {
    "f16": lib.DG_KV_F16,
    "f32": lib.DG_KV_F32,
    "bf16": lib.DG_KV_BF16,
    "q8_0": lib.DG_KV_Q8_0,
}
#: What makes the work on a step's logits, by the names that options have (dg_sampler in csrc/diffgguf.h).
SAMPLERS: dict[str, int] = {
    "auto": lib.DG_SAMPLER_AUTO,
    "host": lib.DG_SAMPLER_HOST,
    "operators": lib.DG_SAMPLER_OPERATORS,
    "kernels": lib.DG_SAMPLER_KERNELS,
}

SAMPLING_FIELDS = tuple(Sampling.__dataclass_fields__)
DEVICE_FIELDS = tuple(Device.__dataclass_fields__)
MEMORY_FIELDS = tuple(Memory.__dataclass_fields__)
TIMINGS_FIELDS = tuple(Timings.__dataclass_fields__)
NEEDS_FIELDS = tuple(name for name in Needs.__dataclass_fields__ if name != "cache")
#: Figures of a ModelConfig that a session's memory depends on, beside its layers.
FIGURES = (
    "n_embd",
    "n_vocab",
    "n_head",
    "n_ff",
    "n_ff_exp",
    "n_expert",
    "n_expert_used",
    "sliding_window",
    "canvas_length",
    "n_ctx_train",
)
CONFIG_FIELDS = tuple(name for name in ModelConfig.__dataclass_fields__ if name != "layers")


def fill_sampling(sampling: Sampling, out: Any) -> None:
    """Writes a Sampling into a dg_sampling."""
    for name in ("steps", "max_steps", "stability_threshold"):
        setattr(out, name, int32(name, getattr(sampling, name)))
    for name in ("t_min", "t_max", "entropy_bound", "confidence_threshold"):
        setattr(out, name, real(name, getattr(sampling, name)))


def placing_options(
    n_gpu_layers: int,
    n_cpu_moe: int,
    tensor_split: Sequence[float],
    main_gpu: int,
    offload_kv: bool,
    adapters: int = 0,
    signal_copy: bool = False,
) -> tuple[Any, object]:
    """A dg_model_options, and what must outlive its use."""
    options = ffi.new("dg_model_options *", lib.dg_model_options_default())
    options.n_gpu_layers = int32("n_gpu_layers", n_gpu_layers, low=-1)
    options.n_cpu_moe = int32("n_cpu_moe", n_cpu_moe)
    options.main_gpu = int32("main_gpu", main_gpu, low=-1)
    options.offload_kv = bool(offload_kv)
    options.adapters = integer("adapters", adapters, 0, 2**62)
    options.signal_copy = bool(signal_copy)
    split = ffi.new("float[]", [real("a part of tensor_split", part) for part in tensor_split])
    options.tensor_split, options.n_tensor_split = split, len(tensor_split)
    return options, split


def read_step(step: Any) -> RawStep:
    n: int = 0 if step.argmax == ffi.NULL else step.n_rows  # a quiet canvas
    return RawStep(
        argmax=copy_of(step.argmax, n, np.int32),
        canvas=copy_of(step.canvas, n, np.int32),
        accepted=copy_of(step.accepted, n, np.bool_),
        entropy=copy_of(step.entropy, n, np.float64),
        step=step.step,
        steps=step.steps,
        finished=step.finished,
        converged=step.converged,
        mean_entropy=step.mean_entropy,
        logprob=None if step.logprob == ffi.NULL else copy_of(step.logprob, n, np.float64),
    )


def fill_spec(spec: CanvasSpec, sampling: Sampling, canvas_length: int, out: Any) -> list[object]:
    """Writes a CanvasSpec into a dg_canvas_options; returns what must stay alive until C has copied it."""
    n = spec.rows(canvas_length)
    fill_sampling(sampling, out.sampling)
    out.seed = integer("seed", spec.seed, 0, MAX_SEED)
    out.canvas_index = integer("canvas_index", spec.canvas_index, 0, 2**32 - 1)
    out.n_rows = n
    out.quiet = bool(spec.quiet)
    kept: list[object] = []

    def array(name: str, value: npt.ArrayLike | None, length: int | None) -> Any:
        pointer = pointer_to("int32_t[]", None if value is None else id_array(name, value, length))
        kept.append(pointer)
        return pointer

    out.pinned = array("pinned", spec.pinned, n)
    out.canvas = array("canvas", spec.canvas, n)
    out.watched = array("watched", spec.watched, n)
    if spec.allowed:
        sets = {integer("a row of allowed", row, 0, n - 1): ids for row, ids in spec.allowed.items()}
        arrays = [id_array(f"allowed[{row}]", sets[row]) if row in sets else None for row in range(n)]
        for row, ids in enumerate(arrays):
            if ids is not None and not ids.size:
                raise ValueError(f"allowed[{row}] is empty: a row must be able to take some id")
        sizes = [0 if ids is None else ids.size for ids in arrays]
        out.allowed_ends = array("allowed", np.cumsum(sizes), n)
        out.allowed_ids = array("allowed", np.concatenate([ids for ids in arrays if ids is not None]), None)
    return kept


def canvas_rules(
    n_rows: int, n_vocab: int, pinned: npt.ArrayLike | None, masks: Mapping[int, Mask]
) -> tuple[Any, object]:
    """A dg_canvas_rules, and what must outlive its use. `masks`: by row, uint32 [ceil(n_vocab / 32)]; the same array
    for several rows travels once."""
    out = ffi.new("dg_canvas_rules *")
    pins = None if pinned is None else id_array("pinned", pinned, n_rows)
    different: dict[int, int] = {}
    arrays: list[Mask] = []
    of_row = np.full(n_rows, -1, dtype=np.int32)
    for row, mask in masks.items():
        if id(mask) not in different:
            different[id(mask)] = len(arrays)
            arrays.append(words_array(f"masks[{row}]", mask, -(-n_vocab // 32)))
        of_row[integer("a row of masks", row, 0, n_rows - 1)] = different[id(mask)]
    words = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.uint32)
    out.pinned = pointer_to("int32_t[]", pins)
    out.mask_of_row = pointer_to("int32_t[]", of_row)
    out.masks = pointer_to("uint32_t[]", words)
    out.n_masks = len(arrays)
    return out, (pins, of_row, words, out.pinned, out.mask_of_row, out.masks)


def session_options(
    n_ctx: int = 0,
    n_batch: int = 512,
    n_threads: int = 0,
    type_kv: str = "f16",
    n_rows: int = 0,
    ggml_operators: bool = False,
    sampler: str = "auto",
) -> Any:
    for name, value, known in (("type_kv", type_kv, KV_TYPES), ("sampler", sampler, SAMPLERS)):
        if value not in tuple(known):  # a tuple: what cannot be hashed is no key, and is told like any other value
            raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(map(repr, known))}")
    options = ffi.new("dg_session_options *", lib.dg_session_options_default())
    options.n_ctx = int32("n_ctx", n_ctx)
    options.n_batch = int32("n_batch", n_batch, low=1)
    options.n_threads = int32("n_threads", n_threads)
    options.type_kv = KV_TYPES[type_kv]
    options.n_rows = int32("n_rows", n_rows)
    options.ggml_operators = bool(ggml_operators)
    options.sampler = SAMPLERS[sampler]
    return options


def fill_noise(out: Any, uniform: npt.ArrayLike, renoise: npt.ArrayLike, n_rows: int) -> object:
    """Writes draws into a dg_noise; returns what must outlive its use."""
    u = float_array("uniform", uniform, np.float64, (n_rows,))
    ids = id_array("renoise", renoise, n_rows)
    out.uniform = pointer_to("double[]", u)
    out.renoise = pointer_to("int32_t[]", ids)
    return out.uniform, out.renoise
