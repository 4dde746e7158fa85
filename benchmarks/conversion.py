"""Convert a checkpoint of the released model's tensor shapes: seconds, memory, and the rate against a plain C loop.

    python benchmarks/conversion.py make DIR                          # 6 GB: 3 layers in bfloat16, sharded
    python benchmarks/conversion.py run DIR --type q4_k_m --build build/cp310-abi3-linux_x86_64

The checkpoint has random weights of the true shapes (layers sliding, sliding, full; embedding of 262,144 rows), and a
tokenizer of the true size: 262,144 tokens and 514,906 merges. `run` converts it in a process of its own, whose memory
it reads from /proc while it works: anonymous (the converter's own) and file-backed pages apart. The plain loop,
benchmarks/plain_loop/quantize_loop.c, is linked against the ggml of the given build tree and does the same rows on as
many threads. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import islice, product
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Any

import numpy as np
import shapes
from rich.progress import track

from pydiffgguf._text import human
from pydiffgguf.convert.recipes import FLOAT_TYPES, TypeRules, recipe
from pydiffgguf.convert.source.checkpoint import Checkpoint, wanted_tensors
from pydiffgguf.convert.source.config import FULL, SLIDING, parse_config
from pydiffgguf.convert.writing import plan_tensors

LAYERS = [SLIDING, SLIDING, FULL]
SHARD_BYTES = 1_000_000_000
TOKENS, MERGES = 262_144, 514_906
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<turn|>", "<|turn>", "<|tool_response>"]


def text_config() -> dict[str, Any]:
    """The released text config, cut to the layers above."""
    config = {k: v for k, v in shapes.SHAPES["26b-a4b"].items() if k != "canvas_length"}
    return {"model_type": "diffusion_gemma_text", **config, "layer_types": LAYERS, "num_hidden_layers": len(LAYERS)}


def tokenizer() -> dict[str, Any]:
    """A BPE tokenizer of the Gemma kind and of the true size: short strings of letters, and ways to merge them."""
    letters = ["".join(s) for n in (1, 2, 3) for s in product(ascii_lowercase, repeat=n)]
    fixed = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), "\u2581", *letters]
    four = ["".join(s) for s in product(ascii_lowercase, repeat=4)]
    tokens = [*fixed, *Random(1).sample(four, TOKENS - len(fixed))]
    long = (t for t in tokens[len(SPECIAL) + 257 :] if len(t) > 1)
    merges = list(islice(([t[:i], t[i:]] for t in long for i in range(1, len(t))), MERGES))
    assert len(merges) == MERGES
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": t, **flags} for i, t in enumerate(SPECIAL)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {t: i for i, t in enumerate(tokens)},
            "merges": merges,
        },
    }


def make(folder: Path) -> None:
    """Writes the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    text = text_config()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "diffusion_gemma", "canvas_length": 256, "text_config": text})
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    config = parse_config(text | {"canvas_length": 256}, "config")
    wanted = [(names[0], shape) for _, _, shape, names in wanted_tensors(config) if names]
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in wanted:
        n_bytes = 2 * math.prod(shape)
        if size and size + n_bytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append((name, shape))
        size += n_bytes
    weight_map = {}
    rng = np.random.default_rng(1)
    for number, group in enumerate(track(groups, description="shards"), 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_shard(folder / file, group, rng)
        weight_map |= {name: file for name, _ in group}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], rng: np.random.Generator) -> None:
    """One safetensors file of Gaussian bfloat16 weights with the deviation of trained ones, about 0.02."""
    header: dict[str, Any] = {}
    at = 0
    for name, shape in tensors:
        n_bytes = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in tensors:
            left = math.prod(shape)
            while left:
                n = min(left, 1 << 22)
                values = rng.standard_normal(n, np.float32) * np.float32(0.02)
                file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())
                left -= n


