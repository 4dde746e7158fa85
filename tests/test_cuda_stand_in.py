"""A build for CUDA on a machine without a GPU: a stand-in for the CUDA runtime (tests/cuda_stand_in) is preloaded.

Its device's memory cannot be touched by the host, ggml's kernels do nothing on it, and this project's kernels run by
their bodies. So this tests what no test of kernels does: where things lie, what crosses to the host in a step, what is
launched, and that ggml replays one CUDA graph. Skipped on builds without CUDA.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import performance_model as paper
import pytest
import shapes
import two_layers

from pydiffgguf import demo_model_path
from pydiffgguf._binding.functions import build_info
from pydiffgguf.convert.inspection.fit import plan
from pydiffgguf.convert.inspection.inspect import inspect_file

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("c++") or shutil.which("g++")
TOOLKITS = [Path(path) for path in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", "/usr", "/opt/cuda") if path]
HEADERS = [path / "include" for path in TOOLKITS if (path / "include" / "cuda_runtime_api.h").exists()]
pytestmark = [
    pytest.mark.skipif("CUDA" not in build_info()["backends"], reason="a build without CUDA"),
    pytest.mark.skipif(COMPILER is None or not HEADERS, reason="needs a C++ compiler and CUDA's headers"),
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD"),
]

#: Bytes of a canvas's struct, its decision in it (csrc/cuda/canvas.h).
CANVAS = 208

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the stand-in device."""
    library = tmp_path_factory.mktemp("stand_in") / "runtime.so"
    sources = [ROOT / "tests/cuda_stand_in/runtime.cpp", ROOT / "tests/kernels/host_device.cpp"]
    assert COMPILER is not None
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/kernels'}", "-isystem", str(HEADERS[0])]
    subprocess.run([COMPILER, *flags, *includes, *map(str, sources), "-o", str(library)], check=True)
    return os.environ | {"LD_PRELOAD": str(library)}


@pytest.fixture(scope="module")
def run(device: dict[str, str]) -> Run:
    """run(model, **options): what tests/cuda_stand_in/steps.py found. `counts`: our kernels are counted alone."""

    def run(model: Path, counts: bool = False, **options: Any) -> dict[str, Any]:
        command = [sys.executable, str(ROOT / "tests/cuda_stand_in/steps.py"), str(model), json.dumps(options)]
        env = device | ({"STAND_IN_COUNTS": "1"} if counts else {})
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    return run


@pytest.fixture(scope="module")
def whole(run: Run) -> dict[str, Any]:
    return run(demo_model_path())


def test_the_loop_stays_on_the_device(whole: dict[str, Any]) -> None:
    """Nothing goes there after the first step, and what comes back is the decision. A watched canvas has its rows too:
    argmax, accepted, entropy and the next canvas, 17 bytes a row."""
    assert whole["sampler"] == "kernels"
    [device] = whole["devices"]
    assert (device["name"], device["n_layers"], device["is_main"]) == ("CUDA0", 5, True)
    for step in whole["quiet"][1:]:
        assert (step["to_host"], step["n_to_host"]) == (CANVAS, 1)
        assert "to_device" not in step and "n_allocations" not in step
    for step in whole["watched"][1:]:
        assert (step["to_host"], step["n_to_host"]) == (CANVAS + 17 * 64, 3)
        assert "to_device" not in step


def test_a_step_is_one_cuda_graph_and_three_kernels(whole: dict[str, Any]) -> None:
    """ggml runs a graph twice before it trusts it: from the third step on it is replayed, and never captured again."""
    first, second, *later = whole["quiet"]
    assert first["n_foreign_kernels"] > 100 and "n_graph_launches" not in first
    assert (second["n_captures"], second["n_instances"], second["n_graph_launches"]) == (1, 1, 1)
    assert later
    for step in later:
        launches = {name: n for name, n in step.items() if name.startswith("n_") and name != "n_to_host"}
        assert launches == {"n_graph_launches": 1, "n_row_kernels": 1, "n_canvas_kernels": 1, "n_gather_kernels": 1}


