"""The moves of a transfer from state to state, each with its time and its reason in the history."""

from __future__ import annotations

from datetime import UTC, datetime

from beamwire.services.request.model import TRANSFER_STATES, Ending, TransferRecord, TransferState, Transition

# Of a life that goes back and forth for ever nobody needs to read all.
MOST_TRANSITIONS = 64


def to(record: TransferRecord, state: TransferState, reason: str) -> dict[str, object]:
    """Return the change that takes a transfer to a state, if the table allows it; nothing if it is there already.

    What was being stored when its driver was cancelled is stored all the same.
    """
    if record.state == state:
        return {}
    TRANSFER_STATES.check(TransferState(record.state), state, story=record.name)
    ended: dict[str, object] = {}
    if TRANSFER_STATES.is_terminal(state):
        ended = {"end_time": datetime.now(UTC), "ending": None, "health_issues": ()}
    return {**noted(record, reason, state), "state": state, **ended}


def noted(record: TransferRecord, reason: str, state: TransferState | None = None) -> dict[str, object]:
    """Return the change that adds a line to the history of a transfer; nothing if it is the last one already."""
    line = Transition(state=state or record.state, time=datetime.now(UTC), reason=reason)
    last = record.transitions[-1] if record.transitions else None
    if last is not None and (last.state, last.reason) == (line.state, line.reason):
        return {}
    return {"transitions": (*record.transitions, line)[-MOST_TRANSITIONS:]}


def cancelled(record: TransferRecord, reason: str) -> dict[str, object]:
    """Return the change that has a transfer cancelled; nothing if it ends or has ended already."""
    if record.ended or record.ending is not None or record.state == TransferState.CANCELLING:
        return {}
    return to(record, TransferState.CANCELLING, reason)


def doomed(record: TransferRecord, ending: Ending) -> dict[str, object]:
    """Return the change that has a transfer end early.

    Nothing if that was stored before, if it is cancelled, or if its time was over and it was given more since.
    """
    if record.ended or record.ending is not None or record.state == TransferState.CANCELLING:
        return {}
    if ending.state is TransferState.EXPIRED and record.expire_time > datetime.now(UTC):
        return {}
    return {"ending": ending}


def how_it_ends(record: TransferRecord) -> Ending | None:
    """Return how a transfer is to end early; None if it is not."""
    if record.state == TransferState.CANCELLING:
        return Ending(state=TransferState.CANCELLED, cause="CANCELLED")
    return record.ending
