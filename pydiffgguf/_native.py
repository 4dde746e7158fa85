"""The only file that touches the C library: csrc/diffgguf.h in Python's terms.

One class per noun of the header, one helper that turns a ``dg_status`` into an exception, and nothing else: no text,
no sampling policy, no defaults that the header or the file does not give. ids are int32 arrays, logits float32 arrays
``[n_rows, V]`` with V the vocabulary size and at most C rows, the canvas length.

Threads. cffi's wrappers release the GIL around every call, so a method may meet another thread inside the same object.
Each method therefore takes the C pointer into a local variable first: ``close()`` only drops the object's own
reference, and the memory is freed when the last call that uses it has returned. Two computing calls on one session are
told apart in C: the second raises SessionBusyError.

Signals. Python runs signal handlers on the main thread between bytecodes, and a C call has none. The poll function
below is Python code that C calls every 20 ms: a pending Ctrl-C raises in it, C is told to stop, and the exception goes
on from where the call was made.
"""

from __future__ import annotations

import atexit
import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pydiffgguf import _log, errors
from pydiffgguf._arguments import MAX_SEED, float_array, id_array, int32, integer, real
from pydiffgguf._records import (
    BuildInfo,
    CanvasSpec,
    Device,
    Float32Array,
    Float64Array,
    Int32Array,
    LayerConfig,
    LocalDevice,
    Memory,
    MetadataValue,
    ModelConfig,
    RawSample,
    RawStep,
    Sampling,
    TensorInfo,
    Timings,
)

try:
    from pydiffgguf._diffgguf import ffi, lib
except ModuleNotFoundError as error:
    raise ImportError(
        "pydiffgguf's compiled module is missing. In a source checkout, run `pip install .` and start Python outside "
        "of the checkout's folder, or use `pip install -e .`"
    ) from error

StrPath: TypeAlias = "str | os.PathLike[str]"
KV_TYPES: dict[str, int] = {
    "f16": lib.DG_KV_F16,
    "f32": lib.DG_KV_F32,
    "bf16": lib.DG_KV_BF16,
    "q8_0": lib.DG_KV_Q8_0,
}

# GGUF's numbers for value types, as in the header.
_STRING = 8
_ARRAY = 9
_NUMBERS: dict[int, type[np.generic]] = {
    0: np.uint8,
    1: np.int8,
    2: np.uint16,
    3: np.int16,
    4: np.uint32,
    5: np.int32,
    6: np.float32,
    7: np.bool_,
    10: np.uint64,
    11: np.int64,
    12: np.float64,
}


# ------------------------------------------------------------------------------------------------ calls and errors

_EXCEPTIONS: dict[int, type[Exception]] = {
    lib.DG_ERROR_ARGUMENT: ValueError,
    lib.DG_ERROR_IO: OSError,
    lib.DG_ERROR_FORMAT: errors.ModelFormatError,
    lib.DG_ERROR_UNSUPPORTED: errors.UnsupportedError,
    lib.DG_ERROR_MEMORY: errors.OutOfMemoryError,
    lib.DG_ERROR_CONTEXT: errors.ContextOverflowError,
    lib.DG_ERROR_BUSY: errors.SessionBusyError,
    lib.DG_ERROR_CANCELLED: errors.CancelledError,
    lib.DG_ERROR_INTERNAL: errors.DiffGGUFError,
    lib.DG_ERROR_DEVICE: errors.DeviceError,
}

_ERROR_SIZE = 1024


class _Poll(threading.local):
    """What the poll function raised on this thread during the call that is running."""

    error: BaseException | None = None


_poll = _Poll()


def _keep_poll_error(_type: object, error: BaseException, _traceback: object) -> None:
    _poll.error = error


@ffi.def_extern(name="dg_python_poll", error=1, onerror=_keep_poll_error)  # type: ignore[untyped-decorator]
def _python_poll(_user: object) -> int:
    """That it is Python code is what lets a pending signal handler run. 0: go on."""
    _leave_if_exiting()
    return 0


@ffi.def_extern(name="dg_python_log", onerror=_keep_poll_error)  # type: ignore[untyped-decorator]
def _python_log(level: int, text: Any, _user: object) -> None:
    """A line that ggml logs. What a handler raises, or a signal that meets it, goes on from the call that logged."""
    _log.from_ggml(level, _text(text))


