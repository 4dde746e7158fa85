"""The first hour on a GPU, as far as that goes without one: its stages, its archive, its table."""

from __future__ import annotations

import ctypes
import importlib
import json
import lzma
import math
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import gpu_first_hour
import numpy as np
import pytest
import shapes
from first_hour import candidates, cards, launches, machine, report, runner, stages, steps
from first_hour.stages import STAGES, Context, Stage
from packaging.requirements import Requirement

from pydiffgguf import DiffusionModel, demo_model_path

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("c++")


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(name="", place="cpu", out=tmp_path)


def run(context: Context, *chosen: tuple[str, str, float], total: float = 60.0) -> dict[str, Any]:
    """results.json after stages (name, code, limit) that are lines of Python."""
    code = {name: text for name, text, _ in chosen}
    some = [Stage(name, name, "", limit, needs=None) for name, _, limit in chosen]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "command", lambda python, here: [python, "-c", code[here.name], str(here.out)])
        runner.run_all(some, context, total=total)
    found: dict[str, Any] = json.loads((context.out / "results.json").read_text())
    return found["stages"]  # type: ignore[no-any-return]


KEEPS = f"""
import sys; sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from pathlib import Path
from first_hour.stages import Context
context = Context(name="keeps", place="cpu", out=Path(sys.argv[1]))
context.record(first=1)
"""


def test_a_stage_that_fails_or_hangs_stops_no_other(context: Context) -> None:
    """What a stage had kept before it was ended is there, and the next one runs."""
    found = run(
        context,
        ("fails", "print('why'); raise SystemExit(3)", 30.0),
        ("keeps", KEEPS + "import time; time.sleep(60)", 1.0),
        ("last", "pass", 30.0),
    )
    assert found["fails"]["status"] == "failed" and found["fails"]["error"] == "why"
    assert found["keeps"]["status"] == "timed out" and found["keeps"]["result"] == {"first": 1}
    assert found["last"]["status"] == "done"


def test_an_ended_stage_leaves_no_process(context: Context, tmp_path: Path) -> None:
    """Not even one that it started."""
    mark = tmp_path / "mark"
    grandchild = f"import time; time.sleep(1.1); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {grandchild!r}]); time.sleep(60)"
    assert run(context, ("hangs", code, 0.5))["hangs"]["status"] == "timed out"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=1.0)
    assert not mark.exists()


def test_a_terminated_run_ends_its_stage(context: Context, tmp_path: Path) -> None:
    """SIGTERM, as `timeout` sends it: nothing that the run started goes on, no further stage begins, and what the stage
    had kept is there."""
    pid = tmp_path / "pid"
    code = f"{KEEPS}import os, signal, time; open({str(pid)!r}, 'w').write(str(os.getpid()))\n"
    code += "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    found = run(context, ("keeps", code, 30.0), ("second", "pass", 30.0))
    assert (found["keeps"]["status"], found["keeps"]["result"]) == ("interrupted", {"first": 1})
    assert "second" not in found
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_no_stage_begins_after_the_runs_time(context: Context) -> None:
    found = run(context, ("first", "import time; time.sleep(60)", 30.0), ("second", "pass", 30.0), total=1.05)
    assert found["first"]["status"] == "timed out"
    assert found["second"]["status"] == "not run"


def test_the_limits_are_less_than_25_minutes() -> None:
    """And every stage is a function that is there."""
    assert sum(one.limit for one in STAGES) < 25 * 60 == runner.TOTAL
    assert len({one.name for one in STAGES}) == len(STAGES)
    for one in STAGES:
        module, function = one.entry.split(":")
        assert callable(getattr(importlib.import_module(f"first_hour.{module}"), function))


