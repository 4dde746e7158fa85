"""An app that PyInstaller makes of a program with pydiffgguf in it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from pydiffgguf import DiffusionModel, demo_model_path

PROGRAM = """
import sys
from pydiffgguf import DiffusionModel, demo_model_path

with DiffusionModel(demo_model_path(), n_threads=1) as model:
    print(model.generate("Put in order: 9 7 1.", seed=7).text, "_cffi_backend" in sys.modules, sys.frozen)
"""

#: What the packages around it would take if it is there, but do not need.
LEFT_OUT = ("torch", "transformers", "rich", "huggingface_hub", "gguf", "PIL", "pydantic", "cryptography")


@pytest.mark.slow
@pytest.mark.skipif(
    os.name == "posix" and not sysconfig.get_config_var("Py_ENABLE_SHARED"), reason="PyInstaller needs Python's library"
)
def test_a_frozen_app_starts_and_generates(tmp_path: Path) -> None:
    """With no option that speaks of pydiffgguf: its hook brings the compiled module, cffi's half and the demo model."""
    (tmp_path / "app.py").write_text(PROGRAM, encoding="utf-8")
    options = ["--noconfirm", "--log-level", "ERROR", *(f"--exclude-module={name}" for name in LEFT_OUT)]
    command = [sys.executable, "-m", "PyInstaller", *options, "app.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    app = tmp_path / "dist" / "app" / "app"
    assert sum(file.stat().st_size for file in app.parent.rglob("*") if file.is_file()) < 150e6
    done = subprocess.run([app], cwd=tmp_path, capture_output=True, text=True, env={}, timeout=60)
    with DiffusionModel(demo_model_path(), n_threads=1) as model:
        text = model.generate("Put in order: 9 7 1.", seed=7).text
    assert (done.stdout, done.stderr) == (f"{text} True True\n", "")
