"""Train the demo model on the CPU.

    torchrun --nproc-per-node 2 train.py --tokenizer DIR --out DIR --minutes 75 [--seed 1]

Two processes of one thread each: one draws Sudoku, the other text, and their gradients are averaged. The learning rate
follows the wall clock (warm-up, then cosine to nearly zero at --minutes), so a slow machine ends annealed as well.
The weights saved are an exponential moving average. Every line of the log is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
from batches import Batch, Batches
from model import PAD, build, counts, load
from torch.nn import functional as F
from transformers import DiffusionGemmaForBlockDiffusion

EMA = 0.997
ENCODER_WEIGHT = 0.4
PINNED_WEIGHT = 0.2
FILL_WEIGHT = 0.1


def losses(
    model: DiffusionGemmaForBlockDiffusion, batch: Batch, self_condition: bool, gen: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(decoder loss, encoder loss, share of noised rows predicted right) of one batch."""
    b, c = batch.target.shape
    vocab = model.config.text_config.vocab_size
    t = torch.rand(b, 1, generator=gen)
    # A fifth starts from pure noise, where every generation starts.
    t = torch.where(torch.rand(b, 1, generator=gen) < 0.2, torch.ones(()), t)
    noised = (torch.rand(b, c, generator=gen) < t) & batch.free
    canvas = torch.where(noised, torch.randint(vocab, (b, c), generator=gen), batch.target)

    encoded = model.model.encoder(input_ids=batch.prefix)
    cache = encoded.past_key_values
    signal = None
    if self_condition:
        with torch.no_grad():
            first = model(past_key_values=cache, decoder_input_ids=canvas).logits
            signal = first / (0.4 + 0.4 * torch.rand(b, 1, 1, generator=gen))
            fixed = batch.pinned[:, None] & ~batch.free
            one_hot = F.one_hot(batch.target, vocab).float().mul(1e4).sub(1e4)
            signal = torch.where(fixed[..., None], one_hot, signal)
    logits = model(past_key_values=cache, decoder_input_ids=canvas, self_conditioning_logits=signal).logits
    each = F.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), reduction="none").view(b, c)
    fill = batch.target == PAD
    weight = torch.where(batch.free, 1.0, PINNED_WEIGHT) * torch.where(fill, FILL_WEIGHT, 1.0)
    decoder = (each * weight).sum() / weight.sum()

    cap = model.final_logit_softcapping
    z = torch.tanh(model.lm_head(encoded.last_hidden_state) / cap) * cap
    nexts = torch.cat([batch.prefix[:, 1:], batch.target[:, :1]], dim=1)
    encoder = F.cross_entropy(z.flatten(0, 1), nexts.flatten())
    seen = noised & ~fill
    right = ((logits.argmax(-1) == batch.target) & seen).sum() / seen.sum().clamp(min=1)
    return decoder, encoder, right


