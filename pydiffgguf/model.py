"""The model as users meet it: open a file, generate, chat, look inside."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from pydiffgguf._arguments import flag, integer
from pydiffgguf._binding.file import Metadata
from pydiffgguf._binding.functions import memory_available
from pydiffgguf._binding.library import StrPath
from pydiffgguf._binding.records import Device, Memory, ModelConfig, Sampling, TensorInfo
from pydiffgguf._log import logger
from pydiffgguf.chat import chat_prompt
from pydiffgguf.completions import CompletionStream, create_chat_completion, create_completion
from pydiffgguf.edit import Choice, Edit, choose, edit
from pydiffgguf.engine.adapters import Adapter, AdapterSource, Region, bytes_of, find_all
from pydiffgguf.engine.adapters import find as find_adapter
from pydiffgguf.engine.call import Stream, drain
from pydiffgguf.engine.conversation import load_cache, read_messages, save_conversation
from pydiffgguf.engine.core import Engine
from pydiffgguf.engine.describe import describe, too_large
from pydiffgguf.engine.opening import find, model_options, open_native, session_options
from pydiffgguf.engine.options import (
    Cancel,
    ChatOptions,
    EditOptions,
    FillOptions,
    GenerateOptions,
    InfillOptions,
    KvType,
    ModelOptions,
    Progress,
    Prompt,
    SamplerName,
    SessionOptions,
    check_names,
)
from pydiffgguf.generate import DenoiseStep, Event, Generation, Prefill, stream_ids
from pydiffgguf.infill import Fill, Infill, stream_fill, stream_infill
from pydiffgguf.read import Reading, read
from pydiffgguf.session import Session
from pydiffgguf.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DiffusionModel", "ModelWarning"]


class ModelWarning(UserWarning):
    """Something is odd about a file that works nevertheless; says what it costs."""


class DiffusionModel:
    """A DiffusionGemma GGUF file, opened.

    A model may be shared between threads. Each call that generates takes a session of its own from a small pool, so
    calls at the same time do not meet. Between calls a session keeps its prefix; the next call takes the session that
    has the most in common with its prompt, and encodes the prompt from where it differs.

    Args:
        path: the GGUF file, or the first of several (``NAME-00001-of-0000N.gguf``), with the others in the same folder.
            Or ``hf:OWNER/REPO[:PATTERN]``, as for `from_pretrained`.
        n_ctx: positions of a session: prefix, finished canvases and the live canvas. None: the smaller of 8192 and the
            file's context_length.
        n_batch: a prompt is encoded in chunks of this many tokens.
        n_threads: CPU threads. None: all that this process may use, or fewer for a very small model, which more threads
            would slow down.
        n_gpu_layers: how many layers to put on GPUs (this machine's, or those of RPC servers), counted from the last.
            "auto" puts as many there as fit into free memory, the attention and dense parts of all layers before any
            expert (docs/DEVICES.md); "all" and -1 put all there. `devices()` and `verbose` say what came of it.
        n_cpu_moe: the experts of this many first layers stay on the CPU; with "auto", at least these.
        tensor_split: each device's share of the layers; None: in proportion to their free memory.
        main_gpu: index in `devices()`-order of the device with the head and the sampler; None: the last.
        offload_kv: True puts a layer's cache where the layer is, False on the CPU.
        signal_copy: True holds the embedding once more on the main device, transposed, in half precision: 2 bytes a
            weight, for steps that move fewer bytes where ggml's operators make the self-conditioning signal
            (docs/DEVICES.md). Refused where the head is on the CPU.
        rpc: "host:port" of servers that `pydiffgguf rpc-server` runs; docs/DEVICES.md.
        sampler: what makes the work on a step's logits. "host": C++ on the CPU; "operators": ggml's, where the logits
            are; "kernels": own ones, on CUDA; "auto": the last of these that the main device has.
        type_kv: "f16", "f32", "bf16" or "q8_0".
        cpu: the level of instructions that the CPU's own operators use, by the name that `pydiffgguf doctor` lists
            ("avx2", say); None: the best that this processor has. Answers differ between levels by rounding.
        use_mmap: map the file instead of reading it into memory.
        n_sessions: how many prefixes are kept between calls, each with a cache and buffers of its own. Two let a chat
            and an autocompleter take turns without reading their texts again; the second is made when it is needed.
            More calls than that at a time wait for each other.
        lora: adapters to load, paths or (path, scale): PEFT folders, GGUF adapters, or ``hf:OWNER/REPO[:SUBFOLDER]``.
            They run beside the weights in every call that does not say otherwise (docs/ADAPTERS.md).
        progress: called with a `Progress` while a file is downloaded and opened, on the thread that works.
        verbose: say on stderr what was opened and how much memory it takes. The logger "pydiffgguf" has it too.

    Raises:
        OSError: no such file, a directory, not readable; no RPC server at an address.
        ModelFormatError: not a GGUF of this architecture, or a broken one; says which key or tensor.
        UnsupportedError: GPU layers where there is no device, kernels that the main one does not have, a signal_copy
            where the head is on the CPU, a level that the processor lacks, or a file that needs what is not built.
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
        n_gpu_layers: int | Literal["auto", "all"] = "auto",
        n_cpu_moe: int = 0,
        tensor_split: Sequence[float] | None = None,
        main_gpu: int | None = None,
        offload_kv: bool = True,
        signal_copy: bool = False,
        rpc: Sequence[str] = (),
        sampler: SamplerName = "auto",
        type_kv: KvType = "f16",
        cpu: str | None = None,
        use_mmap: bool = True,
        n_sessions: int = 2,
        progress: Callable[[Progress], object] | None = None,
        lora: Sequence[AdapterSource] = (),
        verbose: bool = False,
    ) -> None:
        options = session_options(n_ctx, n_batch, n_threads, type_kv, sampler)
        placing = model_options(
            n_gpu_layers, n_cpu_moe, tensor_split, main_gpu, offload_kv, signal_copy, rpc, cpu, use_mmap
        )
        integer("n_sessions", n_sessions, 1, 1024)
        flag("verbose", verbose)
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be a function of one argument, but is {progress!r:.60}")
        self.path = find(path, progress)
        adapters = find_all(lora)
        if n_gpu_layers == "auto":
            placing["adapters"] = bytes_of(adapters)
        native = open_native(self.path, placing, options, progress)
        name = self.path.name
        self._predicted = native.memory(**options)
        self._engine = Engine(native, name, options, n_sessions=n_sessions, verbose=verbose)
        for adapter in adapters:
            self._engine.adapters.load(adapter)
        logger.info("opened %s", self.path)
        for line in describe(name, native, self._predicted, automatic=n_gpu_layers == "auto"):
            logger.info("%s", line)
            if verbose:
                print(f"pydiffgguf: {line}", file=sys.stderr)
        fault = self._engine.prompts.tokenizer_fault
        m = self._predicted
        large = too_large(
            sum(prod(tensor.shape) for tensor in native.tensors()),
            m.weights - m.weights_on_devices,
            m.kv_cache + m.compute + m.logits,
            memory_available(),
        )
        for warning in [*native.warnings, *(text for text in (fault, large) if text is not None)]:
            logger.warning("%s: %s", name, warning)
            warnings.warn(f"{name}: {warning}", ModelWarning, stacklevel=2)

    if not TYPE_CHECKING:

        @functools.wraps(__init__)
        def __new__(cls, *arguments: Any, **options: Any) -> Any:
            # Python's own message for an unknown keyword cannot say what another library's option is called here.
            check_names("DiffusionModel", options, ModelOptions, also=("path",))
            return super().__new__(cls)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str = "*",
        *,
        revision: str | None = None,
        cache_dir: StrPath | None = None,
        token: bool | str | None = None,
        local_files_only: bool = False,
        **options: Unpack[ModelOptions],
    ) -> DiffusionModel:
        """Opens a model of a Hugging Face repository, downloaded into huggingface_hub's cache when it is not there; of
        a split one all parts are.

        Args:
            repo_id: "owner/repo".
            filename: a name, a pattern such as "*Q4_K_M.gguf", or a word of the name; it must match one model.
            revision: branch, tag or commit.
            cache_dir: where the cache is; None: huggingface_hub's.
            token: of a private or gated repository; None: that of `hf auth login` or HF_TOKEN, False: none.
            local_files_only: take it from the cache, and ask nobody.
            options: those of the constructor.
        """
        from pydiffgguf.hub import Access, resolve_hub

        folder = None if cache_dir is None else os.fspath(cache_dir)
        offline = flag("local_files_only", local_files_only)
        access = Access(revision, folder, token, offline, options.get("progress"))
        return cls(resolve_hub(repo_id, filename, access), **options)

    # ------------------------------------------------------------------------------------------------ looking inside

    @property
    def config(self) -> ModelConfig:
        """The figures of the model, all read from the file."""
        return self._engine.native.config

    @property
    def metadata(self) -> Metadata:
        """The file's key-value pairs."""
        return self._engine.native.metadata

    @property
    def cpu(self) -> str:
        """The level of instructions that the CPU's own operators use; "" where the build has none."""
        return self._engine.native.cpu

    def tensors(self) -> list[TensorInfo]:
        """All tensors of the file, in its order."""
        return self._engine.native.tensors()

    def devices(self) -> list[Device]:
        """The devices besides the CPU that the model may be on, and what is there, in the order in which a pass goes
        through them; the last one has the head. Empty for a model on the CPU."""
        return self._engine.native.devices()

    def memory(self, **options: Unpack[SessionOptions]) -> Memory:
        """Bytes by kind: the weights, the adapters that are loaded, and what the sessions of this model's calls hold;
        before the first, what one will take.

        Args:
            options: n_ctx, n_batch, type_kv, n_rows of one session to predict, beside the model's own.

        Raises TypeError for another option.
        """
        check_names("memory", options, SessionOptions)
        self._engine.check_open()
        if options:
            return self._engine.native.memory(**{**self._engine.session.options, **options})
        sessions = [session.memory for session in self._engine.pool.sessions()] or [self._predicted]
        return replace(Memory.together(sessions), adapters=self._engine.adapters.n_bytes)

    # ---------------------------------------------------------------------------------------------------------- text

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises UnsupportedError when the file holds none."""
        return self._engine.tokenizer

    def tokenize(self, text: str, add_bos: bool = False, special: bool = True) -> list[int]:
        """Ids of a text. `special` False: texts of special tokens are ordinary text."""
        return self._engine.tokenizer.encode(text, add_bos=add_bos, special=special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included; a character that is cut at the end is left out."""
        n = self.config.n_vocab
        return self._engine.tokenizer.decode([integer(f"ids[{i}]", id_, 0, n - 1) for i, id_ in enumerate(ids)])

    @property
    def sampling(self) -> Sampling:
        """The file's sampler values, with the released defaults where it holds none."""
        return self._engine.sampling

    @property
    def n_ctx(self) -> int:
        """Positions of a session: prefix, finished canvases and the live canvas together."""
        return self._engine.n_ctx

    @property
    def chat_template(self) -> str | None:
        """The file's chat template, Jinja source; None where it has none. Raises ModelFormatError when it is no
        text."""
        return self._engine.prompts.template

    # ---------------------------------------------------------------------------------------------------- generating

    def generate(self, prompt: Prompt, *, raw: bool = False, **options: Unpack[GenerateOptions]) -> Generation:
        """Text from a prompt.

        Args:
            prompt: a str is one user turn through the file's chat template (plain text where the file has none, or
                with `raw`); token ids are used as they are, no bos added.
            raw: leave out the chat template.
            max_tokens: cuts the result; None: 256, as the released generation config.
            canvas_length: rows of a canvas, fewer than the file's for short answers: a step costs less, and an answer
                that does not end goes on in the next canvas. Outside of how the model was trained. None: the file's.
            narrow: rows behind an end token that has stayed at its place for two steps, except the first 8 of them,
                leave the canvas for the rest of its steps, which cost less then. Outside of how the model was trained,
                and not to be had beside a constraint. False by default.
            seed: 64 bits; the same seed gives the same text on one build and device, for any number of threads. None
                or -1: a fresh one, which `stats.seed` tells.
            stop: a string, or several, that end the text before them.
            settle: rows at a canvas's head whose draw was accepted, and which stayed the same, for this many steps are
                pinned. Streams tell their text in a Block of its own, ahead of the canvas's end. None: no row is.
            noise: draws handed in, in place of the seed's.
            lora: adapters of this call, by name with their scales, and no others; {}: none; None: those of the model.
            cancel: an object with `is_set()`, such as a threading.Event. Once it is true, the call ends with what there
                is and finish_reason "cancelled".
            response_format, regex, grammar, choices: what the answer must be, one of them (docs/STRUCTURED.md).
            options: also `steps`, `t_min`, `t_max`, `entropy_bound`, `stability_threshold`, `confidence_threshold`,
                `max_steps`, `time_limit_s`; what is not given comes from the file, then from the released config.

        Raises:
            ContextOverflowError: the prompt does not fit.
            ValueError, TypeError: an empty prompt, an option out of range, an unknown option.
        """
        return drain(self._generate("generate", prompt, raw, options, watched=False))

    def stream(
        self, prompt: Prompt, *, raw: bool = False, **options: Unpack[GenerateOptions]
    ) -> Stream[Event, Generation]:
        """The same as `generate`, as events: Prefill while the prompt is read, a DenoiseStep after every step, a Block
        after every canvas. The result is in the stream's `result`. Bad arguments raise here, not at the first event."""
        return self._generate("stream", prompt, raw, options)

    def astream(
        self, prompt: Prompt, *, raw: bool = False, **options: Unpack[GenerateOptions]
    ) -> Stream[Event, Generation]:
        """The same as `stream`, for ``async for`` (which takes the other streams as well): each event is computed on
        another thread. Cancelling the task cancels the call, and no other."""
        return self._generate("astream", prompt, raw, options)

    def _generate(
        self, call: str, prompt: Prompt, raw: bool, options: GenerateOptions, watched: bool = True
    ) -> Stream[Event, Generation]:
        check_names(call, options, GenerateOptions, also=("raw",))
        self._engine.check_open()
        return stream_ids(self._engine, self._engine.prompts.of(prompt, flag("raw", raw)), options, watched=watched)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]) -> Generation:
        """The model's answer to a conversation, whose last message of the assistant, if it ends with one, the answer
        goes on with.

        Args:
            messages: as the OpenAI API has them: dicts with role ("system", "developer", "user", "assistant", "tool"),
                content (a str, a list of text parts, or None beside tool_calls), tool_calls, tool_call_id. Control
                tokens that contents spell stay text; thoughts in earlier answers are left out (docs/CHAT.md).
            thinking: True asks for the thought channel, which comes apart from the text as `reasoning`; a number: of so
                many tokens at most, its markers among them.
            tools: functions that the model may call, as the OpenAI API has them; calls come in `tool_calls`.
            tool_choice: "auto" (the default), "none", "required", or the dict of one function.
            options: also `generate`'s.

        Raises:
            TypeError, ValueError: a message or a tool of no known form, with its path, and what `generate` raises.
            UnsupportedError: image parts; a file without a chat template, or with one that knows no tools.
        """
        return drain(self._chat("chat", messages, options, watched=False))

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
    ) -> Stream[Event, Generation]:
        """The same as `chat`, as events; see `stream`."""
        return self._chat("stream_chat", messages, options)

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]) -> list[int]:
        """The prompt that `chat` makes of a conversation: token ids, with the opening of the model's turn. The options
        that matter are `thinking`, `tools` and `tool_choice`."""
        check_names("chat_tokens", options, ChatOptions)
        self._engine.check_open()
        return chat_prompt(self._engine.prompts, messages, options).ids

    def create_chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, stream: bool = False, **options: Any
    ) -> dict[str, Any] | CompletionStream:
        """`chat` with the dictionaries of the OpenAI API, as llama-cpp-python has it: a ``chat.completion``, or with
        `stream` an iterator over its chunks (docs/OPENAI.md).

        Args:
            messages: as in `chat`.
            logprobs: True: each token's log-probability in the last step of its canvas.
            frames: True: a chunk with the draft after each denoise step, too.
            reasoning_effort: "none" or "minimal" for no thoughts, else with them; or `thinking`.
            stream_options: {"include_usage": True} for a last chunk with the usage.
            model: the name in the reply; None: the file's.
            options: also `chat`'s, with max_completion_tokens as another name of max_tokens. Those of next-token
                samplers (temperature, top_p, ...) have no effect, which an OptionWarning tells.

        Raises what `chat` raises; UnsupportedError for a field that would change the reply and cannot be had.
        """
        self._engine.check_open()
        return create_chat_completion(self._engine, messages, flag("stream", stream), options)

    def create_completion(
        self, prompt: Prompt, *, suffix: str | None = None, stream: bool = False, **options: Any
    ) -> dict[str, Any] | CompletionStream:
        """Text that follows a prompt, or fills the gap before a `suffix`, with the dictionaries of the OpenAI API.

        Args:
            prompt: plain text, without the chat template, or token ids.
            suffix: the text behind a gap: then `infill` writes it, of at most max_tokens tokens.
            echo: True: the reply's text begins with the prompt.
            logprobs: True or 1: each token's log-probability in the last step of its canvas.
            options: also those of `create_chat_completion` that are no chat's, and with a suffix `infill`'s.
        """
        self._engine.check_open()
        return create_completion(self._engine, prompt, suffix, flag("stream", stream), options)

    def save_conversation(
        self, path: StrPath, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
    ) -> bool:
        """Writes a conversation to a file (JSON, which only the owner may read), and what the model has read of it to
        another beside it, NAME.cache. Returns whether there was anything to write there.

        Args:
            options: as given to `chat`; those that matter are `thinking` and `tools`.
        """
        return save_conversation(self._engine, path, messages, self.chat_tokens(messages, **options))

    def load_conversation(self, path: StrPath, **options: Unpack[ChatOptions]) -> list[dict[str, Any]]:
        """The messages of a saved conversation, to hand to `chat` with the next one. Where the cache beside the file is
        this model's, they are not read again; where it is not, a line in the log says so.

        Raises OSError and ValueError for a file that cannot be read, or holds no conversation.
        """
        messages = read_messages(path)
        load_cache(self._engine, path, self.chat_tokens(messages, **options))
        return messages

    def _chat(
        self, call: str, messages: Sequence[Mapping[str, Any]], options: ChatOptions, watched: bool = True
    ) -> Stream[Event, Generation]:
        check_names(call, options, ChatOptions)
        self._engine.check_open()
        prompt = chat_prompt(self._engine.prompts, messages, options)
        return stream_ids(
            self._engine,
            prompt.ids,
            options,
            thought_tokens=prompt.thought_tokens,
            forced=prompt.forced,
            watched=watched,
        )

    # -------------------------------------------------------------------------------------------------------- infill

    def infill(self, prefix: str, suffix: str, **options: Unpack[InfillOptions]) -> Infill:
        """The text between a prefix and a suffix: prefix + result.text + suffix is the document.

        The prefix is encoded into the cache and kept, so that the next call with a longer one encodes only what is new;
        gap and suffix are on the canvas. docs/INFILL.md says what happens.

        Args:
            prefix, suffix: the text around the gap. Never changed; markup in it stays text. Either may be empty. The
                result has the line ends that most of the lines around it have.
            gap: tokens of the gap, or "auto" (the default): lengths from `min_gap` (0) to `max_gap` (128) are tried,
                and the causal pass over the fillings chooses. With an empty suffix the text goes on to its end.
            until: where a text without a suffix ends: "line", "block" (before the first line with less indentation, or
                the first empty line of a text that has none), or "end" (the default), where the model ends it; after
                `max_gap` tokens at the latest, with finish_reason "length".
            n: how many ranked candidates are wanted (1); there may be fewer, as none has the text of another.
            extra: (name, text) of other files, put before the prefix.
            seed: keys all draws (0); None or -1: a fresh one.
            mode: "raw": the prefix as a document; "chat": the file with a marked hole in the user's turn, the answer
                opened with the prefix's tail; "auto" (the default): what the file's key diffusion.infill_mode names,
                else chat where the file has a chat template.
            heal: let the gap's first token go on with the prefix's last word where the vocabulary has such tokens
                (True).
            ends: the suffix reaches to the document's end (True); False where it was cut.
            cancel, lora: as in `generate`.
            options: also `generate`'s sampling options; `time_limit_s` returns the best so far.

        Raises:
            ValueError, TypeError: a gap of 0, an option out of range or unknown, `until` where a suffix follows.
            ContextOverflowError: what cannot fit n_ctx, however much context is left out.
            UnsupportedError: the file holds no tokenizer.
        """
        return drain(self._infill("infill", prefix, suffix, options))

    def stream_infill(
        self, prefix: str, suffix: str, **options: Unpack[InfillOptions]
    ) -> Stream[Prefill | DenoiseStep, Infill]:
        """The same as `infill`, as events: Prefill while the prompt is read, then a DenoiseStep after every denoise
        pass, of the candidate that looks best; its `pinned` tells free rows from fixed ones, its `text` is the gap's
        draft. The result is in the stream's `result`. Bad arguments raise here, not at the first event."""
        return self._infill("stream_infill", prefix, suffix, options)

    def _infill(
        self, call: str, prefix: str, suffix: str, options: InfillOptions
    ) -> Stream[Prefill | DenoiseStep, Infill]:
        check_names(call, options, InfillOptions)
        self._engine.check_open()
        return stream_infill(self._engine, prefix, suffix, options)

    def fill(self, template: str, **options: Unpack[FillOptions]) -> Fill:
        """Many gaps in one text, from left to right, each marked ``<gap/>``, ``<gap max=8/>``, ``<gap min=2 max=8/>``
        or ``<gap len=3/>``; lengths in tokens. ``<\\gap/>`` is the text ``<gap/>``. Where an earlier gap is
        filled, later ones are free rows on the canvas.

        The options are those of `infill`; `min_gap` and `max_gap` hold where a marker says nothing.

        Raises ValueError for a template without a gap, two gaps that touch, an attribute that is unknown or contradicts
        another; and what `infill` raises.
        """
        return drain(self._fill("fill", template, options))

    def stream_fill(self, template: str, **options: Unpack[FillOptions]) -> Stream[Prefill | DenoiseStep, Fill]:
        """The same as `fill`, as the events of one gap after the other; the Fill is in the stream's `result`."""
        return self._fill("stream_fill", template, options)

    def _fill(self, call: str, template: str, options: FillOptions) -> Stream[Prefill | DenoiseStep, Fill]:
        check_names(call, options, FillOptions)
        self._engine.check_open()
        return stream_fill(self._engine, template, options)

    def edit(self, text: str, spans: Sequence[tuple[int, int]], **options: Unpack[EditOptions]) -> Edit:
        """Spans of a text written anew, all else pinned. A span keeps its number of tokens.

        Args:
            spans: (start, end) in characters; they must not overlap.
            strength: in (0, 1], 1 by default: the share of a span's tokens that starts as random ids; the rest starts
                as it is, and may change as well.
            seed: keys all draws (0); None or -1: a fresh one.
            options: also `cancel` and `lora`, and `generate`'s sampling options.

        Raises ValueError for spans that are empty, overlap or leave the text; TypeError for an unknown option;
        CancelledError when it was cancelled.
        """
        check_names("edit", options, EditOptions)
        self._engine.check_open()
        return edit(self._engine, text, spans, options)

    def choose(
        self,
        template: str,
        slots: Mapping[str, Sequence[str]],
        *,
        draws: int = 4,
        seed: int | None = 0,
        cancel: Cancel | None = None,
        lora: Mapping[str, float] | None = None,
    ) -> Choice:
        """Probabilities of given options: a dict, for each slot, of option -> probability, which sum to 1 over the
        slot's options; its `stats` say what it cost.

        Each slot is in the template once, as ``<name/>``. One denoise step is made for each option and draw, side
        by side: the option's log-probability under the first step's logits, its tokens taken as independent, the other
        slots being noise; the mean of the probabilities over the draws, normalised.

        Raises ValueError for an unknown slot, one without options, a marker that is missing or there twice;
        ContextOverflowError for slots that do not lie within one canvas, or text before them that does not fit into
        n_ctx; CancelledError when it was cancelled.
        """
        self._engine.check_open()
        return choose(self._engine, template, slots, draws=draws, seed=seed, cancel=cancel, lora=lora)

    # ------------------------------------------------------------------------------------------------------ adapters

    def load_lora(
        self, path: StrPath, name: str | None = None, scale: float = 1.0, region: Region | None = None
    ) -> Adapter:
        """Loads an adapter; from then on it runs beside the weights in every call that does not say otherwise.

        Args:
            path: a PEFT folder, a GGUF adapter, or ``hf:OWNER/REPO[:SUBFOLDER]``.
            name: what calls name it by; None: the file's or folder's.
            scale: what it is multiplied by, where a call does not say: any finite number. `Adapter.scale` changes it.
            region: "decoder", "encoder" or "both": where it acts, whatever it says itself.

        Raises:
            OSError: no such file or folder.
            ModelFormatError: a broken adapter, or one for another model; says which tensor.
            UnsupportedError: another method than plain LoRA (docs/ADAPTERS.md lists them).
            ValueError: a name that is taken; a region for an adapter with a set for each mode.
        """
        self._engine.check_open()
        return self._engine.adapters.load(find_adapter(path, name, scale), region)

    def unload_lora(self, name: str) -> None:
        """Forgets an adapter. Calls under way keep it. Raises ValueError for a name that is not loaded."""
        self._engine.check_open()
        self._engine.adapters.unload(name)

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The loaded adapters by name, in the order in which they were loaded."""
        return self._engine.adapters

    def read(
        self,
        state: str | Mapping[str, Any] | Sequence[Any],
        questions: Mapping[str, Mapping[str, Any]],
        *,
        steps: int = 1,
        samples: int | None = None,
        sequential: bool = False,
        think: int = 0,
        seed: int | None = 0,
        cancel: Cancel | None = None,
        lora: Mapping[str, float] | None = None,
    ) -> Reading:
        """Typed questions about a state, answered by probabilities that are read off the canvas: nothing is written
        (docs/READ.md).

        Args:
            state: text, or a JSON value.
            questions: by id: type "noul" (or "boolean"), "choice", "score" or "number"; instructions; criteria: what
                true and false mean, the choices with their descriptions, or the levels, the lowest first; for a number
                minimum and maximum; depends_on: ids that are answered before and in sight.
            steps: denoise steps before the probabilities are read, the reading one among them.
            samples: draws of the canvas's noise that are averaged; None: one, and three more where it is unsure.
            sequential: one question after the other, each in sight of the answers before it.
            think: tokens of a thought before the answers; 0: none.
            seed: keys all draws (0); None or -1: a fresh one.
            cancel, lora: as in `generate`.

        Returns a dict of Answer by id, whose `stats` say what it cost.

        Raises ValueError and TypeError for a question of no known form; ContextOverflowError where the questions do not
        fit n_ctx; UnsupportedError for more choices than the vocabulary has labels; CancelledError when it was
        cancelled.
        """
        self._engine.check_open()
        return read(
            self._engine,
            state,
            questions,
            steps=steps,
            samples=samples,
            sequential=flag("sequential", sequential),
            think=think,
            seed=seed,
            cancel=cancel,
            lora=lora,
        )

    # ------------------------------------------------------------------------------------------------------ sessions

    def session(
        self,
        *,
        n_rows: int | None = None,
        ggml_operators: bool = False,
        sampler: SamplerName | None = None,
        lora: Mapping[str, float] | None = None,
    ) -> Session:
        """A session of its own, for tests, research and embedders; with the options that the model was opened with.

        Args:
            n_rows: the most rows that canvases side by side may have together; None for the canvas length C, which is
                the least. The buffers grow with it: a row takes V logits and its part of the largest layer.
            ggml_operators: compute with ggml's operators alone, as devices other than the CPU do: slower, and with
                other last bits.
            sampler: as in the constructor; None: the model's.
            lora: as in `generate`; `Session.set_lora` changes it.

        Raises OutOfMemoryError when its cache or buffers are refused.
        """
        self._engine.check_open()
        options: dict[str, Any] = {} if sampler is None else {"sampler": sampler}
        rows = 0 if n_rows is None else integer("n_rows", n_rows, self.config.canvas_length, 2**16)
        chosen = self._engine.adapters.choose(lora)
        session = self._engine.session(**options, n_rows=rows, ggml_operators=ggml_operators)
        session.use(chosen)
        return session

    def cancel(self) -> None:
        """From any thread: all that this model is generating ends, with finish_reason "cancelled" and the canvases that
        were finished. To end one call, use its stream's `cancel()` or its option `cancel`."""
        self._engine.pool.cancel()

    # ---------------------------------------------------------------------------------------------------------- life

    @property
    def closed(self) -> bool:
        return self._engine.native.closed

    def close(self) -> None:
        """Cancels what is running and lets go of the file. Idempotent; every later call raises ModelClosedError.
        Sessions made by `session()` go on until they are closed."""
        if not self.closed:
            logger.info("closed %s", self.path)
        self._engine.close()

    def __enter__(self) -> DiffusionModel:
        self._engine.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> str:
        raise TypeError(
            "a model cannot be pickled or copied: hand on its path, and open it in each process with "
            f"DiffusionModel({str(self.path)!r})"
        )

    def __repr__(self) -> str:
        return f"<DiffusionModel {self.path.name}{' (closed)' if self.closed else ''}>"
