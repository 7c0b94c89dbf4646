"""A gRPC channel to a member: mutual TLS, deadlines, retries, the trace, and errors as BeamwireError."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Self
from weakref import WeakKeyDictionary

import grpc

from beamwire.mesh import telemetry
from beamwire.mesh.credentials import Credentials
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.rpc.status import error_from_rpc

DEADLINE: Final = 15.0
MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024

Details = grpc.aio.ClientCallDetails


def service_config(*services: str) -> dict[str, Any]:
    """The gRPC service config of some services, of every service if none is named.

    UNAVAILABLE alone is retried, 5 attempts being the most that gRPC makes. There is no timeout in it, because grpcio
    lets that fire early: deadlines are set per call.
    """
    return {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{"service": service} for service in services] or [{}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }


def connect(address: str, credentials: Credentials, *, server_name: str | None = None) -> grpc.aio.Channel:
    """A channel to `host:port`; `server_name` is the name to expect on the certificate if it is not the host.

    Failed calls raise BeamwireError. Unary calls end after 15 s unless the call says otherwise; streams have no
    deadline, and end within 8 s of the connection's death. Calls made after a renewal of the credentials use the new
    certificate.
    """
    options: list[tuple[str, Any]] = [
        ("grpc.service_config", json.dumps(service_config())),
        ("grpc.keepalive_time_ms", 5_000),
        ("grpc.keepalive_timeout_ms", 3_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ]
    if server_name is not None:
        options.append(("grpc.ssl_target_name_override", server_name))
    return _RenewingChannel(address, credentials, options)


class _RenewingChannel(grpc.aio.Channel):
    """A channel that is made anew when the credentials are: grpcio cannot change those of a live one.

    Calls that run keep the channel they began on; it goes when the last of them has ended.
    """

    def __init__(self, address: str, credentials: Credentials, options: list[tuple[str, Any]]) -> None:
        self._address = address
        self._credentials = credentials
        self._options = options
        self._chain_pem = b""
        self._channel_of: WeakKeyDictionary[Any, grpc.aio.Channel] = WeakKeyDictionary()
        self._now = self._current()

    def _current(self) -> grpc.aio.Channel:
        chain_pem = self._credentials.chain_pem
        if chain_pem is not self._chain_pem:
            interceptors = [_Unary(self._address, self._credentials), _Stream(self._address, self._credentials)]
            self._now = grpc.aio.secure_channel(
                self._address, self._credentials.channel_credentials(), self._options, interceptors=interceptors
            )
            self._chain_pem = chain_pem
        return self._now

    def _calls(self, arity: str, method: str, *codec: Any, **options: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            channel = self._current()
            running = getattr(channel, arity)(method, *codec, **options)(*args, **kwargs)
            self._channel_of[running] = channel
            return running

        return call

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._calls("unary_unary", method, *args, **kwargs)

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._calls("unary_stream", method, *args, **kwargs)

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._calls("stream_unary", method, *args, **kwargs)

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._calls("stream_stream", method, *args, **kwargs)

    async def close(self, grace: float | None = None) -> None:
        for channel in {self._now, *self._channel_of.values()}:
            await channel.close(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._current().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._current().channel_ready()


def _with_trace(details: Details, timeout: float | None) -> Details:
    metadata = grpc.aio.Metadata(*(details.metadata or ()), *telemetry.inject().items())
    return Details(details.method, timeout, metadata, details.credentials, details.wait_for_ready)


def _explain(error: grpc.RpcError, address: str, credentials: Credentials) -> BeamwireError:
    """What a failed call means.

    A server that refuses a certificate closes the connection without a word, so this member looks at its own.
    """
    failure = error_from_rpc(error, address=address)
    if failure.reason is Reason.SERVICE_UNAVAILABLE:
        try:
            credentials.check()
        except BeamwireError as own:
            return own
    return failure


class _Unary(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, address: str, credentials: Credentials) -> None:
        self._address = address
        self._credentials = credentials

    async def intercept_unary_unary(
        self, continuation: Callable[[Details, Any], Any], client_call_details: Details, request: Any
    ) -> Any:
        timeout = client_call_details.timeout
        details = _with_trace(client_call_details, DEADLINE if timeout is None else timeout)
        call = await continuation(details, request)
        try:
            await call
        except grpc.aio.AioRpcError as error:
            raise _explain(error, self._address, self._credentials) from error
        return call


class _Stream(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, address: str, credentials: Credentials) -> None:
        self._address = address
        self._credentials = credentials

    async def intercept_unary_stream(
        self, continuation: Callable[[Details, Any], Any], client_call_details: Details, request: Any
    ) -> Any:
        call = await continuation(_with_trace(client_call_details, client_call_details.timeout), request)
        return self._answers(call)

    async def _answers(self, call: Any) -> AsyncIterator[Any]:
        try:
            async for answer in call:
                yield answer
        except grpc.aio.AioRpcError as error:
            raise _explain(error, self._address, self._credentials) from error
        finally:
            call.cancel()
