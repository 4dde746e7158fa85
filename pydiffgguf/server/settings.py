"""The settings that a server starts with."""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass, field

__all__ = ["Settings", "digest", "is_loopback"]


@dataclass(frozen=True)
class Settings:
    """Limits and permissions; docs/SERVER.md explains each. Lengths of time in seconds, of bodies in bytes.

    `key_digests`: SHA-256 of each API key; without any, no key is asked for. `aliases`: the model's names, the first
    being the one in replies.
    """

    host: str = "localhost"
    port: int = 8080
    key_digests: tuple[bytes, ...] = ()
    aliases: tuple[str, ...] = ("model",)
    sessions: int = 2
    queue: int = 32
    time_limit: float = 600.0
    max_tokens: int = 4096
    infill_time_limit: float = 10.0
    infill_max: int = 256
    max_body: int = 8 * 2**20
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    metrics: bool = False
    page: bool = True
    strict_params: bool = False
    log_bodies: bool = False
    #: Seconds for a head, and for a body, to arrive in whole.
    arrival: float = 30.0
    #: Seconds without an event after which a stream says that it lives.
    heartbeat: float = 5.0
    #: Open connections.
    connections: int = 256
    headers: int = 32 * 2**10
    names: tuple[str, ...] = field(default=("localhost", "127.0.0.1", "::1"), init=False)


def digest(key: str | bytes) -> bytes:
    """What is kept of an API key, and compared: bytes, because comparing in constant time takes only ASCII text."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key).digest()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; False for any name but localhost."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
