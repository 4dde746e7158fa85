"""What Python does about RPC servers: their addresses. The rest is ggml's (csrc/model/devices.cpp)."""

from __future__ import annotations

import socket

__all__ = ["numeric_address"]


def numeric_address(host: str) -> str:
    """The IPv4 address of a host, numeric, as ggml's server wants it. Raises OSError for a name that has none."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise OSError(f"{host}: {error.strerror or error}") from None
