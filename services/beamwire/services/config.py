"""The configuration of a facility: one TOML file, every key with its meaning and its default.

`beamwired facility init` writes the file; the environment overrides it (`BEAMWIRE_DATA__HOST` is `data.host`).
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, ValidationError, field_validator

from beamwire.mesh import policy
from beamwire.mesh.addresses import Addresses, check_address
from beamwire.mesh.config import Section, Settings, load
from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.mesh.identity.ids import OWN_ROLES, Role, is_trust_domain

ServiceName = Literal["certificate", "buffer", "job", "request"]
SERVICE_NAMES: tuple[ServiceName, ...] = get_args(ServiceName)

FILE_NAME = "facility.toml"


def _check_address(address: str) -> str:
    try:
        return check_address(address)
    except BeamwireError as error:
        raise ValueError(error.violations[0].description) from error


class ServiceAddresses(Section):
    """Where each service is, when they do not share one process. Empty: at `address`."""

    certificate: str = ""
    buffer: str = ""
    job: str = ""
    request: str = ""

    @field_validator("*")
    @classmethod
    def _is_address(cls, address: str) -> str:
        return _check_address(address) if address else address


class Data(Section):
    """How the caches are reached."""

    host: str = Field(default="127.0.0.1", description="the address that caches listen on")
    advertise: str = Field(
        default="127.0.0.1", description="the name or address that peers dial, which goes on their certificates"
    )
    allow_plain_tcp: bool = Field(default=False, description="admit buffers without TLS, on a loopback address only")
    allow_ipc: bool = Field(
        default=True, description="admit buffers that processes of the services' user reach over a Unix socket"
    )
    capacity_bytes: int = Field(default=8 * 1024**3, gt=0, description="the largest ring of a buffer, with its shards")
    ticket_lifetime: timedelta = Field(
        default=timedelta(minutes=10), gt=timedelta(0), description="how long a ticket for a data connection is good"
    )


class Authority(Section):
    """Who holds the keys of the authority."""

    key_holder: str = Field(default="files", description="`files`, or the name of a plug-in of the group beamwire.keys")
    passphrase_file: str = Field(
        default="", description="the file with the passphrase of the keys; empty: they are not encrypted"
    )


class Certificates(Section):
    """How long certificates live where the policy does not say, and how often they may be asked for."""

    service: timedelta = Field(default=timedelta(hours=1), gt=timedelta(0))
    operator: timedelta = Field(default=timedelta(days=30), gt=timedelta(0))
    user: timedelta = Field(default=timedelta(days=7), gt=timedelta(0))
    job: timedelta = Field(default=timedelta(days=1), gt=timedelta(0))
    cache: timedelta = Field(default=timedelta(days=1), gt=timedelta(0))
    renewals_per_minute: int = Field(default=120, gt=0, description="of one identity")
    failed_enrollments_per_minute: int = Field(default=30, gt=0, description="from one address")

    def by_role(self) -> dict[Role, timedelta]:
        """Return the lifetimes by role."""
        return {role: getattr(self, role.value) for role in OWN_ROLES}


class Limits(Section):
    """What one owner may have."""

    active_transfers: int = Field(default=16, gt=0)
    active_buffers: int = Field(default=16, gt=0, description="besides those of transfers")
    processes: int = Field(default=64, gt=0, description="MPI ranks of one streamer")
    lease: timedelta = Field(default=timedelta(days=7), description="how long a transfer may take")


class Telemetry(Section):
    """Where traces go."""

    otlp_endpoint: str = Field(default="", description="an OTLP/gRPC collector; empty: files in state/traces")


class FacilitySettings(Settings):
    """A facility."""

    trust_domain: str
    address: str = Field(default="127.0.0.1:7443", description="where the services listen and are called")
    enroll_address: str = Field(default="127.0.0.1:7444", description="where members without a certificate enrol")
    server_names: tuple[str, ...] = Field(
        default=("localhost", "127.0.0.1"), description="the names that go on the services' certificates"
    )
    services: ServiceAddresses = ServiceAddresses()
    data: Data = Data()
    authority: Authority = Authority()
    certificates: Certificates = Certificates()
    limits: Limits = Limits()
    telemetry: Telemetry = Telemetry()

    @field_validator("trust_domain")
    @classmethod
    def _is_trust_domain(cls, trust_domain: str) -> str:
        if not is_trust_domain(trust_domain):
            raise ValueError(f"{trust_domain[:100]!r} is not a trust domain, which is a DNS name such as lcls.example")
        return trust_domain

    @field_validator("address", "enroll_address")
    @classmethod
    def _is_address(cls, address: str) -> str:
        return _check_address(address)

    def addresses(self) -> Addresses:
        """Return where the services are called."""
        own = {name: getattr(self.services, name) for name in SERVICE_NAMES}
        return Addresses(self.address, {name: address for name, address in own.items() if address})


class Layout:
    """Where a facility keeps what is its own: everything lies below one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.file = self.directory / FILE_NAME
        self.policy = self.directory / policy.FILE_NAME
        self.authority = self.directory / "authority"
        self.token_key = self.authority / "token-key.pem"
        self.state = self.directory / "state"
        self.jobs = self.state / "jobs"
        self.buffers = self.state / "buffers"
        self.traces = self.state / "traces"
        self.page_key = self.state / "page.key"

    def member(self, path: str) -> Path:
        """Return the directory of a member's credentials; `path` as in its identity, `service/request`."""
        return self.directory / "members" / path

    def database(self, service: str) -> Path:
        """Return the file that a service keeps its resources in."""
        return self.state / f"{service}.sqlite"

    def process_directories(self) -> Iterator[Path]:
        """Yield the directories of all processes that the services have started."""
        yield from sorted(self.jobs.glob("*"))
        # A buffer may have several caches.
        yield from sorted(self.buffers.glob("*/shard-*"))


def load_facility(directory: Path) -> tuple[Layout, FacilitySettings]:
    """Return the layout and settings of the facility in a directory.

    Raises:
        BeamwireError: INVALID_FIELD naming file and key, RESOURCE_NOT_FOUND if no facility is there.
    """
    layout = Layout(directory)
    if not layout.file.exists():
        raise BeamwireError(
            Reason.RESOURCE_NOT_FOUND,
            f"there is no {layout.file}; make a facility there with: beamwired facility init {directory}",
        )
    return layout, load(FacilitySettings, layout.file)


def make_settings(**values: object) -> FacilitySettings:
    """Return settings that a command line gave; INVALID_FIELD naming what is wrong."""
    try:
        return FacilitySettings.model_validate(values)
    except ValidationError as error:
        violations = [
            FieldViolation(".".join(map(str, details["loc"])), details["msg"].removeprefix("Value error, "))
            for details in error.errors()
        ]
        raise BeamwireError(Reason.INVALID_FIELD, "these settings cannot be", violations=violations) from error
