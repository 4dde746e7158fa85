"""The model as users meet it: open a file, generate, chat, look inside."""

from __future__ import annotations

import secrets
import sys
import threading
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy as np

from pydiffgguf._arguments import MAX_SEED, integer
from pydiffgguf._binding.library import StrPath
from pydiffgguf._binding.native import Metadata, NativeModel
from pydiffgguf._binding.records import Device, Memory, ModelConfig, Sampling, TensorInfo
from pydiffgguf._log import logger
from pydiffgguf.describe import describe
from pydiffgguf.edit import Choice, Edit, choose, edit
from pydiffgguf.errors import ModelClosedError, ModelFormatError, UnsupportedError
from pydiffgguf.generate import DenoiseStep, Event, Generation, Request, TextView, common_head, run
from pydiffgguf.infill import Fill, Infill, stream_fill, stream_infill
from pydiffgguf.search import Gap
from pydiffgguf.session import Noise, Session, resolve_sampling
from pydiffgguf.text.chat import StopStrings, render
from pydiffgguf.text.tokenizer import Tokenizer, read_tokenizer

__all__ = ["DiffusionModel", "ModelWarning", "Prompt", "demo_model_path"]

#: Text, or token ids that are used as they are.
Prompt = str | Sequence[int]

DEFAULT_MAX_TOKENS = 256

_Result = TypeVar("_Result")


class ModelWarning(UserWarning):
    """Something is odd about a file that works nevertheless; says what it costs."""


def demo_model_path() -> Path:
    """The bundled demo model: a toy that shows the machinery (docs/DEMO_MODEL.md)."""
    return Path(__file__).parent / "data" / "demo.gguf"


