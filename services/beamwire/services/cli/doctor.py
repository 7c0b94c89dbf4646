"""`beamwired doctor` and `health`: how a facility is, and what to do about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import click

from beamwire.mesh.errors import BeamwireError
from beamwire.services.cli.common import EXIT_FAILED, directory_option, json_option, print_json
from beamwire.services.config import SERVICE_NAMES, FacilitySettings, Layout, ServiceName, load_facility
from beamwire.services.inspection.findings import Finding, Report, Severity, error, report

COLOURS = {Severity.OK: "green", Severity.WARNING: "yellow", Severity.ERROR: "red"}


@click.command()
@directory_option
@json_option
@click.option("--junit", type=click.Path(dir_okay=False, path_type=Path), help="Write a JUnit file too.")
@click.option("-q", "--quiet", is_flag=True, help="Show only what is not well.")
@click.option("--offline", is_flag=True, help="Call no service: look at files, database and this host alone.")
def doctor(directory: Path, as_json: bool, junit: Path | None, quiet: bool, offline: bool) -> None:
    """Say how the facility is, served or not, and what to do about what is not well. It changes nothing.

    \b
    Looks at configuration, policy, certificates, authority, databases, clocks, disks, services, backends, and whether
    processes, rings and directories on this host and the records of the services belong together.

    \b
    Exit codes: 0 all is well; 1 somebody has to know something; 2 something does not work.
    """
    layout, settings = load_facility(directory)
    found = asyncio.run(examine(layout, settings, offline=offline))
    if junit is not None:
        junit.write_bytes(found.to_junit())
    if as_json:
        print_json(found.to_json())
    else:
        _show(found, quiet)
    raise SystemExit(found.exit_code)


@click.command()
@click.argument("services", nargs=-1, type=click.Choice(SERVICE_NAMES))
@directory_option
@click.option("--address", help="Ask the replica at this address only.  [default: where the services are called]")
def health(services: tuple[ServiceName, ...], directory: Path, address: str | None) -> None:
    """Ask SERVICES (all four if none is named) whether they serve: for probes of containers and load balancers.

    \b
    beamwired health job --address 127.0.0.1:7445

    Exit code 0 if all serve, 1 if not: one that drains says NOT_SERVING.
    """
    from beamwire.services.inspection.online import addresses_of, own_credentials
    from beamwire.services.inspection.online import health as ask

    layout, settings = load_facility(directory)
    credentials = own_credentials(layout, services or SERVICE_NAMES)
    well = True
    for name in services or SERVICE_NAMES:
        for place in [address] if address else addresses_of(settings, name):
            try:
                answer = asyncio.run(ask(place, credentials, name))
            except BeamwireError as problem:
                answer = problem.message
            click.echo(f"{name} at {place}: {answer}")
            well = well and answer == "SERVING"
    raise SystemExit(0 if well else EXIT_FAILED)


async def examine(layout: Layout, settings: FacilitySettings, *, offline: bool = False) -> Report:
    """Look at everything."""
    findings = [finding async for finding in _findings(layout, settings, offline)]
    return report(settings.trust_domain, findings)


async def _findings(layout: Layout, settings: FacilitySettings, offline: bool) -> AsyncIterator[Finding]:
    from beamwire.services.inspection import offline as files
    from beamwire.services.inspection import online, reconciliation, records, remains, scheduled

    for checks in (
        files.configuration(layout, settings),
        files.policy(layout, settings),
        files.certificates(layout),
        files.authority(layout, settings),
        files.disks(layout),
        files.clocks(layout),
    ):
        for finding in checks:
            yield finding
    served = bool(files.served_here(layout, settings))
    # Before the records are read: see `remains.Host`.
    host = remains.look(layout)
    kept = {}
    for service in SERVICE_NAMES:
        try:
            kept[service] = await records.read(layout, settings, service)
        except BeamwireError as problem:
            yield error("database", service, problem.message, "without it the service does not serve")
            continue
        for finding in files.database(settings, service, kept[service]):
            yield finding
    for service in remains.without_records(host, kept):
        del kept[service]
        remedy = "say where they are, as to the services: BEAMWIRE_DATABASE__URL, or [database] url; or restore them"
        yield error("database", service, "there are no records of what it has on this host", remedy)
    served = served or any(content.replicas for content in kept.values())
    for checks in (
        reconciliation.reconcile(host, kept, served=served),
        reconciliation.stuck(kept, served=served),
        reconciliation.stranded(kept, settings.backends),
        reconciliation.webhooks(kept),
    ):
        for finding in checks:
            yield finding
    if not offline:
        jobs = scheduled.Scheduled()
        if "job" in kept and kept["job"].revision:
            jobs = await scheduled.look(layout, settings, lambda: records.read(layout, settings, "job"))
        for finding in reconciliation.of_batch_systems(jobs):
            yield finding
        async for finding in online.services(layout, settings, served=served):
            yield finding
        async for finding in online.backends(layout, settings):
            yield finding


def _show(found: Report, quiet: bool) -> None:
    for finding in found.findings:
        if not quiet or finding.severity is not Severity.OK:
            click.secho(str(finding), fg=COLOURS[finding.severity])
    counts = found.counts()
    click.echo(f"{found.facility}: {counts['error']} errors, {counts['warning']} warnings, {counts['ok']} well")
