"""Which file of a repository a name means. Downloading itself needs a server, and is not tested here."""

from __future__ import annotations

from pathlib import Path

import pytest

from pydiffgguf.errors import UnsupportedError
from pydiffgguf.hub import choose_file, resolve_model

FILES = [
    "README.md",
    "model-BF16-00002-of-00002.gguf",
    "model-BF16-00001-of-00002.gguf",
    "model-Q4_K_M.gguf",
    "model-Q4_K_S.gguf",
    "UD/model-Q8_0.gguf",
    "model-F16.gguf",
    "mmproj-F16.gguf",
    "imatrix_unsloth.gguf",
]


@pytest.mark.parametrize(
    ("pattern", "file"),
    [
        ("Q4_K_M", "model-Q4_K_M.gguf"),
        ("q4_k_m", "model-Q4_K_M.gguf"),
        ("*Q4_K_M.gguf", "model-Q4_K_M.gguf"),
        ("*Q8*", "UD/model-Q8_0.gguf"),
        ("UD/model-Q8_0.gguf", "UD/model-Q8_0.gguf"),
        ("model-Q8_0.gguf", "UD/model-Q8_0.gguf"),
        ("F16", "model-F16.gguf"),
    ],
)
def test_a_pattern_names_one_file(pattern: str, file: str) -> None:
    """By whole name, glob or word; F16 is no part of BF16, and projectors and statistics are no models."""
    assert choose_file(FILES, pattern, "hf:a/b") == file


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("Q4_K", r"'Q4_K' matches none of its models: UD/model-Q8_0.gguf, model-BF16.gguf, model-F16.gguf, "),
        ("*Q4*", r"matches 2 of its models: model-Q4_K_M.gguf, model-Q4_K_S.gguf$"),
        ("*", r"matches 5 of its models: "),
    ],
)
def test_other_patterns_say_what_there_is(pattern: str, message: str) -> None:
    """None: all the models; several: those that match; the parts of a split file count as one."""
    with pytest.raises(ValueError, match=message):
        choose_file(FILES, pattern, "hf:a/b")


def test_a_split_model_is_refused_before_it_is_fetched() -> None:
    """Only whole files open; 50 GB are not downloaded to find that out."""
    for pattern in ("BF16", "model-BF16-00001-of-00002.gguf"):
        with pytest.raises(UnsupportedError, match=r"model-BF16.gguf is split into 2 files"):
            choose_file(FILES, pattern, "hf:a/b")


def test_a_single_model_needs_no_pattern() -> None:
    """Files that are no models do not count."""
    assert choose_file(["x.gguf", "mmproj-x.gguf", "config.json"], "*", "hf:a/b") == "x.gguf"
    with pytest.raises(ValueError, match="hf:a/b holds no GGUF model"):
        choose_file(["config.json"], "*", "hf:a/b")


def test_paths_are_paths() -> None:
    """Also those that do not exist: opening says so."""
    assert resolve_model("some/model.gguf") == Path("some/model.gguf")


@pytest.mark.parametrize("spec", ["hf:", "hf:model", "hf:a/b/c", "hf:/b", "hf:a/:Q4", "hf:a b/c"])
def test_malformed_names_are_refused(spec: str) -> None:
    """Without asking a server."""
    with pytest.raises(ValueError, match="is not of the form hf:OWNER/REPO"):
        resolve_model(spec)


def test_without_network_and_cache_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, as huggingface_hub's offline mode gives it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True, raising=False)
    with pytest.raises(ConnectionError, match=r"^hf:a/b is not in the cache, and the hub cannot be reached: ") as info:
        resolve_model("hf:a/b:Q4_K_M")
    assert "\n" not in str(info.value)


def test_without_network_the_cache_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was fetched before is found by the same pattern, though the rest of the repository is not there."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (snapshot / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("0123456789" * 4)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True, raising=False)
    assert resolve_model("hf:a/b:Q4_K_M") == snapshot / "model-Q4_K_M.gguf"
    with pytest.raises(ValueError, match=r"'Q8_0' matches none of its models: model-Q4_K_M.gguf"):
        resolve_model("hf:a/b:Q8_0")
