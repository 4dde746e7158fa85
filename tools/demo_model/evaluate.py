"""Score the demo model on held-out tasks; prints one JSON object.

    python evaluate.py --tasks ../../tests/data/demo_tasks.jsonl --checkpoint DIR          # through transformers
    python evaluate.py --tasks ../../tests/data/demo_tasks.jsonl --gguf demo.gguf          # through pydiffgguf

Every engine runs the default sampler (48 steps, t 0.4 to 0.8, bound 0.1, stability 1, confidence 0.005). With
--same-noise every random draw is handed in, from a NumPy Philox stream keyed by (seed, task), to both engines alike:
--dump then writes what each gave, task by task, and two dumps can be compared line by line. Without it, transformers
answers chat tasks by its own `generate()`; tasks with pinned rows always run in `pinned_canvas`, a plain loop.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from heldout import LENGTHS, gap_example
from model import BOS, CANVAS, EOS, PAD, TOOL_RESPONSE, TURN_END
from tokenizers import Tokenizer

END = (EOS, TURN_END, TOOL_RESPONSE)
STEPS, T_MIN, T_MAX, BOUND, CONFIDENCE = 48, 0.4, 0.8, 0.1, 0.005
CAP = 30.0


class Noise:
    """The three random draws of the loop for one task; calls with the same arguments give the same arrays."""

    def __init__(self, seed: int, task: int, vocab: int) -> None:
        self.seed, self.task, self.vocab = seed, task, vocab

    def _rng(self, stream: int, c: int, step: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[self.task, step, c, stream]))

    def canvas(self, c: int) -> np.ndarray:
        """The first canvas, int32 [C]."""
        return self._rng(0, c, 0).integers(self.vocab, size=CANVAS, dtype=np.int32)

    def uniform(self, c: int, step: int) -> np.ndarray:
        """One draw in [0, 1) for each row, float64 [C]; steps count from 0."""
        return self._rng(1, c, step).random(CANVAS)

    def renoise(self, c: int, step: int) -> np.ndarray:
        """Ids for rows that are not accepted, int32 [C]."""
        return self._rng(2, c, step).integers(self.vocab, size=CANVAS, dtype=np.int32)


class Engine(Protocol):
    """What both engines offer the scorer."""

    def chat(self, tasks: list[dict[str, Any]]) -> list[tuple[str, int]]:
        """(answer, steps) of each user turn in `prompt`."""

    def pinned(self, jobs: list[tuple[int, list[int], np.ndarray]]) -> list[tuple[np.ndarray, int]]:
        """(final canvas, steps) of each (task id, prefix ids, pinned rows)."""


def cut(ids: list[int]) -> list[int]:
    """`ids` up to the first end token."""
    return next((ids[:i] for i, t in enumerate(ids) if t in END), ids)


class Transformers:
    """The reference, float32, on the CPU."""

    def __init__(self, checkpoint: Path, seed: int, same_noise: bool, batch: int) -> None:
        import torch
        from model import load
        from transformers import AutoTokenizer

        self.torch, self.seed, self.same_noise, self.batch = torch, seed, same_noise, batch
        self.model = load(checkpoint)
        self.tok = AutoTokenizer.from_pretrained(checkpoint)
        self.vocab = self.model.config.text_config.vocab_size

    def prompt(self, task: dict[str, Any]) -> list[int]:
        ids = self.tok.apply_chat_template(
            [{"role": "user", "content": task["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        return [int(i) for i in ids]

    def chat(self, tasks: list[dict[str, Any]]) -> list[tuple[str, int]]:
        if self.same_noise:
            free = np.full(CANVAS, -1, np.int32)
            ran = self.pinned([(t["id"], self.prompt(t), free) for t in tasks])
            return [(self.tok.decode(cut(c.tolist())), n) for c, n in ran]
        torch = self.torch
        torch.manual_seed(self.seed)
        out: dict[int, tuple[str, int]] = {}
        groups: dict[int, list[int]] = defaultdict(list)
        prompts = [self.prompt(t) for t in tasks]
        for i, p in enumerate(prompts):
            groups[len(p)].append(i)
        for length, members in groups.items():
            for a in range(0, len(members), self.batch):
                some = members[a : a + self.batch]
                r = self.model.generate(input_ids=torch.tensor([prompts[i] for i in some]), max_new_tokens=CANVAS)
                for i, seq, rate in zip(some, r.sequences[:, length:], r.tokens_per_forward, strict=True):
                    # generate() replaces what follows the end token by pad, and reports tokens per forward.
                    steps = round(int((seq != PAD).sum()) / float(rate))
                    out[i] = (self.tok.decode(cut(seq.tolist())), steps)
        return [out[i] for i in range(len(tasks))]

    def causal(self, tasks: list[dict[str, Any]]) -> float:
        """The encoder's loss per token, in nats, on the whole documents of infill tasks, end token included."""
        torch = self.torch
        total, tokens = 0.0, 0
        for t in tasks:
            text = t["prefix"] + t["gap"] + t["suffix"]
            ids = torch.tensor([[BOS, *self.tok.encode(text, add_special_tokens=False), EOS]])
            with torch.no_grad():
                x = self.model.model.encoder(input_ids=ids).last_hidden_state
                z = torch.tanh(self.model.lm_head(x[0, :-1]) / CAP) * CAP
            total += float(torch.nn.functional.cross_entropy(z, ids[0, 1:], reduction="sum"))
            tokens += len(z)
        return total / tokens

    def pinned(self, jobs: list[tuple[int, list[int], np.ndarray]]) -> list[tuple[np.ndarray, int]]:
        out: dict[int, tuple[np.ndarray, int]] = {}
        groups: dict[int, list[int]] = defaultdict(list)
        for i, (_, prefix, _) in enumerate(jobs):
            groups[len(prefix)].append(i)
        for members in groups.values():
            for a in range(0, len(members), self.batch):
                some = members[a : a + self.batch]
                noise = [Noise(self.seed, jobs[i][0], self.vocab) for i in some]
                rows = np.stack([jobs[i][2] for i in some])
                canvases, steps = self.pinned_canvas([jobs[i][1] for i in some], rows, noise)
                for k, i in enumerate(some):
                    out[i] = (canvases[k], int(steps[k]))
        return [out[i] for i in range(len(jobs))]

    def pinned_canvas(
        self, prefixes: list[list[int]], pinned: np.ndarray, noise: list[Noise]
    ) -> tuple[np.ndarray, np.ndarray]:
        """One canvas for each of B prefixes of equal length; pinned [B, C] holds ids, -1 where a row is free.

        Pinned rows are written back last in every step, take no part in the entropy budget, the mean entropy or the
        stability test, and give self-conditioning a one-hot. Returns the last argmax canvases and the steps run.
        """
        torch = self.torch
        with torch.no_grad():
            cache = self.model.model.encoder(input_ids=torch.tensor(prefixes)).past_key_values
            b = len(prefixes)
            fixed = torch.from_numpy(pinned).long()
            free = fixed < 0
            one_hot = torch.full((b, CANVAS, self.vocab), -1e9)
            one_hot.scatter_(2, fixed.clamp(min=0)[..., None], 0.0)

            def pins(x: Any) -> Any:
                return torch.where(free, x, fixed)

            def draws(name: str, *at: int) -> Any:
                return torch.from_numpy(np.stack([getattr(n, name)(0, *at) for n in noise]))

            canvas = pins(draws("canvas").long())
            signal, last = None, torch.full((b, CANVAS), -1)
            final, steps = canvas.clone(), np.zeros(b, int)
            live = torch.ones(b, dtype=torch.bool)
            for s in range(STEPS):
                t = T_MIN + (T_MAX - T_MIN) * (STEPS - s) / STEPS
                z = self.model(past_key_values=cache, decoder_input_ids=canvas, self_conditioning_logits=signal).logits
                z = z / t
                logp = z.log_softmax(-1)
                p = logp.exp()
                best = pins(z.argmax(-1))
                entropy = torch.where(free, -(p * logp).sum(-1), torch.full((), float("inf")))
                cum = p.double().cumsum(-1)
                drawn = (cum <= draws("uniform", s)[..., None]).sum(-1).clamp(max=self.vocab - 1)
                order = entropy.sort(dim=-1)
                ok = order.values.cumsum(-1) - order.values <= BOUND
                accepted = torch.zeros_like(ok).scatter(1, order.indices, ok) & free
                canvas = pins(torch.where(accepted, drawn, draws("renoise", s).long()))
                signal = torch.where(free[..., None], z, one_hot)
                mean = torch.where(free, entropy, torch.zeros(())).sum(1) / free.sum(1).clamp(min=1)
                final[live] = best[live]
                steps[live.numpy()] += 1
                live &= ~((best == last).all(1) & (mean < CONFIDENCE))
                last = best
                if not live.any():
                    break
        return final.numpy(), steps


