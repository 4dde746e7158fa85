"""What `memory()` predicts, against what a process then holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import shapes

FILLED = """
import re, sys
import numpy as np
from pathlib import Path
from pydiffgguf import DiffusionModel

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

with DiffusionModel(sys.argv[1], n_ctx=8192, type_kv=sys.argv[2], n_threads=2) as model:
    predicted = model.memory(n_ctx=8192)
    before = anonymous()
    with model.session() as session:
        session.encode(np.arange(8192 - model.config.canvas_length) % model.config.n_vocab)
        session.run_canvas(seed=1, max_steps=3)
        print(predicted.kv_cache + predicted.compute + predicted.logits, anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("type_kv", ["f16", "q8_0"])
def test_a_full_session_holds_what_was_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type_kv: str) -> None:
    """Within 3 % of anonymous memory, with every position of the context used, at some 60 MB. A megabyte beside that is
    Python's and the threads', whatever the model."""
    small = shapes.SHAPES["724m"] | dict(
        vocab_size=65_536,
        hidden_size=256,
        intermediate_size=256,
        layer_types=["sliding_attention", "full_attention"],
        num_hidden_layers=2,
        num_experts=4,
        moe_intermediate_size=128,
        canvas_length=128,
    )
    monkeypatch.setitem(shapes.SHAPES, "small", small)
    shapes.write(tmp_path / "x.gguf", "small")
    done = subprocess.run(
        [sys.executable, "-c", FILLED, tmp_path / "x.gguf", type_kv], capture_output=True, text=True, check=True
    )
    predicted, measured = map(int, done.stdout.split())
    assert predicted > 40e6
    assert abs(measured - 1e6 - predicted) < 0.03 * predicted, (predicted, measured)
