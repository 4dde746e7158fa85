"""The checkpoint that the converter's tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_checkpoint
from convert_files import Weights
from safetensors.numpy import load_file


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default tiny checkpoint, with a tokenizer. Tests that change it work on a copy."""
    path = tmp_path_factory.mktemp("source") / "tiny"
    tiny_checkpoint.make_checkpoint(path, tokenizer=True)
    return path


@pytest.fixture(scope="module")
def weights(source: Path) -> Weights:
    return load_file(source / "model.safetensors")


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may break; named alike, since the name goes into the file."""
    return Path(shutil.copytree(source, tmp_path / "copy" / "tiny"))
