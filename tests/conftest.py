"""What the tests share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

# `python -m pytest` puts the checkout in front of sys.path, and its pydiffgguf/ hides the installed one, which has the
# compiled module.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parents[1]]

import pytest
from places import PLACES, Place, place_of
from rpc_servers import rpc_server
from tiny_checkpoint import make_checkpoint

from pydiffgguf import DiffusionModel
from pydiffgguf.convert import convert

#: Only the tests in parity/ need the reference; a run without it says so in its last lines.
MISSING = [name for name in ("torch", "transformers") if find_spec(name) is None]
collect_ignore = ["parity"] if MISSING else []

# A shell's background job ignores Ctrl-C, and what it starts inherits that: tests that interrupt a child would wait.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MISSING:
        terminalreporter.section("not run")
        terminalreporter.write_line(f"tests/parity: {' and '.join(MISSING)} missing (pip install -e '.[test]')")


@pytest.fixture(scope="session", autouse=True)
def outside_of_the_checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests run in an empty folder: a child interpreter started in the checkout would import the sources there, which
    lack the compiled module, and nothing that a test drops lands among them."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float32 model with a tokenizer and a chat template: 6 layers, canvas 32, vocabulary 512."""
    folder = tmp_path_factory.mktemp("tiny")
    make_checkpoint(folder / "checkpoint", canvas_length=32, sc_scale=0.3, tokenizer=True)
    convert(folder / "checkpoint", folder / "tiny.gguf", type="f32")
    return folder / "tiny.gguf"


@pytest.fixture(scope="module")
def here(tiny_gguf: Path) -> Iterator[DiffusionModel]:
    """It on the CPU, with exact caches: what other places are compared with."""
    with DiffusionModel(tiny_gguf, n_ctx=256, type_kv="f32", n_gpu_layers=0) as model:
        yield model


@pytest.fixture(scope="session")
def servers() -> Iterator[tuple[str, str]]:
    """The addresses of two RPC servers, which all tests share."""
    with rpc_server() as (first, _), rpc_server() as (second, _):
        yield first, second


@pytest.fixture(scope="session", params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    """Every place in turn: pytest runs all tests at one before it goes to the next, whatever files they stand in."""
    return place_of(request, PLACES)
