"""Whether a model fits into the memory of this machine: said before a download, by `inspect`, and when it opens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pydiffgguf import DiffusionModel, ModelWarning
from pydiffgguf._binding.functions import memory_available
from pydiffgguf.cli import main
from pydiffgguf.convert import inspect_file
from pydiffgguf.convert.inspection import fit
from pydiffgguf.engine.describe import too_large

GB = 10**9


def test_the_next_smaller_type_that_fits_is_named() -> None:
    """With both numbers, at the size of the released model."""
    text = too_large(25_250_000_000, 26_900_000_000, 900_000_000, 21 * GB)
    assert text is not None
    assert text.startswith("it needs 27.8 GB of memory (weights 26.9 GB, session 900 MB), and 21.0 GB are available")
    assert text.endswith("a file in q5_k_m, 19.3 GB, would fit")
    assert str(too_large(25_250_000_000, 26_900_000_000, GB, 8 * GB)).endswith("no smaller type would fit")
    assert too_large(25_250_000_000, 26_900_000_000, GB, 28 * GB) is None
    assert too_large(25_250_000_000, 26_900_000_000, GB, None) is None


def test_opening_what_does_not_fit_warns(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And opens all the same: the pages come from the disk."""
    monkeypatch.setattr("pydiffgguf.model.memory_available", lambda: 1_000_000)
    with pytest.warns(ModelWarning, match=r"it needs .* and 1\.0 MB are available, .* no smaller type would fit"):
        DiffusionModel(tiny_gguf).close()


def test_available_memory_is_no_more_than_the_machine_has() -> None:
    available = memory_available()
    assert available is None or 10**8 < available < 10**14


def test_inspect_adds_up_what_a_model_needs(tiny_gguf: Path) -> None:
    """Weights, cache and buffers are the total, which is compared with this machine's memory."""
    memory = inspect_file(tiny_gguf).memory
    assert memory.kv_bytes is not None and memory.buffer_bytes is not None
    assert memory.total_bytes == memory.weight_bytes + memory.kv_bytes + memory.buffer_bytes


def test_inspect_says_whether_it_fits(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--fit RAM`, in words and in JSON."""
    report = inspect_file(tiny_gguf)
    for available, fits, text in ((GB, True, "It fits: it needs "), (10**6, False, "It does not fit: it needs ")):
        monkeypatch.setattr(fit, "memory_available", lambda n=available: n)
        said, found = fit.in_memory(report)
        assert said.startswith(text)
        assert found == {"available_bytes": available, "total_bytes": report.memory.total_bytes, "fits": fits}
    assert main(["inspect", str(tiny_gguf), "--fit", "ram", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["fit"]) == {"available_bytes", "total_bytes", "fits"}
