"""Programs that the test of two facilities runs on their hosts; each says what it sees in lines of JSON, with the time.

The clock is the one that all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1.certificate_service_pb2_grpc import CertificateServiceStub
from beamwire.client.aio import AsyncClient
from beamwire.client.operators import operated_facility
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
from beamwire.request.v1 import request_service_pb2 as request_pb
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME

CALL_PERIOD = 0.02  # seconds


def request(events: int, rate: float) -> dict[str, Any]:
    """A request for synthetic events, small and without data that could be refused."""
    source = {"type": "SyntheticEventSource", "number_of_events": events, "shape": [8, 8], "events_per_second": rate}
    return {
        "event_source": source,
        "data_sources": {"x": {"type": "SyntheticDetector"}},
        "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 2}],
    }


def say(what: str, **more: Any) -> None:
    """Print one line."""
    print(json.dumps({"what": what, "at": time.monotonic(), **more}), flush=True)


def say_error(what: str, error: BeamwireError, **more: Any) -> None:
    """Print why something ended."""
    say(what, reason=error.reason.name, message=error.message, **more)


async def use(config: Path, facility: str, streams: int) -> None:
    """Call, watch and consume at a facility until each of them is refused; say when."""
    async with AsyncClient(facility, config_dir=config) as client:
        name = (await client.create_transfer(request(100_000, 100))).name
        transfer = request_pb.Transfer()
        async for transfer in client.watch_transfer(name):
            if transfer.connect_string:
                break
        say("transfer", name=name)
        first = threading.Semaphore(0)
        seen = [asyncio.create_task(_watch(client, name, first)) for _ in range(streams)]
        seen.append(asyncio.create_task(_call(client, name, first)))
        tickets = client.tickets(ConnectString.parse(transfer.connect_string), LINK_ROLE_CONSUME)
        seen.append(asyncio.create_task(asyncio.to_thread(_consume, client, transfer, tickets, first)))
        for _ in seen:
            await asyncio.to_thread(first.acquire)
        say("ready")
        await asyncio.gather(*seen)


async def _watch(client: AsyncClient, name: str, first: threading.Semaphore) -> None:
    heard = False
    try:
        async for _ in client.watch_transfer(name):
            if not heard:
                heard = True
                first.release()
    except BeamwireError as error:
        say_error("stream", error)


async def _call(client: AsyncClient, name: str, first: threading.Semaphore) -> None:
    heard = False
    try:
        while True:
            await client.get_transfer(name)
            if not heard:
                heard = True
                first.release()
            await asyncio.sleep(CALL_PERIOD)
    except BeamwireError as error:
        say_error("unary", error)


def _consume(client: AsyncClient, transfer: request_pb.Transfer, tickets: Any, first: threading.Semaphore) -> None:
    last = 0.0
    connect_string = ConnectString.parse(transfer.connect_string)
    try:
        with Consumer(connect_string, client.credentials, tickets=tickets) as consumer:
            for _ in consumer:
                if not last:
                    first.release()
                last = time.monotonic()
    except BeamwireError as error:
        say_error("pipe", error, last_frame=last)


async def load(config: Path, facility: str, events: int) -> None:
    """Consume a transfer to its end, call all the while, and say what failed."""
    failed: list[str] = []
    calls = 0
    async with AsyncClient(facility, config_dir=config) as client:

        async def call() -> None:
            nonlocal calls
            while True:
                try:
                    await client.who_am_i()
                except BeamwireError as error:
                    failed.append(f"{error.reason.name}: {error.message}")
                calls += 1
                await asyncio.sleep(0.01)

        caller = asyncio.create_task(call())
        ids: list[int] = []
        reconnects: list[str] = []
        async with client.stream(request(events, 100), on_reconnect=reconnects.append) as stream:
            say("ready")
            async for batch in stream:
                ids += batch.event_ids.tolist()
        caller.cancel()
        receipt = stream.receipt
        say(
            "done",
            calls=calls,
            failed=failed,
            events=len(set(ids)),
            twice=len(ids) - len(set(ids)),
            balanced=receipt is not None and receipt.balanced,
            delivered=receipt.delivered_event_count if receipt is not None else 0,
            reconnects=len(reconnects),
        )


async def _operate(directory: Path, call: Callable[[Any], Awaitable[object]]) -> None:
    facility = operated_facility(directory)
    async with connect(facility.addresses.of("certificate"), facility.credentials()) as channel:
        stub = CertificateServiceStub(channel)
        # So that no handshake is in what is measured.
        await stub.DescribeAuthority(pb.DescribeAuthorityRequest())
        began = time.monotonic()
        await call(stub)
        say("done", began=began)


async def revoke(directory: Path, identity: str) -> None:
    """End a member."""
    await _operate(directory, lambda stub: stub.RevokeMember(pb.RevokeMemberRequest(identity=identity)))


async def remove(directory: Path, domain: str) -> None:
    """Believe another facility no more."""
    name = f"trustBundles/{domain}"
    await _operate(directory, lambda stub: stub.DeleteTrustBundle(pb.DeleteTrustBundleRequest(name=name)))


async def pretend(config: Path, facility: str, connect_string: str) -> None:
    """Try to be let in on every way, and say why not."""
    async with AsyncClient(facility, config_dir=config) as client:
        try:
            await client.get_transfer("transfers/nothing")
        except BeamwireError as error:
            say_error("unary", error)
        try:
            async for _ in client.watch_transfer("transfers/nothing"):
                break
        except BeamwireError as error:
            say_error("stream", error)
        where = ConnectString.parse(connect_string)

        def dial() -> None:
            with Consumer(where, client.credentials, dial_timeout=3) as consumer:
                next(iter(consumer))

        try:
            await asyncio.to_thread(dial)
        except BeamwireError as error:
            say_error("pipe", error)


def main(arguments: list[str]) -> None:
    """Run the program that is named first."""
    match arguments:
        case ["use", config, facility, streams]:
            asyncio.run(use(Path(config), facility, int(streams)))
        case ["load", config, facility, events]:
            asyncio.run(load(Path(config), facility, int(events)))
        case ["revoke", directory, identity]:
            asyncio.run(revoke(Path(directory), identity))
        case ["remove", directory, domain]:
            asyncio.run(remove(Path(directory), domain))
        case ["pretend", config, facility, connect_string]:
            asyncio.run(pretend(Path(config), facility, connect_string))
        case _:
            raise SystemExit(f"unknown program: {arguments}")


if __name__ == "__main__":
    main(sys.argv[1:])
