"""DiffusionGemma from GGUF files, in your own process: no torch, no server.

    from pydiffgguf import DiffusionModel

    with DiffusionModel("model.gguf") as model:
        print(model.generate("Why is the sky blue?", max_tokens=256, seed=7).text)

Importing does nothing but import: names are loaded when they are first used, no device is touched, nothing is printed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

#: Module -> the public names that it holds: the one table of them. What follows it repeats the names in the form that
#: type checkers read; a test compares the two.
_HOME = {
    "_binding.file": "Metadata",
    "_binding.records": "CanvasSpec Device LayerConfig Memory ModelConfig RawStep Sampling TensorInfo Timings",
    "completions": "CompletionStream OptionWarning",
    "edit": "Choice Edit",
    "engine.adapters": "Adapter",
    "engine.call": "Stream",
    "engine.options": (
        "Cancel ChatOptions EditOptions FillOptions Gap GenerateOptions InfillMode InfillOptions KvType ModelOptions "
        "Noise Progress Prompt SamplerName SamplingOptions SessionOptions Until"
    ),
    "errors": (
        "CancelledError ContextOverflowError DeviceError DiffGGUFError "
        "ModelClosedError ModelFormatError OutOfMemoryError SessionBusyError UnsupportedError"
    ),
    "generate": "Block DenoiseStep Event FinishReason Generation Prefill Stats",
    "infill": "Candidate Fill Infill InfillStats",
    "hub": "demo_model_path",
    "model": "DiffusionModel ModelWarning",
    "read": "Answer Reading",
    "session": "Canvas CanvasBatch Session Step",
    "text.calls": "ToolCall",
    "text.document": "Document Position Unit",
    "text.tokenizer": "Tokenizer",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = sorted([*_MODULE_OF, "__version__"])

if TYPE_CHECKING:
    from pydiffgguf._binding.file import Metadata as Metadata
    from pydiffgguf._binding.records import CanvasSpec as CanvasSpec
    from pydiffgguf._binding.records import Device as Device
    from pydiffgguf._binding.records import LayerConfig as LayerConfig
    from pydiffgguf._binding.records import Memory as Memory
    from pydiffgguf._binding.records import ModelConfig as ModelConfig
    from pydiffgguf._binding.records import RawStep as RawStep
    from pydiffgguf._binding.records import Sampling as Sampling
    from pydiffgguf._binding.records import TensorInfo as TensorInfo
    from pydiffgguf._binding.records import Timings as Timings
    from pydiffgguf.completions import CompletionStream as CompletionStream
    from pydiffgguf.completions import OptionWarning as OptionWarning
    from pydiffgguf.edit import Choice as Choice
    from pydiffgguf.edit import Edit as Edit
    from pydiffgguf.engine.adapters import Adapter as Adapter
    from pydiffgguf.engine.call import Stream as Stream
    from pydiffgguf.engine.options import Cancel as Cancel
    from pydiffgguf.engine.options import ChatOptions as ChatOptions
    from pydiffgguf.engine.options import EditOptions as EditOptions
    from pydiffgguf.engine.options import FillOptions as FillOptions
    from pydiffgguf.engine.options import Gap as Gap
    from pydiffgguf.engine.options import GenerateOptions as GenerateOptions
    from pydiffgguf.engine.options import InfillMode as InfillMode
    from pydiffgguf.engine.options import InfillOptions as InfillOptions
    from pydiffgguf.engine.options import KvType as KvType
    from pydiffgguf.engine.options import ModelOptions as ModelOptions
    from pydiffgguf.engine.options import Noise as Noise
    from pydiffgguf.engine.options import Progress as Progress
    from pydiffgguf.engine.options import Prompt as Prompt
    from pydiffgguf.engine.options import SamplerName as SamplerName
    from pydiffgguf.engine.options import SamplingOptions as SamplingOptions
    from pydiffgguf.engine.options import SessionOptions as SessionOptions
    from pydiffgguf.engine.options import Until as Until
    from pydiffgguf.errors import CancelledError as CancelledError
    from pydiffgguf.errors import ContextOverflowError as ContextOverflowError
    from pydiffgguf.errors import DeviceError as DeviceError
    from pydiffgguf.errors import DiffGGUFError as DiffGGUFError
    from pydiffgguf.errors import ModelClosedError as ModelClosedError
    from pydiffgguf.errors import ModelFormatError as ModelFormatError
    from pydiffgguf.errors import OutOfMemoryError as OutOfMemoryError
    from pydiffgguf.errors import SessionBusyError as SessionBusyError
    from pydiffgguf.errors import UnsupportedError as UnsupportedError
    from pydiffgguf.generate import Block as Block
    from pydiffgguf.generate import DenoiseStep as DenoiseStep
    from pydiffgguf.generate import Event as Event
    from pydiffgguf.generate import FinishReason as FinishReason
    from pydiffgguf.generate import Generation as Generation
    from pydiffgguf.generate import Prefill as Prefill
    from pydiffgguf.generate import Stats as Stats
    from pydiffgguf.hub import demo_model_path as demo_model_path
    from pydiffgguf.infill import Candidate as Candidate
    from pydiffgguf.infill import Fill as Fill
    from pydiffgguf.infill import Infill as Infill
    from pydiffgguf.infill import InfillStats as InfillStats
    from pydiffgguf.model import DiffusionModel as DiffusionModel
    from pydiffgguf.model import ModelWarning as ModelWarning
    from pydiffgguf.read import Answer as Answer
    from pydiffgguf.read import Reading as Reading
    from pydiffgguf.session import Canvas as Canvas
    from pydiffgguf.session import CanvasBatch as CanvasBatch
    from pydiffgguf.session import Session as Session
    from pydiffgguf.session import Step as Step
    from pydiffgguf.text.calls import ToolCall as ToolCall
    from pydiffgguf.text.document import Document as Document
    from pydiffgguf.text.document import Position as Position
    from pydiffgguf.text.document import Unit as Unit
    from pydiffgguf.text.tokenizer import Tokenizer as Tokenizer


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
