"""One adapter as a table: which matrix, in which mode, which two factors, times what.

The engine adds `scale * B (A x)` to what a matrix makes of x. A region says in which passes: "encoder" (the prompt and
finished canvases), "decoder" (every denoise step) or "both".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from pydiffgguf.errors import ModelFormatError

Floats = npt.NDArray[np.float32]

REGIONS = ("both", "decoder", "encoder")

# The matrices that a pair may adapt, without "blk.N." and ".weight", and the class that reports count them in. Gate and
# up of the experts are one matrix in some files and two in others.
LAYER_TARGETS: dict[str, str] = {
    **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), "attention"),
    **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), "dense FFN"),
    "ffn_gate_inp": "router",
    **dict.fromkeys(("ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), "experts"),
}
GLOBAL_TARGETS: dict[str, str] = {
    **dict.fromkeys(("self_cond_gate", "self_cond_up", "self_cond_down"), "self-conditioning"),
    "output": "head",
}

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Pair:
    """One matrix's two factors.

    `target`: "blk.3.attn_q", "self_cond_gate", "output". `a` float32 [r, in] and `b` float32 [out, r]; of experts
    [E, r, in] and [E, out, r]. `scale`: what B (A x) is multiplied by, alpha / r as a rule. `kind`: the type that the
    factors are stored in, whose values float32 holds exactly. `key`: the name that they have where they come from.
    """

    target: str
    region: str
    a: Floats
    b: Floats
    scale: float
    kind: GGMLQuantizationType
    key: str

    @property
    def rank(self) -> int:
        return int(self.a.shape[-2])

    @property
    def has_region(self) -> bool:
        """Whether a target's name takes a region: self-conditioning is the decoder's, the head is where logits
        are."""
        return self.target.startswith("blk.")

    @property
    def n_values(self) -> int:
        return int(self.a.size + self.b.size)


@dataclass(frozen=True)
class Adapter:
    """One adapter as it was read. `pairs`: those that act, in the file's order. `base`: the name of the model that it
    was trained on, where that is known. `n_zero`: pairs left out because B is zero. `notes`: what else was left out."""

    name: str
    path: Path
    pairs: tuple[Pair, ...]
    base: str | None = None
    n_zero: int = 0
    notes: tuple[str, ...] = ()

    @property
    def regions(self) -> tuple[str, ...]:
        """Those of the layers' pairs, in the order of REGIONS."""
        found = {pair.region for pair in self.pairs if pair.has_region}
        return tuple(region for region in REGIONS if region in found)


def kind_of(target: str) -> str | None:
    """The class of a target; None for any other name."""
    layer = _LAYER.fullmatch(target)
    return LAYER_TARGETS.get(layer[2]) if layer else GLOBAL_TARGETS.get(target)


def is_experts(target: str) -> bool:
    return target.endswith("_exps")


def finish(
    name: str,
    path: Path,
    pairs: Sequence[Pair],
    *,
    base: str | None = None,
    notes: Sequence[str] = (),
) -> Adapter:
    """The adapter of these pairs: checked, without those that do nothing, two equal sets as one for both modes.

    ModelFormatError for values that are not finite, a rank of 0, two pairs for one matrix in one mode, and for an
    adapter of which nothing is left.
    """
    check_unique(name, pairs)
    for pair in pairs:
        if not (np.isfinite(pair.a).all() and np.isfinite(pair.b).all() and np.isfinite(pair.scale)):
            raise ModelFormatError(f"{name}: {pair.key} holds values that are not finite")
    acting = [pair for pair in pairs if pair.b.any() and pair.a.any() and pair.scale]
    if not acting:
        raise ModelFormatError(f"{name}: holds nothing that acts on this model")
    return Adapter(name, path, tuple(merge_equal(acting)), base, len(pairs) - len(acting), tuple(notes))


def check_unique(name: str, pairs: Sequence[Pair]) -> None:
    """ModelFormatError where two pairs adapt one matrix in one mode."""
    taken: dict[tuple[str, str], str] = {}
    for pair in pairs:
        for mode in ("decoder", "encoder") if pair.region == "both" else (pair.region,):
            other = taken.setdefault((pair.target, mode), pair.key)
            if other != pair.key:
                raise ModelFormatError(f"{name}: {other} and {pair.key} both adapt {pair.target}")


def merge_equal(pairs: Sequence[Pair]) -> list[Pair]:
    """Decoder and encoder sets that are equal bit for bit, as a model with tied factors trains them, as one set."""
    sets: Mapping[str, dict[str, Pair]] = defaultdict(dict)
    for pair in pairs:
        if pair.has_region:
            sets[pair.region][pair.target] = pair
    decoder, encoder = sets["decoder"], sets["encoder"]
    if not decoder or decoder.keys() != encoder.keys() or not all(same(decoder[t], encoder[t]) for t in decoder):
        return list(pairs)
    return [
        replace(pair, region="both") if pair.region == "decoder" and pair.has_region else pair
        for pair in pairs
        if not (pair.region == "encoder" and pair.has_region)
    ]


def same(x: Pair, y: Pair) -> bool:
    return x.scale == y.scale and x.kind == y.kind and np.array_equal(x.a, y.a) and np.array_equal(x.b, y.b)


def with_region(adapter: Adapter, region: str) -> Adapter:
    """The adapter with its layers' pairs acting in this region instead. ValueError for an adapter of two regions."""
    if region not in REGIONS:
        raise ValueError(f"region is {region!r}: it must be one of {', '.join(REGIONS)}")
    if len(adapter.regions) > 1:
        raise ValueError(f"{adapter.name}: has a set for each of {' and '.join(adapter.regions)}: region cannot change")
    pairs = tuple(replace(pair, region=region) if pair.has_region else pair for pair in adapter.pairs)
    return replace(adapter, pairs=pairs)


def only_region(adapter: Adapter, region: str) -> tuple[Adapter, int]:
    """One region's set alone, acting there, and how many pairs that leaves out; ValueError where there is none."""
    if len(adapter.regions) <= 1:
        return with_region(adapter, region), 0
    kept = tuple(
        pair for pair in adapter.pairs if (pair.region in (region, "both") if pair.has_region else region != "encoder")
    )
    if region == "both" or not kept:
        raise ValueError(f"{adapter.name}: has a set for each of {' and '.join(adapter.regions)}: choose one of them")
    pairs = tuple(replace(pair, region=region) if pair.has_region else pair for pair in kept)
    return replace(adapter, pairs=pairs), len(adapter.pairs) - len(kept)
