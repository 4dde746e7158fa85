"""The levels of the CPU's instructions that this machine has and this build was compiled for, by name."""

from __future__ import annotations

from pydiffgguf._binding.functions import build_info

#: From the least to the best, which is what a model is opened with.
LEVELS = [level["name"] for level in build_info()["cpu_levels"] if level["compiled"] and level["offered"]]
