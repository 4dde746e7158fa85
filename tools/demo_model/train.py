"""Train the demo model on the CPU.

    python train.py --tokenizer DIR --out DIR --minutes 45 [--seed 1]

The forward pass is `net.Net`, checked against transformers before the first step; checkpoints are transformers'. The
learning rate follows the wall clock (warm-up, a plateau, then linear to zero at --minutes), so a slow machine ends
annealed as well. The weights saved are an exponential moving average. Every line of the log is one JSON object; every
few minutes one gives the share of held-out gaps that are filled exactly.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from random import Random

import net as network
import torch
from batches import KINDS, Batch, Batches, pack
from heldout import LENGTHS, gap, gap_example
from model import PAD, SHAPES, build, counts, load
from net import Net, Weights, check, cross_entropy, head, soften
from tasks import ENGLISH, PYTHON
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import DiffusionGemmaForBlockDiffusion

EMA = 0.995
ENCODER_WEIGHT = 0.5
KEPT_WEIGHT = 0.3
FILL_WEIGHT = 0.1


class Optimizer:
    """Muon for the matrices of the layers, AdamW for embedding, router and vectors; two factors of one schedule."""

    def __init__(self, w: Weights, lr_matrix: float, lr: float) -> None:
        self.lr_matrix = lr_matrix
        matrices = {n: p for n, p in w.items() if p.ndim > 1 and "embed" not in n and "router" not in n}
        self.groups: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for p in matrices.values():
            self.groups.setdefault(tuple(p.shape[-2:]), []).append(p)
        self.momentum = {s: torch.zeros(sum(p.numel() for p in g) // math.prod(s), *s) for s, g in self.groups.items()}
        rest = {n: p for n, p in w.items() if n not in matrices}
        self.adam = torch.optim.AdamW(
            [
                {"params": [p for p in rest.values() if p.ndim > 1], "base": lr, "weight_decay": 0.01},
                {"params": [p for p in rest.values() if p.ndim == 1], "base": 2 * lr, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
            eps=1e-9,
        )

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at `factor` of the learning rates; clears the gradients."""
        for g in self.adam.param_groups:
            g["lr"] = g["base"] * factor
        self.adam.step()
        for shape, params in self.groups.items():
            # Without self-conditioning its matrices have no gradient.
            grads = (p.grad if p.grad is not None else torch.zeros_like(p) for p in params)
            g = torch.cat([x.reshape(-1, *shape) for x in grads])
            m = self.momentum[shape].lerp_(g, 0.05)
            u = orthogonal(g.lerp(m, 0.95)) * max(1.0, shape[0] / shape[1]) ** 0.5
            at = 0
            for p in params:
                k = p.numel() // math.prod(shape)
                p.mul_(1 - 0.1 * self.lr_matrix * factor).sub_(u[at : at + k].view_as(p), alpha=self.lr_matrix * factor)
                at += k
        for params in (*self.groups.values(), *(g["params"] for g in self.adam.param_groups)):
            for p in params:
                p.grad = None


def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """Roughly the nearest semi-orthogonal matrices to `g` [N, rows, columns], by five Newton-Schulz steps."""
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.775 * a + 2.0315 * (a @ a)) @ x
    return (x.transpose(1, 2) if tall else x).float()


