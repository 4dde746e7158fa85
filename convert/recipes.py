"""Which ggml type each tensor gets.

Two kinds of recipe. Those named as llama.cpp names them give, tensor by tensor, the types that its rules give
(src/llama-quant.cpp, read at revision 007dbbf), so that sizes and qualities are what a name promises elsewhere. `dg4`
is our own: see `dg4_type`.

1-D tensors, norms and the router stay F32 in all of them: they are small, and the router's choice hangs on their last
bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from .names import ARCHITECTURE

T = GGMLQuantizationType
F32 = T.F32
FLOAT_TYPES = (T.F32, T.F16, T.BF16)

# What a tensor becomes whose rows do not divide into the type's blocks; F16 where they do not divide into these either.
FALLBACK: dict[GGMLQuantizationType, GGMLQuantizationType] = {
    T.Q2_K: T.Q4_0,
    T.Q3_K: T.Q4_0,
    T.TQ1_0: T.Q4_0,
    T.TQ2_0: T.Q4_0,
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
    **dict.fromkeys((T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.IQ4_XS), T.IQ4_NL),
}


@dataclass(frozen=True)
class Recipe:
    """An output type of the converter: the type that most big tensors get, and `general.file_type`."""

    name: str
    big: GGMLQuantizationType
    file_type: LlamaFileType


RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("f32", T.F32, LlamaFileType.ALL_F32),
        Recipe("f16", T.F16, LlamaFileType.MOSTLY_F16),
        Recipe("bf16", T.BF16, LlamaFileType.MOSTLY_BF16),
        Recipe("q8_0", T.Q8_0, LlamaFileType.MOSTLY_Q8_0),
        Recipe("q6_k", T.Q6_K, LlamaFileType.MOSTLY_Q6_K),
        Recipe("q5_k_m", T.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
        Recipe("q5_k_s", T.Q5_K, LlamaFileType.MOSTLY_Q5_K_S),
        Recipe("q4_k_m", T.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
        Recipe("q4_k_s", T.Q4_K, LlamaFileType.MOSTLY_Q4_K_S),
        Recipe("q4_0", T.Q4_0, LlamaFileType.MOSTLY_Q4_0),
        Recipe("iq4_nl", T.IQ4_NL, LlamaFileType.MOSTLY_IQ4_NL),
        Recipe("iq4_xs", T.IQ4_XS, LlamaFileType.MOSTLY_IQ4_XS),
        Recipe("q3_k_m", T.Q3_K, LlamaFileType.MOSTLY_Q3_K_M),
        Recipe("q2_k", T.Q2_K, LlamaFileType.MOSTLY_Q2_K),
        Recipe("mxfp4", T.MXFP4, LlamaFileType.MOSTLY_MXFP4_MOE),
        # Readers go by the tensors' types; the number says only that no recipe of llama.cpp made the file.
        Recipe("dg4", T.IQ4_XS, LlamaFileType.GUESSED),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe called `name`; ValueError, with the choices, when there is none."""
    try:
        return RECIPES[name.lower()]
    except KeyError:
        raise ValueError(f"type: {name!r}, expected one of {', '.join(RECIPES)}") from None


@dataclass(frozen=True)
class ModelFacts:
    """What the rules look at besides a tensor's name and shape.

    `heads_per_kv`: query heads for each KV head, on the first layer. `values`: names of the `attn_v` tensors, by layer.
    """

    n_layer: int
    n_expert: int
    heads_per_kv: int
    values: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """The type of one tensor; `wanted` differs from `kind` where the rows do not divide into its blocks."""

    kind: GGMLQuantizationType
    wanted: GGMLQuantizationType

    @property
    def fell_back(self) -> bool:
        return self.kind is not self.wanted


@dataclass(frozen=True)
class Override:
    """`--tensor-type PATTERN=TYPE`: a regular expression searched for in a tensor's name, and the type it then gets."""

    pattern: str
    kind: GGMLQuantizationType

    @staticmethod
    def parse(text: str) -> Override:
        """`'ffn_.*_exps=q4_k'`; ValueError for one that is no pattern, or names no type."""
        pattern, equals, name = text.rpartition("=")
        if not equals or not pattern:
            raise ValueError(f"tensor_types: {text!r}: expected PATTERN=TYPE, such as 'ffn_.*_exps=q4_k'")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"tensor_types: {text!r}: {pattern!r} is no regular expression: {error}") from None
        try:
            return Override(pattern, GGMLQuantizationType[name.upper()])
        except KeyError:
            known = ", ".join(t.name.lower() for t in GGMLQuantizationType if not t.name.startswith(("I", "F64")))
            raise ValueError(f"tensor_types: {text!r}: no type {name!r}; ggml has {known}, and the iq types") from None


