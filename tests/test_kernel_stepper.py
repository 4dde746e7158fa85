"""The kernels' sampler in the engine, by the kernels' bodies on the host: logits of free rows, flat rows' signal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import host_twin
import pytest
import two_layers

from pydiffgguf import demo_model_path
from pydiffgguf._binding.functions import build_info

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("c++") or shutil.which("g++")
BUILD = host_twin.find_build()
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="links the engine's objects"),
    pytest.mark.skipif(set(build_info()["backends"]) != {"RPC", "CPU"}, reason="a build that needs other libraries"),
    pytest.mark.skipif("SANITIZE" in str(build_info()["flags"]), reason="a program of its own without the sanitizer"),
    pytest.mark.skipif(BUILD is None, reason="the objects of the installed build are not in this checkout"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/kernels/twin.py found."""
    folder = tmp_path_factory.mktemp("twin")
    assert BUILD is not None and COMPILER is not None
    library = host_twin.link(BUILD, COMPILER, folder)
    two_layers.write(folder / "flat.gguf", vocab_size=9216, hidden_size=128)
    twin = [sys.executable, str(ROOT / "tests/host_twin.py"), str(library), str(ROOT / "tests/kernels/twin.py")]
    command = [*twin, str(demo_model_path()), str(folder / "flat.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("sampler", ["host", "operators", "kernels"])
def test_free_rows_alone_get_logits_and_nothing_changes(found: dict[str, Any], sampler: str) -> None:
    """With pins of every number, side by side: each result is that of a session where all rows get logits, to the bit;
    without a signal, argmax, canvas and accepted rows are the host sampler's."""
    assert found["some rows"][sampler]["steps"] >= 10
    assert found["some rows"][sampler]["differences"] == []


def test_a_canvas_beside_a_flat_one_is_the_canvas_alone(found: dict[str, Any]) -> None:
    """Rows that are too flat to be gathered go through the product with the whole embedding, and no others: each
    canvas, peaked, flat or with rows of both kinds, has the bits that it has alone."""
    assert found["flat beside"]["steps"] == 5 and found["flat beside"]["moves"]
    assert min(found["flat beside"]["entropy"]) > 9.0, "the rows are not flat"
    assert found["flat beside"]["differences"] == []
