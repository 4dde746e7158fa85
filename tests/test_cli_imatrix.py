"""The command imatrix: what it writes, says and refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pydiffgguf import demo_model_path
from pydiffgguf.convert import imatrix


def run(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pydiffgguf", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def test_a_text_becomes_a_matrix_that_convert_takes(tmp_path: Path) -> None:
    """From stdin; what is printed names the file, and stderr stays empty without a terminal."""
    out = tmp_path / "i.gguf"
    done = run("imatrix", demo_model_path(), "-f", "-", "-o", out, "--chunks", 1, stdin="Anna has a red ball. " * 200)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{out}: 51 matrices over ") and " in 1 chunks" in done.stdout
    means = imatrix.Importance.load(out).means
    assert means["blk.0.ffn_gate_up_exps.weight"].shape == (8, 128)
    made = run("convert", demo_model_path(), "-o", tmp_path / "x.gguf", "--type", "dg4", "--imatrix", out)
    assert made.returncode == 0 and "quantized already" in made.stderr


def test_a_text_that_is_too_short_says_how_much_is_needed(tmp_path: Path) -> None:
    done = run("imatrix", demo_model_path(), "-f", "-", "-o", tmp_path / "i.gguf", stdin="Too short.")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "need at least 65" in done.stderr
    assert not list(tmp_path.iterdir())
