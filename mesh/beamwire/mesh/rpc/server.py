"""A gRPC server of a member: mutual TLS, the chain, health and reflection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.rpc.access import Gate
from beamwire.mesh.rpc.chain import Chain
from beamwire.mesh.rpc.channel import MAX_MESSAGE_BYTES
from beamwire.mesh.rpc.handover import Handover
from beamwire.mesh.rpc.limits import CallLimits

if TYPE_CHECKING:  # its database stays out of programs that only call
    from beamwire.mesh.idempotency import Idempotency

UNSEEN: Final = (128, 192)
"""Calls that wait to be looked at, beyond which gRPC refuses some with CANCELLED, and beyond which all.

It does that without Python, at a small part of what any answer of ours costs: where calls are answered faster than they
can be refused, nothing else leaves time for answers. What waits so long is answered a few tenths of a second late.
"""

_OPTIONS: Final = (
    ("grpc.server.max_pending_requests", UNSEEN[0]),
    ("grpc.server.max_pending_requests_hard_limit", UNSEEN[1]),
    # Two processes on one port would share the calls between them, silently.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Live connections keep the certificates that they began with; this makes them new ones.
    ("grpc.max_connection_age_ms", 10 * 60 * 1000),
    # Our channels ping every 5 s, which gRPC would answer with "too many pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 4_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A client whose host is gone must not hold its streams for ever.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)

# Seconds for the answers to calls that were given up to be sent.
_LAST_ANSWERS: Final = 1.0
# One connection of somebody without a certificate.
_STRANGERS: Final = (("grpc.max_concurrent_streams", 64),)


@dataclass(frozen=True, slots=True)
class Service:
    """A service to serve: its full name, the generated function that adds it, and what answers."""

    full_name: str
    add: Callable[[Any, Any], None]
    servicer: object


class Server:
    """Serves services at one address (`host:port`, port 0 for any).

    `gate` says who calls: without one, whom the credentials believe, by the default policy. `limits` is how many calls
    it answers at a time; what is beyond is refused with OVERLOADED. `anonymous` makes it an enrolment listener: no
    client certificate is asked for, only the methods that allow that are served, and neither health nor reflection.
    """

    def __init__(
        self,
        credentials: Credentials,
        *,
        address: str = "127.0.0.1:0",
        services: Sequence[Service],
        idempotency: Mapping[str, Idempotency] | None = None,
        gate: Gate | None = None,
        anonymous: bool = False,
        limits: CallLimits | None = None,
    ) -> None:
        self._credentials = credentials
        self._address = address
        self._services = services
        self._idempotency = dict(idempotency or {})
        self._gate = gate or Gate(credentials)
        self._anonymous = anonymous
        self._limits = limits
        self._chain: Chain | None = None
        self._server: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._health = health_aio.HealthServicer()

    async def start(self) -> int:
        """Listen and serve; the port. BeamwireError LAUNCH_FAILED if the address cannot be had."""
        chain = self._chain = Chain(self._gate, self._idempotency, anonymous=self._anonymous, limits=self._limits)
        for service in self._services:
            service.add(service.servicer, chain)
        if not self._anonymous:
            await self._add_health_and_reflection(chain)
        server = grpc.aio.server(handlers=[chain], options=_OPTIONS + (_STRANGERS if self._anonymous else ()))
        handover = Handover()
        port = self._listen(server, handover)
        await server.start()
        self._server = server
        host = self._address.rpartition(":")[0].strip("[]")
        self._tasks = [
            asyncio.create_task(chain.live.watch(self._credentials), name="live calls"),
            asyncio.create_task(handover.run(self._credentials, host, port), name="handover of credentials"),
        ]
        return port

    def _listen(self, server: grpc.aio.Server, handover: Handover) -> int:
        security = self._credentials.server_credentials(require_client=not self._anonymous, may_change=handover.allowed)
        try:
            return server.add_secure_port(self._address, security)
        except RuntimeError as error:
            raise BeamwireError(
                Reason.LAUNCH_FAILED,
                f"cannot listen at {self._address}: it is in use or not an address of this host; "
                "stop what holds it or choose another",
                metadata={"address": self._address},
            ) from error

    async def _add_health_and_reflection(self, chain: Any) -> None:
        names = [service.full_name for service in self._services]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, chain)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflected = reflection.aio.ReflectionServicer([*names, health_name, reflection.SERVICE_NAME])
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflected, chain)
        for name in ["", *names]:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace: float = 5.0) -> None:
        """Refuse new calls and end streams, with DRAINING; give the calls that run some seconds; then end."""
        if self._server is None or self._chain is None:
            return
        await self._health.enter_graceful_shutdown()
        # It tells the clients to go elsewhere, at once.
        stopped = asyncio.create_task(self._server.stop(grace + _LAST_ANSWERS))
        await self._chain.drain(grace)
        await stopped
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._server = None