lib.dg_set_log(lib.dg_python_log, ffi.NULL)

#: Threads that are in a call of `_call`.
_inside: set[int] = set()
_exiting = False


def _leave_if_exiting() -> None:
    """Ends a daemon thread, without a word, when the interpreter is about to end."""
    if _exiting and threading.current_thread() is not threading.main_thread():
        raise SystemExit


@atexit.register
def _end_calls() -> None:
    """No daemon thread may be in the library when the interpreter ends: Python would end it where it next calls Python,
    with C++ in between, which aborts the process. Each thread leaves at its next poll, at most 20 ms and an operator
    later."""
    global _exiting
    _exiting = True
    lib.dg_set_log(ffi.NULL, ffi.NULL)
    late = time.monotonic() + 5.0  # a file that is being read calls no Python
    while _inside - {threading.get_ident()} and time.monotonic() < late:
        time.sleep(0.001)


def _call(function: Callable[..., int], *arguments: object) -> None:
    """Calls a function of the header that returns a dg_status; `arguments` lack the last two, the error buffer.

    Raises what the poll function raised during the call, else the exception of the status, with C's message.
    """
    message = ffi.new("char[]", _ERROR_SIZE)
    _poll.error = None
    _inside.add(threading.get_ident())
    try:
        _leave_if_exiting()
        status = function(*arguments, message, _ERROR_SIZE)
    finally:
        _inside.discard(threading.get_ident())
    interruption, _poll.error = _poll.error, None
    if interruption is not None:
        raise interruption
    if status != lib.DG_OK:
        raise _EXCEPTIONS[status](_text(message))


def _text(pointer: Any) -> str:
    """A NUL-terminated C string; bytes that are no UTF-8 (a file's name, say) are shown escaped."""
    raw: bytes = ffi.string(pointer)
    return raw.decode("utf-8", "backslashreplace")


# --------------------------------------------------------------------------------------------------- arrays and paths


def _pointer_to(c_type: str, array: npt.NDArray[Any] | None) -> Any:
    """A C pointer into `array`, which the pointer keeps alive; NULL for None."""
    return ffi.NULL if array is None else ffi.from_buffer(c_type, array)


def _copy(pointer: Any, n: int, dtype: type[np.generic]) -> Any:
    """A numpy array of its own with `n` values from C memory."""
    return np.frombuffer(ffi.buffer(pointer, n * np.dtype(dtype).itemsize), dtype=dtype).copy()


def _encode_path(path: StrPath) -> bytes:
    encoded = os.fsencode(os.fspath(path))
    if b"\0" in encoded:
        raise ValueError(f"path holds a NUL character: {os.fspath(path)!r}")
    return encoded


