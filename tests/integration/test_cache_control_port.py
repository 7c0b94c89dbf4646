"""The port at which a cache on another host is spoken to by its service."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.services.buffer.cache.control_port import MOST_STRANGERS, ControlPort
from beamwire.services.buffer.doors import TlsDoor
from beamwire.testing.facility import Facility


@pytest.fixture
def facility(tmp_path: Path) -> Facility:
    return Facility(tmp_path)


class Served:
    """A port whose owner says everything again, and whom it turned away."""

    def __init__(self, credentials: Credentials) -> None:
        self.refused: list[str] = []
        self.port = ControlPort("127.0.0.1", credentials, self._answer, self.refused.append)
        self.address = f"127.0.0.1:{self.port.port}"

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)


@pytest.fixture
async def served(facility: Facility) -> AsyncIterator[Served]:
    served = Served(facility.member("cache/b"))
    yield served
    served.port.close()
    # Those who are there find that the other side has left.
    while served.port._peers:
        await asyncio.wait(served.port._peers)


async def echo(served: Served, credentials: Credentials) -> bytes:
    door = TlsDoor(served.address, SpiffeId("facility.test", "cache/b"), credentials)
    reader, writer = await door.open()
    try:
        writer.write(b"there?\n")
        return await reader.readline()
    finally:
        writer.close()
        await writer.wait_closed()


async def test_only_the_service_gets_in(served: Served, facility: Facility) -> None:
    assert await echo(served, facility.member("service/buffer")) == b"there?\n"
    assert await echo(served, facility.member("user/alice")) == b""
    assert "is not the service of this cache" in served.refused[0]


async def test_a_crowd_that_says_nothing_does_not_keep_the_service_out(served: Served, facility: Facility) -> None:
    with ExitStack() as stack:
        for _ in range(MOST_STRANGERS):
            stack.enter_context(socket.create_connection(("127.0.0.1", served.port.port)))
        async with asyncio.timeout(5):
            assert await echo(served, facility.member("service/buffer")) == b"there?\n"
