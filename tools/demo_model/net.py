"""A fast forward pass of the demo model in plain torch, for training on the CPU.

The weights are those of transformers' model, by name, so the two can be compared and saved without conversion. What
makes it fast: all experts run as one wide FFN, weighted by the router (zero outside the top two); the norms' weights
are folded into the matrices behind them, so every layer has three wide products; prefix and canvas lengths differ
inside a batch by masks; and the encoder runs once over the whole document, of which each canvas sees the first part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DiffusionGemmaForBlockDiffusion

EPS = 1e-6
CAP = 30.0

Weights = dict[str, torch.Tensor]
Cache = list[tuple[torch.Tensor, torch.Tensor]]


# The type that the wide products run in; residual stream, norms, attention and losses stay in float32.
PRODUCTS = torch.float32


def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A product in the type of `PRODUCTS`, given back in float32."""
    return F.linear(x.to(PRODUCTS), w.to(PRODUCTS)).float()


class RmsNorm(torch.autograd.Function):
    """RMS norm without a weight, with a backward pass of few operations."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        r = torch.rsqrt(torch.linalg.vecdot(x, x).unsqueeze(-1) / x.shape[-1] + EPS)
        y = x * r
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        y, r = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y).unsqueeze(-1) / y.shape[-1]
        return torch.addcmul(grad, y, along, value=-1).mul_(r)


def rms(x: torch.Tensor) -> torch.Tensor:
    """RMS norm without a weight."""
    return RmsNorm.apply(x)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE over the last dimension, halves paired."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def project_sliding(
    x: torch.Tensor,
    norm: torch.Tensor,
    wq: torch.Tensor,
    wk: torch.Tensor,
    wv: torch.Tensor,
    qn: torch.Tensor,
    kn: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [B, S, heads, d] of a sliding layer from the residual stream [B, S, hidden]."""
    b, s, _ = x.shape
    d = qn.shape[0]
    y = linear(rms(x), torch.cat([wq, wk, wv]) * norm)
    q, k, v = y.split([wq.shape[0], wk.shape[0], wv.shape[0]], dim=-1)
    q = rotate(rms(q.reshape(b, s, -1, d)) * qn, cos, sin)
    k = rotate(rms(k.reshape(b, s, -1, d)) * kn, cos, sin)
    return q, k, rms(v.reshape(b, s, -1, d))