def _check_readable(path: StrPath) -> None:
    """Raises the exact OSError (FileNotFoundError, IsADirectoryError, PermissionError) before C says it in words."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if stat.S_ISREG(mode):  # opening a pipe would block
        os.close(os.open(path, os.O_RDONLY))


# ----------------------------------------------------------------------------------------------------------- model


def _fill_sampling(sampling: Sampling, out: Any) -> None:
    """Writes a Sampling into a dg_sampling."""
    for name in ("steps", "max_steps", "stability_threshold"):
        setattr(out, name, int32(name, getattr(sampling, name)))
    for name in ("t_min", "t_max", "entropy_bound", "confidence_threshold"):
        setattr(out, name, real(name, getattr(sampling, name)))


def _fields(struct: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in names}


_SAMPLING_FIELDS = tuple(Sampling.__dataclass_fields__)
_DEVICE_FIELDS = tuple(Device.__dataclass_fields__)
_MEMORY_FIELDS = tuple(Memory.__dataclass_fields__)
_TIMINGS_FIELDS = tuple(Timings.__dataclass_fields__)
_CONFIG_FIELDS = tuple(name for name in ModelConfig.__dataclass_fields__ if name != "layers")


class Metadata(Mapping[str, MetadataValue]):
    """The file's key-value pairs in the file's order; a value is decoded when it is first asked for.

    Numbers, bools and strings are Python's own, arrays are lists. A vocabulary of 262,144 tokens takes 30 ms to
    decode, which a caller that wants only a name does not pay. A string that is not UTF-8 raises ModelFormatError.
    """

    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer
        count = lib.dg_model_n_kv(pointer)
        self._index = {_text(lib.dg_model_kv_key(pointer, i)): i for i in range(count)}
        self._values: dict[str, MetadataValue] = {}

    def __getitem__(self, key: str) -> MetadataValue:
        if key not in self._values:
            self._values[key] = self._decode(key, self._index[key])
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def _decode(self, key: str, i: int) -> MetadataValue:
        is_array = lib.dg_model_kv_type(self._pointer, i) == _ARRAY
        value_type = (lib.dg_model_kv_array_type if is_array else lib.dg_model_kv_type)(self._pointer, i)
        values: list[Any]
        if value_type == _STRING:
            values = self._strings(key, i)
        else:
            dtype = _NUMBERS.get(value_type)
            if dtype is None:  # arrays of arrays exist in the format, and nowhere else
                raise errors.ModelFormatError(f"key {key} has the unknown value type {value_type}")
            values = _copy(lib.dg_model_kv_data(self._pointer, i), self._length(i), dtype).tolist()
        value: MetadataValue = values if is_array else values[0]
        return value

    def _length(self, i: int) -> int:
        return int(lib.dg_model_kv_length(self._pointer, i))

    def _strings(self, key: str, i: int) -> list[str]:
        size = lib.dg_model_kv_strings(self._pointer, i, ffi.NULL, 0)
        buffer = ffi.new("char[]", size)
        lib.dg_model_kv_strings(self._pointer, i, buffer, size)
        try:
            # One decode for all of them. Every string is closed by a NUL, so the piece after the last one is empty.
            return bytes(ffi.buffer(buffer)).decode("utf-8").split("\0")[:-1]
        except UnicodeDecodeError as error:
            raise errors.ModelFormatError(f"key {key} holds text that is not UTF-8: {error.reason}") from None


class NativeModel:
    """An opened GGUF file: immutable, shareable between threads and sessions.

    `use_mmap` maps the file instead of reading it into memory. The other options say where the model lies: those of
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
        n_gpu_layers: int = 0,
        n_cpu_moe: int = 0,
        tensor_split: Sequence[float] = (),
        main_gpu: int = -1,
        offload_kv: bool = True,
        rpc: Sequence[str] = (),
        expected: Mapping[str, Any] | None = None,
    ) -> None:
        options = ffi.new("dg_model_options *", lib.dg_model_options_default())
        options.use_mmap = bool(use_mmap)
        options.n_gpu_layers = int32("n_gpu_layers", n_gpu_layers, low=-1)
        options.n_cpu_moe = int32("n_cpu_moe", n_cpu_moe)
        options.main_gpu = int32("main_gpu", main_gpu, low=-1)
        options.offload_kv = bool(offload_kv)
        split = ffi.new("float[]", [real("a part of tensor_split", part) for part in tensor_split])
        options.tensor_split, options.n_tensor_split = split, len(tensor_split)
        if isinstance(rpc, str):
            raise TypeError('rpc is a string: it must be a list of "host:port"')
        servers = [ffi.new("char[]", server.encode()) for server in rpc]
        endpoints = ffi.new("const char *[]", servers)
        options.rpc, options.n_rpc = endpoints, len(servers)
        options.expected = _session_options(**(expected or {}))[0]
        encoded = _encode_path(path)
        _check_readable(path)
        out = ffi.new("dg_model **")
        _call(lib.dg_model_open, out, encoded, options)
        pointer = ffi.gc(out[0], lib.dg_model_free)
        self._pointer: Any = pointer
        config = lib.dg_model_config(pointer)
        layers = (lib.dg_model_layer(pointer, i) for i in range(config.n_layer))
        self.config = ModelConfig(
            **_fields(config, _CONFIG_FIELDS),
            layers=tuple(LayerConfig(layer.sliding, layer.n_head_kv, layer.head_dim) for layer in layers),
        )
        self.sampling = Sampling(**_fields(lib.dg_model_sampling(pointer), _SAMPLING_FIELDS))
        self.warnings = [_text(lib.dg_model_warning(pointer, i)) for i in range(lib.dg_model_n_warnings(pointer))]
        self._metadata: Metadata | None = Metadata(pointer)

    @property
    def closed(self) -> bool:
        return self._pointer is None

    def close(self) -> None:
        """Lets go of the file, which is freed as soon as no session uses it. Idempotent."""
        self._pointer = self._metadata = None

    @property
    def metadata(self) -> Metadata:
        metadata = self._metadata
        if metadata is None:
            raise errors.ModelClosedError("the model is closed")
        return metadata

    def _open_pointer(self) -> Any:
        pointer = self._pointer
        if pointer is None:
            raise errors.ModelClosedError("the model is closed")
        return pointer

    def tensors(self) -> list[TensorInfo]:
        """All tensors of the file, in its order, also those that are not used."""
        pointer = self._open_pointer()
        result = []
        for i in range(lib.dg_model_n_tensors(pointer)):
            info = lib.dg_model_tensor(pointer, i)
            shape = tuple(info.ne[0 : info.n_dims])
            result.append(TensorInfo(_text(info.name), _text(info.type_name), shape, info.n_bytes, _text(info.kernel)))
        return result

    def devices(self) -> list[Device]:
        """The devices that the model may lie on, in the order in which a pass goes through them."""
        pointer = self._open_pointer()
        infos = (lib.dg_model_device(pointer, i) for i in range(lib.dg_model_n_devices(pointer)))
        return [
            Device(**{**_fields(info, _DEVICE_FIELDS), "name": _text(info.name), "endpoint": _text(info.endpoint)})
            for info in infos
        ]

    def n_ctx(self, **options: Any) -> int:
        """The n_ctx of a session with these options: what 0 comes to."""
        out = ffi.new("int32_t *")
        _call(lib.dg_model_n_ctx, self._open_pointer(), _session_options(**options), out)
        return int(out[0])

    def memory(self, **options: Any) -> Memory:
        """What a session with these options (NativeSession's) would take, without making one. Raises what NativeSession
        raises."""
        out = ffi.new("dg_memory *")
        _call(lib.dg_model_memory, self._open_pointer(), _session_options(**options), out)
        return Memory(**_fields(out, _MEMORY_FIELDS))