class PyDiffGGUF:
    """The engine of this project."""

    def __init__(self, gguf: Path, seed: int, same_noise: bool) -> None:
        from pydiffgguf import DiffusionModel

        self.seed, self.same_noise = seed, same_noise
        self.model = DiffusionModel(str(gguf), type_kv="f32")
        self.session = self.model.session()
        self.vocab = len(self.model.metadata["tokenizer.ggml.tokens"])

    def options(self, task: int) -> dict[str, Any]:
        return {"noise": Noise(self.seed, task, self.vocab)} if self.same_noise else {"seed": self.seed + task}

    def chat(self, tasks: list[dict[str, Any]]) -> list[tuple[str, int]]:
        out = []
        for t in tasks:
            r = self.model.generate(t["prompt"], max_tokens=CANVAS, **self.options(t["id"]))
            out.append((r.text, sum(r.stats.steps)))
        return out

    def pinned(self, jobs: list[tuple[int, list[int], np.ndarray]]) -> list[tuple[np.ndarray, int]]:
        out = []
        for task, prefix, rows in jobs:
            self.session.reset()
            self.session.encode(np.asarray(prefix, np.int32))
            r = self.session.run_canvas(pinned=rows, **self.options(task))
            out.append((np.asarray(r.tokens), int(r.steps)))
        return out


