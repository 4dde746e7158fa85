"""What the machine is, whether the archive arrived whole, and the build. Standard library alone: nothing is installed
yet."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import site
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from first_hour import cards
from first_hour.stages import REPOSITORY, Context, StageError

#: As .ci/cuda-build, whose build the tests run on a stand-in; ggml's own attention, which the engine does not use, is a
#: third of its kernels.
CUDA = "-DGGML_CUDA=on -DGGML_CUDA_NO_VMM=ON -DGGML_CUDA_FA=OFF"


def first_line(*words: str) -> str | None:
    """Of what a program prints, or None where it is not here."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout or done.stderr).strip().partition("\n")[0] or None


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed(name: str) -> str | None:
    """The version of a package that this Python has."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def verify(archive: Path) -> dict[str, Any]:
    """The archive's manifest, each file's hash checked. Raises StageError for a file that is missing or changed."""
    manifest: dict[str, Any] = json.loads((archive / "MANIFEST.json").read_text(encoding="utf-8"))
    for name, expected in manifest["files"].items():
        path = archive / name
        if not path.is_file():
            raise StageError(f"the archive lacks {name}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise StageError(f"{name} is not what the archive's manifest says")
    return manifest


def facts(context: Context) -> None:
    """Machine, programs, commit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    context.record(
        processor=processor(),
        cores=cores(),
        memory_gb=round(memory / 1e9, 1),
        system=platform.platform(),
        python=sys.executable,
        python_version=platform.python_version(),
        torch=installed("torch"),  # not imported, which takes half a minute from a cold disk
        compiler=first_line("c++", "--version"),
    )
    if context.place == "cuda":
        gpu = cards.find_gpu()
        nvcc = subprocess.run([str(cards.tool("nvcc")), "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release [\d.]+, V([\d.]+)", nvcc)
        context.record(gpu=gpu._asdict(), nvcc=release[1] if release else None)
        context.record(sanitizer=cards.tool("compute-sanitizer") is not None)
    if context.archive is not None:
        manifest = verify(context.archive)
        context.record(commit=manifest["commit"], archive_files=len(manifest["files"]))
    else:
        context.record(commit=first_line("git", "-C", str(REPOSITORY), "rev-parse", "HEAD"))


def call(words: list[str], environment: dict[str, str]) -> None:
    """Raises StageError when it fails; what it prints goes to the stage's log."""
    print("$ " + shlex.join(words), flush=True)
    code = subprocess.run(words, env=environment, stdout=sys.stderr).returncode
    if code != 0:
        raise StageError(f"{Path(words[0]).name} ended with {code}")


def make_environment(folder: Path) -> tuple[str, list[str]]:
    """An environment in which this Python's packages (torch) are seen behind its own; (its Python, pip for it).

    `--system-site-packages` would show those of the Python that made this one, where this one is an environment too."""
    has_pip = importlib.util.find_spec("pip") is not None
    words = [sys.executable, "-m", "venv", "--clear", *(["--without-pip"] if has_pip else []), str(folder)]
    call(words, dict(os.environ))
    python = str(folder / "bin" / "python")
    question = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", question], capture_output=True, text=True, check=True).stdout.strip()
    behind = [path for path in site.getsitepackages() if Path(path).is_dir()]
    Path(packages, "behind.pth").write_text("\n".join(behind) + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", python] if has_pip else [python, "-m", "pip"]
    return python, pip


def build(context: Context) -> None:
    """An environment with pydiffgguf built for this machine: from the archive's wheels, without a network, or, where
    there is no archive, with pip's packages. With --installed, the one that this Python has."""
    began = time.monotonic()
    if context.installed:
        python = sys.executable
    else:
        python, pip = make_environment(context.out / "venv")
        environment = cards.environment()
        environment["PATH"] = os.pathsep.join([os.path.dirname(python), environment["PATH"]])
        environment.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(cores()))
        if context.place == "cuda":
            environment["CMAKE_ARGS"] = " ".join([environment.get("CMAKE_ARGS", ""), CUDA]).strip()
        quiet = ["--quiet", "--disable-pip-version-check"]
        if context.archive is not None:
            wheels = sorted(map(str, (context.archive / "wheels").glob("*.whl")))
            call([*pip, "install", *quiet, "--no-index", "--no-deps", *wheels], environment)
            context.record(wheels=len(wheels), wheels_s=round(time.monotonic() - began, 1))
            options = ["--no-index", "--no-deps"]
        else:
            needs = ["scikit-build-core>=1.0", "cffi>=2.1", "ninja", "cmake>=3.25", "pytest", "pytest-xdist"]
            call([*pip, "install", *quiet, *needs], environment)
            options = []
        options += ["--no-build-isolation", "-C", f"build-dir={context.out / 'build'}"]
        call([*pip, "install", *quiet, "--verbose", *options, str(REPOSITORY)], environment)
    question = (
        "import json, pydiffgguf; from pydiffgguf._binding.functions import build_info; print(json.dumps(build_info()))"
    )
    done = subprocess.run([python, "-c", question], capture_output=True, text=True, cwd=context.out)
    if done.returncode != 0:
        raise StageError(f"pydiffgguf cannot be imported:\n{done.stderr.strip()}")
    info = json.loads(done.stdout)
    if context.place == "cuda" and "CUDA" not in info["backends"]:
        raise StageError(f"this pydiffgguf was built without CUDA: {info}")
    how = "as installed" if context.installed else "from the archive" if context.archive else "with pip's packages"
    context.record(python=python, how=how, seconds=round(time.monotonic() - began, 1), info=info)
