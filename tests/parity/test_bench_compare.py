"""`pydiffgguf bench --compare transformers`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_checkpoint

from pydiffgguf.cli import arguments as cli

pytestmark = pytest.mark.parity


def test_bench_compares_with_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint that the file was made from, timed in turns; another engine is bad usage."""
    tiny_checkpoint.make_checkpoint(tmp_path / "c", tokenizer=True, num_hidden_layers=2)
    assert cli.main(["convert", str(tmp_path / "c"), "-o", str(tmp_path / "x.gguf")]) == 0
    arguments = ["bench", str(tmp_path / "x.gguf"), "--prefill", "20", "--repeat", "2", "-n", "4", "--steps", "3"]
    capsys.readouterr()
    assert cli.main([*arguments, "--json", "--compare", "transformers", str(tmp_path / "c")]) == 0
    compared = json.loads(capsys.readouterr().out)["compare"]
    for kind in ("prefill", "step"):
        assert compared[kind] == pytest.approx(compared[f"{kind}_s"] / compared[f"transformers_{kind}_s"])
    with pytest.raises(SystemExit) as usage:
        cli.main([*arguments, "--compare", "vllm", str(tmp_path / "c")])
    assert usage.value.code == 2
