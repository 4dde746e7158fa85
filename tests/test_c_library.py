"""A source release, built where there is no network: the wheel, and the C library with its example, as somebody else's
program meets them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pydiffgguf import demo_model_path
from pydiffgguf._binding import functions

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
FILLED = (
    "On Sunday Emma found a white cup in the school. Emma gave the white cup to Mia. "
    "Mia took the cup home that Sunday and never went back to the school."
)


def run(*command: str | Path, cwd: Path | None = None, offline: bool = False, **environment: str) -> str:
    """Runs a command and returns what it prints; fails with all that it said."""
    if offline:
        # A namespace of its own has no network at all. Where the system allows none, pip is told to use no index, and
        # a proxy that is not there stands in the way of everything else.
        namespace = ["unshare", "--map-root-user", "--net"]
        if shutil.which("unshare") and subprocess.run([*namespace, "true"], capture_output=True).returncode == 0:
            command = (*namespace, *command)
        environment |= {"PIP_NO_INDEX": "1", "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source release of this checkout, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    script = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", script, folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else tar.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


#: For both builds of the source release. With the same tools the second takes the objects of the first, which is two
#: minutes of work; pip would take the compiler that Python was built with.
TOOLS = {"CMAKE_GENERATOR": "Ninja" if shutil.which("ninja") else "Unix Makefiles"}
if shutil.which("cc") and shutil.which("c++"):
    TOOLS |= {"CC": "cc", "CXX": "c++"}
#: What is built is looked at and run for a moment, so it is compiled with less care than a release: ggml's ops.cpp
#: takes 3.6 s instead of 7.3. The kernels keep -O2 in this build type (cmake/levels.cmake).
QUICKLY = ["CMAKE_BUILD_TYPE=Debug", "CMAKE_C_FLAGS_DEBUG=-O1 -DNDEBUG", "CMAKE_CXX_FLAGS_DEBUG=-O1 -DNDEBUG"]


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the source release, built by pip without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, "."),
        *("-C", "build-dir=build/both", "-C", "cmake.define.PYDIFFGGUF_WERROR=ON", "-C", "cmake.build-type=Debug"),
        *(part for define in QUICKLY[1:] for part in ("-C", f"cmake.define.{define}")),
        cwd=source,
        offline=True,
        **TOOLS,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def prefix(source: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the C library was installed, by CMake alone, and then moved to: nothing may know where it was built."""
    need("cmake", "cc")
    folder = tmp_path_factory.mktemp("c")
    build = source / "build" / "both"
    (build / "CMakeCache.txt").unlink()  # CMake finds out everything again, and compiles again what comes out otherwise
    run(
        *("cmake", "-S", source, "-B", build, "-DPYDIFFGGUF_WERROR=ON", "-DCMAKE_DISABLE_FIND_PACKAGE_Python=ON"),
        *(f"-D{define}" for define in QUICKLY),
        offline=True,
        **TOOLS,
    )
    run("cmake", "--build", build, "--parallel", str(os.cpu_count()), offline=True)
    run("cmake", "--install", build, "--prefix", folder / "installed")
    shutil.rmtree(build)
    return (folder / "installed").rename(folder / "moved")


@pytest.fixture(scope="module")
def library(prefix: Path) -> Path:
    """The folder of the libraries: lib, or what the system calls it."""
    (static,) = prefix.glob("lib*/**/libdiffgguf.a")
    return static.parent


def pkg_config(library: Path) -> dict[str, str]:
    """An environment in which it finds the library; LIBRARY is its folder, STATIC what the static one needs besides."""
    environment = {"PKG_CONFIG_PATH": str(library / "pkgconfig")}
    static = run("pkg-config", "--static", "--libs-only-l", "--libs-only-other", "diffgguf", **environment)
    return {**environment, "LIBRARY": str(library), "STATIC": static.replace("-ldiffgguf", "").strip()}


def test_a_wheel_is_built_without_a_network(source: Path, wheel: Path, tmp_path: Path) -> None:
    """With the build's tools there, the source release needs nothing else: ggml is in it."""
    assert (source / "vendor" / "ggml" / ".pin").is_file()
    assert not (source / ".ci").exists()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = """
import sys
sys.path[:0] = sys.argv[1:]
import pydiffgguf
assert pydiffgguf.__file__.startswith(sys.argv[1])
with pydiffgguf.DiffusionModel(pydiffgguf.demo_model_path()) as model:
    print(model.generate("Put in order: 9 7 1.", seed=7).text)
"""
    # -S leaves out the hooks of a development install, which would be imported in its place.
    site, others = tmp_path / "site", Path(np.__file__).parents[1]
    assert run(sys.executable, "-S", "-c", script, site, others) == "1 7 9\n"


@pytest.mark.parametrize("target", ["diffgguf", "diffgguf_static"])
def test_the_example_is_built_by_cmake(source: Path, prefix: Path, tmp_path: Path, target: str) -> None:
    """find_package gives both libraries to a project in C, which is compiled as C11 with warnings as errors."""
    run(
        *("cmake", "-S", source / "examples" / "c", "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}"),
        *(f"-Dlibrary=diffgguf::{target}", f"-Ddemo_model={demo_model_path()}"),
    )
    run("cmake", "--build", tmp_path)
    assert "100% tests passed" in run("ctest", "--test-dir", tmp_path, "--output-on-failure")
    assert run(tmp_path / "infill", demo_model_path()).splitlines()[-1] == FILLED


