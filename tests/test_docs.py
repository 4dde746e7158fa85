"""What README and docs show works: snippets run, commands have the options that they are shown with, links lead
somewhere.

A snippet that wants a model of its own says so in the names that it uses: `model.gguf` and its like, or `hf:...`. It is
compiled, or its command line parsed. Everything that uses the bundled model is run.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown import ROOT, CodeBlock, anchors, code_blocks, links, pages

from pydiffgguf.cli import arguments as cli

PAGES = pages()
BLOCKS = [block for page in PAGES for block in code_blocks(page)]
#: Names of models that a page cannot bring with it.
FOREIGN = re.compile(r"\.gguf\"|hf:|from_pretrained|google/")
#: Programs that the pages show besides this one, whose lines are not run here.
OTHERS = {".", "cc", "cmake", "export", "fuzz_open", "gcov", "git", "infill", "pip", "pytest", "python", "python3"}
OTHERS |= {"run", "ssh"}

FOLDERS = ("benchmarks", "cmake", "convert", "csrc", "docs", "examples", "pydiffgguf", "tests", "tools", "vendor")


def of(*languages: str) -> list[CodeBlock]:
    return [block for block in BLOCKS if block.language in languages]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    """To a file or folder that is there, and, where a heading is named, to one that the page has."""
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / unquote(path)).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_files_are_there(page: Path) -> None:
    """A path in code style that begins with one of the project's folders; what a build makes is not looked for."""
    if page.name == "CHANGELOG.md":  # it speaks of files that were
        return
    text = page.read_text(encoding="utf-8")
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)[`: ]", text)
    named += re.findall(r"\bpython ((?:benchmarks|tools|examples)/[\w/]+\.py)", text)
    named = [name for name in named if not name.endswith(".so")]
    assert [name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists()] == []


def map_of_the_source() -> set[Path]:
    """The files that docs/ARCHITECTURE.md's map names. A bold folder begins a part; a name without a folder is in that
    of the part, or of the name before it."""
    text = (ROOT / "docs/ARCHITECTURE.md").read_text(encoding="utf-8").split("\n## The map\n")[1].split("\n## ")[0]
    files: set[Path] = set()
    part = ROOT
    for cell in re.findall(r"^\| (.*?) \|", text, re.MULTILINE):
        if bold := re.fullmatch(r"\*\*(.+?)/?\*\*", cell):
            part = ROOT / bold[1]
            continue
        folder = part
        for name in re.findall(r"`([\w./-]+)`", cell):
            path = part / name if (part / name).exists() else folder / name
            assert path.exists(), f"the map's {name} is not in {folder.relative_to(ROOT)}"
            files.add(path)
            folder = path.parent
    return files


def test_the_map_has_every_module() -> None:
    """Every module of csrc, pydiffgguf and convert is in docs/ARCHITECTURE.md, a header with its source."""
    named = {path.with_suffix("") for path in map_of_the_source()}
    there = {
        path.with_suffix("")
        for folder in ("csrc", "pydiffgguf", "convert")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".cpp", ".h", ".cu", ".py") and path.name != "__init__.py"
    }
    assert sorted(str(path.relative_to(ROOT)) for path in there - named) == []


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.page == p for b in of("python"))], ids=page_name)
def test_python_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would type them; those with a model of the reader's own are compiled."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "snippets"}
    for block in of("python"):
        if block.page != page:
            continue
        code = compile("\n" * block.line + block.text, page, "exec")
        if not FOREIGN.search(block.text):
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, names)


def commands(block: CodeBlock) -> list[list[str]]:
    """The command lines of a block, without prompts, comments and variables set before them; a console's output and a
    here-document's text are none."""
    text = re.sub(r"<<(\w+)\n.*?^\1$", "", block.text, flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ")
    lines = text.splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    words = [shlex.split(line, comments=True) for line in lines]
    split: list[list[str]] = []
    for line in words:
        split.append([])
        for word in line:
            if word in ("&&", "|", "&"):
                split.append([])
            elif split[-1] or not re.match(r"[A-Z_]+=", word):
                split[-1].append(word)
    return [command for command in split if command]


SHOWN = [(block, command) for block in of("sh", "console") for command in commands(block)]
OURS = [(b, c) for b, c in SHOWN if c[0].rsplit("/", 1)[-1] == "pydiffgguf"]


def test_other_programs_are_those_we_know_of() -> None:
    """A line that begins with something else is a slip, or a program for the list above."""
    programs = {command[0].rsplit("/", 1)[-1] for _, command in SHOWN}
    assert programs - {"pydiffgguf"} <= OTHERS | {path.name for path in (ROOT / ".ci").iterdir()}


@pytest.mark.parametrize(("block", "command"), OURS, ids=[f"{b.name} {' '.join(c[:2])}" for b, c in OURS])
def test_shown_commands_have_these_options(block: CodeBlock, command: list[str]) -> None:
    """The command's own parser takes the line."""
    redirected = [word for word in command[1:] if word not in ("<", ">")]
    cli._parser().parse_args(redirected)


RUN = [(b, c) for b, c in OURS if c[1] in ("demo", "doctor") or (c[2:3] == ["demo"] and c[1] not in ("chat", "serve"))]


@pytest.mark.parametrize(("block", "command"), RUN, ids=[f"{b.name} {' '.join(c[:2])}" for b, c in RUN])
def test_commands_with_the_bundled_model_run(block: CodeBlock, command: list[str], tmp_path: Path) -> None:
    """And print what the page shows below them, up to numbers that differ from run to run."""
    done = subprocess.run(
        [sys.executable, "-m", "pydiffgguf", *command[1:]], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    if block.language == "console":
        shown = block.text.split(f"$ {shlex.join(command)}\n", 1)[-1].split("\n$ ")[0]

        def plain(text: str) -> str:
            return re.sub(r"[\d,]+\.\d+", "N", text).strip()

        assert plain(done.stdout) == plain(shown)
