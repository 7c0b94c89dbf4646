"""Reads a stream with one thread and one file per consumer, and accounts for every event: what `get` and `pull` do."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from beamwire.client.cli.context import Cli, as_dict, to_json
from beamwire.client.cli.display import Display, choose_display
from beamwire.client.cli.glance import Glance, groups_behind
from beamwire.client.cli.issues import Issues
from beamwire.client.cli.progress import Meter
from beamwire.client.cli.text import aligned, counted, receipt_rows, size
from beamwire.client.client import Client
from beamwire.client.files.naming import Target
from beamwire.client.files.writer import Format, Writer
from beamwire.client.groups import DEFAULT_GROUP, choose_group
from beamwire.client.session import Counters, Via
from beamwire.client.source import Source
from beamwire.client.stream import Part, Stream
from beamwire.client.transfers import short_name
from beamwire.mesh.errors import BeamwireError
from beamwire.request.v1.request_service_pb2 import Receipt, Transfer


@dataclass(frozen=True, slots=True)
class Output:
    """Where and how the events are written. With `empty`, a stream without events makes a file without events."""

    directory: Path
    prefix: str = ""
    suffix: str = "h5"
    format: Format = Format.HDF5
    overwrite: bool = False
    empty: bool = True

    def writers(self, stem: str, consumers: int) -> list[Writer]:
        """Return one writer per consumer, after making sure that no file is in the way and the directory exists."""
        targets = [
            Target(self.directory, self.prefix, stem, self.suffix, number, consumers) for number in range(consumers)
        ]
        if self.format is not Format.NONE:
            self.directory.mkdir(parents=True, exist_ok=True)
            for target in targets:
                if not self.overwrite:
                    target.refuse_overwriting()
        return [Writer(self.format, target, overwrite=self.overwrite) for target in targets]


@dataclass(frozen=True, slots=True)
class Way:
    """How the events come: over how many connections, shared with which group, from which port."""

    consumers: int
    group: str
    via: Via


@dataclass(frozen=True, slots=True)
class Download:
    """A download that went well."""

    transfer: Transfer | None
    receipt: Receipt | None
    files: list[Path]
    counters: Counters
    seconds: float


def download(
    cli: Cli,
    client: Client,
    source: Source,
    output: Output,
    way: Way,
    *,
    stem: str,
    transfer_id: str = "",
) -> Download:
    """Read a stream to its end into files. On any failure nothing is left that could be mistaken for all of it."""
    consumers = way.consumers
    writers = output.writers(stem, consumers)
    stream = client.stream(
        source, consumers=consumers, group=way.group, via=way.via, on_reconnect=cli.say, transfer_id=transfer_id
    )
    begin = time.monotonic()
    try:
        with ThreadPoolExecutor(consumers, thread_name_prefix="writer") as pool, stream:
            if stream.transfer is not None:
                cli.say(f"reading {stream.transfer.name}")
            futures = [
                pool.submit(_write_all, part, writer) for part, writer in zip(stream.split(), writers, strict=False)
            ]
            with choose_display(cli) as display, Glance(client) as glance:
                progress = _Progress(stream, display, glance, way.group, Issues(cli))
                _watch(futures, progress)
                receipt = _await_end(stream, progress)
        attributes = _attributes(client, stream)
        begun = writers if output.empty or stream.counters.events else []
        files = [path for writer in begun for path in writer.finish(attributes)]
        return Download(stream.transfer, receipt, files, stream.counters, time.monotonic() - begin)
    except BeamwireError as error:
        cli.ended = stream.transfer
        _keep(writers, _attributes(client, stream) | {"incomplete": error.message}, error)
        raise
    except KeyboardInterrupt as error:
        if stream.transfer is not None and stream.transfer.state in (
            Transfer.STATE_CANCELLING,
            Transfer.STATE_CANCELLED,
        ):
            error.add_note(f"{stream.transfer.name} was cancelled")
        raise
    finally:
        for writer in writers:
            writer.discard()


def report(cli: Cli, done: Download) -> None:
    """Print the receipt, and where the files are."""
    others_had_it = done.receipt is None or done.receipt.delivered_event_count
    if others_had_it and not done.counters.events:
        cli.say("the transfer had ended, or others took its events: nothing was left to read")
    if cli.json:
        document = {
            "transfer": done.transfer.name if done.transfer else "",
            "trace_id": done.transfer.trace_id if done.transfer else "",
            "events": done.counters.events,
            "bytes": done.counters.bytes,
            "seconds": round(done.seconds, 3),
            "files": [str(path) for path in done.files],
            "receipt": as_dict(done.receipt) if done.receipt else None,
        }
        cli.answer("", document)
        return
    rate = done.counters.events / done.seconds if done.seconds else 0.0
    rows = receipt_rows(done.receipt) if done.receipt else []
    read = done.counters
    rows += [
        ("read here", f"{counted(read.events, 'event')} in {counted(read.frames, 'frame')}, {size(read.bytes)}"),
        ("in all", f"{done.seconds:.1f} s from the request on, {rate:.4g} events/s"),
        ("files", _listing(done.files)),
    ]
    cli.answer(aligned(rows), {})


def _listing(files: list[Path]) -> str:
    if len(files) <= 8:
        return "  ".join(str(path) for path in files)
    return f"{files[0]} … {files[-1].name} ({len(files)} files)"


def _write_all(part: Part, writer: Writer) -> None:
    begun = False
    for batch in part:
        if not begun:
            writer.begin(part.header)
            begun = True
        writer.write(batch)
    if not begun:
        # Other consumers took everything: the file says what it would hold, with no rows.
        writer.begin(part.header)


class _Progress:
    """What is shown of a stream while it is read, and while others still read it."""

    def __init__(self, stream: Stream, display: Display, glance: Glance, group: str, issues: Issues) -> None:
        self.interval = display.interval
        self._stream = stream
        self._display = display
        self._glance = glance
        self._group = group
        self._issues = issues
        self._meter = Meter()

    def show(self, *, waiting: bool = False) -> None:
        """Show how far it is; `waiting` if all that is for this program was read."""
        now, transfer, counters = time.monotonic(), self._stream.transfer, self._stream.counters
        buffer = self._glance.look(now, transfer)
        self._issues.tell(transfer)
        behind: dict[str, int] = {}
        if waiting and transfer is not None and buffer is not None:
            behind = groups_behind(buffer, choose_group(self._group, transfer) or DEFAULT_GROUP)
        self._display.show(
            self._meter.snapshot(
                now, transfer, events=counters.events, bytes_=counters.bytes, buffer=buffer, waiting_for=behind
            )
        )


def _watch(futures: list[Future[None]], progress: _Progress) -> None:
    """Show progress until every writer is done; raises what the first one that failed raised."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=progress.interval, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        progress.show()


def _await_end(stream: Stream, progress: _Progress) -> Receipt | None:
    """Wait until the others have read everything too, and show who that is."""
    # Of a stream by its connect string nothing is known before it has ended.
    patience = progress.interval if stream.transfer is not None else None
    while True:
        try:
            return stream.wait(patience)
        except TimeoutError:
            progress.show(waiting=True)


def _attributes(client: Client, stream: Stream) -> dict[str, str]:
    attributes = {"facility": client.facility.trust_domain}
    if stream.transfer is not None:
        attributes["transfer"] = stream.transfer.name
    if stream.receipt is not None:
        attributes["receipt"] = to_json(stream.receipt)
    return attributes


def _keep(writers: list[Writer], attributes: dict[str, str], error: BeamwireError) -> None:
    """Close what came of a transfer that failed, and say where it is."""
    kept = [path for writer in writers for path in writer.keep(attributes)]
    if kept:
        error.add_note(f"what came before is kept, and is not complete: {_listing(kept)}")


def stem_of(source: str) -> str:
    """Return the name that files of an existing stream get: the id of the transfer, or of the buffer."""
    return short_name(source.partition("?")[0])
