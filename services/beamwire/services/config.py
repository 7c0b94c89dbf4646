"""The configuration of a facility: one TOML file, every key with its meaning and its default.

`beamwired facility init` writes the file; the environment overrides it (`BEAMWIRE_DATA__HOST` is `data.host`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from glob import glob
from ipaddress import ip_network
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator

from beamwire.mesh import policy
from beamwire.mesh.addresses import Addresses, check_address, replicas
from beamwire.mesh.config import Section, Settings, load
from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason, invalid_field
from beamwire.mesh.identity.ids import OWN_ROLES, Role, is_trust_domain
from beamwire.mesh.rpc.limits import CALLS, STREAMS

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
    nodes: tuple[str, ...] = Field(
        default=(),
        description="the names or addresses of the nodes on which a batch system may run caches, which go on their "
        "certificates; empty: caches run on the host of the Buffer service alone",
    )
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
    """What one owner may have, and what one process answers at a time."""

    active_transfers: int = Field(default=16, gt=0)
    active_buffers: int = Field(default=16, gt=0, description="besides those of transfers")
    active_jobs: int = Field(default=64, gt=0, description="besides those of transfers and of the services themselves")
    job_file_bytes: int = Field(default=16 * 1024**3, gt=0, description="the files of one job, to be uploaded to")
    owner_file_bytes: int = Field(
        default=64 * 1024**3, gt=0, description="the files of all jobs of one owner, those that have ended included"
    )
    processes: int = Field(default=64, gt=0, description="MPI ranks of one streamer, processes of a user's job")
    owner_processes: int = Field(default=256, gt=0, description="MPI ranks of all streamers of one owner")
    buffer_bytes: int = Field(default=64 * 1024**3, gt=0, description="the rings of all transfers of one owner")
    kept_bytes: int = Field(default=64 * 1024**3, ge=0, description="what all kept buffers hold together")
    lease: timedelta = Field(default=timedelta(days=7), description="how long a transfer may take altogether")
    calls_in_progress: int = Field(
        default=CALLS, gt=1, description="of all users at one process, half of them of one alone; services besides"
    )
    open_streams: int = Field(default=STREAMS, gt=1, description="likewise: watches, logs, consumers behind a tunnel")


class Retention(Section):
    """How long what has ended can still be read; then it is forgotten."""

    transfers: timedelta = Field(default=timedelta(days=30), gt=timedelta(0))
    jobs: timedelta = Field(
        default=timedelta(days=30), gt=timedelta(0), description="with what they left in their files"
    )
    buffers: timedelta = Field(default=timedelta(days=30), gt=timedelta(0))


class Webhooks(Section):
    """Where the events of jobs may go."""

    private_receivers: tuple[str, ...] = Field(
        default=(),
        description="networks that are not public and may receive events all the same: `10.1.2.0/24`, or `127.0.0.0/8` "
        "for this host",
    )

    @field_validator("private_receivers")
    @classmethod
    def _are_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            ip_network(network)
        return networks


class DatabaseServer(Section):
    """Where the services keep what they know, if several replicas of each are to run."""

    url: SecretStr = Field(
        default=SecretStr(""),
        description="`postgresql+asyncpg://user@host/name`, a schema in it for each service; its password belongs into "
        "PGPASSFILE, or the whole into BEAMWIRE_DATABASE__URL; empty: SQLite files in state/, one replica",
    )

    @field_validator("url")
    @classmethod
    def _is_url(cls, url: SecretStr) -> SecretStr:
        if url.get_secret_value() and not url.get_secret_value().startswith(("postgresql+asyncpg://", "postgresql://")):
            raise ValueError("must begin with postgresql+asyncpg://, or be empty")
        return url


class BatchSystem(Section):
    """Where jobs run besides this host."""

    kind: Literal["slurm", "psij"] = Field(description="`psij` for PBS, LSF, Flux and others, through psij-python")
    executor: str = Field(default="", description="psij-python's name of the scheduler: pbs, lsf, flux, cobalt")
    path: str = Field(default="", description="the directory of Slurm's commands; empty: they are on PATH")
    conf: str = Field(default="", description="the file that SLURM_CONF shall name; empty: as the host has it")
    queue: str = Field(default="", description="the queue of jobs that name none; empty: the scheduler's own default")
    account: str = Field(default="", description="the account of jobs that name none; empty: the user's default")
    mpi: str = Field(default="pmi2", description="how srun starts MPI ranks of MPICH: one of `srun --mpi=list`")

    @model_validator(mode="after")
    def _names_an_executor(self) -> BatchSystem:
        if (self.kind == "psij") != bool(self.executor):
            raise ValueError("a backend of kind psij needs an executor, and no other has one")
        return self


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
    retention: Retention = Retention()
    webhooks: Webhooks = Webhooks()
    database: DatabaseServer = DatabaseServer()
    telemetry: Telemetry = Telemetry()
    backends: dict[str, BatchSystem] = Field(default={}, description="by the name that jobs say; besides `local`")

    @field_validator("backends")
    @classmethod
    def _are_named(cls, backends: dict[str, BatchSystem]) -> dict[str, BatchSystem]:
        for name in backends:
            if name == "local" or not re.fullmatch(r"[a-z][a-z0-9-]{0,59}", name):
                raise ValueError(f"{name[:100]!r} is not a name for a backend: a-z, 0-9 and -, and not local")
        return backends

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


def listen_address(settings: FacilitySettings, names: Sequence[ServiceName]) -> str:
    """Return where a process that serves these services listens; INVALID_FIELD if that does not follow from the file.

    It does not if they are configured apart, or if each has several addresses, those of its replicas.
    """
    addresses = {settings.addresses().of(name) for name in names}
    if len(addresses) > 1:
        raise invalid_field("services", f"{', '.join(names)} have different addresses; serve each by itself")
    (address,) = addresses
    if len(replicas(address)) > 1:
        raise invalid_field("listen", f"{', '.join(names)} may be at any of {address}; say with --listen at which one")
    return address


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
        """Return the file that a service keeps its resources in, where there is no server for that."""
        return self.state / f"{service}.sqlite"

    def database_target(self, settings: FacilitySettings, service: str) -> Path | str:
        """Return where a service keeps its resources: its file, or the URL of the database of them all."""
        return settings.database.url.get_secret_value() or self.database(service)

    def process_directories(self) -> Iterator[Path]:
        """Yield the directories of all processes that the services have started."""
        # Not `Path.glob`, which fails if a directory goes while it looks. A buffer may have several caches.
        for parent, pattern in ((self.jobs, "*/steps/*"), (self.buffers, "*/shard-*")):
            yield from sorted(parent / found for found in glob(pattern, root_dir=parent))  # noqa: PTH207


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
