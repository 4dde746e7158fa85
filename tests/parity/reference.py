"""The reference: transformers' own DiffusionGemma, driven with randomness that a test hands in.

Four ways in:

- `reference_logits`: one encode (or two) and one denoise pass;
- `reference_generate`: transformers' own `generate()`, its three random draws replaced, every step recorded;
- `pinned_loop`: the same loop written out in plain Python on top of the model, with pinned rows, rows that may take
  some ids only, and canvases of any length, none of which transformers has. Without them it must walk `generate()`'s
  path (tests/parity/test_reference.py);
- `causal_logits`: the encoder as a causal language model.

Shapes: C is the canvas length, V the vocabulary size, P the length of the prefix. Ids are int32 outside of torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)

from pydiffgguf.cli.compare import cache_keyword

Ids = npt.NDArray[np.int32]
Model = DiffusionGemmaForBlockDiffusion


class Noise(Protocol):
    """Everything random that a generation uses; `c` counts canvases, `step` counts from 0 in order of execution."""

    def canvas(self, c: int) -> Ids: ...
    def uniform(self, c: int, step: int) -> npt.NDArray[np.float64]: ...
    def renoise(self, c: int, step: int) -> Ids: ...


class HandedNoise:
    """Draws that depend on (seed, c, step) and on nothing else: numpy's Philox with those as its counter.

    The generator is numpy's (Philox4x64), on purpose not the engine's own, so nothing can agree by sharing a mistake.
    """

    def __init__(self, seed: int, canvas_length: int, vocab_size: int) -> None:
        self.seed, self.canvas_length, self.vocab_size = seed, canvas_length, vocab_size

    def _generator(self, stream: int, c: int, step: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, 0], counter=[0, step, c, stream]))

    def canvas(self, c: int) -> Ids:
        """The canvas to start from, int32 [C], uniform over the vocabulary."""
        return self._generator(0, c, 0).integers(self.vocab_size, size=self.canvas_length, dtype=np.int32)

    def uniform(self, c: int, step: int) -> npt.NDArray[np.float64]:
        """One u in [0, 1) per row, float64 [C]: the inverse-CDF draw of this step."""
        return self._generator(1, c, step).random(self.canvas_length)

    def renoise(self, c: int, step: int) -> Ids:
        """The ids for rows that are not accepted in this step, int32 [C]."""
        return self._generator(2, c, step).integers(self.vocab_size, size=self.canvas_length, dtype=np.int32)


@dataclass(frozen=True)
class Sampling:
    """The entropy-bound sampler's options, by the names this project gives them; the defaults are the released ones."""

    steps: int = 48
    t_min: float = 0.4
    t_max: float = 0.8
    entropy_bound: float = 0.1
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    max_steps: int | None = None

    def temperature(self, step: int) -> float:
        """The temperature of the step that is executed as number `step`, from 0."""
        return self.t_min + (self.t_max - self.t_min) * (self.steps - step) / self.steps


@dataclass
class ReferenceStep:
    """One denoise step. All arrays have C rows; entropies are in nats at the step's temperature."""

    argmax: Ids
    accepted: npt.NDArray[np.bool_]
    entropy: npt.NDArray[np.float32]
    canvas_before: Ids
    canvas: Ids  # after accepting and renoising: the next step's input
    processed: npt.NDArray[np.float32] | None = None  # [C, V] softcapped logits over temperature, where asked for


@dataclass
class ReferenceCanvas:
    """One canvas: where it started, and its steps. The finished canvas is the last step's argmax."""

    initial: Ids
    steps: list[ReferenceStep] = field(default_factory=list)

    @property
    def tokens(self) -> Ids:
        return self.steps[-1].argmax


def load_reference(checkpoint: Path) -> Model:
    """A checkpoint folder as transformers' model, in float32 and in eval mode."""
    return DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint, dtype=torch.float32).eval()


def ids_tensor(ids: Sequence[int] | Ids) -> torch.Tensor:
    """Ids as the int64 [1, n] that transformers takes."""
    return torch.as_tensor(np.asarray(ids, dtype=np.int64)).reshape(1, -1)


def ids_array(tensor: torch.Tensor) -> Ids:
    return tensor.detach().reshape(-1).numpy().astype(np.int32)


