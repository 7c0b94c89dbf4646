"""A cache that does what a test says: the other side of acknowledged connections, over real sockets."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final

from beamwire.mesh.errors import Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.bundle import frames
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.frame import Frame, decode
from beamwire.mesh.stream.link import Link
from beamwire.mesh.stream.sockets import PAIR, Connection, PlainConnection, tune
from beamwire.mesh.stream.tls import TlsConnection
from beamwire.mesh.stream.writer import FrameWriter
from beamwire.stream.v1.frame_pb2 import (
    FRAME_KIND_BUNDLE,
    FRAME_KIND_DATA,
    FRAME_KIND_END,
    FRAME_KIND_HEADER,
    FrameHeader,
    StreamHeader,
)
from beamwire.stream.v1.link_pb2 import Acknowledgement, Credit, Hello, Refusal, Signal, Welcome

HEADER: Final = StreamHeader(buffer="buffers/b0", producer_count=1)
WAIT: Final = 30.0


def place(length: int) -> memoryview:
    """Memory for a frame."""
    return memoryview(bytearray(length))


class Peer:
    """The cache's side of one connection, after the greetings."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.hello = Hello()

    def receive(self) -> Signal | Frame | None:
        """The next message that is not a heartbeat; a frame is checked."""
        while True:
            message = self.link.receive(place)
            if isinstance(message, memoryview):
                return decode(message)
            if message is None or not message.HasField("heartbeat"):
                return message

    def frames(self, count: int) -> list[Frame]:
        """So many DATA frames; bundles are split."""
        got: list[Frame] = []
        while len(got) < count:
            frame = self.receive()
            assert isinstance(frame, Frame), frame
            if frame.header.kind == FRAME_KIND_BUNDLE:
                got += frames(frame.header, frame.payload)
            elif frame.header.kind == FRAME_KIND_DATA:
                got.append(frame)
            else:
                raise AssertionError(f"a frame of kind {frame.header.kind} came")
        assert len(got) == count
        return got

    def header(self) -> StreamHeader:
        """HEADER, which must come now."""
        frame = self.receive()
        assert isinstance(frame, Frame)
        assert (frame.header.kind, frame.header.sequence) == (FRAME_KIND_HEADER, 0)
        return frame.header.stream

    def end(self) -> Frame:
        """END, which must come now."""
        frame = self.receive()
        assert isinstance(frame, Frame)
        assert frame.header.kind == FRAME_KIND_END
        return frame

    def welcome(self, *, pulse: float = 2.0, **options: Any) -> None:
        """Let the peer in. Who is not heard for four pulses, in seconds, is taken for dead, by either side."""
        welcome = Welcome(**{"epoch": 1, "credit": Credit(size_bytes=2**26), **options})
        welcome.heartbeat_interval.FromMilliseconds(round(1000 * pulse))
        welcome.frame_lease.FromSeconds(300)
        self.link.send_signal(Signal(welcome=welcome))
        self.link.set_pulse(pulse)

    def acknowledge(self, sequence: int) -> None:
        """To a producer: all up to this sequence is stored."""
        self.link.send_signal(Signal(acknowledgement=Acknowledgement(sequence=sequence)))

    def acknowledged(self) -> Acknowledgement:
        """From a consumer: an acknowledgement, which must come now."""
        message = self.receive()
        assert isinstance(message, Signal), message
        assert message.HasField("acknowledgement"), message
        return message.acknowledgement

    def acknowledged_up_to(self, count: int) -> None:
        """From a consumer: acknowledgements, until so many deliveries are."""
        while self.acknowledged().delivery_count < count:
            pass

    def refuse(self, reason: Reason, message: str, *, retry: bool = False) -> None:
        """Send the peer away."""
        self.link.send_signal(Signal(refusal=Refusal(reason=int(reason), message=message, retry=retry)))  # type: ignore[arg-type]

    def deliver(self, *messages: bytes) -> None:
        """Send messages, each with its length in front."""
        self.link.send(memoryview(b"".join(messages)))

    def describe(self) -> None:
        """To a consumer: HEADER."""
        header = FrameHeader(epoch=1, kind=FRAME_KIND_HEADER, stream=HEADER)
        self.deliver(bytes(FrameWriter().encode(header)))

    def die(self) -> None:
        """Be gone so that the other side sees that it was not in good order."""
        self.link.abort_on_close()

    def finish(self) -> None:
        """Close as a cache does after END; the other side closes too."""
        self.link.finish()


class ScriptedCache:
    """Each connection is given to the next of the scripts."""

    def __init__(self, credentials: Credentials | None = None) -> None:
        self.credentials = credentials
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.connect = ConnectString(
            (self.listener.getsockname(),), "b0", 1, "tls+tcp" if credentials is not None else "tcp"
        )
        self.pool = ThreadPoolExecutor(8)
        self.links: list[Link] = []
        self.served = 0

    def play(self, *scripts: Callable[[Peer], Any]) -> Future[list[Any]]:
        """One connection after another; the results, in a future. What a script raises, it raises."""
        return self.pool.submit(lambda: [self.serve(script) for script in scripts])

    def serve(self, script: Callable[[Peer], Any]) -> Any:
        """Play a script with the next one who dials."""
        self.listener.settimeout(WAIT)
        sock, _ = self.listener.accept()
        tune(sock)
        sock.settimeout(WAIT)
        if self.credentials is None:
            connection: Connection = PlainConnection(sock)
        else:
            context = self.credentials.server_context()
            connection = TlsConnection(context.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False))
        link = Link(connection)
        self.links.append(link)
        try:
            assert connection.receive_greeting() == PAIR
            connection.send_greeting(PAIR)
            peer = Peer(link)
            hello = link.receive(place)
            assert isinstance(hello, Signal)
            peer.hello = hello.hello
            assert peer.hello.version == 1
            assert len(peer.hello.instance) == 32
            self.served += 1
            return script(peer)
        finally:
            link.close()

    def vanish(self) -> None:
        """Listen no more; ends `serve` in another thread too."""
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def close(self) -> None:
        """End all connections."""
        self.vanish()
        for link in self.links:
            link.interrupt()
        self.pool.shutdown()
