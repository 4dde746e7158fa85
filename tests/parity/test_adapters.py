"""Adapters run beside the weights: logits against PEFT's own, unmerged, float32 on both sides."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from nets import Net, Report, relative_error
from peft_adapters import KINDS, adapted, save
from places import DEVICES, Place
from reference import Model, reference_logits

from pydiffgguf._binding.adapters import NativeAdapter, set_adapters
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
