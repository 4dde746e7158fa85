"""The compiled cffi module, made from csrc/diffgguf.h; only _native.py imports it."""

from typing import Any

ffi: Any
lib: Any
