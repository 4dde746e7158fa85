"""docs/PERFORMANCE.md and the arithmetic behind it; the script that measures on a GPU, as far as that goes without."""

from __future__ import annotations

import re
from pathlib import Path

import gpu_first_hour
import performance_model as paper
import pytest

from pydiffgguf.hub import demo_model_path
from pydiffgguf.model import DiffusionModel

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "PERFORMANCE.md"


def test_the_page_holds_the_scripts_tables() -> None:
    """Each table between its marks is what performance_model.py prints."""
    page = PAGE.read_text(encoding="utf-8")
    found = dict(re.findall(r"<!-- ([a-z0-9_ ]+) -->\n(\|.*?)\n<!-- end -->", page, re.DOTALL))
    assert found == paper.tables(1024)


def test_a_steps_bytes_are_those_of_the_file() -> None:
    """Every weight is read once, but for the norms' few bytes that only the encoder or nobody reads."""
    for kind in ("q4_k_m", "q8_0"):
        read = sum(p.n_bytes for p in paper.step_parts(kind, 1024) if p.name in ("dense weights", "experts", "head"))
        assert read == pytest.approx(sum(t.n_bytes for t in paper.tensors(kind)), rel=1e-5)


def test_a_steps_operations_are_those_of_the_active_weights() -> None:
    """Two for each of the 3.8 G weights that a token uses, in the product of 256 rows."""
    parts = {p.name: p for p in paper.step_parts("q8_0", 1024)}
    total = sum(parts[name].operations for name in ("dense weights", "experts", "head"))
    assert total == pytest.approx(2 * 256 * 3.8e9, rel=0.03)


def test_floors_go_with_bandwidth_and_types() -> None:
    by_device = [paper.floors("q4_k_m", device, 1024) for device in (paper.H100, paper.RTX_5090, paper.RTX_4090)]
    steps = [f.step for f in by_device]
    assert steps == sorted(steps)
    assert all(f.n_cpu_moe == 0 for f in by_device)
    small = paper.floors("q4_k_m", paper.RTX_4070, 1024)
    assert small.n_cpu_moe > 0 and small.host > small.memory
    assert paper.floors("q8_0", paper.H100, 1024).step > by_device[0].step


def test_the_first_hour_refuses_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_first_hour.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"no NVIDIA GPU here .*: nothing was measured"):
        gpu_first_hour.main(["model.gguf"])


def test_candidates_are_counted_on_any_device() -> None:
    """A row's softmax gets narrower as its canvas settles."""
    with DiffusionModel(demo_model_path()) as model:
        counted = gpu_first_hour.count_candidates(model, "What colour is the sky?", 2)
        assert counted[0]["most"] <= model.config.n_vocab
    assert counted[-1]["median"] < counted[0]["median"]
    assert "rows beyond" in gpu_first_hour.show_candidates(counted)
