"""What the package weighs: wheel, dependencies, time to import, memory; beside another package of the same kind.

    python benchmarks/footprint.py WHEEL [OTHER.tar.gz ...]

WHEEL is this package's, as `pip wheel --no-deps .` makes it; the others' archives, wheels or sources, are only weighed:
`pip download --no-deps --no-binary :all: llama-cpp-python`. Memory is the peak of a fresh process (VmHWM, Linux) and
what it has at the end (VmRSS), the least of five; times are CPU time, the least of nine, with all files in the page
cache.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

MB = 1e6

IMPORT = "import time; t = time.process_time(); {}; print(1000 * (time.process_time() - t))"
MEMORY = """
{}
import re
status = open("/proc/self/status").read()
print(*(int(re.search(name + r":\\s+(\\d+) kB", status)[1]) * 1024 for name in ("VmRSS", "VmHWM")))
"""
LOAD = "from pydiffgguf import DiffusionModel, demo_model_path; m = DiffusionModel(demo_model_path())"

MEMORY_ROWS = {
    "the interpreter alone": "pass",
    "numpy imported": "import numpy",
    "`import pydiffgguf`": "import pydiffgguf",
    "the demo model opened": LOAD,
    "after a generation": f"{LOAD}; m.generate('Put in order: 9 7 1.', seed=7)",
    "after an infill": f"{LOAD}; m.infill('On Sunday Emma found a', ' in the school. Emma gave the white cup to Mia.')",
}
IMPORT_ROWS = {
    "numpy": "import numpy",
    "`import pydiffgguf`": "import pydiffgguf",
    "`from pydiffgguf import DiffusionModel`": "from pydiffgguf import DiffusionModel",
    "the demo model opened": LOAD,
}


def least(run: Callable[[], list[float]], times: int) -> list[float]:
    return min(run() for _ in range(times))


def python(script: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


def dependencies(name: str) -> dict[str, int]:
    """All distributions that an install pulls in, the package itself left out, with the bytes of their files."""
    found: dict[str, int] = {}
    queue = [name]
    while queue:
        for line in importlib.metadata.requires(queue.pop()) or []:
            wanted, _, marker = line.partition(";")
            distribution = re.split(r"[\s<>=!~\[(]", wanted.strip())[0].lower().replace("_", "-")
            if "extra" in marker or distribution in found:
                continue
            try:
                files = importlib.metadata.files(distribution) or []
            except importlib.metadata.PackageNotFoundError:
                continue  # a marker that does not hold here
            found[distribution] = sum(Path(path).stat().st_size for f in files if (path := f.locate()).is_file())
            queue.append(distribution)
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"| {' | '.join(head)} |\n| {' | '.join('---' for _ in head)} |")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def main(archives: Sequence[Path]) -> None:
    needs = dependencies("pydiffgguf")
    table(
        ["archive", "MB"],
        [[archive.name, f"{archive.stat().st_size / MB:.2f}"] for archive in archives]
        + [[f"dependencies, installed ({len(needs)})", f"{sum(needs.values()) / MB:.1f}"]],
    )
    print("Dependencies, largest first, MB installed:", end=" ")
    print(", ".join(f"{name} {size / MB:.1f}" for name, size in sorted(needs.items(), key=lambda item: -item[1])), "\n")
    rows = [[name, f"{least(lambda s=s: python(IMPORT.format(s)), 9)[0]:.0f}"] for name, s in IMPORT_ROWS.items()]
    table(["from a fresh interpreter", "CPU ms"], rows)
    measured = {name: least(lambda s=s: python(MEMORY.format(s)), 5) for name, s in MEMORY_ROWS.items()}
    base = measured["numpy imported"][0]
    rows = [
        [name, f"{rss / MB:.1f}", f"{peak / MB:.1f}", f"{(rss - base) / MB:+.1f}"]
        for name, (rss, peak) in measured.items()
    ]
    table(["process", "RSS, MB", "peak, MB", "beyond numpy, MB"], rows)
    print(f"Python {sys.version.split()[0]} on {sysconfig.get_platform()}")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
