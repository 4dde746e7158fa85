"""RPC servers on loopback ports, and what stands between them and the engine: a relay that counts."""

from __future__ import annotations

import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydiffgguf._binding.functions import build_info


@contextmanager
def rpc_server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server in a process of its own, with one thread: its "host:port", and the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-u", "-m", "pydiffgguf", "rpc-server", "--port", str(port), "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            _wait_until_it_listens(port, process)
            yield f"127.0.0.1:{port}", process
        finally:
            process.kill()


def _wait_until_it_listens(port: int, process: subprocess.Popen[str]) -> None:
    """By the kernel's table, where there is one: a connection to try it would be a client to be served."""
    pattern = re.compile(rf"0100007F:{port:04X} 00000000:0000 0A")
    for _ in range(600):
        try:
            listening = bool(pattern.search(Path("/proc/net/tcp").read_text(encoding="ascii")))
        except FileNotFoundError:
            with socket.socket() as client:
                listening = client.connect_ex(("127.0.0.1", port)) == 0
        if listening:
            return
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {process.stdout and process.stdout.read()}")
        threading.Event().wait(0.05)
    raise RuntimeError("the server does not listen")


class Relay:
    """Passes bytes on between a client and a server, and counts them. `memory_free`: what the client hears that the
    server's device has free, a CPU's, which reports all memory that there is."""

    def __init__(self, server: str, memory_free: int | None = None) -> None:
        (cpu,) = [d for d in build_info()["devices"] if d["name"] == "CPU"]
        self._told = struct.pack("<QQ", cpu["memory_free"], cpu["memory_total"])
        self._tells = self._told if memory_free is None else struct.pack("<QQ", memory_free, cpu["memory_total"])
        host, port = server.split(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent = self.received = 0  # by the client
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._pass_on, args=(client, server, "sent"), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(server, client, "received"), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, count: str) -> None:
        while True:
            try:
                data = source.recv(1 << 20)
                if not data:
                    break
                setattr(self, count, getattr(self, count) + len(data))
                target.sendall(data if count == "sent" else data.replace(self._told, self._tells))
            except OSError:
                break
        for end in (source, target):  # wakes the other direction's thread as well, which close() alone does not
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.close()
