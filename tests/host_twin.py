"""The engine with the kernels' sampler on the CPU: `sampler="kernels"`, by the kernels' bodies on the host.

Run as a program, it does so in a process of its own: `python host_twin.py LIBRARY SCRIPT ...` runs a script with the
library in the place of the compiled module. `link` makes the library from the objects of this checkout's build: one
file of the engine, which says what samplers there are, is another one.
"""

from __future__ import annotations

import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _build_id(library: Path) -> str:
    if not (readelf := shutil.which("readelf")):
        return ""
    notes = subprocess.run([readelf, "-n", str(library)], capture_output=True, text=True, check=False).stdout
    found = re.search(r"Build ID: (\w+)", notes)
    return found.group(1) if found else ""


def find_build() -> Path | None:
    """The folder where the compiled module was built, if it is still there with its objects."""
    from pydiffgguf import _diffgguf

    own = _build_id(Path(_diffgguf.__file__))
    for built in ROOT.glob("build/*/_diffgguf.abi3.so"):
        if own and _build_id(built) == own and list(built.parent.glob("vendor/**/libggml.a")):
            return built.parent
    return None


def link(build: Path, compiler: str, folder: Path) -> Path:
    """The library, made in `folder`."""
    library = folder / "_diffgguf.abi3.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/kernels'}", "-isystem", str(ROOT / "vendor/ggml/include")]
    sources = [ROOT / "tests/kernels" / name for name in ("host_steppers.cpp", "host_device.cpp")]
    archives = [build / "libdiffgguf.a", *sorted(build.glob("vendor/**/*.a"))]
    module = build / "CMakeFiles/_diffgguf.dir/_diffgguf.c.o"
    command = [compiler, *flags, *includes, *map(str, sources), str(module), "-Wl,--start-group", *map(str, archives)]
    subprocess.run([*command, "-Wl,--end-group", "-Wl,--exclude-libs,ALL", "-ldl", "-o", str(library)], check=True)
    return library


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("pydiffgguf._diffgguf", sys.argv[1])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    del sys.argv[:2]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
