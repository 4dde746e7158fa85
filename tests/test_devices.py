"""Models on devices whose memory this process cannot touch: RPC servers on loopback, whole and split over two of them
and the CPU; and this machine's GPUs, where a build has them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from canvas_batches import own_steps
from places import LOCAL, PLACES, Place, Servers, furthest_apart, on_servers, place_of
from rpc_servers import Relay, rpc_server

from pydiffgguf import (
    CanvasBatch,
    CanvasSpec,
    DeviceError,
    DiffusionModel,
    UnsupportedError,
    cli,
    demo_model_path,
)
from pydiffgguf._binding import functions

PROMPT = [2, 40, 41, 42, 43, 60, 61]
LONG_PROMPT = [2, *(3 + i * 7 % 500 for i in range(150))]  # several times the window

# Both sides compute in float32, with other kernels: the CPU's own against ggml's.
TOLERANCE = 1e-5
# Entropies of logits that differ by that much, and by the eight steps between.
ENTROPY_TOLERANCE = 1e-4


# Beside the places at which all tests run, two that cut every layer between device and CPU.
CUT: dict[str, Callable[[Servers], dict[str, Any]]] = {
    "experts on the CPU": lambda servers: {**on_servers(servers()[0]), "n_cpu_moe": 3},
    "cache on the CPU": lambda servers: {**on_servers(servers()[0]), "offload_kv": False},
}


@pytest.fixture(scope="module", params=PLACES | CUT)
def device(request: pytest.FixtureRequest) -> Place:
    return place_of(request, PLACES | CUT)


@pytest.fixture(scope="module")
def there(tiny_gguf: Path, device: Place) -> Iterator[DiffusionModel]:
    with device.open(tiny_gguf, n_ctx=256, type_kv="f32") as model:
        yield model


def canvas_of(model: DiffusionModel, seed: int = 0) -> np.ndarray:
    c = model.config
    return np.random.default_rng(seed).integers(0, c.n_vocab, c.canvas_length, dtype=np.int32)


def test_a_place_is_what_its_name_says(there: DiffusionModel, device: Place) -> None:
    """Which sampler works there, and how many layers each device has: what other tests say of a place is of that."""
    n_layers = [d.n_layers for d in there.devices() if d.n_layers > 0]
    with there.session() as session:
        if device.name in LOCAL:
            assert sum(n_layers) > 0 and session.sampler == ("kernels" if device.name == "CUDA" else "operators")
        elif device.name == "two servers and the CPU":
            assert len(n_layers) >= 2 and sum(n_layers) == 4 < there.config.n_layer
            assert session.sampler == "operators"
        elif device.name in ("cpu", "operators"):
            assert not n_layers and session.sampler == {"cpu": "host"}.get(device.name, device.name)
        else:
            assert sum(n_layers) == there.config.n_layer and session.sampler == "operators"
    endpoints = {d.endpoint for d in there.devices() if d.n_layers > 0}
    assert endpoints <= set(device.options.get("rpc", ())) | ({""} if device.name in LOCAL else set())


@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT], ids=["short", "long"])
def test_logits_are_the_cpus(here: DiffusionModel, there: DiffusionModel, device: Place, prompt: list[int]) -> None:
    """With and without self-conditioning; and, whole on a server, bit-equal to the same operators on the CPU."""
    with here.session() as a, there.session() as b, here.session(ggml_operators=True) as same:
        for session in (a, b, same):
            session.encode(prompt)
        canvas = canvas_of(here)
        first = a.denoise(canvas)
        assert furthest_apart(b.denoise(canvas), first) <= TOLERANCE
        handed_in = first / np.float32(0.6)
        second = b.denoise(canvas, handed_in)
        assert furthest_apart(second, a.denoise(canvas, handed_in)) <= TOLERANCE
        if device.name == "rpc" and not LOCAL:
            np.testing.assert_array_equal(second, same.denoise(canvas, handed_in))


def specs(model: DiffusionModel) -> list[CanvasSpec]:
    n = model.config.canvas_length
    pinned = np.full(n, -1, dtype=np.int32)
    pinned[::3] = canvas_of(model, 7)[::3]
    watched = np.full(n, -1, dtype=np.int32)
    watched[1::2] = 17
    return [
        CanvasSpec(seed=1),
        CanvasSpec(seed=2, pinned=pinned, watched=watched),
        CanvasSpec(n_rows=n // 2, seed=3, allowed={0: [5, 6, 7], 2: [100]}),
    ]


@pytest.mark.parametrize("which", [[0], [1], [2], [0, 1], [0, 1, 2]], ids=str)
def test_trajectories_are_the_cpus(here: DiffusionModel, there: DiffusionModel, which: list[int]) -> None:
    """Every argmax, draw, accepted row and stop, alone and side by side; with pins and watched ids, and with sets of
    allowed ids, for which the logits come to the CPU."""
    chosen = [specs(here)[i] for i in which]
    rows = here.config.canvas_length * len(which)
    sampling = replace(here.sampling, steps=8)
    with here.session(n_rows=rows, ggml_operators=True) as a, there.session(n_rows=rows) as b:
        a.encode(LONG_PROMPT)
        b.encode(LONG_PROMPT)
        for ours, theirs in zip(own_steps(a, chosen, sampling), own_steps(b, chosen, sampling), strict=True):
            for x, y in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(x.argmax, y.argmax)
                np.testing.assert_array_equal(x.canvas, y.canvas)
                np.testing.assert_array_equal(x.accepted, y.accepted)
                assert (x.finished, x.converged) == (y.finished, y.converged)
                np.testing.assert_allclose(y.entropy, x.entropy, rtol=ENTROPY_TOLERANCE, atol=ENTROPY_TOLERANCE)
                assert (x.logprob is None) == (y.logprob is None)
                if x.logprob is not None and y.logprob is not None:
                    np.testing.assert_allclose(y.logprob, x.logprob, rtol=ENTROPY_TOLERANCE, atol=ENTROPY_TOLERANCE)


def test_scores_and_saved_prefixes_are_the_cpus(here: DiffusionModel, there: DiffusionModel, tmp_path: Path) -> None:
    texts = [[5, 6, 7], [100, 101], [9] * 20]
    with here.session() as a, there.session() as b:
        a.encode(LONG_PROMPT)
        b.encode(LONG_PROMPT)
        for x, y in zip(a.score(texts), b.score(texts), strict=True):
            np.testing.assert_allclose(y, x, rtol=0, atol=1e-4)
        b.save(tmp_path / "there")
        a.save(tmp_path / "here")
        canvas = canvas_of(here)
        expected = a.denoise(canvas)
        a.load(tmp_path / "there")
        b.load(tmp_path / "here")
        assert furthest_apart(a.denoise(canvas), expected) <= TOLERANCE
        assert furthest_apart(b.denoise(canvas), expected) <= TOLERANCE
        b.truncate(20)
        a.truncate(20)
        assert furthest_apart(b.denoise(canvas), a.denoise(canvas)) <= TOLERANCE


def test_infill_is_the_cpus(here: DiffusionModel, there: DiffusionModel) -> None:
    options: dict[str, Any] = {"gap": "auto", "max_gap": 6, "steps": 4, "seed": 3}
    ours, theirs = (model.infill("The cat sat on", "the mat. The dog", **options) for model in (here, there))
    assert theirs.text == ours.text
    assert theirs.gap_tokens == ours.gap_tokens


def test_memory_is_predicted_and_weights_lie_where_they_should(there: DiffusionModel, device: Place) -> None:
    predicted = there.memory(n_ctx=256)
    with there.session() as session:
        if device.name in CUT:
            # Layers that are cut between device and CPU: ggml's measuring puts what crosses on the side of its weights.
            assert 0.5 <= predicted.compute / session.memory.compute <= 2
            predicted = replace(predicted, compute=session.memory.compute)
        assert session.memory == predicted
    devices = there.devices()
    assert sum(d.weights for d in devices) == predicted.weights_on_devices
    asked = device.options.get("n_gpu_layers", "auto")
    assert sum(d.n_layers for d in devices) == (there.config.n_layer if asked == "auto" else asked)
    assert [d.is_main for d in devices] == [False] * (len(devices) - 1) + [True] * (len(devices) > 0)


def test_the_demo_model_says_the_same_on_a_device(servers: tuple[str, str]) -> None:
    with (
        DiffusionModel(demo_model_path(), n_gpu_layers=0) as here,
        DiffusionModel(demo_model_path(), rpc=servers) as there,
    ):
        for seed in range(3):
            prompt = f"What is {seed}+3?"
            assert there.generate(prompt, seed=seed).text == here.generate(prompt, seed=seed).text


def test_a_step_sends_and_receives_less_than_64_kb() -> None:
    """Whole on one server: the logits, 229 KB of them, stay there, and so does the graph."""
    with (
        rpc_server() as (server, _),
        DiffusionModel(demo_model_path(), **on_servers((relay := Relay(server)).endpoint)) as model,
        model.session() as session,
    ):
        session.encode(model.tokenize("What is 2+3?"))
        counts = []
        batch = CanvasBatch(session, [CanvasSpec(seed=1)], replace(model.sampling, steps=8, confidence_threshold=0.0))
        while not batch.finished:
            batch.step()
            counts.append((relay.sent, relay.received))
        logits = model.memory().logits
    relay.close()
    steps = np.diff(np.array(counts), axis=0)
    assert len(steps) >= 6
    assert logits > 200_000
    assert steps.max() <= 64 * 1024, steps
    # Measured for the 64 rows: 4,101 sent and 2,329 received. That is 20 and 36 bytes a row beside what is always sent.
    assert steps.max() <= 5_000, steps


LOST = """
import sys
import pytest
from pydiffgguf import DeviceError, DiffusionModel, demo_model_path
endpoint, pid = sys.argv[1], int(sys.argv[2])
model = DiffusionModel(demo_model_path(), rpc=[endpoint])
stream = model.stream("What is 2+3?", seed=1)
next(stream)
import os, signal
os.kill(pid, signal.SIGKILL)
try:
    for _ in stream:
        pass
