"""Calls per second of each service over mutual TLS, beside a bare gRPC server with the same certificates.

The bare server answers the same calls of the same client with the same message, made once, and does nothing else.
Besides: what our channel costs a caller, what it costs to know at each call who calls and whether they may, how long it
takes from a transfer's creation to its first batch, and what a server does that is asked more than it can answer.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from google.protobuf.message import Message

from beamwire.buffer.v1 import buffer_service_pb2, buffer_service_pb2_grpc
from beamwire.certificate.v1 import certificate_service_pb2, certificate_service_pb2_grpc
from beamwire.client.request import parse_request
from beamwire.job.v1 import job_service_pb2, job_service_pb2_grpc
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.enrollment import JoinToken, enroll
from beamwire.mesh.identity.ids import services_name
from beamwire.mesh.policy import FILE_NAME, PolicyFile
from beamwire.mesh.rpc.access import Gate, admit
from beamwire.mesh.rpc.channel import connect
from beamwire.request.v1 import request_service_pb2, request_service_pb2_grpc
from bench import first_event, listing, overload

BIN = Path(sys.executable).parent
# Of each: one after the other, so that whatever else the host does meets both.
RUNS, SECONDS, IN_FLIGHT = 11, 0.5, 16
GOAL = 0.7
# What identity and access may cost at each call, in seconds.
CHECK_BUDGET = 10e-6
CHECKS = 20_000
START_TIMEOUT = 30.0

Stub = Callable[[grpc.aio.Channel], Any]


@dataclass(frozen=True)
class Case:
    """A call that is made again and again: of which stub, by whom, with which answer."""

    name: str
    stub: Stub
    member: Credentials
    request: Message
    answer: Message

    @property
    def path(self) -> str:
        """The method as gRPC calls it."""
        service, _, method = self.name.partition(".")
        return f"/{self.request.DESCRIPTOR.file.package}.{service}/{method}"

    def call(self, channel: grpc.aio.Channel) -> Callable[[], Awaitable[object]]:
        """What makes the call once."""
        method = getattr(self.stub(channel), self.name.partition(".")[2])
        return lambda: method(self.request)


@dataclass(frozen=True)
class Measured:
    """What one run came to: calls per second, seconds of each call, seconds of the server's processor for each."""

    rate: float
    latencies: list[float]
    server_time: float