def test_a_stage_run_again_leaves_the_others_results(context: Context) -> None:
    """In results.json, with both commands; the build's Python runs it. Another place begins anew."""
    run(context, ("facts", "pass", 30.0), ("candidates", "raise SystemExit(1)", 30.0))
    before = runner.earlier(context.out, "cpu")
    assert before is not None and runner.earlier(context.out, "cuda") is None
    before["stages"]["build"] = {"status": "done", "result": {"python": "the build's"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "command", lambda python, here: [sys.executable, "-c", f"assert {python!r} != ''"])
        patch.setattr(runner, "run_stage", lambda words, here: {"status": "done", "seconds": 1.0, "words": words})
        results = runner.run_all([stages.stage("candidates")], context, before=before)
    assert {name: found["status"] for name, found in results["stages"].items()} == dict.fromkeys(
        ("facts", "build", "candidates"), "done"
    )
    assert "the build's" in results["stages"]["candidates"]["words"][-1]
    assert len(results["commands"]) == 2


def test_a_stage_whose_need_failed_is_not_run() -> None:
    built = {"build": {"status": "done"}}
    kernels, sanitizer = stages.stage("kernels"), stages.stage("sanitizer")
    assert runner.why_not(kernels, "cpu", built) is None
    assert runner.why_not(kernels, "cpu", {"build": {"status": "failed"}}) is not None
    assert runner.why_not(sanitizer, "cuda", built) is None
    unfit = runner.why_not(sanitizer, "cpu", built)
    assert unfit is not None and unfit["status"] == "not for this place"


def test_it_refuses_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cards, "tool", lambda name: None)
    with pytest.raises(SystemExit, match=r"no NVIDIA GPU here .*: nothing was measured"):
        gpu_first_hour.main(["--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_what_runs_before_the_build_needs_no_package() -> None:
    """The script, the machine's facts and the table: an interpreter without site-packages imports them."""
    names = "gpu_first_hour, first_hour.machine, first_hour.report"
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import {names}"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def test_a_changed_file_of_the_archive_is_told(tmp_path: Path) -> None:
    archive = made(tmp_path)
    assert machine.verify(archive)["commit"] == "abc"
    (archive / "wheels" / "x").write_bytes(b"other")
    with pytest.raises(stages.StageError, match="wheels/x is not what"):
        machine.verify(archive)
    (archive / "wheels" / "x").unlink()
    with pytest.raises(stages.StageError, match="lacks wheels/x"):
        machine.verify(archive)


def whole(place: str) -> dict[str, Any]:
    """A run's results with one figure in each kind of row."""
    step = {"step_s": 0.02, "first_step_s": 0.03, "encode_canvas_s": 0.01, "parts_s": {"experts": 0.015}}
    figures: dict[str, dict[str, Any]] = {
        "facts": {"cores": 8, "processor": "a processor", "memory_gb": 64, "python_version": "3.12.3"},
        "kernels": {"twins": {"passed": 20, "failed": 0, "error": 0}},
        "ceilings": {place: {"copy_gb_s": 25.0}},
        "steps released": {
            "layers": 6,
            "layers_of_shape": 30,
            "samplers": {"host": step, "operators": {"error": "OutOfMemoryError: 3 GB"}},
            "tokens": {"16": {"tokens_s": 1234.0, "how": "from a step's time"}},
        },
    }
    run = {name: {"status": "done", "seconds": 1.0, "limit": 9.0, "result": found} for name, found in figures.items()}
    run["parity"] = {"status": "timed out", "seconds": 9.0, "limit": 9.0, "error": "ended after 9 s"}
    return {"commands": ["python x"], "place": place, "date": "today", "seconds": 60.0, "load": 1.5, "stages": run}


def cells(text: str) -> dict[tuple[str, str], list[str]]:
    """(stage, figure) -> [GPU, CPU, note], of the table of figures."""
    figures = text.split("| stage | figure |")[1].splitlines()[2:]
    lines = [line[2:-2].split(" | ") for line in figures if line.startswith("| ")]
    return {(line[0], line[1]): [cell.strip() for cell in line[2:]] for line in lines}


def test_on_the_cpu_the_gpus_columns_say_not_measured() -> None:
    """Every row that a GPU has; a stage that was ended is told below."""
    text = report.table(whole("cpu"))
    table = cells(text)
    assert len(table) > 50
    assert {line[0] for line in table.values()} == {"not measured", ""}
    assert [key for key, line in table.items() if line[0] == ""] == [
        ("kernels", "tests of the kernels' bodies on the host")
    ]
    assert table["steps released", "a step, sampler 'host', ms"] == ["not measured", "20", "6 of 30 layers"]
    assert table["steps released", "a step, sampler 'operators', ms"][1] == "failed"
    assert table["steps released", "tokens/s at 16 steps"][1:] == ["1,234", "6 of 30 layers; from a step's time"]
    assert "### parity: timed out" in text


def test_a_gpus_figures_are_in_its_column() -> None:
    found = whole("cuda")
    calls = [{"what": "canvas 2, step 1", "graph_launches": 1, "launches": 3}]
    found["stages"]["launches"] = {"status": "done", "seconds": 1.0, "limit": 9.0, "result": {"calls": calls}}
    table = cells(report.table(found))
    assert table["steps released", "of a step: experts, ms"][:2] == ["15", "not measured"]
    assert table["ceilings", "copy, read and written, GB/s"][0] == "25"
    assert table["launches", "canvas 2, step 1"][0] == "3 launches, 1 graph launches, 0 captures, 0 instantiations"


def test_candidates_by_mass_are_those_by_the_bound_or_fewer() -> None:
    """A row of 5,000: p = 1/2, 1/4 and so on needs 25 tokens, the rest being 2^-24 and more before."""
    z = np.full((1, 5000), -40.0, dtype=np.float32)
    z[0, :60] = -math.log(2) * np.arange(60)
    assert candidates.by_mass(z, 2.0**-24).tolist() == [25]
    assert candidates.by_bound(z, 2.0**-24).tolist() == [37]
    with DiffusionModel(demo_model_path()) as model:
        steps = candidates.count(model, "What colour is the sky?", 2)
        assert steps[0]["most"] <= model.config.n_vocab
    assert steps[-1]["median"] < steps[0]["median"]
    assert all(step["median_by_mass"] <= step["median"] for step in steps)


def test_steps_of_a_shape_are_timed(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """With each sampler that the place has, by part, and in tokens a second over all steps asked for; of fewer layers
    than the shape has, and it says so."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    small = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "layer_types": kinds, "canvas_length": 32}
    small |= {"num_hidden_layers": 3, "num_experts": 8, "moe_intermediate_size": 256}
    monkeypatch.setitem(shapes.SHAPES, "small", shapes.SHAPES["724m"] | small)
    monkeypatch.setattr(steps, "PREFIX", 64)
    monkeypatch.setattr(steps, "STEPS", 2)
    steps.measure(context, "small", 2)
    found = json.loads(stages.result_file(context.out, "").read_text())
    assert (found["layers"], found["layers_of_shape"]) == (2, 3)
    assert set(found["samplers"]) == {"host", "operators"}
    assert all(sampler["step_s"] > 0 for sampler in found["samplers"].values())
    assert found["samplers"]["host"]["parts_s"]["experts"] > 0
    assert {n: tokens["steps"] for n, tokens in found["tokens"].items()} == {"12": [12], "16": [16], "24": [24]}


RUNTIME = """
#include <cstddef>
struct dim3 { unsigned x, y, z; };
extern "C" {
unsigned seen;
int cudaLaunchKernel(const void *, dim3 grid, dim3, void **, std::size_t, void *) { seen += grid.z; return 7; }
int cudaStreamBeginCapture(void *, int) { return 0; }
int cudaStreamEndCapture(void *, void **) { return 0; }
int cudaGraphInstantiate(void **, void *, unsigned long long) { return 0; }
int cudaGraphLaunch(void *, void *) { return 0; }
int cudaMemcpyAsync(void *, const void *, std::size_t, int, void *) { return 0; }
int step() {
    dim3 grid = {1, 2, 3}, block = {1, 1, 1};
    int status = cudaLaunchKernel(nullptr, grid, block, nullptr, 0, nullptr);
    cudaStreamBeginCapture(nullptr, 0);
    cudaLaunchKernel(nullptr, grid, block, nullptr, 0, nullptr);
    cudaStreamEndCapture(nullptr, nullptr);
    cudaGraphInstantiate(nullptr, nullptr, 0);
    cudaGraphLaunch(nullptr, nullptr);
    cudaMemcpyAsync(nullptr, nullptr, 100, 1, nullptr);
    cudaMemcpyAsync(nullptr, nullptr, 30, 2, nullptr);
    cudaMemcpyAsync(nullptr, nullptr, 5, 3, nullptr);
    return status * 100 + (int)seen;
}
}
"""

STEP = f"""
import ctypes, json, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from first_hour.launches import changes, counts
before = counts()
print(json.dumps([ctypes.CDLL(sys.argv[1]).step(), changes(before)]))
"""


@pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="LD_PRELOAD and a C++ compiler")
def test_calls_of_the_runtime_are_counted_and_handed_on(tmp_path: Path) -> None:
    """The runtime is loaded later and for one caller alone, as Python loads it with the extension."""
    counter = launches.compile_counter(tmp_path)
    runtime = tmp_path / "libcudart.so.13"
    source = tmp_path / "runtime.cpp"
    source.write_text(RUNTIME)
    soname = "-Wl,-soname,libcudart.so.13"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", soname, str(source), "-o", str(runtime)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(runtime)],
        env={"LD_PRELOAD": str(counter), "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        706,
        {
            "launches": 1,
            "captured_launches": 1,
            "graph_launches": 1,
            "captures": 1,
            "instantiations": 1,
            "bytes_to_device": 100,
            "bytes_to_host": 30,
        },
    ]
    assert len(launches.COUNTS) * ctypes.sizeof(ctypes.c_longlong) == 80


# ---------------------------------------------------------------------------------------------------------- the archive


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("gpu_archive")


def made(folder: Path, name: str = "a.tar", **options: Any) -> Path:
    """A small archive, unpacked."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import gpu_archive
    finally:
        sys.path.pop(0)
    files = [("wheels/x", b"a wheel", False), ("repository/run", b"#!/bin/sh\n", True)]
    gpu_archive.pack(folder / name, files, {"commit": "abc"}, **options)
    with tarfile.open(folder / name) as tar:
        tar.extractall(folder, filter="data")
    return folder / gpu_archive.FOLDER


def test_the_archive_is_reproducible_and_whole(tmp_path: Path) -> None:
    """The same files give the same bytes, the executable bit travels, and xz reads it."""
    made(tmp_path)
    first = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "again").mkdir()
    made(tmp_path / "again")
    assert (tmp_path / "again" / "a.tar").read_bytes() == first
    assert (tmp_path / "gpu_first_hour/repository/run").stat().st_mode & 0o111
    assert not (tmp_path / "gpu_first_hour/wheels/x").stat().st_mode & 0o111
    assert lzma.decompress(first)[257:262] == b"ustar"


def test_a_large_archive_is_refused_and_nothing_is_written(tmp_path: Path, tool: Any) -> None:
    (tmp_path / "a.tar").write_bytes(b"before")
    with pytest.raises(tool.ArchiveError, match="more than 100"):
        tool.pack(tmp_path / "a.tar", [("x", bytes(np.random.default_rng(1).bytes(300)), False)], {}, most=100)
    assert (tmp_path / "a.tar").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    assert tool.MOST == 60_000_000


def test_a_stored_wheel_has_the_same_files(tmp_path: Path, tool: Any) -> None:
    """Uncompressed and undated; a program of cmake's stays executable."""
    path = tmp_path / "a.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        info = zipfile.ZipInfo("a/program", (2020, 1, 2, 3, 4, 6))
        info.external_attr = 0o100755 << 16
        wheel.writestr(info, b"x" * 1000)
    again = tmp_path / "b.whl"
    again.write_bytes(tool.stored(path.read_bytes()))
    with zipfile.ZipFile(again) as wheel:
        [entry] = wheel.infolist()
        assert wheel.read(entry) == b"x" * 1000
        assert (entry.compress_type, entry.external_attr) == (zipfile.ZIP_STORED, 0o100755 << 16)
        assert entry.date_time == (1980, 1, 1, 0, 0, 0)


def test_the_lock_has_what_the_project_asks_for(tool: Any) -> None:
    """Each requirement, in a version that it allows; torch is presumed at the machine."""
    pins = tool.locked()
    asked = [Requirement(text) for text in tool.requirements()]
    project = tool.tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {tool.name_of(text) for text in project["dependencies"]} <= {tool.name_of(r.name) for r in asked}
    assert {"transformers", "pytest", "cmake", "ninja", "scikit-build-core"} <= set(pins)
    assert "torch" not in pins
    for requirement in asked:
        version, _ = pins[tool.name_of(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: tools/gpu_archive.py --lock"


def test_a_lock_that_is_no_pin_is_refused(tmp_path: Path, tool: Any) -> None:
    (tmp_path / "x.lock").write_text("# a comment\nnumpy>=2\n")
    with pytest.raises(tool.ArchiveError, match="'numpy>=2' is no pin"):
        tool.locked(tmp_path / "x.lock")
