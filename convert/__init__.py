"""Checkpoints to GGUF files, and a look into GGUF files. Needs numpy and gguf, not the compiled engine."""

from __future__ import annotations

from .hf_to_gguf import ConversionReport, ConvertProgress, Fallback, convert
from .inspect import FileReport, Finding, inspect_file

__all__ = ["ConversionReport", "ConvertProgress", "Fallback", "FileReport", "Finding", "convert", "inspect_file"]
