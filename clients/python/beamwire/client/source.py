"""What a stream can be made from: a request, the name of a transfer, or a connect string."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from beamwire.client.request import ParsedRequest, Request, parse_request
from beamwire.client.transfers import full_name
from beamwire.mesh.errors import invalid_field
from beamwire.mesh.stream.connect import ConnectString
from beamwire.request.v1.request_service_pb2 import Transfer

Source = Request | ParsedRequest | ConnectString | str
ParsedSource = ParsedRequest | ConnectString | str


def parse_source(source: Source) -> ParsedSource:
    """Return a parsed request, a connect string, or the full name of a transfer.

    Text is a connect string if it begins with `beamwire://`, the path of a request if it ends in `.yaml` or `.yml`,
    and otherwise the name of a transfer. Raises BeamwireError INVALID_FIELD.
    """
    match source:
        case ParsedRequest() | ConnectString():
            return source
        case Transfer() | Mapping() | os.PathLike():
            return parse_request(source)
        case str() if source.startswith("beamwire://"):
            return ConnectString.parse(source)
        case str() if source.endswith((".yaml", ".yml")):
            return parse_request(Path(source))
        case str() if re.fullmatch(r"(transfers/)?[a-z][a-z0-9-]{0,62}", source):
            return full_name("transfers", source)
        case _:
            raise invalid_field(
                "source",
                f"{source!r} is none of: a request (mapping or Transfer), the path of a .yaml file, transfers/<id>, "
                "a connect string beamwire://…",
            )
