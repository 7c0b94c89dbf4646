"""How the services of a facility are by their own word: health, backends, the authority."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.job.v1 import job_service_pb2_grpc as job_grpc
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.rpc.channel import connect
from beamwire.services.config import SERVICE_NAMES, FacilitySettings, Layout, ServiceName
from beamwire.services.facility import TOGETHER, find_operator
from beamwire.services.inspection.findings import Finding, error, ok, warning

ANSWER_TIMEOUT = 5.0
SERVING = health_pb2.HealthCheckResponse.SERVING


def addresses_of(settings: FacilitySettings, service: ServiceName) -> list[str]:
    """The addresses of all replicas of a service."""
    return settings.addresses().of(service).split(",")


async def health(address: str, credentials: Credentials, service: ServiceName) -> str:
    """What the replica of a service at an address says of itself, as in `SERVING`; the error if it says nothing."""
    request = health_pb2.HealthCheckRequest(service=f"beamwire.{service}.v1.{service.title()}Service")
    async with connect(address, credentials) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(request, timeout=ANSWER_TIMEOUT, wait_for_ready=False)
    said: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return said


def own_credentials(layout: Layout, names: Iterable[ServiceName] = SERVICE_NAMES) -> Credentials:
    """Credentials of this facility that are on this host: an operator's, else a service's."""
    try:
        return find_operator(layout)
    except BeamwireError:
        for path in (*(f"service/{name}" for name in names), TOGETHER):
            if layout.member(path).exists():
                return Credentials.load(layout.member(path))
        raise


async def services(layout: Layout, settings: FacilitySettings, *, served: bool) -> AsyncIterator[Finding]:
    """What each replica of each service says. `served` tells whether a service that is silent should not be."""
    try:
        credentials = own_credentials(layout)
    except BeamwireError as problem:
        yield error("services", "all", f"cannot be asked: {problem.message}", "enrol an operator on this host")
        return
    places: list[tuple[ServiceName, str]] = [
        (name, address) for name in SERVICE_NAMES for address in addresses_of(settings, name)
    ]
    answers = await asyncio.gather(
        *(health(address, credentials, name) for name, address in places), return_exceptions=True
    )
    together = len({address for _, address in places}) == 1
    if together and all(isinstance(answer, BeamwireError) for answer in answers):
        # One process serves them all: there is one thing wrong.
        places, answers = places[:1], answers[:1]
    for (name, address), answer in zip(places, answers, strict=True):
        subject = f"{name} at {address}" if len(answers) > 1 else f"all at {address}"
        if answer == "SERVING":
            yield ok("services", subject, "serves")
        elif isinstance(answer, str):
            yield warning("services", subject, f"says {answer}", "it drains or has only begun; ask again")
        elif isinstance(answer, BeamwireError | grpc.RpcError | OSError):
            which = "" if together else f"{name} "
            remedy = f"serve it: beamwired serve {which}--dir {layout.directory}; its log says why it ended"
            if not served and await _is_taken(address):
                remedy = "end what listens there (ss -ltnp), or give the service another address"
                yield error("services", subject, f"something else listens there: {answer}", remedy)
                continue
            yield (error if served else warning)("services", subject, f"does not answer: {answer}", remedy)
        elif isinstance(answer, BaseException):
            raise answer


async def _is_taken(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(1.0):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except OSError:
        return False
    writer.close()
    return True


async def backends(layout: Layout, settings: FacilitySettings) -> AsyncIterator[Finding]:
    """Whether the places where jobs run answer the Job service."""
    address = settings.addresses().of("job")
    try:
        async with connect(address, own_credentials(layout)) as channel:
            stub: Any = job_grpc.JobServiceStub(channel)
            answer = await stub.ListBackends(job_pb.ListBackendsRequest(), timeout=ANSWER_TIMEOUT)
    except BeamwireError as problem:
        yield warning("backends", f"job at {address}", f"cannot be asked: {problem.message}", "serve the Job service")
        return
    for backend in answer.backends:
        jobs = ", ".join(f"{count} {state.lower()}" for state, count in sorted(backend.job_counts.items()))
        story = f"{backend.kind}, {backend.detail or 'answers'}" + (f"; jobs: {jobs}" if jobs else "")
        if backend.available:
            yield ok("backends", backend.name, story)
        else:
            remedy = "see that its commands work for the user of the Job service (for Slurm: sinfo, scontrol ping)"
            yield error("backends", backend.name, f"does not answer: {story}", remedy)
