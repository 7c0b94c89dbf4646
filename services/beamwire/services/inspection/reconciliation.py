"""Holds the records of the services against what is there, and says what does not fit."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Final

from pydantic import ValidationError

from beamwire.mesh.store import utcnow
from beamwire.services.config import ServiceName
from beamwire.services.inspection.findings import Finding, error, ok, warning
from beamwire.services.inspection.records import KINDS, TERMINAL, Kept, Row
from beamwire.services.inspection.remains import LOCAL, Host, left_behind, without_process
from beamwire.services.inspection.scheduled import Scheduled
from beamwire.services.job.ending import left_at
from beamwire.services.job.model import JobRecord

LONGEST: Final[Mapping[str, timedelta]] = {
    "TransferRecord PENDING": timedelta(minutes=10),
    "TransferRecord PROVISIONING": timedelta(minutes=30),
    "TransferRecord CANCELLING": timedelta(minutes=5),
    "BufferRecord STARTING": timedelta(minutes=30),
    "JobRecord NEW": timedelta(minutes=10),
}
"""How long a record is in a state before somebody should look; other states last as long as their work."""
# Seconds after the end of a claim in which another replica should have taken the record.
UNHELD: Final = 60.0


def reconcile(host: Host, kept: Mapping[ServiceName, Kept], *, served: bool) -> Iterator[Finding]:
    """What is there without a record, and the records without what they need. `served`: somebody should mind."""
    fits = True
    for remain in left_behind(host, kept):
        fits = False
        yield warning("remains", f"{remain.what.value} {remain.place}", remain.why, "beamwired gc removes it")
    for row in without_process(host, kept):
        fits = False
        story = f"is {row.state}, and no process of it runs on this host"
        if served:
            yield error("remains", row.name, story, "its service should have noticed: see its log, or cancel it")
        else:
            yield warning("remains", row.name, story, "serve the facility: its service brings it to its end")
    if fits:
        running = len(host.running)
        yield ok("remains", "this host", f"{running} jobs and caches run, and each has its record")


def of_batch_systems(jobs: Scheduled) -> Iterator[Finding]:
    """What batch systems have besides what is known."""
    for name, problem in jobs.silent.items():
        yield warning("remains", name, f"could not be asked: {problem}", "see that its commands work for this user")
    for remain in jobs.remains():
        yield warning("remains", f"{remain.what.value} {remain.place}", remain.why, "beamwired gc cancels it")


def stuck(kept: Mapping[ServiceName, Kept], *, served: bool, now: datetime | None = None) -> Iterator[Finding]:
    """Records that have been in a passing state for too long, or that nobody drives."""
    moment = now or utcnow()
    none = True
    for service, content in kept.items():
        for row in content.rows:
            if row.state in TERMINAL.get(service, ()):
                continue
            limit = LONGEST.get(f"{KINDS.get(service, '')} {row.state}")
            age = moment - row.update_time
            if limit is not None and age > limit:
                none = False
                yield warning(
                    "records", row.name, _since(row, age), f"see the log of the {service} service for its name"
                )
            elif served and _is_free(content, row, moment):
                none = False
                remedy = f"see that a replica of the {service} service serves{_on(row)}"
                yield error("records", row.name, f"is {row.state}, and no replica drives it", remedy)
    if none:
        yield ok("records", "all", "none is stuck")


def stranded(kept: Mapping[ServiceName, Kept], backends: Collection[str]) -> Iterator[Finding]:
    """The jobs that have not ended at backends which the facility has no more."""
    for row in kept.get("job", Kept("")).rows:
        record = None if row.state in TERMINAL["job"] else _job(row)
        if record is not None and record.spec.placement.backend not in (LOCAL, *backends):
            remedy = f"put it back, or cancel the job: beamwire job cancel {row.id}"
            yield error("records", row.name, f"is {row.state}; {left_at(record)}", remedy)


def _job(row: Row) -> JobRecord | None:
    try:
        return JobRecord.model_validate(row.document)
    except ValidationError:
        # Of a release that knew no backends.
        return None


def webhooks(kept: Mapping[ServiceName, Kept]) -> Iterator[Finding]:
    """What is still to be told to somebody outside."""
    waiting = [item for content in kept.values() for item in content.waiting]
    tried = [item for item in waiting if item[1]]
    if not tried:
        yield ok("webhooks", "outbox", f"{len(waiting)} wait, and none was refused")
    for resource, attempts, problem in tried[:20]:
        story = f"was tried {attempts} times: {problem or 'no answer'}"
        yield warning("webhooks", resource, story, "it is tried for a day; see that its receiver answers 2xx")


def _since(row: Row, age: timedelta) -> str:
    return f"is {row.state} since {row.update_time:%Y-%m-%d %H:%M:%S} UTC, {int(age.total_seconds() // 60)} minutes"


def _is_free(content: Kept, row: Row, moment: datetime) -> bool:
    if row.held_until is None:
        # Given back: what is bound to a host is taken by none but those there.
        return content.shared and bool(row.host) and (moment - row.update_time).total_seconds() > UNHELD
    clock = content.clock if content.clock is not None else moment.timestamp()
    return row.held_until + UNHELD < clock


def _on(row: Row) -> str:
    if not row.host:
        return ""
    return f" on {row.host}; if that host is gone, or has another name now: beamwired host rename {row.host} NEW"