def test_the_next_canvas_finds_its_graphs(whole: dict[str, Any]) -> None:
    """Behind a first canvas that is in the cache now, no step captures or instantiates anything, nor runs ggml's
    kernels one by one. What encodes canvases is captured when it runs for the second time, and replayed from then
    on."""
    for step in [*whole["next"], *whole["after"]]:
        assert step["n_graph_launches"] == 1
        assert not {"n_captures", "n_instances", "n_updates", "n_foreign_kernels"} & set(step)
    for step in [*whole["next"][1:], *whole["after"][1:]]:  # a canvas that begins is sent there
        assert not {"to_device", "n_allocations"} & set(step)
    assert whole["second_encode"]["n_captures"] == 1
    assert whole["third_encode"]["n_graph_launches"] == 1 and "n_captures" not in whole["third_encode"]


def test_pins_are_sent_once(whole: dict[str, Any]) -> None:
    """Which rows get logits goes to the device in the first step. Their number is a graph of its own, captured once."""
    first, second, *later = whole["pinned"]
    assert first["to_device"] > 0 and second["n_captures"] == 1
    for step in [second, *later]:
        assert "to_device" not in step and step["to_host"] == CANVAS
    for step in later:
        assert step["n_graph_launches"] == 1 and "n_captures" not in step


def test_a_layers_launches_are_those_of_the_model_on_paper(run: Run, tmp_path: Path) -> None:
    """At the released widths, with layers of either kind taken away: what a step's graph holds is what
    benchmarks/performance_model.py reckons with. Experts are narrower, which no launch depends on."""
    counted = {}
    for name, kinds in {"sf": "SF", "ssf": "SSF", "sff": "SFF"}.items():
        layers = [{"S": "sliding_attention", "F": "full_attention"}[kind] for kind in kinds]
        small = dict(layer_types=layers, num_hidden_layers=len(layers), moe_intermediate_size=64, vocab_size=16384)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(shapes.SHAPES, "wide", shapes.SHAPES["26b-a4b"] | small)
            shapes.write(tmp_path / "x.gguf", "wide", type="q4_k_m")
        first, second, *later = run(tmp_path / "x.gguf", counts=True, n_ctx=2048, only_launches=True)["quiet"]
        assert "n_captures" not in first and second["n_captures"] == 1
        assert all("n_captures" not in step and "to_device" not in step for step in later)
        counted[name] = second["n_captured"]
    sliding, full = counted["ssf"] - counted["sf"], counted["sff"] - counted["sf"]
    assert (sliding, full) == (paper.SLIDING_LAUNCHES, paper.FULL_LAUNCHES)
    assert counted["sf"] - sliding - full + 3 == paper.LAUNCHES_BESIDES  # with our three


def test_no_router_is_multiplied_in_tf32(whole: dict[str, Any]) -> None:
    """cuBLAS makes none of a pass's products of two float32 matrices that are no batch: the routers' go to ggml's own
    kernel, which adds in float32."""
    assert all("n_sgemm" not in step for step in whole["quiet"])


def test_a_step_of_two_passes_is_two_graphs(whole: dict[str, Any]) -> None:
    """More rows than one pass takes: each pass is a graph that is captured once."""
    for step in whole["many"][2:]:
        launches = {name: n for name, n in step.items() if name.startswith("n_") and name != "n_to_host"}
        assert launches == {"n_graph_launches": 2, "n_row_kernels": 1, "n_canvas_kernels": 1, "n_gather_kernels": 1}
        assert "to_device" not in step


def test_steps_are_the_cpu_samplers(whole: dict[str, Any]) -> None:
    """On the same logits: argmax, next canvas, accepted rows and entropies, with pins, side by side."""
    assert whole["differences"] == []
    assert len(whole["text"]) > 0


