"""What pydiffgguf raises, besides ``ValueError`` and ``TypeError`` for a caller's mistake and ``OSError`` for a file
that cannot be opened, read or written.

    DiffGGUFError
    ├── ModelFormatError      the file is not a GGUF, is broken, or is of another kind
    ├── UnsupportedError      well-formed, but this build or this file cannot serve it
    ├── OutOfMemoryError      says what was asked for, and what there is
    ├── ContextOverflowError  prefix, finished canvases and the live canvas do not fit into n_ctx
    ├── SessionBusyError      another thread is inside this session
    ├── ModelClosedError      the model or session was closed
    └── CancelledError        a session's call was stopped by cancel()

``DiffGGUFError`` itself is raised only for a defect of the library or of ggml. Every message is one line.
"""

from __future__ import annotations

__all__ = [
    "CancelledError",
    "ContextOverflowError",
    "DeviceError",
    "DiffGGUFError",
    "ModelClosedError",
    "ModelFormatError",
    "OutOfMemoryError",
    "SessionBusyError",
    "UnsupportedError",
]


class DiffGGUFError(Exception):
    """The root of the tree; one ``except`` catches whatever the library reports."""


class ModelFormatError(DiffGGUFError):
    """The file is no GGUF, is broken, or is of another kind: names the key or tensor, and what was expected."""


class UnsupportedError(DiffGGUFError):
    """A device that was not built in, or an option or a variant of the format that cannot be served."""


class DeviceError(DiffGGUFError):
    """The connection to an RPC server was lost, or a GPU failed. The model and its sessions are of no more use: close
    the model, and open it again. A GPU that has failed is of no more use to this process; models on the CPU are."""


class OutOfMemoryError(DiffGGUFError):
    """An allocation was refused: says how much was asked for, and how much there is."""


class ContextOverflowError(DiffGGUFError):
    """The prefix, the finished canvases and the live canvas together need more positions than ``n_ctx``."""


class SessionBusyError(DiffGGUFError):
    """A second thread called a session that is at work; the first call is not disturbed."""


class ModelClosedError(DiffGGUFError):
    """The model or session was used after ``close()``."""


class CancelledError(DiffGGUFError):
    """``cancel()`` stopped a call of the low-level session. ``generate()`` and ``chat()`` do not raise it: they return
    what there is, with ``finish_reason == "cancelled"``."""
