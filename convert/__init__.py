"""Checkpoints to GGUF files, GGUF files to other types, and a look into GGUF files."""

from __future__ import annotations

from .adapter.report import AdapterReport, inspect_adapter
from .collect import CollectProgress, CollectReport, collect
from .conversion import convert
from .inspection.diff import FileDiff, compare_files
from .inspection.inspect import FileReport, Finding, inspect_file
from .writing import ConversionReport, ConvertProgress, Fallback

__all__ = [
    "AdapterReport",
    "CollectProgress",
    "CollectReport",
    "ConversionReport",
    "ConvertProgress",
    "Fallback",
    "FileDiff",
    "FileReport",
    "Finding",
    "collect",
    "compare_files",
    "convert",
    "inspect_adapter",
    "inspect_file",
]
