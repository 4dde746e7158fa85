"""Derives the Python binding's declarations from the C header: python make_cdef.py csrc/diffgguf.h OUTPUT

cffi's parser knows no preprocessor, so what is left out is exactly what a preprocessor would consume: comments,
directives, the C++ linkage block and the export macro. Nothing is rewritten: the header stays the one source.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# The functions that C calls in Python: see pydiffgguf/_binding/library.py and file.py.
CALLBACKS = """extern "Python" int dg_python_poll(void *user);
extern "Python" void dg_python_log(int32_t level, const char *text, void *user);
extern "Python" int64_t dg_python_size(void *user, const char *path);
extern "Python" bool dg_python_read(void *user, const char *path, uint64_t offset, void *out, size_t n);
"""


def derive(header: str) -> str:
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    text = text.replace("\\\n", " ")
    lines = [line.replace("DG_API ", "") for line in text.splitlines() if not line.lstrip().startswith("#")]
    lines = [line for line in lines if line.strip() not in ("", 'extern "C" {', "}")]
    return "\n".join(lines) + "\n" + CALLBACKS


if __name__ == "__main__":
    source, output = map(Path, sys.argv[1:])
    output.write_text(derive(source.read_text(encoding="utf-8")), encoding="utf-8")
