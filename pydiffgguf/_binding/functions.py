"""What the C library does without a model or a session: placing layers, the sampler and its draws, quantizing rows,
serving devices, telling how it was built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pydiffgguf._arguments import MAX_SEED, float_array, id_array, int32, integer
from pydiffgguf._binding.library import call, ffi, fields_of, lib, pointer_to, text_of
from pydiffgguf._binding.records import (
    BuildInfo,
    CpuLevel,
    Float32Array,
    Float64Array,
    Int32Array,
    LayerConfig,
    LayerPlan,
    LocalDevice,
    Needs,
    RawSample,
    Sampling,
)
from pydiffgguf._binding.structs import (
    FIGURES,
    NEEDS_FIELDS,
    fill_noise,
    fill_sampling,
    placing_options,
    session_options,
)


def session_needs(
    figures: Mapping[str, int], layers: Sequence[LayerConfig], has_self_conditioning: bool, **options: Any
) -> Needs:
    """What a session with these options (NativeSession's) takes on devices, at most, of a model that need not be open.

    `figures`: FIGURES, and n_layer is the number of `layers`. Raises ContextOverflowError and UnsupportedError as
    NativeSession does, ValueError for options and for figures out of range.
    """
    config = ffi.new("dg_config *")
    for name in FIGURES:
        setattr(config, name, int32(name, figures[name]))
    config.n_layer, config.has_self_conditioning = len(layers), has_self_conditioning
    shapes = ffi.new("dg_layer_config[]", len(layers))
    for layer, out in zip(layers, shapes, strict=True):
        out.sliding = layer.sliding
        out.n_head_kv, out.head_dim = int32("n_head_kv", layer.n_head_kv), int32("head_dim", layer.head_dim)
    needs = ffi.new("dg_needs *")
    cache = ffi.new("size_t[]", len(layers))
    call(lib.dg_session_needs, config, shapes, session_options(**options), needs, cache)
    return Needs(**fields_of(needs, NEEDS_FIELDS), cache=tuple(cache))


def _size(n_bytes: int) -> int:
    return integer("a size in bytes", n_bytes, 0, 2**63 - 1)


def plan_layers(
    layers: Sequence[tuple[int, int]],
    head: int,
    needs: Needs,
    devices: Sequence[tuple[int, str]],
    *,
    n_gpu_layers: int = -1,
    n_cpu_moe: int = 0,
    tensor_split: Sequence[float] = (),
    main_gpu: int = -1,
    offload_kv: bool = True,
    adapters: int = 0,
) -> LayerPlan:
    """Where NativeModel puts layers: dg_plan_layers in csrc/diffgguf.h, which has the policy.

    `layers`: bytes of each without its experts, and of those; its cache is in `needs`. `head`: bytes of the embedding,
    and of its transposed copy (signal_copy) if there is to be one.
    `devices`: of each the bytes that it reports free and its RPC server, "" for this machine's; the main one last. The
    options are NativeModel's. Raises ValueError for options out of range.
    """
    sizes = ffi.new("dg_layer_bytes[]", len(layers))
    for out, (weights, experts), cache in zip(sizes, layers, needs.cache, strict=True):
        out.weights, out.experts, out.cache = _size(weights), _size(experts), _size(cache)
    all_needs = ffi.new("dg_needs *", {name: getattr(needs, name) for name in NEEDS_FIELDS})
    given = ffi.new("dg_device[]", len(devices))
    endpoints = [ffi.new("char[]", endpoint.encode()) for _, endpoint in devices]
    for out, (free, _), text in zip(given, devices, endpoints, strict=True):
        out.memory_free, out.endpoint = _size(free), text
    options, _split = placing_options(n_gpu_layers, n_cpu_moe, tensor_split, main_gpu, offload_kv, adapters)
    plan = ffi.new("dg_plan *")
    device_of = ffi.new("int32_t[]", len(layers))
    n_layers, n_devices = len(layers), len(devices)
    call(lib.dg_plan_layers, sizes, n_layers, _size(head), all_needs, given, n_devices, options, plan, device_of)
    return LayerPlan(
        plan.n_gpu_layers, plan.n_cpu_moe, plan.reserve, tuple(None if i < 0 else int(i) for i in device_of)
    )


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError naming the option, its value and the range; TypeError for a value of the wrong type."""
    options = ffi.new("dg_sampling *")
    fill_sampling(sampling, options)
    call(lib.dg_sampling_check, options)


def sample(
    z: Float32Array,
    sampling: Sampling,
    *,
    step: int,
    uniform: npt.ArrayLike,
    renoise: npt.ArrayLike,
    pinned: npt.ArrayLike | None = None,
    ggml_operators: bool = False,
) -> RawSample:
    """The sampler alone on logits z float32 [C, V], softcapped, before temperature; `step` counts from 0.

    `uniform` float64 [C] in [0, 1), `renoise` [C] ids, `pinned` [C] ids with -1 where a row is free.
    `ggml_operators`: as the logits of a device are sampled.
    """
    z = float_array("z", z, np.float32, (None, None))
    n_rows, n_vocab = z.shape
    noise = ffi.new("dg_noise *")
    _keep_alive = fill_noise(noise, uniform, renoise, n_rows)
    pinned_ids = None if pinned is None else id_array("pinned", pinned, n_rows)
    options = ffi.new("dg_sampling *")
    fill_sampling(sampling, options)
    argmax, canvas = np.empty(n_rows, dtype=np.int32), np.empty(n_rows, dtype=np.int32)
    accepted, entropy = np.empty(n_rows, dtype=np.uint8), np.empty(n_rows, dtype=np.float64)
    call(
        lib.dg_sample,
        pointer_to("float[]", z),
        int32("the number of rows of z", n_rows, low=1),
        int32("the number of columns of z", n_vocab, low=1),
        options,
        int32("step", step),
        noise,
        pointer_to("int32_t[]", pinned_ids),
        bool(ggml_operators),
        pointer_to("int32_t[]", argmax),
        pointer_to("int32_t[]", canvas),
        pointer_to("uint8_t[]", accepted),
        pointer_to("double[]", entropy),
    )
    return RawSample(argmax, canvas, accepted.view(np.bool_), entropy)


def noise_canvas(seed: int, canvas_index: int, n_rows: int, n_vocab: int) -> Int32Array:
    """The first canvas that the loop draws for itself: int32 [n_rows] ids, a pure function of the arguments."""
    out = np.empty(int32("n_rows", n_rows), dtype=np.int32)
    key = _draw_key(seed, canvas_index)
    lib.dg_noise_canvas(*key, n_rows, int32("n_vocab", n_vocab, low=1), pointer_to("int32_t[]", out))
    return out


def noise_uniform(seed: int, canvas_index: int, step: int, n_rows: int) -> Float64Array:
    """The u of each row's draw in one step: float64 [n_rows] in [0, 1)."""
    out = np.empty(int32("n_rows", n_rows), dtype=np.float64)
    key = _draw_key(seed, canvas_index)
    lib.dg_noise_uniform(*key, integer("step", step, 0, 2**32 - 1), n_rows, pointer_to("double[]", out))
    return out


def noise_renoise(seed: int, canvas_index: int, step: int, n_rows: int, n_vocab: int) -> Int32Array:
    """The fresh ids for the rows that one step does not accept: int32 [n_rows]."""
    out = np.empty(int32("n_rows", n_rows), dtype=np.int32)
    key = (*_draw_key(seed, canvas_index), integer("step", step, 0, 2**32 - 1))
    lib.dg_noise_renoise(*key, n_rows, int32("n_vocab", n_vocab, low=1), pointer_to("int32_t[]", out))
    return out


def _draw_key(seed: int, canvas_index: int) -> tuple[int, int]:
    return integer("seed", seed, 0, MAX_SEED), integer("canvas_index", canvas_index, 0, 2**32 - 1)


def row_bytes(type_: int, row: int) -> int:
    """Bytes of a row of `row` elements in ggml type `type_`; 0 when there is no such type or the row does not divide
    into its blocks."""
    n: int = lib.dg_row_bytes(int32("type", type_), integer("row", row, 0, 2**31 - 1))
    return n


def quantize_rows(
    rows: npt.NDArray[Any],
    src_type: int,
    dst_type: int,
    row: int,
    *,
    importance: Float32Array | None = None,
    n_threads: int = 0,
) -> npt.NDArray[np.uint8]:
    """Rows of `row` weights from ggml type `src_type` to `dst_type`; uint8 [n_rows, bytes of a row].

    `rows`: a contiguous array whose bytes are whole rows. `importance` float32 [row], finite and not negative.
    ModelFormatError for NaN or infinity, UnsupportedError for values beyond the type's range and for types that ggml
    cannot write, ValueError for rows that do not divide.
    """
    data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    size = row_bytes(src_type, row)
    if size == 0 or data.size % size:
        raise ValueError(f"rows: {data.size} bytes are not whole rows of {row} elements in ggml type {src_type}")
    if importance is not None:
        importance = float_array("importance", importance, np.float32, (row,))
    out = np.empty((data.size // size, row_bytes(dst_type, row)), dtype=np.uint8)
    if out.shape[1] == 0:
        raise ValueError(f"rows of {row} elements do not divide into the blocks of ggml type {dst_type}")
    if out.size:
        call(
            lib.dg_quantize_rows,
            int32("src_type", src_type),
            pointer_to("char[]", data),
            int32("dst_type", dst_type),
            pointer_to("char[]", out),
            out.shape[0],
            row,
            pointer_to("float[]", importance),
            int32("n_threads", n_threads, low=0),
        )
    return out


def serve_rpc(endpoint: str, *, n_threads: int = 0) -> None:
    """dg_rpc_serve of csrc/diffgguf.h: serves, and does not return. Raises OSError when the port cannot be had."""
    call(lib.dg_rpc_serve, endpoint.encode(), int32("n_threads", n_threads))


def _local_device(device: Any) -> LocalDevice:
    return {
        "name": text_of(device.name),
        "memory_free": int(device.memory_free),
        "memory_total": int(device.memory_total),
    }


def memory_available() -> int | None:
    """Bytes of memory that this process may use without swapping; None where the system does not tell."""
    return lib.dg_memory_available() or None


def build_info() -> BuildInfo:
    return {
        "version": text_of(lib.dg_version()),
        "abi": lib.dg_abi_version(),
        "ggml_version": text_of(lib.dg_ggml_version()),
        "compiler": text_of(lib.dg_compiler()),
        "flags": text_of(lib.dg_build_flags()).split(),
        "backends": [text_of(lib.dg_backend_name(i)) for i in range(lib.dg_n_backends())],
        "devices": [_local_device(lib.dg_local_device(i)) for i in range(lib.dg_n_devices())],
        "cpu_features": _words(text_of(lib.dg_cpu_features())),
        "cpu_levels": [_cpu_level(lib.dg_local_cpu_level(i)) for i in range(lib.dg_n_cpu_levels())],
    }


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _cpu_level(level: Any) -> CpuLevel:
    return {
        "name": text_of(level.name),
        "meaning": text_of(level.meaning),
        "compiled": level.compiled,
        "offered": level.offered,
        "lacks": _words(text_of(level.lacks)),
    }
