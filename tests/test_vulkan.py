"""What is particular to Vulkan: tensors of a limited size, memory in pieces, operators that it lacks for some types.

Skipped where no Vulkan device is found. Mesa's software driver, a CPU, is one when GGML_VK_VISIBLE_DEVICES names it
(`.ci/vulkan`); what tests run at every place runs on it too, tests/places.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import two_layers

from pydiffgguf import CanvasBatch, CanvasSpec, DiffusionModel, demo_model_path
from pydiffgguf._binding.functions import build_info

pytestmark = pytest.mark.skipif(
    not any(device["name"].startswith("Vulkan") for device in build_info()["devices"]), reason="no Vulkan device"
)

# ggml reads its environment when it first sees the device, so each of these is a process. Prints the steps of a canvas
# on the device and on the CPU, and the device's sampler; or the error.
STEPS = """
import json, sys
from pydiffgguf import DiffGGUFError, DiffusionModel

def steps(**options):
    n_ctx = int(sys.argv[2])
    with DiffusionModel(sys.argv[1], type_kv="f32", n_ctx=n_ctx, **options) as model, model.session() as session:
        session.encode([2, *range(40, 90)])
        rows = []
        session.run_canvas(seed=1, max_steps=6, on_step=lambda step: rows.append(step.argmax.tolist()))
        return session.sampler, rows

try:
    print(json.dumps([steps(n_gpu_layers="auto"), steps(n_gpu_layers=0)]))
except DiffGGUFError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def steps(path: Path, n_ctx: int, **environment: str) -> Any:
    command = [sys.executable, "-c", STEPS, str(path), str(n_ctx)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_in_pieces(tiny_gguf: Path) -> None:
    """Drivers give at most so much at a time, often 4 GB: weights, cache and buffers lie in many pieces then."""
    there, here = steps(tiny_gguf, 256, GGML_VK_SUBALLOCATION_BLOCK_SIZE="100000")
    assert (there[0], here[0]) == ("operators", "host")
    assert len(here[1]) >= 3 and there[1] == here[1]


@pytest.mark.parametrize(
    ("largest", "error", "text"),
    [
        (100_000, "UnsupportedError", "takes no tensor of 121856 bytes, and there is one among weights"),
        (2_000_000, "UnsupportedError", "takes no tensor of 2097152 bytes, and there is one among a canvas of logits"),
        (5_000_000, "OutOfMemoryError", "bytes for the KV cache (n_ctx 2048); fewer n_gpu_layers need less"),
    ],
)
def test_a_tensor_that_the_device_cannot_hold(largest: int, error: str, text: str) -> None:
    """Named with its size, and with what it is one of, before ggml meets it."""
    found, message = steps(demo_model_path(), 2048, GGML_VK_FORCE_MAX_BUFFER_SIZE=str(largest))
    assert found == error and text in message and "Vulkan0" in message


@pytest.mark.parametrize("type_kv", ["f16", "f32", "bf16", "q8_0"])
def test_no_cache_sends_attention_to_the_cpu(type_kv: str) -> None:
    with DiffusionModel(demo_model_path(), type_kv=type_kv) as model, model.session() as session:
        assert session.fallbacks == []


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_nl", "iq4_xs", "dg4"])
def test_no_type_of_weights_sends_products_to_the_cpu(tmp_path: Path, type: str) -> None:
    two_layers.write(tmp_path / "x.gguf", type)
    with DiffusionModel(tmp_path / "x.gguf", n_ctx=1024) as model, model.session() as session:
        assert session.fallbacks == []


def test_rows_that_begin_anywhere(tmp_path: Path) -> None:
    """Vulkan's get_rows takes no matrix, and no ids, at an odd address: slices of an embedding with rows of 630 bytes,
    and the ids of the second of two canvases that go through the layers one after the other."""
    two_layers.write(tmp_path / "x.gguf", "q6_k", hidden_size=768, vocab_size=12_001)
    logits, argmax = [], []
    for n_gpu_layers in ("auto", 0):
        options = {"n_gpu_layers": n_gpu_layers, "n_ctx": 256, "type_kv": "f32"}
        with DiffusionModel(tmp_path / "x.gguf", **options) as model, model.session(n_rows=99) as session:
            session.encode(range(2, 90))
            canvas = np.arange(64) * 187
            logits.append(session.denoise(canvas, session.denoise(canvas)))
            batch = CanvasBatch(session, [CanvasSpec(n_rows=n, seed=n) for n in (33, 31, 35)], model.sampling)
            batch.step()
            argmax.append(np.concatenate([batch.rows(i).argmax for i in range(3)]))
    # The CPU multiplies by 8-bit integers: measured 0.02 apart, and one argmax of 99.
    there, here = logits
    assert np.linalg.norm(there - here) < 0.05 * np.linalg.norm(here)
    assert np.mean(argmax[0] == argmax[1]) > 0.9