@pytest.mark.parametrize("kind", ["shared", "static"])
def test_the_example_is_built_with_pkg_config(source: Path, library: Path, tmp_path: Path, kind: str) -> None:
    """One command each, as the example's README has it."""
    need("pkg-config")
    flags = "$(pkg-config --cflags --libs diffgguf) -Wl,-rpath,$LIBRARY"
    if kind == "static":
        flags = "$(pkg-config --cflags diffgguf) $LIBRARY/libdiffgguf.a $STATIC"
    command = f"cc -std=c11 -Wall -Wextra -Wpedantic -Werror infill.c {flags} -o {tmp_path}/infill"
    run("sh", "-c", command, cwd=source / "examples" / "c", **pkg_config(library))
    assert run(tmp_path / "infill", demo_model_path()).splitlines()[-1] == FILLED
    dynamic = run("readelf", "-d", tmp_path / "infill") if shutil.which("readelf") else ""
    if dynamic:
        assert ("libdiffgguf" in dynamic) == (kind == "shared")


def test_a_wrong_file_is_an_error_and_a_message(source: Path, prefix: Path, tmp_path: Path) -> None:
    """The example says which file, and why, and exits with 1."""
    run("cmake", "-S", source / "examples" / "c", "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", tmp_path)
    done = subprocess.run([tmp_path / "infill", tmp_path / "missing.gguf"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error 2: .*missing\.gguf: .*No such file or directory\n", done.stderr)


def test_a_program_in_c_meets_what_the_header_says(library: Path, tmp_path: Path) -> None:
    """tests/c_library/checks.c, which scripts run for other systems too: levels, files, errors, cancels, memory."""
    need("pkg-config", "truncate")
    sources = ROOT / "tests" / "c_library"
    run(sources / "files", demo_model_path(), tmp_path / "files")
    flags = "$(pkg-config --cflags diffgguf) $LIBRARY/libdiffgguf.a $STATIC"
    command = f"cc -std=gnu11 -Wall -Wextra -Wpedantic -Werror {sources}/checks.c {flags} -o checks"
    run("sh", "-c", command, cwd=tmp_path, **pkg_config(library))
    assert run(tmp_path / "checks", demo_model_path(), "files", cwd=tmp_path).endswith("\n0 failures\n")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into ELF files")
def test_nothing_but_dg_can_be_linked_against(library: Path) -> None:
    """The shared library exports dg_* alone. The static one has no other strong symbol either; what is weak are
    instances of the C++ library's templates, which are the same in every program."""
    need("nm")
    header = (library.parent / "include" / "diffgguf.h").read_text(encoding="utf-8")
    declared = set(re.findall(r"^DG_API [\w ]*\W?(dg_\w+)\(", header, re.MULTILINE))

    def symbols(*options: str) -> dict[str, str]:
        lines = run("nm", "--defined-only", "--format=posix", *options).splitlines()
        return {name: kind for name, kind in (line.split()[:2] for line in lines if len(line.split()) > 2)}

    assert set(symbols("-D", str(library / "libdiffgguf.so"))) == declared
    static = symbols("-g", str(library / "libdiffgguf.a"))
    assert {name for name, kind in static.items() if kind not in "WVu"} == declared
    assert not [name for name in static if "ggml" in name.removeprefix("dg_ggml")]


def test_another_ggml_in_the_program_is_not_met(source: Path, library: Path, tmp_path: Path) -> None:
    """A program that has functions of ggml's names links with the static library, and both sides use their own."""
    need("pkg-config")
    strangers = "\n".join(
        f"void {name}(void);\nvoid {name}(void) {{ abort(); }}"
        for name in ("ggml_init", "ggml_free", "gguf_init_from_file", "ggml_backend_cpu_init", "ggml_graph_compute")
    )
    (tmp_path / "other.c").write_text(f"#include <stdlib.h>\n{strangers}\n")
    flags = "$(pkg-config --cflags diffgguf) $LIBRARY/libdiffgguf.a $STATIC"
    command = f"cc -std=c11 other.c {source}/examples/c/infill.c {flags} -o infill"
    run("sh", "-c", command, cwd=tmp_path, **pkg_config(library))
    assert run(tmp_path / "infill", demo_model_path()).splitlines()[-1] == FILLED


def test_version_and_abi_number_are_the_same_everywhere(library: Path) -> None:
    """The header, the library, pkg-config and the shared library's name."""
    build = functions.build_info()
    pc = (library / "pkgconfig" / "diffgguf.pc").read_text(encoding="utf-8")
    assert f"Version: {build['version']}\n" in pc
    assert f"abi_version={build['abi']}\n" in pc
    header = (library.parent / "include" / "diffgguf.h").read_text(encoding="utf-8")
    assert f"#define DG_ABI_VERSION {build['abi']}\n" in header
    if sys.platform == "linux":
        assert (library / f"libdiffgguf.so.{build['abi']}").resolve().name == f"libdiffgguf.so.{build['version']}"