def losses(
    net: Net, batch: Batch, self_condition: bool, gen: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, dict[str, tuple[float, int]]]:
    """(decoder loss, encoder loss, noised rows predicted right and their number, by kind) of one batch."""
    w = net.w
    norm, embed = w["norm.weight"], w["embed_tokens.weight"]
    b, c = batch.target.shape
    t = torch.rand(b, 1, generator=gen)
    # A third starts from pure noise, where every generation starts.
    t = torch.where(torch.rand(b, 1, generator=gen) < 0.35, torch.ones(()), t)
    noised = (torch.rand(b, c, generator=gen) < t) & batch.free
    canvas = torch.where(noised, torch.randint(embed.shape[0], (b, c), generator=gen), batch.target)

    x, cache = net.encode(w, batch.document)
    signal = None
    if self_condition:
        with torch.no_grad():
            # The encoder's graph is not needed for the first guess.
            first = net.decode(w, [(k.detach(), v.detach()) for k, v in cache], batch.start, canvas, batch.length, None)
            guessed = batch.free | ~batch.pinned[:, None]
            temperature = (0.4 + 0.4 * torch.rand(b, 1, generator=gen)).expand(b, c)[guessed]
            signal = net.embed(w, batch.target)
            signal[guessed] = soften(first[guessed], norm, embed, temperature[:, None])
    y = net.decode(w, cache, batch.start, canvas, batch.length, signal)

    fill = batch.target == PAD
    # Rows that cannot change are not learnt from.
    rows = batch.free & (torch.arange(c) < batch.length[:, None])
    weight = (torch.where(noised, 1.0, KEPT_WEIGHT) * torch.where(fill, FILL_WEIGHT, 1.0))[rows]
    each, right = cross_entropy(y[rows], norm, embed, batch.target[rows])
    decoder = (each * weight).sum() / weight.sum()
    known = torch.arange(batch.document.shape[1] - 1) < batch.tokens[:, None] - 1
    each, _ = cross_entropy(x[:, :-1][known], norm, embed, batch.document[:, 1:][known])
    seen = noised & ~fill
    hits = torch.zeros_like(rows).masked_scatter(rows, right) & seen
    shares = {}
    for i, kind in enumerate(KINDS):
        own = batch.kind == i
        if own.any():
            shares[kind] = (float(hits[own].sum()), int(seen[own].sum()))
    return decoder, each.mean(), shares


class Probe:
    """Held-out gaps of known length, every length and both languages, filled by a short version of the sampler."""

    def __init__(self, tok: Tokenizer, each: int) -> None:
        rng = Random(77)
        self.tasks = [
            (name, lengths, gap(rng, tok, templates, lengths))
            for name, templates in (("english", ENGLISH), ("python", PYTHON))
            for lengths in LENGTHS
            for _ in range(each)
        ]
        self.batch = pack([gap_example(tok, task) for _, _, task in self.tasks], 72, 64)

    @torch.no_grad()
    def run(self, net: Net, w: Weights, steps: int = 10) -> dict[str, float]:
        """Share filled exactly, by language and by length; `causal` is the encoder's loss per token."""
        gen = torch.Generator().manual_seed(5)
        norm, embed = w["norm.weight"], w["embed_tokens.weight"]
        x, cache = net.encode(w, self.batch.document)
        known = torch.arange(x.shape[1] - 1) < self.batch.tokens[:, None] - 1
        causal = F.cross_entropy(head(x[:, :-1], norm, embed)[known], self.batch.document[:, 1:][known])
        target, free = self.batch.target, self.batch.free
        canvas, signal, z = target, None, torch.zeros(())
        accepted = torch.zeros_like(free)
        drawn = target
        for n in range(steps):
            noise = torch.randint(embed.shape[0], target.shape, generator=gen)
            canvas = torch.where(free, torch.where(accepted, drawn, noise), target)
            y = net.decode(w, cache, self.batch.start, canvas, self.batch.length, signal)
            z = head(y, norm, embed) / (0.8 - 0.3 * n / steps)
            logp = z.log_softmax(-1)
            entropy = torch.where(free, -(logp.exp() * logp).sum(-1), float("inf"))
            order = entropy.sort(dim=-1)
            ok = order.values.cumsum(-1) - order.values <= 0.1
            accepted = torch.zeros_like(ok).scatter(1, order.indices, ok)
            drawn = torch.multinomial(logp.exp().flatten(0, 1), 1, generator=gen).view(target.shape)
            signal = torch.where(free[..., None], logp.exp() @ embed * embed.shape[1] ** 0.5, net.embed(w, target))
        right = ((z.argmax(-1) == target) | ~free).all(1)
        out: dict[str, float] = {"causal": round(float(causal), 4)}
        for key in ("english", "python"):
            out[key] = round(float(right[[i for i, t in enumerate(self.tasks) if t[0] == key]].float().mean()), 3)
        for a, b in LENGTHS:
            own = [i for i, t in enumerate(self.tasks) if t[1] == (a, b)]
            out[f"{a}-{b}"] = round(float(right[own].float().mean()), 3)
        return out