def test_the_device_holds_what_was_predicted(whole: dict[str, Any]) -> None:
    """Cache, buffers and logits of a session; and nothing is left when all is closed."""
    memory = whole["memory"]
    predicted = memory["kv_cache"] + memory["compute"] + memory["logits"]
    assert abs(whole["held"] - predicted) < 0.03 * predicted
    assert whole["n_past"] == 38 + 3 * 64 and whole["logits"] == [64, 896]
    assert whole["left"] == 0


@pytest.mark.parametrize(
    "options",
    [{"n_gpu_layers": 3}, {"n_cpu_moe": 2}, {"offload_kv": False}, {"sampler": "host"}],
    ids=str,
)
def test_a_model_that_is_partly_here(run: Run, options: dict[str, Any]) -> None:
    """Layers, experts or the cache on the CPU, or logits that are brought here: steps go on with the same traffic each
    time, and every stretch on the device is a graph that is replayed."""
    found = run(demo_model_path(), **options)
    assert found.get("differences", []) == []
    assert found["quiet"][4] == found["quiet"][5]
    last = found["quiet"][-1]
    assert last["n_graph_launches"] >= 1 and "n_captures" not in last and "n_foreign_kernels" not in last
    if "sampler" not in options:
        # The rows that cross between device and CPU, 4 bytes for each of the 128 numbers of 64 rows a time, and the
        # attention's inputs; not the logits, which are 229 KB.
        assert last["to_host"] < 600_000
    assert found["left"] == 0


@pytest.mark.parametrize("kind", ["q4_k_m", "q5_k_m", "q6_k", "q4_0", "iq4_nl", "dg4"])
def test_quantized_weights_stay_on_the_device(run: Run, tmp_path: Path, kind: str) -> None:
    """No operator of a quantized model is missing on CUDA: where one is, ggml brings its weights to the CPU in each
    step. With the sampler on the CPU too, where the signal is made by the dense product with the embedding."""
    two_layers.write(tmp_path / "x.gguf", kind)
    found = run(tmp_path / "x.gguf")
    assert (found["differences"], found["fallbacks"]) == ([], [])
    for step in found["quiet"][2:]:
        assert "to_device" not in step and step["to_host"] == CANVAS
    last = run(tmp_path / "x.gguf", sampler="host")["quiet"][-1]
    logits = 64 * 4096 * 4
    # Back go the processed logits of rows too flat to be gathered, here all of them, which these are, and the ids.
    assert (last["to_host"], last["to_device"]) == (logits, logits + 2 * 64 * 4 + 64 * 4)
    assert "n_foreign_kernels" not in last


def test_the_signals_copy_lies_on_the_device(run: Run, tmp_path: Path) -> None:
    """Counted apart from the weights, given back at the end, and no step sends or allocates anything for it: kernels
    gather. Rows that they do not, here all, as of no embedding in Q4_0, are multiplied with it in a graph of their own,
    which is replayed; only their numbers go there."""
    found = run(demo_model_path(), signal_copy=True)
    assert (found["differences"], found["fallbacks"], found["left"]) == ([], [], 0)
    assert found["memory"]["signal_copy"] == 2 * 896 * 128
    [device] = found["devices"]
    assert device["weights"] == found["memory"]["weights_on_devices"] + found["memory"]["signal_copy"]
    for step in found["quiet"][2:]:
        assert "to_device" not in step and "n_allocations" not in step
    two_layers.write(tmp_path / "x.gguf", tensor_types=["token_embd=q4_0"])
    last = run(tmp_path / "x.gguf", signal_copy=True)["quiet"][-1]
    assert (last["n_graph_launches"], last["to_device"]) == (2, 2 * 64 * 4)
    assert not {"n_foreign_kernels", "n_allocations"} & set(last)