# --------------------------------------------------------------------------------------------------------- session


def _read_step(step: Any) -> RawStep:
    n: int = step.n_rows
    return RawStep(
        argmax=_copy(step.argmax, n, np.int32),
        canvas=_copy(step.canvas, n, np.int32),
        accepted=_copy(step.accepted, n, np.bool_),
        entropy=_copy(step.entropy, n, np.float64),
        step=step.step,
        steps=step.steps,
        finished=step.finished,
        converged=step.converged,
        mean_entropy=step.mean_entropy,
        logprob=None if step.logprob == ffi.NULL else _copy(step.logprob, n, np.float64),
    )


def _fill_spec(spec: CanvasSpec, sampling: Sampling, canvas_length: int, out: Any) -> list[object]:
    """Writes a CanvasSpec into a dg_canvas_options; returns what must stay alive until C has copied it."""
    n = spec.rows(canvas_length)
    _fill_sampling(sampling, out.sampling)
    out.seed = integer("seed", spec.seed, 0, MAX_SEED)
    out.canvas_index = integer("canvas_index", spec.canvas_index, 0, 2**32 - 1)
    out.n_rows = n
    kept: list[object] = []

    def array(name: str, value: npt.ArrayLike | None, length: int | None) -> Any:
        pointer = _pointer_to("int32_t[]", None if value is None else id_array(name, value, length))
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


def _session_options(
    n_ctx: int = 0,
    n_batch: int = 512,
    n_threads: int = 0,
    type_kv: str = "f16",
    n_rows: int = 0,
    ggml_operators: bool = False,
) -> Any:
    if type_kv not in KV_TYPES:
        raise ValueError(f"type_kv is {type_kv!r}: it must be one of {', '.join(map(repr, KV_TYPES))}")
    options = ffi.new("dg_session_options *", lib.dg_session_options_default())
    options.n_ctx = int32("n_ctx", n_ctx)
    options.n_batch = int32("n_batch", n_batch, low=1)
    options.n_threads = int32("n_threads", n_threads)
    options.type_kv = KV_TYPES[type_kv]
    options.n_rows = int32("n_rows", n_rows)
    options.ggml_operators = bool(ggml_operators)
    return options


