"""How many threads a session starts by itself: what csrc/base/cores.cpp makes of a machine's files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("c++")
pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="compiles csrc/base/cores.cpp with c++, as Linux has it"
)

MAIN = """
#include "base/cores.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>
int main(int argc, char **argv) {
    std::vector<int32_t> allowed;
    for (int i = 3; i < argc; ++i) {
        allowed.push_back(std::atoi(argv[i]));
    }
    const bool cores = std::strcmp(argv[1], "cores") == 0;
    std::printf("%d", cores ? dg::distinct_cores(allowed, argv[2]) : dg::granted_cores(argv[2], argv[3]));
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cores")
    (folder / "main.cpp").write_text(MAIN)
    sources = [folder / "main.cpp", ROOT / "csrc/base/cores.cpp", ROOT / "csrc/base/control_groups.cpp"]
    assert COMPILER is not None
    subprocess.run([COMPILER, "-std=c++17", f"-I{ROOT / 'csrc'}", *sources, "-o", folder / "cores"], check=True)
    return folder / "cores"


def ask(program: Path, *arguments: str | Path | int) -> int:
    return int(subprocess.run([program, *map(str, arguments)], check=True, capture_output=True, text=True).stdout)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def machine(folder: Path, siblings: list[str], capacities: list[int] | None = None) -> Path:
    """Files of /sys/devices for processors with these threads of their core, by number."""
    for i, text in enumerate(siblings):
        write(folder / f"system/cpu/cpu{i}/topology/thread_siblings_list", text)
        if capacities:
            write(folder / f"system/cpu/cpu{i}/cpu_capacity", str(capacities[i]))
    return folder


def test_a_core_counts_once(program: Path, tmp_path: Path) -> None:
    """Two threads a core, numbered either way; of a mask that has one thread of a core, that one counts."""
    apart = machine(tmp_path / "apart", ["0,4", "1,5", "2,6", "3,7"] * 2)
    beside = machine(tmp_path / "beside", ["0-1", "0-1", "2-3", "2-3"])
    assert ask(program, "cores", apart, *range(8)) == 4
    assert ask(program, "cores", apart, 4, 5, 1) == 2
    assert ask(program, "cores", beside, *range(4)) == 2
    assert ask(program, "cores", beside, 1, 3) == 2
    assert ask(program, "cores", tmp_path / "nothing", *range(3)) == 3


def test_efficiency_cores_count_only_where_there_are_no_others(program: Path, tmp_path: Path) -> None:
    """Intel's and ARM's ways of telling them apart."""
    intel = machine(tmp_path / "intel", ["0-1", "0-1", "2-3", "2-3", "4", "5"])
    write(intel / "cpu_atom/cpus", "4-5")
    assert ask(program, "cores", intel, *range(6)) == 2
    assert ask(program, "cores", intel, 4, 5) == 2
    arm = machine(tmp_path / "arm", ["0", "1", "2", "3"], [340, 340, 1024, 900])
    assert ask(program, "cores", arm, *range(4)) == 2
    assert ask(program, "cores", arm, 0, 1) == 2


def test_a_quota_holds_wherever_it_stands_above(program: Path, tmp_path: Path) -> None:
    """Version 2 and 1 of control groups, none, less than one processor, and a path that the container does not see."""
    write(tmp_path / "two/cpu.max", "max 100000")
    write(tmp_path / "two/a/cpu.max", "250000 100000")
    write(tmp_path / "two/a/b/cpu.max", "800000 100000")
    assert ask(program, "quota", tmp_path / "two", "/a/b") == 2
    assert ask(program, "quota", tmp_path / "two", "/a/b/unseen") == 2
    assert ask(program, "quota", tmp_path / "two", "/") == 0
    write(tmp_path / "one/cpu.cfs_quota_us", "50000")
    write(tmp_path / "one/cpu.cfs_period_us", "100000")
    write(tmp_path / "one/free/cpu.cfs_quota_us", "-1")
    write(tmp_path / "one/free/cpu.cfs_period_us", "100000")
    assert ask(program, "quota", tmp_path / "one", "/free") == 1
