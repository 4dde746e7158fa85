"""Where things are: C++ folders are floors, each of which includes what is below it, and nothing goes in a circle,
modules of Python neither.

The table of floors is that of docs/ARCHITECTURE.md, so that what a reader is told is what is tested.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc"
MOST_MODULES = 16


def includes() -> Iterator[tuple[str, str]]:
    """(file, included file) of this project's own, as paths below csrc."""
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in {".h", ".cpp", ".cu"}:
            for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
                if (SOURCES / name).exists():
                    yield path.relative_to(SOURCES).as_posix(), name
                else:
                    assert not (path.parent / name).exists(), f"{path}: {name} is not named from csrc on"


def module(path: str) -> str:
    """A header and the source of its name are one."""
    return str(PurePosixPath(path).with_suffix(""))


def folder(path: str) -> str:
    """ "pass" of pass/graph.h; the top floor's name for what is in csrc itself."""
    parts = PurePosixPath(path).parts
    return parts[0] if len(parts) > 1 else "."


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The nodes of a circle, or nothing."""
    done: set[str] = set()
    way: list[str] = []

    def visit(node: str) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node not in done:
            way.append(node)
            for following in sorted(graph.get(node, ())):
                if found := visit(following):
                    return found
            done.add(way.pop())
        return []

    for node in sorted(graph):
        if found := visit(node):
            return found
    return []


def floors() -> dict[str, set[str]]:
    """docs/ARCHITECTURE.md's table of csrc: each folder, from the ground up, and the folders that it may include."""
    text = (ROOT / "docs/ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.split("## The floors of csrc", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `csrc/(\w*)/?` \| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    return {name or ".": set(re.findall(r"`(\w+)`", below)) for name, below, _ in rows}


def test_a_circle_is_found() -> None:
    """The search itself: two nodes that need each other, and none."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_no_include_goes_in_a_circle() -> None:
    """A header and its source count as one module."""
    graph: dict[str, set[str]] = {}
    for file, name in includes():
        if module(file) != module(name):
            graph.setdefault(module(file), set()).add(module(name))
    assert len(graph) > 30
    assert circle(graph) == []


def python_modules() -> dict[str, Path]:
    """The package's modules by name, convert/ as it is installed. The faces that only hand on other modules' names are
    left out: everything is below them."""
    files = [(path, path.relative_to(ROOT)) for path in (ROOT / "pydiffgguf").rglob("*.py")]
    files += [(path, Path("pydiffgguf", path.relative_to(ROOT))) for path in (ROOT / "convert").rglob("*.py")]
    names = {".".join(name.with_suffix("").parts).removesuffix(".__init__"): path for path, name in files}
    return {name: path for name, path in names.items() if name not in ("pydiffgguf", "pydiffgguf.convert")}


def imported(name: str, path: Path, modules: Mapping[str, Path]) -> set[str]:
    """The other modules that a module imports: at its top, within functions and for type checkers alone."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*start, *([node.module] if node.module else [])])
            names = {f"{whole}.{alias.name}" for alias in node.names}
            found |= names if names <= set(modules) else {whole, *names}  # modules of a package, or what one holds
    return (found & set(modules)) - {name}


def test_no_import_goes_in_a_circle() -> None:
    """Neither in the package nor in the converter."""
    modules = python_modules()
    assert len(modules) > 60
    graph = {name: imported(name, path, modules) for name, path in modules.items()}
    assert sum(map(len, graph.values())) > 150
    assert circle(graph) == []


def test_no_include_goes_up_a_floor() -> None:
    """Each folder includes itself, the public header, and what the table grants it."""
    allowed = floors()
    wrong = [
        f"{file} includes {name}"
        for file, name in includes()
        if folder(file) != folder(name) and folder(name) not in allowed[folder(file)] and name != "diffgguf.h"
    ]
    assert wrong == []


def test_the_table_of_floors_is_whole() -> None:
    """It has every folder of csrc, grants only what is above it in the table, and nothing that nobody uses."""
    allowed = floors()
    assert set(allowed) == {folder(path.relative_to(SOURCES).as_posix()) for path in SOURCES.rglob("*.h")}
    order = list(allowed)
    used = {(folder(file), folder(name)) for file, name in includes()}
    for number, (name, below) in enumerate(allowed.items()):
        assert below <= set(order[:number]), f"{name} may include what is above it"
        assert {other for other in below if (name, other) not in used} == set(), f"{name} does not include these"


def test_no_folder_is_crowded() -> None:
    """At most 16 modules each."""
    for top, endings in ((SOURCES, {".h", ".cpp", ".cu"}), (ROOT / "pydiffgguf", {".py"}), (ROOT / "convert", {".py"})):
        for place in (top, *(path for path in top.rglob("*") if path.is_dir())):
            modules = {path.stem for path in place.iterdir() if path.suffix in endings}
            assert len(modules) <= MOST_MODULES, f"{place} has {len(modules)} modules"


def test_the_map_names_every_file_and_no_other() -> None:
    """docs/ARCHITECTURE.md's map: each source file and lone header of csrc, each module of Python; and what it names
    is there."""
    text = (ROOT / "docs/ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.split("## The map", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (.+?) \|", section, re.MULTILINE)
    named = {PurePosixPath(name).name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    files = {path for top in ("csrc", "pydiffgguf", "convert") for path in (ROOT / top).rglob("*") if path.is_file()}
    with_body = {path for path in files if path.suffix == ".h" and path.with_suffix(".cpp") in files}
    wanted = {path for path in files if path.suffix in {".cpp", ".cu", ".h", ".py"} and path.name != "__init__.py"}
    assert sorted(str(path) for path in wanted - with_body if path.name not in named) == []
    there = {path.name for path in files} | {path.name for path in (ROOT / "tests").iterdir()}
    assert sorted(name for name in named if "." in name and name not in there) == []
