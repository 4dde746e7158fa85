"""How the C library is called: csrc/diffgguf.h's statuses as exceptions, its pointers as numpy arrays.

Only this file and those that build on it (`file.py`, `structs.py`, `native.py`, `functions.py`) touch the library.

Signals. Python runs signal handlers on the main thread between bytecodes, and a C call has none. The poll function
below is Python code that C calls every 20 ms: a pending Ctrl-C raises in it, C is told to stop, and the exception goes
on from where the call was made.
"""

from __future__ import annotations

import atexit
import errno
import os
import stat
import threading
import time
from collections.abc import Callable
from typing import Any, TypeAlias

# The compiled module imports this from C, where PyInstaller and Nuitka cannot see it.
import _cffi_backend  # type: ignore[import-untyped]  # noqa: F401
import numpy as np
import numpy.typing as npt

from pydiffgguf import _log, errors

try:
    from pydiffgguf._diffgguf import ffi, lib
except ModuleNotFoundError as error:
    if error.name != "pydiffgguf._diffgguf":
        raise
    raise ImportError(
        f"pydiffgguf's compiled module is not in {os.path.dirname(os.path.dirname(__file__))}. If that is a source "
        "checkout, install it with `pip install -e .`, or start Python in another folder after `pip install .`"
    ) from error

if _missing := ffi.string(lib.dg_cpu_missing()).decode():
    raise ImportError(
        f"pydiffgguf was built for a processor with {_missing}, which this one lacks. Build it for any processor: "
        "in the source folder, pip install --force-reinstall --no-cache-dir ., without GGML_NATIVE=ON in CMAKE_ARGS"
    )

__all__ = [
    "EXCEPTIONS",
    "Stop",
    "StrPath",
    "call",
    "check_readable",
    "copy_of",
    "encode_path",
    "ffi",
    "fields_of",
    "keep_error",
    "lib",
    "pointer_to",
    "text_of",
]

StrPath: TypeAlias = "str | os.PathLike[str]"

#: What each dg_status but DG_OK raises.
EXCEPTIONS: dict[int, type[Exception]] = {
    lib.DG_ERROR_ARGUMENT: ValueError,
    lib.DG_ERROR_IO: OSError,
    lib.DG_ERROR_FORMAT: errors.ModelFormatError,
    lib.DG_ERROR_UNSUPPORTED: errors.UnsupportedError,
    lib.DG_ERROR_MEMORY: errors.OutOfMemoryError,
    lib.DG_ERROR_CONTEXT: errors.ContextOverflowError,
    lib.DG_ERROR_BUSY: errors.SessionBusyError,
    lib.DG_ERROR_CANCELLED: errors.CancelledError,
    lib.DG_ERROR_INTERNAL: errors.DiffGGUFError,
    lib.DG_ERROR_DEVICE: errors.DeviceError,
}

_ERROR_SIZE = 1024


class Stop:
    """Whether the calls of one session are to end early: what the poll function asks."""

    def __init__(self) -> None:
        self.when: Callable[[], bool] | None = None

    def wanted(self) -> bool:
        return self.when is not None and self.when()


class _Poll(threading.local):
    """What the poll function raised on this thread during the call that is running."""

    error: BaseException | None = None


_poll = _Poll()


def keep_error(_type: object, error: BaseException, _traceback: object) -> None:
    """For functions that C calls: what they raise goes on from `call`."""
    _poll.error = error


@ffi.def_extern(name="dg_python_poll", error=1, onerror=keep_error)  # type: ignore[untyped-decorator]
def _python_poll(user: Any) -> int:
    """That it is Python code is what lets a pending signal handler run. 0: go on."""
    _leave_if_exiting()
    stop: Stop = ffi.from_handle(user)
    return int(stop.wanted())


@ffi.def_extern(name="dg_python_log", onerror=keep_error)  # type: ignore[untyped-decorator]
def _python_log(level: int, text: Any, _user: object) -> None:
    """A line that ggml logs. What a handler raises, or a signal that meets it, goes on from the call that logged."""
    _log.from_ggml(level, text_of(text))


lib.dg_set_log(lib.dg_python_log, ffi.NULL)

#: Threads that are in a call of `call`.
_inside: set[int] = set()
_exiting = False


def _leave_if_exiting() -> None:
    """Ends a daemon thread, without a word, when the interpreter is about to end."""
    if _exiting and threading.current_thread() is not threading.main_thread():
        raise SystemExit


@atexit.register
def _end_calls() -> None:
    """No daemon thread may be in the library when the interpreter ends: Python would end it where it next calls Python,
    with C++ in between, which aborts the process. Each thread leaves at its next poll, at most 20 ms and an operator
    later."""
    global _exiting
    _exiting = True
    lib.dg_set_log(ffi.NULL, ffi.NULL)
    late = time.monotonic() + 5.0  # a file that is being read calls no Python
    while _inside - {threading.get_ident()} and time.monotonic() < late:
        time.sleep(0.001)


def call(function: Callable[..., int], *arguments: object) -> None:
    """Calls a function of the header that returns a dg_status; `arguments` lack the last two, the error buffer.

    Raises what the poll function raised during the call, else the exception of the status, with C's message.
    """
    message = ffi.new("char[]", _ERROR_SIZE)
    _poll.error = None
    _inside.add(threading.get_ident())
    try:
        _leave_if_exiting()
        status = function(*arguments, message, _ERROR_SIZE)
    finally:
        _inside.discard(threading.get_ident())
    interruption, _poll.error = _poll.error, None
    if interruption is not None:
        raise interruption
    if status != lib.DG_OK:
        raise EXCEPTIONS[status](text_of(message))


def text_of(pointer: Any) -> str:
    """A NUL-terminated C string; bytes that are no UTF-8 (a file's name, say) are shown escaped."""
    raw: bytes = ffi.string(pointer)
    return raw.decode("utf-8", "backslashreplace")


def pointer_to(c_type: str, array: npt.NDArray[Any] | None) -> Any:
    """A C pointer into `array`, which the pointer keeps alive; NULL for None."""
    return ffi.NULL if array is None else ffi.from_buffer(c_type, array)


def copy_of(pointer: Any, n: int, dtype: type[np.generic]) -> Any:
    """A numpy array of its own with `n` values from C memory."""
    return np.frombuffer(ffi.buffer(pointer, n * np.dtype(dtype).itemsize), dtype=dtype).copy()


def encode_path(path: StrPath) -> bytes:
    encoded = os.fsencode(os.fspath(path))
    if b"\0" in encoded:
        raise ValueError(f"path holds a NUL character: {os.fspath(path)!r}")
    return encoded


def check_readable(path: StrPath) -> None:
    """Raises the exact OSError (FileNotFoundError, IsADirectoryError, PermissionError) before C says it in words."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if stat.S_ISREG(mode):  # opening a pipe would block
        os.close(os.open(path, os.O_RDONLY))


def fields_of(struct: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in names}
