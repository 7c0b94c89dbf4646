"""Which group of consumers a program reads in, where a request or a transfer names some."""

from __future__ import annotations

from difflib import get_close_matches

from beamwire.client.request import ParsedRequest
from beamwire.mesh.errors import invalid_field
from beamwire.request.v1.request_service_pb2 import Transfer

DEFAULT_GROUP = "default"


def for_group(parsed: ParsedRequest, group: str) -> ParsedRequest:
    """Return a request whose buffer waits for the group that its creator reads in, if it names no groups itself.

    Raises BeamwireError INVALID_FIELD if the request names others, or several, and it cannot be told which is meant.
    """
    declared = list(parsed.transfer.buffer_spec.groups)
    if group and declared and group not in declared:
        near = get_close_matches(group, declared, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise invalid_field("group", f"{group!r} is not among the request's groups: {', '.join(declared)}{hint}")
    if not group or declared:
        choose_group(group, parsed.transfer)
        return parsed
    transfer = Transfer()
    transfer.CopyFrom(parsed.transfer)
    transfer.buffer_spec.groups.append(group)
    return ParsedRequest(transfer, parsed.output)


def choose_group(wanted: str, transfer: Transfer) -> str:
    """Return the group to read in: the one wanted, else `default` or the only one of a transfer.

    A transfer whose events come from the buffer of an earlier one has a group of its own there, and no other.

    Raises BeamwireError INVALID_FIELD if the transfer has several, and it cannot be told which is meant.
    """
    if transfer.group:
        return transfer.group
    declared = list(transfer.buffer_spec.groups)
    if wanted or not declared or DEFAULT_GROUP in declared:
        return wanted
    if len(declared) == 1:
        return declared[0]
    raise invalid_field(
        "group", f"say in which of its groups this program reads, with group= or --group: {', '.join(declared)}"
    )
