"""The composition root: which objects a serving process is made of, in the order in which they need each other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import grpc

from beamwire.buffer.v1 import buffer_service_pb2_grpc
from beamwire.certificate.v1 import certificate_service_pb2_grpc
from beamwire.job.v1 import job_service_pb2_grpc
from beamwire.mesh import telemetry
from beamwire.mesh.addresses import replicas
from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.idempotency import Idempotency
from beamwire.mesh.identity.biscuits import TokenChecker, TokenKey
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.membership import Membership
from beamwire.mesh.identity.trust import Trust
from beamwire.mesh.outbox import Outbox
from beamwire.mesh.pages import Pager
from beamwire.mesh.policy import PolicyFile
from beamwire.mesh.retention import Retention
from beamwire.mesh.rpc.access import Gate
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.rpc.limits import CallLimits
from beamwire.mesh.rpc.server import Server, Service
from beamwire.mesh.store import Store
from beamwire.mesh.tasks import TaskRunner
from beamwire.request.v1 import request_service_pb2_grpc
from beamwire.services import spares
from beamwire.services.backends import make_backends
from beamwire.services.buffer.batch import BatchSystems
from beamwire.services.buffer.clients import CacheJobs, TransferClient
from beamwire.services.buffer.domain import Buffers
from beamwire.services.buffer.keeping import Keeping
from beamwire.services.buffer.model import BufferRecord
from beamwire.services.buffer.placement import Placement
from beamwire.services.buffer.reconciliation import Reconciler
from beamwire.services.buffer.service import BufferService
from beamwire.services.buffer.sites import Sites
from beamwire.services.certificate.access import AccessAdviser
from beamwire.services.certificate.delegation import DelegationRecord, Delegations
from beamwire.services.certificate.federation import Federation
from beamwire.services.certificate.office import Office
from beamwire.services.certificate.rates import Rates
from beamwire.services.certificate.service import CertificateService, Desks
from beamwire.services.config import SERVICE_NAMES, FacilitySettings, Layout, ServiceName, listen_address
from beamwire.services.facility import TOGETHER, open_office, renew_services
from beamwire.services.job.domain import JobLimits, Jobs
from beamwire.services.job.driver import Surroundings
from beamwire.services.job.model import JobRecord
from beamwire.services.job.receivers import Receivers
from beamwire.services.job.service import JobService
from beamwire.services.job.webhooks import Deliverer
from beamwire.services.minter import Minter
from beamwire.services.request.clients import BufferClient, JobClient
from beamwire.services.request.datasets import Datasets
from beamwire.services.request.domain import Transfers
from beamwire.services.request.model import TransferRecord
from beamwire.services.request.placing import ConsumerClient
from beamwire.services.request.preflight import StreamerCheck
from beamwire.services.request.quotas import Limits
from beamwire.services.request.service import RequestService
from beamwire.services.supervision import keep_alive

# Seconds that calls in progress have to be answered in when the process is told to end. All but a few need far less.
STOP_GRACE = 10.0
# Seconds, at most.
LOOK_AFTER_PERIOD = 600.0
# A process that serves renews at 45 to 55 % of a certificate's life; what is not renewed at 60 % has nobody who does.
LATE = 0.2

_log = logging.getLogger(__name__)


@dataclass
class _Parts:
    """What the services of one process share while they are being put together."""

    layout: Layout
    settings: FacilitySettings
    runner: TaskRunner
    stack: AsyncExitStack
    pager: Pager
    policy: PolicyFile
    services: list[Service] = field(default_factory=list)
    idempotency: dict[str, Idempotency] = field(default_factory=dict)
    resume: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    start: dict[str, Callable[[], Coroutine[Any, Any, None]]] = field(default_factory=dict)
    members: dict[str, Credentials] = field(default_factory=dict)
    # Who wants to know whom to believe, now and after each change.
    believers: list[Callable[[Trust], None]] = field(default_factory=list)

    def credentials(self, name: str) -> Credentials:
        """Return the credentials of a service, which all of this process share and its membership renews."""
        if name not in self.members:
            self.members[name] = Credentials.load(self.layout.member(f"service/{name}"))
        return self.members[name]

    def channel(self, caller: ServiceName, callee: ServiceName) -> grpc.aio.Channel:
        """Return a channel from one service to another, with the caller's own identity."""
        channel = connect(self.settings.addresses().of(callee), self.credentials(caller))
        self.stack.push_async_callback(channel.close)
        return channel

    async def database(self, name: ServiceName) -> Database:
        database = await Database.open(self.layout.database_target(self.settings, name), name)
        self.stack.push_async_callback(database.close)
        return database

    def add(self, name: str, add: Callable[..., None], servicer: object, database: Database) -> None:
        full_name = f"beamwire.{name.removesuffix('Service').lower()}.v1.{name}"
        self.services.append(Service(full_name, add, servicer))
        self.idempotency[full_name] = Idempotency(database)


