"""The levels of the CPU's instructions that this machine has and this build was compiled for, by name."""

from __future__ import annotations

from pydiffgguf._binding.functions import build_info

#: From the least to the best, which is what a model is opened with.
LEVELS = [level["name"] for level in build_info()["cpu_levels"] if level["compiled"] and level["offered"]]

#: The same without `avx512` where there is `avx512_bf16`, which differs in products with BF16 weights and in the
#: self-conditioning product alone: for tests of what both have.
DISTINCT = [level for level in LEVELS if level != "avx512" or "avx512_bf16" not in LEVELS]
