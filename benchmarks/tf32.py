"""What TF32 does to the demo model: routers that choose other experts, steps, texts.

    python benchmarks/tf32.py

ggml's CUDA backend lets cuBLAS multiply float32 matrices in TF32: operands lose all but 10 bits of their mantissa. In
this engine's graphs those are the router's product, attention's two and the generic self-conditioning signal. Here a
forward pass in numpy, with the demo model's weights, rounds the operands of one or more of them, on the trajectories of
held-out tasks with the draws that the engine makes:

* along float32's own trajectory, on the same canvas, cache and processed logits: how many routers of a row choose
  another set of experts, and how far the logits are off;
* on its own trajectory: whether steps and text are the same.

The pass is checked against the engine first, with a file of the same weights in float32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from pydiffgguf import DiffusionModel, demo_model_path
from pydiffgguf._binding.functions import noise_canvas, noise_renoise, noise_uniform, sample

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

TASKS = Path(__file__).resolve().parents[1] / "tests/data/demo_tasks.jsonl"
#: The products that ggml-cuda makes in TF32, by name.
PARTS = ("router", "q·k", "scores·V", "signal")
#: Which of them are made so in a variant.
VARIANTS: dict[str, tuple[str, ...]] = {
    **{part: (part,) for part in PARTS},
    "all four": PARTS,
    "all except the router, as built": PARTS[1:],
}


def tf32(x: Floats) -> Floats:
    """Rounded to 10 bits of mantissa, to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFFE000)).view(np.float32)


def softmax(z: Floats) -> Floats:
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]


def gelu(x: Floats) -> Floats:
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))