async def _add_certificate(parts: _Parts) -> None:
    layout, settings, credentials = parts.layout, parts.settings, parts.credentials("certificate")
    database = await parts.database("certificate")
    office = await open_office(layout, settings, database, parts.policy)
    renewal = partial(renew_services, layout, office.registrar, settings, database)
    office.rotation.renew = renewal
    await renewal()
    # What was published while the services were away counts from their first call on.
    for name in (*SERVICE_NAMES, TOGETHER.removeprefix("service/")):
        # Another replica may know more by now.
        parts.credentials(name).change_trust(lambda trust: trust.told(office.board.trust.values(), complete=True))
    rates = Rates(settings.certificates.renewals_per_minute, settings.certificates.failed_enrollments_per_minute)
    federation = Federation(office.board, lambda: office.rotation.authority, office.audit, credentials)
    tokens = Store(database, DelegationRecord)
    async with database.exclusive("token key"):
        key = TokenKey.open(layout.token_key)
    desks = Desks(
        registrar=office.registrar,
        rotation=office.rotation,
        board=office.board,
        audit=office.audit,
        rates=rates,
        policy=parts.policy,
        federation=federation,
        access=AccessAdviser(parts.policy, credentials),
        delegations=await Delegations.open(key, tokens, office.board, parts.policy, office.audit),
    )
    service = CertificateService(
        desks, office.certificates, office.audit_records, parts.pager, settings.addresses(), settings.enroll_address
    )
    parts.start["authority"] = partial(_look_after, parts, office, renewal)
    parts.start["trust"] = office.board.follow
    parts.start["steps of rotations"] = office.stand_in
    parts.start["federation"] = federation.follow
    parts.start["guests"] = office.follow_homes
    add = certificate_service_pb2_grpc.add_CertificateServiceServicer_to_server
    parts.add("CertificateService", add, service, database)


async def _add_buffer(parts: _Parts) -> None:
    database = await parts.database("buffer")
    store = Store(database, BufferRecord)
    data = parts.settings.data
    placement = Placement(
        host=data.host,
        advertise=data.advertise,
        allow_plain_tcp=data.allow_plain_tcp,
        allow_ipc=data.allow_ipc,
        capacity_bytes=data.capacity_bytes,
        active_buffers=parts.settings.limits.active_buffers,
        # A transfer's buffer outlives the transfer's lease by a little.
        lease=parts.settings.limits.lease + timedelta(hours=1),
        trace_dir=_trace_dir(parts),
        otlp_endpoint=parts.settings.telemetry.otlp_endpoint,
        nodes=data.nodes,
    )
    mint = Minter(parts.channel("buffer", "certificate"))
    domain, retention = parts.settings.trust_domain, parts.settings.retention.buffers
    credentials = parts.credentials("buffer")
    kept_ready = spares.for_caches()
    sites = Sites(parts.layout.buffers, domain, placement, mint, kept_ready)
    jobs = CacheJobs(parts.channel("buffer", "job"), str(credentials.identity))
    sites.add(BatchSystems(jobs, credentials, placement, sites.rings))
    buffers = Buffers(store, sites, domain, placement, parts.runner, parts.policy)
    service = BufferService(buffers, store, parts.pager, data.ticket_lifetime, credentials, retention)
    parts.add("BufferService", buffer_service_pb2_grpc.add_BufferServiceServicer_to_server, service, database)
    parts.resume.append(buffers.resume)
    parts.believers.append(buffers.believe)
    transfers = TransferClient(parts.channel("buffer", "request"))
    parts.start["buffers"] = buffers.run
    parts.start["kept buffers"] = Keeping(store, parts.settings.limits.kept_bytes).run
    parts.start["remains of buffers"] = Reconciler(store, buffers, sites, retention, transfers).run
    parts.start["trust of caches"] = buffers.spread_trust
    parts.start["spare caches"] = kept_ready.run


