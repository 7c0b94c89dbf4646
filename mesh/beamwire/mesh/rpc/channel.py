"""A gRPC channel to a member: mutual TLS, deadlines, retries, the trace, and errors as BeamwireError."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Iterable
from typing import Any, Final, Self
from weakref import WeakSet

import grpc

from beamwire.mesh import telemetry
from beamwire.mesh.addresses import target
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.delegation import METADATA_KEY, check_text
from beamwire.mesh.identity.ids import SpiffeId, services_name
from beamwire.mesh.rpc.status import error_from_rpc

DEADLINE: Final = 15.0
MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
# What a server says when a live call's certificate is over, or its authority is.
_OF_A_CERTIFICATE: Final = frozenset({Reason.CERTIFICATE_EXPIRED, Reason.CERTIFICATE_INVALID})
# What gRPC says when the other side closed a connection, in a handshake too.
_CLOSED: Final = "Socket closed"

_Explain = Callable[[grpc.RpcError, grpc.aio.Channel], BeamwireError]


def service_config() -> dict[str, Any]:
    """The gRPC service config of every service: what `<api>_service_config.json` beside each proto says of one.

    A call that nobody began to answer is made again, 5 attempts being the most that gRPC makes: if it did not arrive or
    the server drains (UNAVAILABLE), is overloaded for the moment (RESOURCE_EXHAUSTED), or ended in that very instant
    (CANCELLED). Our servers say with all other answers of the last two codes that calling again is no use. There is no
    timeout in it, because grpcio lets that fire early: deadlines are set per call.
    """
    return {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
                },
            }
        ],
    }


def connect(
    address: str,
    credentials: Credentials,
    *,
    trust_domain: str = "",
    server_name: str | None = None,
    token: str = "",
) -> grpc.aio.Channel:
    """A channel to a service of a facility, the caller's own unless `trust_domain` names another.

    `address` is `host:port`, or those of the service's replicas, `host:port,host:port`: each answers its share of the
    calls, and one that cannot, or ends, has its calls answered by another.

    The server is believed by the roots of that facility alone, and must have the name of a facility's services on its
    certificate unless `server_name` says what to expect.

    Failed calls raise BeamwireError. Unary calls end after 15 s unless the call says otherwise; streams have no
    deadline, and end within 8 s of the connection's death. Calls made after a renewal of the credentials use the new
    certificate. With a delegation `token` every call is made with the rights that it hands over. What a stream of
    requests raises, its call raises.
    """
    options: list[tuple[str, Any]] = [
        ("grpc.service_config", json.dumps(service_config())),
        ("grpc.keepalive_time_ms", 5_000),
        ("grpc.keepalive_timeout_ms", 3_000),
        # A service that is back is found within the time that a call is retried, not up to two minutes later.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ]
    expected = server_name or services_name(trust_domain or credentials.identity.trust_domain)
    options.append(("grpc.ssl_target_name_override", expected))
    metadata = ((METADATA_KEY, check_text(token)),) if token else ()
    return _RenewingChannel(address, credentials, trust_domain, options, metadata)


class _RenewingChannel(grpc.aio.Channel):
    """A channel that is made anew when the credentials are, or the roots: grpcio cannot change those of a live one.

    A call that runs keeps the channel it began on, which goes when the last of its calls has ended.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        trust_domain: str,
        options: list[tuple[str, Any]],
        metadata: tuple[tuple[str, str], ...],
    ) -> None:
        self._address = address
        self._credentials = credentials
        self._trust_domain = trust_domain
        self._options = options
        self._metadata = metadata
        self._made_with: tuple[bytes, bytes] = (b"", b"")
        self._alive: WeakSet[grpc.aio.Channel] = WeakSet()
        self._newest = self._current()

    def _current(self) -> grpc.aio.Channel:
        shown = (self._credentials.chain_pem, self._credentials.roots_of(self._trust_domain))
        if shown != self._made_with:
            security = self._credentials.channel_credentials(self._trust_domain)
            self._newest = grpc.aio.secure_channel(target(self._address), security, self._options)
            self._alive.add(self._newest)
            self._made_with = shown
        return self._newest

    def _callable(self, arity: str, deadline: float | None, *description: Any, **registered: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> _Call:
            if kwargs.get("timeout") is None:
                kwargs["timeout"] = deadline
            kwargs["metadata"] = (*(kwargs.get("metadata") or ()), *self._metadata, *telemetry.inject().items())
            channel = self._current()
            method = getattr(channel, arity)(*description, **registered)
            if not (arity.startswith("stream_") and args):
                return _Call(method(*args, **kwargs), channel, self._explain)
            requests = _Requests(*args)
            return _Call(method(requests, **kwargs), channel, self._explain, requests)

        return call

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._callable("unary_unary", DEADLINE, *args, **kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._callable("unary_stream", None, *args, **kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._callable("stream_unary", None, *args, **kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._callable("stream_stream", None, *args, **kwargs)

    def _explain(self, error: grpc.RpcError, channel: grpc.aio.Channel) -> BeamwireError:
        """What a failed call means.

        A server that refuses a certificate closes the connection without a word, so this member looks at its own. One
        that cuts a call whose connection began with a certificate before the present one is to be called again.
        """
        failure = error_from_rpc(error, address=self._address)
        if failure.reason in _OF_A_CERTIFICATE and channel is not self._current():
            story = f"the connection to {self._address} ended with its certificate, which was renewed; call again"
            return BeamwireError(Reason.SERVICE_UNAVAILABLE, story)
        if failure.reason is Reason.SERVICE_UNAVAILABLE:
            try:
                self._credentials.check()
            except BeamwireError as own:
                return own
            if self._trust_domain not in ("", self._credentials.identity.trust_domain):
                return _perhaps_unbelieved(failure, self._trust_domain, self._credentials.identity.trust_domain)
            if _CLOSED in failure.message:
                return _perhaps_superseded(failure, self._credentials.identity)
        return failure

    async def close(self, grace: float | None = None) -> None:
        for channel in list(self._alive):
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


def _perhaps_unbelieved(failure: BeamwireError, callee: str, own: str) -> BeamwireError:
    """A failure to reach another facility, and what it may mean besides: that too closes connections without a word."""
    story = f"{failure.message}, and that {callee} believes {own} (its operator sees that with `beamwire trust list`)"
    return BeamwireError(failure.reason, story, metadata=failure.metadata, retry_after=failure.retry_after)


def _perhaps_superseded(failure: BeamwireError, own: SpiffeId) -> BeamwireError:
    """A connection that the own facility closed, and what it may mean besides: an authority that is trusted no more."""
    story = f"{failure.message}, and that {own.trust_domain} did not rotate its authority meanwhile: if so, enrol again"
    return BeamwireError(failure.reason, story, metadata=failure.metadata, retry_after=failure.retry_after)


class _Requests:
    """The stream of requests of a call, which keeps what it failed with."""

    def __init__(self, given: AsyncIterable[Any] | Iterable[Any]) -> None:
        self._given = given
        self.failure: Exception | None = None

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            if isinstance(self._given, AsyncIterable):
                async for request in self._given:
                    yield request
            else:
                for request in self._given:
                    yield request
        except Exception as error:
            self.failure = error
            raise


class _Call:
    """A call of grpcio whose failure is a BeamwireError. It keeps its channel alive.

    Interceptors of grpcio could do this too; they make a task for each call and cost three times as much.
    """

    def __init__(
        self, call: Any, channel: grpc.aio.Channel, explain: _Explain, requests: _Requests | None = None
    ) -> None:
        self._call = call
        self._channel = channel
        self._explain = explain
        self._requests = requests

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __await__(self) -> Generator[Any, None, Any]:
        try:
            return (yield from self._call.__await__())
        except grpc.aio.AioRpcError as error:
            raise self._explain(error, self._channel) from error
        except asyncio.CancelledError:
            self._check_cancelled()
            raise

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for answer in self._call:
                yield answer
        except grpc.aio.AioRpcError as error:
            raise self._explain(error, self._channel) from error
        except asyncio.CancelledError:
            self._check_cancelled()
            raise
        finally:
            self._call.cancel()

    def _check_cancelled(self) -> None:
        """Raise why grpcio has cancelled the call, if it was not the caller.

        It does so if a stream of requests fails, or the connection in the instant in which such a stream ends.
        """
        task = asyncio.current_task()
        if self._requests is None or (task is not None and task.cancelling()):
            return
        if self._requests.failure is not None:
            raise self._requests.failure
        raise BeamwireError(Reason.SERVICE_UNAVAILABLE, "the connection ended while the call was made; call again")
