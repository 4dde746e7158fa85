"""Sockets, signals and the model's life around the application."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from pydiffgguf.server.app import make_app
from pydiffgguf.server.protocol import protocol_class
from pydiffgguf.server.service import Service
from pydiffgguf.server.settings import Settings

if TYPE_CHECKING:
    from pydiffgguf import DiffusionModel

__all__ = ["Serving", "bind"]

logger = logging.getLogger("pydiffgguf.server")

#: Seconds that running requests have to finish in once the server was told to stop.
GRACE = 5.0


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets. "localhost" is both 127.0.0.1 and ::1: programs that try one of them first wait, or fail,
    where only the other one answers.

    Raises OSError where the port is taken.
    """
    if host != "localhost":
        info = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return [_listen(info[0], info[4][0], port)]  # type: ignore[arg-type]
    sockets = [_listen(socket.AF_INET, "127.0.0.1", port)]
    if socket.has_ipv6:
        try:
            sockets.append(_listen(socket.AF_INET6, "::1", sockets[0].getsockname()[1]))
        except OSError as error:  # a machine without IPv6; programs there do not try it
            logger.info("::1 is not served: %s", error.strerror)
    return sockets


def _listen(family: int, address: str, port: int) -> socket.socket:
    # asyncio sends small packets at once only where the protocol is named: else head and body of a reply, two packets,
    # take the 40 ms that the receiver delays its acknowledgement (measured: 48 ms for /health in place of 1).
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"{address} port {port}: {error.strerror}") from None
    return sock


class _Server(uvicorn.Server):
    """uvicorn's server with signals of our own: the first ends it when running requests have been answered, or after
    five seconds with what they have; a second ends the process."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._watch: threading.Timer | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        signals = (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.stop()

    def stop(self) -> None:
        """As the first signal."""
        self.should_exit = True
        self._service.engine.stop()
        self._watch = threading.Timer(GRACE, self._service.engine.end_all)
        self._watch.daemon = True
        self._watch.start()


class Serving:
    """A server: made, then run.

    Args:
        open_model: opens the model, and tells its argument how far it is, from 0 to 1. It is called on the engine's
            thread, while ``/health`` already answers.
        sockets: from `bind`; closed in the end.
        announce: told the address once the model is there.
    """

    def __init__(
        self,
        settings: Settings,
        open_model: Callable[[Callable[[float], None]], DiffusionModel],
        sockets: list[socket.socket],
        announce: Callable[[str], None],
    ) -> None:
        self.service = Service(settings, on_failure=self._lost)
        self._open_model = open_model
        self._sockets = sockets
        self._announce = announce
        self._model: DiffusionModel | None = None
        self._failure: Exception | None = None
        self._code = 0
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.address = f"http://{host}:{sockets[0].getsockname()[1]}"
        config = uvicorn.Config(
            make_app(self.service),
            http=protocol_class(settings),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=int(GRACE) + 3,
            h11_max_incomplete_event_size=settings.headers + 4096,
        )
        self._server = _Server(config, self.service)

    def run(self) -> int:
        """Serves until a signal or `stop`; returns the exit code. Raises what opening the model raised."""
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
        self.service.engine.start()
        self.service.engine.call(self._load)
        try:
            asyncio.run(self._server.serve(sockets=self._sockets))
        finally:
            self.service.engine.close(timeout=GRACE)
            self.service.close()
            if self._model is not None:
                self._model.close()
        if self._failure is not None:
            raise self._failure
        return self._code

    @property
    def sockets(self) -> list[socket.socket]:
        """Those that listen."""
        return self._sockets

    @property
    def connections(self) -> Collection[Any]:
        """The open ones."""
        return self._server.server_state.connections

    def stop(self) -> None:
        """From any thread: takes no more requests, answers those that run, and ends `run`."""
        self._server.stop()

    def _load(self) -> None:
        try:
            self._model = self._open_model(self._told)
            need = self._model.memory()
            megabytes = (need.weights / 1e6, (need.kv_cache + need.compute + need.logits) / 1e6)
            sessions = self.service.settings.sessions
            logger.info("%.1f MB of weights, %.1f MB for each of %d sessions", *megabytes, sessions)
            self.service.loaded(self._model)
            self._announce(self.address)
        except Exception as error:
            self._failure = error
            self._server.should_exit = True

    def _told(self, part: float) -> None:
        self.service.progress = part

    def _lost(self) -> None:
        """A device has failed: nothing can be answered from now on."""
        self._code = 1
        self.stop()
