"""uvicorn's connection, with limits that uvicorn does not have: time for a head to arrive, time for a reply to be read,
and a number of connections.

uvicorn ends a connection that idles after a reply, but never one that sends nothing, or half a head, or that reads
nothing of its reply, which then stays in memory.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from pydiffgguf.server.settings import Settings

__all__ = ["protocol_class"]

#: Bytes a second that a reader must take of what waits for it.
SLOWEST = 1024


def protocol_class(settings: Settings) -> type[H11Protocol]:
    """A connection class with these limits."""

    class Connection(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            # Any byte that the system does not take pauses writing: `_unread` runs while there is one.
            transport.set_write_buffer_limits(high=0)
            if len(self.connections) > settings.connections:
                transport.abort()
                return
            self._expect_head()

        def data_received(self, data: bytes) -> None:
            if self._head is None and not self._answering():
                self._expect_head()
            super().data_received(data)

        def handle_events(self) -> None:
            super().handle_events()
            if self._answering():
                self._forget_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget_head()
            self._forget_unread()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._expect_reading()

        def resume_writing(self) -> None:
            self._forget_unread()
            super().resume_writing()

        def _expect_reading(self) -> None:
            self._unread = self.loop.call_later(
                settings.arrival, self._still_unread, self.transport.get_write_buffer_size()
            )

        def _forget_unread(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def _still_unread(self, before: int) -> None:
            if self.transport.get_write_buffer_size() > before - SLOWEST * settings.arrival:
                self.transport.abort()
            else:
                self._expect_reading()

        def _answering(self) -> bool:
            cycle: Any = self.cycle  # None before the first request
            return cycle is not None and not cycle.response_complete

        def _expect_head(self) -> None:
            self._head = self.loop.call_later(settings.arrival, self._too_late)

        def _forget_head(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

        def _too_late(self) -> None:
            self._head = None
            if not self.transport.is_closing():
                self.transport.abort()

    return Connection