def layout(task: dict[str, Any], tok: Tokenizer) -> tuple[list[int], np.ndarray, np.ndarray]:
    """(prefix ids, pinned rows, right canvas) of a task with pinned rows; end token and pad are pinned too."""
    if task["kind"] == "infill":
        example = gap_example(tok, task)
        prefix, right, free = example.document[: example.start], example.target, example.free
    else:
        ids, grid = (tok.encode(task[k], add_special_tokens=False).ids for k in ("prefix", "answer"))
        prefix = [BOS, *ids]
        right = ([*grid, EOS] + [PAD] * CANVAS)[:CANVAS]
        free = [*(c == "." for c in task["grid"]), *[False] * CANVAS][:CANVAS]
    whole = np.asarray(right, np.int32)
    return prefix, np.where(np.asarray(free, bool), -1, whole).astype(np.int32), whole


def score(engine: Engine, tasks: list[dict[str, Any]], tok: Tokenizer) -> list[dict[str, Any]]:
    """One result for each task: id, kind, form, right, steps, given."""
    out: list[dict[str, Any]] = []
    chats = [t for t in tasks if "prompt" in t]
    for t, (text, steps) in zip(chats, engine.chat(chats), strict=True):
        out.append(
            {
                "id": t["id"],
                "kind": t["kind"],
                "form": t.get("form"),
                "right": text.strip() == t["answer"],
                "steps": steps,
                "given": text,
            }
        )
    fixed = [t for t in tasks if "prompt" not in t]
    plans = [layout(t, tok) for t in fixed]
    ran = engine.pinned([(t["id"], p, rows) for t, (p, rows, _) in zip(fixed, plans, strict=True)])
    for t, (_, rows, whole), (canvas, steps) in zip(fixed, plans, ran, strict=True):
        if not np.array_equal(canvas[rows >= 0], rows[rows >= 0]):
            raise SystemExit(f"task {t['id']}: a pinned row was changed")
        language = t.get("language")
        out.append(
            {
                "id": t["id"],
                "kind": t["kind"] if language is None else f"infill_{language}",
                "form": t.get("form"),
                "right": bool(np.array_equal(canvas, whole)),
                "steps": steps,
                "given": tok.decode(canvas[rows < 0].tolist(), skip_special_tokens=False),
                "tokens": t.get("gap_tokens"),
                "far": t.get("suffix_tokens", 0) > CANVAS,
            }
        )
    return sorted(out, key=lambda r: r["id"])


def table(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares right and mean steps, by kind, by question form and by gap length."""

    def line(rows: list[dict[str, Any]]) -> dict[str, Any]:
        n = len(rows)
        return {
            "n": n,
            "right": round(sum(r["right"] for r in rows) / n, 4),
            "steps": round(sum(r["steps"] for r in rows) / n, 2),
        }

    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for r in results:
        groups[r["kind"]].append(r)
        if r["form"] and r["kind"] == "question":
            groups[f"{r['kind']}/{r['form']}"].append(r)
        if r.get("tokens"):
            a, b = next(x for x in LENGTHS if x[0] <= r["tokens"] <= x[1])
            groups[f"infill/{a:02}-{b:02}"].append(r)
            groups[f"{r['kind']}/{a:02}-{b:02}"].append(r)
            if r["far"]:
                groups["infill/far suffix"].append(r)
    return {k: line(v) for k, v in sorted(groups.items())}


def main() -> None:
    """Score and print."""
    ap = argparse.ArgumentParser()
    ap.add_argument("--tasks", type=Path, required=True)
    which = ap.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", type=Path)
    which.add_argument("--gguf", type=Path)
    ap.add_argument("--tokenizer", type=Path, help="folder of tokenizer.json; the checkpoint's own by default")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--same-noise", action="store_true")
    ap.add_argument("--every", type=int, default=1, help="score every n-th task only")
    ap.add_argument("--batch", type=int, default=25)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--dump", type=Path, help="write one JSON line for each task")
    args = ap.parse_args()
    tasks = [json.loads(x) for x in args.tasks.read_text(encoding="utf-8").splitlines()][:: args.every]
    engine: Engine
    if args.checkpoint:
        import torch

        torch.set_num_threads(args.threads)
        engine = Transformers(args.checkpoint, args.seed, args.same_noise, args.batch)
    else:
        engine = PyDiffGGUF(args.gguf, args.seed, args.same_noise)
    folder = args.tokenizer or args.checkpoint
    if folder is None:
        raise SystemExit("--gguf needs --tokenizer")
    tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
    began = time.time()
    results = score(engine, tasks, tok)
    if args.dump:
        args.dump.write_text("".join(json.dumps(r) + "\n" for r in results), encoding="utf-8")
    causal = {}
    if isinstance(engine, Transformers):
        causal = {"causal loss per token": round(engine.causal([t for t in tasks if t["kind"] == "infill"]), 4)}
    print(
        json.dumps(
            {
                "engine": "transformers" if args.checkpoint else "pydiffgguf",
                "seed": args.seed,
                "same_noise": args.same_noise,
                "seconds": round(time.time() - began, 1),
                **causal,
                "scores": table(results),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
