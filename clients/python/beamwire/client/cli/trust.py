"""`beamwire trust`: which other facilities this one believes, and how two facilities come to know each other."""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1.certificate_service_pb2_grpc import CertificateServiceStub
from beamwire.client.cli.context import Cli, Command, Group, as_dict, pass_cli
from beamwire.client.cli.text import Row, age, aligned, columns, counted, time_of
from beamwire.client.config import EnrolledFacility, choose_facility, enrolled_facilities
from beamwire.client.operators import DEFAULT_DIRECTORY, FACILITY_FILE, operated_facility
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.identity.ids import Role
from beamwire.mesh.identity.introduction import MAX_LENGTH, Introduction, check_fingerprint, fingerprint
from beamwire.mesh.rpc.channel import connect

if TYPE_CHECKING:
    from beamwire.certificate.v1.certificate_service_pb2_grpc import CertificateServiceAsyncStub

T = TypeVar("T")

# Accepting and refreshing wait for the other facility.
_SECONDS = 30.0
_BUNDLES = "trustBundles/"
_HEADER = ("FACILITY", "ADDRESS", "SEQUENCE", "REVOKED", "READ", "PROBLEM")


class _OperatorCommand(Command):
    """A command that operators give; `--dir` names the facility as it does for `beamwired`."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params.append(
            click.Option(
                ("-d", "--dir", "directory"),
                type=click.Path(file_okay=False, path_type=Path),
                envvar="BEAMWIRE_FACILITY_DIR",
                show_envvar=True,
                help="The facility's directory, for its operator.  [default: where you are enrolled, or ./facility]",
            )
        )


@click.group(cls=Group)
def trust() -> None:
    """Believe the members of other facilities, or no longer. For operators.

    \b
    Two facilities come to know each other in four steps, of which each makes one believe the other:
      at a.test:  beamwire trust introduce -o a.introduction
      at b.test:  beamwire trust accept a.introduction      (compare the fingerprint by telephone)
      at b.test:  beamwire trust introduce -o b.introduction
      at a.test:  beamwire trust accept b.introduction

    What the members of the other one may do is for policy.toml to say.
    """


@trust.command(cls=_OperatorCommand)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write it to a file.")
@click.option("--days", type=click.IntRange(1, 30), default=1, show_default=True, help="How long it may be accepted.")
@pass_cli
def introduce(cli: Cli, directory: Path | None, output: Path | None, days: int) -> None:
    """Make the introduction by which another facility comes to believe this one. It is no secret."""
    request = pb.IntroduceFacilityRequest()
    request.ttl.FromTimedelta(timedelta(days=days))
    made = _ask(_operator(cli, directory), lambda service: service.IntroduceFacility(request))
    if output is not None:
        output.write_text(made.document + "\n", encoding="utf-8")
    file = str(output or "FILE")
    cli.answer(f"wrote the introduction of {made.trust_domain} to {file}" if output else made.document, made)
    cli.say(f"fingerprint: {made.fingerprint}")
    cli.say(
        f"good until {time_of(made.expire_time)}. The other facility's operator runs: beamwire trust accept {file}\n"
        "and compares the fingerprint with you, by telephone say. That makes it believe this one, and not the reverse."
    )


@trust.command(cls=_OperatorCommand)
@click.argument("file", type=click.File("r", encoding="utf-8"), metavar="FILE")
@click.option("--fingerprint", "expected", help="The fingerprint that the other operator read out.")
@click.option("--yes", is_flag=True, help="Do not ask: the file came on a way on which nobody can have changed it.")
@pass_cli
def accept(cli: Cli, directory: Path | None, file: Any, expected: str | None, yes: bool) -> None:
    """Believe the facility whose introduction is in FILE (`-` for standard input)."""
    # One character more, so that what is too long is not cut to something else.
    document = file.read(MAX_LENGTH + 3).strip()
    introduction = Introduction.read(document, datetime.now(UTC))
    if expected:
        check_fingerprint(document, expected)
    operator = _operator(cli, directory)
    if not expected and not yes:
        _confirm(introduction, document)
    request = pb.AcceptIntroductionRequest(document=document, fingerprint=expected or "", request_id=str(uuid.uuid4()))
    bundle = _ask(operator, lambda service: service.AcceptIntroduction(request, timeout=_SECONDS))
    other, own = introduction.trust_domain, operator.trust_domain
    cli.answer(f"{other} is believed here, at {own}", bundle)
    if bundle.refresh_error:
        cli.say(f"warning: its revocations are not known yet: {bundle.refresh_error}")
    cli.say(
        f'its members may do nothing until a rule of policy.toml lets them in, with identities = ["spiffe://{other}/…"]\n'
        f"{other} does not believe {own} by this; for that, run here: beamwire trust introduce"
    )


@trust.command(name="list", cls=_OperatorCommand)
@pass_cli
def list_(cli: Cli, directory: Path | None) -> None:
    """List the facilities that are believed, this one first."""
    bundles = _ask(_member(cli, directory), _all_bundles)
    rows = [
        [
            _domain(bundle),
            bundle.address,
            str(bundle.sequence),
            str(_revoked_count(bundle)),
            "-" if index == 0 else f"{age(bundle.refresh_time)} ago",
            bundle.refresh_error,
        ]
        for index, bundle in enumerate(bundles)
    ]
    cli.answer(columns(_HEADER, rows), {"trust_bundles": [as_dict(bundle) for bundle in bundles]})


@trust.command(cls=_OperatorCommand)
@click.argument("domain")
@click.option("--pem", is_flag=True, help="Print its root certificates only, for other programs.")
@pass_cli
def show(cli: Cli, directory: Path | None, domain: str, pem: bool) -> None:
    """Print what is believed of the facility DOMAIN."""
    request = pb.GetTrustBundleRequest(name=_BUNDLES + domain)
    bundle = _ask(_member(cli, directory), lambda service: service.GetTrustBundle(request))
    cli.answer(bundle.roots_pem.strip() if pem else aligned(_rows(bundle)), bundle)


@trust.command(cls=_OperatorCommand)
@click.argument("domain")
@pass_cli
def refresh(cli: Cli, directory: Path | None, domain: str) -> None:
    """Ask the facility DOMAIN for its roots and revocations now, which also happens by itself."""
    request = pb.RefreshTrustBundleRequest(name=_BUNDLES + domain, request_id=str(uuid.uuid4()))
    bundle = _ask(_operator(cli, directory), lambda service: service.RefreshTrustBundle(request, timeout=_SECONDS))
    cli.answer(f"{domain} is at {bundle.sequence}, read at {time_of(bundle.refresh_time)}", bundle)


@trust.command(cls=_OperatorCommand)
@click.argument("domain")
@pass_cli
def remove(cli: Cli, directory: Path | None, domain: str) -> None:
    """Believe the facility DOMAIN no more: its members are refused, and cut off where they are connected."""
    operator = _operator(cli, directory)
    request = pb.DeleteTrustBundleRequest(name=_BUNDLES + domain, request_id=str(uuid.uuid4()))
    _ask(operator, lambda service: service.DeleteTrustBundle(request))
    own = operator.trust_domain
    cli.answer(f"{domain} is believed no more at {own}", {"trust_domain": domain})
    cli.say(f"if it is to believe {own} no more either, its operator runs: beamwire trust remove {own}")


def _operator(cli: Cli, directory: Path | None) -> EnrolledFacility:
    """The facility that this person operates: in the directory named, enrolled as an operator, or ./facility."""
    if directory is not None:
        return operated_facility(directory)
    enrolled = [facility for facility in enrolled_facilities(cli.config) if _is_operator(facility)]
    if cli.facility or len(enrolled) == 1:
        return choose_facility(cli.config, cli.facility or enrolled[0].trust_domain)
    return operated_facility(DEFAULT_DIRECTORY)


def _member(cli: Cli, directory: Path | None) -> EnrolledFacility:
    """The facility to look at: as for an operator, or any that this person is enrolled in."""
    looked_at = directory is None and not (DEFAULT_DIRECTORY / FACILITY_FILE).is_file()
    return choose_facility(cli.config, cli.facility) if looked_at else _operator(cli, directory)


def _is_operator(facility: EnrolledFacility) -> bool:
    try:
        return facility.credentials().identity.role is Role.OPERATOR
    except BeamwireError:
        return False


def _ask(facility: EnrolledFacility, call: Callable[[CertificateServiceAsyncStub], Awaitable[T]]) -> T:
    async def asked() -> T:
        address = facility.addresses.of("certificate")
        async with connect(address, facility.credentials(), trust_domain=facility.trust_domain) as channel:
            return await call(CertificateServiceStub(channel))

    return asyncio.run(asked())


async def _all_bundles(service: CertificateServiceAsyncStub) -> list[pb.TrustBundle]:
    bundles: list[pb.TrustBundle] = []
    request = pb.ListTrustBundlesRequest(page_size=1000)
    while True:
        page = await service.ListTrustBundles(request)
        bundles += page.trust_bundles
        request.page_token = page.next_page_token
        if not page.next_page_token:
            return bundles


def _confirm(introduction: Introduction, document: str) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError(
            "nobody can be asked here; give --fingerprint as the other operator read it out, or --yes"
        )
    rows = [
        ("facility", introduction.trust_domain),
        ("address", introduction.address),
        ("enrolment", introduction.enroll_address),
        ("fingerprint", fingerprint(document)),
    ]
    click.echo(aligned(rows), err=True)
    question = f"Does the operator of {introduction.trust_domain} read out the same fingerprint?"
    click.confirm(question, abort=True, err=True)


def _domain(bundle: pb.TrustBundle) -> str:
    return bundle.name.removeprefix(_BUNDLES)


def _revoked_count(bundle: pb.TrustBundle) -> int:
    return len(x509.load_der_x509_crl(bundle.revocation_list)) if bundle.revocation_list else 0


def _rows(bundle: pb.TrustBundle) -> list[Row]:
    roots = x509.load_pem_x509_certificates(bundle.roots_pem.encode())
    return [
        ("facility", _domain(bundle)),
        ("address", bundle.address),
        ("enrolment", bundle.enroll_address),
        ("sequence", str(bundle.sequence)),
        *(("root", _root_text(root)) for root in roots),
        ("revoked", counted(_revoked_count(bundle), "certificate")),
        ("believed", f"since {time_of(bundle.create_time)}" if bundle.HasField("create_time") else ""),
        ("read", time_of(bundle.refresh_time)),
        ("problem", bundle.refresh_error),
    ]


def _root_text(root: x509.Certificate) -> str:
    return f"{root.fingerprint(hashes.SHA256()).hex()} until {root.not_valid_after_utc:%Y-%m-%d}"