class NativeSession:
    """One timeline on a model: a prefix in the KV cache, and the canvases that are being denoised behind it.

    Options: `n_ctx` 0: the smaller of 8192 and the file's context length. `n_batch`: tokens per chunk of a prompt.
    `n_threads` 0: as many as this process may use at once. `type_kv`: a key of KV_TYPES. `n_rows`: the most rows that
    canvases side by side may have together, 0 for C, which is the least. `ggml_operators`: compute with ggml's
    operators alone, as devices other than the CPU do.

    The computing methods raise SessionBusyError when another thread is inside, CancelledError after cancel(), and what
    a signal handler raised (KeyboardInterrupt) when one ran meanwhile; what then holds stands at each call in
    csrc/diffgguf.h. After close(), all but close() and cancel() raise ModelClosedError.
    """

    def __init__(self, model: NativeModel, **options: Any) -> None:
        out = ffi.new("dg_session **")
        _call(lib.dg_session_create, out, model._open_pointer(), _session_options(**options))
        pointer = ffi.gc(out[0], lib.dg_session_free)
        _call(lib.dg_session_set_poll, pointer, lib.dg_python_poll, ffi.NULL)
        self._pointer: Any = pointer
        self._canvas_length = model.config.canvas_length
        self._n_vocab = model.config.n_vocab
        self.n_ctx: int = lib.dg_session_n_ctx(pointer)
        self.n_threads: int = lib.dg_session_n_threads(pointer)
        self.n_rows: int = lib.dg_session_n_rows(pointer)
        self._rows: list[int] = []  # of each canvas under way
        self.memory = Memory(**_fields(lib.dg_session_memory(pointer), _MEMORY_FIELDS))

    @property
    def closed(self) -> bool:
        return self._pointer is None

    def close(self) -> None:
        """Frees the cache and the buffers; a call under way on another thread is cancelled first. Idempotent."""
        self.cancel()
        self._pointer = None

    def profile(self, on: bool) -> None:
        """From here on operators run one at a time and are timed, from zero; or no longer."""
        _call(lib.dg_session_profile, self._open_pointer(), bool(on))

    @property
    def timings(self) -> Timings:
        """What computing took since `profile(True)`, by part."""
        return Timings(**_fields(lib.dg_session_timings(self._open_pointer()), _TIMINGS_FIELDS))

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
        _call(lib.dg_session_tokens, pointer, _pointer_to("int32_t[]", ids), self.n_ctx)
        return np.array(ids[:n_past])

    def encode(self, ids: npt.ArrayLike) -> None:
        """Appends ids [n] to the prefix. Raises ContextOverflowError when they and one canvas pass n_ctx."""
        array = id_array("ids", ids)
        _call(lib.dg_session_encode, self._open_pointer(), _pointer_to("int32_t[]", array), array.size)

    def truncate(self, n: int) -> None:
        """Cuts the prefix to its first `n` tokens, 0 to n_past."""
        _call(lib.dg_session_truncate, self._open_pointer(), int32("n", n))

    def save(self, path: StrPath) -> None:
        """Writes the prefix, tokens and cache, to a file that appears only when it is whole."""
        _call(lib.dg_session_save, self._open_pointer(), _encode_path(path))

    def load(self, path: StrPath) -> None:
        """Replaces the prefix by a saved one of the same model and type_kv. A failed load leaves an empty prefix."""
        pointer, encoded = self._open_pointer(), _encode_path(path)
        _check_readable(path)
        _call(lib.dg_session_load, pointer, encoded)

    def score(self, texts: Sequence[npt.ArrayLike]) -> list[Float64Array]:
        """Natural log of the probability of each token after the prefix and the tokens before it, for each text."""
        arrays = [id_array(f"texts[{i}]", text) for i, text in enumerate(texts)]
        if not arrays:
            return []
        lengths = np.array([array.size for array in arrays], dtype=np.int32)
        ids = np.concatenate(arrays)
        out = np.empty(ids.size, dtype=np.float64)
        _call(
            lib.dg_session_score,
            self._open_pointer(),
            _pointer_to("int32_t[]", ids),
            _pointer_to("int32_t[]", lengths),
            lengths.size,
            _pointer_to("double[]", out),
        )
        return np.split(out, np.cumsum(lengths)[:-1])

    def collect(self, on: bool) -> None:
        """From here on passes add up the squares of what each matrix is multiplied by, from zero; or no longer."""
        _call(lib.dg_session_collect, self._open_pointer(), bool(on))

    def importance(self, tensor: str, n_matrices: int, row: int) -> tuple[Float64Array, npt.NDArray[np.int64]]:
        """What `collect` has added up for a tensor of `n_matrices` matrices with rows of `row`: squares float64
        [n_matrices, row], and how many rows were summed, int64 [n_matrices]. ValueError while nothing is collected."""
        squares = np.empty((n_matrices, row), dtype=np.float64)
        counts = np.empty(n_matrices, dtype=np.int64)
        _call(
            lib.dg_session_importance,
            self._open_pointer(),
            tensor.encode(),
            _pointer_to("double[]", squares),
            _pointer_to("int64_t[]", counts),
        )
        return squares, counts

    def denoise(
        self, canvas: npt.ArrayLike, self_conditioning: Float32Array | None = None, n_rows: int | None = None
    ) -> Float32Array:
        """One decoder pass: canvas [n_rows] ids -> logits float32 [n_rows, V], softcapped, before temperature.

        `n_rows`: 1 to C, None for C. `self_conditioning` float32 [n_rows, V]: the processed logits of the step before,
        None for a zero signal. The prefix is read, not changed.
        """
        rows = self._canvas_length if n_rows is None else integer("n_rows", n_rows, 1, self._canvas_length)
        ids = id_array("canvas", canvas, rows)
        shape = (rows, self._n_vocab)
        signal = None
        if self_conditioning is not None:
            signal = float_array("self_conditioning", self_conditioning, np.float32, shape)
        logits = np.empty(shape, dtype=np.float32)
        _call(
            lib.dg_session_denoise,
            self._open_pointer(),
            _pointer_to("int32_t[]", ids),
            ids.size,
            _pointer_to("float[]", signal),
            _pointer_to("float[]", logits),
        )
        return logits

    def canvas_begin(self, specs: Sequence[CanvasSpec], sampling: Sampling) -> None:
        """Starts canvases side by side after the prefix, which must hold at least one token."""
        options = ffi.new("dg_canvas_options[]", len(specs))
        kept = [_fill_spec(spec, sampling, self._canvas_length, options[i]) for i, spec in enumerate(specs)]
        _call(lib.dg_session_canvas_begin, self._open_pointer(), options, len(specs))
        del kept  # C has copied the arrays
        self._rows = [options[i].n_rows for i in range(len(specs))]

    def canvas_step(self, noise: Sequence[tuple[npt.ArrayLike, npt.ArrayLike] | None] | None = None) -> list[RawStep]:
        """One denoise step of every canvas that is not finished; after CancelledError it may be repeated.

        `noise`: for each canvas (uniform float64 [n_rows] in [0, 1), renoise [n_rows] ids) in place of the step's own
        draws; None for a canvas that is finished, or for all: the built-in draws.
        """
        pointer, rows = self._open_pointer(), self._rows
        given, kept = ffi.NULL, []
        if noise is not None:
            given = ffi.new("dg_noise[]", len(rows))
            for i, (draws, n) in enumerate(zip(noise, rows, strict=True)):
                if draws is not None:
                    kept.append(_fill_noise(given[i], *draws, n))
        out = ffi.new("dg_step[]", max(1, len(rows)))
        _call(lib.dg_session_canvas_step, pointer, given, out)
        return [_read_step(out[i]) for i in range(len(rows))]

    def canvas_drop(self, index: int) -> None:
        """The canvas makes no further step."""
        _call(lib.dg_session_canvas_drop, self._open_pointer(), int32("index", index))

    def cancel(self) -> None:
        """From any thread: the call that is running, or else the next one that computes, raises CancelledError."""
        pointer = self._pointer
        if pointer is not None:
            lib.dg_session_cancel(pointer)

    def clear_cancel(self) -> None:
        """Forgets a cancel() that met no call."""
        lib.dg_session_clear_cancel(self._open_pointer())


