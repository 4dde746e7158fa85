"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import IO

__all__ = ["put_in_place", "replace_file"]


def put_in_place(file: IO[bytes], written: Path, path: Path) -> None:
    """Closes a file that was written under another name in the same folder, and gives it its own: its bytes reach the
    disk before the name does, and the name before this returns. A crash leaves the old file or the new one."""
    file.flush()
    os.fsync(file.fileno())
    if sys.platform == "win32":
        file.close()  # an open file cannot be renamed there
    os.replace(written, path)
    file.close()
    if sys.platform != "win32":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all. One that was there keeps its permissions and owner, a link stays a link to
    it; a new one is its owner's alone to read."""
    path = path.resolve()
    status = path.stat() if path.exists() else None
    handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)  # short: `path` may have a long name
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if status is not None:
                os.chmod(name, stat.S_IMODE(status.st_mode))
                if hasattr(os, "chown") and (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                    with contextlib.suppress(PermissionError):  # only root may give a file away
                        os.chown(name, status.st_uid, status.st_gid)
            put_in_place(file, Path(name), path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
