"""NVIDIA's cards and tools on this machine. Standard library alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import NamedTuple

#: Where toolkits put their programs, besides PATH.
FOLDERS = (os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"), "/opt/cuda/bin")


class Gpu(NamedTuple):
    """The first NVIDIA GPU; `capability` such as "89", `memory` in MiB, `driver` its version."""

    name: str
    capability: str
    memory: int
    driver: str


def tool(name: str) -> str | None:
    """The path of one of CUDA's programs."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(FOLDERS))


def find_gpu() -> Gpu:
    """Raises SystemExit with what is missing where there is no GPU, or no nvcc to compile with."""
    smi, nvcc = tool("nvidia-smi"), tool("nvcc")
    if smi is None:
        raise SystemExit("gpu_first_hour: no NVIDIA GPU here (no nvidia-smi on PATH): nothing was measured")
    query = [smi, "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(query, capture_output=True, text=True)
    fields = done.stdout.strip().rsplit(", ", 3)
    if done.returncode != 0 or len(fields) != 4:
        reason = (done.stdout + done.stderr).strip() or "it lists none"
        raise SystemExit(f"gpu_first_hour: no NVIDIA GPU here (nvidia-smi: {reason}): nothing was measured")
    gpu = Gpu(fields[0], fields[1].replace(".", ""), int(float(fields[2])), fields[3])
    if nvcc is None:
        raise SystemExit(f"gpu_first_hour: {gpu.name} is here, but no nvcc on PATH to compile with")
    return gpu


def environment() -> dict[str, str]:
    """This process's, with the toolkit's programs on PATH."""
    nvcc = tool("nvcc")
    folder = [os.path.dirname(nvcc)] if nvcc else []
    return os.environ | {"PATH": os.pathsep.join([os.environ.get("PATH", ""), *folder])}
