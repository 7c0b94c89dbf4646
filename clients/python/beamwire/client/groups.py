"""Which group of consumers a program reads in, where a request or a transfer names some."""

from __future__ import annotations

from beamwire.client.request import ParsedRequest
from beamwire.mesh.errors import invalid_field
from beamwire.request.v1.request_service_pb2 import Transfer

DEFAULT_GROUP = "default"


def for_group(parsed: ParsedRequest, group: str) -> ParsedRequest:
    """Return a request whose buffer waits for the group that its creator reads in, if it names no groups itself.

    Raises BeamwireError INVALID_FIELD if the request names several, and it cannot be told which is meant.
    """
    if not group or parsed.transfer.buffer_spec.groups:
        choose_group(group, parsed.transfer)
        return parsed
    transfer = Transfer()
    transfer.CopyFrom(parsed.transfer)
    transfer.buffer_spec.groups.append(group)
    return ParsedRequest(transfer, parsed.output)


def choose_group(wanted: str, transfer: Transfer) -> str:
    """Return the group to read in: the one wanted, else `default` or the only one of a transfer.

    Raises BeamwireError INVALID_FIELD if the transfer has several, and it cannot be told which is meant.
    """
    declared = list(transfer.buffer_spec.groups)
    if wanted or not declared or DEFAULT_GROUP in declared:
        return wanted
    if len(declared) == 1:
        return declared[0]
    raise invalid_field("group", f"say in which of its groups this program reads: {', '.join(declared)}")