except DeviceError as error:
    print("lost:", error)
try:
    model.generate("What is 2+3?", seed=1)
except DeviceError as error:
    print("still lost:", error)
model.close()
try:
    DiffusionModel(demo_model_path(), rpc=[endpoint])
except OSError as error:
    print("refused:", error)
with DiffusionModel(demo_model_path(), n_gpu_layers=0) as model:
    print("usable:", len(model.generate("What is 2+3?", seed=1).text) > 0)
with DiffusionModel(demo_model_path(), rpc=[sys.argv[3]]) as model:
    print("another:", len(model.generate("What is 2+3?", seed=1).text) > 0)
"""


def test_a_server_killed_in_the_middle_is_an_error_and_no_more() -> None:
    with rpc_server() as (endpoint, process), rpc_server() as (other, _):
        command = [sys.executable, "-c", LOST, endpoint, str(process.pid), other]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["lost", "still lost", "refused", "usable", "another"]
    assert f"the connection to an RPC server was lost (of {endpoint})" in lines[0]
    assert lines[3:] == ["usable: True", "another: True"]


def test_a_server_that_comes_back_serves_again(tiny_gguf: Path) -> None:
    """Also while the model that knew it before is still open."""
    with rpc_server() as (endpoint, process):
        model = DiffusionModel(tiny_gguf, rpc=[endpoint], n_ctx=128)
        process.kill()
        process.wait()
        with pytest.raises(DeviceError):
            model.generate(PROMPT, seed=1, steps=2, max_tokens=8)
        port = endpoint.split(":")[1]
        again = subprocess.Popen([sys.executable, "-m", "pydiffgguf", "rpc-server", "--port", port])
        try:
            for attempt in range(100):
                try:
                    fresh = DiffusionModel(tiny_gguf, rpc=[endpoint], n_ctx=128)
                    break
                except OSError:
                    assert attempt < 99
                    again.poll()
                    time.sleep(0.1)
            with fresh:
                fresh.generate(PROMPT, seed=1, steps=2, max_tokens=8)
        finally:
            model.close()
            again.kill()
            again.wait()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"n_gpu_layers": 1}, UnsupportedError, "CMAKE_ARGS"),
        ({"tensor_split": [1.0]}, UnsupportedError, "CMAKE_ARGS"),
        ({"main_gpu": 0}, UnsupportedError, "CMAKE_ARGS"),
        ({"n_cpu_moe": -1}, ValueError, "n_cpu_moe"),
        ({"rpc": ["nowhere"]}, ValueError, "host:port"),
        ({"rpc": "127.0.0.1:1"}, TypeError, "list"),
        ({"rpc": ["127.0.0.1:1"]}, OSError, "no RPC server answers at 127.0.0.1:1"),
        ({"rpc": ["127.0.0.1:1"], "n_gpu_layers": 0}, ValueError, "n_gpu_layers is 0"),
    ],
    ids=str,
)
@pytest.mark.skipif(bool(LOCAL), reason="this build has a GPU backend")
def test_what_is_not_there_is_refused(
    tiny_gguf: Path, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        DiffusionModel(tiny_gguf, **options)


@pytest.mark.skipif(bool(LOCAL), reason="there are more devices than the servers' two")
def test_a_split_must_have_a_part_for_each_device(tiny_gguf: Path, servers: tuple[str, str]) -> None:
    for split, text in (([1.0], "2 devices"), ([0.0, 0.0], "tensor_split must"), ([1.0, -1.0], "tensor_split must")):
        with pytest.raises(ValueError, match=text):
            DiffusionModel(tiny_gguf, rpc=servers, tensor_split=split)
    with DiffusionModel(tiny_gguf, rpc=servers, tensor_split=[1, 2], main_gpu=0) as model:
        first, last = model.devices()
        assert (first.endpoint, first.n_layers) == (servers[1], 4)
        assert (last.endpoint, last.n_layers, last.is_main) == (servers[0], 2, True)


@pytest.mark.parametrize(("host", "warned"), [("localhost", False), ("0.0.0.0", True)])
def test_a_server_warns_where_strangers_may_reach_it(
    host: str, warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[str] = []
    monkeypatch.setattr(functions, "serve_rpc", lambda endpoint, n_threads: served.append(endpoint))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert cli.main(["rpc-server", "--host", host, "--port", "1234"]) == 0
    assert served == ["127.0.0.1:1234" if host == "localhost" else f"{host}:1234"]
    assert ("no authentication" in capsys.readouterr().err) == warned
