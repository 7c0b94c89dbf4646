"""`beamwired ledger`: everything that was issued, or that was done, for people and for programs."""

from __future__ import annotations

import asyncio
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from beamwire.services.cli.common import call_certificate_service, directory_option, json_option, print_json
from beamwire.services.config import load_facility

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from beamwire.certificate.v1 import certificate_service_pb2 as pb

PAGE = 1000


@click.command("ledger")
@click.option("--audit", is_flag=True, help="What was done, and by whom, instead of what was issued.")
@click.option("--filter", "filter_", default="", help='identity="spiffe://…", state=ISSUED; action=REVOKED.')
@click.option("-n", "--limit", type=click.IntRange(1), help="The newest so many.  [default: all]")
@directory_option
@json_option
def ledger(audit: bool, filter_: str, limit: int | None, directory: Path, as_json: bool) -> None:
    """Export the ledger of certificates, or the audit, newest first.

    \b
    beamwired ledger -n 20
    beamwired ledger --filter 'identity="spiffe://facility.test/user/alice" AND state=ISSUED'
    beamwired ledger --audit --filter action=REVOKED --json
    """
    layout, settings = load_facility(directory)

    async def call(stub: Any) -> list[dict[str, Any]]:
        if audit:
            return [audit_document(record) for record in await all_audit_records(stub, filter_, limit)]
        return [certificate_document(entry) for entry in await all_certificates(stub, filter_, limit)]

    rows = asyncio.run(call_certificate_service(layout, settings, call))
    if as_json:
        print_json(rows)
        return
    if filter_ and not rows:
        click.echo(
            "nothing matches; a filter compares the whole of what --json shows: "
            f"spiffe://{settings.trust_domain}/user/alice, REVOKED",
            err=True,
        )
    for row in rows:
        click.echo(_audit_line(row) if audit else _certificate_line(row))


async def all_certificates(stub: Any, filter_: str = "", limit: int | None = None) -> list[pb.Certificate]:
    """The newest entries of the ledger that match a filter, all without a limit."""
    from beamwire.certificate.v1 import certificate_service_pb2 as pb

    found: list[pb.Certificate] = []
    token = ""
    while limit is None or len(found) < limit:
        request = pb.ListCertificatesRequest(page_size=PAGE, page_token=token, filter=filter_)
        page = await stub.ListCertificates(request)
        found += page.certificates
        token = page.next_page_token
        if not token:
            break
    return found[:limit]


async def all_audit_records(stub: Any, filter_: str = "", limit: int | None = None) -> list[pb.AuditRecord]:
    """The newest records of the audit that match a filter, all without a limit."""
    from beamwire.certificate.v1 import certificate_service_pb2 as pb

    found: list[pb.AuditRecord] = []
    token = ""
    while limit is None or len(found) < limit:
        request = pb.ListAuditRecordsRequest(page_size=PAGE, page_token=token, filter=filter_)
        page = await stub.ListAuditRecords(request)
        found += page.audit_records
        token = page.next_page_token
        if not token:
            break
    return found[:limit]


def certificate_document(entry: pb.Certificate) -> dict[str, Any]:
    """An entry of the ledger for programs, without the chain."""
    from beamwire.certificate.v1 import certificate_service_pb2 as pb

    return {
        "name": entry.name,
        "identity": entry.identity,
        "server_names": list(entry.server_names),
        "grant": pb.Certificate.Grant.Name(entry.grant).removeprefix("GRANT_"),
        "granted_by": entry.granted_by,
        "create_time": _time(entry.create_time),
        "expire_time": _time(entry.expire_time),
        "revoke_time": _time(entry.revoke_time) if entry.HasField("revoke_time") else None,
        "revoke_reason": entry.revoke_reason,
        "authority_generation": entry.authority_generation,
    }


def audit_document(record: pb.AuditRecord) -> dict[str, Any]:
    """A record of the audit for programs."""
    return {
        "name": record.name,
        "create_time": _time(record.create_time),
        "actor": record.actor,
        "action": record.action,
        "subject": record.subject,
        "detail": record.detail,
    }


def _time(time: Timestamp) -> str:
    return f"{time.ToDatetime(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _certificate_line(row: dict[str, Any]) -> str:
    revoked = f"  revoked {row['revoke_time']} {row['revoke_reason']}" if row["revoke_time"] else ""
    return (
        f"{row['create_time']}  {row['identity']}  {row['grant'].lower()} by {row['granted_by']}  "
        f"until {row['expire_time']}  {row['name']}{revoked}"
    )


def _audit_line(row: dict[str, Any]) -> str:
    return f"{row['create_time']}  {row['action']}  {row['subject']}  by {row['actor']}  {row['detail']}".rstrip()
