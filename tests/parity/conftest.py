"""Fixtures of the parity tests: random nets, built once a session, and the figures that a run prints at its end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import once
import pytest
import torch
from demo_tasks import Demo
from gguf_rewrite import rewrite
from nets import SHAPES, Net, Report, make_net
from places import Place
from rebuild import model_from_gguf, read_tensors
from reference import Model

from pydiffgguf import demo_model_path

_lines = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_lines] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[_lines]:
        terminalreporter.section("parity with transformers")
        for line in config.stash[_lines]:
            terminalreporter.write_line(line)


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """report(line): a measured figure, printed at the end of the run whether the test passes or not. Where it was
    measured at a place that is not the CPU, the line begins with its name."""
    lines = request.config.stash[_lines]
    callspec = getattr(request.node, "callspec", None)
    place = callspec.params.get("place", "cpu") if callspec else "cpu"
    return lines.append if place == "cpu" else lambda line: lines.append(f"{place}: {line}")


@pytest.fixture(scope="session", autouse=True)
def results_are_shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Between the processes of pytest-xdist, whose folders lie side by side in one of this run."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        once.shared = tmp_path_factory.getbasetemp().parent / "references"
        once.shared.mkdir(exist_ok=True)
    yield
    once.shared = None


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """These nets are so small that a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Net]:
    """net(name) -> the net of that name in SHAPES, for single passes: logits and encoding."""
    folder = tmp_path_factory.mktemp("nets")
    nets: dict[str, Net] = {}

    def get(name: str) -> Net:
        if name not in nets:
            nets[name] = make_net(name, folder, seed=list(SHAPES).index(name))
        return nets[name]

    return get


@pytest.fixture(scope="session")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Net]:
    """walker(name) -> the same shape as a net for whole trajectories: it damps rounding errors and sometimes converges.

    Its self-conditioning is scaled by 0.3 and its embedding by 1.6.
    """
    folder = tmp_path_factory.mktemp("walkers")
    nets: dict[str, Net] = {}

    def get(name: str) -> Net:
        if name not in nets:
            nets[name] = make_net(name, folder, seed=100 + list(SHAPES).index(name), sc_scale=0.3, sharpen=1.6)
        return nets[name]

    return get


@pytest.fixture(scope="session")
def demo_f32(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """The bundled demo model, its tensors dequantized to float32, so that its quantization plays no part in what is
    compared: as a file, and as transformers' model."""
    path = tmp_path_factory.mktemp("demo") / "demo.f32.gguf"
    tensors = read_tensors(demo_model_path())
    rewrite(demo_model_path(), path, tensors={name: tensor.values for name, tensor in tensors.items()})
    return path, model_from_gguf(path)


@pytest.fixture(scope="session")
def demo(demo_f32: tuple[Path, Model], place: Place) -> Iterator[Demo]:
    """The demo model on both sides, at every place in turn on this one."""
    path, reference = demo_f32
    with place.open(path, type_kv="f32", n_threads=1) as opened:
        yield Demo(opened, reference)
