"""`inspect --fit`: what goes onto a device adds up, and is not less than what a session takes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from shapes import write_head

from pydiffgguf import cli
from pydiffgguf._binding.native import NativeModel
from pydiffgguf.convert.inspection.fit import FitPlan, parse_size, plan
from pydiffgguf.convert.inspection.inspect import FileReport, inspect_file

GB = 10**9
TYPES = ("q4_k_m", "q8_0")


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The published files' heads, with holes for weights."""
    folder = tmp_path_factory.mktemp("released")
    for kind in TYPES:
        write_head(folder / f"{kind}.gguf", "26b-a4b", type=kind)
    return {kind: folder / f"{kind}.gguf" for kind in TYPES}


@pytest.fixture(scope="module")
def q4(heads: dict[str, Path]) -> FileReport:
    return inspect_file(heads["q4_k_m"])


def test_the_head_is_that_of_the_published_file(heads: dict[str, Path], q4: FileReport, tmp_path: Path) -> None:
    """Bytes of tensor data and tensors by type are the published Q4_K_M's."""
    assert write_head(tmp_path / "head.gguf", "26b-a4b", type="q4_k_m") == 16_790_985_600
    assert {kind: share.tensors for kind, share in q4.types.items()} == {
        "F32": 423,
        "Q4_K": 194,
        "Q5_0": 33,
        "Q8_0": 28,
        "Q6_K": 14,
    }
    assert [f for f in q4.findings if f.level == "error"] == []
    assert heads["q8_0"].stat().st_size == pytest.approx(26.9e9, rel=0.005)


def check_sum(p: FitPlan, report: FileReport) -> None:
    assert all(share.device >= 0 and share.host >= 0 for share in p.shares)
    assert sum(share.device for share in p.shares) + p.free == p.device_bytes
    assert p.free >= 0
    weights = sum(s.device + s.host for s in p.shares if s.what.startswith(("embedding", "layers", "experts")))
    assert weights == sum(t.n_bytes for t in report.tensors) == report.memory.weight_bytes
    (cache,) = [s for s in p.shares if s.what.startswith("KV")]
    assert cache.device + cache.host == report.memory.kv_bytes


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("size", [8, 12, 16, 18, 24])
def test_the_plan_adds_up(heads: dict[str, Path], kind: str, size: int) -> None:
    """Every byte of weights and cache has one place, and the device is not overfilled; what is left over would not hold
    the experts of one more layer."""
    report = inspect_file(heads[kind])
    p = plan(report, size * GB)
    check_sum(p, report)
    assert p.n_gpu_layers == 30
    by_layer = [
        sum(t.n_bytes for t in report.tensors if t.name.startswith(f"blk.{i}.ffn_") and "exps.w" in t.name)
        for i in range(30)
    ]
    (experts,) = [s for s in p.shares if s.what.startswith("experts")]
    assert experts.host == sum(by_layer[: p.n_cpu_moe])
    assert p.n_cpu_moe == 0 or p.free < by_layer[p.n_cpu_moe - 1]


