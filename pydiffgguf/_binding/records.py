"""What the C library's structs are in Python: plain records, their meanings and units.

`structs.py` fills and reads them; nothing here touches C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from pydiffgguf._arguments import integer

MetadataValue: TypeAlias = "bool | int | float | str | list[bool] | list[int] | list[float] | list[str]"
Int32Array: TypeAlias = npt.NDArray[np.int32]
Float32Array: TypeAlias = npt.NDArray[np.float32]
Float64Array: TypeAlias = npt.NDArray[np.float64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
#: A bit for each id of the vocabulary, 32 in a word.
Mask: TypeAlias = npt.NDArray[np.uint32]


class ArrayRecord:
    """A dataclass with arrays in it: equal where the arrays are, and shown in one line. (A tuple of arrays, which is
    how a dataclass compares itself, raises ValueError.)"""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(getattr(self, name), getattr(other, name)) for name in self._compared())

    def __hash__(self) -> int:
        values = (getattr(self, name) for name in self._compared())
        return hash((type(self), *(v for v in values if isinstance(v, (int, float, str)))))

    def _compared(self) -> list[str]:
        return [f.name for f in fields(self) if f.compare]  # type: ignore[arg-type]  # a dataclass derives from it

    def __repr__(self) -> str:
        shown = ", ".join(f"{f.name}={_shown(getattr(self, f.name))}" for f in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({shown})"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if one is None or other is None:
        return one is other
    return bool(np.array_equal(one, other))


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return f"[{len(value)} entries]" if isinstance(value, (list, tuple)) and len(value) > 8 else repr(value)


@dataclass(frozen=True)
class LayerConfig:
    """One layer: `sliding` or full attention, `n_head_kv` heads of `head_dim` in the cache."""

    sliding: bool
    n_head_kv: int
    head_dim: int


@dataclass(frozen=True)
class ModelConfig:
    """The figures of a model, all read from the file; the meaning of each stands at dg_config in csrc/diffgguf.h."""

    n_layer: int
    n_embd: int
    n_vocab: int
    n_head: int
    n_ff: int
    n_ff_exp: int
    n_expert: int
    n_expert_used: int
    sliding_window: int
    canvas_length: int
    n_ctx_train: int
    norm_eps: float
    logit_softcap: float
    rope_base_full: float
    rope_base_sliding: float
    has_self_conditioning: bool
    has_encoder_scalars: bool
    layers: tuple[LayerConfig, ...]


@dataclass(frozen=True)
class Sampling:
    """The entropy-bound sampler's options; units and ranges stand at dg_sampling in csrc/diffgguf.h.

    Ranges are checked by the call that uses them. `max_steps` 0 means no cap besides `steps`.
    """

    steps: int
    max_steps: int
    stability_threshold: int
    t_min: float
    t_max: float
    entropy_bound: float
    confidence_threshold: float


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the file: `shape` in ggml's order (the first number is contiguous), `type` by ggml's name. `kernel`:
    what products with it are computed in on the CPU: "8-bit integers", "16-bit integers",
    "bfloat16", "float32" or "ggml"."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int
    kernel: str


@dataclass(frozen=True)
class Device:
    """A device that a model may lie on besides the CPU, and what lies there; see dg_device in csrc/diffgguf.h."""

    name: str
    endpoint: str
    memory_free: int
    memory_total: int
    weights: int
    n_layers: int
    n_cpu_moe: int
    is_main: bool


@dataclass(frozen=True)
class Memory:
    """Bytes by kind; see dg_memory in csrc/diffgguf.h."""

    weights: int
    weights_mapped: int
    weights_on_devices: int
    kv_cache: int
    compute: int
    logits: int
    adapters: int
    signal_copy: int

    @classmethod
    def together(cls, parts: Sequence[Memory]) -> Memory:
        """The memory of several sessions on one model: what is the model's is there once."""
        of_the_model = ("weights", "weights_mapped", "weights_on_devices", "signal_copy")
        sums = {f.name: sum(getattr(part, f.name) for part in parts) for f in fields(cls)}
        return cls(**sums | {name: getattr(parts[0], name) for name in of_the_model})


