"""grpc.aio: a server that hands the chunks of one stream to another, and its ends; a chunk has 1 MiB at most."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import grpc

from beamwire.mesh.identity.credentials import Credentials
from bench.ends import Job, depth, payload
from bench.meter import Meter

_CHUNK: Final = 1 << 20
_OPTIONS: Final = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def relay(tell: Callable[[int, int], None], credentials: Path | None, size: int) -> None:
    """Serve, over mutual TLS if there are credentials."""
    asyncio.run(_serve(tell, credentials, size))


async def _serve(tell: Callable[[int, int], None], credentials: Path | None, size: int) -> None:
    chunks: asyncio.Queue[bytes] = asyncio.Queue(depth(min(size, _CHUNK)))

    async def put(requests: AsyncIterator[bytes], _context: object) -> bytes:
        async for chunk in requests:
            await chunks.put(chunk)
        return b""

    async def get(_request: bytes, _context: object) -> AsyncIterator[bytes]:
        while True:
            yield await chunks.get()

    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Put": grpc.stream_unary_rpc_method_handler(put),
        "Get": grpc.unary_stream_rpc_method_handler(get),
    }
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Relay", methods),))
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", Credentials.load(credentials).server_credentials())
    await server.start()
    tell(port, port)
    await server.wait_for_termination()


def put(job: Job) -> None:
    """The same chunks again and again."""
    asyncio.run(_put(job))


async def _put(job: Job) -> None:
    data = payload(job.size).tobytes()
    chunks = [data[begin : begin + _CHUNK] for begin in range(0, len(data), _CHUNK)]
    async with _channel(job) as channel:
        put: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary("/bench.Relay/Put")
        call = put()
        while True:
            for chunk in chunks:
                await call.write(chunk)


def get(job: Job, meter: Meter) -> None:
    """Chunks as they come; a message has arrived with its last one."""
    asyncio.run(_get(job, meter))


async def _get(job: Job, meter: Meter) -> None:
    counter = meter.counter(job.size)
    missing = job.size
    async with _channel(job) as channel:
        get: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream("/bench.Relay/Get")
        async for chunk in get(b""):
            missing -= len(chunk)
            if missing <= 0:
                missing = job.size
                counter.add()
    raise ConnectionError("the stream ended")


def _channel(job: Job) -> grpc.aio.Channel:
    address, identity = f"127.0.0.1:{job.target.producer_port}", job.target.identity()
    if identity is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    return grpc.aio.secure_channel(address, identity.channel_credentials(), options=_OPTIONS)