def test_a_larger_device_takes_more(q4: FileReport) -> None:
    """From nothing to everything, a step never takes anything back; 18 GB hold all but two layers' experts, which is
    what "within 18 GB" leaves beside a context of 8,192 and a driver."""
    plans = [plan(q4, size * GB // 4) for size in range(1, 100)]
    for p in plans:
        check_sum(p, q4)
    for less, more in pairwise(plans):
        assert less.n_gpu_layers <= more.n_gpu_layers
        assert less.n_cpu_moe >= more.n_cpu_moe
    assert (plans[0].n_gpu_layers, plans[0].offload_kv) == (0, False)
    assert 0 < min(p.n_gpu_layers for p in plans if p.n_gpu_layers) < 30
    assert plans[-1].is_whole and plans[-1].offload_kv
    assert plan(q4, 18 * GB).n_cpu_moe == 2


@pytest.mark.parametrize("shape", ["26b-a4b", "724m"])
def test_buffers_are_not_less_than_a_session_takes(shape: str, tmp_path: Path) -> None:
    """The engine's own planning: with its operators, which take less, and with ggml's, which devices have. A device's
    session may have any sampler, and the estimate is for the one that takes most."""
    write_head(tmp_path / "head.gguf", shape, type="q4_k_m")
    contexts: list[dict[str, Any]] = [{"n_ctx": n} for n in (257, 1024, 8192, 32_768)]
    others: list[dict[str, Any]] = [{"n_rows": 512}, {"n_rows": 1280}, {"n_batch": 2048}, {"type_kv": "f32"}]
    model = NativeModel(tmp_path / "head.gguf")
    figures = inspect_file(tmp_path / "head.gguf").figures
    assert figures is not None
    for options in (*contexts, *others):
        needs = figures.needs(**options)
        for sampler in ("host", "operators"):
            for ggml_operators in (False, True):
                memory = model.memory(**options, sampler=sampler, ggml_operators=ggml_operators)
                assert sum(needs.cache) == memory.kv_cache
                assert needs.logits >= memory.logits
                assert needs.passes + needs.sampling >= memory.compute
        assert needs.logits == model.memory(**options).logits


def test_buffers_are_not_much_more_either(heads: dict[str, Path], q4: FileReport) -> None:
    """Of the released shape at a context of 8,192. A session with kernels takes what one on the host does, and room for
    8,192 candidates (8 bytes each) and a few numbers of each row: measured, the needs are 1.058 times that. They count
    a chunk's view of the cache as the 8,192 rows that 7,936 are rounded to, beside all that may wait meanwhile."""
    memory = NativeModel(heads["q4_k_m"]).memory(sampler="host", ggml_operators=True)
    needs = q4.memory.needs
    assert needs is not None
    assert needs.passes + needs.sampling <= 1.06 * (memory.compute + 256 * (8192 * 8 + 4))


def test_a_long_context_takes_the_place_of_experts(heads: dict[str, Path], q4: FileReport) -> None:
    long = plan(inspect_file(heads["q4_k_m"], n_ctx=65_536), 16 * GB)
    quantized = plan(inspect_file(heads["q4_k_m"], n_ctx=65_536, type_kv="q8_0"), 16 * GB)
    assert long.n_cpu_moe > quantized.n_cpu_moe > plan(q4, 16 * GB).n_cpu_moe


def test_sizes(q4: FileReport) -> None:
    assert parse_size("16GB") == parse_size(" 16 gb") == parse_size("16000MB") == 16 * GB
    assert parse_size("16GiB") == 16 << 30
    assert parse_size("1.5kB") == 1500
    assert parse_size("16000000000") == 16 * GB
    with pytest.raises(ValueError, match="'16' would be bytes: write 16GB or 16GiB"):
        parse_size("16")
    for wrong in ("", "GB", "16 G", "-1GB", "1e9", "16GB free"):
        with pytest.raises(ValueError, match="expected a size such as"):
            parse_size(wrong)
    with pytest.raises(ValueError, match="device_bytes: 0"):
        plan(q4, 0)
    with pytest.raises(ValueError, match="n_rows: 0"):
        plan(q4, GB, n_rows=0)


def test_the_command_shows_the_arithmetic(heads: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(heads["q4_k_m"]), "--fit", "12GB", "--json"]) == 0
    fit = json.loads(capsys.readouterr().out)["fit"]
    assert fit["shares"][0] == {"what": "driver, context, workspace", "device": 500_000_000, "host": 0}
    assert sum(share["device"] for share in fit["shares"]) + fit["free"] == fit["device_bytes"] == 12 * GB
    assert cli.main(["inspect", str(heads["q4_k_m"]), "--fit", "12GB"]) == 0
    shown = capsys.readouterr().out
    assert f"n_gpu_layers=30, n_cpu_moe={fit['n_cpu_moe']}, offload_kv=True" in shown
    assert cli.main(["inspect", str(heads["q4_k_m"]), "--fit", "twelve"]) != 0
    assert "16GiB" in capsys.readouterr().err
