"""Serves workers that ask for the next event, as CrystFEL's do: a request says that the event before was done with."""

from __future__ import annotations

import socket
import time
from typing import Final

from beamwire.client.bridges.hub import Hub, Item
from beamwire.client.bridges.wires import ReplyWire

WORKER_LEFT: Final = "its worker left before it asked for another"
STILL_HAD: Final = "its worker still had it when the bridge stopped"
NOTHING_YET: Final = b"nothing"
"""What a worker gets if there is no event: CrystFEL ignores answers of 15 bytes or less."""

# A request is held so long for an event to come.
_PATIENCE: Final = 1.0


class Answerer:
    """Serves one worker after another; each in its thread."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def serve(self, sock: socket.socket) -> None:
        """Answer until the worker leaves, or the bridge is closed."""
        wire = ReplyWire(sock)
        self._hub.joined()
        had: tuple[Item, int] | None = None
        try:
            while True:
                wire.request()
                if had is not None:
                    self._hub.served(*had)
                    had = None
                item = self._next()
                if item is None:
                    wire.reply([NOTHING_YET], last=self._hub.over)
                    if self._hub.over:
                        return
                    continue
                had = item, 0
                size = wire.reply(item.piece.encode())
                had = item, size
        finally:
            if had is not None:
                over = self._hub.over
                self._hub.give_back(had[0], STILL_HAD if over else WORKER_LEFT, died=not over)

    def _next(self) -> Item | None:
        begin = time.monotonic()
        item = self._hub.take(_PATIENCE)
        if item is None:
            self._hub.rest(_PATIENCE - (time.monotonic() - begin))
        return item
