"""Models in several files, as other programs write them: read as one by the engine and by inspect, from the first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType
from gguf_rewrite import DROP, Typed, rewrite

from pydiffgguf import DiffusionModel, ModelFormatError
from pydiffgguf.convert import inspect_file
from pydiffgguf.convert.inspection.report import to_dict

OPENERS: list[Callable[[Path], object]] = [DiffusionModel, inspect_file]
pytestmark = pytest.mark.parametrize("open_file", OPENERS, ids=["engine", "inspect"])

N_PARTS = 4


def part(folder: Path, number: int, stem: str = "model", count: int = N_PARTS) -> Path:
    return folder / f"{stem}-{number:05d}-of-{count:05d}.gguf"


@pytest.fixture(scope="module")
def parts(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model in four files; the first has no tensors."""
    folder = tmp_path_factory.mktemp("parts")
    n_tensors = len(inspect_file(tiny_gguf).tensors)
    rewrite(tiny_gguf, folder / "model.gguf", part_tensors=-(-n_tensors // (N_PARTS - 1)))
    assert sorted(folder.iterdir()) == [part(folder, n) for n in range(1, N_PARTS + 1)]
    return folder


@pytest.fixture
def copied(parts: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(parts, tmp_path / "parts"))


def fails(open_file: Callable[[Path], object], path: Path, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        open_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("use_mmap", [True, False])
def test_the_parts_are_one_model(
    open_file: Callable[[Path], object], tiny_gguf: Path, parts: Path, use_mmap: bool
) -> None:
    """From the first part: the tensors, the keys and the logits of the whole file, bit for bit."""
    if open_file is inspect_file:
        whole, split = inspect_file(tiny_gguf), inspect_file(part(parts, 1))
        assert split.tensors == whole.tensors
        assert split.keys.keys() - whole.keys.keys() == {"split.no", "split.count", "split.tensors.count"}
        assert split.findings == whole.findings
        assert split.memory == whole.memory
        assert [Path(name) for name in to_dict(split)["parts"]] == sorted(parts.iterdir())
        assert split.size == sum(path.stat().st_size for path in parts.iterdir())
        return
    canvas = np.arange(32, dtype=np.int32)
    results = []
    for path in (tiny_gguf, part(parts, 1)):
        with DiffusionModel(path, use_mmap=use_mmap) as model:
            session = model.session()
            session.encode(canvas[:9])
            results.append((model.tensors(), model.memory(), model.tokenize("The cat"), session.denoise(canvas)))
    assert results[0][:3] == results[1][:3]
    assert np.array_equal(results[0][3], results[1][3])


def test_another_part_names_the_first(open_file: Callable[[Path], object], parts: Path) -> None:
    fails(
        open_file, part(parts, 3), ModelFormatError, r"part 3 of a model in 4 files: open the first, .*-00001-of-00004"
    )


def test_a_missing_part_is_named(open_file: Callable[[Path], object], copied: Path) -> None:
    part(copied, 4).unlink()
    fails(open_file, part(copied, 1), OSError, r"00004-of-00004\.gguf.*part 4 of the 4|part 4 of the 4.*00004")


def test_a_part_that_is_cut_short_is_named(open_file: Callable[[Path], object], copied: Path) -> None:
    with part(copied, 3).open("r+b") as file:
        file.truncate(part(copied, 3).stat().st_size - 1000)
    fails(open_file, part(copied, 1), ModelFormatError, r"00003-of-00004\.gguf: .*truncated")


def test_a_part_in_anothers_place_is_named(open_file: Callable[[Path], object], copied: Path) -> None:
    shutil.copy(part(copied, 2), part(copied, 3))
    fails(
        open_file, part(copied, 1), ModelFormatError, r"00003-of-00004\.gguf: (tensor .* in another part|key split.no)"
    )


def test_a_part_of_another_model_is_found_out(
    open_file: Callable[[Path], object], tiny_gguf: Path, copied: Path, tmp_path: Path
) -> None:
    """By the number of tensors."""
    tensors = inspect_file(tiny_gguf).tensors
    per_part = -(-len(tensors) // (N_PARTS - 1))
    rewrite(tiny_gguf, tmp_path / "model.gguf", tensors={tensors[-1].name: DROP}, part_tensors=per_part)
    shutil.copy(part(tmp_path, 4), part(copied, 4))
    fails(open_file, part(copied, 1), ModelFormatError, r"tensors.count'? is")


def test_a_renamed_part_says_what_its_name_must_be(open_file: Callable[[Path], object], copied: Path) -> None:
    renamed = part(copied, 1).rename(copied / "renamed.gguf")
    fails(open_file, renamed, ModelFormatError, r"name must end in -00001-of-00004\.gguf")


def test_one_of_one_is_a_whole_file(open_file: Callable[[Path], object], tiny_gguf: Path, tmp_path: Path) -> None:
    """Whatever its name."""
    keys = {"split.no": Typed(0, GGUFValueType.UINT16), "split.count": Typed(1, GGUFValueType.UINT16)}
    rewrite(tiny_gguf, tmp_path / "x.gguf", keys=keys)
    assert open_file(tmp_path / "x.gguf")
