"""The connect string: all that a producer or a consumer needs to reach a buffer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, get_args
from urllib.parse import parse_qsl, urlencode, urlsplit

from beamwire.mesh.errors import BeamwireError, invalid_field
from beamwire.mesh.names import check_id

Transport = Literal["tls+tcp", "tcp"]
DEFAULT_TRANSPORT: Final[Transport] = "tls+tcp"
_FIELD: Final = "connect_string"
_SHAPE: Final = "beamwire://host:port[,host:port]/buffers/<id>?epoch=1[&transport=tcp]"
_HOST: Final = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")
_MAX_EPOCH: Final = 2**32 - 1


@dataclass(frozen=True)
class ConnectString:
    """Where a buffer is: `beamwire://host:port[,host:port…]/buffers/<id>?epoch=1[&transport=tcp]`.

    `hosts` are the listeners of its caches, `epoch` the life of its sequence numbers.
    """

    hosts: tuple[tuple[str, int], ...]
    buffer: str
    epoch: int
    transport: Transport = DEFAULT_TRANSPORT

    @classmethod
    def parse(cls, text: str) -> ConnectString:
        """The buffer that a text points to; BeamwireError INVALID_FIELD says what is wrong with the text."""
        try:
            url = urlsplit(text)
            options = dict(parse_qsl(url.query, keep_blank_values=True, strict_parsing=bool(url.query)))
        except ValueError as error:
            raise _invalid(text, str(error)) from error
        collection, _, buffer = url.path.removeprefix("/").partition("/")
        if url.scheme != "beamwire" or collection != "buffers" or url.fragment:
            raise _invalid(text, f"it must be {_SHAPE}")
        unknown = options.keys() - {"epoch", "transport"}
        if unknown:
            raise _invalid(text, f"{sorted(unknown)[0]!r} is no option; the options are epoch and transport")
        hosts = tuple(_parse_host(text, host) for host in url.netloc.split(","))
        buffer = check_id(_FIELD, buffer, reserved=True)
        return cls(hosts, buffer, _parse_epoch(text, options), _parse_transport(text, options))

    def __str__(self) -> str:
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        options = {"epoch": str(self.epoch)}
        if self.transport != DEFAULT_TRANSPORT:
            options["transport"] = self.transport
        return f"beamwire://{hosts}/buffers/{self.buffer}?{urlencode(options, safe='+')}"


def _parse_host(text: str, host: str) -> tuple[str, int]:
    match = _HOST.fullmatch(host)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise _invalid(text, f"{host!r} is not host:port")
    return match["host"].strip("[]"), int(match["port"])


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


def _invalid(text: str, why: str) -> BeamwireError:
    return invalid_field(_FIELD, f"{text[:200]!r} is not a connect string: {why}")
