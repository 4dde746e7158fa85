"""Whether what is computed is right: this project's own tests at the place, the same texts there and on the CPU, and
NVIDIA's memory checker."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from first_hour import cards
from first_hour.stages import REPOSITORY, Context, StageError

#: Which tests of tests/parity are a place's. The CPU takes 20 seeds of each random net where a GPU takes 5: a minute
#: more, without which the demo model's trajectories remain.
TESTS = {"cuda": "CUDA and not servers", "cpu": "cpu and not servers and not random_nets"}
TASKS = REPOSITORY / "tests" / "data" / "demo_tasks.jsonl"
#: ggml has cuBLAS round float32 factors to 10 bits (TF32); this forbids it.
TRUE_FLOAT32 = {"NVIDIA_TF32_OVERRIDE": "0"}


def pytest(words: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """How many of these tests passed, failed and were skipped; `figures`: what they measured, as they print it."""
    # Another torch than the tests' own may warn of things.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", *words]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, **(environment or {})}
    )
    print(done.stdout + done.stderr, flush=True)
    counts = {kind: 0 for kind in ("passed", "failed", "error", "skipped")}
    last = done.stdout.strip().rpartition("\n")[2]
    for number, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", last):
        counts[kind] = int(number)
    figures = [line for line in done.stdout.splitlines() if re.search(r"relative error|seeds equal", line)]
    return {"status": done.returncode, **counts, "figures": figures}


def require(result: Mapping[str, Any]) -> None:
    """Raises StageError unless tests ran and all passed."""
    if result["status"] != 0 or result["passed"] == 0:
        failed = result["failed"] + result["error"]
        raise StageError(f"{failed} tests failed, {result['passed']} passed (pytest ended with {result['status']})")


def prompts(n: int) -> list[str]:
    """`n` of the demo model's held-out tasks, of all kinds."""
    tasks = [json.loads(line) for line in TASKS.read_text(encoding="utf-8").splitlines()]
    every = [task["prompt"] for task in tasks if "prompt" in task]
    return [every[i * len(every) // n] for i in range(n)]


def texts() -> list[dict[str, Any]]:
    """The demo model's answers on the CPU and where its layers fit, with the same seeds: equal ids, and the steps."""
    from pydiffgguf import DiffusionModel, demo_model_path

    asked = prompts(8)
    answers: dict[str, list[Any]] = {}
    for name, layers in (("cpu", 0), ("here", "auto")):
        with DiffusionModel(demo_model_path(), n_gpu_layers=layers) as model:
            answers[name] = [model.generate(prompt, seed=seed) for seed, prompt in enumerate(asked)]
    return [
        {
            "prompt": prompt,
            "ids": len(cpu.tokens),
            "equal": sum(a == b for a, b in zip(cpu.tokens, here.tokens, strict=False)),
            "same": list(cpu.tokens) == list(here.tokens),
            "steps": [cpu.stats.steps, here.stats.steps],
        }
        for prompt, cpu, here in zip(asked, answers["cpu"], answers["here"], strict=True)
    ]


def child(code: str, environment: Mapping[str, str] | None = None, before: Sequence[str] = ()) -> str:
    """What `code` prints in a Python of its own that sees this package. Raises StageError when it fails."""
    folder = Path(__file__).resolve().parents[1]
    command = [*before, sys.executable, "-c", code]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**cards.environment(), "PYTHONPATH": str(folder), **(environment or {})},
    )
    print(done.stdout + done.stderr, flush=True)
    if done.returncode != 0:
        lines = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise StageError(f"a child ended with {done.returncode}:\n{lines}")
    return done.stdout.strip().rpartition("\n")[2]


def parity(context: Context) -> None:
    """Texts first, which need no reference; then the tests that compare with transformers, in true float32."""
    code = "import json; from first_hour.checks import texts; print(json.dumps(texts()))"
    context.record(texts=json.loads(child(code)))
    if context.place == "cuda":
        context.record(texts_float32=json.loads(child(code, TRUE_FLOAT32)))
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        context.record(tests=f"not run: {' and '.join(missing)} missing")
        raise StageError(f"{' and '.join(missing)} missing: the tests against transformers did not run")
    files = [f"tests/parity/test_{name}.py" for name in ("logits", "trajectory")]
    workers = str(min(8, len(os.sched_getaffinity(0))))
    words = [*files, "-k", TESTS[context.place], "-n", workers]
    context.record(tests=pytest(words, TRUE_FLOAT32))
    require(context.result["tests"])


def smallest() -> None:
    """The demo model, a few steps with every sampler that a GPU has: what the checker watches."""
    from pydiffgguf import DiffusionModel, demo_model_path

    for sampler in ("kernels", "operators"):
        with DiffusionModel(demo_model_path(), sampler=sampler) as model:
            n_tokens = len(model.generate(prompts(1)[0], seed=1, max_steps=3, max_tokens=16).tokens)
            print(f"{sampler}: {n_tokens} tokens")


def sanitizer(context: Context) -> None:
    """compute-sanitizer's memcheck over `smallest`."""
    program = cards.tool("compute-sanitizer")
    if program is None:
        raise StageError("compute-sanitizer is not here: a part of the CUDA toolkit")
    before = [program, "--tool", "memcheck", "--error-exitcode", "9"]
    child("from first_hour.checks import smallest; smallest()", before=before)
    context.record(memcheck="no errors")