@contextlib.contextmanager
def attention(model: Model, implementation: str) -> Iterator[None]:
    """Runs a block under transformers' "eager" or "sdpa" attention. The two differ by float32 rounding alone."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def without_inductor() -> Iterator[None]:
    """Keeps `generate()` from importing torch's inductor at every step to mark a CUDA graph that no CPU has: five
    seconds, and a DeprecationWarning."""
    with patch.object(torch.compiler, "cudagraph_mark_step_begin", lambda: None):
        yield


def inverse_cdf(probs: torch.Tensor, u: npt.NDArray[np.float64]) -> torch.Tensor:
    """Per row, the first id, ascending, whose cumulative probability exceeds u; summed in float64.

    probs: float [C, V], rows summing to 1 up to rounding, which is divided out. Returns int64 [C]. Where rounding
    leaves the whole sum at or below u, the last id with any probability is drawn.
    """
    cumulative = probs.double().cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]
    drawn = (cumulative <= torch.as_tensor(u)[:, None]).sum(-1)
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(-1)
    return torch.minimum(drawn, last)


def entropy_of(processed: torch.Tensor) -> torch.Tensor:
    """Entropy of softmax(processed) per row, in nats, by the operators that transformers' sampler uses."""
    return torch.distributions.Categorical(logits=processed, validate_args=False).entropy()


