"""Servers for tests: in a thread of this process, on a free port of the loopback address."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from pydiffgguf import DiffusionModel, demo_model_path
from pydiffgguf.server.run import Serving, bind
from pydiffgguf.server.service import Service
from pydiffgguf.server.settings import Settings

QUESTION = [{"role": "user", "content": "What comes after 3?"}]


@dataclass(frozen=True)
class Running:
    """A server under way."""

    url: str
    port: int
    service: Service
    serving: Serving
    client: httpx.Client

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.client.post(path, json=body, headers=headers)

    def events(self, path: str, body: Any) -> list[Any]:
        """The events of a stream, "[DONE]" as a string, comments left out."""
        with self.client.stream("POST", path, json=body) as answer:
            assert answer.status_code == 200, answer.read()
            return parse_events(b"".join(answer.iter_raw()))

    def raw(self, request: bytes, seconds: float = 10.0) -> bytes:
        """All that comes back for bytes on a connection of their own, until the server closes it."""
        with self.connect() as sock:
            sock.settimeout(seconds)
            sock.sendall(request)
            return read_all(sock)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def at_rest(self, seconds: float = 5.0) -> bool:
        """Whether nothing waits or runs, within so many seconds."""
        return soon(lambda: self.service.engine.waiting == self.service.engine.running == 0, seconds)


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def parse_events(raw: bytes) -> list[Any]:
    found: list[Any] = []
    for event in raw.decode().split("\n\n"):
        if event and event != ":":
            assert event.startswith("data: ") and "\n" not in event, event
            text = event.removeprefix("data: ")
            found.append(text if text == "[DONE]" else json.loads(text))
    return found


def soon(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether a condition comes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def open_demo(_: Callable[[float], None]) -> DiffusionModel:
    return DiffusionModel(demo_model_path(), n_threads=1)


@contextmanager
def running(
    open_model: Callable[[Callable[[float], None]], DiffusionModel] = open_demo, **settings: Any
) -> Iterator[Running]:
    """A server with these settings, ready unless its model takes its time."""
    chosen = Settings(**{"port": 0, "aliases": ("demo",), **settings})
    sockets = bind(chosen.host, chosen.port)
    port = sockets[0].getsockname()[1]
    ready = threading.Event()
    serving = Serving(chosen, open_model, sockets, lambda address: ready.set())
    thread = threading.Thread(target=serving.run, name="server")
    thread.start()
    if open_model is open_demo:
        assert ready.wait(20)
    url = f"http://localhost:{port}"
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        try:
            yield Running(url, port, serving.service, serving, client)
        finally:
            client.close()  # a connection that is kept would be waited for
            serving.stop()
            thread.join(20)
            assert not thread.is_alive()
