"""One connection to the page, closed when a request's head does not come in time."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD = 10.0  # seconds from when a request may begin until its head is there
MAX_WAITING = 64  # connections of one visitor without a request; the oldest one gives way


class Connection(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, with an end to waiting for a request.

    uvicorn waits without end for the rest of a head, and for a body after its answer. A connection
    that waits counts against its visitor; one with a request is the business of the gate.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait."""
        super().connection_made(transport)
        self._heed()

    def data_received(self, data: bytes) -> None:
        """Go on waiting, or end it."""
        super().data_received(data)
        self._heed()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        self._heed()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        super().connection_lost(exc)
        self._stop()

    def _heed(self) -> None:
        if self.transport.is_closing() or (self.cycle and not self.cycle.response_complete):
            self._stop()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD, self.transport.abort)
            others = [
                c for c in self.connections if isinstance(c, Connection) and c._waits_like(self)
            ]
            if len(others) > MAX_WAITING:
                min(others, key=lambda other: other._since).transport.abort()

    @property
    def _since(self) -> float:
        return self._deadline.when() if self._deadline else 0.0

    def _waits_like(self, other: Connection) -> bool:
        """Whether it waits, and for the same visitor."""
        same = (self.client or ())[:1] == (other.client or ())[:1]
        return same and self._deadline is not None and not self.transport.is_closing()

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
