"""The measuring stick itself: transformers driven with handed-in draws does what it would have done with its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from nets import Net, relative_error
from reference import (
    HandedNoise,
    Ids,
    ReferencePrefix,
    Sampling,
    accept_rows,
    inverse_cdf,
    pinned_loop,
    reference_generate,
    reference_logits,
    same_path,
    without_inductor,
)
from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationConfig

pytestmark = pytest.mark.parity

QUICK = Sampling(steps=8, entropy_bound=3.0, confidence_threshold=0.3)


def handed(net: Net, seed: int) -> HandedNoise:
    return HandedNoise(seed, net.canvas_length, net.vocab_size)


def test_handed_noise_depends_on_seed_canvas_and_step_alone() -> None:
    """The same draw whenever it is asked for, another one for every other seed, canvas, step and kind."""
    noise = HandedNoise(3, 64, 1000)
    assert np.array_equal(noise.uniform(1, 2), HandedNoise(3, 64, 1000).uniform(1, 2))
    draws = [noise.canvas(0), noise.canvas(1), noise.renoise(0, 0), noise.renoise(0, 1), noise.renoise(1, 0)]
    draws += [HandedNoise(4, 64, 1000).canvas(0)]
    assert len({tuple(d.tolist()) for d in draws}) == len(draws)
    assert all(d.dtype == np.int32 and d.min() >= 0 and d.max() < 1000 for d in draws)
    u = noise.uniform(0, 0)
    assert u.dtype == np.float64 and u.min() >= 0 and u.max() < 1


def test_inverse_cdf_draws_the_first_id_whose_cumulative_probability_exceeds_u() -> None:
    """On a row of [1/4, 0, 1/2, 1/4, 0]: u equal to a cumulative probability belongs to the next id, and ids without
    probability are never drawn."""
    row = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]])
    us = np.array([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53])
    assert inverse_cdf(row.repeat(6, 1), us).tolist() == [0, 0, 2, 2, 3, 3]


def test_inverse_cdf_has_the_frequencies_of_multinomial() -> None:
    """100,000 draws: within five standard deviations of every probability."""
    probs = torch.softmax(torch.randn(1, 37, generator=torch.Generator().manual_seed(0)) * 2, -1)
    n = 100_000
    drawn = inverse_cdf(probs.expand(n, -1), np.random.default_rng(0).random(n))
    p = probs[0].double().numpy()
    counts = np.bincount(drawn.numpy(), minlength=37)
    assert (np.abs(counts - n * p) < 5 * np.sqrt(n * p * (1 - p)) + 1).all()


def test_patches_are_undone_and_generate_is_itself_again(walker: Callable[[str], Net]) -> None:
    """After a driven run the model and torch are as before, also when the noise raised in the middle."""
    net = walker("one_kv_head")
    before = (torch.randint, torch.multinomial, net.model.generation_config, dict(vars(net.model)))
    reference_generate(net.model, net.ids(0, 9), handed(net, 0), 1, QUICK)

    class Broken(HandedNoise):
        def uniform(self, c: int, step: int) -> np.ndarray:
            raise RuntimeError("no more randomness")

    with pytest.raises(RuntimeError, match="no more randomness"):
        reference_generate(net.model, net.ids(0, 9), Broken(0, net.canvas_length, net.vocab_size), 1, QUICK)
    after = (torch.randint, torch.multinomial, net.model.generation_config, dict(vars(net.model)))
    assert before == after


def test_a_draw_that_is_not_hit_is_an_error(walker: Callable[[str], Net], monkeypatch: pytest.MonkeyPatch) -> None:
    """Were transformers to draw its canvases in another way, the driver would notice."""
    net = walker("one_kv_head")
    canvas = torch.zeros(1, net.canvas_length, dtype=torch.long)
    sampler = "transformers.models.diffusion_gemma.generation_diffusion_gemma.EntropyBoundSampler.initialize_canvas"
    monkeypatch.setattr(sampler, lambda self, batch_size, device: canvas)
    with pytest.raises(AssertionError, match="one canvas draw was expected"):
        reference_generate(net.model, net.ids(0, 9), handed(net, 0), 1, QUICK)


def test_driven_generate_equals_free_generate_on_the_same_draws(walker: Callable[[str], Net]) -> None:
    """Record what transformers draws for itself, hand the very same draws in, and get the very same sequence.

    torch.multinomial's own draw becomes a u in the middle of the interval that its token has.
    """
    net = walker("one_kv_head")
    prompt = net.ids(1, 20)
    own_randint, own_multinomial = torch.randint, torch.multinomial
    ids: list[Ids] = []
    us: list[np.ndarray] = []

    def recording_randint(*args: object, **kwargs: object) -> torch.Tensor:
        drawn: torch.Tensor = own_randint(*args, **kwargs)  # type: ignore[call-overload]
        ids.append(drawn[0].numpy().astype(np.int32))
        return drawn

    def recording_multinomial(probs: torch.Tensor, num_samples: int) -> torch.Tensor:
        drawn = own_multinomial(probs, num_samples)
        p = probs.double() / probs.double().sum(-1, keepdim=True)
        upto = p.cumsum(-1).gather(-1, drawn)
        us.append((upto - 0.5 * p.gather(-1, drawn))[:, 0].numpy())
        return drawn

    torch.manual_seed(5)
    config = DiffusionGemmaGenerationConfig(
        max_new_tokens=2 * net.canvas_length,
        max_denoising_steps=QUICK.steps,
        sampler_config={"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": QUICK.entropy_bound},
        t_min=QUICK.t_min,
        t_max=QUICK.t_max,
        stability_threshold=QUICK.stability_threshold,
        confidence_threshold=QUICK.confidence_threshold,
    )
    with without_inductor(), pytest.MonkeyPatch.context() as patches:
        patches.setattr(torch, "randint", recording_randint)
        patches.setattr(torch, "multinomial", recording_multinomial)
        free = net.model.generate(torch.tensor([prompt.tolist()]), generation_config=config).sequences[0, 20:]

    class Replay(HandedNoise):
        def canvas(self, c: int) -> Ids:
            return ids.pop(0)

        def uniform(self, c: int, step: int) -> np.ndarray:
            return us.pop(0)

        def renoise(self, c: int, step: int) -> Ids:
            return ids.pop(0)

    driven = reference_generate(net.model, prompt, Replay(0, 0, 0), 2, QUICK)
    assert not ids and not us
    assert np.concatenate([canvas.tokens for canvas in driven]).tolist() == free.tolist()


@pytest.mark.parametrize("name", ["one_kv_head", "alternating"])
def test_pinned_loop_without_pins_walks_generates_path(walker: Callable[[str], Net], name: str) -> None:
    """Two independent writings of the loop: transformers' `generate()`, and the plain one that knows pinned rows."""
    net = walker(name)
    prefix = ReferencePrefix(net.model)
    prefix.encode(net.ids(2, 30))
    plain = []
    for c in range(2):
        plain.append(pinned_loop(prefix, handed(net, 2), None, QUICK, canvas_index=c))
        prefix.encode(plain[-1].tokens)
    assert same_path(plain, reference_generate(net.model, net.ids(2, 30), handed(net, 2), 2, QUICK))


def test_prefix_encoded_in_two_passes_equals_one(net: Callable[[str], Net]) -> None:
    """The reference's own second pass (a finished canvas) against one prompt, beyond and within the window."""
    for name in ("one_kv_head", "full_first"):
        n = net(name)
        prompt, canvas = n.ids(1, 70), n.ids(2, n.canvas_length)
        whole = reference_logits(n.model, prompt, canvas)
        assert relative_error(reference_logits(n.model, prompt[:40], canvas, prompt2=prompt[40:]), whole) < 5e-6


def test_accept_rows_on_a_worked_example() -> None:
    """Entropies .04 .5 .07 .02 and bound .1: sorted .02 .04 .07 .5 with .0 .02 .06 .13 spent before; three pass."""
    entropy, free = torch.tensor([0.04, 0.5, 0.07, 0.02]), torch.ones(4, dtype=torch.bool)
    assert accept_rows(entropy, free, 0.1).tolist() == [True, False, True, True]
    assert accept_rows(entropy, free, 0.0).tolist() == [False, False, False, True]
    assert accept_rows(entropy, torch.tensor([True, True, False, False]), 0.01).tolist() == [True, False, False, False]
    assert accept_rows(entropy, ~free, 1.0).tolist() == [False] * 4