class DiffusionModel:
    """A DiffusionGemma GGUF file, opened.

    A model may be shared between threads. Each call that generates takes a session of its own from a small pool, so
    calls at the same time do not meet; between calls the session keeps its prefix, and the next prompt is encoded from
    where it differs.

    Args:
        path: the GGUF file; of a model in several (``NAME-00001-of-0000N.gguf``) the first, with the others beside it.
        n_ctx: positions of a session: prefix, finished canvases and the live canvas. None: the smaller of 8192 and the
            file's context_length.
        n_batch: a prompt is encoded in chunks of so many tokens.
        n_threads: None: as many as this process may use, but no more than a step of this model is worth.
        n_gpu_layers: so many layers, counted from the last, lie on devices: this machine's GPUs, where one was built
            in, and what RPC servers offer. "auto": what fits into the memory that they report free, all layers without
            their experts before any expert (docs/DEVICES.md); `devices()` and `verbose` say what came of it.
        n_cpu_moe: the experts of the first so many layers stay on the CPU; with "auto", at least these.
        tensor_split: each device's share of the layers; None: as their free memory.
        main_gpu: index in `devices()`-order of the device with the head and the sampler; None: the last.
        offload_kv: a layer's cache lies where the layer does; False: on the CPU.
        rpc: "host:port" of servers that `pydiffgguf rpc-server` runs; docs/DEVICES.md.
        sampler: what makes the work on a step's logits. "host": C++ on the CPU; "operators": ggml's, where the logits
            are; "kernels": own ones, on CUDA (and, far slower than "host", on the CPU: for tests); "auto": the last
            of these that the main device has.
        type_kv: "f16", "f32", "bf16" or "q8_0".
        cpu: the level of instructions that the CPU's own operators use, by the name that `pydiffgguf doctor` lists
            ("avx2", say); None: the best that this processor has. Answers differ between levels by rounding.
        use_mmap: map the file instead of reading it into memory.
        verbose: say on stderr what was opened and what it takes. Nothing is printed otherwise; the same goes to the
            logger "pydiffgguf".

    Raises:
        OSError: no such file, a directory, not readable; no RPC server at an address.
        ModelFormatError: not a GGUF of this architecture, or a broken one; says which key or tensor.
        UnsupportedError: GPU layers where there is no device, kernels that the main one does not have, a level that
            the processor lacks, or a file that needs what is not built.
        DeviceError: an RPC server was lost; any later call may raise it too.
        ContextOverflowError: n_ctx below canvas + 1, or beyond the file's context_length.
        ValueError, TypeError: an option out of range or of the wrong type.
    """

    def __init__(
        self,
        path: StrPath,
        *,
        n_ctx: int | None = None,
        n_batch: int = 512,
        n_threads: int | None = None,
        n_gpu_layers: int | Literal["auto"] = "auto",
        n_cpu_moe: int = 0,
        tensor_split: Sequence[float] | None = None,
        main_gpu: int | None = None,
        offload_kv: bool = True,
        rpc: Sequence[str] = (),
        sampler: str = "auto",
        type_kv: str = "f16",
        cpu: str | None = None,
        use_mmap: bool = True,
        verbose: bool = False,
    ) -> None:
        if isinstance(n_gpu_layers, str) and n_gpu_layers != "auto":
            raise ValueError(f'n_gpu_layers is {n_gpu_layers!r}: it must be "auto" or a number')
        self._session_options: dict[str, Any] = {
            "n_ctx": 0 if n_ctx is None else integer("n_ctx", n_ctx, 1, 2**31 - 1),
            "n_batch": n_batch,
            "n_threads": 0 if n_threads is None else integer("n_threads", n_threads, 1, 512),
            "type_kv": type_kv,
            "sampler": sampler,
        }
        self.path = Path(path)
        self._native = NativeModel(
            path,
            use_mmap=use_mmap,
            cpu=_level_name(cpu),
            n_gpu_layers=-1 if n_gpu_layers == "auto" else integer("n_gpu_layers", n_gpu_layers, 0, 2**31 - 1),
            n_cpu_moe=n_cpu_moe,
            tensor_split=tensor_split or (),
            main_gpu=-1 if main_gpu is None else integer("main_gpu", main_gpu, 0, 2**31 - 1),
            offload_kv=offload_kv,
            rpc=rpc,
            expected=self._session_options,
        )
        self._lock = threading.Lock()
        self._idle: list[Session] = []
        self._active: set[Session] = set()
        self._verbose = verbose
        self._announced: set[str] = set()
        self._predicted = self._native.memory(**self._session_options)
        self._tokenizer = read_tokenizer(self._native.metadata, self.config.n_vocab)
        self._view = TextView(self._tokenizer)
        logger.info("opened %s", self.path)
        for line in describe(self.path.name, self._native, self._predicted, automatic=n_gpu_layers == "auto"):
            logger.info("%s", line)
            if verbose:
                print(f"pydiffgguf: {line}", file=sys.stderr)
        for warning in self._native.warnings:
            logger.warning("%s: %s", self.path.name, warning)
            warnings.warn(f"{self.path.name}: {warning}", ModelWarning, stacklevel=2)

    @classmethod
    def from_pretrained(
        cls, repo_id: str, filename: str = "*.gguf", *, revision: str | None = None, **options: Any
    ) -> DiffusionModel:
        """Opens a model of a Hugging Face repository, downloaded into huggingface_hub's cache when it is not there; of
        a split one all parts are.

        Args:
            repo_id: "owner/repo".
            filename: a name, a pattern such as "*Q4_K_M.gguf", or a word of the name; it must match one model.
            revision: branch, tag or commit.
            options: those of the constructor.
        """
        from pydiffgguf.hub import resolve_hub

        return cls(resolve_hub(repo_id, filename, revision=revision), **options)

    # ------------------------------------------------------------------------------------------------ looking inside

    @property
    def config(self) -> ModelConfig:
        """The figures of the model, all read from the file."""
        return self._native.config

    @property
    def metadata(self) -> Metadata:
        """The file's key-value pairs."""
        return self._native.metadata

    @property
    def cpu(self) -> str:
        """The level of instructions that the CPU's own operators use; "" where the build has none."""
        return self._native.cpu

    def tensors(self) -> list[TensorInfo]:
        """All tensors of the file, in its order."""
        return self._native.tensors()

    def devices(self) -> list[Device]:
        """The devices besides the CPU that the model may lie on, and what lies there, in the order in which a pass goes
        through them; the last one has the head. Empty for a model on the CPU."""
        return self._native.devices()

    def memory(self, **options: Any) -> Memory:
        """Bytes by kind: those of the session that was made last, or what a session would take before there is one.

        Args:
            options: n_ctx, n_batch, type_kv, n_rows of the session to predict; without any, the model's own.
        """
        self._check_open()
        if options:
            return self._native.memory(**{**self._session_options, **options})
        with self._lock:
            sessions = [*self._active, *self._idle]
        return sessions[-1].memory if sessions else self._predicted

    # ---------------------------------------------------------------------------------------------------------- text

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises UnsupportedError when the file holds none."""
        if self._tokenizer is None:
            raise UnsupportedError(f"{self.path.name} holds no tokenizer: pass token ids instead of text")
        return self._tokenizer

    def tokenize(self, text: str, add_bos: bool = False, special: bool = True) -> list[int]:
        """Ids of a text. `special` False: texts of special tokens are ordinary text."""
        return self.tokenizer.encode(text, add_bos=add_bos, special=special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included; a character that is cut at the end is left out."""
        return self.tokenizer.decode(ids)

    @property
    def sampling(self) -> Sampling:
        """The file's sampler values, with the released defaults where it holds none."""
        return self._native.sampling

    @property
    def n_ctx(self) -> int:
        """Positions of a session: prefix, finished canvases and the live canvas together."""
        return self._native.n_ctx(**self._session_options)

    def _prompt_ids(self, prompt: Prompt, raw: bool) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("the prompt is empty")
            if raw or not self.chat_template:
                return self.tokenize(prompt, add_bos=self.tokenizer.add_bos)
            return self._chat_ids([{"role": "user", "content": prompt}], thinking=False)
        ids = [integer(f"prompt[{i}]", token, 0, self.config.n_vocab - 1) for i, token in enumerate(prompt)]
        if not ids:
            raise ValueError("the prompt is empty")
        return ids

    @property
    def chat_template(self) -> str | None:
        """The file's chat template, Jinja source; None where it has none. Raises ModelFormatError when it is no
        text."""
        template = self.metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise ModelFormatError("key tokenizer.chat_template is not a string")
        return template

    def _chat_text(self, messages: Sequence[Mapping[str, str]], thinking: bool) -> str:
        if not self.chat_template:
            raise UnsupportedError(f"{self.path.name} holds no chat template: use generate() with raw text")
        tokenizer = self.tokenizer
        return render(
            self.chat_template,
            messages,
            enable_thinking=thinking,
            bos_token="" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id),
            eos_token="" if tokenizer.eos_id is None else tokenizer.piece(tokenizer.eos_id),
        )

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Most templates write the bos token themselves; the model has never seen a prompt without one."""
        bos = self.tokenizer.bos_id
        return [bos, *ids] if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos] else ids

    def _chat_ids(self, messages: Sequence[Mapping[str, str]], thinking: bool) -> list[int]:
        return self._with_bos(self.tokenizer.encode(self._chat_text(messages, thinking)))

    def chat_ids_of(self, content: str) -> list[int]:
        """Ids of one user turn and the opening of the model's, in which special tokens that stand in `content` are
        ordinary text: somebody's document cannot end the turn."""
        place = "\ue000"  # private use: no template knows it
        before, found, behind = self._chat_text([{"role": "user", "content": place}], False).partition(place)
        if not found or place in behind:
            raise UnsupportedError(
                f"the chat template of {self.path.name} does not hold a user's turn once, as it stands"
            )
        encode = self.tokenizer.encode
        return self._with_bos([*encode(before), *encode(content, special=False), *encode(behind)])

    # ---------------------------------------------------------------------------------------------------- generating

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        raw: bool = False,
        noise: Noise | None = None,
        **sampling: Any,
    ) -> Generation:
        """Text from a prompt.

        Args:
            prompt: a str is one user turn through the file's chat template (plain text where the file has none, or
                with `raw`); token ids are used as they are, no bos added.
            max_tokens: cuts the result; None: 256, as the released generation config.
            seed: 64 bits; the same seed gives the same text on one build and device, for any number of threads. None:
                a fresh one, which `stats.seed` tells.
            stop: strings that end the text before them.
            noise: draws handed in, in place of the seed's.
            sampling: `steps`, `t_min`, `t_max`, `entropy_bound`, `stability_threshold`, `confidence_threshold`,
                `max_steps`, `time_limit_s`; what is not given comes from the file, then from the released config.

        Raises:
            ContextOverflowError: the prompt does not fit.
            ValueError, TypeError: an empty prompt, an option out of range, an unknown option.
        """
        ids = self._prompt_ids(prompt, raw)
        return _drain(self._stream(ids, max_tokens, seed, stop, noise, sampling, watched=False))

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        raw: bool = False,
        noise: Noise | None = None,
        **sampling: Any,
    ) -> Generator[Event, None, Generation]:
        """The same as `generate`, as events: a DenoiseStep after every step, a Block after every canvas. Closing the
        iterator cancels; its return value (StopIteration.value) is the Generation. Bad arguments raise here, not at
        the first event."""
        return self._stream(self._prompt_ids(prompt, raw), max_tokens, seed, stop, noise, sampling)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        thinking: bool = False,
        max_tokens: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        noise: Noise | None = None,
        **sampling: Any,
    ) -> Generation:
        """The model's answer to a conversation: dicts with role ("system", "user", "assistant") and content.

        `thinking` asks for the thought channel, which comes apart from the text as `reasoning`, and is never fed back:
        thoughts in earlier answers are left out. The other arguments are `generate`'s.
        """
        ids = self._chat_ids(messages, thinking)
        return _drain(self._stream(ids, max_tokens, seed, stop, noise, sampling, watched=False))

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        thinking: bool = False,
        max_tokens: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        noise: Noise | None = None,
        **sampling: Any,
    ) -> Generator[Event, None, Generation]:
        """The same as `chat`, as events; see `stream`."""
        return self._stream(self._chat_ids(messages, thinking), max_tokens, seed, stop, noise, sampling)

    def _stream(
        self,
        ids: Sequence[int],
        max_tokens: int | None,
        seed: int | None,
        stop: str | Sequence[str],
        noise: Noise | None,
        options: Mapping[str, Any],
        watched: bool = True,
    ) -> Generator[Event, None, Generation]:
        self._check_open()
        sampling, time_limit = resolve_sampling(self._native.sampling, options)
        request = Request(
            prompt=ids,
            max_tokens=integer("max_tokens", DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens, 1, 2**31 - 1),
            sampling=sampling,
            time_limit_s=time_limit,
            stop=StopStrings(stop),
            seed=secrets.randbits(64) if seed is None else integer("seed", seed, 0, MAX_SEED),
            noise=noise,
            end_ids=self._end_ids(),
            watched=watched,
        )
        return self._run(request)

    def _run(self, request: Request) -> Generator[Event, None, Generation]:
        with self.session_for(request.prompt) as session:
            return (yield from run(session, request, self._view))

    def _end_ids(self) -> frozenset[int]:
        return frozenset() if self._tokenizer is None else self._tokenizer.end_ids

    # -------------------------------------------------------------------------------------------------------- infill

    def infill(
        self,
        prefix: str,
        suffix: str,
        *,
        gap: Gap = "auto",
        min_gap: int = 0,
        max_gap: int = 128,
        n: int = 1,
        extra: Sequence[tuple[str, str]] = (),
        seed: int = 0,
        mode: str = "auto",
        heal: bool = True,
        ends: bool = True,
        **sampling: Any,
    ) -> Infill:
        """The text between a prefix and a suffix: prefix + result.text + suffix is the document.

        The prefix is encoded into the cache and kept, so that the next call with a longer one encodes only what is new;
        gap and suffix stand on the canvas. docs/INFILL.md tells what happens.

        Args:
            prefix, suffix: the text around the gap. Never changed; markup in it stays text.
            gap: tokens of the gap, or "auto": lengths from `min_gap` to `max_gap` are tried, and the causal pass over
                the fillings chooses.
            n: how many ranked candidates are wanted; there may be fewer, as none has the text of another.
            extra: (name, text) of other files, put before the prefix.
            seed: keys all draws.
            mode: "raw": the prefix as a document; "chat": the file with a marked hole in the user's turn, the answer
                opened with the prefix's tail; "auto": what the file's key diffusion.infill_mode names, else chat where
                the file has a chat template.
            heal: let the gap's first token go on with the prefix's last word where the vocabulary has such tokens.
            ends: the suffix reaches to the document's end; False where it was cut.
            sampling: as in `generate`; `time_limit_s` returns the best so far.

        Raises:
            ValueError, TypeError: a gap of 0, an empty suffix with gap="auto", an option out of range or unknown.
            ContextOverflowError: what cannot fit n_ctx, however much context is left out.
            UnsupportedError: the file holds no tokenizer.
        """
        return _drain(
            self.stream_infill(
                prefix,
                suffix,
                gap=gap,
                min_gap=min_gap,
                max_gap=max_gap,
                n=n,
                extra=extra,
                seed=seed,
                mode=mode,
                heal=heal,
                ends=ends,
                **sampling,
            )
        )

    def stream_infill(
        self,
        prefix: str,
        suffix: str,
        *,
        gap: Gap = "auto",
        min_gap: int = 0,
        max_gap: int = 128,
        n: int = 1,
        extra: Sequence[tuple[str, str]] = (),
        seed: int = 0,
        mode: str = "auto",
        heal: bool = True,
        ends: bool = True,
        **sampling: Any,
    ) -> Generator[DenoiseStep, None, Infill]:
        """The same as `infill`, as events: a DenoiseStep after every denoise pass, of the candidate that looks best;
        its `pinned` tells free rows from fixed ones, its `text` is the gap's draft. Closing the iterator cancels; its
        return value is the Infill. Bad arguments raise here, not at the first event."""
        self._check_open()
        return stream_infill(
            self,
            prefix,
            suffix,
            gap=gap,
            min_gap=min_gap,
            max_gap=max_gap,
            n=n,
            extra=extra,
            seed=seed,
            mode=mode,
            heal=heal,
            ends=ends,
            sampling=sampling,
        )

    def fill(
        self,
        template: str,
        *,
        min_gap: int = 0,
        max_gap: int = 128,
        extra: Sequence[tuple[str, str]] = (),
        seed: int = 0,
        mode: str = "auto",
        heal: bool = True,
        ends: bool = True,
        **sampling: Any,
    ) -> Fill:
        """Many gaps in one text, from left to right, each marked ``<gap/>``, ``<gap max=8/>``, ``<gap min=2 max=8/>``
        or ``<gap len=3/>``; lengths in tokens. ``<\\gap/>`` stands for the text ``<gap/>``. Where an earlier gap is
        filled, later ones are free rows on the canvas.

        The arguments are those of `infill`; `min_gap` and `max_gap` hold where a marker says nothing.

        Raises ValueError for a template without a gap, one that ends with a gap of unknown length, two gaps that touch,
        an attribute that is unknown or contradicts another; and what `infill` raises.
        """
        return _drain(
            self.stream_fill(
                template,
                min_gap=min_gap,
                max_gap=max_gap,
                extra=extra,
                seed=seed,
                mode=mode,
                heal=heal,
                ends=ends,
                **sampling,
            )
        )

    def stream_fill(
        self,
        template: str,
        *,
        min_gap: int = 0,
        max_gap: int = 128,
        extra: Sequence[tuple[str, str]] = (),
        seed: int = 0,
        mode: str = "auto",
        heal: bool = True,
        ends: bool = True,
        **sampling: Any,
    ) -> Generator[DenoiseStep, None, Fill]:
        """The same as `fill`, as the events of one gap after the other; its return value is the Fill."""
        self._check_open()
        return stream_fill(
            self,
            template,
            min_gap=min_gap,
            max_gap=max_gap,
            extra=extra,
            seed=seed,
            mode=mode,
            heal=heal,
            ends=ends,
            sampling=sampling,
        )

    def edit(
        self, text: str, spans: Sequence[tuple[int, int]], *, strength: float = 1.0, seed: int = 0, **sampling: Any
    ) -> Edit:
        """Spans of a text written anew, all else pinned. A span keeps its number of tokens.

        Args:
            spans: (start, end) in characters; they must not overlap.
            strength: in (0, 1]: the share of a span's tokens that starts as random ids; the rest starts as it stands,
                and may change as well.

        Raises ValueError for spans that are empty, overlap or leave the text; TypeError for an unknown option;
        CancelledError after `cancel()`.
        """
        self._check_open()
        return edit(self, text, spans, strength=strength, seed=seed, **sampling)

    def choose(self, template: str, slots: Mapping[str, Sequence[str]], *, draws: int = 4, seed: int = 0) -> Choice:
        """Probabilities of given options: a dict, for each slot, of option -> probability, which sum to 1 over the
        slot's options; its `stats` say what it cost.

        Each slot stands in the template once, as ``<name/>``. One denoise step is made for each option and draw, side
        by side: the option's log-probability under the first step's logits, its tokens taken as independent, the other
        slots being noise; the mean of the probabilities over the draws, normalised.

        Raises ValueError for an unknown slot, one without options, a marker that is missing or stands twice;
        ContextOverflowError for slots that do not lie within one canvas, or text before them that does not fit into
        n_ctx; CancelledError after `cancel()`.
        """
        self._check_open()
        return choose(self, template, slots, draws=draws, seed=seed)

    # ------------------------------------------------------------------------------------------------------ sessions

    def session(
        self, *, n_rows: int | None = None, ggml_operators: bool = False, sampler: str | None = None
    ) -> Session:
        """A session of its own, for tests, research and embedders; with the options that the model was opened with.

        Args:
            n_rows: the most rows that canvases side by side may have together; None for the canvas length C, which is
                the least. The buffers grow with it: a row takes V logits and its part of the largest layer.
            ggml_operators: compute with ggml's operators alone, as devices other than the CPU do: slower, and with
                other last bits.
            sampler: as in the constructor; None: the model's.

        Raises OutOfMemoryError when its cache or buffers are refused.
        """
        self._check_open()
        rows = 0 if n_rows is None else integer("n_rows", n_rows, self.config.canvas_length, 2**16)
        options = self._session_options | ({} if sampler is None else {"sampler": sampler})
        session = Session(self._native, **options, n_rows=rows, ggml_operators=ggml_operators)
        logger.debug("session: n_ctx %d, %d threads, %s", session.n_ctx, session.n_threads, session.memory)
        for line in session.fallbacks:
            if line not in self._announced:
                self._announced.add(line)
                logger.warning("%s: %s: the CPU does it, slower", self.path.name, line)
                if self._verbose:
                    print(f"pydiffgguf: {line}: the CPU does it, slower", file=sys.stderr)
        return session

    @contextmanager
    def session_for(self, prompt: Sequence[int]) -> Iterator[Session]:
        """An idle session, the one that shares the longest head with the prompt, or a new one."""
        ids = np.asarray(prompt, dtype=np.int32)
        with self._lock:
            self._check_open()
            self._idle.sort(key=lambda session: common_head(session, ids))
            session = self._idle.pop() if self._idle else None
            if session is not None:
                self._active.add(session)
        if session is None:
            session = self.session()
            with self._lock:
                self._active.add(session)
        try:
            self._check_open()  # close() cancels what it finds in _active: it may have looked while this one was made
            yield session
        finally:
            with self._lock:
                self._active.discard(session)
                # One is kept for the next call; more would hold memory that nobody asked for.
                keep = not self._idle and not self._native.closed
                if keep:
                    session._native.clear_cancel()
                    self._idle.append(session)
            if not keep:
                session.close()

    def cancel(self) -> None:
        """From any thread: what this model is generating ends within one operator of the graph, with finish_reason
        "cancelled" and the canvases that were finished."""
        # Under the lock: a session that has gone back to the pool meanwhile would carry the request into a later call.
        with self._lock:
            for session in self._active:
                session.cancel()

    # ---------------------------------------------------------------------------------------------------------- life

    def _check_open(self) -> None:
        if self._native.closed:
            raise ModelClosedError(f"{self.path.name} is closed")

    @property
    def closed(self) -> bool:
        return self._native.closed

    def close(self) -> None:
        """Cancels what is running and lets go of the file. Idempotent; every later call raises ModelClosedError.
        Sessions made by `session()` go on until they are closed."""
        with self._lock:
            if not self._native.closed:
                logger.info("closed %s", self.path)
            self._native.close()
            idle, self._idle = self._idle, []
        self.cancel()
        for session in idle:
            session.close()

    def __enter__(self) -> DiffusionModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<DiffusionModel {self.path.name}{' (closed)' if self.closed else ''}>"


def _drain(stream: Generator[Event, None, _Result]) -> _Result:
    while True:
        try:
            next(stream)
        except StopIteration as end:
            result: _Result = end.value
            return result


def _level_name(cpu: str | None) -> str:
    if cpu is None:
        return ""
    if not isinstance(cpu, str):
        raise TypeError(f"cpu must be a level's name or None, not {type(cpu).__name__}")
    if not cpu or "\0" in cpu:
        raise ValueError(f"cpu is {cpu!r}: it must be a level's name, as `pydiffgguf doctor` lists them, or None")
    return cpu
