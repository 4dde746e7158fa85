"""The nouns of csrc/diffgguf.h, one class each: a model and a session.

No text, no sampling policy, no defaults that the header or the file does not give. ids are int32 arrays, logits float32
arrays ``[n_rows, V]`` with V the vocabulary size and at most C rows, the canvas length.

Threads. cffi's wrappers release the GIL around every call, so a method may meet another thread inside the same object.
Each method therefore takes the C pointer into a local variable first: ``close()`` only drops the object's own
reference, and the memory is freed when the last call that uses it has returned. Two computing calls on one session are
told apart in C: the second raises SessionBusyError.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pydiffgguf import errors
from pydiffgguf._arguments import float_array, id_array, int32, integer
from pydiffgguf._binding.file import Metadata, read_tensors
from pydiffgguf._binding.library import (
    Stop,
    StrPath,
    call,
    check_readable,
    encode_path,
    ffi,
    fields_of,
    lib,
    pointer_to,
    text_of,
)
from pydiffgguf._binding.records import (
    CanvasSpec,
    Device,
    Float32Array,
    Float64Array,
    Int32Array,
    LayerConfig,
    Mask,
    Memory,
    ModelConfig,
    RawStep,
    Sampling,
    TensorInfo,
    Timings,
)
from pydiffgguf._binding.structs import (
    CONFIG_FIELDS,
    DEVICE_FIELDS,
    MEMORY_FIELDS,
    SAMPLERS,
    SAMPLING_FIELDS,
    TIMINGS_FIELDS,
    canvas_rules,
    fill_noise,
    fill_spec,
    placing_options,
    read_step,
    session_options,
)


class NativeModel:
    """An opened GGUF file: immutable, shareable between threads and sessions.

    `use_mmap` maps the file instead of reading it into memory. `cpu` names the level of instructions that the CPU's own
    operators use ("": the best). The other options say where the model lies: those of
    dg_model_options in csrc/diffgguf.h. `expected`: options of the NativeSession that "as many as fit" makes room for.

    Raises OSError (FileNotFoundError, IsADirectoryError, PermissionError where it is one of them; also for an RPC
    server that does not answer), ModelFormatError, UnsupportedError or OutOfMemoryError; ValueError or TypeError for
    bad options.
    """

    def __init__(
        self,
        path: StrPath,
        *,
        use_mmap: bool = True,
        cpu: str = "",
        n_gpu_layers: int = 0,
        n_cpu_moe: int = 0,
        tensor_split: Sequence[float] = (),
        main_gpu: int = -1,
        offload_kv: bool = True,
        adapters: int = 0,
        signal_copy: bool = False,
        rpc: Sequence[str] = (),
        expected: Mapping[str, Any] | None = None,
    ) -> None:
        options, _split = placing_options(
            n_gpu_layers, n_cpu_moe, tensor_split, main_gpu, offload_kv, adapters, signal_copy
        )
        options.use_mmap = bool(use_mmap)
        level = ffi.new("char[]", cpu.encode())
        options.cpu = level
        if isinstance(rpc, str):
            raise TypeError('rpc is a string: it must be a list of "host:port"')
        servers = [ffi.new("char[]", server.encode()) for server in rpc]
        endpoints = ffi.new("const char *[]", servers)
        options.rpc, options.n_rpc = endpoints, len(servers)
        options.expected = session_options(**(expected or {}))[0]
        encoded = encode_path(path)
        check_readable(path)
        self.name = os.path.basename(os.fspath(path))
        out = ffi.new("dg_model **")
        call(lib.dg_model_open, out, encoded, options)
        pointer = ffi.gc(out[0], lib.dg_model_free)
        self._pointer: Any = pointer
        config = lib.dg_model_config(pointer)
        layers = (lib.dg_model_layer(pointer, i) for i in range(config.n_layer))
        self.config = ModelConfig(
            **fields_of(config, CONFIG_FIELDS),
            layers=tuple(LayerConfig(layer.sliding, layer.n_head_kv, layer.head_dim) for layer in layers),
        )
        self.sampling = Sampling(**fields_of(lib.dg_model_sampling(pointer), SAMPLING_FIELDS))
        self.cpu = text_of(lib.dg_model_cpu_level(pointer))
        self.warnings = [text_of(lib.dg_model_warning(pointer, i)) for i in range(lib.dg_model_n_warnings(pointer))]
        self._metadata: Metadata | None = Metadata(lib.dg_model_file(pointer), pointer)

    @property
    def closed(self) -> bool:
        return self._pointer is None

    def close(self) -> None:
        """Lets go of the file, which is freed as soon as no session uses it. Idempotent."""
        metadata = self._metadata
        if metadata is not None:
            metadata.close()
        self._pointer = self._metadata = None

    @property
    def metadata(self) -> Metadata:
        metadata = self._metadata
        if metadata is None:
            raise errors.ModelClosedError(f"{self.name} is closed")
        return metadata

    def _open_pointer(self) -> Any:
        pointer = self._pointer
        if pointer is None:
            raise errors.ModelClosedError(f"{self.name} is closed")
        return pointer

    def tensors(self) -> list[TensorInfo]:
        """All tensors of the file, in its order, also those that are not used."""
        pointer = self._open_pointer()
        return [
            TensorInfo(**fields, kernel=text_of(lib.dg_model_kernel(pointer, info.type)))
            for fields, info in read_tensors(lib.dg_model_file(pointer))
        ]

    def devices(self) -> list[Device]:
        """The devices that the model may lie on, in the order in which a pass goes through them."""
        pointer = self._open_pointer()
        infos = (lib.dg_model_device(pointer, i) for i in range(lib.dg_model_n_devices(pointer)))
        return [
            Device(**{**fields_of(info, DEVICE_FIELDS), "name": text_of(info.name), "endpoint": text_of(info.endpoint)})
            for info in infos
        ]

    def n_ctx(self, **options: Any) -> int:
        """The n_ctx of a session with these options: what 0 comes to."""
        out = ffi.new("int32_t *")
        call(lib.dg_model_n_ctx, self._open_pointer(), session_options(**options), out)
        return int(out[0])

    def memory(self, **options: Any) -> Memory:
        """What a session with these options (NativeSession's) would take, without making one. Raises what NativeSession
        raises."""
        out = ffi.new("dg_memory *")
        call(lib.dg_model_memory, self._open_pointer(), session_options(**options), out)
        return Memory(**fields_of(out, MEMORY_FIELDS))


class NativeSession:
    """One timeline on a model: a prefix in the KV cache, and the canvases that are being denoised behind it.

    Options: `n_ctx` 0: the smaller of 8192 and the file's context length. `n_batch`: tokens per chunk of a prompt.
    `n_threads` 0: as many as this process may use at once. `type_kv`: a key of KV_TYPES. `n_rows`: the most rows that
    canvases side by side may have together, 0 for C, which is the least. `ggml_operators`: compute with ggml's
    operators alone, as devices other than the CPU do. `sampler`: a key of SAMPLERS.

    The computing methods raise SessionBusyError when another thread is inside, CancelledError after cancel(), and what
    a signal handler raised (KeyboardInterrupt) when one ran meanwhile; what then holds stands at each call in
    csrc/diffgguf.h. After close(), all but close() and cancel() raise ModelClosedError.
    """

    def __init__(self, model: NativeModel, **options: Any) -> None:
        out = ffi.new("dg_session **")
        call(lib.dg_session_create, out, model._open_pointer(), session_options(**options))
        pointer = ffi.gc(out[0], lib.dg_session_free)
        self._stop = Stop()
        self._stop_handle = ffi.new_handle(self._stop)
        call(lib.dg_session_set_poll, pointer, lib.dg_python_poll, self._stop_handle)
        self._pointer: Any = pointer
        self._canvas_length = model.config.canvas_length
        self._n_vocab = model.config.n_vocab
        self.n_ctx: int = lib.dg_session_n_ctx(pointer)
        self.n_threads: int = lib.dg_session_n_threads(pointer)
        self.n_rows: int = lib.dg_session_n_rows(pointer)
        sampler = lib.dg_session_sampler(pointer)
        self.sampler: str = next(name for name, value in SAMPLERS.items() if value == sampler)
        self.fallbacks: list[str] = [
            text_of(lib.dg_session_fallback(pointer, i)) for i in range(lib.dg_session_n_fallbacks(pointer))
        ]
        self._rows: list[int] = []  # of each canvas under way

    @property
    def memory(self) -> Memory:
        """Bytes by kind, which adapters change."""
        return Memory(**fields_of(lib.dg_session_memory(self._open_pointer()), MEMORY_FIELDS))

    @property
    def closed(self) -> bool:
        return self._pointer is None

    def close(self) -> None:
        """Frees the cache and the buffers; a call under way on another thread is cancelled first. Idempotent."""
        self.cancel()
        self._pointer = None

    def profile(self, on: bool) -> None:
        """From here on operators run one at a time and are timed, from zero; or no longer."""
        call(lib.dg_session_profile, self._open_pointer(), bool(on))

    @property
    def timings(self) -> Timings:
        """What computing took since `profile(True)`, by part."""
        return Timings(**fields_of(lib.dg_session_timings(self._open_pointer()), TIMINGS_FIELDS))

    def _open_pointer(self) -> Any:
        pointer = self._pointer
        if pointer is None:
            raise errors.ModelClosedError("the session is closed")
        return pointer

    @property
    def n_past(self) -> int:
        """Positions in the cache."""
        return int(lib.dg_session_n_past(self._open_pointer()))

    def tokens(self) -> Int32Array:
        """The prefix: int32 [n_past]."""
        pointer = self._open_pointer()
        # Room for a whole context: another thread may encode between a look at n_past and the copy.
        ids: Int32Array = np.empty(self.n_ctx, dtype=np.int32)
        n_past: int = lib.dg_session_n_past(pointer)
        call(lib.dg_session_tokens, pointer, pointer_to("int32_t[]", ids), self.n_ctx)
        return np.array(ids[:n_past])

    def encode(self, ids: npt.ArrayLike) -> None:
        """Appends ids [n] to the prefix. Raises ContextOverflowError when they and one canvas pass n_ctx."""
        array = id_array("ids", ids)
        call(lib.dg_session_encode, self._begin(), pointer_to("int32_t[]", array), array.size)

    def truncate(self, n: int) -> None:
        """Cuts the prefix to its first `n` tokens, 0 to n_past."""
        call(lib.dg_session_truncate, self._open_pointer(), int32("n", n))

    def save(self, path: StrPath) -> None:
        """Writes the prefix, tokens and cache, to a file that appears only when it is whole."""
        call(lib.dg_session_save, self._open_pointer(), encode_path(path))

    def load(self, path: StrPath) -> None:
        """Replaces the prefix by a saved one of the same model and type_kv. A failed load leaves an empty prefix."""
        pointer, encoded = self._open_pointer(), encode_path(path)
        check_readable(path)
        call(lib.dg_session_load, pointer, encoded)

    def score(self, texts: Sequence[npt.ArrayLike]) -> list[Float64Array]:
        """Natural log of the probability of each token after the prefix and the tokens before it, for each text."""
        arrays = [id_array(f"texts[{i}]", text) for i, text in enumerate(texts)]
        if not arrays:
            return []
        lengths = np.array([array.size for array in arrays], dtype=np.int32)
        ids = np.concatenate(arrays)
        out = np.empty(ids.size, dtype=np.float64)
        call(
            lib.dg_session_score,
            self._begin(),
            pointer_to("int32_t[]", ids),
            pointer_to("int32_t[]", lengths),
            lengths.size,
            pointer_to("double[]", out),
        )
        return np.split(out, np.cumsum(lengths)[:-1])

    def collect(self, on: bool) -> None:
        """From here on passes add up the squares of what each matrix is multiplied by, from zero; or no longer."""
        call(lib.dg_session_collect, self._open_pointer(), bool(on))

    def importance(self, tensor: str, n_matrices: int, row: int) -> tuple[Float64Array, npt.NDArray[np.int64]]:
        """What `collect` has added up for a tensor of `n_matrices` matrices with rows of `row`: squares float64
        [n_matrices, row], and how many rows were summed, int64 [n_matrices]. ValueError while nothing is collected."""
        squares = np.empty((n_matrices, row), dtype=np.float64)
        counts = np.empty(n_matrices, dtype=np.int64)
        call(
            lib.dg_session_importance,
            self._open_pointer(),
            tensor.encode(),
            pointer_to("double[]", squares),
            pointer_to("int64_t[]", counts),
        )
        return squares, counts

    def denoise(
        self,
        canvas: npt.ArrayLike,
        self_conditioning: Float32Array | None = None,
        n_rows: int | None = None,
        rows: npt.ArrayLike | None = None,
    ) -> Float32Array:
        """One decoder pass: canvas [n_rows] ids -> logits float32 [n_rows, V], softcapped, before temperature.

        `n_rows`: 1 to C, None for C. `self_conditioning` float32 [n_rows, V]: the processed logits of the step before,
        None for a zero signal. `rows`: those whose logits are wanted, [len(rows), V] then. The prefix is read, not
        changed.
        """
        n = self._canvas_length if n_rows is None else integer("n_rows", n_rows, 1, self._canvas_length)
        ids = id_array("canvas", canvas, n)
        shape = (n, self._n_vocab)
        signal = None
        if self_conditioning is not None:
            signal = float_array("self_conditioning", self_conditioning, np.float32, shape)
        wanted = None if rows is None else id_array("rows", rows)
        n_out = n if wanted is None else wanted.size
        logits = np.empty((n_out, self._n_vocab), dtype=np.float32)
        call(
            lib.dg_session_denoise,
            self._open_pointer(),
            pointer_to("int32_t[]", ids),
            ids.size,
            pointer_to("float[]", signal),
            pointer_to("int32_t[]", wanted),
            n_out,
            pointer_to("float[]", logits),
        )
        return logits

    def canvas_begin(self, specs: Sequence[CanvasSpec], sampling: Sampling) -> None:
        """Starts canvases side by side after the prefix, which must hold at least one token."""
        options = ffi.new("dg_canvas_options[]", len(specs))
        kept = [fill_spec(spec, sampling, self._canvas_length, options[i]) for i, spec in enumerate(specs)]
        call(lib.dg_session_canvas_begin, self._open_pointer(), options, len(specs))
        del kept  # C has copied the arrays
        self._rows = [options[i].n_rows for i in range(len(specs))]

    def canvas_step(self, noise: Sequence[tuple[npt.ArrayLike, npt.ArrayLike] | None] | None = None) -> list[RawStep]:
        """One denoise step of every canvas that is not finished; after CancelledError it may be repeated.

        `noise`: for each canvas (uniform float64 [n_rows] in [0, 1), renoise [n_rows] ids) in place of the step's own
        draws; None for a canvas that is finished, or for all: the built-in draws.
        """
        pointer, rows = self._begin(), self._rows
        given, kept = ffi.NULL, []
        if noise is not None:
            given = ffi.new("dg_noise[]", len(rows))
            for i, (draws, n) in enumerate(zip(noise, rows, strict=True)):
                if draws is not None:
                    kept.append(fill_noise(given[i], *draws, n))
        out = ffi.new("dg_step[]", max(1, len(rows)))
        call(lib.dg_session_canvas_step, pointer, given, out)
        return [read_step(out[i]) for i in range(len(rows))]

    def canvas_rows(self, index: int) -> RawStep:
        """The last step of a canvas again, with its arrays even where it is quiet."""
        out = ffi.new("dg_step *")
        call(lib.dg_session_canvas_rows, self._open_pointer(), int32("index", index), out)
        return read_step(out)

    def canvas_rules(self, index: int, n_rows: int, pinned: npt.ArrayLike | None, masks: Mapping[int, Mask]) -> None:
        rules, kept = canvas_rules(n_rows, self._n_vocab, pinned, masks)
        call(lib.dg_session_canvas_rules, self._open_pointer(), int32("index", index), rules)
        del kept

    def canvas_narrow(self, index: int, n_rows: int) -> None:
        """Rows n_rows and after leave a canvas that goes on."""
        rows = integer("n_rows", n_rows, 1, self._canvas_length)
        call(lib.dg_session_canvas_narrow, self._open_pointer(), int32("index", index), rows)
        self._rows[index] = n_rows

    def canvas_drop(self, index: int) -> None:
        """The canvas makes no further step."""
        call(lib.dg_session_canvas_drop, self._open_pointer(), int32("index", index))

    def cancel(self) -> None:
        """From any thread: the call that is running, or else the next one that computes, raises CancelledError."""
        pointer = self._pointer
        if pointer is not None:
            lib.dg_session_cancel(pointer)

    def clear_cancel(self) -> None:
        """Forgets a cancel() that met no call."""
        lib.dg_session_clear_cancel(self._open_pointer())

    def stop_when(self, wanted: Callable[[], bool] | None) -> None:
        """From here on calls that compute raise CancelledError as soon as `wanted()` is true, which they ask before
        they begin and every 20 ms; None: never."""
        self._stop.when = wanted

    def _begin(self) -> Any:
        """The pointer, for a call that computes."""
        if self._stop.wanted():
            raise errors.CancelledError("the call was cancelled")
        return self._open_pointer()
