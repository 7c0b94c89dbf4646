"""What a client reads out of a Transfer: its name, whether it has ended, and why it failed."""

from __future__ import annotations

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.names import parse_name
from beamwire.mesh.rpc.status import from_status
from beamwire.request.v1.request_service_pb2 import Receipt, Transfer

TERMINAL = frozenset(
    {Transfer.STATE_SUCCEEDED, Transfer.STATE_CANCELLED, Transfer.STATE_FAILED, Transfer.STATE_EXPIRED}
)
_REASONS = {
    Transfer.STATE_CANCELLED: (Reason.CANCELLED, "was cancelled"),
    Transfer.STATE_EXPIRED: (Reason.LEASE_EXPIRED, "reached the end of its lease"),
    Transfer.STATE_FAILED: (Reason.INTERNAL, "failed and does not say why"),
}


def full_name(collection: str, name: str) -> str:
    """Return `collection/id` for `collection/id` or `id`; BeamwireError INVALID_FIELD if it is neither."""
    name = name if "/" in name else f"{collection}/{name}"
    parse_name(collection, name)
    return name


def short_name(name: str) -> str:
    """Return the id in a resource name."""
    return name.rpartition("/")[2]


def has_ended(transfer: Transfer) -> bool:
    """Return whether the transfer is in a terminal state."""
    return transfer.state in TERMINAL


def state_word(transfer: Transfer) -> str:
    """Return the state as a word: `STREAMING`, say."""
    return Transfer.State.Name(transfer.state).removeprefix("STATE_")


def loss_word(cause: account_pb2.LossCause.ValueType) -> str:
    """Return the cause of a loss as words: `consumer connection`, say."""
    return account_pb2.LossCause.Name(cause).removeprefix("LOSS_CAUSE_").replace("_", " ").lower()


def lost_events(receipt: Receipt) -> int:
    """Return how many selected events were not delivered."""
    return sum(loss.event_count for loss in receipt.losses)


def failure_of(transfer: Transfer) -> BeamwireError:
    """Return why a transfer that ended did not succeed, in the service's words where it has some."""
    stated = from_status(transfer.error) if transfer.HasField("error") else None
    reason, what = _REASONS.get(transfer.state, (Reason.ILLEGAL_STATE, f"is {state_word(transfer)}"))
    if stated is None:
        message = transfer.error.message or what
        return BeamwireError(reason, f"{transfer.name}: {message}", metadata={"transfer": transfer.name})
    stated.metadata.setdefault("transfer", transfer.name)
    return stated