def save(
    model: DiffusionGemmaForBlockDiffusion,
    weights: list[torch.Tensor],
    params: list[torch.nn.Parameter],
    tok: Path,
    out: Path,
) -> None:
    """Write the averaged weights, config and tokenizer to `out`; a reader never sees half a checkpoint."""
    kept = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, w in zip(params, weights, strict=True):
            p.copy_(w)
        new = out.with_name(out.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        model.save_pretrained(new)
        for p, w in zip(params, kept, strict=True):
            p.copy_(w)
    for f in tok.iterdir():
        shutil.copy(f, new / f.name)
    old = out.with_name(out.name + ".old")
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
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--warmup", type=int, default=150, help="steps")
    ap.add_argument("--budget", type=int, default=2000, help="tokens per step and process")
    ap.add_argument("--init", type=Path, help="start from these weights instead of random ones")
    ap.add_argument("--temper", type=float, default=1.0, help="factor on each branch's last norm, at the start")
    ap.add_argument("--drill", type=float, default=0.0, help="share of copying drills among the questions")
    ap.add_argument("--grid", type=float, default=1.0, help="share of Sudoku in the first process, text for the rest")
    ap.add_argument("--chat", type=float, default=0.45, help="share of questions in the text, documents for the rest")
    ap.add_argument("--asked", type=float, default=0.62, help="share of Sudoku as questions, pinned grids for the rest")
    ap.add_argument("--save-minutes", type=float, default=4.0)
    args = ap.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    source = Batches(args.tokenizer, args.seed * 1000 + rank, args.budget, args.drill)
    model = build(source.tok.get_vocab_size(), args.seed)
    if args.init:
        model.load_state_dict(load(args.init).state_dict())
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.post_attention_layernorm.weight.mul_(args.temper)
            layer.post_feedforward_layernorm.weight.mul_(args.temper)
    # The fastest of transformers' expert paths for training on a CPU (the eager loop takes a quarter longer,
    # batched_mm gathers weights per token and is unusable).
    model.config._experts_implementation = model.config.text_config._experts_implementation = "grouped_mm"
    model.train()
    params = [p for n, p in model.named_parameters() if "vision" not in n]
    matrices = [p for p in params if p.ndim > 1]
    vectors = [p for p in params if p.ndim == 1]
    opt = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.02, "factor": 1.0},
            {"params": vectors, "weight_decay": 0.0, "factor": 3.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.98),
        eps=1e-9,
    )
    ema = [p.detach().clone() for p in params]
    gen = torch.Generator().manual_seed(args.seed * 7919 + rank)
    shared = Random(args.seed)  # the same draws in every process
    if rank == 0:
        print(
            json.dumps({"start": time.strftime("%H:%M:%S"), **json.loads(counts(model)), **vars(args)}, default=str),
            flush=True,
        )
    began = saved = time.time()
    step, done = 0, 0.0
    sums: dict[str, list[float]] = {}
    while done < 1.0:
        self_condition = shared.random() < 0.5
        group = "grid" if rank == 0 and source.rng.random() < args.grid else "text"
        # Short canvases first: they cost half. The whole canvas length is practised more towards the end.
        short = 0.85 if done < 0.65 else 0.4
        batch = source.draw(group, (args.asked if group == "grid" else args.chat, short))
        decoder, encoder, right = losses(model, batch, self_condition, gen)
        (decoder + ENCODER_WEIGHT * encoder).backward()
        # The clock travels with the gradients, so both processes use one learning rate and stop together.
        now = (time.time() - began) / (args.minutes * 60)
        flat = torch.cat(
            [*((p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in params), torch.tensor([now])]
        )
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        done = float(flat[-1])
        norm = float(flat[:-1].norm())
        scale = min(1.0, 1.0 / (norm + 1e-6))
        at = 0
        for p in params:
            p.grad = (flat[at : at + p.numel()] * scale).view_as(p)
            at += p.numel()
        decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        lr = args.lr * min(1.0, (step + 1) / args.warmup) * decay
        for g in opt.param_groups:
            g["lr"] = lr * g["factor"]
        opt.step()
        opt.zero_grad(set_to_none=True)
        step += 1
        torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - min(EMA, (1 + step) / (10 + step)))
        kept = sums.setdefault(batch.kind, [0.0, 0.0, 0.0, 0.0])
        for i, x in enumerate((decoder, encoder, right, torch.ones(()))):
            kept[i] += float(x.detach())
        if step % 50 == 0:
            minutes = round((time.time() - began) / 60, 2)
            head = {"step": step, "min": minutes, "lr": round(lr, 6), "norm": round(norm, 2)}
            for kind, (d, e, r, n) in sorted(sums.items()):
                line = {"loss": round(d / n, 4), "enc": round(e / n, 4), "right": round(r / n, 4), "n": int(n)}
                print(json.dumps({**head, "rank": rank, "kind": kind, **line}), flush=True)
            sums.clear()
        if rank == 0 and time.time() - saved > args.save_minutes * 60:
            save(model, ema, params, args.tokenizer, args.out)
            saved = time.time()
    if rank == 0:
        save(model, ema, params, args.tokenizer, args.out)
        print(json.dumps({"end": time.strftime("%H:%M:%S"), "steps": step}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
