"""Checkpoints to GGUF files, and a look into GGUF files. Needs numpy and gguf, not the compiled engine."""

from __future__ import annotations

from .hf_to_gguf import ConversionReport, ConvertProgress, Fallback, convert

__all__ = ["ConversionReport", "ConvertProgress", "Fallback", "convert"]
