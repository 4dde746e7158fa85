"""The command ``doctor``: what is installed, what was built in, what is broken, and what is off, each with its cure.
With ``--json`` it is what a bug report needs.

Nothing here needs the compiled extension, rich or numpy to be there: a broken installation is what it is for.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from pydiffgguf._text import one_line

__all__ = ["examine", "render"]

#: Python packages that the library imports, by import name, and the name to install.
PACKAGES = {
    "numpy": "numpy",
    "cffi": "cffi",
    "gguf": "gguf",
    "huggingface_hub": "huggingface_hub",
    "jinja2": "jinja2",
    "rich": "rich",
    "tokenizers": "tokenizers",
}

#: Packages of extras, of which the version is told where they are installed: with llguidance's, a seed gives the same
#: constrained answer again.
OPTIONAL = ("llguidance",)

#: Backends of ggml that compute on a GPU, and the switch that builds each.
GPU_BACKENDS = {"CUDA": "GGML_CUDA", "ROCm": "GGML_HIP", "Vulkan": "GGML_VULKAN", "MTL": "GGML_METAL"}

#: The package is on no index: a cure that named it there would install a stranger's.
REINSTALL = "in the source folder, pip install --force-reinstall --no-cache-dir ."


def examine() -> dict[str, Any]:
    """The state of the installation in JSON types: versions, build, machine; `problems`, a list of {"what", "cure"},
    empty when all is well; and `off`, the same of what works without but would be faster or do more with."""
    problems: list[dict[str, str]] = []

    def problem(what: str, cure: str) -> None:
        problems.append({"what": what, "cure": cure})

    try:
        own = version("pydiffgguf")
    except PackageNotFoundError:
        own = None
        problem("pydiffgguf is not installed, only imported from a folder", "pip install . in that folder")
    packages = {name: _package(name, distribution, problem) for name, distribution in PACKAGES.items()}
    packages |= {name: version(name) for name in OPTIONAL if importlib.util.find_spec(name) is not None}
    build = _build(own, problem)
    folder = Path(__file__).parent.parent
    demo = folder / "data" / "demo.gguf"
    if not demo.is_file():
        problem(f"the demo model is missing: {demo}", REINSTALL)
    lacks = None if build is None or not demo.is_file() else _device_lacks(build, demo, problem)
    return {
        "pydiffgguf": own,
        "location": str(folder),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "cpu": _cpu_name(),
        "memory": _memory(build),
        "memory_available": None if build is None else _available(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": packages,
        "build": build,
        "device_lacks": lacks,
        "demo_model": str(demo) if demo.is_file() else None,
        "problems": problems,
        "off": [] if build is None else _off(build),
    }


def _package(name: str, distribution: str, problem: Any) -> str | None:
    """The version of an importable package, or None with a problem noted."""
    try:
        importlib.import_module(name)
        found = version(distribution)
    except Exception as error:  # a broken package can raise anything
        problem(
            f"{name} cannot be imported: {_told(error)}",
            f'pip install "{_requirement(distribution)}"',
        )
        return None
    wanted = re.search(r">=\s*([\d.]+)", _requirement(distribution))
    if wanted and _numbers(found) < _numbers(wanted[1]):
        problem(f"{name} {found} is too old", f'pip install "{_requirement(distribution)}"')
    return found


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _requirement(distribution: str) -> str:
    """What pydiffgguf's own metadata asks of a distribution."""
    try:
        listed = requires("pydiffgguf") or []
    except PackageNotFoundError:
        listed = []
    for line in listed:
        if re.match(rf"{re.escape(distribution)}\b(?!.*extra ==)", line.replace("-", "_"), re.IGNORECASE):
            return line.split(";")[0].strip()
    return distribution


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _build(own: str | None, problem: Any) -> dict[str, Any] | None:
    """build_info() of the extension, or None with a problem noted."""
    try:
        from pydiffgguf._binding import functions

        build: dict[str, Any] = {**functions.build_info()}
    except Exception as error:
        problem(f"the compiled extension cannot be loaded: {_told(error)}", REINSTALL)
        return None
    if own is not None and build["version"] != own:
        problem(f"the compiled extension is version {build['version']}, the package {own}", REINSTALL)
    return build


def _device_lacks(build: dict[str, Any], demo: Path, problem: Any) -> list[str] | None:
    """What this machine's devices lack for the demo model; None where there is but the CPU."""
    if [device["name"] for device in build["devices"]] == ["CPU"]:
        return None
    from pydiffgguf import DiffusionModel

    try:
        with DiffusionModel(demo) as model, model.session() as session:
            return session.fallbacks
    except Exception as error:
        problem(
            f"the demo model does not open on the devices: {_told(error)}",
            "see docs/DEVICES.md",
        )
        return None


