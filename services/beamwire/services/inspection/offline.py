"""How a facility is as far as its files tell, and the host they are on: nothing is called."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509

from beamwire.mesh import schema
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.generations import Phase
from beamwire.mesh.identity.ids import utcnow
from beamwire.mesh.identity.renewal import issues_of, remaining
from beamwire.mesh.policy import Policy, read_policy
from beamwire.mesh.sqlite import is_open
from beamwire.services.buffer.placement import SHARED_MEMORY
from beamwire.services.certificate.access import methods
from beamwire.services.config import SERVICE_NAMES, FacilitySettings, Layout, ServiceName
from beamwire.services.facility import TOGETHER, load_authorities
from beamwire.services.inspection.findings import Finding, error, ok, warning
from beamwire.services.inspection.records import Kept
from beamwire.services.policy import doubts

# Parts of a disk that are free.
LITTLE_ROOM: Final = 0.10
NO_ROOM: Final = 0.02
# Of the authority's root.
ROOT_WARNING: Final = timedelta(days=90)
# Certificates are dated back by more than this; leases and tickets are not.
MOST_SKEW: Final = 5.0


def configuration(layout: Layout, settings: FacilitySettings) -> Iterator[Finding]:
    """The facility's file and its directories."""
    yield ok("configuration", str(layout.file), f"can be read; the trust domain is {settings.trust_domain}")
    for path in (layout.file, layout.page_key, layout.token_key):
        if path.exists() and path.stat().st_mode & 0o077:
            yield error("configuration", str(path), "can be read by others on this host", f"chmod 600 {path}")
    for directory in (layout.state, layout.jobs, layout.buffers):
        if not directory.is_dir():
            yield error("configuration", str(directory), "is not there", f"restore it, or: mkdir -m 700 -p {directory}")
        elif not os.access(directory, os.W_OK | os.X_OK):
            yield error("configuration", str(directory), "cannot be written", f"chown it to user {os.getuid()}")


def policy(layout: Layout, settings: FacilitySettings) -> Iterator[Finding]:
    """Who may do what."""
    if not layout.policy.exists():
        yield ok("policy", str(layout.policy), "is not there: the default policy counts")
        return
    try:
        found: Policy = read_policy(layout.policy, settings.trust_domain)
    except BeamwireError as problem:
        remedy = "mend it and ask `beamwired policy check`; who serves goes on with the last good one until it restarts"
        yield error("policy", str(layout.policy), problem.message, remedy)
        return
    yield ok("policy", str(layout.policy), f"can be used; it has {len(found.rules)} rules")
    for doubt in doubts(found, methods()):
        yield warning("policy", str(layout.policy), doubt, "see docs/policy.md, and `beamwired policy check`")


def certificates(layout: Layout) -> Iterator[Finding]:
    """The credentials of the facility's own members."""
    paths = [*(f"service/{name}" for name in SERVICE_NAMES), TOGETHER]
    for path in paths:
        try:
            credentials = Credentials.load(layout.member(path))
        except BeamwireError as problem:
            remedy = "restore members/ from a backup; the Certificate service issues new ones when it starts"
            yield error("certificates", path, problem.message, remedy)
            continue
        issues = issues_of(credentials)
        left, _ = remaining(credentials)
        for issue in issues:
            remedy = "serve the Certificate service, which renews it: beamwired serve certificate"
            yield (warning if left else error)("certificates", path, issue, remedy)
        if not issues:
            yield ok("certificates", path, f"good until {credentials.not_after:%Y-%m-%d %H:%M} UTC")