def test_what_cuda_lacks_is_said(tmp_path: Path, device: dict[str, str]) -> None:
    """ggml-cuda reads rows in IQ4_NL only where 256 divides them."""
    two_layers.write(tmp_path / "x.gguf", tensor_types=["token_embd=iq4_nl"], hidden_size=128)
    code = "import sys; from pydiffgguf import DiffusionModel; print(DiffusionModel(sys.argv[1]).session().fallbacks)"
    command = [sys.executable, "-c", code, str(tmp_path / "x.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, env=device, timeout=60, check=True)
    assert done.stdout.strip() == "['CUDA0 lacks GET_ROWS of iq4_nl']"
    doctor = [sys.executable, "-m", "pydiffgguf", "doctor"]
    done = subprocess.run(doctor, capture_output=True, text=True, env=device, timeout=60, check=True)
    assert "they lack    nothing that the demo model needs" in done.stdout
    assert "CUDA0, 4.3 of 4.3 GB free" in done.stdout


TROUBLE = """
import sys
from pydiffgguf import DeviceError, DiffusionModel, OutOfMemoryError, demo_model_path

def attempt(**options):
    try:
        with DiffusionModel(demo_model_path(), **options) as model:
            print(sum(device.n_layers for device in model.devices()), end=" ")
            for _ in range(2):
                try:
                    model.generate([2, 5, 6], seed=1, max_tokens=8, max_steps=3)
                    print("ok", end=" ")
                except (DeviceError, OutOfMemoryError) as error:
                    print(type(error).__name__, end=" ")
    except (DeviceError, OutOfMemoryError) as error:
        print(type(error).__name__, end=" ")

attempt(n_gpu_layers=5)
attempt()
attempt(n_gpu_layers=0)
"""


def trouble(device: dict[str, str], **environment: str) -> str:
    """What three models met on such a device: all layers on it, as many as fit, none."""
    command = [sys.executable, "-c", TROUBLE]
    env = device | environment
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("size", [1_000_000, 3_000_000, 10_000_000, 30_000_000])
def test_a_device_that_is_too_small_is_an_error_and_no_more(device: dict[str, str], size: int) -> None:
    """For the weights, the cache, the intermediate tensors, and what a pass takes on its way."""
    all_on_it, as_fits = "OutOfMemoryError", "0 ok ok 0 ok ok"
    if size > 1_680_672:
        all_on_it = "5 OutOfMemoryError OutOfMemoryError"
    assert trouble(device, STAND_IN_MEMORY=str(size)) == f"{all_on_it} {as_fits}"


@pytest.mark.parametrize("n_waits", [0, 50, 125, 130, 135, 140])
def test_a_device_that_fails_is_an_error_and_no_more(device: dict[str, str], n_waits: int) -> None:
    """While weights are sent, a session made, a prompt encoded, a step made; closing what it held, opening another, and
    a model on the CPU go on in the same process."""
    first = "DeviceError" if n_waits < 100 else "5 DeviceError DeviceError"
    assert trouble(device, STAND_IN_FAILS=str(n_waits)) == f"{first} DeviceError 0 ok ok"


PLACED = """
import ctypes, sys
from pydiffgguf import DiffusionModel

with DiffusionModel(sys.argv[1]) as model, model.session():
    [device] = model.devices()
    counts = (ctypes.c_longlong * 16)()
    ctypes.CDLL(None).stand_in_counts(counts)
    print(device.n_layers, device.n_cpu_moe, counts[14] if device.n_layers else 0)
"""


@pytest.mark.parametrize("size", [800_000_000, 900_000_000, 1_000_000_000, 1_150_000_000, 1_300_000_000])
def test_auto_is_what_fit_shows(device: dict[str, str], tmp_path: Path, size: int) -> None:
    """Nothing, some layers without experts, all with experts of 2 and of 7, everything: and a session made there leaves
    the reserve."""
    shapes.write_head(tmp_path / "x.gguf", "724m", type="q4_k_m")
    expected = plan(inspect_file(tmp_path / "x.gguf"), size)
    command = [sys.executable, "-c", PLACED, str(tmp_path / "x.gguf")]
    env = device | {"STAND_IN_MEMORY": str(size)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=True)
    n_layers, n_cpu_moe, held = map(int, done.stdout.split())
    assert n_layers == expected.n_gpu_layers
    assert n_cpu_moe == max(0, expected.n_cpu_moe - (12 - n_layers))
    assert held <= size - 500_000_000 - expected.free if n_layers else held == 0