def _off(build: dict[str, Any]) -> list[dict[str, str]]:
    """What this build leaves unused, or has on that costs speed."""
    off: list[dict[str, str]] = []
    levels = build["cpu_levels"]
    if not levels:
        what = f"{build['compiler']} compiles no kernels for the CPU: ggml's operators do the work, slower"
        off.append({"what": what, "cure": f"build with Clang or GCC: {REINSTALL}"})
    left_out = [level["name"] for level in levels if level["offered"] and not level["compiled"]]
    if left_out:
        what = f"this CPU has {', '.join(left_out)}, which {build['compiler']} could not compile"
        off.append({"what": what, "cure": f"build with a newer compiler: {REINSTALL}"})
    if not any(backend in GPU_BACKENDS for backend in build["backends"]):
        switches = ", ".join(f"-D{switch}=ON ({name})" for name, switch in GPU_BACKENDS.items())
        cure = f"with a GPU, build with one of {switches} in CMAKE_ARGS"
        off.append({"what": "no GPU backend is built in", "cure": cure})
    elif [device["name"] for device in build["devices"]] == ["CPU"]:
        found = ", ".join(backend for backend in build["backends"] if backend in GPU_BACKENDS)
        cure = "install the GPU's driver, and see that its own tool (nvidia-smi, rocminfo, vulkaninfo) lists the card"
        off.append({"what": f"{found} is built in, but it finds no device", "cure": cure})
    kind, *flags = build["flags"] or [""]
    if kind not in ("Release", "RelWithDebInfo", "MinSizeRel"):
        off.append({"what": f"the build type is {kind or 'not set'}: slow", "cure": REINSTALL})
    for flag in flags:
        if flag.startswith("PYDIFFGGUF_SANITIZE"):
            off.append({"what": f"built with sanitizers ({flag}): slow", "cure": REINSTALL})
        if flag.startswith("PYDIFFGGUF_SYSTEM_GGML"):
            off.append({"what": "an installed ggml is used: without the patches of this project", "cure": REINSTALL})
    return off


def _cpu_info(key: str) -> str | None:
    """A line of /proc/cpuinfo; None where the system has none (only Linux has)."""
    try:
        found = re.search(rf"^{key}\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None


def _cpu_name() -> str | None:
    return _cpu_info("model name") or platform.processor() or None


def _memory(build: dict[str, Any] | None) -> int | None:
    """Bytes of the machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no such function; ggml asks it another way
        devices = [] if build is None else build["devices"]
        return next((device["memory_total"] for device in devices if device["name"] == "CPU"), None)


def _available() -> int | None:
    from pydiffgguf._binding.functions import memory_available

    return memory_available()


def _levels(build: dict[str, Any]) -> str:
    """The level in use, and of each other whether it is compiled in and what this processor lacks of it."""
    usable = [level["name"] for level in build["cpu_levels"] if level["compiled"] and level["offered"]]
    if not usable:
        return "none: ggml's operators"

    def state(level: dict[str, Any]) -> str:
        if not level["compiled"]:
            return f"{level['name']} (not compiled in)"
        return level["name"] if level["offered"] else f"{level['name']} (this CPU lacks {', '.join(level['lacks'])})"

    return f"{usable[-1]}; built in: {', '.join(state(level) for level in build['cpu_levels'])}"


def _device(device: dict[str, Any]) -> str:
    free, total = device["memory_free"] / 1e9, device["memory_total"] / 1e9
    return device["name"] if device["name"] == "CPU" else f"{device['name']}, {free:.1f} of {total:.1f} GB free"


def _memory_line(total: int | None, available: int | None) -> str:
    has = "unknown" if total is None else f"{total / 1e9:.1f} GB"
    return has if available is None else f"{has}, {available / 1e9:.1f} GB available"


def render(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    build, lacks = report["build"], report["device_lacks"]
    rows = [
        ("pydiffgguf", f"{report['pydiffgguf']} in {report['location']}"),
        ("python", f"{report['python']} ({report['executable']})"),
        ("platform", f"{report['platform']}, {report['threads']} threads"),
        ("CPU", report["cpu"] or report["machine"]),
        ("memory", _memory_line(report["memory"], report["memory_available"])),
        ("packages", ", ".join(f"{name} {found}" for name, found in report["packages"].items() if found)),
    ]
    if build is not None:
        rows += [
            ("ggml", build["ggml_version"]),
            ("compiler", build["compiler"]),
            ("build", " ".join(build["flags"])),
            ("backends", ", ".join(build["backends"])),
            ("devices", "; ".join(_device(device) for device in build["devices"])),
            *([] if lacks is None else [("they lack", "; ".join(lacks) or "nothing that the demo model needs")]),
            ("CPU level", _levels(build)),
            ("ggml's CPU", ", ".join(build["cpu_features"]) or "the baseline"),
        ]
    rows.append(("demo model", report["demo_model"] or "missing"))
    lines = [f"{name:<13}{value}" for name, value in rows]
    for each in report["off"]:
        lines += [f"off:         {each['what']}", f"cure:        {each['cure']}"]
    for problem in report["problems"]:
        lines += [f"problem:     {problem['what']}", f"cure:        {problem['cure']}"]
    if not report["problems"]:
        lines.append("all is well")
    return "\n".join(lines)
