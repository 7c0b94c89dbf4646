"""The connect string: all that a producer or a consumer needs to reach a buffer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Final, Literal, get_args
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from beamwire.mesh.errors import BeamwireError, invalid_field
from beamwire.mesh.identity.ids import is_trust_domain
from beamwire.mesh.names import check_id

Transport = Literal["tls+tcp", "tcp", "ipc"]
Delivery = Literal["acked", "push"]
# Where one cache listens: host and port, or the path of a Unix socket.
Place = tuple[str, int] | str
DEFAULT_TRANSPORT: Final[Transport] = "tls+tcp"
DEFAULT_DELIVERY: Final[Delivery] = "acked"
_FIELD: Final = "connect_string"
_SHAPE: Final = (
    "beamwire://host:port[,host:port]/buffers/<id>?epoch=1"
    "[&transport=tcp][&delivery=push][&facility=<trust domain>][&ticket=…]"
)
_LOCAL_SHAPE: Final = "beamwire://localhost/buffers/<id>?epoch=1&transport=ipc&path=/…[&path=/…][&ticket=…]"
_LOCALHOST: Final = "localhost"
_OPTIONS: Final = ("epoch", "transport", "path", "delivery", "facility", "ticket")
_TICKET: Final = re.compile(r"[A-Za-z0-9._~-]{0,2048}")
_SECRET: Final = re.compile(r"(?i)(ticket[=:])[^&#'\"\s]*")
_HOST: Final = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")
_MAX_EPOCH: Final = 2**32 - 1


@dataclass(frozen=True)
class ConnectString:
    """Where a buffer is: `beamwire://host:port[,host:port…]/buffers/<id>?epoch=1[&transport=tcp][&delivery=push]`.

    `facility` is the trust domain of its caches; empty for that of whoever dials. `hosts` are their listeners, `epoch`
    the life of the sequence numbers. With the transport `ipc` they listen on the Unix sockets `paths`:
    `beamwire://localhost/buffers/<id>?epoch=1&transport=ipc&path=/…[&path=/…]`.
    With a `ticket` in it the text is a secret: log `without_ticket()`.
    """

    hosts: tuple[tuple[str, int], ...]
    buffer: str
    epoch: int
    transport: Transport = DEFAULT_TRANSPORT
    delivery: Delivery = DEFAULT_DELIVERY
    ticket: str = field(default="", repr=False)
    paths: tuple[str, ...] = ()
    facility: str = ""

    @classmethod
    def parse(cls, text: str) -> ConnectString:
        """The buffer that a text points to; BeamwireError INVALID_FIELD says what is wrong with the text."""
        try:
            url = urlsplit(text)
            pairs = parse_qsl(url.query, keep_blank_values=True, strict_parsing=bool(url.query))
        except ValueError as error:
            raise _invalid(text, _SECRET.sub(r"\1…", str(error))) from error
        collection, _, buffer = url.path.removeprefix("/").partition("/")
        if url.scheme != "beamwire" or collection != "buffers" or url.fragment:
            raise _invalid(text, f"it must be {_SHAPE}")
        options = dict(pairs)
        unknown = options.keys() - set(_OPTIONS)
        if unknown:
            raise _invalid(text, f"{sorted(unknown)[0]!r} is no option; the options are {', '.join(_OPTIONS)}")
        transport, delivery = _parse_transport(text, options), _parse_delivery(text, options)
        hosts: tuple[tuple[str, int], ...] = ()
        paths = tuple(value for name, value in pairs if name == "path")
        if transport == "ipc":
            _check_local(text, url.netloc, paths, delivery)
        elif paths:
            raise _invalid(text, "path is for transport=ipc")
        else:
            hosts = tuple(_parse_host(text, host) for host in url.netloc.split(","))
        return cls(
            hosts,
            _parse_buffer(text, buffer),
            _parse_epoch(text, options),
            transport,
            delivery,
            _parse_ticket(text, options),
            paths,
            _parse_facility(text, options),
        )

    @property
    def places(self) -> tuple[Place, ...]:
        """Where its caches listen, in the order of its shards: the hosts, or the paths."""
        return self.hosts or self.paths

    def without_ticket(self) -> ConnectString:
        """The same for everybody's eyes."""
        return replace(self, ticket="")

    def __str__(self) -> str:
        hosts = _LOCALHOST if self.transport == "ipc" else ",".join(map(spell, self.hosts))
        options = {"epoch": str(self.epoch)}
        if self.transport != DEFAULT_TRANSPORT:
            options["transport"] = self.transport
        if self.delivery != DEFAULT_DELIVERY:
            options["delivery"] = self.delivery
        if self.facility:
            options["facility"] = self.facility
        if self.ticket:
            options["ticket"] = self.ticket
        # A plus sign in a path would be read as a space.
        paths = "".join(f"&path={quote(path)}" for path in self.paths)
        return f"beamwire://{hosts}/buffers/{self.buffer}?{urlencode(options, safe='+')}{paths}"