class Net:
    """The forward pass of csrc/pass/graph.cpp in numpy, of a file's weights as float32."""

    def __init__(self, model: DiffusionModel, path: Path) -> None:
        self.config, self.layers = model.config, model.config.layers
        self.w: dict[str, Floats] = {
            t.name.removesuffix(".weight"): gguf.dequantize(t.data, t.tensor_type).astype(np.float32)
            for t in gguf.GGUFReader(path).tensors
        }
        self.rounded: tuple[str, ...] = ()
        self.chosen: list[npt.NDArray[np.int64]] = []  # the experts of each layer's rows, ascending, of the last pass
        self.reset()

    def reset(self) -> None:
        self.n_past = 0
        self.cache: list[list[Floats]] = [[] for _ in self.layers]

    def multiply(self, part: str, a: Floats, b: Floats) -> Floats:
        return tf32(a) @ tf32(b) if part in self.rounded else a @ b

    def norm(self, x: Floats, weight: Floats | float = 1.0) -> Floats:
        scale = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(self.config.norm_eps))
        return (x * scale * weight).astype(np.float32)  # type: ignore[no-any-return]

    def rope(self, x: Floats, positions: Ids, sliding: bool) -> Floats:
        half = x.shape[-1] // 2
        base = self.config.rope_base_sliding if sliding else self.config.rope_base_full
        divisors = np.float32(base) ** (np.arange(half, dtype=np.float32) / np.float32(half))
        divisors = divisors if sliding else divisors * self.w["rope_freqs"]
        angle = (positions[:, None, None].astype(np.float32) / divisors).astype(np.float32)
        a, b, cos, sin = x[..., :half], x[..., half:], np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(np.float32)  # type: ignore[no-any-return]

    def attention(self, index: int, x: Floats, causal: bool) -> Floats:
        name, layer, n = f"blk.{index}.", self.layers[index], len(x)
        positions = np.arange(self.n_past, self.n_past + n, dtype=np.int32)
        h = self.norm(x, self.w[name + "attn_norm"])
        q, k = (h @ self.w[name + f"attn_{which}"].T for which in "qk")
        v = h @ self.w[name + "attn_v"].T if layer.sliding else k
        q = q.reshape(n, self.config.n_head, layer.head_dim)
        k, v = (y.reshape(n, layer.n_head_kv, layer.head_dim) for y in (k, v))
        q = self.rope(self.norm(q, self.w[name + "attn_q_norm"]), positions, layer.sliding)
        k = self.rope(self.norm(k, self.w[name + "attn_k_norm"]), positions, layer.sliding)
        held = [y.astype(np.float16).astype(np.float32) for y in (k, self.norm(v))]
        if causal:
            self.cache[index] = held if not self.cache[index] else self._joined(index, held)
            keys, values = self.cache[index]
        else:
            keys, values = self._joined(index, held) if self.cache[index] else held
        at = np.arange(len(keys))
        seen = at[None, :] <= (positions[:, None] if causal else len(keys))
        if layer.sliding:
            anchor = positions[:, None] if causal else np.full((n, 1), self.n_past)
            seen = seen & (at[None, :] >= anchor - (self.config.sliding_window - 1))
        share = self.config.n_head // layer.n_head_kv
        out = np.empty((n, self.config.n_head, layer.head_dim), np.float32)
        for head in range(self.config.n_head):
            scores = self.multiply("q·k", q[:, head], keys[:, head // share].T)
            weights = softmax(np.where(seen, scores, np.float32(-np.inf)))
            out[:, head] = self.multiply("scores·V", weights, np.ascontiguousarray(values[:, head // share]))
        attended = out.reshape(n, -1) @ self.w[name + "attn_output"].T
        return x + self.norm(attended, self.w[name + "post_attention_norm"])

    def _joined(self, index: int, held: list[Floats]) -> list[Floats]:
        return [np.concatenate(pair) for pair in zip(self.cache[index], held, strict=True)]

    def experts(self, index: int, x: Floats) -> Floats:
        name, used = f"blk.{index}.", self.config.n_expert_used
        scale = self.w[name + "ffn_gate_inp.scale"] / np.float32(np.sqrt(self.config.n_embd))
        p = softmax(self.multiply("router", self.norm(x, scale), self.w[name + "ffn_gate_inp"].T))
        chosen = np.sort(np.argsort(-p, axis=1, kind="stable")[:, :used], axis=1)
        self.chosen.append(chosen)
        weights = np.take_along_axis(p, chosen, axis=1)
        weights = weights / weights.sum(axis=1, keepdims=True) * self.w[name + "ffn_down_exps.scale"][chosen]
        h = self.norm(x, self.w[name + "pre_ffw_norm_2"])
        out = np.zeros_like(x)
        for expert in range(self.config.n_expert):
            rows, place = np.nonzero(chosen == expert)
            both = h[rows] @ self.w[name + "ffn_gate_up_exps"][expert].T
            gate, up = np.split(both, 2, axis=1)
            one = (gelu(gate) * up) @ self.w[name + "ffn_down_exps"][expert].T
            out[rows] += one * weights[rows, place][:, None]
        return out

    def gated(self, x: Floats, name: str) -> Floats:
        return (gelu(x @ self.w[name + "gate"].T) * (x @ self.w[name + "up"].T)) @ self.w[name + "down"].T

    def layer(self, index: int, x: Floats, causal: bool) -> Floats:
        name = f"blk.{index}."
        x = self.attention(index, x, causal)
        dense = self.gated(self.norm(x, self.w[name + "ffn_norm"]), name + "ffn_")
        both = self.norm(dense, self.w[name + "post_ffw_norm_1"])
        both = both + self.norm(self.experts(index, x), self.w[name + "post_ffw_norm_2"])
        scale = self.w[name + ("enc_layer_output_scale" if causal else "layer_output_scale")]
        return (x + self.norm(both, self.w[name + "post_ffw_norm"])) * scale

    def embed(self, ids: Ids) -> Floats:
        return self.w["token_embd"][ids] * np.float32(np.sqrt(self.config.n_embd))

    def encode(self, ids: Ids) -> None:
        x = self.embed(ids)
        for index in range(len(self.layers)):
            x = self.layer(index, x, True)
        self.n_past += len(ids)

    def denoise(self, ids: Ids, processed: Floats | None) -> Floats:
        """Logits of a canvas, softcapped: float32 [C, V]."""
        x = self.embed(ids)
        if processed is not None:
            signal = self.multiply("signal", softmax(processed), self.w["token_embd"])
            signal = self.norm(signal * np.float32(np.sqrt(self.config.n_embd)), self.w["self_cond_pre_norm"])
            x = x + self.gated(signal, "self_cond_")
        x = self.norm(x)
        self.chosen = []
        for index in range(len(self.layers)):
            x = self.layer(index, x, False)
        cap = np.float32(self.config.logit_softcap)
        z = self.norm(x, self.w["output_norm"]) @ self.w["token_embd"].T
        return np.tanh(z / cap) * cap


@dataclass
class Run:
    """A trajectory: what went into each step, what came out."""

    inputs: list[tuple[Ids, Floats | None]] = field(default_factory=list)
    logits: list[Floats] = field(default_factory=list)
    chosen: list[list[npt.NDArray[np.int64]]] = field(default_factory=list)
    tokens: Ids = field(default_factory=lambda: np.empty(0, np.int32))


def trajectory(net: Net, model: DiffusionModel, prompt: Ids, seed: int) -> Run:
    """The first canvas after a prompt, by the engine's sampler and draws.

    tests/parity/reference.py has the loop and the temperature for torch. It judges the engine and shares nothing with
    it, and this needs no torch.
    """
    sampling, (c, v) = model.sampling, (model.config.canvas_length, model.config.n_vocab)
    net.reset()
    net.encode(prompt)
    canvas, processed, last, equal = noise_canvas(seed, 0, c, v), None, None, 0
    run = Run()
    for step in range(sampling.steps):
        run.inputs.append((canvas, processed))
        z = net.denoise(canvas, processed)
        run.logits.append(z)
        run.chosen.append(net.chosen)
        draws = {"uniform": noise_uniform(seed, 0, step, c), "renoise": noise_renoise(seed, 0, step, c, v)}
        out = sample(z, sampling, step=step, **draws)
        share = (sampling.steps - step) / sampling.steps
        processed = z / np.float32(sampling.t_min + (sampling.t_max - sampling.t_min) * share)
        equal = equal + 1 if last is not None and np.array_equal(last, out.argmax) else 0
        canvas, last = out.canvas, out.argmax
        if equal >= sampling.stability_threshold and out.entropy.mean() < sampling.confidence_threshold:
            break
    run.tokens = np.asarray(last)
    return run


@dataclass
class Found:
    """What a variant changed, over all tasks."""

    routers: int = 0
    flipped: int = 0
    worst: float = 0.0
    steps: int = 0
    other_steps: int = 0
    other_texts: int = 0


def compare(net: Net, model: DiffusionModel, prompts: Iterable[Ids]) -> tuple[int, int, dict[str, Found]]:
    """Tasks, steps in float32, and what each variant changed."""
    found = {name: Found() for name in VARIANTS}
    n_tasks = n_steps = 0
    for seed, prompt in enumerate(prompts):
        net.rounded = ()
        exact = trajectory(net, model, prompt, seed)
        n_tasks, n_steps = n_tasks + 1, n_steps + len(exact.inputs)
        caches = (net.n_past, net.cache)
        for name, parts in VARIANTS.items():
            f = found[name]
            net.rounded = parts
            net.n_past, net.cache = caches
            for (canvas, processed), z, chosen in zip(exact.inputs, exact.logits, exact.chosen, strict=True):
                difference = net.denoise(canvas, processed) - z
                f.worst = max(f.worst, float(np.linalg.norm(difference) / np.linalg.norm(z)))
                for ours, theirs in zip(net.chosen, chosen, strict=True):
                    f.routers += len(ours)
                    f.flipped += int((ours != theirs).any(axis=1).sum())
            own = trajectory(net, model, prompt, seed)
            f.steps += len(own.inputs)
            f.other_steps += len(own.inputs) != len(exact.inputs)
            f.other_texts += not np.array_equal(own.tokens, exact.tokens)
    return n_tasks, n_steps, found


def write_float32(source: Path, out: Path) -> None:
    """The file with every tensor in float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "diffusion-gemma")
    for name, kept in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = kept.types[0]
        if kind == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, kept.contents())
        else:
            writer.add_key_value(name, kept.contents(), kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(net: Net, path: Path, prompt: Ids) -> float:
    """How far the pass is from the engine's, of the same weights in float32."""
    with tempfile.TemporaryDirectory() as folder:
        write_float32(path, Path(folder) / "f32.gguf")
        with DiffusionModel(Path(folder) / "f32.gguf", n_gpu_layers=0) as model, model.session() as session:
            canvas = noise_canvas(1, 0, model.config.canvas_length, model.config.n_vocab)
            session.encode(prompt)
            net.reset()
            net.encode(prompt)
            worst, processed = 0.0, None
            for _ in range(2):
                ours, theirs = net.denoise(canvas, processed), session.denoise(canvas, processed)
                worst = max(worst, float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)))
                processed = theirs / np.float32(0.6)
            return worst


def prompts(model: DiffusionModel, kinds: Iterable[str], n: int) -> list[Ids]:
    """The first n tasks of each kind, as a chat template renders them."""
    chosen: list[dict[str, Any]] = [json.loads(line) for line in TASKS.read_text(encoding="utf-8").splitlines()]
    found = []
    for kind in kinds:
        for task in [task for task in chosen if task["kind"] == kind][:n]:
            ids = model.chat_tokens([{"role": "user", "content": task["prompt"]}])
            found.append(np.asarray(ids, np.int32))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20, metavar="N", help="tasks of each kind (20)")
    args = parser.parse_args()
    path = Path(demo_model_path())
    with DiffusionModel(path, n_gpu_layers=0) as model:
        net = Net(model, path)
        asked = prompts(model, ("sudoku_chat", "question"), args.tasks)
        print(f"the pass in numpy is within {check(net, path, asked[0]):.1e} of the engine's\n")
        n_tasks, n_steps, found = compare(net, model, asked)
    print(f"{n_tasks} tasks, {n_steps} steps in float32\n")
    print("| TF32 in | routers that choose otherwise | logits off by, at most | steps | other steps | other texts |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, f in found.items():
        share = f"{f.flipped:,} of {f.routers:,}"
        print(f"| {name} | {share} | {f.worst:.1e} | {f.steps} | {f.other_steps} | {f.other_texts} |")


if __name__ == "__main__":
    main()
