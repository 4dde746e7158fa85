"""The command doctor, on this installation and on broken ones."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import pydiffgguf
from pydiffgguf import cli
from pydiffgguf.cli import doctor


def test_doctor_finds_a_sound_installation(capsys: pytest.CaptureFixture[str]) -> None:
    """Versions of everything, what was built in, exit code 0."""
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert report["pydiffgguf"] == report["build"]["version"] == pydiffgguf.__version__
    assert set(report["packages"]) >= {"numpy", "gguf", "tokenizers"}
    assert "CPU" in report["build"]["backends"]
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("all is well\n")


def test_the_report_has_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    """Versions, how it was built, what it runs on; what is off is no problem, and comes with a cure as well."""
    cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert {"version", "abi", "ggml_version", "compiler", "flags", "backends", "cpu_features"} <= set(report["build"])
    assert report["build"]["flags"][0] in ("Release", "RelWithDebInfo", "Debug")
    for name in ("python", "implementation", "platform", "machine", "threads"):
        assert report[name], name
    if Path("/proc/cpuinfo").exists():
        assert report["cpu"] and report["memory"] > 2**28
    assert all(set(each) == {"what", "cure"} and all(each.values()) for each in report["off"])


def test_doctor_says_what_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler too old for a level, no GPU, a debug build, sanitizers, an installed ggml."""
    from pydiffgguf._binding import functions

    flags = ["Debug", "PYDIFFGGUF_SYSTEM_GGML=ON", "PYDIFFGGUF_SANITIZE=address"]
    levels = [{"name": "old", "compiled": True, "offered": True}, {"name": "new", "compiled": False, "offered": True}]
    build = {**functions.build_info(), "cpu_levels": levels, "backends": ["CPU"], "flags": flags}
    monkeypatch.setattr(functions, "build_info", lambda: build)
    report = doctor.examine()
    found = "\n".join(f"{each['what']} -> {each['cure']}" for each in report["off"])
    assert re.search(r"this CPU has new, which .+ could not compile -> build with a newer compiler", found)
    assert "no GPU backend is built in -> with a GPU, build with one of -DGGML_CUDA=ON (CUDA)" in found
    for text in ("the build type is Debug", "sanitizers (PYDIFFGGUF_SANITIZE=address)", "an installed ggml is used"):
        assert text in found
    assert "off:         no GPU backend" in doctor.render(report)
    assert re.search(r"CPU level +old; built in: old, new \(not compiled in\)", doctor.render(report))
    monkeypatch.setattr(
        functions, "build_info", lambda: {**build, "backends": ["CUDA", "RPC", "CPU"], "cpu_levels": []}
    )
    rendered = doctor.render(doctor.examine())
    assert "off:         CUDA is built in, but it finds no device" in rendered
    assert "compiles no kernels for the CPU" in rendered


def test_doctor_names_the_cure_when_the_extension_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the extension everything else is still reported; exit code 1."""
    monkeypatch.setitem(sys.modules, "pydiffgguf._binding.functions", None)
    monkeypatch.delattr(pydiffgguf._binding, "functions", raising=False)
    assert cli.main(["doctor"]) == 1
    out, _ = capsys.readouterr()
    assert re.search(
        r"problem: +the compiled extension cannot be loaded: .+\ncure: +in the source folder, pip install ", out
    )
    assert "numpy" in out


def test_doctor_finds_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package, an old one, a stale build, a missing demo model."""
    from pydiffgguf._binding import functions

    build = {**functions.build_info(), "version": "0.0.0", "cpu_features": []}
    monkeypatch.setattr(functions, "build_info", lambda: build)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.1" if name == "gguf" else real(name))
    monkeypatch.setattr(doctor, "__file__", "/nowhere/cli/doctor.py")
    problems = {problem["what"]: problem["cure"] for problem in doctor.examine()["problems"]}
    found = "\n".join(f"{what} -> {cure}" for what, cure in problems.items())
    assert re.search(r'jinja2 cannot be imported: .* -> pip install "jinja2>=3', found)
    assert re.search(r'gguf 0.1 is too old -> pip install "gguf>=', found)
    assert "the compiled extension is version 0.0.0, the package" in found
    assert "the demo model is missing: " in found
