"""Serves a consumer that is pushed to, ZeroMQ's PULL or NNG's Pull0, and keeps account of what it has taken."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from beamwire.client.bridges.contract import Contract
from beamwire.client.bridges.hub import Hub, Item
from beamwire.client.bridges.wires import Wire

CONNECTION_LOST: Final = "its consumer's connection was lost"

# So much may be under way to one consumer: enough for any round trip, and no more than needed to be sent again.
_WINDOW_BYTES: Final = 16 * 1024 * 1024
_WINDOW_MESSAGES: Final = 64
_LOOK: Final = 0.002
_REST: Final = 0.2


class Pusher:
    """Serves one connection after another; each in its thread."""

    def __init__(self, hub: Hub, contract: Contract, wire: Callable[[socket.socket], Wire]) -> None:
        self._hub = hub
        self._contract = contract
        self._wire = wire

    def serve(self, sock: socket.socket) -> None:
        """Push until all was taken, or the connection ends."""
        wire = self._wire(sock)
        self._hub.joined()
        under_way: deque[tuple[int, int, Item]] = deque()
        try:
            begun: set[int] = set()
            while not self._hub.over:
                self._settle(wire, under_way)
                item = None if _full(under_way) else self._hub.take(_LOOK if under_way else _REST)
                if item is None:
                    if self._hub.dismissed:
                        self._say_farewell(wire, begun)
                        return
                    wire.listen(_LOOK if under_way else 0.0)
                    continue
                under_way.append((2**63, 0, item))
                message = item.piece.encode()
                if item.piece.series not in begun:
                    begun.add(item.piece.series)
                    self._say(wire, self._contract.greeting(item.piece, message))
                size = wire.send(message)
                under_way[-1] = wire.written, size, item
        finally:
            for _, _, item in reversed(under_way):
                self._hub.give_back(item, CONNECTION_LOST)

    def _settle(self, wire: Wire, under_way: deque[tuple[int, int, Item]]) -> None:
        """Count what has arrived."""
        taken = wire.taken()
        while under_way and under_way[0][0] <= taken:
            _, size, item = under_way.popleft()
            self._hub.served(item, size)

    def _say_farewell(self, wire: Wire, begun: set[int]) -> None:
        if self._hub.ended:
            for series in sorted(begun):
                self._say(wire, self._contract.farewell(series))
        while wire.taken() < wire.written and not self._hub.over:
            wire.listen(_LOOK)
        wire.sock.shutdown(socket.SHUT_WR)

    def _say(self, wire: Wire, messages: list[bytes]) -> None:
        for message in messages:
            wire.send([message])


def _full(under_way: deque[tuple[int, int, Item]]) -> bool:
    return len(under_way) >= _WINDOW_MESSAGES or sum(size for _, size, _ in under_way) >= _WINDOW_BYTES
