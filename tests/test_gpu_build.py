"""A build for a GPU whose tools are missing stops at once, and says what is missing and what brings it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CMAKE = shutil.which("cmake")
pytestmark = [
    pytest.mark.skipif(CMAKE is None, reason="configures the build: there is no cmake on PATH"),
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="the tests run without the sources"),
]


def configure(folder: Path, *definitions: str) -> str:
    """What CMake complains about; the configuration must fail."""
    assert CMAKE is not None
    command = [CMAKE, "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}", *definitions]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0, f"{definitions} were accepted"
    return " ".join(done.stderr.split())


def test_cuda_without_a_compiler(tmp_path: Path) -> None:
    message = configure(tmp_path, "-DGGML_CUDA=on", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    assert "there is no CUDA compiler (nvcc)" in message
    assert "https://developer.nvidia.com/cuda-downloads" in message
    assert "-DCMAKE_CUDA_COMPILER=/usr/local/cuda/bin/nvcc" in message


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="asks the CUDA toolkit: there is no nvcc on PATH")
def test_a_folder_without_cublas(tmp_path: Path) -> None:
    options = ("-DGGML_CUDA=on", "-DCMAKE_CUDA_ARCHITECTURES=89", f"-DPYDIFFGGUF_CUBLAS_DIR={tmp_path}")
    message = configure(tmp_path / "build", *options)
    assert f"PYDIFFGGUF_CUBLAS_DIR is {tmp_path}: there is no include/cublas_v2.h" in message


@pytest.mark.skipif(sys.platform == "darwin", reason="Metal is there")
def test_metal_elsewhere(tmp_path: Path) -> None:
    assert "Metal is a part of macOS" in configure(tmp_path, "-DGGML_METAL=on")


@pytest.mark.skipif(shutil.which("hipconfig") is not None or Path("/opt/rocm").exists(), reason="ROCm is there")
def test_hip_without_rocm(tmp_path: Path) -> None:
    assert "there is no ROCm" in configure(tmp_path, "-DGGML_HIP=on")


def test_vulkan_with_old_headers(tmp_path: Path) -> None:
    (tmp_path / "vulkan").mkdir()
    (tmp_path / "vulkan" / "vulkan_core.h").write_text("#define VK_HEADER_VERSION 239\n")
    tools = (f"-DVulkan_INCLUDE_DIR={tmp_path}", "-DVulkan_LIBRARY=x", "-DVulkan_GLSLC_EXECUTABLE=x")
    message = configure(tmp_path / "build", "-DGGML_VULKAN=on", *tools)
    assert f"The Vulkan headers in {tmp_path} are too old for ggml" in message
    assert "-DVulkan_INCLUDE_DIR=/path/to/include" in message


@pytest.mark.skipif(shutil.which("glslc") is not None, reason="Vulkan's shader compiler is there")
def test_vulkan_without_its_tools(tmp_path: Path) -> None:
    message = configure(tmp_path, "-DGGML_VULKAN=on")
    assert "apt install libvulkan-dev glslc spirv-headers" in message