def project_full(
    x: torch.Tensor,
    norm: torch.Tensor,
    wq: torch.Tensor,
    wk: torch.Tensor,
    qn: torch.Tensor,
    kn: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same on a full layer, whose values are its raw keys."""
    b, s, _ = x.shape
    d = qn.shape[0]
    y = linear(rms(x), torch.cat([wq, wk]) * norm)
    q, k = y.split([wq.shape[0], wk.shape[0]], dim=-1)
    plain = rms(k.reshape(b, s, -1, d))
    return rotate(rms(q.reshape(b, s, -1, d)) * qn, cos, sin), rotate(plain * kn, cos, sin), plain


def finish(
    x: torch.Tensor,
    attended: torch.Tensor,
    wo: torch.Tensor,
    post: torch.Tensor,
    pre1: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    post1: torch.Tensor,
    pre2: torch.Tensor,
    gate_up: torch.Tensor,
    down_e: torch.Tensor,
    post2: torch.Tensor,
    router: torch.Tensor,
    router_scale: torch.Tensor,
    expert_scale: torch.Tensor,
    post_all: torch.Tensor,
    scalar: torch.Tensor,
) -> torch.Tensor:
    """The rest of a layer: output projection, dense FFN, experts (all of them, weighted), scalar."""
    x = x + rms(linear(attended, wo)) * post
    n_expert, two, hidden = gate_up.shape
    wide = n_expert * two // 2
    ge, ue = gate_up.chunk(2, dim=1)
    joint = torch.cat(
        [
            gate * pre1,
            up * pre1,
            ge.reshape(wide, hidden) * pre2,
            ue.reshape(wide, hidden) * pre2,
            router * (router_scale * hidden**-0.5),
        ]
    )
    f = gate.shape[0]
    g, u, g2, u2, r = linear(rms(x), joint).split([f, f, wide, wide, n_expert], dim=-1)
    dense = rms(linear(F.gelu(g, approximate="tanh") * u, down)) * post1
    r = r.softmax(-1)
    first = r.amax(-1, keepdim=True)
    second = torch.where(r < first, r, 0.0).amax(-1, keepdim=True)
    kept = torch.where(r >= second, r, 0.0)
    share = kept / kept.sum(-1, keepdim=True) * expert_scale
    a = (F.gelu(g2, approximate="tanh") * u2).unflatten(-1, (n_expert, -1)) * share.unsqueeze(-1)
    moe = rms(linear(a.flatten(-2), down_e.permute(1, 0, 2).reshape(hidden, wide))) * post2
    return (x + rms(dense + moe) * post_all) * scalar


def condition(
    e: torch.Tensor,
    signal: torch.Tensor,
    pre: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """The decoder's input from scaled embeddings and the self-conditioning signal (soft embeddings)."""
    n = rms(signal) * pre
    return rms(e + linear(F.gelu(linear(n, gate), approximate="tanh") * linear(n, up), down))


def head(x: torch.Tensor, norm: torch.Tensor, embed: torch.Tensor) -> torch.Tensor:
    """Softcapped logits."""
    return torch.tanh(linear(rms(x) * norm, embed) / CAP) * CAP


def cross_entropy(
    x: torch.Tensor, norm: torch.Tensor, embed: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' cross-entropies, and whether their best id is the target; rows are [N]."""
    z = head(x, norm, embed)
    return F.cross_entropy(z, target, reduction="none"), z.detach().argmax(-1) == target


def soften(x: torch.Tensor, norm: torch.Tensor, embed: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """The soft embeddings of the head's guess, as self-conditioning takes them."""
    return (head(x, norm, embed) / temperature).softmax(-1) @ embed * embed.shape[1] ** 0.5


@dataclass
class Shape:
    """What the forward pass must know beside the weights."""

    sliding: list[bool]
    window: int
    frequencies: dict[bool, torch.Tensor]
    encoder_scalars: list[torch.Tensor]
    decoder_scalars: list[torch.Tensor]


class Net:
    """Both modes over a dict of weights."""

    def __init__(self, model: DiffusionGemmaForBlockDiffusion) -> None:
        text = model.config.text_config
        decoder, encoder = model.model.decoder, model.model.encoder.language_model
        self.shape = Shape(
            [t == "sliding_attention" for t in text.layer_types],
            text.sliding_window,
            {True: decoder.rotary_emb.sliding_attention_inv_freq, False: decoder.rotary_emb.full_attention_inv_freq},
            [layer.layer_scalar.clone() for layer in encoder.layers],
            [layer.layer_scalar.clone() for layer in decoder.layers],
        )
        self.w: Weights = {
            n.removeprefix("model.decoder."): p.detach().clone().requires_grad_()
            for n, p in model.named_parameters(remove_duplicate=False)
            if n.startswith("model.decoder.")
        }

    def angles(self, positions: torch.Tensor) -> dict[bool, tuple[torch.Tensor, torch.Tensor]]:
        """cos and sin [B, S, 1, d / 2] of both layer kinds at `positions` [B, S]."""
        out = {}
        for sliding, f in self.shape.frequencies.items():
            a = positions[..., None, None].float() * f
            out[sliding] = (a.cos(), a.sin())
        return out

    def layer(
        self,
        w: Weights,
        i: int,
        x: torch.Tensor,
        angles: dict[bool, tuple[torch.Tensor, torch.Tensor]],
        cached: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """One layer; keys and values of `cached` stand before its own. mask is added to the scores."""

        def get(name: str) -> torch.Tensor:
            return w[f"layers.{i}.{name}"]

        sliding = self.shape.sliding[i]
        a = ("input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight")
        b = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
        if sliding:
            names = (*a, "self_attn.v_proj.weight", *b)
            q, k, v = project_sliding(x, *map(get, names), *angles[sliding])
        else:
            q, k, v = project_full(x, *map(get, (*a, *b)), *angles[sliding])
        n, s, heads, d = q.shape
        groups = k.shape[2]
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        own = (k, v)
        if cached is not None:
            k, v = torch.cat([cached[0], k], dim=2), torch.cat([cached[1], v], dim=2)
        # The query heads of one key head become rows, so keys are never repeated.
        q = q.view(n, s, groups, -1, d).permute(0, 2, 3, 1, 4).reshape(n, groups, -1, d)
        p = (q @ k.transpose(2, 3)).unflatten(2, (-1, s)) + mask
        o = p.softmax(-1).flatten(2, 3) @ v
        o = o.view(n, groups, -1, s, d).permute(0, 3, 1, 2, 4).reshape(n, s, heads * d)
        scalars = self.shape.encoder_scalars if cached is None else self.shape.decoder_scalars
        rest = (
            "self_attn.o_proj.weight",
            "post_attention_layernorm.weight",
            "pre_feedforward_layernorm.weight",
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
            "mlp.down_proj.weight",
            "post_feedforward_layernorm_1.weight",
            "pre_feedforward_layernorm_2.weight",
            "experts.gate_up_proj",
            "experts.down_proj",
            "post_feedforward_layernorm_2.weight",
            "router.proj.weight",
            "router.scale",
            "router.per_expert_scale",
            "post_feedforward_layernorm.weight",
        )
        return finish(x, o, *map(get, rest), scalars[i]), own

    def embed(self, w: Weights, ids: torch.Tensor) -> torch.Tensor:
        """Scaled embeddings."""
        e = w["embed_tokens.weight"]
        return F.embedding(ids, e) * e.shape[1] ** 0.5

    def encode(self, w: Weights, ids: torch.Tensor) -> tuple[torch.Tensor, Cache]:
        """Encoder mode over `ids` [B, E]: the last residual stream, and every layer's keys and values."""
        n = ids.shape[1]
        at = torch.arange(n)
        back = at[:, None] - at
        masks = {
            kind: torch.where((back < 0) | (back >= (self.shape.window if kind else n)), float("-inf"), 0.0)
            for kind in (True, False)
        }
        angles = self.angles(at[None])
        x, cache = self.embed(w, ids), []
        for i, kind in enumerate(self.shape.sliding):
            x, own = self.layer(w, i, x, angles, None, masks[kind])
            cache.append(own)
        return x, cache

    def decode(
        self,
        w: Weights,
        cache: Cache,
        start: torch.Tensor,
        canvas: torch.Tensor,
        length: torch.Tensor,
        signal: torch.Tensor | None,
    ) -> torch.Tensor:
        """Decoder mode: the last residual stream [B, C, hidden] of canvases `canvas` [B, C].

        Canvas b follows the first start[b] cached positions and has length[b] rows; later rows are seen by no other.
        """
        c = canvas.shape[1]
        e = cache[0][0].shape[2]
        at, rows = torch.arange(e), torch.arange(c)
        angles = self.angles(start[:, None] + rows)
        inside = rows < length[:, None]
        masks = {}
        for kind in (True, False):
            seen = at < start[:, None]
            if kind:
                seen &= at > start[:, None] - self.shape.window
            seen = torch.cat([seen, inside], dim=1)[:, None, None, None]
            masks[kind] = torch.where(seen, 0.0, float("-inf"))
        x = self.embed(w, canvas)
        names = ("pre_norm", "gate_proj", "up_proj", "down_proj")
        parts = [w[f"self_conditioning.{k}.weight"] for k in names]
        x = rms(x) if signal is None else condition(x, signal, *parts)
        for i, kind in enumerate(self.shape.sliding):
            x, _ = self.layer(w, i, x, angles, cache[i], masks[kind])
        return x

    def copy_to(self, model: DiffusionGemmaForBlockDiffusion, w: Weights) -> None:
        """Write the weights into transformers' model."""
        own = dict(model.model.decoder.named_parameters())
        with torch.no_grad():
            for n, p in w.items():
                own[n].copy_(p)


@torch.no_grad()
def check(net: Net, model: DiffusionGemmaForBlockDiffusion) -> tuple[float, float]:
    """Largest differences from transformers' logits (encoder, decoder with self-conditioning), random ids."""
    gen = torch.Generator().manual_seed(0)
    vocab = net.w["embed_tokens.weight"].shape[0]
    p, c = net.shape.window + 17, 24
    ids = torch.randint(vocab, (2, p + 5), generator=gen)
    canvas = torch.randint(vocab, (2, c + 3), generator=gen)
    logits = torch.randn(2, c, vocab, generator=gen) * 3
    out = model.model.encoder(input_ids=ids[:, :p])
    ours, cache = net.encode(net.w, ids)
    norm, embed = net.w["norm.weight"], net.w["embed_tokens.weight"]
    theirs = torch.tanh(model.lm_head(out.last_hidden_state) / CAP) * CAP
    encoder = float((head(ours[:, :p], norm, embed) - theirs).abs().max())
    z = model(
        past_key_values=out.past_key_values, decoder_input_ids=canvas[:, :c], self_conditioning_logits=logits
    ).logits
    signal = F.pad(logits.softmax(-1) @ embed * embed.shape[1] ** 0.5, (0, 0, 0, 3))
    x = net.decode(net.w, cache, torch.tensor([p, p]), canvas, torch.tensor([c, c]), signal)
    return encoder, float((head(x[:, :c], norm, embed) - z).abs().max())
