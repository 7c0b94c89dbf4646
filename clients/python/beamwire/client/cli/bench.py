"""`beamwire bench`: what a user gets between two processes, through a buffer."""

from __future__ import annotations

import json
import multiprocessing
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import click

from beamwire.buffer.v1.buffer_service_pb2 import Buffer, BufferSpec
from beamwire.client.cli.benchpeers import Measured, Peer, pull, push
from beamwire.client.cli.context import Cli, Command, pass_cli
from beamwire.client.cli.display import choose_display
from beamwire.client.cli.progress import Meter
from beamwire.client.cli.push import own_buffer
from beamwire.client.cli.sizes import Size
from beamwire.client.cli.text import aligned, duration, size
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.stream.connect import ConnectString, spell

_LEAST_CAPACITY = 64 * 2**20
_STOP_SECONDS = 10.0


@click.command(cls=Command)
@click.argument("connect_text", metavar="[CONNECT]", required=False)
@click.option("--local", is_flag=True, help="Use a cache on this machine, without TLS and without a facility.")
@click.option("--size", "frame_bytes", type=Size(), default="1Mi", show_default=True, help="Bytes of a frame.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="How long to measure.")
@click.option(
    "--via", type=click.Choice(["data", "grpc"]), default="data", help="Read from the cache, or through the facility."
)
@pass_cli
def bench(cli: Cli, connect_text: str | None, local: bool, frame_bytes: int, seconds: float, via: str) -> None:
    """Measure rate and latency between two processes of this machine, through a buffer.

    The buffer is CONNECT, one on this machine (--local), or one that is made at the facility for that. First frames are
    sent as fast as they are taken; then, at a quarter of that rate, their latency is measured.
    """
    if local and (connect_text or via == "grpc"):
        raise invalid_field("local", "a cache of this machine's own has no facility; leave out CONNECT and --via")
    with ExitStack() as stack:
        connect = _buffer(cli, stack, connect_text, local=local, frame_bytes=frame_bytes)
        config_dir = None if local else cli.config
        peer = Peer(str(connect), config_dir, cli.facility, frame_bytes, seconds, via)
        measured = _measure(cli, peer)
    _report(cli, connect, peer, measured)


def _buffer(cli: Cli, stack: ExitStack, text: str | None, *, local: bool, frame_bytes: int) -> ConnectString:
    capacity = max(_LEAST_CAPACITY, 16 * frame_bytes)
    if local:
        return stack.enter_context(_local_cache(capacity))
    if text:
        return ConnectString.parse(text)
    client = stack.enter_context(cli.client())
    buffer: Buffer = stack.enter_context(own_buffer(client, BufferSpec(capacity_bytes=capacity, producer_count=1)))
    return ConnectString.parse(buffer.connect_string)


@contextmanager
def _local_cache(capacity: int) -> Iterator[ConnectString]:
    """A cache process of this machine's own; ends with the block."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="beamwire-bench-") as name:
        directory = Path(name)
        settings = {"buffer": "bench", "transport": "tcp", "port": port, "capacity_bytes": capacity}
        (directory / "cache.json").write_text(json.dumps(settings))
        command = [sys.executable, "-m", "beamwire.services.buffer.cache", name]
        with (directory / "log").open("wb") as log:
            # In a session of its own: Ctrl-C is for us, and we end it.
            process = subprocess.Popen(command, stderr=log, start_new_session=True)
        try:
            _await_listener(process, port, directory / "log")
            yield ConnectString((("127.0.0.1", port),), "bench", 1, "tcp")
        finally:
            process.kill()
            process.wait()


def _await_listener(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _STOP_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise BeamwireError(
        Reason.LAUNCH_FAILED, "no cache can be started here", metadata={"log": log.read_text(errors="replace")}
    )


@dataclass(slots=True)
class _Side:
    """One of the two processes, and the last it said."""

    process: Any
    connection: Any
    measured: Measured | None = None


def _measure(cli: Cli, peer: Peer) -> tuple[Measured, Measured]:
    """Run the two processes; what the one that sends and the one that reads have measured."""
    # Not forked: this process has threads, of gRPC too.
    context = multiprocessing.get_context("spawn")
    taken = context.Value("Q", 0)
    sides: list[_Side] = []
    try:
        for target in (push, pull):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=target, args=(peer, taken, theirs), daemon=True)
            process.start()
            theirs.close()
            sides.append(_Side(process, ours))
        _follow(cli, sides)
        return sides[0].measured or Measured(), sides[1].measured or Measured()
    finally:
        for side in sides:
            side.process.terminate()
            side.process.join(_STOP_SECONDS)
            side.connection.close()


def _follow(cli: Cli, sides: Sequence[_Side]) -> None:
    """Show progress until both sides are done; raises what the first that failed has raised."""
    meter = Meter()
    waiting = {side.connection: side for side in sides}
    with choose_display(cli) as display:
        while waiting:
            for connection in wait(list(waiting), timeout=display.interval):
                side = waiting[connection]
                try:
                    said = side.connection.recv()
                except EOFError:
                    side.process.join(_STOP_SECONDS)
                    raise BeamwireError(
                        Reason.INTERNAL, f"a process of the measurement ended with {side.process.exitcode}"
                    ) from None
                if isinstance(said, BaseException):
                    raise said
                side.measured = said
                if said.done:
                    del waiting[connection]
            read = sides[1].measured or Measured()
            display.show(meter.snapshot(time.monotonic(), None, events=read.frames, bytes_=read.bytes))


def _report(cli: Cli, connect: ConnectString, peer: Peer, measured: tuple[Measured, Measured]) -> None:
    sent, read = measured
    where = f"{connect.transport}, delivery {connect.delivery}" + (", through gRPC" if peer.via == "grpc" else "")
    rows = [
        ("rate", f"{size(read.byte_rate)}/s, {read.frame_rate:.4g} frames/s of {size(peer.frame_bytes)}"),
        (
            "latency",
            f"{_ms(read.p50)} median, {_ms(read.p99)} at 99 % ({read.samples} frames at a quarter of the rate)",
        ),
        ("in all", f"{sent.frames} frames sent, {read.frames} read, in {duration(read.seconds)}"),
        ("reconnects", f"{sent.reconnects} sending, {read.reconnects} reading"),
        ("way", f"{where}, buffers/{connect.buffer} at {', '.join(map(spell, connect.places))}"),
    ]
    document = {
        "buffer": f"buffers/{connect.buffer}",
        "transport": connect.transport,
        "delivery": connect.delivery,
        "via": peer.via,
        "frame_bytes": peer.frame_bytes,
        "bytes_per_second": round(read.byte_rate),
        "frames_per_second": round(read.frame_rate, 3),
        "latency_seconds": {"p50": read.p50, "p99": read.p99, "samples": read.samples},
        "frames": {"sent": sent.frames, "read": read.frames},
        "reconnects": {"sending": sent.reconnects, "reading": read.reconnects},
    }
    cli.answer(aligned(rows), document)
    if read.frames < sent.frames:
        raise BeamwireError(
            Reason.EVENTS_LOST,
            f"{sent.frames - read.frames} of {sent.frames} frames did not come; another consumer may have taken them",
        )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"