def spell(place: Place) -> str:
    """Where a cache listens, for people: host:port, or the path."""
    if isinstance(place, str):
        return place
    host, port = place
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _parse_host(text: str, host: str) -> tuple[str, int]:
    match = _HOST.fullmatch(host)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise _invalid(text, f"{host!r} is not host:port")
    return match["host"].strip("[]"), int(match["port"])


def _check_local(text: str, host: str, paths: tuple[str, ...], delivery: Delivery) -> None:
    if host != _LOCALHOST or not paths:
        raise _invalid(text, f"with transport=ipc it must be {_LOCAL_SHAPE}")
    for path in paths:
        if not path.startswith("/") or not path.isprintable():
            raise _invalid(text, f"{path[:80]!r} is no absolute path")
    if delivery != "acked":
        raise _invalid(text, "transport=ipc has delivery=acked only")


def _parse_epoch(text: str, options: dict[str, str]) -> int:
    epoch = options.get("epoch", "")
    if not epoch.isascii() or not epoch.isdigit() or int(epoch[:20]) > _MAX_EPOCH:
        raise _invalid(text, "it needs epoch=<number>")
    return int(epoch)


def _parse_transport(text: str, options: dict[str, str]) -> Transport:
    # A plus sign in a query may have been read as a space.
    wanted = options.get("transport", DEFAULT_TRANSPORT).replace(" ", "+")
    for transport in get_args(Transport):
        if wanted == transport:
            return transport  # type: ignore[no-any-return]
    raise _invalid(text, f"transport is {' or '.join(get_args(Transport))}, not {wanted!r}")


def _parse_delivery(text: str, options: dict[str, str]) -> Delivery:
    wanted = options.get("delivery", DEFAULT_DELIVERY)
    for delivery in get_args(Delivery):
        if wanted == delivery:
            return delivery  # type: ignore[no-any-return]
    raise _invalid(text, f"delivery is {' or '.join(get_args(Delivery))}, not {wanted!r}")


def _parse_buffer(text: str, buffer: str) -> str:
    try:
        return check_id(_FIELD, buffer, reserved=True)
    except BeamwireError as error:
        raise _invalid(text, error.message) from None


def _parse_facility(text: str, options: dict[str, str]) -> str:
    facility = options.get("facility", "")
    if "facility" in options and not is_trust_domain(facility):
        raise _invalid(text, f"{facility[:80]!r} is no trust domain")
    return facility


def _parse_ticket(text: str, options: dict[str, str]) -> str:
    ticket = options.get("ticket", "")
    if not _TICKET.fullmatch(ticket):
        raise _invalid(text, "its ticket is none")
    return ticket


def _invalid(text: str, why: str) -> BeamwireError:
    return invalid_field(_FIELD, _SECRET.sub(r"\1…", f"{text[:3000]!r} is not a connect string: {why}")[:600])
