"""The stages of the first hour: their names, limits and order, and what each is told.

Only the standard library is imported here: the first stages run before anything is installed.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PLACES = ("cuda", "cpu")
REPOSITORY = Path(__file__).resolve().parents[2]
NOT_MEASURED = "not measured"


class StageError(Exception):
    """A stage's result is wrong, or something that it takes is not here."""


@dataclass(frozen=True)
class Stage:
    """`entry`: module and function in this package. `limit`: seconds, after which it is ended. `places`: where it has
    something to do. `needs`: a stage without whose success it cannot run."""

    name: str
    title: str
    entry: str
    limit: float
    places: tuple[str, ...] = PLACES
    needs: str | None = "build"


#: In order. The limits add up to less than 25 minutes.
STAGES = (
    Stage("facts", "the machine, and the archive's hashes", "machine:facts", 45, needs=None),
    Stage("build", "the extension for this machine, with all cores", "machine:build", 480, needs=None),
    Stage("kernels", "our kernels against their host twins", "kernels:run", 80),
    Stage("parity", "logits and trajectories against transformers", "checks:parity", 240),
    Stage("sanitizer", "compute-sanitizer on the smallest run", "checks:sanitizer", 100, places=("cuda",)),
    Stage("ceilings", "copies and products, without this project", "ceilings:run", 60, needs=None),
    Stage("steps 724m", "steps of the speed shape", "steps:small", 110),
    Stage("launches", "launches and captures a step", "launches:run", 40, places=("cuda",)),
    Stage("steps released", "steps of the released shape", "steps:released", 250),
    Stage("candidates", "what makes up a row's softmax", "candidates:run", 60),
)


@dataclass
class Context:
    """What a stage is told. `out`: the run's folder. `archive`: the unpacked archive's folder, or None. `installed`:
    take the pydiffgguf that this Python has. `model`: a trained file for the candidates."""

    name: str
    place: str
    out: Path
    archive: Path | None = None
    installed: bool = False
    model: Path | None = None
    limit: float = 60.0
    began: float = field(default_factory=time.monotonic)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds before the limit."""
        return self.began + self.limit - time.monotonic()

    @property
    def work(self) -> Path:
        """A folder for large files, which the end of the run removes."""
        folder = self.out / "work"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def record(self, **values: Any) -> None:
        """Keeps values at once, so that they are there when the stage is ended later."""
        self.result |= values
        write_json(result_file(self.out, self.name), self.result)


def result_file(out: Path, name: str) -> Path:
    return out / "stages" / f"{name.replace(' ', '_')}.json"


def log_file(out: Path, name: str) -> Path:
    return result_file(out, name).with_suffix(".log")


def write_json(path: Path, value: Any) -> None:
    """The file is whole at any time: the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def stage(name: str) -> Stage:
    """The stage called `name`; ValueError, with the names, where there is none."""
    for one in STAGES:
        if one.name == name:
            return one
    raise ValueError(f"stage: {name!r}, expected one of {', '.join(one.name for one in STAGES)}")
