"""The options of each call: their names and types for type checkers, and the refusal of others at run time.

The names are written here once: a type checker reads the TypedDicts, and `check_names` reads the same at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, TypedDict

import numpy.typing as npt

__all__ = [
    "Cancel",
    "ChatOptions",
    "EditOptions",
    "FillOptions",
    "Gap",
    "GenerateOptions",
    "InfillMode",
    "InfillOptions",
    "KvType",
    "ModelOptions",
    "Noise",
    "Progress",
    "Prompt",
    "SamplerName",
    "SamplingOptions",
    "SessionOptions",
    "Until",
    "check_names",
]

#: Text, or token ids that are used as they are.
Prompt: TypeAlias = str | Sequence[int]

#: Tokens of a gap, or "auto": to be found.
Gap: TypeAlias = int | Literal["auto"]

#: Where a text that nothing follows ends: with its line, with its block of lines, or where the model ends it.
Until: TypeAlias = Literal["line", "block", "end"]

#: How a gap is put to the model; "auto" goes by the file.
InfillMode: TypeAlias = Literal["auto", "raw", "chat"]

#: The type of the numbers in the KV cache.
KvType: TypeAlias = Literal["f16", "f32", "bf16", "q8_0"]

#: What does the work on a step's logits.
SamplerName: TypeAlias = Literal["auto", "host", "operators", "kernels"]


class Noise(Protocol):
    """Draws handed in by the caller in place of the built-in Philox ones. `c` counts canvases, `step` counts from 0 in
    order of execution; all arrays have an entry for each row, C of them unless the canvas is shorter."""

    def canvas(self, c: int) -> npt.ArrayLike:
        """Ids of the first canvas: int32."""

    def uniform(self, c: int, step: int) -> npt.ArrayLike:
        """u of each row's inverse-CDF draw: float64 in [0, 1)."""

    def renoise(self, c: int, step: int) -> npt.ArrayLike:
        """Fresh ids for the rows that are not accepted: int32."""


class Cancel(Protocol):
    """What ends a call early, from any thread: a ``threading.Event``, or anything else with its `is_set`. It is asked
    before each denoise step and about every 20 ms within one."""

    def is_set(self) -> bool:
        """True ends the call."""


@dataclass(frozen=True)
class Progress:
    """How far the opening of a model has come. `stage`: "downloading", which a cached file skips, or "opening". `name`:
    the file's. `done` of `total` are bytes; a mapped file is opened at once, so there are two of these."""

    stage: str
    name: str
    done: int
    total: int


class ScheduleOptions(TypedDict, total=False):
    """Options of the denoise loop, except `steps`. None counts as not given."""

    max_steps: int | None
    stability_threshold: int | None
    t_min: float | None
    t_max: float | None
    entropy_bound: float | None
    confidence_threshold: float | None
    time_limit_s: float | None


class SamplingOptions(ScheduleOptions, total=False):
    """Options of the denoise loop. What is not given comes from the file, then from the released config."""

    steps: int | None


class ConstraintOptions(TypedDict, total=False):
    """What an answer or a gap must be; one of them."""

    response_format: Mapping[str, Any] | None
    regex: str | None
    grammar: str | None
    choices: Sequence[str] | None


class GenerateOptions(SamplingOptions, ConstraintOptions, total=False):
    """Options of `generate`, `chat` and their streams."""

    max_tokens: int | None
    canvas_length: int | None
    narrow: bool
    seed: int | None
    stop: str | Sequence[str] | None
    settle: int | None
    noise: Noise | None
    cancel: Cancel | None
    lora: Mapping[str, float] | None


class ChatOptions(GenerateOptions, total=False):
    """Options of `chat` and its stream."""

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    thinking: bool | int


class EditOptions(SamplingOptions, total=False):
    """Options of `edit`."""

    strength: float
    seed: int | None
    cancel: Cancel | None
    lora: Mapping[str, float] | None


class FillOptions(SamplingOptions, total=False):
    """Options of `fill` and its stream."""

    min_gap: int
    max_gap: int
    extra: Sequence[tuple[str, str]] | Mapping[str, str]
    seed: int | None
    mode: InfillMode
    heal: bool
    ends: bool
    cancel: Cancel | None
    lora: Mapping[str, float] | None


class InfillOptions(FillOptions, ConstraintOptions, total=False):
    """Options of `infill` and its stream."""

    gap: Gap
    n: int
    until: Until | None


class SessionOptions(TypedDict, total=False):
    """Options of a session whose memory `DiffusionModel.memory` predicts."""

    n_ctx: int
    n_batch: int
    n_rows: int
    type_kv: KvType


class ModelOptions(TypedDict, total=False):
    """Options of `DiffusionModel`; its docstring has their meanings."""

    n_ctx: int | None
    n_batch: int
    n_threads: int | None
    n_gpu_layers: int | Literal["auto", "all"]
    n_cpu_moe: int
    tensor_split: Sequence[float] | None
    main_gpu: int | None
    offload_kv: bool
    signal_copy: bool
    rpc: Sequence[str]
    sampler: SamplerName
    type_kv: KvType
    cpu: str | None
    use_mmap: bool
    n_sessions: int
    lora: Sequence[Any]
    progress: Callable[[Progress], object] | None
    verbose: bool


def check_names(call: str, given: Iterable[str], *options: type, also: Iterable[str] = ()) -> None:
    """Raises TypeError for the first name that is none of the call's options.

    Args:
        call: what the caller wrote, for the message.
        options: the TypedDicts of the call's options.
        also: names of its other arguments, for the message.
    """
    known = [*also, *(name for each in options for name in each.__annotations__)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        from pydiffgguf.engine.habits import hint

        help_ = hint(unknown[0], known)
        names = f"{call}() takes {', '.join(dict.fromkeys(known))}"
        raise TypeError(
            f"unknown option {unknown[0]!r}: {help_}" if help_ else f"unknown option {unknown[0]!r}; {names}"
        )
