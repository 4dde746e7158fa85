"""Clients that ask and then read nothing: what waits for them is bounded, and they are let go."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from serving import QUESTION, Running, running, soon

ARRIVAL = 0.4
ENDLESS = {"steps": 100_000, "confidence_threshold": 0.0, "frames": "tokens"}


@pytest.fixture(scope="module")
def impatient() -> Iterator[Running]:
    """Waits 0.4 s for a reader; its sockets take little, so that a reply of a megabyte does not fit in."""
    with running(arrival=ARRIVAL) as one:
        for sock in one.serving.sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield one


def ask(server: Running, path: str, body: Any) -> socket.socket:
    """A connection that has asked."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", server.port))
    content = json.dumps(body).encode()
    sock.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n".encode())
    sock.sendall(content)
    return sock


def waiting(server: Running) -> int:
    """Bytes that the server holds for its readers."""
    return sum(one.transport.get_write_buffer_size() for one in server.serving.connections)


def test_a_stream_that_nobody_reads_ends(impatient: Running, caplog: pytest.LogCaptureFixture) -> None:
    """One event waits, and no more; then the client has left, and its generation ends. Nothing is a defect."""
    caplog.set_level(logging.INFO)
    with ask(impatient, "/v1/chat/completions", {"messages": QUESTION, "stream": True, "diffusion": ENDLESS}):
        assert soon(lambda: waiting(impatient) > 0), "the reader's socket takes it all"
        most = 0

        def gone() -> bool:
            nonlocal most
            most = max(most, waiting(impatient))
            return not impatient.serving.connections

        assert soon(gone, 20 * ARRIVAL)
        assert most < 16_384
        assert impatient.at_rest(20 * ARRIVAL)
    assert "client left" in caplog.text and "Traceback" not in caplog.text and "defect" not in caplog.text


def test_a_reply_that_nobody_reads_is_thrown_away(impatient: Running) -> None:
    """Also one that was answered at once: uvicorn would hold it as long as the client holds the connection."""
    held = [ask(impatient, "/detokenize", {"tokens": [260] * 200_000}) for _ in range(3)]
    assert soon(lambda: waiting(impatient) > 3 * 100_000), waiting(impatient)
    assert soon(lambda: not impatient.serving.connections, 20 * ARRIVAL)
    for sock in held:
        sock.close()


def test_a_slow_reader_gets_everything(impatient: Running) -> None:
    """It takes a second, more than twice what one that reads nothing has."""
    whole = bytearray()
    with ask(impatient, "/detokenize", {"tokens": [260] * 100_000}) as sock:
        while b"\r\n\r\n" not in whole or len(whole) < 100_000:
            time.sleep(0.02)
            part = sock.recv(2000)
            assert part, "the server has closed the connection"
            whole += part
    assert whole.startswith(b"HTTP/1.1 200")
