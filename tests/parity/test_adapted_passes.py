"""Adapters run beside the weights: logits against PEFT's own, unmerged, float32 on both sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from nets import Net, Report, relative_error
from peft_adapters import KINDS, adapted, save
from places import DEVICES, Place
from rebuild import model_from_gguf
from reference import (
    HandedNoise,
    Model,
    ReferenceCanvas,
    Sampling,
    reference_generate,
    reference_logits,
    takes_path,
)

from pydiffgguf import DiffusionModel, Generation
from pydiffgguf._binding.adapters import NativeAdapter, set_adapters
from pydiffgguf.convert import convert
from pydiffgguf.convert.adapter.gguf_adapter import to_gguf
from pydiffgguf.convert.adapter.opening import read_adapter

pytestmark = [
    pytest.mark.parity,
    # What PEFT says of a base that is on no hub, and of a head that is tied to the embedding.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

NETS = ("one_kv_head", "full_first", "many_experts", "alternating")
Logits = npt.NDArray[np.float32]


@cache
def reference(net: Net, kind: str) -> tuple[Model, Path]:
    """PEFT's model with an adapter of that kind, and the folder that PEFT wrote it into."""
    model = adapted(net.model, KINDS[kind], seed=len(kind))
    folder = save(model, net.checkpoint.with_name(f"{net.name}.{kind.replace(' ', '-')}"))
    return model.base_model.model, folder


@cache
def expected(net: Net, kind: str) -> tuple[Logits, Logits]:
    """Logits of a first step and of one with self-conditioning; of the bare model for kind ""."""
    model = reference(net, kind)[0] if kind else net.model
    prompt, canvas = net.ids(1, 40), net.ids(2, net.canvas_length)
    first = reference_logits(net.model, prompt, canvas)
    return (
        reference_logits(model, prompt, canvas),
        reference_logits(model, prompt, canvas, first / np.float32(0.6)),
    )


#: All kinds on all nets on the CPU; at other places one net, and what is made of different operators.
CASES = [
    (place, name, kind)
    for place in DEVICES
    for name in NETS
    for kind in KINDS
    if place == "cpu" or (name == "alternating" and kind in ("two regions", "self-conditioning", "head", "experts"))
]


@pytest.mark.parametrize(("place", "name", "kind"), CASES, indirect=["place"], scope="session")
def test_adapted_logits_are_pefts(
    net: Callable[[str], Net], place: Place, name: str, kind: str, report: Report
) -> None:
    """Relative error at most 2e-5, of what the adapter changes at most 1e-4, on the CPU's own operators and on ggml's,
    with the prompt in one piece and in sevens; scale 0 gives the bare model's bits."""
    one = net(name)
    wanted, bare = expected(one, kind), expected(one, "")
    table = read_adapter(reference(one, kind)[1])
    prompt, canvas = one.ids(1, 40), one.ids(2, one.canvas_length)
    pieces = (40, 7) if place.name == "cpu" else (40,)
    with place.open(one.gguf("f32"), type_kv="f32", n_ctx=1024, n_threads=1) as model:
        adapter = NativeAdapter(model._engine.native, table.path, "it", data=b"".join(to_gguf(table).pieces()))
        worst, effect = 0.0, 0.0
        for piece in pieces:
            for operators in (False, True) if place.name == "cpu" else (False,):
                session = model.session(ggml_operators=operators)
                for first in range(0, 40, piece):
                    session.encode(prompt[first : first + piece])
                before = [session.denoise(canvas), session.denoise(canvas, bare[0] / np.float32(0.6))]
                set_adapters(session._native, [(adapter, 1.0)])
                after = [session.denoise(canvas), session.denoise(canvas, bare[0] / np.float32(0.6))]
                worst = max(worst, *(relative_error(a, w) for a, w in zip(after, wanted, strict=True)))
                changes = zip(after, before, wanted, bare, strict=True)
                effect = max(
                    effect,
                    *(relative_error(a - b, w - x) for a, b, w, x in changes if relative_error(w, x) > 0.05),
                )
                set_adapters(session._native, [(adapter, 0.0)])
                if piece == 40:  # the prefix was encoded again in one piece: in others its last bits may differ
                    assert np.array_equal(session.denoise(canvas), before[0])
    moved = max(relative_error(w, x) for w, x in zip(wanted, bare, strict=True))
    report(f"{kind}, {name}: relative error {worst:.1e}, of the effect {effect:.1e}, which is {moved:.2f}")
    assert moved > 0.02 or (kind == "router" and name == "one_kv_head")
    assert worst <= place.tolerance
    assert effect <= 1e-4


#: Every matrix but the router's, which stays in float32.
MATRICES = r"_exps|attn_(q|k|v|output)\.|ffn_(gate|up|down)\.|self_cond_(gate|up|down)|token_embd"


