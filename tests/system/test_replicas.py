"""Two replicas of a facility on one database, each ended and started again while it is asked things all the time."""

from __future__ import annotations

import asyncio
import os
import secrets
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from beamwire.certificate.v1 import certificate_service_pb2, certificate_service_pb2_grpc
from beamwire.client.request import parse_request
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.enrollment import JoinToken, enroll
from beamwire.mesh.rpc.channel import connect
from beamwire.request.v1 import request_service_pb2 as pb
from beamwire.request.v1 import request_service_pb2_grpc as pb_grpc
from beamwire.testing.ports import free_ports
from beamwire.testing.postgres import Postgres

BIN = Path(sys.executable).parent
RATE = 200
MOST_AT_ONCE = 128
START_TIMEOUT, STOP_TIMEOUT = 60.0, 30.0
REQUEST = {
    "event_source": {"type": "SyntheticEventSource", "number_of_events": 16, "shape": [16, 16]},
    "data_sources": {"detector_data": {"type": "SyntheticDetector"}},
    "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 4}],
}


class Pair:
    """Two processes that serve one facility, and its user."""

    def __init__(self, directory: Path, ports: list[int], database: str) -> None:
        self.directory = directory
        self.listen = [f"127.0.0.1:{port}" for port in ports[:2]]
        self.address = ",".join(self.listen)
        self._env = {**os.environ, "BEAMWIRE_DATABASE__URL": database}
        enrolment = ",".join(f"127.0.0.1:{port}" for port in ports[2:])
        self._run("facility", "init", str(directory), "--address", self.address, "--enroll-address", enrolment)
        self.processes = [self.start(address) for address in self.listen]
        token = JoinToken.parse(self._run("token", "user/alice", "--dir", str(directory)))
        self.user: Credentials = enroll(token, directory / "alice")

    def start(self, address: str) -> subprocess.Popen[str]:
        """Serve at an address, and wait until calls are answered there."""
        command = [str(BIN / "beamwired"), "serve", "--dir", str(self.directory), "--listen", address]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=self._env)
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("beamwired: certificate"):
                return process
        pytest.fail(f"{address} is not served:\n{''.join(said)}")

    def end(self, process: subprocess.Popen[str]) -> None:
        """End a replica as an operator would."""
        process.terminate()
        process.communicate(timeout=STOP_TIMEOUT)
        assert process.returncode == 0

    def restart(self, index: int) -> None:
        self.end(self.processes[index])
        self.processes[index] = self.start(self.listen[index])

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                self.end(process)
        self._run("clean", "--dir", str(self.directory))

    def _run(self, *arguments: str) -> str:
        command = [str(BIN / "beamwired"), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=self._env).stdout


@pytest.fixture
def pair(tmp_path: Path, postgres: Postgres) -> Iterator[Pair]:
    name = f"test_{secrets.token_hex(6)}"
    pair = Pair(tmp_path / "facility", free_ports(4), postgres.create_database(name))
    try:
        yield pair
    finally:
        pair.close()
        postgres.drop_database(name)


async def test_a_rolling_restart_at_200_calls_a_second_fails_no_idempotent_call(
    pair: Pair, record_property: Any
) -> None:
    taken: list[float] = []
    async with connect(pair.address, pair.user) as channel:
        requests = pb_grpc.RequestServiceStub(channel)
        who = certificate_service_pb2_grpc.CertificateServiceStub(channel)
        created = pb.CreateTransferRequest(transfer=parse_request(REQUEST).transfer, request_id=str(uuid.uuid4()))
        transfer = await requests.CreateTransfer(created, timeout=60)

        # A machine that cannot keep up is not to be overloaded, which would be refused, rightly.
        room = asyncio.Semaphore(MOST_AT_ONCE)

        async def call(number: int) -> None:
            began = time.monotonic()
            async with room:
                if number % 4 == 0:
                    await who.WhoAmI(certificate_service_pb2.WhoAmIRequest())
                elif number % 4 == 1:
                    await requests.ListTransfers(pb.ListTransfersRequest(page_size=5))
                else:
                    await requests.GetTransfer(pb.GetTransferRequest(name=transfer.name))
            taken.append(time.monotonic() - began)

        async def repeat() -> None:
            """The answer that was kept, whichever replica is asked."""
            while not rolling.done():
                assert (await requests.CreateTransfer(created)).name == transfer.name

        async def roll() -> None:
            for index in (0, 1):
                await asyncio.sleep(1)
                await asyncio.to_thread(pair.restart, index)
            await asyncio.sleep(1)

        async with asyncio.TaskGroup() as group:
            rolling = group.create_task(roll())
            group.create_task(repeat())
            begin, number = time.monotonic(), 0
            while not rolling.done():
                await asyncio.sleep(max(0.0, begin + number / RATE - time.monotonic()))
                group.create_task(call(number))
                number += 1
        lasted = time.monotonic() - begin
        await requests.CancelTransfer(pb.CancelTransferRequest(name=transfer.name), timeout=60)
    quantiles = statistics.quantiles(taken, n=100)
    figures = {"rate": len(taken) / lasted, "p50": quantiles[49], "p99": quantiles[98], "max": max(taken)}
    for name, value in figures.items():
        record_property(name, value)
    print(figures)
    assert len(taken) == number > RATE * 3
