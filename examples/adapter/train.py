"""Trains an adapter on the bundled demo model, with PEFT on transformers:

    python examples/adapter/train.py my-lora [--steps 150] [--minutes 10]

The demo model is a GGUF file, which is dequantized into transformers' model first; with a checkpoint of one's own,
`from_pretrained` stands there. Needs torch, transformers and peft, and two or three minutes on two cores. What comes
out is a PEFT folder: `pydiffgguf generate demo --lora my-lora -p ...` runs it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, get_peft_model
from task import descending, other, prompt_of
from torch.nn import functional as F

from pydiffgguf import DiffusionModel, demo_model_path

# Behind the paths that task.py adds.
from rebuild import model_from_gguf  # isort: skip

PROMPTS = 32  # of a step
FILL_WEIGHT = 0.1  # of rows behind the answer's end
OTHER_SHARE = 0.3  # of batches: other questions, with their old answers, so that they are not forgotten


def batch(rng: Random, model: DiffusionModel, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of one length in tokens, [n, length], and their answers on canvases, [n, rows]."""
    prompts: list[list[int]] = []
    answers: list[list[int]] = []
    draw = other if rng.random() < OTHER_SHARE else descending
    while len(prompts) < PROMPTS:
        q = draw(rng, "train")
        ids = model.tokenize(prompt_of(q.prompt))
        if prompts and len(ids) != len(prompts[0]):
            continue
        answer = model.tokenize(q.answer + "<turn|>")
        prompts.append(ids)
        answers.append((answer + [0] * rows)[:rows])
    return torch.tensor(prompts), torch.tensor(answers)


def train(out: Path, steps: int, minutes: float, seed: int) -> None:
    """Writes the adapter's folder."""
    # A second thread brings these small matrices little, and waits for ever where another program wants its core.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = Random(seed)
    demo = DiffusionModel(demo_model_path())
    net = model_from_gguf(demo_model_path())
    # The names that Unsloth and TRL train. Encoder and decoder share their weights but not their adapters.
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        exclude_modules=r".*(vision_tower|embed_vision).*",
    )
    model = get_peft_model(net, config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    began = time.monotonic()
    for step in range(steps):
        left = 1 - max(step / steps, (time.monotonic() - began) / (60 * minutes))
        if left <= 0:
            break
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * left
        rows = demo.config.canvas_length if step % 5 == 0 else 16
        prompts, target = batch(rng, demo, rows)
        # Uniform noise: any share of the rows holds random ids; a third of the canvases are all noise.
        share = torch.where(torch.rand(PROMPTS, 1) < 0.35, 1.0, torch.rand(PROMPTS, 1))
        noised = torch.rand(target.shape) < share
        canvas = torch.where(noised, torch.randint(demo.config.n_vocab, target.shape), target)
        encoded = net(input_ids=prompts, decoder_input_ids=canvas)
        logits = encoded.logits
        if rng.random() < 0.5:  # a second step, which sees what the first one guessed
            signal = logits.detach() / (0.4 + 0.4 * rng.random())
            logits = net(input_ids=prompts, decoder_input_ids=canvas, self_conditioning_logits=signal).logits
        each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        weight = torch.where(target == 0, FILL_WEIGHT, 1.0).flatten()
        loss = (each * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            right = ((logits.argmax(-1) == target) | (target == 0)).all(-1).float().mean()
            print(
                f"step {step}: loss {loss:.3f}, whole answers {right:.2f}, {time.monotonic() - began:.0f} s", flush=True
            )
    model.save_pretrained(out)
    print(f"{out}: {step + 1} steps, {time.monotonic() - began:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the adapter's folder")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--minutes", type=float, default=10.0, help="end earlier than --steps where the time is over")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    train(args.out, args.steps, args.minutes, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
