"""Checkpoints to GGUF files, and a look into GGUF files. Needs numpy and gguf, not the compiled engine."""

from __future__ import annotations

from .diff import FileDiff, compare_files
from .hf_to_gguf import ConversionReport, ConvertProgress, Fallback, convert
from .inspect import FileReport, Finding, inspect_file

__all__ = [
    "ConversionReport",
    "ConvertProgress",
    "Fallback",
    "FileDiff",
    "FileReport",
    "Finding",
    "compare_files",
    "convert",
    "inspect_file",
]