def run() -> list[dict[str, Any]]:
    """Measure; returns one row per service and quantity."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "facility"
        with _facility(directory) as (address, process):
            rows = asyncio.run(_measure(directory, address, process))
            rows += first_event.run(directory / "user", REQUEST, process)
            rows.append(_check_row(directory))
    return [*rows, *overload.run(), *listing.run()]


@contextmanager
def _facility(directory: Path) -> Iterator[tuple[str, psutil.Process]]:
    address, enroll_address = "127.0.0.1:17443", "127.0.0.1:17444"
    _beamwired("facility", "init", str(directory), "--address", address, "--enroll-address", enroll_address)
    command = [str(BIN / "beamwired"), "serve", "--dir", str(directory)]
    serving = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert serving.stderr is not None
    try:
        said = []
        for line in serving.stderr:
            said.append(line)
            if line.startswith("beamwired: certificate"):
                break
        else:
            raise RuntimeError(f"the facility did not start: {''.join(said)}")
        token = _beamwired("token", "user/bench", "--dir", str(directory))
        enroll(JoinToken.parse(token), directory / "user")
        yield address, psutil.Process(serving.pid)
    finally:
        serving.terminate()
        serving.communicate(timeout=START_TIMEOUT)
        _beamwired("clean", "--dir", str(directory))


def _beamwired(*arguments: str) -> str:
    return subprocess.run([str(BIN / "beamwired"), *arguments], check=True, capture_output=True, text=True).stdout


@contextmanager
def _bare_server(credentials: Path, answers: Path) -> Iterator[tuple[str, psutil.Process]]:
    command = [sys.executable, "-m", "bench.bare_server", str(credentials), str(answers)]
    bare = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert bare.stdout is not None
        yield f"127.0.0.1:{int(bare.stdout.readline())}", psutil.Process(bare.pid)
    finally:
        bare.terminate()
        bare.communicate(timeout=START_TIMEOUT)


async def _measure(directory: Path, address: str, process: psutil.Process) -> list[dict[str, Any]]:
    operator = Credentials.load(next((directory / "members" / "operator").iterdir()))
    user = Credentials.load(directory / "user")
    cases = await _cases(address, operator, user)
    answers = directory / "answers"
    answers.mkdir()
    for case in cases:
        (answers / case.path.removeprefix("/").replace("/", "-")).write_bytes(case.answer.SerializeToString())
    rows = []
    with _bare_server(directory / "members" / "service" / "facility", answers) as (bare_address, bare):
        for case in cases:
            rows += await _rows(case, (address, process), (bare_address, bare))
        rows.append(await _channel_row(cases[0], bare_address, bare))
    return rows


def _plain(address: str, member: Credentials) -> grpc.aio.Channel:
    """A channel of grpcio itself: what differs is the server."""
    options = [("grpc.ssl_target_name_override", services_name(member.identity.trust_domain))]
    return grpc.aio.secure_channel(address, member.channel_credentials(), options)


async def _cases(address: str, operator: Credentials, user: Credentials) -> list[Case]:
    """Make one resource of each kind, and return a call that reads each."""
    async with connect(address, operator) as ours, connect(address, user) as mine:
        job = await job_service_pb2_grpc.JobServiceStub(ours).CreateJob(
            job_service_pb2.CreateJobRequest(job=job_service_pb2.Job(spec=job_service_pb2.JobSpec(executable="true")))
        )
        buffer = await buffer_service_pb2_grpc.BufferServiceStub(ours).CreateBuffer(
            buffer_service_pb2.CreateBufferRequest(
                buffer=buffer_service_pb2.Buffer(spec=buffer_service_pb2.BufferSpec(capacity_bytes=1 << 20))
            )
        )
        certificates = await certificate_service_pb2_grpc.CertificateServiceStub(ours).ListCertificates(
            certificate_service_pb2.ListCertificatesRequest(page_size=1)
        )
        transfers = request_service_pb2_grpc.RequestServiceStub(mine)
        transfer = await transfers.CreateTransfer(
            request_service_pb2.CreateTransferRequest(transfer=parse_request(REQUEST).transfer), timeout=60
        )
        await transfers.CancelTransfer(request_service_pb2.CancelTransferRequest(name=transfer.name), timeout=60)
        async for _ in transfers.WatchTransfer(request_service_pb2.WatchTransferRequest(name=transfer.name)):
            pass  # until it has ended: what is measured must not change any more
        wanted: list[tuple[str, Stub, Credentials, Message]] = [
            (
                "RequestService.GetTransfer",
                request_service_pb2_grpc.RequestServiceStub,
                user,
                request_service_pb2.GetTransferRequest(name=transfer.name),
            ),
            (
                "JobService.GetJob",
                job_service_pb2_grpc.JobServiceStub,
                operator,
                job_service_pb2.GetJobRequest(name=job.name),
            ),
            (
                "BufferService.GetBuffer",
                buffer_service_pb2_grpc.BufferServiceStub,
                operator,
                buffer_service_pb2.GetBufferRequest(name=buffer.name),
            ),
            (
                "CertificateService.GetCertificate",
                certificate_service_pb2_grpc.CertificateServiceStub,
                operator,
                certificate_service_pb2.GetCertificateRequest(name=certificates.certificates[0].name),
            ),
        ]
        cases = []
        for name, stub, member, request in wanted:
            answer = await getattr(stub(mine if member is user else ours), name.partition(".")[2])(request)
            cases.append(Case(name, stub, member, request, answer))
        return cases


REQUEST = {
    "event_source": {"type": "SyntheticEventSource", "number_of_events": 16, "shape": [16, 16]},
    "data_sources": {"detector_data": {"type": "SyntheticDetector"}},
    "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 4}],
}


async def _rows(case: Case, ours: tuple[str, psutil.Process], bare: tuple[str, psutil.Process]) -> list[dict[str, Any]]:
    async with _plain(ours[0], case.member) as channel, _plain(bare[0], case.member) as bare_channel:
        runs = await _interleaved((case.call(channel), ours[1]), (case.call(bare_channel), bare[1]))
    return [
        _row(case.name, "calls/s", runs, lambda run: run.rate, goal=GOAL),
        _row(f"{case.name}, p50", "ms", runs, lambda run: _percentile(run, 50)),
        _row(f"{case.name}, p99", "ms", runs, lambda run: _percentile(run, 99)),
        _row(f"{case.name}, processor time", "µs/call", runs, lambda run: 1e6 * run.server_time),
    ]


async def _channel_row(case: Case, address: str, server: psutil.Process) -> dict[str, Any]:
    async with connect(address, case.member) as ours, _plain(address, case.member) as plain:
        runs = await _interleaved((case.call(ours), server), (case.call(plain), server))
    row = _row("our channel to the bare server", "calls/s", runs, lambda run: run.rate)
    return {**row, "baseline": "a plain grpc.aio channel to it"}


async def _interleaved(*sides: tuple[Callable[[], Awaitable[object]], psutil.Process]) -> list[list[Measured]]:
    runs: list[list[Measured]] = [[] for _ in sides]
    for call, _ in sides:
        await call()
    for _ in range(RUNS):
        for side, (call, server) in zip(runs, sides, strict=True):
            side.append(await _load(call, server))
    return runs


def _row(
    name: str,
    unit: str,
    runs: list[list[Measured]],
    quantity: Callable[[Measured], float],
    goal: float | None = None,
) -> dict[str, Any]:
    mine, base = ([quantity(run) for run in side] for side in runs)
    return {
        "case": name,
        "ours": float(f"{statistics.median(mine):.4g}"),
        "unit": unit,
        "baseline": "bare grpc.aio server, mTLS",
        "baseline_value": float(f"{statistics.median(base):.4g}"),
        "ratio": round(statistics.median(a / b for a, b in zip(mine, base, strict=True)), 2),
        "goal": goal,
        "runs": RUNS,
    }


def _percentile(run: Measured, percent: int) -> float:
    """Milliseconds."""
    return 1e3 * statistics.quantiles(run.latencies, n=100)[percent - 1]


def _check_row(directory: Path) -> dict[str, Any]:
    """How many calls a second could be checked, once the caller is known, if nothing else were to be done."""
    user = Credentials.load(directory / "user")
    service = Credentials.load(directory / "members" / "service" / "facility")
    gate = Gate(service, PolicyFile(directory / FILE_NAME, service.identity.trust_domain))
    leaf, *rest = x509.load_pem_x509_certificates(user.chain_pem)
    pem = serialization.Encoding.PEM
    context = {
        "x509_pem_cert": [leaf.public_bytes(pem)],
        "x509_pem_cert_chain": [b"".join(certificate.public_bytes(pem) for certificate in (leaf, *rest))],
    }
    rates = [_checks_per_second(gate, context) for _ in range(RUNS)]
    median, budget = statistics.median(rates), 1 / CHECK_BUDGET
    return {
        "case": "identity and access of one call, warm",
        "ours": round(median),
        "unit": "checks/s",
        "baseline": f"{CHECK_BUDGET * 1e6:g} µs each",
        "baseline_value": round(budget),
        "ratio": round(median / budget, 2),
        "goal": 1.0,
        "runs": RUNS,
    }


def _checks_per_second(gate: Gate, context: dict[str, list[bytes]]) -> float:
    method = "/beamwire.request.v1.RequestService/GetTransfer"
    admit(method, gate.identify(context))
    begin = time.perf_counter()
    for _ in range(CHECKS):
        admit(method, gate.identify(context))
    return CHECKS / (time.perf_counter() - begin)


async def _load(call: Callable[[], Awaitable[object]], server: psutil.Process) -> Measured:
    """Some calls in flight at any time."""
    begin = time.perf_counter()
    busy = _processor_time(server)
    latencies: list[float] = []

    async def caller() -> None:
        started = begin
        while started < begin + SECONDS:
            await call()
            now = time.perf_counter()
            latencies.append(now - started)
            started = now

    await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
    taken = time.perf_counter() - begin
    return Measured(len(latencies) / taken, latencies, (_processor_time(server) - busy) / len(latencies))


def _processor_time(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
