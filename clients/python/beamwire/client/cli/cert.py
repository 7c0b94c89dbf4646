"""`beamwire cert`: your certificate: what it says, renewing it now, and why one is believed or not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1.certificate_service_pb2_grpc import CertificateServiceStub
from beamwire.client.cli.context import Cli, Command, Group, as_dict, pass_cli
from beamwire.client.cli.failures import FAILED
from beamwire.client.cli.text import Row, aligned, duration
from beamwire.client.config import EnrolledFacility, choose_facility
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.renewal import (
    certificate_address,
    half_life,
    is_superseded,
    issues_of,
    remaining,
    renew_once,
)
from beamwire.mesh.identity.verifier import spiffe_id_of
from beamwire.mesh.rpc.channel import connect

_PEM_BEGIN = b"-----BEGIN CERTIFICATE-----"


@click.group(cls=Group)
def cert() -> None:
    """Look at your certificate, renew it, or have the facility explain one.

    Nothing of this is needed from day to day: every command renews the certificate by itself when half of its life is
    over.
    """


@cert.command("show", cls=Command)
@pass_cli
def show(cli: Cli) -> None:
    """Print what your certificate says, how long it is good, and whom you believe."""
    facility, credentials = _member(cli)
    issues = issues_of(credentials)
    document = {**_describe(credentials), "directory": str(facility.directory), "issues": issues}
    left = remaining(credentials)[0].total_seconds()
    rows: list[Row] = [
        ("identity", document["identity"]),
        ("serial", document["serial"]),
        ("names", ", ".join(document["server_names"]) or "none"),
        ("valid", f"until {credentials.not_after:%Y-%m-%d %H:%M:%S} UTC, {duration(left)} left"),
        ("renewed", f"from {half_life(credentials.chain_pem):%Y-%m-%d %H:%M:%S} UTC on"),
        ("issuer", document["issuer"]),
        ("sha256", document["sha256"]),
        ("believes", ", ".join(credentials.trust)),
        ("files", str(facility.directory)),
        *(("problem", issue) for issue in issues),
    ]
    cli.answer(aligned(rows), document)


@cert.command("renew", cls=Command)
@pass_cli
def renew(cli: Cli) -> None:
    """Get a new certificate for a new key now."""
    facility, credentials = _member(cli)
    if not asyncio.run(renew_once(facility.directory, force=True)):
        cli.say("another process renews it just now")
    credentials.refresh()
    until = f"{credentials.not_after:%Y-%m-%d %H:%M:%S} UTC"
    cli.answer(f"{credentials.identity} is renewed until {until}", _describe(credentials))


@cert.command("explain", cls=Command)
@click.option(
    "--peer",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="PEMFILE",
    help="The certificate of somebody else, with its chain.  [default: your own]",
)
@pass_cli
def explain(cli: Cli, peer: Path | None) -> None:
    """Ask the facility whether it believes a certificate, and if not, which check fails. Exit code 1 if not."""
    facility, credentials = _member(cli)
    chain_pem = _read_chain(peer) if peer is not None else ""
    try:
        answer = asyncio.run(_ask(facility, credentials, chain_pem))
    except BeamwireError as error:
        # One whose own certificate is refused is answered by the refusal.
        if peer is not None or error.reason not in _REFUSALS:
            raise
        answer = _refused(credentials, error)
    verdict = "believed" if answer.accepted else "not believed"
    rows: list[Row] = [(check.check, ("ok  " if check.passed else "NO  ") + check.detail) for check in answer.checks]
    cli.answer(f"{answer.identity or 'a certificate without an identity'}: {verdict}\n{aligned(rows)}", as_dict(answer))
    if not answer.accepted:
        raise click.exceptions.Exit(FAILED)


_REFUSALS = frozenset(
    {Reason.CERTIFICATE_EXPIRED, Reason.CERTIFICATE_INVALID, Reason.CERTIFICATE_REVOKED, Reason.POLICY_REFUSED}
)


def _member(cli: Cli) -> tuple[EnrolledFacility, Credentials]:
    """The facility that this person is a member of, and the credentials there."""
    facility = choose_facility(cli.config, cli.home or cli.facility)
    return facility, facility.credentials()


async def _ask(facility: EnrolledFacility, credentials: Credentials, chain_pem: str) -> pb.ExplainCertificateResponse:
    async with connect(certificate_address(facility.directory), credentials) as channel:
        request = pb.ExplainCertificateRequest(chain_pem=chain_pem)
        return await CertificateServiceStub(channel).ExplainCertificate(request)


def _refused(credentials: Credentials, error: BeamwireError) -> pb.ExplainCertificateResponse:
    check = error.metadata.get("check", "policy" if error.reason is Reason.POLICY_REFUSED else "chain")
    failed = pb.ExplainCertificateResponse.Check(check=check, passed=False, detail=error.message)
    return pb.ExplainCertificateResponse(accepted=False, identity=str(credentials.identity), checks=[failed])


def _read_chain(path: Path) -> str:
    """The certificates in a file; a key that lies beside them stays here."""
    content = path.read_bytes()
    if _PEM_BEGIN not in content:
        raise invalid_field("peer", f"{path} holds no certificate in PEM")
    try:
        certificates = x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise invalid_field("peer", f"{path} cannot be read: {error}") from error
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in certificates)


def _describe(credentials: Credentials) -> dict[str, Any]:
    leaf = x509.load_pem_x509_certificates(credentials.chain_pem)[0]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    return {
        "identity": str(spiffe_id_of(leaf)),
        "serial": f"{leaf.serial_number:x}",
        "server_names": [*names.get_values_for_type(x509.DNSName), *addresses],
        "not_before": leaf.not_valid_before_utc.isoformat(),
        "expire_time": leaf.not_valid_after_utc.isoformat(),
        "renew_time": half_life(credentials.chain_pem).isoformat(),
        "superseded": is_superseded(credentials),
        "issuer": leaf.issuer.rfc4514_string(),
        "sha256": leaf.fingerprint(hashes.SHA256()).hex(),
        "believes": sorted(credentials.trust),
    }