def memory(pid: int) -> dict[str, int]:
    """RssAnon and RssFile of a process in bytes; empty when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {k: int(v) * 1024 for k, v in re.findall(r"^(RssAnon|RssFile):\s+(\d+) kB", status, re.MULTILINE)}


def run_converter(folder: Path, out: Path, kind: str, threads: int) -> dict[str, float]:
    """Converts in a process of its own; seconds, and the peaks of both kinds of memory."""
    command = [sys.executable, "-m", "pydiffgguf", "convert", str(folder), "-o", str(out), "--type", kind]
    began = time.monotonic()
    process = subprocess.Popen([*command, "--threads", str(threads)], stdout=subprocess.DEVNULL)
    peak: dict[str, int] = {}
    while process.poll() is None:
        for name, value in memory(process.pid).items():
            peak[name] = max(peak.get(name, 0), value)
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(process.returncode)
    return {"seconds": time.monotonic() - began, **peak, "bytes": out.stat().st_size}


def build_loop(build: Path, folder: Path) -> Path:
    """Compiles the plain loop against a build tree's ggml."""
    root = Path(__file__).parents[1]
    libraries = [next(build.rglob(f"libggml-{name}.a")) for name in ("cpu", "base")]
    program = folder / "quantize_loop"
    source = root / "benchmarks" / "plain_loop" / "quantize_loop.c"
    include = f"-I{root / 'vendor' / 'ggml' / 'include'}"
    system = ["-lstdc++", "-lpthread", "-lm", "-ldl"]
    subprocess.run(["cc", "-O2", "-o", program, source, include, *libraries, *system], check=True)
    return program


def plan_file(folder: Path, kind: str, path: Path) -> int:
    """What the loop does: every tensor that the converter quantizes. Returns how many bytes the others have."""
    rest = 0
    lines = []
    with Checkpoint(folder) as checkpoint:
        plan, _ = plan_tensors(checkpoint, TypeRules(recipe(kind), checkpoint.facts()))
        for p, tensor in zip(plan, checkpoint.tensors, strict=True):
            row, rows = tensor.shape[-1], math.prod(tensor.shape[:-1])
            if p.kind in FLOAT_TYPES:
                rest += 2 * row * rows
                continue
            offset = checkpoint.stored(tensor.source).offset
            lines.append(f"{folder / checkpoint.files[tensor.source]} {offset} {rows} {row} {int(p.kind)}\n")
    path.write_text("".join(lines))
    return rest


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the converter on the released model's tensor shapes.")
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("make").add_argument("folder", type=Path)
    sub = commands.add_parser("run")
    sub.add_argument("folder", type=Path)
    sub.add_argument("--type", default="q4_k_m")
    sub.add_argument("--threads", type=int, default=os.cpu_count())
    sub.add_argument(
        "--build", type=Path, required=True, help="a build tree of this project, for the plain loop's ggml"
    )
    sub.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.command == "make":
        make(args.folder)
        return
    with tempfile.TemporaryDirectory(dir=args.folder.parent) as scratch:
        work = Path(scratch)
        loop = build_loop(args.build, work)
        plan_file(args.folder, args.type, work / "plan")
        results = []
        for _ in range(2):  # in turn, so that a slower minute of the machine meets both
            done = subprocess.run(
                [loop, work / "plan", str(args.threads)], check=True, capture_output=True, text=True
            ).stdout.split()
            results.append({"loop_s": float(done[0]), "loop_bytes": int(done[1])})
            results[-1] |= run_converter(args.folder, work / "out.gguf", args.type, args.threads)
    if args.json:
        print(json.dumps(results, indent=2))
        return
    for r in results:
        print(
            f"{args.type}, {args.threads} threads: plain loop {r['loop_s']:.1f} s "
            f"({r['loop_bytes'] / r['loop_s'] / 1e6:.0f} MB/s), converter {r['seconds']:.1f} s to {human(r['bytes'])}: "
            f"{r['loop_s'] / r['seconds']:.0%} of the loop's rate; peak RssAnon {human(r['RssAnon'])}, "
            f"RssFile {human(r['RssFile'])}"
        )


if __name__ == "__main__":
    main()