# ------------------------------------------------------------------------------------------------- sampler and draws


def _fill_noise(out: Any, uniform: npt.ArrayLike, renoise: npt.ArrayLike, n_rows: int) -> object:
    """Writes draws into a dg_noise; returns what must outlive its use."""
    u = float_array("uniform", uniform, np.float64, (n_rows,))
    ids = id_array("renoise", renoise, n_rows)
    out.uniform = _pointer_to("double[]", u)
    out.renoise = _pointer_to("int32_t[]", ids)
    return out.uniform, out.renoise


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError naming the option, its value and the range; TypeError for a value of the wrong type."""
    options = ffi.new("dg_sampling *")
    _fill_sampling(sampling, options)
    _call(lib.dg_sampling_check, options)


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
    _keep_alive = _fill_noise(noise, uniform, renoise, n_rows)
    pinned_ids = None if pinned is None else id_array("pinned", pinned, n_rows)
    options = ffi.new("dg_sampling *")
    _fill_sampling(sampling, options)
    argmax, canvas = np.empty(n_rows, dtype=np.int32), np.empty(n_rows, dtype=np.int32)
    accepted, entropy = np.empty(n_rows, dtype=np.uint8), np.empty(n_rows, dtype=np.float64)
    _call(
        lib.dg_sample,
        _pointer_to("float[]", z),
        int32("the number of rows of z", n_rows, low=1),
        int32("the number of columns of z", n_vocab, low=1),
        options,
        int32("step", step),
        noise,
        _pointer_to("int32_t[]", pinned_ids),
        bool(ggml_operators),
        _pointer_to("int32_t[]", argmax),
        _pointer_to("int32_t[]", canvas),
        _pointer_to("uint8_t[]", accepted),
        _pointer_to("double[]", entropy),
    )
    return RawSample(argmax, canvas, accepted.view(np.bool_), entropy)


def noise_canvas(seed: int, canvas_index: int, n_rows: int, n_vocab: int) -> Int32Array:
    """The first canvas that the loop draws for itself: int32 [n_rows] ids, a pure function of the arguments."""
    out = np.empty(int32("n_rows", n_rows), dtype=np.int32)
    key = _draw_key(seed, canvas_index)
    lib.dg_noise_canvas(*key, n_rows, int32("n_vocab", n_vocab, low=1), _pointer_to("int32_t[]", out))
    return out


def noise_uniform(seed: int, canvas_index: int, step: int, n_rows: int) -> Float64Array:
    """The u of each row's draw in one step: float64 [n_rows] in [0, 1)."""
    out = np.empty(int32("n_rows", n_rows), dtype=np.float64)
    key = _draw_key(seed, canvas_index)
    lib.dg_noise_uniform(*key, integer("step", step, 0, 2**32 - 1), n_rows, _pointer_to("double[]", out))
    return out