def authority(layout: Layout, settings: FacilitySettings, now: datetime | None = None) -> Iterator[Finding]:
    """Who signs, and how far a rotation is."""
    try:
        generations = load_authorities(layout, settings)
    except BeamwireError as problem:
        remedy = "restore authority/ from a backup; see docs/security.md for what else to do after a loss"
        yield error("authority", str(layout.authority), problem.message, remedy)
        return
    state = generations.state
    story = f"generation {state.generation} signs; its root is good until"
    root: x509.Certificate = generations.roots[0]
    left = root.not_valid_after_utc - (now or utcnow())
    subject, date = str(layout.authority), f"{root.not_valid_after_utc:%Y-%m-%d}"
    if left < ROOT_WARNING:
        remedy = "rotate it: beamwired authority rotate --to announced (docs/identity.md)"
        yield (warning if left > timedelta() else error)("authority", subject, f"{story} {date}", remedy)
    else:
        yield ok("authority", subject, f"{story} {date}")
    if state.phase is not Phase.STABLE:
        remedy = "finish it when all members have renewed: beamwired authority show"
        yield warning("authority", subject, f"a rotation is under way, {state.phase.value.lower()}", remedy)


def disks(layout: Layout) -> Iterator[Finding]:
    """Room for state, jobs and rings."""
    for name, path in (("state", layout.state), ("shared memory", SHARED_MEMORY)):
        if not path.is_dir():
            continue
        usage = shutil.disk_usage(path)
        part = usage.free / usage.total if usage.total else 0.0
        story = f"{usage.free / 2**30:.1f} GiB of {usage.total / 2**30:.1f} GiB are free"
        subject = f"{name} ({path})"
        if part < NO_ROOM:
            yield error("disk", subject, story, "make room: beamwired gc --dry-run shows what nobody needs")
        elif part < LITTLE_ROOM:
            yield warning("disk", subject, story, "beamwired gc --dry-run shows what nobody needs")
        else:
            yield ok("disk", subject, story)
        nodes = os.statvfs(path)
        if nodes.f_files and nodes.f_ffree / nodes.f_files < NO_ROOM:
            yield error("disk", subject, f"{nodes.f_ffree} inodes are left", "remove old traces in state/traces")


def database(settings: FacilitySettings, service: ServiceName, kept: Kept) -> Iterator[Finding]:
    """The schema of what a service keeps, its clock, and who has it open."""
    where = "PostgreSQL" if settings.database.url.get_secret_value() else "SQLite"
    subject = f"{service} ({where})"
    if not kept.revision:
        yield ok("database", subject, "nothing is kept there yet")
    elif kept.revision == schema.HEAD:
        served = f"; open by {len(kept.replicas)} replicas" if kept.clock is not None else ""
        yield ok("database", subject, f"schema {kept.revision}, {len(kept.rows)} records{served}")
    elif kept.revision < schema.HEAD:
        remedy = "the services bring it up to date when they start; or: beamwired db upgrade"
        yield warning("database", subject, f"schema {kept.revision}, this release has {schema.HEAD}", remedy)
    else:
        remedy = "serve it with the release that made it"
        yield error("database", subject, f"schema {kept.revision} is newer than this release's {schema.HEAD}", remedy)
    if kept.clock is not None:
        yield _skew("PostgreSQL", kept.clock - time.time())


def clocks(layout: Layout) -> Iterator[Finding]:
    """Whether the file system, which may be another machine's, has the same time."""
    probe = layout.state / f".clock-{os.getpid()}"
    try:
        probe.touch()
        ahead = probe.stat().st_mtime - time.time()
        probe.unlink()
    except OSError as problem:
        yield error("clock", str(layout.state), f"nothing can be written there: {problem}", "make room, or mend rights")
        return
    yield _skew(f"the file system of {layout.state}", ahead)


def _skew(whose: str, ahead: float) -> Finding:
    if abs(ahead) < MOST_SKEW:
        return ok("clock", whose, "has the time of this host")
    direction = "ahead of" if ahead > 0 else "behind"
    story = f"is {abs(ahead):.0f} s {direction} this host: leases and tickets end at the wrong time"
    return warning("clock", whose, story, "let NTP keep the clocks of all hosts (timedatectl)")


def served_here(layout: Layout, settings: FacilitySettings) -> set[ServiceName]:
    """The services that a process on this host has the database file of; with PostgreSQL that is not known so."""
    if settings.database.url.get_secret_value():
        return set()
    return {name for name in SERVICE_NAMES if _exists(layout, name) and is_open(layout.database(name))}


def _exists(layout: Layout, name: ServiceName) -> bool:
    path: Path = layout.database(name)
    return path.exists()