class ReferencePrefix:
    """A prefix in transformers' cache, and the decoder on top of it: what a session is on this side."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.cached: dict[str, Any] = {cache_keyword(): self.cache}

    @property
    def n_past(self) -> int:
        return int(self.cache.get_seq_length())

    @torch.no_grad()
    def encode(self, ids: Sequence[int] | Ids) -> torch.Tensor:
        """Appends ids to the prefix, prepared as `generate()` does it. Returns the last hidden state [n, hidden]."""
        encoder = self.model.model.encoder
        tokens = ids_tensor(ids)
        total = self.n_past + tokens.shape[1]
        positions = torch.arange(self.n_past, total).unsqueeze(0)
        masks = encoder.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=torch.empty((1, tokens.shape[1], 0), dtype=self.model.dtype),
            attention_mask=torch.ones((1, total), dtype=torch.bool),
            position_ids=positions,
            **self.cached,
        )
        out = encoder(input_ids=tokens, attention_mask=masks, position_ids=positions, **self.cached)
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    @torch.no_grad()
    def denoise(self, canvas: Sequence[int] | Ids, self_conditioning: torch.Tensor | None = None) -> torch.Tensor:
        """canvas [C] -> softcapped logits float32 [C, V]; self_conditioning: processed logits [C, V] or None."""
        out = self.model(
            decoder_input_ids=ids_tensor(canvas),
            **self.cached,
            self_conditioning_logits=None if self_conditioning is None else self_conditioning[None],
        )
        logits: torch.Tensor = out.logits[0]
        return logits


def reference_logits(
    model: Model,
    prompt_ids: Sequence[int] | Ids,
    canvas: Sequence[int] | Ids,
    sc_logits: npt.NDArray[np.float32] | None = None,
    *,
    attn: str = "sdpa",
    prompt2: Sequence[int] | Ids | None = None,
) -> npt.NDArray[np.float32]:
    """Logits [C, V] of one decoder pass after encoding `prompt_ids`, and `prompt2` behind it in a second pass."""
    with attention(model, attn):
        prefix = ReferencePrefix(model)
        prefix.encode(prompt_ids)
        if prompt2 is not None:
            prefix.encode(prompt2)
        logits = prefix.denoise(canvas, None if sc_logits is None else torch.from_numpy(sc_logits))
    array: npt.NDArray[np.float32] = logits.numpy()
    return array


class _Draws:
    """Stands in for torch.randint and torch.multinomial while `generate()` runs, and insists on being called.

    `generate()` draws one canvas in `_prepare_denoiser_inputs`, then one multinomial and one renoise canvas in each
    `_denoising_step`. Whoever calls in another order, shape or number is an error: transformers has changed then, and
    the comparison would no longer be one.
    """

    def __init__(self, model: Model, noise: Noise, steps: int, keep_processed: bool) -> None:
        self.model, self.noise, self.n_steps, self.keep_processed = model, noise, steps, keep_processed
        self.vocab_size = model.config.text_config.vocab_size
        self.canvas_length = model.config.canvas_length
        self.canvases: list[ReferenceCanvas] = []
        self.step: int | None = None  # None while a canvas is prepared
        self.hits: list[str] | None = None  # None outside of the two patched methods
        self._prepare = model._prepare_denoiser_inputs
        self._denoise = model._denoising_step

    def randint(self, *, low: int, high: int, size: tuple[int, int], device: torch.device) -> torch.Tensor:
        assert self.hits is not None, "generate() draws a canvas in a place this test does not know"
        assert (low, high, size) == (0, self.vocab_size, (1, self.canvas_length))
        self.hits.append("randint")
        c = len(self.canvases) if self.step is None else len(self.canvases) - 1
        return ids_tensor(self.noise.canvas(c) if self.step is None else self.noise.renoise(c, self.step))

    def multinomial(self, probs: torch.Tensor, *, num_samples: int) -> torch.Tensor:
        assert self.hits is not None and self.step is not None, "generate() draws tokens outside of a denoise step"
        assert num_samples == 1 and tuple(probs.shape) == (self.canvas_length, self.vocab_size)
        self.hits.append("multinomial")
        return inverse_cdf(probs, self.noise.uniform(len(self.canvases) - 1, self.step)).unsqueeze(-1)

    def prepare_denoiser_inputs(self, **kwargs: Any) -> Any:
        self.step, self.hits = None, []
        prepared = self._prepare(**kwargs)
        assert self.hits == ["randint"], f"one canvas draw was expected, got {self.hits}"
        self.hits = None
        self.canvases.append(ReferenceCanvas(initial=ids_array(prepared[0])))
        return prepared

    def denoising_step(self, **kwargs: Any) -> Any:
        self.step, self.hits = self.n_steps - int(kwargs["cur_step"]), []
        assert self.step == len(self.canvases[-1].steps)
        before = ids_array(kwargs["current_canvas"])
        out = self._denoise(**kwargs)
        assert self.hits == ["multinomial", "randint"], f"two draws were expected, got {self.hits}"
        self.hits = None
        canvas, argmax, processed, _ = out
        self.canvases[-1].steps.append(
            ReferenceStep(
                argmax=ids_array(argmax),
                accepted=kwargs["sampler"].accepted_token_mask[0].numpy().copy(),
                entropy=entropy_of(processed[0]).numpy(),
                canvas_before=before,
                canvas=ids_array(canvas),
                processed=processed[0].numpy().copy() if self.keep_processed else None,
            )
        )
        return out


def reference_generate(
    model: Model,
    ids: Sequence[int] | Ids,
    noise: Noise,
    n_canvases: int,
    sampling: Sampling | None = None,
    *,
    eos_token_ids: Sequence[int] = (),
    attn: str = "sdpa",
    keep_processed: bool = False,
) -> list[ReferenceCanvas]:
    """transformers' own `generate()` with its draws handed in; the recorded canvases, at most `n_canvases`.

    Fewer come back when a finished canvas holds one of `eos_token_ids`. `keep_processed` keeps every step's processed
    logits. The patches are gone when this returns or raises, and each of them has been hit, or AssertionError.
    """
    sampling = sampling or Sampling()
    assert sampling.max_steps is None, "transformers has no max_steps"
    config = DiffusionGemmaGenerationConfig(
        max_new_tokens=n_canvases * model.config.canvas_length,
        max_denoising_steps=sampling.steps,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=float(sampling.entropy_bound)),
        t_min=sampling.t_min,
        t_max=sampling.t_max,
        stability_threshold=sampling.stability_threshold,
        confidence_threshold=float(sampling.confidence_threshold),
        eos_token_id=list(eos_token_ids) or None,
        disable_compile=True,
    )
    draws = _Draws(model, noise, sampling.steps, keep_processed)
    # The checkpoint's own generation config would fill what is None here, the end tokens above all.
    with (
        attention(model, attn),
        without_inductor(),
        patch.object(model, "generation_config", DiffusionGemmaGenerationConfig()),
        patch.object(model, "_prepare_denoiser_inputs", draws.prepare_denoiser_inputs),
        patch.object(model, "_denoising_step", draws.denoising_step),
        patch.object(torch, "randint", draws.randint),
        patch.object(torch, "multinomial", draws.multinomial),
    ):
        out = model.generate(ids_tensor(ids), generation_config=config)
    assert draws.canvases and all(canvas.steps for canvas in draws.canvases), "the patched draws were never used"
    generated = out.sequences[0, len(ids) :]
    assert generated.shape[0] == len(draws.canvases) * model.config.canvas_length
    if not eos_token_ids:
        assert np.array_equal(ids_array(generated), np.concatenate([canvas.tokens for canvas in draws.canvases]))
    return draws.canvases


def same_path(a: Sequence[ReferenceCanvas], b: Sequence[ReferenceCanvas]) -> bool:
    """Whether two runs took the same way: canvases, steps, argmax canvases and accepted rows all equal."""
    return len(a) == len(b) and all(
        len(x.steps) == len(y.steps)
        and all(
            np.array_equal(p.argmax, q.argmax)
            and np.array_equal(p.accepted, q.accepted)
            and np.array_equal(p.canvas, q.canvas)
            for p, q in zip(x.steps, y.steps, strict=True)
        )
        for x, y in zip(a, b, strict=True)
    )


def causal_logits(model: Model, prefix_ids: Sequence[int] | Ids, text: Sequence[int] | Ids) -> torch.Tensor:
    """Softcapped logits float32 [len(text), V]: row i is for text[i], after the prefix and the ids before it.

    The model's own head on the encoder's hidden states: transformers has it on the decoder only, its weights are tied.
    """
    prefix = ReferencePrefix(model)
    hidden = torch.cat([prefix.encode(prefix_ids)[-1:], prefix.encode(text)[:-1]])
    cap = model.final_logit_softcapping
    with torch.no_grad():
        logits: torch.Tensor = torch.tanh(model.lm_head(hidden).float() / cap) * cap
    return logits


def accept_rows(entropy: torch.Tensor, free: torch.Tensor, bound: float) -> torch.Tensor:
    """The rows that the entropy bound accepts, bool [C]: of the free rows, by rising entropy, those before which the
    summed entropy is at most `bound` nats. The first is always among them."""
    accepted = torch.zeros_like(free)
    spent = 0.0
    for row in sorted(torch.nonzero(free).flatten().tolist(), key=lambda i: (float(entropy[i]), i)):
        if spent > bound:
            break
        accepted[row] = True
        spent += float(entropy[row])
    return accepted


def pinned_loop(
    prefix: ReferencePrefix,
    noise: Noise,
    pinned: Ids | None = None,
    sampling: Sampling | None = None,
    *,
    canvas_index: int = 0,
    allowed: Mapping[int, Sequence[int]] | None = None,
    keep_processed: bool = False,
) -> ReferenceCanvas:
    """One canvas, denoised by a plain loop, with pinned rows; it has as many rows as `noise.canvas` gives.

    pinned: int32 [C], the id where a row is fixed and -1 where it is free. A pinned row holds its id on every canvas,
    takes no part in the entropy budget, the mean entropy or the stability test, and feeds itself as a one-hot to the
    self-conditioning. It reports accepted False, entropy 0 and its id as the argmax.
    allowed: row -> the only ids that it may take: all others have logits of -inf before anything else is done with
    them. A renoised row gets what was drawn all the same, or its only id. The first canvas is taken as it is handed in.
    """
    sampling = sampling or Sampling()
    first = noise.canvas(canvas_index)
    allowed = allowed or {}
    pins = torch.full((len(first),), -1) if pinned is None else ids_tensor(pinned)[0]
    free = pins < 0
    canvas = torch.where(free, ids_tensor(first)[0], pins)
    run = ReferenceCanvas(initial=ids_array(canvas))
    fed_back: torch.Tensor | None = None  # no signal at all in the first step, not even from the pinned rows
    cap = sampling.steps if sampling.max_steps is None else min(sampling.steps, sampling.max_steps)
    for step in range(cap):
        before = canvas
        processed = prefix.denoise(ids_array(canvas), fed_back) / sampling.temperature(step)
        fresh = ids_tensor(noise.renoise(canvas_index, step))[0]
        for row, ids in allowed.items():
            kept = processed[row, list(ids)]
            processed[row] = -torch.inf
            processed[row, list(ids)] = kept
            if len(ids) == 1:
                fresh[row] = ids[0]
        argmax = torch.where(free, processed.argmax(-1), pins)
        entropy = torch.where(free, entropy_of(processed), 0.0)
        drawn = inverse_cdf(processed.softmax(-1), noise.uniform(canvas_index, step))
        accepted = accept_rows(entropy, free, sampling.entropy_bound)
        canvas = torch.where(accepted, drawn, fresh)
        canvas = torch.where(free, canvas, pins)

        fed_back = processed.clone()
        fed_back[~free] = -torch.inf
        fed_back[~free, pins[~free]] = 0.0

        run.steps.append(
            ReferenceStep(
                argmax=ids_array(argmax),
                accepted=accepted.numpy(),
                entropy=entropy.numpy(),
                canvas_before=ids_array(before),
                canvas=ids_array(canvas),
                processed=fed_back.numpy() if keep_processed else None,
            )
        )
        earlier = run.steps[-1 - sampling.stability_threshold : -1] if sampling.stability_threshold else []
        stable = len(earlier) == sampling.stability_threshold and all(
            np.array_equal(past.argmax, run.steps[-1].argmax) for past in earlier
        )
        mean = float(entropy[free].mean()) if bool(free.any()) else 0.0
        if stable and mean < sampling.confidence_threshold:
            break
    return run


def takes_path(path: Callable[[str], list[ReferenceCanvas]], check: Callable[[list[ReferenceCanvas]], None]) -> bool:
    """Holds a run to the reference's: `path` gives the reference's canvases under an attention by name, `check` fails
    where they are not this engine's. Returns whether the run counts: False where it took another way and rounding
    decides, since transformers' own eager and sdpa runs part there. The eager run is made for that alone."""
    sdpa = path("sdpa")
    try:
        check(sdpa)
    except AssertionError:
        if same_path(path("eager"), sdpa):
            raise
        return False
    return True
