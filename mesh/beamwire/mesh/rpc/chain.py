"""The one chain that every call passes at the server: admission, telemetry, errors, access, fields, idempotency."""

from __future__ import annotations

import inspect
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias, cast

import grpc
from google.protobuf.message import Message
from opentelemetry import trace
from opentelemetry.trace import SpanKind

from beamwire.mesh import telemetry
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.delegation import METADATA_KEY
from beamwire.mesh.rpc import access, fields
from beamwire.mesh.rpc.admission import Admission
from beamwire.mesh.rpc.facts import CallFacts, Context
from beamwire.mesh.rpc.limits import CallLimits
from beamwire.mesh.rpc.live import Kind, LiveCall, LiveCalls
from beamwire.mesh.rpc.status import Refusal
from beamwire.mesh.rpc.turns import Turns

if TYPE_CHECKING:  # its database stays out of programs that only call
    from beamwire.mesh.idempotency import Idempotency

_log = logging.getLogger(__name__)

# What a method was given to be answered by; grpcio types the handlers of its two servers alike.
Handler: TypeAlias = Any
# What answers a call once it is let in.
Work = Callable[[Context], Awaitable[Any]]

_TRACEPARENT: Final = "traceparent"
_HEALTH: Final = "grpc.health.v1.Health"
_DRAINING: Final = Refusal.of(
    BeamwireError(Reason.DRAINING, "the service is ending; call again, and another replica or its successor answers")
)
_ENDED: Final = BeamwireError(
    Reason.DRAINING, "the service is ending; begin again where this ended, with the last etag of a watch"
)
_UNFINISHED: Final = BeamwireError(
    Reason.DRAINING, "the service ended before the call was answered; look what became of it before calling again"
)


@dataclass(frozen=True, slots=True)
class _Method:
    """What the chain has to know of a method.

    Args:
        path: `/package.Service/Method`.
        stream: whether it takes or gives a stream, or may wait for what it answers, and so has its place among streams.
        kind: what becomes of a call of it when the service is to end.
        asks: whether it answers once and has no request id, as what only reads: if it succeeds, it begins no trace.
        repeatable: whether it may be called again although it may have been carried out: it has a request id, or needs
            none by the contract.
    """

    path: str
    stream: bool
    kind: Kind
    asks: bool
    repeatable: bool

    @classmethod
    def of(cls, path: str, handler: Handler) -> _Method:
        descriptor = access.find_method(path)
        fields = descriptor.input_type.fields_by_name if descriptor is not None else {}
        identified, waits = "request_id" in fields, "ready_timeout" in fields
        stream = bool(handler.request_streaming or handler.response_streaming)
        kind = Kind.LASTING if handler.response_streaming or waits else Kind.ANSWERED_ONCE
        if path.startswith(f"/{_HEALTH}/"):
            kind = Kind.WATCHING
        asks = not stream and not identified
        return cls(path, stream or waits, kind, asks, asks or identified)

    @property
    def always(self) -> bool:
        """Whether it is answered at any time, however many calls there are: health checks."""
        return self.kind is Kind.WATCHING and not self.stream


