"""Checkpoints to GGUF files, GGUF files to other types, and a look into GGUF files."""

from __future__ import annotations

from .conversion import convert
from .inspect import FileReport, Finding, inspect_file
from .writing import ConversionReport, ConvertProgress, Fallback

__all__ = ["ConversionReport", "ConvertProgress", "Fallback", "FileReport", "Finding", "convert", "inspect_file"]
