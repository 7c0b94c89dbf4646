"""What the commands of `beamwired` share: the facility's directory, errors as a few lines, calls as its operator."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.config import FILE_NAME, FacilitySettings, Layout

EXIT_FAILED, EXIT_USAGE = 1, 2
DEFAULT_DIRECTORY = "facility"

T = TypeVar("T")

directory_option = click.option(
    "-d",
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="BEAMWIRE_FACILITY_DIR",
    default=DEFAULT_DIRECTORY,
    show_default=True,
    show_envvar=True,
    help=f"The directory that holds {FILE_NAME} and everything of the facility.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Commands(click.Group):
    """Shows an error as one or a few lines, with the remedy, instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; exit 2 if what it was given cannot be, 1 for every other error."""
        # What gRPC's core would print besides says nothing that our errors do not.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        try:
            return super().invoke(ctx)
        except BeamwireError as error:
            click.echo(f"beamwired: {error.message}", err=True)
            for violation in error.violations:
                line = f"  {violation.field}: {violation.description}"
                if violation.description not in error.message:
                    click.echo(line, err=True)
            ctx.exit(EXIT_USAGE if error.violations else EXIT_FAILED)


def print_json(document: object) -> None:
    """Print a document for programs."""
    click.echo(json.dumps(document, indent=2))


def whole_identity(settings: FacilitySettings, identity: str) -> str:
    """The SPIFFE id that a person means: `user/alice` is one of this facility."""
    return identity if identity.startswith("spiffe://") else f"spiffe://{settings.trust_domain}/{identity}"


def no_records(layout: Layout, settings: FacilitySettings, service: str) -> BeamwireError:
    """The error where it cannot be known what on this host somebody needs."""
    where = "at [database] url" if settings.database.url.get_secret_value() else f"in {layout.database(service)}"
    return BeamwireError(
        Reason.ILLEGAL_STATE,
        f"the {service} service has something on this host, and there are no records of it {where}: nobody can say "
        "what is needed, and nothing was removed. Are they elsewhere, as BEAMWIRE_DATABASE__URL says to the service?",
    )


async def call_certificate_service(
    layout: Layout, settings: FacilitySettings, call: Callable[[Any], Awaitable[T]]
) -> T:
    """What `call` returns, given a stub of the facility's Certificate service that calls as its operator.

    Raises:
        BeamwireError: SERVICE_UNAVAILABLE, which says how to serve the facility, or what the call raises.
    """
    from beamwire.certificate.v1 import certificate_service_pb2_grpc
    from beamwire.mesh.rpc.channel import connect
    from beamwire.services.facility import find_operator

    address = settings.addresses().of("certificate")
    async with connect(address, find_operator(layout)) as channel:
        try:
            return await call(certificate_service_pb2_grpc.CertificateServiceStub(channel))
        except BeamwireError as error:
            if error.reason is not Reason.SERVICE_UNAVAILABLE:
                raise
            raise BeamwireError(
                Reason.SERVICE_UNAVAILABLE,
                f"the Certificate service of {settings.trust_domain} is not served at {address}; "
                f"serve it with: beamwired serve --dir {layout.directory}",
            ) from error
