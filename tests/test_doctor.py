"""The command doctor, on this installation and on broken ones."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import pydiffgguf
from pydiffgguf import cli, doctor


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


def test_doctor_names_the_cure_when_the_extension_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the extension everything else is still reported; exit code 1."""
    monkeypatch.setitem(sys.modules, "pydiffgguf._native", None)
    monkeypatch.delattr(pydiffgguf, "_native", raising=False)
    assert cli.main(["doctor"]) == 1
    out, _ = capsys.readouterr()
    assert re.search(r"problem: +the compiled extension cannot be loaded: .+\ncure: +pip install ", out)
    assert "numpy" in out


def test_doctor_finds_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package, an old one, a stale build, a build for another CPU, a missing demo model."""
    from pydiffgguf import _native

    build = {**_native.build_info(), "version": "0.0.0", "cpu_features": ["avx2", "amx_int8", "avx_nonsense"]}
    monkeypatch.setattr(_native, "build_info", lambda: build)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.1" if name == "gguf" else real(name))
    monkeypatch.setattr(doctor, "__file__", "/nowhere/doctor.py")
    problems = {problem["what"]: problem["cure"] for problem in doctor.examine()["problems"]}
    found = "\n".join(f"{what} -> {cure}" for what, cure in problems.items())
    assert re.search(r'jinja2 cannot be imported: .* -> pip install "jinja2>=3', found)
    assert re.search(r'gguf 0.1 is too old -> pip install "gguf>=', found)
    assert "the compiled extension is version 0.0.0, the package" in found
    assert "the demo model is missing: " in found
    if Path("/proc/cpuinfo").exists() and "avx" in Path("/proc/cpuinfo").read_text():
        assert "avx_nonsense, which this CPU does not have" in found
