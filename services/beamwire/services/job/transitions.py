"""How a job's state changes: by the table, timed, and told to whoever wants to know in the same transaction."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from beamwire.mesh.outbox import OutboxItem
from beamwire.mesh.store import Store
from beamwire.services.job.model import JOB_STATES, Deliveries, JobRecord, JobState, StepRecord, Transition

EVENT_TYPE = "job.state"


async def enter(store: Store[JobRecord], name: str, state: JobState, reason: str = "", **changes: object) -> JobRecord:
    """Store that a job has entered a state, and what changes with that; ILLEGAL_STATE if the table forbids it."""

    def changed(record: JobRecord) -> dict[str, object]:
        JOB_STATES.check(JobState(record.state), state, story=f"{name}: {reason}")
        if JOB_STATES.is_terminal(state):
            changes.setdefault("end_time", datetime.now(UTC))
        return entered(record, state, reason) | changes

    return await store.change(name, changed, outbox=news)


def entered(record: JobRecord, state: JobState, reason: str, *, step: int | None = None) -> dict[str, object]:
    """Return what changes in a record when it enters a state."""
    number = record.step.number if step is None else step
    transition = Transition(state=state, time=datetime.now(UTC), reason=reason, step=number)
    events = Deliveries.model_validate({**record.deliveries.model_dump(), "events": record.deliveries.events + 1})
    return {
        "state": state,
        "state_reason": reason,
        "transitions": (*record.transitions, transition),
        "deliveries": record.deliveries if record.spec.callback is None else events,
    }


def with_step(record: JobRecord, **changes: object) -> tuple[StepRecord, ...]:
    """Return the steps of a record with a change in the newest."""
    return (*record.steps[:-1], record.step.model_copy(update=changes))


def news(record: JobRecord) -> Iterator[OutboxItem]:
    """Yield the event of the state that a job has entered last, if somebody is to be told."""
    if record.spec.callback is None:
        return
    number = len(record.transitions)
    birth = record.create_time.isoformat()
    event_id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"beamwire:{record.name}:{birth}:{number}"))
    payload = json.dumps(_event(record, event_id, number), separators=(",", ":"))
    receiver = urlsplit(record.spec.callback.url).hostname or ""
    yield OutboxItem(id=event_id, resource=record.name, event_id=event_id, payload=payload, receiver=receiver)


def _event(record: JobRecord, event_id: str, number: int) -> dict[str, Any]:
    transition = record.transitions[-1]
    job: dict[str, Any] = {
        "name": record.name,
        "owner": record.owner,
        "display_name": record.spec.display_name,
        "labels": record.labels,
        "step": transition.step,
        "state": transition.state.value,
        "reason": transition.reason,
        "exit_code": record.step.exit_code,
        "outputs": record.outputs,
        "error": {"reason": record.error.reason, "message": record.error.message} if record.error else None,
    }
    return {"id": event_id, "type": EVENT_TYPE, "sequence": number, "time": transition.time.isoformat(), "job": job}