def beside(one: Net, kind: str, rounds: bool) -> tuple[Logits, Logits, Logits, Logits]:
    """Logits of the net in that type, bare and adapted, and transformers' of the dequantized weights. `rounds`: whether
    this processor's level rounds activations for the type."""
    path = one.checkpoint.with_name(f"{one.name}.all-{kind}.gguf")
    convert(one.checkpoint, path, type="f32", tensor_types=[f"{MATRICES}={kind}"], allow_missing_tokenizer=True)
    base = model_from_gguf(path)
    model = adapted(base, KINDS["two regions"], seed=3)
    folder = save(model, one.checkpoint.with_name(f"beside-{kind}"))
    prompt, canvas = one.ids(1, 40), one.ids(2, one.canvas_length)
    options = {"type_kv": "f32", "n_ctx": 1024, "n_threads": 1, "n_gpu_layers": 0}
    with DiffusionModel(path, lora=[folder], **options) as opened:
        kernels = {tensor.kernel for tensor in opened.tensors() if tensor.type == kind}
        assert kernels and ("float32" not in kernels) == rounds
        ours = []
        for lora in ({}, None):
            session = opened.session(lora=lora)
            session.encode(prompt)
            ours.append(session.denoise(canvas))
    theirs = [reference_logits(each, prompt, canvas) for each in (base, model.base_model.model)]
    return ours[0], ours[1], theirs[0], theirs[1]


@pytest.mark.parametrize("kind", ["f16", "q5_1"])
def test_a_rounded_base_is_what_the_pairs_run_beside(net: Callable[[str], Net], kind: str, report: Report) -> None:
    """Types that every level multiplies in float32, so that rounded activations do not hide the pairs. The adapted
    logits are as close to PEFT's as the bare ones are to transformers', to 1e-5."""
    bare, changed, bare_wanted, wanted = beside(net("many_experts"), kind, rounds=False)
    errors = relative_error(bare, bare_wanted), relative_error(changed, wanted)
    report(f"adapter beside {kind}: relative error {errors[1]:.1e}, of the bare model {errors[0]:.1e}")
    assert errors[1] <= errors[0] + 1e-5


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_base_in_integers_is_what_the_pairs_run_beside(net: Callable[[str], Net], kind: str, report: Report) -> None:
    """What the adapter changes, against what it changes in transformers. The pairs themselves are exact in float32
    (tests/kernels/levels.cpp: to 1e-6, on every level and type). The rest is what the base loses by activations in 8
    bits, in other rows for the adapted model: 3 to 8 % of these random nets' logits, where a near tie sends a row to
    another expert. A change of 0.9 that is 0.1 off is the right one: half of it would be 0.5 off."""
    bare, changed, bare_wanted, wanted = beside(net("many_experts"), kind, rounds=True)
    moved = relative_error(wanted, bare_wanted)
    error = relative_error(changed - bare, wanted - bare_wanted)
    report(f"adapter beside {kind}: it changes {moved:.2f} of the logits, with a relative error of {error:.1e}")
    assert moved > 0.5
    assert error < 0.15
    assert relative_error(changed, wanted) < 0.1


@pytest.mark.parametrize("name", ["alternating", "full_first"])
def test_adapted_trajectories_are_pefts(walker: Callable[[str], Net], name: str, report: Report) -> None:
    """Three canvases with the same draws: every token and every count of steps, except on seeds on which transformers'
    own two attentions part."""
    one = walker(name)
    # Small factors: the walkers' nets are sharp, and a router that flips at a near tie would decide.
    model = adapted(one.model, replace(KINDS["two regions"], size=0.5), seed=5)
    folder = save(model, one.checkpoint.with_name(f"{name}.walking"))
    inner, sampling, counted = model.base_model.model, Sampling(steps=10, entropy_bound=2.0), 0
    with DiffusionModel(one.gguf("f32"), type_kv="f32", n_threads=1, n_gpu_layers=0, lora=[folder]) as opened:
        for seed in range(4):
            noise = HandedNoise(seed, one.canvas_length, one.vocab_size)
            prompt = one.ids(seed, 30)
            got = opened.generate(
                prompt.tolist(),
                noise=noise,
                max_tokens=3 * one.canvas_length,
                **{key: value for key, value in asdict(sampling).items() if value is not None},
            )

            def check(wanted: list[ReferenceCanvas], got: Generation = got) -> None:
                assert got.stats.steps == [len(canvas.steps) for canvas in wanted]
                assert got.tokens == np.concatenate([canvas.tokens for canvas in wanted]).tolist()

            way = partial(reference_generate, inner, prompt, noise, 3, sampling)
            counted += takes_path(lambda attn, way=way: way(attn=attn), check)
            bare = opened.generate(prompt.tolist(), noise=noise, lora={}, max_tokens=len(got.tokens))
            assert got.tokens != bare.tokens
    report(f"adapted trajectories, {name}: {counted} of 4 seeds counted, all equal")
    assert counted >= 3
