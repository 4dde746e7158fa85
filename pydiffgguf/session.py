"""The low level: numpy in, numpy out. A session owns a KV cache and buffers, and denoises canvases behind its prefix.

C is the canvas length, V the vocabulary size (`model.config.canvas_length`, `model.config.n_vocab`). A canvas has C
rows unless it is asked to be shorter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pydiffgguf._binding import functions
from pydiffgguf._binding.adapters import set_adapters
from pydiffgguf._binding.library import StrPath
from pydiffgguf._binding.native import NativeModel, NativeSession
from pydiffgguf._binding.records import (
    ArrayRecord,
    BoolArray,
    CanvasSpec,
    Float32Array,
    Float64Array,
    Int32Array,
    Mask,
    Memory,
    ModelConfig,
    RawStep,
    Sampling,
    Timings,
)
from pydiffgguf.engine.adapters import NONE, Adapters, Chosen
from pydiffgguf.engine.options import Noise, SamplingOptions, ScheduleOptions, check_names

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "SAMPLING_OPTIONS",
    "Canvas",
    "CanvasBatch",
    "CanvasSpec",
    "Noise",
    "Session",
    "Step",
    "resolve_sampling",
]


@dataclass(frozen=True, eq=False, repr=False)
class Step(ArrayRecord):
    """What the sampler made of one step; arrays with an entry for each row.

    `argmax` int32: the canvas that counts. `accepted` bool: whose draw was accepted; False on pinned rows, which take
    no part. `entropy` float64: nats, at the step's temperature; 0 on pinned rows. `canvas` int32: what the next step
    starts from: accepted draws, fresh random ids elsewhere, the pins last.
    """

    argmax: Int32Array
    accepted: BoolArray
    entropy: Float64Array
    canvas: Int32Array


@dataclass(frozen=True, eq=False, repr=False)
class Canvas(ArrayRecord):
    """A denoised canvas. `tokens` int32 [n_rows]: the last argmax canvas. `steps`: how many were made. `converged`: it
    was stable and confident before the steps (or the time) ran out. `trace`: one Step each, when asked for."""

    tokens: Int32Array
    steps: int
    converged: bool
    trace: list[Step] = field(default_factory=list)


#: Options of the canvas loop, by the names that they have everywhere. `time_limit_s` is the only one that is not part
#: of the sampler itself: no new step, and in `generate` no new chunk of the prompt, begins later than this many seconds
#: after the call.
SAMPLING_OPTIONS = (*(f.name for f in fields(Sampling)), "time_limit_s")


def resolve_sampling(defaults: Sampling, options: Mapping[str, Any]) -> tuple[Sampling, float | None]:
    """The file's sampler values with the caller's over them, and the time limit. An option that is None counts as not
    given; those of `options` that are not the sampler's are not looked at.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range; names the option, the value and the range.
    """
    given = {name: options[name] for name in SAMPLING_OPTIONS if options.get(name) is not None}
    time_limit = given.pop("time_limit_s", None)
    if time_limit is not None:
        if isinstance(time_limit, bool) or not isinstance(time_limit, (int, float, np.integer, np.floating)):
            raise TypeError(f"time_limit_s must be a number, but is {time_limit!r}")
        time_limit = float(time_limit)
        if not 0.0 < time_limit < float("inf"):
            raise ValueError(f"time_limit_s is {time_limit}: it must be a finite number of seconds > 0")
    sampling = replace(defaults, **given)
    functions.check_sampling(sampling)
    return sampling, time_limit


class Session:
    """A prefix in the KV cache, and the canvas behind it. Made by `DiffusionModel.session()`.

    One thread at a time: a second one gets SessionBusyError. The computing methods raise CancelledError after
    `cancel()` from another thread; the prefix then holds what `n_past` says, and the session is usable.
    """

    def __init__(self, model: NativeModel, adapters: Adapters, **options: Any) -> None:
        self._native = NativeSession(model, **options)
        self._model = model
        self._adapters = adapters
        self._running = NONE
        self.n_batch: int = options.get("n_batch", 512)
        self.config: ModelConfig = model.config
        self._defaults = model.sampling

    # ------------------------------------------------------------------------------------------------- the prefix

    def encode(self, ids: npt.ArrayLike) -> None:
        """Appends ids (int32 [n], n >= 1) to the prefix, causally, in chunks of n_batch.

        Raises:
            ContextOverflowError: the prefix, these tokens and one canvas do not fit n_ctx; nothing is changed.
            ValueError: no ids, or an id out of range; nothing is changed.
        """
        self._native.encode(ids)

    @property
    def n_past(self) -> int:
        """Tokens in the prefix."""
        return self._native.n_past

    @property
    def n_ctx(self) -> int:
        """Positions there are: prefix, finished canvases and the live canvas together."""
        return self._native.n_ctx

    @property
    def n_threads(self) -> int:
        return self._native.n_threads

    @property
    def n_rows(self) -> int:
        """The most rows that canvases side by side may have together."""
        return self._native.n_rows

    @property
    def sampler(self) -> str:
        """What makes the work on a step's logits: "host", "operators" or "kernels"."""
        return self._native.sampler

    @property
    def fallbacks(self) -> list[str]:
        """What a device lacks, one line for each kind of operator: the CPU does it in its place, slower."""
        return self._native.fallbacks

    def tokens(self) -> Int32Array:
        """The prefix: int32 [n_past]."""
        return self._native.tokens()

    def truncate(self, n: int) -> None:
        """Cuts the prefix to its first n tokens. Free while the sliding layers still hold the window before n; beyond
        that the kept tokens are encoded again."""
        self._native.truncate(n)

    def reset(self) -> None:
        """An empty prefix."""
        self._native.truncate(0)

    def save(self, path: StrPath) -> None:
        """Writes the prefix, tokens and cache, to a file that appears under its name only when it is whole."""
        self._native.save(path)

    def load(self, path: StrPath) -> None:
        """Replaces the prefix by a saved one of the same model and type_kv.

        Raises ModelFormatError for another file or model, ContextOverflowError when it does not fit; the prefix is
        empty then.
        """
        self._native.load(path)

    def set_lora(self, lora: Mapping[str, float] | None) -> int:
        """From here on the session runs these adapters, by name with their scales; {}: none; None: the model's own.

        Returns how many tokens of the prefix were encoded again: all, where what acts on a prompt has changed; adapters
        of the decoder alone leave the cache as it is. A canvas under way is dropped. Raises ValueError for an unknown
        name or a scale that is not finite; CancelledError can leave a shorter prefix.
        """
        return self.use(self._adapters.choose(lora))

    def use(self, adapters: Chosen) -> int:
        """The same for adapters that are chosen already."""
        if adapters.pairs == self._running.pairs:
            return 0
        encoded = set_adapters(self._native, adapters.pairs)
        self._running = adapters
        return encoded

    @property
    def lora(self) -> dict[str, float]:
        """The adapters that run, with their scales."""
        return dict(self._running.names)

    @property
    def memory(self) -> Memory:
        """Bytes by kind that this session holds."""
        return self._native.memory

    def profile(self, on: bool = True) -> None:
        """From here on operators run one at a time and are timed, from zero; or no longer. A step takes about 2 %
        longer."""
        self._native.profile(on)

    @property
    def timings(self) -> Timings:
        """Seconds of computing since `profile()`, by part: products, experts, attention, head, self-conditioning,
        sampling and other."""
        return self._native.timings

    def score(self, texts: Sequence[npt.ArrayLike]) -> list[Float64Array]:
        """Encoder mode as a causal language model: for each text (int32 [n], 1 to C ids) float64 [n], the natural log
        of the probability of each id after the prefix and the ids before it. The texts are computed side by side,
        n_rows ids at a time, and nothing is appended.

        Raises ValueError when nothing is encoded yet, for an empty text, one longer than C, an id out of range;
        ContextOverflowError where prefix and text pass n_ctx.
        """
        return self._native.score(texts)

    def collect(self, on: bool) -> None:
        """While this is on, every pass adds up the squares of what each weight matrix is multiplied by, from zero:
        what importance matrices are made of. Off: the sums are dropped."""
        self._native.collect(on)

    def importance(self) -> tuple[dict[str, Float64Array], dict[str, npt.NDArray[np.int64]]]:
        """What `collect` has added up, by tensor name, for the matrices that were met: squares float64 [n, row], and
        how many rows were summed, int64 [n]; n counts a tensor's experts, 1 for other matrices.

        Raises ValueError while nothing is collected.
        """
        squares, counts = {}, {}
        for tensor in self._model.tensors():
            if len(tensor.shape) > 1:
                n = tensor.shape[2] if len(tensor.shape) > 2 else 1
                s, c = self._native.importance(tensor.name, n, tensor.shape[0])
                if c.any():
                    squares[tensor.name], counts[tensor.name] = s, c
        return squares, counts

    # ------------------------------------------------------------------------------------------------- the canvas

    def denoise(
        self,
        canvas: npt.ArrayLike,
        self_conditioning: Float32Array | None = None,
        *,
        n_rows: int | None = None,
        rows: npt.ArrayLike | None = None,
    ) -> Float32Array:
        """One decoder pass: canvas int32 [n_rows] -> logits float32 [n_rows, V], softcapped, before temperature.

        Args:
            n_rows: 1 to C; None for C.
            rows: int32, 1 to n_rows rows of the canvas: the logits of these alone, [len(rows), V], without the time
                that the others' take; None for all.
            self_conditioning: float32 [n_rows, V], the *processed* logits (divided by the temperature) of the step
                before; None for a zero signal, as on the first step.

        Raises ValueError when nothing is encoded yet, or for arrays of another shape.
        """
        return self._native.denoise(canvas, self_conditioning, n_rows, rows)

    def sample(
        self,
        z: Float32Array,
        step: int,
        noise: Noise,
        steps: int | None = None,
        pinned: npt.ArrayLike | None = None,
        canvas_index: int = 0,
        **sampling: Unpack[ScheduleOptions],
    ) -> Step:
        """The sampler alone on logits z float32 [C, V] (softcapped, before temperature); nothing is remembered.

        Args:
            step: from 0, in order of execution.
            noise: its `uniform(canvas_index, step)` and `renoise(canvas_index, step)` are used.
            steps: N of the temperature schedule; None for the file's.
            pinned: int32 [C], the id where a row is fixed, -1 where it is free.
        """
        check_names("sample", sampling, SamplingOptions)
        options, _ = resolve_sampling(self._defaults, {"steps": steps, **sampling})
        raw = functions.sample(
            z,
            options,
            step=step,
            uniform=noise.uniform(canvas_index, step),
            renoise=noise.renoise(canvas_index, step),
            pinned=pinned,
        )
        return Step(raw.argmax, raw.accepted, raw.entropy, raw.canvas)

    def run_canvas(
        self,
        noise: Noise | None = None,
        seed: int = 0,
        canvas_index: int = 0,
        pinned: npt.ArrayLike | None = None,
        on_step: Callable[[RawStep], object] | None = None,
        trace: bool = False,
        *,
        n_rows: int | None = None,
        canvas: npt.ArrayLike | None = None,
        watched: npt.ArrayLike | None = None,
        allowed: Mapping[int, npt.ArrayLike] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Canvas:
        """Denoises one canvas behind the prefix, and appends nothing to it.

        Args:
            noise: draws of the caller; None for Philox keyed by `seed` and `canvas_index`.
            canvas_index: the `c` of noise and Philox.
            pinned: int32 [n_rows]: the id where a row is fixed, -1 where it is free. Pinned rows are written back last
                in every step, take no part in entropy budget, mean entropy or stability, and give self-conditioning
                their own embedding.
            on_step: called after each step; a true result ends the canvas there.
            trace: keep every step's Step.
            n_rows, canvas, watched, allowed: as in CanvasSpec.
            sampling: options as in `SAMPLING_OPTIONS`.

        Raises ValueError when nothing is encoded yet, an option or a pin is out of range; TypeError for an unknown
        option.
        """
        check_names("run_canvas", sampling, SamplingOptions)
        options, time_limit = resolve_sampling(self._defaults, sampling)
        spec = CanvasSpec(n_rows, pinned, canvas, watched, allowed, seed, canvas_index)
        batch = CanvasBatch(self, [spec], options, noise=noise)
        deadline = None if time_limit is None else time.monotonic() + time_limit
        steps: list[Step] = []
        while True:
            [step] = batch.step()
            if trace:
                steps.append(Step(step.argmax, step.accepted, step.entropy, step.canvas))
            stop = on_step is not None and bool(on_step(step))
            if step.finished or stop or (deadline is not None and time.monotonic() >= deadline):
                return Canvas(step.argmax, step.step + 1, step.converged, steps)

    # -------------------------------------------------------------------------------------------------------- life

    def cancel(self) -> None:
        """From any thread: the call that is running, or else the next one that computes, raises CancelledError."""
        self._native.cancel()

    def stop_when(self, wanted: Callable[[], bool] | None) -> None:
        """From here on calls that compute raise CancelledError as soon as `wanted()` is true: they ask before they
        begin, and about every 20 ms. None: they do not ask."""
        self._native.stop_when(wanted)

    @property
    def closed(self) -> bool:
        return self._native.closed

    def close(self) -> None:
        """Frees cache and buffers. Idempotent."""
        self._native.close()

    def __reduce__(self) -> str:
        raise TypeError("a session cannot be pickled or copied: save() its prefix, and load() it in another session")

    def __repr__(self) -> str:
        return "<Session (closed)>" if self.closed else f"<Session: {self.n_past} of {self.n_ctx} positions>"

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class CanvasBatch:
    """Canvases under way, side by side after one prefix: what `Session.run_canvas`, whole generations and infill step
    through. Each has the numbers that it would have alone; together they share every pass over the weights.

    Args:
        session: holds a prefix of at least one token. Any other call that computes on it ends the canvases.
        specs: one for each canvas; together they have at most `session.n_rows` rows.
        noise: draws of the caller, `c` being the spec's `canvas_index`; None for Philox.

    Raises ValueError when nothing is encoded yet, or for specs that are out of range.
    """

    def __init__(
        self, session: Session, specs: Sequence[CanvasSpec], sampling: Sampling, *, noise: Noise | None = None
    ) -> None:
        self._session = session._native
        self._canvas_length = session.config.canvas_length
        self._noise = noise
        self._step = 0
        if noise is not None:
            specs = [
                spec if spec.canvas is not None else replace(spec, canvas=noise.canvas(spec.canvas_index))
                for spec in specs
            ]
        self._specs = specs
        self._live = [True] * len(specs)
        self._rows = [spec.rows(self._canvas_length) for spec in specs]
        self._session.canvas_begin(specs, sampling)

    @property
    def finished(self) -> bool:
        """No canvas makes another step."""
        return not any(self._live)

    def step(self) -> list[RawStep]:
        """The next denoise step of every canvas that is not finished; the others keep their last RawStep. After
        CancelledError it may be repeated. Raises ValueError when all are finished."""
        draws = None
        if self._noise is not None:
            draws = [self._draws(self._noise, i) if live else None for i, live in enumerate(self._live)]
        steps = self._session.canvas_step(draws)
        self._step += 1
        self._live = [live and not step.finished for live, step in zip(self._live, steps, strict=True)]
        return steps

    def _draws(self, noise: Noise, index: int) -> tuple[npt.ArrayLike, npt.ArrayLike]:
        spec, rows = self._specs[index], self._rows[index]
        uniform, renoise = noise.uniform(spec.canvas_index, self._step), noise.renoise(spec.canvas_index, self._step)
        if rows == spec.rows(self._canvas_length):
            return uniform, renoise
        return np.asarray(uniform)[:rows], np.asarray(renoise)[:rows]

    def rows(self, index: int) -> RawStep:
        """The last step of canvas `index` again, with its arrays even where it is quiet."""
        return self._session.canvas_rows(index)

    def rules(self, index: int, pinned: npt.ArrayLike | None, masks: Mapping[int, Mask]) -> None:
        """Replaces the pins, and `allowed`, of canvas `index` between two steps: what its draws begin with stays, its
        test for stability begins anew, and one that converged in the last step goes on.

        Args:
            pinned: int32 [n_rows], -1 where a row is free; None: all are.
            masks: by row, uint32 [ceil(V / 32)]: bit k % 32 of word k // 32 is 1 where id k may be taken; other rows
                take any.

        Raises ValueError, with nothing changed, for an empty mask, a pin outside of its mask, and a canvas that makes
        no further step.
        """
        self._session.canvas_rules(index, self._rows[index], pinned, masks)

    def narrow(self, index: int, n_rows: int) -> None:
        """Rows n_rows and after leave canvas `index` for the rest of its steps, which cost less then. The other rows
        keep what they have: draws, signal, what the test for stability has seen of them.

        Raises ValueError, with nothing changed, for n_rows outside of 1 to the canvas's rows and a canvas that makes
        no further step; UnsupportedError where the sampler is "kernels".
        """
        self._session.canvas_narrow(index, n_rows)
        self._rows[index] = n_rows
        self._live[index] = True

    def drop(self, index: int) -> None:
        """Canvas `index` makes no further step: it lost, say."""
        if self._live[index]:
            self._session.canvas_drop(index)
            self._live[index] = False
