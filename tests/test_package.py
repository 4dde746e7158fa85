"""The package as a whole: what it exports, what importing it does, and that its facts stand in one place each."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import types
import typing
from pathlib import Path

import _cffi_backend
import numpy as np

import pydiffgguf
from pydiffgguf._binding import functions, library

ROOT = Path(__file__).resolve().parents[1]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, timeout=60)


def test_all_names_every_public_name_and_each_exists() -> None:
    """`__all__` is sorted and is what `dir()` shows; every name can be had, and all are documented
    except the version and aliases of types."""
    assert pydiffgguf.__all__ == sorted(pydiffgguf.__all__)
    assert dir(pydiffgguf) == pydiffgguf.__all__
    for name in pydiffgguf.__all__:
        value = getattr(pydiffgguf, name)
        assert not isinstance(value, types.ModuleType), name
        assert name == "__version__" or typing.get_origin(value) or value.__doc__, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Names are loaded when they are first used; a name that does not exist says so at once."""
    assert not hasattr(pydiffgguf, "DiffusionModle")


def test_one_version() -> None:
    """pyproject.toml's version is the package's, the distribution's and the C library's."""
    (declared,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert pydiffgguf.__version__ == declared
    assert importlib.metadata.version("pydiffgguf") == declared
    assert functions.build_info()["version"] == declared


def test_the_page_on_an_index_has_no_link_that_leads_nowhere() -> None:
    """README's relative links become text there, or lead to the repository once there is one."""
    page = str(importlib.metadata.metadata("pydiffgguf").get_payload())
    targets = re.findall(r"\]\(([^()\s]+)\)", page)
    assert targets and all(re.match("https?:|#", target) for target in targets)
    assert "- docs/API.md: the Python API on one page" in page
    spec = importlib.util.spec_from_file_location("index_page", ROOT / "cmake" / "index_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "![a](docs/a.svg)\n[b](docs/b.md#c) [d](https://d) [e](#e) [f [1]](f)"
    found = module.index_page(text, "https://host/one", "1.2")
    assert found.splitlines() == [
        "![a](https://host/one/raw/v1.2/docs/a.svg)",
        "[b](https://host/one/blob/v1.2/docs/b.md#c) [d](https://d) [e](#e) [f [1]](https://host/one/blob/v1.2/f)",
    ]
    assert module.index_page(text, None, "1.2") == "\nb (docs/b.md#c) [d](https://d) [e](#e) f [1]"


def test_development_has_groups_and_users_have_extras() -> None:
    """What only development needs is in no metadata; what README's commands install with any pip is an extra."""
    metadata = importlib.metadata.metadata("pydiffgguf")
    extras = set(metadata.get_all("Provides-Extra") or ())
    assert extras == {"bench", "server", "structured", "test", "test-light"}
    required = "\n".join(importlib.metadata.requires("pydiffgguf") or ())
    assert "torch" in required and "ruff" not in required and "mypy" not in required
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    groups = declared.split("[dependency-groups]\n", 1)[1].split("\n[", 1)[0]
    assert set(re.findall(r"^([\w-]+) = ", groups, re.MULTILINE)) == {"dev", "lint", "test", "test-light"}
    assert set(re.findall(r"pydiffgguf\[([\w-]+)\]", groups)) <= extras
    assert {"Model files", "ggml"} == {url.split(",")[0] for url in metadata.get_all("Project-URL") or ()}


def test_no_cure_installs_a_strangers_package() -> None:
    """pydiffgguf is on no index: what tells somebody to install it there gets them nothing, or somebody else's."""
    files = [path for top in ("pydiffgguf", "convert", "csrc", "cmake", "docs") for path in (ROOT / top).rglob("*.*")]
    texts = [*files, ROOT / "README.md", ROOT / "CMakeLists.txt"]
    by_name = re.compile(r"(?:pip|pipx|uv\w*) (?:tool )?install\b[^\n`]*[ \"']pydiffgguf\b")
    suffixes = {".py", ".cpp", ".h", ".cmake", ".md", ".txt"}
    assert [str(p) for p in texts if p.suffix in suffixes and by_name.search(p.read_text(encoding="utf-8"))] == []


def test_the_changelog_knows_this_version() -> None:
    """A release without a line in CHANGELOG.md is a mistake."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{pydiffgguf.__version__}]" in changelog


def test_importing_prints_nothing_and_loads_no_engine() -> None:
    """Import does nothing but import: no output, no numpy, no compiled module, no thread."""
    script = """
        import sys, threading
        import pydiffgguf
        assert threading.active_count() == 1
        print(sorted({"numpy", "pydiffgguf._diffgguf", "rich", "torch", "tokenizers"} & set(sys.modules)))
    """
    done = run_python("-W", "error", "-c", re.sub(r"^ +", "", script, flags=re.MULTILINE))
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_generating_imports_neither_the_converter_nor_what_it_needs() -> None:
    """An application's start and its frozen form do without: they come with adapters' folders, a hub, a terminal."""
    script = (
        "import sys\nfrom pydiffgguf import DiffusionModel, demo_model_path\n"
        "with DiffusionModel(demo_model_path(), n_threads=1) as model: model.generate('x', max_tokens=1, steps=1)\n"
        "print(sorted({'gguf', 'huggingface_hub', 'rich', 'pydiffgguf.convert', 'llguidance'} & set(sys.modules)))"
    )
    assert run_python("-c", script).stdout == "[]\n"


def test_a_source_tree_says_how_to_install_it() -> None:
    """Where Python finds the sources first, without a compiled module; a missing numpy is not blamed on it."""

    def error_of(*folders: str) -> str:
        script = f"import sys; sys.path[:0] = {[str(ROOT), *folders]!r}; import pydiffgguf._binding.native"
        return subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, timeout=60).stderr

    packages = [str(Path(np.__file__).parents[1]), str(Path(_cffi_backend.__file__).parent)]
    assert re.search(
        r"ImportError: .* compiled module is not in .*pydiffgguf\. .*`pip install -e \.`", error_of(*packages)
    )
    assert error_of().endswith("ModuleNotFoundError: No module named 'numpy'\n")


def imported_in_ms(module: str) -> float:
    """Milliseconds of CPU time that importing takes when numpy is there already, the least of three: a busy machine
    stretches the time on the clock, and the first run compiles."""
    script = f"import numpy, time; t = time.process_time(); import {module}; print(1000 * (time.process_time() - t))"
    return min(float(run_python("-c", script).stdout) for _ in range(3))


def test_importing_is_fast() -> None:
    """Under 60 ms without numpy's own time: the package alone, and with the engine's binding loaded."""
    assert imported_in_ms("pydiffgguf") < 60
    assert imported_in_ms("pydiffgguf._binding.native") < 60


def test_the_header_compiles_as_c_alone(tmp_path: Path) -> None:
    """csrc/diffgguf.h is C11, needs nothing else included before it, and warns about nothing."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "the package was built with a compiler, but there is none now"
    source = tmp_path / "alone.c"
    source.write_text('#include "diffgguf.h"\ndg_status status = DG_OK;\n', encoding="utf-8")
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wstrict-prototypes", "-Werror", "-fsyntax-only"]
    command = [compiler, *flags, "-I", str(ROOT / "csrc"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_function_of_the_header_is_bound() -> None:
    """The binding is derived from the header: nothing in it is missing from the compiled module."""
    header = (ROOT / "csrc" / "diffgguf.h").read_text(encoding="utf-8")
    declared = set(re.findall(r"^DG_API .*?\b(dg_\w+)\(", header, re.MULTILINE))
    assert len(declared) > 30
    assert declared <= set(dir(library.lib))


def test_six_files_touch_the_c_library() -> None:
    """library.py imports ffi and lib; file.py, structs.py, functions.py, native.py and adapters.py build on it, and no
    other."""
    files = [*(ROOT / "pydiffgguf").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]
    assert len(files) > 10
    uses = re.compile(r"_diffgguf\b.*import|library import (?:\([^)]*|[^\n(]*)\b(?:ffi|lib)\b|library\.(?:ffi|lib)\b")
    touching = [path.name for path in files if uses.search(path.read_text("utf-8"))]
    assert sorted(touching) == ["adapters.py", "file.py", "functions.py", "library.py", "native.py", "structs.py"]


def test_the_vendored_ggml_is_the_pinned_one() -> None:
    """The ggml inside is the version that vendor/requirements.txt names."""
    requirements = (ROOT / "vendor" / "requirements.txt").read_text(encoding="utf-8")
    (pinned,) = re.findall(r"^libggml-python==(\d+\.\d+\.\d+)", requirements, re.MULTILINE)
    assert functions.build_info()["ggml_version"] == pinned


def test_only_parity_needs_the_reference() -> None:
    """Tests outside tests/parity import neither torch nor what brings it, so they run where it is not installed."""
    heavy = re.compile(r"^\s*(?:import|from) (?:torch|transformers|peft|safetensors\.torch)\b", re.MULTILINE)
    tests = [path for path in (ROOT / "tests").rglob("*.py") if "parity" not in path.parts]
    assert len(tests) > 50
    assert [path.name for path in tests if heavy.search(path.read_text(encoding="utf-8"))] == []
