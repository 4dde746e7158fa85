"""The engine: an opened file with its tokenizer, its template and its sessions. Every call of a model gets it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydiffgguf._binding.native import NativeModel
from pydiffgguf._binding.records import ModelConfig, Sampling
from pydiffgguf._log import logger
from pydiffgguf.engine.adapters import Adapters
from pydiffgguf.engine.call import Call
from pydiffgguf.engine.pool import SessionPool
from pydiffgguf.errors import ModelClosedError
from pydiffgguf.session import Session
from pydiffgguf.text.prompts import Prompts
from pydiffgguf.text.tokenizer import Tokenizer
from pydiffgguf.text.turn import TextView

if TYPE_CHECKING:
    from pydiffgguf.structured.tables import Tables

__all__ = ["Engine"]


class SessionMaker:
    """Makes a model's sessions, and says once what a device lacks. It knows the file, and not the engine: a model that
    nobody holds any longer is freed at once, and not when Python next looks for circles."""

    def __init__(
        self, native: NativeModel, name: str, options: dict[str, Any], verbose: bool, adapters: Adapters
    ) -> None:
        self.options = options
        self._adapters = adapters
        self._native = native
        self._name = name
        self._verbose = verbose
        self._announced: set[str] = set()

    def __call__(self, **options: Any) -> Session:
        """A session with these options beside or over the model's."""
        session = Session(self._native, self._adapters, **{**self.options, **options})
        logger.debug("session: n_ctx %d, %d threads, %s", session.n_ctx, session.n_threads, session.memory)
        for line in session.fallbacks:
            if line not in self._announced:
                self._announced.add(line)
                logger.warning("%s: %s: the CPU does it, slower", self._name, line)
                if self._verbose:
                    print(f"pydiffgguf: {line}: the CPU does it, slower", file=sys.stderr)
        return session


class Engine:
    """What generating, infilling and editing need of a model; `DiffusionModel` is its face.

    Args:
        native: the opened file.
        name: the file's, for messages.
        session_options: options of every NativeSession.
        n_sessions: the most that the pool keeps.
        verbose: what is odd goes to stderr, too.
    """

    def __init__(
        self, native: NativeModel, name: str, session_options: dict[str, Any], *, n_sessions: int, verbose: bool
    ) -> None:
        self.native = native
        self.name = name
        self.adapters = Adapters(native)
        self.session = SessionMaker(native, name, session_options, verbose, self.adapters)
        self.pool = SessionPool(self.session, n_sessions, name)
        self.prompts = Prompts(name, native.metadata, native.config.n_vocab)
        self.view = TextView(self.prompts.tokenizer_or_none)
        self._tables: Tables | None = None
        self._tables_lock = threading.Lock()

    @property
    def config(self) -> ModelConfig:
        return self.native.config

    @property
    def sampling(self) -> Sampling:
        return self.native.sampling

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises UnsupportedError when the file holds none."""
        return self.prompts.tokenizer

    @property
    def tables(self) -> Tables:
        """The vocabulary for constraints, made at first use. Raises UnsupportedError without llguidance."""
        from pydiffgguf.structured.tables import Tables

        with self._tables_lock:
            if self._tables is None:
                self._tables = Tables(self.tokenizer)
            return self._tables

    @property
    def n_ctx(self) -> int:
        """Positions of a session: prefix, finished canvases and the live canvas together."""
        return self.native.n_ctx(**self.session.options)

    def call(self, options: Mapping[str, Any] = MappingProxyType({}), time_limit_s: float | None = None) -> Call:
        """A call with the `cancel` and `lora` of these options. Raises TypeError and ValueError for them."""
        return Call(options.get("cancel"), time_limit_s, self.adapters.choose(options.get("lora")))

    def check_open(self) -> None:
        if self.native.closed:
            raise ModelClosedError(f"{self.name} is closed")

    def close(self) -> None:
        """Ends what is running and lets go of the file. Idempotent."""
        self.native.close()
        self.pool.close()
        self.adapters.clear()
