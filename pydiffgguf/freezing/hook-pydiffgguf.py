"""PyInstaller's hook: what an app that imports pydiffgguf needs besides its code, which PyInstaller finds itself."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

_package = find_spec("pydiffgguf")
_compiled = find_spec("pydiffgguf._diffgguf")
if _package is None or _package.origin is None or _compiled is None or _compiled.origin is None:
    raise ImportError("pydiffgguf is not installed whole: `pydiffgguf doctor` says what is missing")
_folder = Path(_package.origin).parent

# In another folder than the sources where these are installed in place (`pip install -e`).
binaries = [(_compiled.origin, "pydiffgguf")]
# By name: of a package installed in place, collect_data_files takes the whole checkout.
datas = [(str(_folder / name), f"pydiffgguf/{name}") for name in ("data", "server/page")]
# The compiled module imports it from C.
hiddenimports = ["_cffi_backend"]
# Imported by `bench --compare` alone, and 1.5 GB.
excludedimports = ["torch", "transformers"]
