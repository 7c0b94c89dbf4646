"""The one chain that every call passes at the server: telemetry, errors, access, fields, idempotency."""

from __future__ import annotations

import inspect
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, aclosing, nullcontext
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, cast

import grpc
from google.protobuf import message_factory
from google.protobuf.message import Message
from opentelemetry import trace
from opentelemetry.trace import SpanKind

from beamwire.mesh import telemetry
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.delegation import METADATA_KEY
from beamwire.mesh.rpc import access, fields
from beamwire.mesh.rpc.live import LiveCalls
from beamwire.mesh.rpc.status import CODES, DETAILS_KEY, to_status

if TYPE_CHECKING:  # its database stays out of programs that only call
    from beamwire.mesh.idempotency import Idempotency

_log = logging.getLogger(__name__)

# grpcio is generic in its stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
# grpcio types the handlers of its two servers alike, so the kind of context is lost.
UnaryHandler = Callable[[Any, Any], Awaitable[Any]]
StreamHandler = Callable[[Any, Any], Any]


class Chain(grpc.aio.ServerInterceptor):
    """Wraps the handler of each method once, in everything that happens around a call.

    `gate` says who calls. `anonymous` is the enrolment listener: callers show no certificate, and reach only the
    methods that allow that.
    """

    def __init__(self, gate: access.Gate, idempotency: Mapping[str, Idempotency], *, anonymous: bool = False) -> None:
        self._gate = gate
        self._idempotency = idempotency
        self._anonymous = anonymous
        self._wrapped: dict[str, Handler] = {}
        self.live = LiveCalls()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The wrapped handler of a method; None, which gRPC answers with UNIMPLEMENTED, if it has none."""
        method = handler_call_details.method
        known = self._wrapped.get(method)
        if known is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            known = self._wrapped[method] = self._wrap(method, handler)
        return known

    def _wrap(self, method: str, handler: Handler) -> Handler:
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), **codec)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._stream(method, handler.unary_stream), **codec)
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(self._stream(method, handler.stream_stream), **codec)
        raise TypeError(f"{method}: no service of ours takes a stream and answers once")

    def _unary(self, method: str, handler: UnaryHandler) -> UnaryHandler:
        handler = self._idempotent(method, handler)

        async def call(request: Message, context: Context) -> Any:
            try:
                with _span(method, context), _Faults(method), self._admitted(method, context):
                    fields.apply(request)
                    return await handler(request, context)
            except BeamwireError as error:
                failure = error
            return await _abort(context, failure)

        return call

    def _stream(self, method: str, handler: StreamHandler) -> StreamHandler:
        # The wrapper writes to the context and is no generator itself: grpcio drops the generator of a cancelled call
        # without closing it, and the span would end in a foreign context, at some other time.
        async def call(request: Message | AsyncIterator[Message], context: Context) -> None:
            try:
                with _span(method, context), _Faults(method), self._admitted(method, context):
                    if isinstance(request, Message):
                        fields.apply(request)
                    await _write(handler(request, context), context)
                    return
            except BeamwireError as error:
                failure = error
            await _abort(context, failure)

        return call

    def _admitted(self, method: str, context: Context) -> AbstractContextManager[None]:
        """Let the caller in, or refuse; to be entered as long as the call lasts."""
        if self._anonymous:
            trace.get_current_span().set_attribute(telemetry.ATTR_CALLER, str(access.ANONYMOUS))
            access.admit(method, access.ANONYMOUS)
            return nullcontext()
        connection, token = context.auth_context(), _token(context)
        caller = self._gate.identify(connection, token)
        trace.get_current_span().set_attribute(telemetry.ATTR_CALLER, str(caller))
        access.admit(method, caller)
        return self.live.entered(
            lambda: copy_context().run(access.admit, method, self._gate.identify(connection, token))
        )

    def _idempotent(self, method: str, handler: UnaryHandler) -> UnaryHandler:
        descriptor = access.find_method(method)
        if descriptor is None or "request_id" not in descriptor.input_type.fields_by_name:
            return handler
        store = self._idempotency.get(descriptor.containing_service.full_name)
        response_class = message_factory.GetMessageClass(descriptor.output_type)

        async def call(request: Any, context: Context) -> Any:
            if request.request_id:
                _check_uuid(request.request_id)
            # A rehearsal changes nothing, so it must not use up the id of the call it rehearses.
            if store is None or getattr(request, "validate_only", False):
                return await handler(request, context)

            async def action() -> bytes:
                response: Message = await handler(request, context)
                return response.SerializeToString()

            body = request.SerializeToString(deterministic=True)
            answer = await store.run(str(access.current_caller()), method, request.request_id, body, action)
            return response_class.FromString(answer)

        return call


def _check_uuid(request_id: str) -> None:
    try:
        canonical = str(uuid.UUID(request_id))
    except ValueError:
        canonical = ""
    if canonical != request_id.lower():
        raise invalid_field("request_id", f"must be a UUID such as {uuid.uuid4()}")


def _token(context: Context) -> str:
    return _metadata(context, METADATA_KEY) or ""


def _metadata(context: Context, key: str) -> str | None:
    return next((v for k, v in context.invocation_metadata() or () if k == key and isinstance(v, str)), None)


def _span(method: str, context: Context) -> Any:
    return telemetry.span(
        telemetry.SPAN_RPC_SERVER,
        parent=_metadata(context, "traceparent"),
        attributes={telemetry.ATTR_RPC_METHOD: method.removeprefix("/")},
        kind=SpanKind.SERVER,
    )


async def _write(answers: AsyncGenerator[Message, None] | Awaitable[None], context: Context) -> None:
    if not inspect.isasyncgen(answers):
        # A handler that writes to the context itself, as the health service of grpcio does.
        await cast("Awaitable[None]", answers)
        return
    async with aclosing(answers):
        async for answer in answers:
            await context.write(answer)


class _Faults:
    """Turns every exception that is not ours into INTERNAL: its details go to the log, never to the wire."""

    def __init__(self, method: str) -> None:
        self._method = method

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, BeamwireError):
            trace.get_current_span().set_attribute(telemetry.ATTR_REASON, error.reason.name)
        if not isinstance(error, Exception) or isinstance(error, BeamwireError | grpc.aio.AbortError):
            return
        _log.error("%s failed", self._method, exc_info=error)
        raise BeamwireError(
            Reason.INTERNAL,
            "the service has a fault; its log says more under the trace id in the metadata",
            metadata={"trace_id": telemetry.trace_id_of(telemetry.current_traceparent())},
        ) from error


async def _abort(context: Context, error: BeamwireError) -> NoReturn:
    status = to_status(error)
    await context.abort(CODES[error.reason], status.message, ((DETAILS_KEY, status.SerializeToString()),))