async def _add_job(parts: _Parts) -> None:
    database = await parts.database("job")
    store = Store(database, JobRecord)
    surroundings = Surroundings(_trace_dir(parts), parts.settings.telemetry.otlp_endpoint)
    mint = Minter(parts.channel("job", "certificate"))
    limits, receivers = parts.settings.limits, Receivers(parts.settings.webhooks.private_receivers)
    kept_ready = spares.for_jobs()
    jobs = Jobs(
        store,
        parts.layout.jobs,
        make_backends(parts.layout, parts.settings, kept_ready),
        mint,
        parts.runner,
        surroundings,
        parts.policy,
        JobLimits(limits.active_jobs, limits.job_file_bytes, limits.owner_file_bytes, parts.settings.retention.jobs),
        receivers,
        mint.taken_until,
    )
    service = JobService(jobs, store, parts.pager, parts.settings.trust_domain, limits.processes)
    parts.add("JobService", job_service_pb2_grpc.add_JobServiceServicer_to_server, service, database)
    parts.resume.append(jobs.resume)
    parts.start["drivers of jobs"] = jobs.drivers.run
    parts.start["spare streamers"] = kept_ready.run
    parts.start["events of jobs"] = Deliverer(store, Outbox(database), receivers).run
    parts.start["retention of jobs"] = Retention(
        store, jobs.limits.retention, lambda record: record.end_time, jobs.forget
    ).run


async def _add_request(parts: _Parts) -> None:
    database = await parts.database("request")
    store = Store(database, TransferRecord)
    limits, keep_for = parts.settings.limits, parts.settings.retention.transfers
    kept_ready = spares.for_checks()
    transfers = Transfers(
        store,
        BufferClient(parts.channel("request", "buffer"), parts.settings.trust_domain, limits.lease),
        JobClient(parts.channel("request", "job"), limits.lease),
        StreamerCheck(spares=kept_ready),
        parts.runner,
        Limits(
            active_transfers=limits.active_transfers,
            processes=limits.processes,
            lease=limits.lease,
            owner_processes=limits.owner_processes,
            buffer_bytes=limits.buffer_bytes,
        ),
        Datasets([parts.layout.directory]),
        parts.policy,
        ConsumerClient(parts.credentials("request"), parts.settings.addresses().of("job"), parts.stack),
    )
    service = RequestService(transfers, store, parts.pager, parts.settings.trust_domain, keep_for)
    parts.add("RequestService", request_service_pb2_grpc.add_RequestServiceServicer_to_server, service, database)
    parts.resume.append(transfers.drivers.resume)
    parts.start["drivers of transfers"] = transfers.drivers.run
    parts.start["spare checks"] = kept_ready.run
    parts.start["retention of transfers"] = Retention(store, keep_for, lambda record: record.end_time, store.delete).run


async def _look_after(parts: _Parts, office: Office, renewal: Callable[..., Awaitable[None]]) -> None:
    """Do now and then what the authority has to do of itself, and renew what no process keeps renewed."""
    period = min(LOOK_AFTER_PERIOD, parts.settings.certificates.service.total_seconds() / 20)
    while True:
        await asyncio.sleep(period)
        try:
            await office.look_after()
            await renewal(late=LATE)
        except (BeamwireError, OSError):
            # A full disk, say: what was signed before is good for a while, and it is tried again before.
            _log.exception("the authority could not be looked after; it is tried again")


def _join(parts: _Parts, identity: str) -> Membership:
    """Return what keeps all services of this process members; the one that serves is the first to know."""
    parts.credentials(identity)
    members = sorted(parts.members.items(), key=lambda member: member[0] != identity)
    membership = Membership([credentials for _, credentials in members], parts.settings.addresses().of("certificate"))
    for believer in parts.believers:
        membership.on_trust(believer)
        believer(members[0][1].trust)
    return membership


