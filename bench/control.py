"""Calls per second of each service over mutual TLS, beside a bare gRPC server with the same certificates.

And what it costs to know at each call who calls and whether they may, beside the time that this may take.
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
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from beamwire.buffer.v1 import buffer_service_pb2, buffer_service_pb2_grpc
from beamwire.certificate.v1 import certificate_service_pb2, certificate_service_pb2_grpc
from beamwire.client.request import parse_request
from beamwire.job.v1 import job_service_pb2, job_service_pb2_grpc
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.enrollment import JoinToken, enroll
from beamwire.mesh.policy import FILE_NAME, PolicyFile
from beamwire.mesh.rpc.access import Gate, admit
from beamwire.mesh.rpc.channel import connect
from beamwire.request.v1 import request_service_pb2, request_service_pb2_grpc

BIN = Path(sys.executable).parent
RUNS, SECONDS, IN_FLIGHT = 3, 1.5, 16
GOAL = 0.7
# What identity and access may cost at each call, in seconds.
CHECK_BUDGET = 10e-6
CHECKS = 20_000
START_TIMEOUT = 30.0

Call = Callable[[], Awaitable[object]]


def run() -> list[dict[str, Any]]:
    """Measure; returns one row per service."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "facility"
        member = directory / "members" / "service" / "facility"
        with _facility(directory) as address, _bare_server(member) as bare_address:
            rows = asyncio.run(_measure(directory, address, bare_address))
        return [*rows, _check_row(directory)]


@contextmanager
def _facility(directory: Path) -> Iterator[str]:
    address, enroll_address = "127.0.0.1:17443", "127.0.0.1:17444"
    _beamwired("facility", "init", str(directory), "--address", address, "--enroll-address", enroll_address)
    command = [str(BIN / "beamwired"), "serve", "--dir", str(directory)]
    serving = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert serving.stderr is not None
    try:
        # It says one line when it is ready.
        if not serving.stderr.readline().startswith("beamwired: certificate"):
            raise RuntimeError(f"the facility did not start: {serving.stderr.read()}")
        token = _beamwired("token", "user/bench", "--dir", str(directory))
        enroll(JoinToken.parse(token), directory / "user")
        yield address
    finally:
        serving.terminate()
        serving.communicate(timeout=START_TIMEOUT)
        _beamwired("clean", "--dir", str(directory))


def _beamwired(*arguments: str) -> str:
    return subprocess.run([str(BIN / "beamwired"), *arguments], check=True, capture_output=True, text=True).stdout


@contextmanager
def _bare_server(credentials: Path) -> Iterator[str]:
    bare = subprocess.Popen([sys.executable, "-m", "bench.bare_server", credentials], stdout=subprocess.PIPE, text=True)
    try:
        assert bare.stdout is not None
        yield f"127.0.0.1:{int(bare.stdout.readline())}"
    finally:
        bare.terminate()
        bare.communicate(timeout=START_TIMEOUT)


async def _measure(directory: Path, address: str, bare_address: str) -> list[dict[str, Any]]:
    operator = Credentials.load(next((directory / "members" / "operator").iterdir()))
    user = Credentials.load(directory / "user")
    async with (
        connect(address, operator) as ours,
        connect(address, user) as mine,
        # The same client library on the bare server: what differs is the server.
        grpc.aio.secure_channel(bare_address, operator.channel_credentials()) as channel,
    ):
        echo: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/bench.Bare/Echo")
        calls = await _calls(ours, mine)
        return [await _row(name, call, lambda: echo(b"x" * 100)) for name, call in calls.items()]


async def _calls(ours: grpc.aio.Channel, mine: grpc.aio.Channel) -> dict[str, Call]:
    """Make one resource of each kind, and return a call that reads each."""
    jobs = job_service_pb2_grpc.JobServiceStub(ours)
    job = await jobs.CreateJob(
        job_service_pb2.CreateJobRequest(job=job_service_pb2.Job(spec=job_service_pb2.JobSpec(executable="true")))
    )
    buffers = buffer_service_pb2_grpc.BufferServiceStub(ours)
    buffer = await buffers.CreateBuffer(
        buffer_service_pb2.CreateBufferRequest(
            buffer=buffer_service_pb2.Buffer(spec=buffer_service_pb2.BufferSpec(capacity_bytes=1 << 20))
        )
    )
    certificates = certificate_service_pb2_grpc.CertificateServiceStub(ours)
    listed = await certificates.ListCertificates(certificate_service_pb2.ListCertificatesRequest(page_size=1))
    transfers = request_service_pb2_grpc.RequestServiceStub(mine)
    transfer = await transfers.CreateTransfer(
        request_service_pb2.CreateTransferRequest(transfer=parse_request(REQUEST).transfer), timeout=60
    )
    await transfers.CancelTransfer(request_service_pb2.CancelTransferRequest(name=transfer.name), timeout=60)
    return {
        "RequestService.GetTransfer": lambda: transfers.GetTransfer(
            request_service_pb2.GetTransferRequest(name=transfer.name)
        ),
        "JobService.GetJob": lambda: jobs.GetJob(job_service_pb2.GetJobRequest(name=job.name)),
        "BufferService.GetBuffer": lambda: buffers.GetBuffer(buffer_service_pb2.GetBufferRequest(name=buffer.name)),
        "CertificateService.GetCertificate": lambda: certificates.GetCertificate(
            certificate_service_pb2.GetCertificateRequest(name=listed.certificates[0].name)
        ),
    }


REQUEST = {
    "event_source": {"type": "SyntheticEventSource", "number_of_events": 16, "shape": [16, 16]},
    "data_sources": {"detector_data": {"type": "SyntheticDetector"}},
    "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 4}],
}


async def _row(name: str, call: Call, baseline: Call) -> dict[str, Any]:
    ours, theirs = [], []
    for _ in range(RUNS):
        ours.append(await _rate(call))
        theirs.append(await _rate(baseline))
    median, base = statistics.median(ours), statistics.median(theirs)
    return {
        "case": name,
        "ours": round(median),
        "unit": "calls/s",
        "baseline": "bare grpc.aio server, mTLS",
        "baseline_value": round(base),
        "ratio": round(median / base, 2),
        "goal": GOAL,
        "runs": RUNS,
    }


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


async def _rate(call: Call) -> float:
    """Return calls per second with some calls in flight at any time."""
    end = time.monotonic() + SECONDS

    async def caller() -> int:
        count = 0
        while time.monotonic() < end:
            await call()
            count += 1
        return count

    begin = time.monotonic()
    counts = await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
    return sum(counts) / (time.monotonic() - begin)
