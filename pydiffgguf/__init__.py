"""DiffusionGemma from GGUF files, in your own process: no torch, no server.

    from pydiffgguf import DiffusionModel

    with DiffusionModel("model.gguf") as model:
        print(model.generate("Why is the sky blue?", max_tokens=256, seed=7).text)

Importing does nothing but import: names are loaded when they are first used, no device is touched, nothing is printed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydiffgguf.edit import Choice, Edit
    from pydiffgguf.errors import (
        CancelledError,
        ContextOverflowError,
        DeviceError,
        DiffGGUFError,
        ModelClosedError,
        ModelFormatError,
        OutOfMemoryError,
        SessionBusyError,
        UnsupportedError,
    )
    from pydiffgguf.generate import Block, DenoiseStep, Generation, Stats
    from pydiffgguf.infill import Candidate, Fill, Infill, InfillStats
    from pydiffgguf.model import DiffusionModel, ModelWarning, demo_model_path
    from pydiffgguf.session import Canvas, CanvasBatch, CanvasSpec, Noise, Session, Step

__all__ = [
    "Block",
    "CancelledError",
    "Candidate",
    "Canvas",
    "CanvasBatch",
    "CanvasSpec",
    "Choice",
    "ContextOverflowError",
    "DenoiseStep",
    "DeviceError",
    "DiffGGUFError",
    "DiffusionModel",
    "Edit",
    "Fill",
    "Generation",
    "Infill",
    "InfillStats",
    "ModelClosedError",
    "ModelFormatError",
    "ModelWarning",
    "Noise",
    "OutOfMemoryError",
    "Session",
    "SessionBusyError",
    "Stats",
    "Step",
    "UnsupportedError",
    "__version__",
    "demo_model_path",
]

_HOME = {
    "errors": (
        "CancelledError",
        "ContextOverflowError",
        "DeviceError",
        "DiffGGUFError",
        "ModelClosedError",
        "ModelFormatError",
        "OutOfMemoryError",
        "SessionBusyError",
        "UnsupportedError",
    ),
    "edit": ("Choice", "Edit"),
    "generate": ("Block", "DenoiseStep", "Generation", "Stats"),
    "infill": ("Candidate", "Fill", "Infill", "InfillStats"),
    "model": ("DiffusionModel", "ModelWarning", "demo_model_path"),
    "session": ("Canvas", "CanvasBatch", "CanvasSpec", "Noise", "Session", "Step"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("pydiffgguf")
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(f"pydiffgguf.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module 'pydiffgguf' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