def _trace_dir(parts: _Parts) -> str:
    return "" if parts.settings.telemetry.otlp_endpoint else str(parts.layout.traces)


# In the order in which they need each other.
_ADD: dict[ServiceName, Callable[[_Parts], Awaitable[None]]] = {
    "certificate": _add_certificate,
    "buffer": _add_buffer,
    "job": _add_job,
    "request": _add_request,
}


async def serve(
    layout: Layout,
    settings: FacilitySettings,
    names: Sequence[ServiceName] = SERVICE_NAMES,
    *,
    listen: str = "",
    ready: Callable[[str], None] = lambda _address: None,
    stopping: Callable[[], None] = lambda: None,
) -> None:
    """Serve some services of a facility until SIGTERM or SIGINT.

    `listen` is the `host:port` of this process, if it is not the services' only address. `ready` is told it once calls
    are answered, `stopping` is called when the end begins: new calls and streams are told to go elsewhere, calls in
    progress are answered.

    Jobs and caches that run when the process ends go on, and are taken up again by the next that serves.

    Raises:
        BeamwireError: LAUNCH_FAILED if the address is taken, CERTIFICATE_INVALID if credentials cannot be read.
    """
    address = listen or listen_address(settings, names)
    identity = TOGETHER if len(names) > 1 else f"service/{names[0]}"
    setup = telemetry.setup(
        identity.removeprefix("service/"),
        trace_dir=None if settings.telemetry.otlp_endpoint else layout.traces,
        otlp_endpoint=settings.telemetry.otlp_endpoint,
    )
    async with AsyncExitStack() as stack:
        stack.callback(setup.shutdown)
        runner = TaskRunner()
        # Before anything is opened: a policy that cannot be read must not be served by.
        policy = PolicyFile(layout.policy, settings.trust_domain)
        parts = _Parts(layout, settings, runner, stack, Pager(layout.page_key.read_bytes()), policy)
        for name, add in _ADD.items():
            if name in names:
                await add(parts)
        # Entered after the databases and channels, and so left before them: tasks end while what they use is there.
        await stack.enter_async_context(runner)
        for task, work in {**parts.start, "watchdog": keep_alive}.items():
            runner.start(task, work)
        # Before the first call is answered, so that no call finds a resource that lacks its driver.
        for resume in parts.resume:
            await resume()
        credentials = parts.credentials(identity.removeprefix("service/"))
        server = Server(
            credentials,
            address=address,
            services=parts.services,
            idempotency=parts.idempotency,
            gate=Gate(credentials, policy, TokenChecker(lambda: credentials.verifier.trust)),
            limits=CallLimits(settings.limits.calls_in_progress, settings.limits.open_streams),
        )
        servers = [server]
        # If this fails or is cancelled. Who is told to end has stopped them before.
        stack.push_async_callback(_stop, servers, 0)
        await server.start()
        if "certificate" in names:
            servers.append(await _listen_for_members(parts, credentials, listen))
        # Not before calls are answered: the Certificate service may be this process.
        runner.start("membership", _join(parts, identity.removeprefix("service/")).run)
        ready(address)

        async def drain() -> None:
            stopping()
            await _stop(servers, STOP_GRACE)

        await runner.run_until_signal(drain)


async def _stop(servers: Sequence[Server], grace: float) -> None:
    await asyncio.gather(*(server.stop(grace) for server in servers))


async def _listen_for_members(parts: _Parts, credentials: Credentials, listen: str) -> Server:
    """Serve the methods that need no certificate, on a listener of their own: the first address that is free.

    It is on the host that this process was told to listen on, if it was.
    """
    certificate = [service for service in parts.services if service.full_name.endswith(".CertificateService")]
    *others, last = replicas(parts.settings.enroll_address)
    for address in (*others, last):
        server = Server(
            credentials,
            address=_on_host_of(listen, address) if listen else address,
            services=certificate,
            idempotency=parts.idempotency,
            anonymous=True,
        )
        try:
            await server.start()
        except BeamwireError:
            if address == last:
                raise
        else:
            return server
    raise AssertionError("the last one is served or raises")


def _on_host_of(listen: str, address: str) -> str:
    return f"{listen.rpartition(':')[0]}:{address.rpartition(':')[2]}"
