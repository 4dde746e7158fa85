"""Which of a machine's GPUs a model is placed on (csrc/model/local_devices.h), where there is none to try it with."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="compiles a header of csrc: there is no C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("devices") / "local_devices.so"
    source = ROOT / "tests" / "local_devices.cpp"
    assert COMPILER is not None
    flags = ["-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


@pytest.mark.parametrize(
    ("devices", "usable"),
    [
        ([], []),
        ([("card", 1)], [0]),
        ([("card", 1), ("card", 2)], [0, 1]),
        ([("card", 1), ("card", 1)], [0]),  # by CUDA and by Vulkan
        ([("card", 0), ("card", 0)], [0, 1]),  # no address is reported, so nothing says that they are one
        ([("integrated", 1), ("card", 2)], [1]),
        ([("card", 2), ("integrated", 1), ("card", 2), ("card", 3)], [0, 3]),
        ([("integrated", 1)], [0]),
        ([("integrated", 1), ("integrated", 1)], [0]),
    ],
)
def test_each_card_counts_once_and_no_integrated_gpu_beside_one(
    library: ctypes.CDLL, devices: list[tuple[str, int]], usable: list[int]
) -> None:
    """As laptops with two GPUs have them, and builds with two backends."""
    kinds = "".join(kind[0] for kind, _ in devices).encode()
    addresses = (ctypes.c_int * len(devices))(*(address for _, address in devices))
    assert library.usable(kinds, addresses, len(devices)) == sum(1 << i for i in usable)