def save(net: Net, model: DiffusionGemmaForBlockDiffusion, w: Weights, tok: Path, out: Path) -> None:
    """Write the weights `w`, config and tokenizer to `out`; a reader never sees half a checkpoint."""
    net.copy_to(model, w)
    new, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    for f in tok.iterdir():
        shutil.copy(f, new / f.name)
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    """Train until the clock runs out."""
    ap = argparse.ArgumentParser()
    ap.add_argument("--tokenizer", type=Path, required=True)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--minutes", type=float, required=True)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--lr-matrix", type=float, default=0.02, help="of Muon")
    ap.add_argument("--lr", type=float, default=3e-3, help="of AdamW")
    ap.add_argument("--warmup", type=int, default=100, help="steps")
    ap.add_argument("--plateau", type=float, default=0.4, help="share of the time before the rate falls")
    ap.add_argument(
        "--ramp", type=float, default=0.15, help="share of the time in which free spans grow to full length"
    )
    ap.add_argument("--budget", type=int, default=6144, help="tokens per step")
    ap.add_argument(
        "--texts", type=float, default=0.72, help="share of English and Python, Sudoku and questions for the rest"
    )
    ap.add_argument("--long", type=float, default=0.25, help="share of batches of long documents")
    ap.add_argument("--shape", choices=SHAPES, default="demo", help="of a fresh model")
    ap.add_argument("--init", type=Path, help="start from these weights instead of random ones")
    ap.add_argument("--bf16", action="store_true", help="products in bfloat16")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--save-minutes", type=float, default=3.0)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)

    source = Batches(args.tokenizer, args.seed, args.budget)
    model = load(args.init) if args.init else build(source.tok.get_vocab_size(), args.seed, args.shape)
    model.eval()
    net = Net(model)
    differences = check(net, model)
    if max(differences) > 1e-4:
        raise SystemExit(f"logits differ from transformers': {differences}")
    network.PRODUCTS = torch.bfloat16 if args.bf16 else torch.float32
    probe = Probe(source.tok, 8)
    opt = Optimizer(net.w, args.lr_matrix, args.lr)
    ema = {n: p.detach().clone() for n, p in net.w.items()}
    gen = torch.Generator().manual_seed(args.seed * 7919)
    r = source.rng
    start = {"start": time.strftime("%H:%M:%S"), "differences": differences}
    print(json.dumps({**start, **json.loads(counts(model)), **vars(args)}, default=str), flush=True)
    began = saved = time.time()
    step, tokens, done = 0, 0, 0.0
    sums: dict[str, list[float]] = {}
    heads = [0.0, 0.0]
    while done < 1.0:
        grown = min(1.0, done / args.ramp) if args.ramp else 1.0
        longest = round(4 + 30 * grown)
        size, rows = (
            (192, 64) if grown > 0.6 and r.random() < args.long else (68, 64 if r.random() < 0.25 * grown else 32)
        )
        batch = source.draw(size, rows, longest, args.texts)
        decoder, encoder, shares = losses(net, batch, r.random() < 0.5, gen)
        (decoder + ENCODER_WEIGHT * encoder).backward()
        done = (time.time() - began) / (args.minutes * 60)
        fall = min(1.0, max(0.0, (1 - done) / (1 - args.plateau)))
        factor = min(1.0, (step + 1) / args.warmup) * max(0.005, fall)
        opt.step(factor)
        step += 1
        tokens += batch.document.numel() + batch.target.numel()
        kept = min(EMA, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in net.w.values()], 1 - kept)
        heads[0] += float(decoder.detach())
        heads[1] += float(encoder.detach())
        for kind, (hit, n) in shares.items():
            sums.setdefault(kind, [0.0, 0.0])
            sums[kind][0] += hit
            sums[kind][1] += n
        if step % 50 == 0:
            line = {
                "step": step,
                "min": round((time.time() - began) / 60, 2),
                "tokens": tokens,
                "rate": round(factor, 3),
            }
            line |= {"loss": round(heads[0] / 50, 4), "enc": round(heads[1] / 50, 4), "longest": longest}
            line |= {kind: round(a / max(n, 1), 4) for kind, (a, n) in sorted(sums.items())}
            print(json.dumps(line), flush=True)
            sums.clear()
            heads = [0.0, 0.0]
        if time.time() - saved > args.save_minutes * 60:
            print(json.dumps({"step": step, "probe": probe.run(net, ema)}), flush=True)
            save(net, model, ema, args.tokenizer, args.out)
            saved = time.time()
    save(net, model, ema, args.tokenizer, args.out)
    end = {"end": time.strftime("%H:%M:%S"), "steps": step, "tokens": tokens, "probe": probe.run(net, ema)}
    print(json.dumps(end), flush=True)


if __name__ == "__main__":
    main()