class Chain(grpc.GenericRpcHandler):
    """Wraps the handler of each method once, in everything that happens around a call.

    `gate` says who calls, `limits` how many calls are answered at a time. `anonymous` is the enrolment listener:
    callers show no certificate, and reach only the methods that allow that.

    It stands in for the server to which generated code adds its methods. As one generic handler, it costs a call less
    than an interceptor does, and less than methods that are registered with the server, over all of which that waits.
    """

    def __init__(
        self,
        gate: access.Gate,
        idempotency: Mapping[str, Idempotency],
        *,
        anonymous: bool = False,
        limits: CallLimits | None = None,
    ) -> None:
        self._gate = gate
        self._idempotency = idempotency
        self._anonymous = anonymous
        self._handlers: dict[str, Handler] = {}
        self._admission = Admission(limits or CallLimits())
        self._turns = Turns()
        self._draining = False
        self.live = LiveCalls()

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """Take the methods of a service."""
        for name, handler in handlers.items():
            path = f"/{service}/{name}"
            self._handlers[path] = self._wrap(_Method.of(path, handler), handler)

    def add_generic_rpc_handlers(self, handlers: Iterable[object]) -> None:
        """Nothing: generated code adds everything in both ways."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """The wrapped handler of a method; None, which gRPC answers with UNIMPLEMENTED, if it has none."""
        return self._handlers.get(handler_call_details.method)

    async def drain(self, grace: float) -> None:
        """Refuse new calls and end what streams answers, with DRAINING; what answers once has some seconds to end."""
        self._draining = True
        self.live.cut(_ENDED, Kind.LASTING)
        await self.live.answered(grace)
        self.live.cut(_UNFINISHED, Kind.ANSWERED_ONCE)
        self.live.cut(_ENDED, Kind.WATCHING)

    def _wrap(self, method: _Method, handler: Handler) -> Handler:
        # Whatever a method takes, gRPC is told that it takes a stream: nothing is read before the chain says so.
        if handler.unary_unary:
            return grpc.stream_unary_rpc_method_handler(self._once(method, self._unary(method, handler)))
        if handler.unary_stream:
            call = self._once(method, _answering(handler))
            return grpc.stream_stream_rpc_method_handler(call, response_serializer=handler.response_serializer)
        codec: dict[str, Any] = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._streamed(method, _taking(handler)), **codec)
        return grpc.stream_stream_rpc_method_handler(self._streamed(method, _conversing(handler)), **codec)

    def _unary(self, method: _Method, handler: Handler) -> Work:
        parse, write, answer = handler.request_deserializer, handler.response_serializer, handler.unary_unary
        idempotent = self._idempotent(method, handler)
        turns = self._turns

        async def work(context: Context) -> bytes:
            raw = await _read(context)
            if turns.needed:
                await turns.mine(access.current_caller().id)
            begun = time.monotonic()
            try:
                request = parse(raw)
                fields.apply(request)
                if idempotent is not None:
                    return await idempotent(request, context)
                answered: bytes = write(await answer(request, context))
                return answered
            finally:
                turns.answered(begun)

        return work

    def _idempotent(self, method: _Method, handler: Handler) -> Callable[[Any, Context], Awaitable[bytes]] | None:
        descriptor = access.find_method(method.path)
        if descriptor is None or "request_id" not in descriptor.input_type.fields_by_name:
            return None
        store = self._idempotency.get(descriptor.containing_service.full_name)
        write, answer = handler.response_serializer, handler.unary_unary

        async def call(request: Any, context: Context) -> bytes:
            if request.request_id:
                _check_uuid(request.request_id)
            facts = CallFacts(context)

            async def action() -> bytes:
                answered: bytes = write(await answer(request, facts))
                return answered

            # A rehearsal changes nothing, so it must not use up the id of the call it rehearses.
            if store is None or getattr(request, "validate_only", False):
                return await action()
            body = request.SerializeToString(deterministic=True)
            return await store.run(str(access.current_caller()), method.path, request.request_id, body, action)

        return call

    # What gRPC is given are functions and no partials of methods: it asks at each call, twice, whether they are
    # coroutine functions, which it finds out much faster of a function.

    def _once(self, method: _Method, work: Work) -> Callable[[object, Context], Awaitable[Any]]:
        async def call(_requests: object, context: Context) -> Any:
            return await self._answer(method, work, context)

        return call

    def _streamed(
        self, method: _Method, work: Callable[[AsyncIterator[Message], Context], Awaitable[Any]]
    ) -> Callable[[AsyncIterator[Message], Context], Awaitable[Any]]:
        async def call(requests: AsyncIterator[Message], context: Context) -> Any:
            return await self._answer(method, partial(work, requests), context)

        return call

    async def _answer(self, method: _Method, work: Work, context: Context) -> Any:
        begun, traced = time.time_ns(), False
        caller: access.Caller | None = None
        parent, token = _carried(context)
        self._turns.arrived()
        try:
            if self._draining and method.kind is not Kind.WATCHING:
                return await _send(context, _DRAINING)
            connection = {} if self._anonymous else context.auth_context()
            caller = self._identify(connection, token)
            places = None if method.always else self._admission.places(caller, stream=method.stream)
            if places is not None and (self._full(method, caller) or not places.enter(caller.id)):
                return await _send(context, places.refusal(caller.id))
            check = partial(self._check, method, connection, token)
            try:
                with LiveCall(self.live, check, method.kind):
                    access.admit(method.path, caller)
                    if method.asks and not parent:
                        return await work(context)
                    traced = True
                    with _span(method, caller, parent):
                        return await _explained(method, work(context))
            finally:
                if places is not None:
                    places.leave(caller.id)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            failure = error if traced else _recorded(method, caller, parent, begun, error)
            await _send(context, _refusal(method, failure))

    def _full(self, method: _Method, caller: access.Caller) -> bool:
        return not method.stream and self._turns.full(caller.id)

    def _identify(self, connection: Mapping[str, Iterable[bytes]], token: str) -> access.Caller:
        return access.ANONYMOUS if self._anonymous else self._gate.identify(connection, token)

    def _check(self, method: _Method, connection: Mapping[str, Iterable[bytes]], token: str) -> None:
        access.check_method(method.path, self._identify(connection, token))


def _answering(handler: Handler) -> Work:
    """Reads one request and streams answers."""
    parse, answer = handler.request_deserializer, handler.unary_stream

    async def work(context: Context) -> None:
        request = parse(await _read(context))
        fields.apply(request)
        await _write(answer(request, context), context)

    return work


def _taking(handler: Handler) -> Callable[[AsyncIterator[Message], Context], Awaitable[Any]]:
    """Reads requests, the first of which says what they are about, and answers once."""
    answer = handler.stream_unary

    async def work(requests: AsyncIterator[Message], context: Context) -> Any:
        return await answer(_first_checked(requests), context)

    return work


def _conversing(handler: Handler) -> Callable[[AsyncIterator[Message], Context], Awaitable[None]]:
    """Reads requests and streams answers."""
    answer = handler.stream_stream

    async def work(requests: AsyncIterator[Message], context: Context) -> None:
        await _write(answer(requests, context), context)

    return work


async def _first_checked(requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
    first = True
    async for request in requests:
        if first:
            fields.apply(request)
            first = False
        yield request


async def _read(context: Context) -> bytes:
    request: Any = await context.read()
    if request is grpc.aio.EOF:
        raise BeamwireError(Reason.INVALID_FIELD, "the call came without a request")
    read: bytes = request
    return read


async def _write(answers: AsyncGenerator[Message, None] | Awaitable[None], context: Context) -> None:
    if not inspect.isasyncgen(answers):
        # A handler that writes to the context itself, as the health service of grpcio does.
        await cast("Awaitable[None]", answers)
        return
    # grpcio would drop the generator of a cancelled call without closing it.
    async with aclosing(answers):
        async for answer in answers:
            try:
                await context.write(answer)
            except grpc.aio.InternalError:
                # The call ended in this moment, which is told by cancelling this task a moment later.
                return


def _check_uuid(request_id: str) -> None:
    try:
        canonical = str(uuid.UUID(request_id))
    except ValueError:
        canonical = ""
    if canonical != request_id.lower():
        raise invalid_field("request_id", f"must be a UUID such as {uuid.uuid4()}")


def _carried(context: Context) -> tuple[str, str]:
    """The trace that a call belongs to, and the delegation token that came with it."""
    parent = token = ""
    for key, value in context.invocation_metadata() or ():
        if key == _TRACEPARENT and isinstance(value, str):
            parent = value
        elif key == METADATA_KEY and isinstance(value, str):
            token = value
    return parent, token


def _span(
    method: _Method, caller: access.Caller | None, parent: str, begun: int | None = None
) -> AbstractContextManager[trace.Span]:
    return telemetry.span(
        telemetry.SPAN_RPC_SERVER,
        parent=parent or None,
        attributes={telemetry.ATTR_RPC_METHOD: method.path.removeprefix("/"), telemetry.ATTR_CALLER: str(caller or "")},
        kind=SpanKind.SERVER,
        begun=begun,
    )


async def _explained(method: _Method, work: Awaitable[Any]) -> Any:
    try:
        return await work
    except grpc.aio.AbortError:
        raise
    except Exception as error:
        raise _explain(method, error) from error.__cause__


def _recorded(
    method: _Method, caller: access.Caller | None, parent: str, begun: int, error: Exception
) -> BeamwireError:
    """What the caller is told of a failure for which there was no span; it gets one now."""
    try:
        with _span(method, caller, parent, begun):
            raise _explain(method, error)
    except BeamwireError as failure:
        return failure
    raise AssertionError("a span swallows nothing")


def _explain(method: _Method, error: Exception) -> BeamwireError:
    """What the caller is told; for a fault of ours, INTERNAL: its details go to the log, never to the wire."""
    if not isinstance(error, BeamwireError):
        _log.error("%s failed", method.path, exc_info=error)
        error = BeamwireError(
            Reason.INTERNAL,
            "the service has a fault; its log says more under the trace id in the metadata",
            metadata={"trace_id": telemetry.trace_id_of(telemetry.current_traceparent())},
        )
    trace.get_current_span().set_attribute(telemetry.ATTR_REASON, error.reason.name)
    return error


def _refusal(method: _Method, failure: Exception) -> Refusal:
    assert isinstance(failure, BeamwireError), "what is not was explained"
    refusal = Refusal.of(failure)
    return refusal.final() if failure is _UNFINISHED and not method.repeatable else refusal


async def _send(context: Context, refusal: Refusal) -> NoReturn:
    await context.abort(refusal.code, refusal.message, tuple(refusal.trailers.items()))
