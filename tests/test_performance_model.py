"""docs/PERFORMANCE.md and the arithmetic behind it."""

from __future__ import annotations

import re
from pathlib import Path

import performance_model as paper
import pytest

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


def test_cards_are_known_by_the_drivers_name() -> None:
    """Those that share a number and not the peaks are not taken for one another."""
    names = {
        "NVIDIA H100 80GB HBM3": paper.H100,
        "NVIDIA GeForce RTX 4090": paper.RTX_4090,
        "NVIDIA GeForce RTX 4070": paper.RTX_4070,
        "NVIDIA GeForce RTX 4070 Ti": None,
        "NVIDIA H100 PCIe": None,
        "NVIDIA L4": None,
    }
    assert {name: paper.card(name) for name in names} == names
    h200 = paper.card("NVIDIA H200")
    assert h200 is not None and h200.bandwidth > paper.H100.bandwidth


def test_copying_experts_does_not_win_clearly() -> None:
    """What docs/PERFORMANCE.md decides by: mapped pages lose everywhere, pinned memory gains a tenth of an answer to
    1,024 tokens and up to 1.6 times behind 8,192."""
    gains: dict[tuple[str, int], float] = {}
    for away in paper.every_away(1024):
        for host in paper.HOSTS:
            assert away.n_bytes / host.mapped > away.computed(host, paper.CHUNK)
            for n_prompt in paper.PROMPTS:
                computed = away.answer(host, n_prompt, None)
                assert computed < away.answer(host, n_prompt, host.mapped)
                gain = computed / away.answer(host, n_prompt, host.pinned)
                gains[host.name, n_prompt] = max(gain, gains.get((host.name, n_prompt), 0.0))
    assert gains["AVX2", 1024] < 1.13 and gains["AVX-512 with VNNI", 1024] < 1.13
    assert 1.55 < gains["AVX2", 8192] < 1.65
    assert gains["AVX-512 with VNNI", 8192] < 1.35


def test_an_estimate_is_above_its_floor() -> None:
    """The published time, divided by the floor of the same work, is what the best case is made of."""
    factor = paper.CALIBRATOR / sum(p.floor(paper.RTX_4090) for p in paper.encode_parts("q4_k_m", 1024))
    assert factor == pytest.approx(2.3, abs=0.05)
    for device in paper.DEVICES:
        floor, built = paper.floors("q4_k_m", device, 1024), paper.estimate("q4_k_m", device, 1024)
        assert built.best - floor.host == pytest.approx(factor * (floor.step - floor.host))
        assert built.worst > built.best > floor.step
