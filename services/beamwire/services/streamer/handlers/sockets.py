"""Sends over plain ZeroMQ or NNG sockets, to consumers that exist: without identities, accounts or END."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, Literal, Protocol
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer.components import ComponentParameters, Message, StreamInfo
from beamwire.services.streamer.handlers.buffer import GetCredentials
from beamwire.services.streamer.handlers.files import FrameMaker

_MESSAGES_AHEAD: Final = 4


def _url(value: str) -> str:
    parts = urlsplit(value)
    try:
        fits = parts.scheme in ("tcp", "ipc") and (parts.scheme == "ipc" or parts.port is not None)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{value!r} is no address of a socket; tcp://host:5555 and ipc:///path are")
    return value


class BinaryDataStreamingDataHandler:
    """LCLStreamer's socket: each message goes to one of those who read.

    Where a configuration comes with a request, the buffer of the transfer takes its place. By itself it opens the
    socket that it asks for.
    """

    replaced_by = "BufferDataHandler"

    class Parameters(ComponentParameters):
        """LCLStreamer's parameters, and how long it waits for somebody who reads.

        As a `client` it dials all urls, as a `server` it listens on them; with `distribute` rank i takes only url
        i mod n of n. `buffer` is the number of messages that may wait in the socket, 0 the default.
        """

        urls: Annotated[list[Annotated[str, AfterValidator(_url)]], Field(min_length=1)]
        role: Literal["client", "server"] = "client"
        library: Literal["zmq", "nng"] = "zmq"
        socket_type: Literal["push"] = "push"
        distribute: bool = False
        buffer: Annotated[int, Field(ge=0)] = 0
        timeout: Annotated[float, Field(gt=0)] = 60.0

    def __init__(self, parameters: BinaryDataStreamingDataHandler.Parameters, credentials: GetCredentials) -> None:
        del credentials
        self._parameters = parameters
        self._socket: _Socket | None = None
        self._frames = FrameMaker()

    def open(self, info: StreamInfo) -> None:
        """Opens the socket; BeamwireError UNSUPPORTED without its library, SERVICE_UNAVAILABLE if it cannot listen."""
        urls = self._parameters.urls
        if self._parameters.distribute:
            urls = [urls[info.share.rank % len(urls)]]
        self._frames.producer = info.share.rank
        opens: Callable[..., _Socket] = _ZeroMQ if self._parameters.library == "zmq" else _Nng
        self._socket = opens(urls, self._parameters)

    def send(self, message: Message) -> None:
        """Sends it to one peer; BeamwireError TIMED_OUT if nobody takes it in `timeout` seconds."""
        assert self._socket is not None
        data = self._frames.frame(message) if message.data is None else message.data
        self._socket.send(data)

    def skip(self, cause: account_pb2.LossCause.ValueType, count: int = 1) -> None:
        """Plain sockets have no account."""

    def end(self, cause: account_pb2.EndCause.ValueType, detail: str = "") -> None:
        """Waits until the peers have taken everything, and closes; after a bad end it just closes."""
        if self._socket is not None:
            self._socket.close(drain=cause == account_pb2.END_CAUSE_DONE)


class _Socket(Protocol):
    def send(self, data: bytes | memoryview) -> None: ...

    def close(self, *, drain: bool) -> None: ...


class _ZeroMQ:
    """PUSH of ZeroMQ. It takes messages only for peers that are connected, so that none waits for nobody."""

    def __init__(self, urls: Sequence[str], parameters: BinaryDataStreamingDataHandler.Parameters) -> None:
        self._zmq: Any = _library("zmq", "pyzmq", "bridges")
        self._urls = urls
        self._timeout = parameters.timeout
        self._context = self._zmq.Context()
        self._socket = self._context.socket(self._zmq.PUSH)
        self._socket.set(self._zmq.IMMEDIATE, 1)
        self._socket.set(self._zmq.SNDHWM, parameters.buffer or _MESSAGES_AHEAD)
        self._socket.set(self._zmq.SNDTIMEO, round(1000 * self._timeout))
        for url in urls:
            if parameters.role == "client":
                self._socket.connect(url)
                continue
            try:
                self._socket.bind(url)
            except self._zmq.ZMQError as error:
                self.close(drain=False)
                raise _cannot_listen(url, error) from None

    def send(self, data: bytes | memoryview) -> None:
        try:
            self._socket.send(data)
        except self._zmq.Again:
            raise _nobody(self._urls, self._timeout) from None

    def close(self, *, drain: bool) -> None:
        self._socket.close(linger=-1 if drain else 0)
        # Returns when the last byte is with the kernel, which may be never.
        term = threading.Thread(target=self._context.term, name="zeromq term", daemon=True)
        term.start()
        term.join(self._timeout)
        if term.is_alive():
            raise _nobody(self._urls, self._timeout)


class _Nng:
    """PUSH of NNG, spoken by ourselves: NNG itself would throw away what it has not sent when it closes."""

    def __init__(self, urls: Sequence[str], parameters: BinaryDataStreamingDataHandler.Parameters) -> None:
        from beamwire.mesh.stream.push_socket import PushSocket

        self._urls = urls
        self._timeout = parameters.timeout
        places = [_place(url) for url in urls]
        try:
            self._socket = PushSocket(places, listen=parameters.role == "server")
        except OSError as error:
            raise _cannot_listen(", ".join(urls), error) from None

    def send(self, data: bytes | memoryview) -> None:
        try:
            self._socket.send(memoryview(data), self._timeout)
        except TimeoutError:
            raise _nobody(self._urls, self._timeout) from None

    def close(self, *, drain: bool) -> None:
        try:
            if drain:
                self._socket.drain(self._timeout)
        except OSError as error:
            raise BeamwireError(
                Reason.TIMED_OUT, f"a reader of {', '.join(self._urls)} did not take everything ({error})"
            ) from None
        finally:
            self._socket.close()


def _place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.scheme != "tcp" or parts.port is None:
        raise BeamwireError(Reason.UNSUPPORTED, f"config.data_handlers: library nng has tcp:// only here, not {url}")
    return "0.0.0.0" if parts.hostname in (None, "*") else str(parts.hostname), parts.port


def _library(name: str, package: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise BeamwireError(
            Reason.UNSUPPORTED,
            f"config.data_handlers: needs {package}, which is not installed here: `pip install beamwire[{extra}]`",
        ) from None


def _cannot_listen(url: str, error: Exception) -> BeamwireError:
    return BeamwireError(Reason.SERVICE_UNAVAILABLE, f"config.data_handlers: nobody can listen on {url} here ({error})")


def _nobody(urls: Sequence[str], seconds: float) -> BeamwireError:
    where = ", ".join(urls)
    return BeamwireError(Reason.TIMED_OUT, f"nobody took a message at {where} for {seconds:g} s; is a consumer there?")