@dataclass(frozen=True)
class Needs:
    """What a session takes on devices, at most, in bytes; see dg_needs in csrc/diffgguf.h. `cache`: the KV cache of
    each layer."""

    n_ctx: int
    n_rows: int
    logits: int
    sampling: int
    passes: int
    cache: tuple[int, ...]


@dataclass(frozen=True)
class LayerPlan:
    """Which layers go where; see dg_plan in csrc/diffgguf.h. `devices`: each layer's device, None for the CPU."""

    n_gpu_layers: int
    n_cpu_moe: int
    reserve: int
    devices: tuple[int | None, ...]


@dataclass(frozen=True)
class Timings:
    """Seconds by what they went into; see dg_timings in csrc/diffgguf.h."""

    products: float
    experts: float
    attention: float
    head: float
    self_conditioning: float
    sampling: float
    other: float


@dataclass(frozen=True, eq=False, repr=False)
class RawSample(ArrayRecord):
    """What the sampler made of one step's logits; arrays with an entry for each row.

    `argmax` int32: the canvas that counts. `canvas` int32: the canvas for the next step. `accepted` bool: the draw was
    accepted (never on pinned rows). `entropy` float64, nats, at this step's temperature (0 on pinned rows).
    """

    argmax: Int32Array
    canvas: Int32Array
    accepted: BoolArray
    entropy: Float64Array


@dataclass(frozen=True, eq=False, repr=False)
class RawStep(RawSample):
    """One denoise step: `step` counts from 0, `steps` is the most there can be, `mean_entropy` is over the free rows.

    `finished`: no further step will be made. `converged`: because the canvas was stable and confident. `logprob`
    float64, where ids are watched: natural log of their probability at temperature 1, before `allowed`; 0 on pinned
    rows.
    """

    step: int
    steps: int
    finished: bool
    converged: bool
    mean_entropy: float
    logprob: Float64Array | None


@dataclass(frozen=True, eq=False, repr=False)
class CanvasSpec(ArrayRecord):
    """One canvas of those that are denoised side by side; its arrays have `n_rows` entries.

    `n_rows`: 1 to C; None: C. `pinned`: the id where a row is fixed, -1 where it is free. `canvas`: the ids to start
    from; None for uniform random ones. `watched`: ids whose log-probability every step reports, -1 for the argmax's;
    None: none are, which saves a pass over each row's logits. `allowed`: row -> the only ids that it may take, at least
    one; noise ignores it, except a set of one. `seed` (64 bits) and `canvas_index` (32 bits) key the draws. `quiet`:
    nobody looks at the rows on the way; the arrays of its steps are empty except the last one's, and need not leave a
    device.
    """

    n_rows: int | None = None
    pinned: npt.ArrayLike | None = None
    canvas: npt.ArrayLike | None = None
    watched: npt.ArrayLike | None = None
    allowed: Mapping[int, npt.ArrayLike] | None = None
    seed: int = 0
    canvas_index: int = 0
    quiet: bool = False

    def rows(self, canvas_length: int) -> int:
        """The number of rows. Raises ValueError unless it is from 1 to C."""
        return canvas_length if self.n_rows is None else integer("n_rows", self.n_rows, 1, canvas_length)


class LocalDevice(TypedDict):
    """A device of this machine, the CPU being one; bytes."""

    name: str
    memory_free: int
    memory_total: int


class CpuLevel(TypedDict):
    """A level of a processor's instructions, which the CPU's own operators are compiled for. `compiled`: else the
    compiler that built the library could not; `offered`: this processor has it; `lacks`: what it lacks of it."""

    name: str
    meaning: str
    compiled: bool
    offered: bool
    lacks: list[str]


class BuildInfo(TypedDict):
    """The C library's version and ABI number, the ggml and the compiler inside, the build type and the switches that
    were on, the backends that were built in, the CPU features that ggml's code was built with, and the levels of
    instructions that the CPU's own operators have."""

    version: str
    abi: int
    ggml_version: str
    compiler: str
    flags: list[str]
    backends: list[str]
    devices: list[LocalDevice]
    cpu_features: list[str]
    cpu_levels: list[CpuLevel]