def noise_renoise(seed: int, canvas_index: int, step: int, n_rows: int, n_vocab: int) -> Int32Array:
    """The fresh ids for the rows that one step does not accept: int32 [n_rows]."""
    out = np.empty(int32("n_rows", n_rows), dtype=np.int32)
    key = (*_draw_key(seed, canvas_index), integer("step", step, 0, 2**32 - 1))
    lib.dg_noise_renoise(*key, n_rows, int32("n_vocab", n_vocab, low=1), _pointer_to("int32_t[]", out))
    return out


def _draw_key(seed: int, canvas_index: int) -> tuple[int, int]:
    return integer("seed", seed, 0, MAX_SEED), integer("canvas_index", canvas_index, 0, 2**32 - 1)


# ------------------------------------------------------------------------------------------------------ quantizing


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
        _call(
            lib.dg_quantize_rows,
            int32("src_type", src_type),
            _pointer_to("char[]", data),
            int32("dst_type", dst_type),
            _pointer_to("char[]", out),
            out.shape[0],
            row,
            _pointer_to("float[]", importance),
            int32("n_threads", n_threads, low=0),
        )
    return out


# ----------------------------------------------------------------------------------------------------------- build


def serve_rpc(endpoint: str, *, n_threads: int = 0) -> None:
    """dg_rpc_serve of csrc/diffgguf.h: serves, and does not return. Raises OSError when the port cannot be had."""
    _call(lib.dg_rpc_serve, endpoint.encode(), int32("n_threads", n_threads))


def _local_device(device: Any) -> LocalDevice:
    return {
        "name": _text(device.name),
        "memory_free": int(device.memory_free),
        "memory_total": int(device.memory_total),
    }


def build_info() -> BuildInfo:
    return {
        "version": _text(lib.dg_version()),
        "abi": lib.dg_abi_version(),
        "ggml_version": _text(lib.dg_ggml_version()),
        "compiler": _text(lib.dg_compiler()),
        "flags": _text(lib.dg_build_flags()).split(),
        "backends": [_text(lib.dg_backend_name(i)) for i in range(lib.dg_n_backends())],
        "devices": [_local_device(lib.dg_local_device(i)) for i in range(lib.dg_n_devices())],
        "cpu_features": [feature for feature in _text(lib.dg_cpu_features()).split(",") if feature],
    }