@dataclass
class TypeRules:
    """Gives each tensor of one model its type: overrides first, then the recipe, then the fallback for odd rows.

    `with_importance`: an importance matrix will be used, which a few of llama.cpp's rules ask for. `level`: of dg4's
    DG4_LEVELS, see `settle`.
    """

    recipe: Recipe
    facts: ModelFacts
    overrides: Sequence[Override] = ()
    with_importance: bool = False
    level: int = 0
    matched: set[str] = field(default_factory=set)

    def settle(self, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Looks at all of a model's tensors (name, row-major shape) before the first choice: dg4 lowers its `level`
        until a file is no larger than q4_k_m's."""
        if self.recipe.name != "dg4":
            return

        def size(rules: TypeRules) -> int:
            kinds = ((shape, rules.choose(name, shape).kind) for name, shape in tensors)
            return sum(math.prod(shape[:-1]) * row_bytes(shape[-1], kind) for shape, kind in kinds)

        most = size(TypeRules(RECIPES["q4_k_m"], self.facts, with_importance=self.with_importance))
        for level in range(len(DG4_LEVELS)):
            self.level = level
            if size(TypeRules(self.recipe, self.facts, level=level)) <= most:
                return

    def choose(self, name: str, shape: tuple[int, ...]) -> Choice:
        """The type of tensor `name` of row-major `shape`."""
        if not is_quantized(name, shape):
            return Choice(F32, F32)
        for override in self.overrides:
            if re.search(override.pattern, name):
                self.matched.add(override.pattern)
                return fallback(override.kind, shape[-1])
        if self.recipe.big in FLOAT_TYPES:
            return Choice(self.recipe.big, self.recipe.big)
        rule = dg4_type if self.recipe.name == "dg4" else llama_type
        return fallback(rule(name, shape, self), shape[-1])

    def check_overrides(self) -> None:
        """ValueError when an override met no tensor: a misspelt pattern would go unnoticed."""
        for override in self.overrides:
            if override.pattern not in self.matched:
                raise ValueError(
                    f"tensor_types: {override.pattern!r} matches no tensor that is quantized, or an earlier pattern "
                    "takes all that it matches"
                )


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether recipes give the tensor a type of theirs: matrices of weights, but for the router."""
    return (
        len(shape) > 1
        and name.endswith("weight")
        and not name.endswith("_norm.weight")
        and not name.endswith("ffn_gate_inp.weight")
    )


def fallback(wanted: GGMLQuantizationType, row: int) -> Choice:
    """`wanted`, or what rows of `row` elements take in its place."""
    for kind in (wanted, FALLBACK.get(wanted, T.F16)):
        if row % GGML_QUANT_SIZES[kind][0] == 0:
            return Choice(kind, wanted)
    return Choice(T.F16, wanted)


def row_bytes(row: int, kind: GGMLQuantizationType) -> int:
    """The size in bytes of a row of `row` elements, a multiple of the type's block."""
    block, size = GGML_QUANT_SIZES[kind]
    return row // block * size


def takes_more_bits(index: int, count: int) -> bool:
    """llama.cpp's choice of layers that get a better type: the first and last eighth, and every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def layer_of(name: str) -> int:
    """12 of `blk.12.attn_q.weight`; 0 of a tensor of no layer."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else 0


def llama_type(name: str, shape: tuple[int, ...], rules: TypeRules) -> GGMLQuantizationType:
    """The type by llama.cpp's rules, before the fallback for odd rows."""
    ftype, base, facts = rules.recipe.name, rules.recipe.big, rules.facts
    eight = facts.n_expert == 8  # these rules were made for Mixtral 8x7B
    if name == "token_embd.weight":  # the head as well
        return T.Q8_0 if ftype in ("mxfp4", "q8_0") or shape[-1] % GGML_QUANT_SIZES[base][0] else T.Q6_K
    if ftype == "mxfp4":
        return T.MXFP4 if len(shape) > 2 else T.Q8_0
    if "attn_v.weight" in name:
        return T.Q8_0 if eight else attn_v_type(facts.values.index(name), rules)
    if "attn_k.weight" in name:
        return T.Q8_0 if eight else base
    if "ffn_down" in name:
        return ffn_down_type(layer_of(name), rules)
    if "attn_output.weight" in name:
        if eight:
            return T.Q5_K if ftype in ("q2_k", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq4_xs") else base
        return {"q2_k": T.Q3_K, "q3_k_m": T.Q4_K}.get(ftype, base)
    return base


def attn_v_type(index: int, rules: TypeRules) -> GGMLQuantizationType:
    """Of the `index`-th value projection."""
    ftype, base, facts = rules.recipe.name, rules.recipe.big, rules.facts
    shared = facts.heads_per_kv >= 4  # then the tensor is small, and bits in it are cheap
    if ftype == "q2_k":
        return T.Q4_K if shared else T.Q3_K
    if ftype == "q3_k_m":
        return T.Q5_K if index < 2 else T.Q4_K
    if ftype in ("iq4_nl", "iq4_xs") and shared:
        return T.Q5_K
    if ftype in ("q4_k_m", "q5_k_m") and takes_more_bits(index, len(facts.values)):
        return T.Q6_K
    if ftype == "q4_k_s" and index < 4:
        return T.Q5_K
    return base


def ffn_down_type(layer: int, rules: TypeRules) -> GGMLQuantizationType:
    """Of the down projections, dense and experts', of a layer."""
    ftype, base, n = rules.recipe.name, rules.recipe.big, rules.facts.n_layer
    if ftype == "q2_k":
        return T.Q3_K
    if ftype == "q3_k_m":
        return T.Q5_K if layer < n // 16 else T.Q4_K
    if ftype in ("q4_k_m", "q5_k_m") and takes_more_bits(layer, n):
        return T.Q6_K
    if layer < n // 8:
        if ftype == "q4_k_s" or (ftype in ("iq4_nl", "iq4_xs") and not rules.with_importance):
            return T.Q5_K
        if ftype == "q4_0" and rules.with_importance:
            return T.Q4_1
    return base


# dg4's types, by what a tensor's name has in it: first what a byte buys most in (benchmarks/results/quality.md).
DG4_EXPERTS = T.IQ4_XS
DG4_SENSITIVE = re.compile(r"^token_embd|attn_(v|k|output)\.weight$")

# (sensitive tensors, other tensors beside the experts): the first level that makes a file no larger than q4_k_m's.
DG4_LEVELS = ((T.Q8_0, T.Q5_K), (T.Q6_K, T.Q5_K), (T.Q5_K, T.Q5_K), (T.Q5_K, T.Q4_K), (T.Q4_K, T.Q4_K))


def dg4_type(name: str, shape: tuple[int, ...], rules: TypeRules) -> GGMLQuantizationType:
    """Bits where this model is sensitive, few in the experts, which hold nine tenths of the weights.

    The mixtures made for autoregressive models spend their extra bits on every third `ffn_down`, experts' included.
    Here those buy next to nothing; embedding (which is the head too, and the signal of self-conditioning), values,
    keys and attention's output buy most.
    """
    if "_exps" in name:
        return DG4_EXPERTS
    sensitive, other = DG4_LEVELS[rules.level]
    return sensitive if DG4_SENSITIVE.search(name) else other


def model_facts(n_layer: int, n_expert: int, heads: int, kv_heads: int, names: Iterable[str]) -> ModelFacts:
    """ModelFacts from a model's figures, its first layer's `kv_heads`, and all its tensors' names."""
    values = sorted((n for n in names if n.endswith("attn_v.weight")), key=layer_of)
    return ModelFacts(n_layer, n_expert, heads // max(kv_heads, 1), tuple(values))


def facts_of_keys(keys: Mapping[str, object], names: Iterable[str]) -> ModelFacts:
    """ModelFacts from a GGUF's keys (plain values) and its tensors' names; what a file lacks counts as 0 or 1."""

    def number(key: str) -> int:
        value = keys.get(ARCHITECTURE + key, 0)
        value = value[0] if isinstance(value, list) and value else value
        return value if isinstance(value, int) else 0

    return model_facts(
        number(".block_count"),
        number(".expert_count"),
        max(number(".attention.head_count"), 1),
        number(".attention.head_count_kv"),
        names,
    )
