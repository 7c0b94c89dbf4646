"""Credentials of a listener are replaced only while a connection holds the old ones, at once, and under many others."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.rpc import handover
from beamwire.mesh.rpc.server import Server
from beamwire.testing.facility import Facility

RENEWALS = 20


@pytest.fixture
def facility(tmp_path: Path) -> Facility:
    return Facility(tmp_path / "facility")


@pytest.fixture
async def served(facility: Facility) -> AsyncIterator[tuple[Credentials, int]]:
    credentials = facility.member("service/facility")
    server = Server(credentials, services=[])
    try:
        yield credentials, await server.start()
    finally:
        await server.stop(0)


async def shown(port: int) -> bytes:
    return ssl.PEM_cert_to_DER_cert(await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port)))


def leaf(credentials: Credentials) -> bytes:
    end = b"-----END CERTIFICATE-----\n"
    return ssl.PEM_cert_to_DER_cert((credentials.chain_pem.split(end)[0] + end).decode())


async def until_shown(credentials: Credentials, port: int) -> None:
    async with asyncio.timeout(10):
        while await shown(port) != leaf(credentials):
            pass  # each look is a handshake


async def test_each_renewal_is_shown_soon_and_held(
    facility: Facility, served: tuple[Credentials, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials, port = served
    holders: list[asyncio.StreamWriter] = []
    held = asyncio.Event()
    replace = handover.Handover._replace_once

    async def noted(self: handover.Handover, host: str, to: int) -> asyncio.StreamWriter:
        holders.append(await replace(self, host, to))
        held.set()
        return holders[-1]

    monkeypatch.setattr(handover.Handover, "_replace_once", noted)
    for _ in range(3):
        held.clear()
        facility.renew(credentials)
        await until_shown(credentials, port)
        # Others may be shown it a moment before the holder is at hand.
        async with asyncio.timeout(10):
            await held.wait()
    assert not any(holder.is_closing() for holder in holders)


async def test_without_a_holder_nothing_is_replaced(
    facility: Facility, served: tuple[Credentials, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials, port = served
    before = leaf(credentials)
    began = asyncio.Event()

    async def stuck(_host: str, _port: int) -> asyncio.StreamWriter:
        began.set()
        return await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(handover, "_begin_handshake", stuck)
    facility.renew(credentials)
    async with asyncio.timeout(5):
        await began.wait()
    assert await shown(port) == before


async def test_a_listener_that_cannot_be_reached_is_renewed_all_the_same(
    facility: Facility, served: tuple[Credentials, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials, port = served

    async def refused(_host: str, _port: int) -> asyncio.StreamWriter:
        raise ConnectionRefusedError("a firewall, say")

    monkeypatch.setattr(handover, "_begin_handshake", refused)
    monkeypatch.setattr(handover, "RETRY_PAUSE", 0.01)
    facility.renew(credentials)
    await until_shown(credentials, port)


async def test_many_handshakes_while_credentials_change(facility: Facility, served: tuple[Credentials, int]) -> None:
    credentials, port = served
    stop = threading.Event()

    def connect_again_and_again() -> None:
        while not stop.is_set():
            # Without a certificate of its own it is refused, after what made the handshake was used.
            with suppress(OSError):
                ssl.get_server_certificate(("127.0.0.1", port), timeout=5)

    crowd = [threading.Thread(target=connect_again_and_again) for _ in range(6)]
    for thread in crowd:
        thread.start()
    try:
        for _ in range(RENEWALS):
            await asyncio.to_thread(facility.renew, credentials)
            await until_shown(credentials, port)
    finally:
        stop.set()
        for thread in crowd:
            await asyncio.to_thread(thread.join)
