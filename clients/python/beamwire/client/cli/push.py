"""`beamwire push`: files into a buffer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

from beamwire.buffer.v1.buffer_service_pb2 import Buffer, BufferSpec
from beamwire.client.cli.context import Cli, Command, as_dict, pass_cli
from beamwire.client.cli.text import aligned, counted, size
from beamwire.client.client import Client
from beamwire.client.files.arrays import is_array_file, media_type, read_arrays
from beamwire.client.transfers import loss_word
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.rpc.status import from_status
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.producer import Producer, ProducerCounters
from beamwire.stream.v1.frame_pb2 import StreamHeader
from beamwire.stream.v1.link_pb2 import LINK_ROLE_PRODUCE

_LEAST_CAPACITY = 256 * 2**20
# The header of a frame needs room beside its payload.
_HEADER_ROOM = 2**20


@click.command(cls=Command)
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE..."
)
@click.option("--connect", "connect_text", metavar="CONNECT", help="Send to this buffer; default: make one.")
@pass_cli
def push(cli: Cli, files: tuple[Path, ...], connect_text: str | None) -> None:
    """Send each FILE as one frame: .npy and .npz as arrays, anything else as it is.

    Without --connect a buffer is made, its connect string printed to standard error, and the command waits until a
    consumer (`beamwire pull`, say) has taken everything.
    """
    connect = ConnectString.parse(connect_text) if connect_text else None
    largest = max(_size_of(path) for path in files)
    with cli.client() as client:
        if connect is not None:
            sent = _send_to(cli, client, connect, files)
            said = f"sent {counted(sent.frames, 'frame')}, {size(sent.bytes)}"
            cli.answer(said, {"frames": sent.frames, "events": sent.events})
            return
        spec = BufferSpec(capacity_bytes=max(_LEAST_CAPACITY, 2 * (largest + _HEADER_ROOM)), producer_count=1)
        with own_buffer(client, spec) as buffer:
            click.echo(buffer.connect_string, err=True)
            sent = _send(cli, client, ConnectString.parse(buffer.connect_string), files)
            ended = _await_delivery(client, buffer.name)
    _report(cli, sent, ended)


def _size_of(path: Path) -> int:
    """Return the bytes that a file's frame will carry, after making sure that it can be read and sent."""
    if is_array_file(path):
        return read_arrays(path, 0).size
    with path.open("rb"):
        return path.stat().st_size


@contextmanager
def own_buffer(client: Client, spec: BufferSpec) -> Iterator[Buffer]:
    """A buffer of the caller's own, ready to be dialed; deleted in the end."""
    created = client.create_buffer(spec)
    try:
        for buffer in client.watch_buffer(created.name):
            _check(buffer)
            if buffer.connect_string:
                yield buffer
                return
        raise BeamwireError(Reason.CACHE_FAILED, f"{created.name} ended before it was ready")
    finally:
        client.delete_buffer(created.name)


def _send_to(cli: Cli, client: Client, connect: ConnectString, files: tuple[Path, ...]) -> ProducerCounters:
    """Send to a buffer of somebody's; one that takes nothing (more) is an error with a remedy."""
    if _has_ended(client, connect):
        raise _refused(connect, "its stream has ended")
    try:
        return _send(cli, client, connect, files)
    except BeamwireError as error:
        if error.reason is Reason.ILLEGAL_STATE:
            raise _refused(connect, error.message) from error
        raise


def _refused(connect: ConnectString, why: str) -> BeamwireError:
    return BeamwireError(
        Reason.ILLEGAL_STATE,
        f"nothing more can be sent to buffers/{connect.buffer}: {why}. A buffer takes one stream of each producer; "
        "leave --connect away to send into a new one",
    )


def _has_ended(client: Client, connect: ConnectString) -> bool:
    try:
        return client.get_buffer(connect.buffer).state in (
            Buffer.STATE_DRAINING,
            Buffer.STATE_KEPT,
            Buffer.STATE_ENDED,
            Buffer.STATE_FAILED,
        )
    except BeamwireError:
        # Who may only produce cannot see it.
        return False


def _send(cli: Cli, client: Client, connect: ConnectString, files: tuple[Path, ...]) -> ProducerCounters:
    """Send the files in order, then END."""
    first = read_arrays(files[0], 0) if is_array_file(files[0]) else None
    header = StreamHeader(
        buffer=f"buffers/{connect.buffer}",
        producer_count=1,
        fields=first.fields() if first else [],
        expected_event_count=0 if any(map(is_array_file, files)) else len(files),
    )
    credentials = None if connect.transport == "tcp" else client.credentials
    producer = Producer(
        connect, credentials, header, tickets=client.tickets(connect, LINK_ROLE_PRODUCE), on_reconnect=cli.say
    )
    try:
        for path in files:
            _send_file(producer, path)
        producer.end()
    finally:
        # Without an END the cache knows that this producer did not finish.
        producer.close()
    return producer.counters


def _send_file(producer: Producer, path: Path) -> None:
    first_id = producer.counters.events
    if is_array_file(path):
        file = read_arrays(path, first_id)
        producer.send(file.arrays, file.event_ids)
    else:
        producer.send_opaque(path.read_bytes(), media_type(path), np.array([first_id], np.uint64))


def _await_delivery(client: Client, name: str) -> Buffer:
    last = Buffer()
    for last in client.watch_buffer(name):
        _check(last)
    return last


def _check(buffer: Buffer) -> None:
    if buffer.state == Buffer.STATE_FAILED:
        raise from_status(buffer.error) or BeamwireError(Reason.CACHE_FAILED, f"{buffer.name}: {buffer.error.message}")


def _report(cli: Cli, sent: ProducerCounters, buffer: Buffer) -> None:
    """Print what became of the events; losses end the command with an error."""
    counters = buffer.counters
    losses = [(f"lost: {loss_word(loss.cause)}", counted(loss.event_count, "event")) for loss in counters.losses]
    rows = [
        ("sent", f"{counted(sent.events, 'event')} in {counted(sent.frames, 'frame')}, {size(sent.bytes)}"),
        (
            "delivered",
            f"{counted(counters.delivered_event_count, 'event')} to {counted(len(counters.consumers), 'consumer')}",
        ),
        *losses,
    ]
    cli.answer(aligned(rows), {"buffer": buffer.name, "events": sent.events, "counters": as_dict(counters)})
    if counters.delivered_event_count != sent.events:
        lost = sent.events - counters.delivered_event_count
        raise BeamwireError(Reason.EVENTS_LOST, f"{lost} of {sent.events} events were not delivered")
