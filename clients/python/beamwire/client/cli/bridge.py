"""`beamwire bridge`: a stream for programs that have a way of their own to take data."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import click

from beamwire.client.bridges.account import Account
from beamwire.client.bridges.answering import Answerer
from beamwire.client.bridges.bridge import Bridge, Patience
from beamwire.client.bridges.contract import Contract
from beamwire.client.bridges.crystfel import Crystfel, Encoding
from beamwire.client.bridges.dectris import Compression, Dectris
from beamwire.client.bridges.endpoints import Dialing, Endpoint, Listening, parse_address
from beamwire.client.bridges.hub import Hub
from beamwire.client.bridges.maxie import Maxie
from beamwire.client.bridges.peaknet import Peaknet
from beamwire.client.bridges.pushing import Pusher
from beamwire.client.bridges.tmo import Tmo
from beamwire.client.bridges.wires import NngWire, ZmtpWire
from beamwire.client.cli.context import Cli, Command, Group, pass_cli
from beamwire.client.cli.display import choose_display
from beamwire.client.cli.download import stem_of
from beamwire.client.cli.progress import Meter
from beamwire.client.cli.sizes import Size
from beamwire.client.cli.text import aligned, counted, size
from beamwire.client.session import Via
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field

Function = Callable[..., None]


@click.group(cls=Group)
def bridge() -> None:
    """Serve a stream to a program that has a way of its own to take data, as that program wants it.

    An event counts as done only when the program has taken it. Ctrl-C and SIGTERM let consumers finish what they have
    and give the rest back, so that another bridge can go on. At the end the account is printed.
    """


def _options(*more: Callable[[Function], Function], window: int) -> Callable[[Function], Function]:
    own: list[Callable[[Function], Function]] = [
        click.argument("source", metavar="CONNECT_OR_TRANSFER"),
        *more,
        click.option("--data", default="", metavar="NAME", help="The array with the image; default: detector_data."),
        click.option("--group", default="", metavar="NAME", help="Share the events with the consumers of this group."),
        click.option(
            "--via",
            type=click.Choice(get_args(Via)),
            default="data",
            help="data: from the caches' own ports; grpc: through the facility's one port, slower.",
        ),
        click.option(
            "--window",
            type=click.IntRange(min=1),
            default=window,
            show_default=True,
            help="The most messages of the buffer that consumers have at once.",
        ),
        click.option(
            "--memory",
            type=Size(),
            default="512Mi",
            show_default=True,
            help="The most bytes that are read and not yet taken; one message always may be.",
        ),
        _seconds("drain", "When stopped: give up once nothing was taken for so long."),
    ]

    def decorate(function: Function) -> Function:
        for option in reversed(own):
            function = option(function)
        return function

    return decorate


def _listen(default: str) -> Callable[[Function], Function]:
    return click.option(
        "--listen", default=default, show_default=True, metavar="ADDRESS", help="Where consumers dial: tcp://HOST:PORT."
    )


def _seconds(name: str, text: str) -> Callable[[Function], Function]:
    return click.option(
        f"--{name}", type=click.FloatRange(min=0), default=10.0, show_default=True, metavar="SECONDS", help=text
    )


def _role(name: str, text: str) -> Callable[[Function], Function]:
    return click.option(f"--{name}", default="", metavar="NAME|NUMBER", help=text)


@bridge.command(cls=Command)
@_options(
    _listen("tcp://*:5555"),
    click.option(
        "--encoding", type=click.Choice(get_args(Encoding)), default="msgpack", help="What each event is sent as."
    ),
    click.option("--peaks", default="", metavar="NAME", help="Arrays with peaks, NAME_fs and so on; default: peaks."),
    _role("energy", "Photon energy: an array, or a number in eV; default: beam_energy, if there is one."),
    _role("distance", "Detector distance: an array, or a number in mm; default: detector_distance, if there is one."),
    _seconds("linger", "After the end, how long workers that stay are answered."),
    window=16,
)
@pass_cli
def crystfel(
    cli: Cli, /, listen: str, encoding: Encoding, peaks: str, energy: str, distance: str, linger: float, **common: Any
) -> None:
    """Answer the workers of CrystFEL's indexamajig: one event for each request.

    Example: beamwire bridge crystfel TRANSFER --listen tcp://*:5555 --energy 9500 --distance 120; then indexamajig
    --zmq-input=tcp://HOST:5555 --zmq-request=next --data-format=msgpack --peaks=msgpack …
    """
    given = _given(detector_data=common["data"], beam_energy=energy, detector_distance=distance)
    if peaks:
        given |= {f"peaks_{column}": f"{peaks}_{column}" for column in ("fs", "ss", "intensity")}
    contract = Crystfel(given, encoding)

    def endpoint(hub: Hub) -> Endpoint:
        return Listening(parse_address(listen, "listen"), hub, Answerer(hub).serve, cli.say)

    _run(cli, contract, endpoint, linger=linger, **common)


@bridge.command(cls=Command)
@_options(
    click.option("--connect", multiple=True, required=True, metavar="ADDRESS", help="Where PeakNet binds; repeatable."),
    _role("wavelength", "Photon wavelength: an array, or a number in Å; default: photon_wavelength."),
    click.option("--timestamp", default="", metavar="NAME", help="Default: timestamp if there is one, else event ids."),
    window=4,
)
@pass_cli
def peaknet(cli: Cli, /, connect: tuple[str, ...], wavelength: str, timestamp: str, **common: Any) -> None:
    """Push each batch, as the bytes of an .npz file, to ZeroMQ PULL sockets that bind: PeakNet's.

    Example: beamwire bridge peaknet TRANSFER --connect tcp://gpu01:12321 --wavelength 1.3
    """
    given = _given(detector_data=common["data"], photon_wavelength=wavelength, timestamp=timestamp)
    contract = Peaknet(given)

    def endpoint(hub: Hub) -> Endpoint:
        addresses = [parse_address(address, "connect") for address in connect]
        return Dialing(addresses, hub, Pusher(hub, contract, ZmtpWire).serve, cli.say)

    _run(cli, contract, endpoint, **common)


@bridge.command(cls=Command)
@_options(_listen("tcp://*:5556"), window=16)
@pass_cli
def maxie(cli: Cli, /, listen: str, **common: Any) -> None:
    """Push each image, a line with its shape and index and then float32, to NNG Pull0 sockets that dial: MAXIE's.

    Example: beamwire bridge maxie TRANSFER --listen tcp://*:5556
    """
    contract = Maxie(_given(detector_data=common["data"]))
    _run(cli, contract, partial(_listening, cli, contract, listen, NngWire), **common)


@bridge.command(cls=Command)
@_options(
    _listen("tcp://*:5557"),
    click.option(
        "--hits", default="", metavar="NAME", help="The arrays of TofHits, NAME_tof and so on; default: hits."
    ),
    window=16,
)
@pass_cli
def tmo(cli: Cli, /, listen: str, hits: str, **common: Any) -> None:
    """Push each batch of hits, as an HDF5 file with CSR arrays for each channel, to NNG Pull0 sockets that dial: TMO's.

    Example: beamwire bridge tmo TRANSFER --listen tcp://*:5557
    """
    names = {f"hits_{part}": f"{hits}_{part}" for part in ("nedges", "channel", "tof", "slope")} if hits else {}
    contract = Tmo(names)
    _run(cli, contract, partial(_listening, cli, contract, listen, NngWire), **common)


@bridge.command(cls=Command)
@_options(
    _listen("tcp://*:31001"),
    click.option(
        "--compression",
        type=click.Choice(get_args(Compression)),
        default="none",
        show_default=True,
        help="Of images that are made from arrays.",
    ),
    window=16,
)
@pass_cli
def dectris(cli: Cli, /, listen: str, compression: Compression, **common: Any) -> None:
    """Push DECTRIS Stream V2 messages to ZeroMQ PULL sockets that connect, as the detector's control unit does.

    Example: beamwire bridge dectris TRANSFER --listen tcp://*:31001
    """
    contract = Dectris(_given(detector_data=common["data"]), stem_of(common["source"]), compression)
    _run(cli, contract, partial(_listening, cli, contract, listen, ZmtpWire), **common)


def _listening(cli: Cli, contract: Contract, listen: str, wire: Any, hub: Hub) -> Endpoint:
    return Listening(parse_address(listen, "listen"), hub, Pusher(hub, contract, wire).serve, cli.say)


def _given(**values: str) -> dict[str, str | float]:
    """What was said, numbers as numbers."""
    return {role: _number(value) for role, value in values.items() if value}


def _number(value: str) -> str | float:
    try:
        return float(value)
    except ValueError:
        return value


def _run(
    cli: Cli,
    contract: Contract,
    endpoint: Callable[[Hub], Endpoint],
    *,
    source: str,
    data: str,
    group: str,
    via: Via,
    window: int,
    memory: int,
    drain: float,
    linger: float = 10.0,
) -> None:
    if source.endswith((".yaml", ".yml")):
        raise invalid_field("source", "a bridge serves a stream that exists: `beamwire get` or the SDK make one")
    hub = Hub(window)
    begin = time.monotonic()
    with cli.client() as client:
        stream = client.stream(
            source, prefetch=window, prefetch_bytes=memory, group=group, via=via, on_reconnect=cli.say
        )
        served = Bridge(hub, contract, endpoint(hub), Patience(drain, linger))
        meter = Meter()
        try:
            with choose_display(cli) as display:

                def show() -> None:
                    account = served.account
                    display.show(
                        meter.snapshot(time.monotonic(), stream.transfer, events=account.served, bytes_=account.bytes)
                    )

                served.run(stream, show)
        finally:
            cli.ended = stream.transfer if hub.failure is not None else None
            _report(cli, served.account, time.monotonic() - begin)
    account = served.account
    if account.refused:
        raise BeamwireError(
            Reason.EVENTS_LOST, f"{counted(account.refused, 'event')} were given up: their workers died"
        )


def _report(cli: Cli, account: Account, seconds: float) -> None:
    rows = [
        ("received", counted(account.received, "event")),
        ("served", f"{counted(account.served, 'event')} in {account.messages} messages, {size(account.bytes)}"),
        *((f"repeated: {reason}", counted(events, "event")) for reason, events in account.repeated.items()),
        ("given up", counted(account.refused, "event")),
        ("left in the buffer", counted(account.left, "event")),
        *([] if account.confirmed else [("not confirmed", "some of what was taken last may come again")]),
        ("connections", str(account.consumers)),
        ("in all", f"{seconds:.1f} s, {account.served / seconds if seconds else 0:.4g} events/s"),
    ]
    cli.answer(aligned(rows), {"account": account.document(), "seconds": round(seconds, 3)})
