"""The output file: written beside its final name, and renamed when it is whole and on the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pydiffgguf._text import human
from pydiffgguf.text.files import put_in_place

if sys.platform != "win32":
    import fcntl

# What the system says when there is no room: a full disk, a quota, a limit on the file's size.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# What a file system says that knows no locks, as some network shares do. Two runs into one file are then the user's
# to avoid; refusing to write there at all would be worse.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def no_room(path: Path, needed: int, code: int = errno.ENOSPC) -> OSError:
    """The one error for a disk that is, or would be, full."""
    free = shutil.disk_usage(path.parent).free
    reason = f"no room for the output: it needs {human(needed)}, {human(free)} are free (nothing was replaced)"
    return OSError(code, reason, str(path))


class PartialFile:
    """An output in the making: `<name>.part` in the same folder, so that the rename cannot cross file systems.

    Models are large and take minutes, so the name is fixed, and what a killed run left behind is overwritten by the
    next one instead of filling the disk; a lock keeps two runs from writing into one file. What is small goes through
    `replace_file` (pydiffgguf.text.files).
    """

    def __init__(self, path: Path, size: int) -> None:
        """Opens and locks the partial file of `path`, of which `size` bytes will be written.

        A symbolic link stays one: what it names is replaced. OSError when the folder does not exist or is not writable,
        when there is no room, when another run holds it, or when the file has other names, which would keep the old
        content.
        """
        path = path.resolve() if path.is_symlink() else path
        self.path = path
        self.size = size
        self.part = path.with_name(path.name + ".part")
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "the output is a folder", str(path))
        if path.exists() and not path.is_file():  # the rename would replace a device, /dev/null for one
            raise FileExistsError(errno.EEXIST, "the output is not a regular file", str(path))
        if path.exists() and path.stat().st_nlink > 1:
            names = path.stat().st_nlink
            raise FileExistsError(
                errno.EEXIST,
                f"the output has {names} names (hard links), the others would keep what it is now",
                str(path),
            )
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the output's folder does not exist", str(path.parent))
        self.file = self._open_locked()
        try:
            self.file.truncate(0)  # what a killed run left behind takes room as well
            if shutil.disk_usage(path.parent).free < size:
                raise no_room(path, size)
        except BaseException:
            self.discard()
            raise

    def _open_locked(self) -> BinaryIO:
        while True:
            file = open(self.part, "ab", buffering=0)  # noqa: SIM115 - closed by commit() or discard()
            if sys.platform == "win32":
                return file
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Between open and lock another run may have renamed the file away: then it is its output, not ours.
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.part)):
                    return file
            except BlockingIOError:
                file.close()
                raise BlockingIOError(
                    errno.EAGAIN, "another conversion is writing this output", str(self.part)
                ) from None
            except FileNotFoundError:
                pass
            except OSError as e:
                if e.errno in NO_LOCKS:
                    return file
                file.close()
                raise
            file.close()

    def append_by(self, write: Callable[[Path], None]) -> None:
        """Lets `write` fill the file, under the lock, through a handle of its own."""
        write(self.part)

    def append(self, data: memoryview) -> None:
        """Writes all of `data` (bytes) at the end."""
        while data:
            data = data[self.file.write(data) :]

    def tell(self) -> int:
        """The bytes written so far."""
        return os.fstat(self.file.fileno()).st_size

    def commit(self) -> None:
        """Makes the file whole: to the disk, then under its final name."""
        put_in_place(self.file, self.part, self.path)

    def discard(self) -> None:
        """Removes the partial file; the old output, if any, is untouched."""
        if sys.platform == "win32":
            self.file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.part)
        self.file.close()


@contextlib.contextmanager
def whole_or_nothing(path: Path, size: int) -> Iterator[PartialFile]:
    """A PartialFile that is committed when the block ends, and discarded when anything leaves it early, Ctrl-C too.

    A full disk becomes one clear OSError (errno ENOSPC, EDQUOT or EFBIG).
    """
    part = PartialFile(path, size)
    try:
        yield part
        part.commit()
    except BaseException as e:
        part.discard()
        if isinstance(e, OSError) and e.errno in NO_ROOM:
            raise no_room(path, size, e.errno) from e
        raise
