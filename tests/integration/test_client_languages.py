"""The programs in TypeScript and Go, as built, against a live server of the Python mesh."""

from __future__ import annotations

import asyncio
import json
import signal
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.rpc.server import Server, Service
from beamwire.request.v1 import request_service_pb2 as pb
from beamwire.request.v1 import request_service_pb2_grpc
from beamwire.testing.facility import Facility
from beamwire.testing.ports import free_port

NAME: Final = "transfers/t1"
State: Final = pb.Transfer.State
RECEIPT: Final = pb.Receipt(
    selected_event_count=32,
    delivered_event_count=31,
    losses=[account_pb2.Loss(cause=account_pb2.LOSS_CAUSE_INCOMPLETE, event_count=1)],
    balanced=True,
    end_cause=account_pb2.END_CAUSE_DONE,
)


def transfer(state: pb.Transfer.State.ValueType, **fields: Any) -> pb.Transfer:
    return pb.Transfer(name=NAME, state=state, etag=State.Name(state), **fields)


class RequestService(request_service_pb2_grpc.RequestServiceServicer):
    """Plays the life of a transfer: each watch is a list of transfers, and an error where it breaks."""

    def __init__(self, *watches: list[pb.Transfer | BeamwireError]) -> None:
        self.creates: list[pb.CreateTransferRequest] = []
        self.watches: list[pb.WatchTransferRequest] = []
        self.cancels: list[pb.CancelTransferRequest] = []
        self.refusals: list[BeamwireError] = []
        self.cancelled = asyncio.Event()
        self._script = list(watches)

    async def CreateTransfer(self, request: pb.CreateTransferRequest, context: object) -> pb.Transfer:  # noqa: N802
        self.creates.append(request)
        if self.refusals:
            raise self.refusals.pop(0)
        return transfer(State.STATE_PENDING)

    async def WatchTransfer(  # noqa: N802
        self, request: pb.WatchTransferRequest, context: object
    ) -> AsyncIterator[pb.WatchTransferResponse]:
        self.watches.append(request)
        for step in self._script.pop(0):
            if isinstance(step, BeamwireError):
                raise step
            if step.state == State.STATE_CANCELLED:
                await self.cancelled.wait()
            yield pb.WatchTransferResponse(transfer=step)

    async def CancelTransfer(self, request: pb.CancelTransferRequest, context: object) -> pb.Transfer:  # noqa: N802
        self.cancels.append(request)
        self.cancelled.set()
        return transfer(State.STATE_CANCELLING)

    async def unasked(self, request: object, context: object) -> Any:
        raise BeamwireError(Reason.UNSUPPORTED, "the programs do not ask for this")

    GetTransfer = ListTransfers = EstimateTransfer = ExtendTransfer = unasked


@asynccontextmanager
async def serving(credentials: Credentials, servicer: RequestService) -> AsyncIterator[str]:
    add = request_service_pb2_grpc.add_RequestServiceServicer_to_server
    server = Server(credentials, services=[Service("beamwire.request.v1.RequestService", add, servicer)])
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=0)


@pytest.fixture
def facility(tmp_path: Path) -> Facility:
    return Facility(tmp_path)


async def start(program: list[str], address: str, credentials: Credentials, *arguments: str) -> Process:
    command = [*program, "--address", address, "--credentials", str(credentials.directory), *arguments]
    return await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)


async def finish(process: Process) -> tuple[int, list[dict[str, Any]]]:
    """The exit status of a program and the lines it printed (that were not read before)."""
    async with asyncio.timeout(60):
        stdout, stderr = await process.communicate()
    assert process.returncode is not None
    assert not stderr, stderr.decode()
    return process.returncode, [json.loads(line) for line in stdout.splitlines()]


async def test_a_transfer_is_watched_to_its_receipt(program: list[str], facility: Facility) -> None:
    connect_string = "beamwire://localhost:5000/buffers/b1?epoch=1"
    servicer = RequestService(
        [
            transfer(State.STATE_PENDING),
            transfer(State.STATE_STREAMING, connect_string=connect_string),
            transfer(State.STATE_STREAMING, connect_string=connect_string, counters={"sent_event_count": 8}),
            transfer(State.STATE_SUCCEEDED, receipt=RECEIPT),
        ]
    )
    async with serving(facility.member("service/request"), servicer) as address:
        status, lines = await finish(await start(program, address, facility.member("user/alice")))
    assert lines == [
        {"transfer": NAME, "state": "PENDING"},
        {"transfer": NAME, "state": "STREAMING", "connect_string": connect_string},
        {"transfer": NAME, "state": "SUCCEEDED"},
        {
            "receipt": {
                "selected_event_count": "32",
                "delivered_event_count": "31",
                "losses": [{"cause": "LOSS_CAUSE_INCOMPLETE", "event_count": "1"}],
                "balanced": True,
                "end_cause": "END_CAUSE_DONE",
            }
        },
    ]
    assert status == 0
    (created,) = servicer.creates
    assert uuid.UUID(created.request_id).version == 4
    config = created.transfer.config
    assert config.event_source.type == "SyntheticEventSource"
    assert dict(config.event_source.parameters)["number_of_events"] == 32
    assert config.data_sources["detector_data"].type == "SyntheticDetector"
    assert [stage.type for stage in config.processing_pipeline] == ["BatchProcessingPipeline"]


async def test_a_request_is_read_from_a_file(program: list[str], facility: Facility, tmp_path: Path) -> None:
    request = tmp_path / "request.json"
    config = {"event_source": {"type": "HDF5EventSource"}, "dataSources": {"x": {"type": "HDF5Dataset"}}}
    request.write_text(json.dumps({"config": config, "lease": "60s", "labels": {"sample": "lysozyme"}}))
    servicer = RequestService([transfer(State.STATE_SUCCEEDED)])
    async with serving(facility.member("service/request"), servicer) as address:
        process = await start(program, address, facility.member("user/alice"), "--request", str(request))
        assert (await finish(process))[0] == 0
    asked = servicer.creates[0].transfer
    assert (asked.lease.seconds, asked.labels["sample"]) == (60, "lysozyme")
    assert asked.config.data_sources["x"].type == "HDF5Dataset"


async def test_a_transfer_that_fails_says_why(program: list[str], facility: Facility) -> None:
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason="PRODUCER_FAILED", domain="beamwire.org"))
    error = status_pb2.Status(code=10, message="rank 1 ended with exit code 1", details=[detail])
    servicer = RequestService([transfer(State.STATE_FAILED, error=error)])
    async with serving(facility.member("service/request"), servicer) as address:
        status, lines = await finish(await start(program, address, facility.member("user/alice")))
    assert lines == [
        {"transfer": NAME, "state": "FAILED"},
        {"error": {"reason": "PRODUCER_FAILED", "message": "rank 1 ended with exit code 1"}},
    ]
    assert status == 1


async def test_a_refused_request_names_the_fields_at_fault(program: list[str], facility: Facility) -> None:
    servicer = RequestService()
    servicer.refusals = [invalid_field("transfer.process_count", "must be at least 1")]
    async with serving(facility.member("service/request"), servicer) as address:
        status, lines = await finish(await start(program, address, facility.member("user/alice")))
    (line,) = lines
    assert line["error"]["reason"] == "INVALID_FIELD"
    assert line["error"]["fields"] == {"transfer.process_count": "must be at least 1"}
    assert status == 1


async def test_an_unavailable_service_is_asked_again_with_the_same_request_id(
    program: list[str], facility: Facility
) -> None:
    servicer = RequestService([transfer(State.STATE_SUCCEEDED)])
    servicer.refusals = [BeamwireError(Reason.DRAINING, "this process is ending") for _ in range(2)]
    async with serving(facility.member("service/request"), servicer) as address:
        status, _ = await finish(await start(program, address, facility.member("user/alice")))
    assert status == 0
    assert len(servicer.creates) == 3
    assert len({request.request_id for request in servicer.creates}) == 1


async def test_a_watch_that_breaks_is_taken_up_from_the_etag_seen_last(program: list[str], facility: Facility) -> None:
    servicer = RequestService(
        [transfer(State.STATE_STREAMING), BeamwireError(Reason.DRAINING, "this process is ending")],
        [transfer(State.STATE_DRAINING), transfer(State.STATE_SUCCEEDED)],
    )
    async with serving(facility.member("service/request"), servicer) as address:
        status, lines = await finish(await start(program, address, facility.member("user/alice")))
    assert [line["state"] for line in lines] == ["STREAMING", "DRAINING", "SUCCEEDED"]
    assert [request.etag for request in servicer.watches] == ["", "STATE_STREAMING"]
    assert status == 0


async def test_a_watch_that_ends_too_early_is_an_error(program: list[str], facility: Facility) -> None:
    servicer = RequestService([transfer(State.STATE_STREAMING)])
    async with serving(facility.member("service/request"), servicer) as address:
        status, lines = await finish(await start(program, address, facility.member("user/alice")))
    assert "ended before the transfer did" in lines[-1]["error"]["message"]
    assert status == 1


async def test_ctrl_c_cancels_the_transfer(program: list[str], facility: Facility) -> None:
    servicer = RequestService([transfer(State.STATE_STREAMING), transfer(State.STATE_CANCELLED)])
    async with serving(facility.member("service/request"), servicer) as address:
        process = await start(program, address, facility.member("user/alice"))
        assert process.stdout is not None
        async with asyncio.timeout(60):
            assert json.loads(await process.stdout.readline())["state"] == "STREAMING"
        process.send_signal(signal.SIGINT)
        status, lines = await finish(process)
    assert lines == [{"transfer": NAME, "state": "CANCELLED"}]
    assert status == 1
    (cancelled,) = servicer.cancels
    assert cancelled.name == NAME
    assert uuid.UUID(cancelled.request_id).version == 4


@pytest.mark.parametrize("impostor", ["foreign", "user", "other-name"])
async def test_a_server_that_is_no_service_of_the_facility_is_told_nothing(
    program: list[str], facility: Facility, impostor: str
) -> None:
    servicer = RequestService([transfer(State.STATE_SUCCEEDED)])
    credentials = {
        "foreign": lambda: facility.foreign("service/request"),
        "user": lambda: facility.member("user/mallory"),
        "other-name": lambda: facility.member("service/request", server_names=["elsewhere.test"]),
    }[impostor]()
    async with serving(credentials, servicer) as address:
        status, lines = await finish(await start(program, address, facility.member("user/alice")))
    assert status == 1
    assert [list(line) for line in lines] == [["error"]]
    assert servicer.creates == []


async def test_an_expired_certificate_is_said_so_before_any_call(program: list[str], facility: Facility) -> None:
    process = await start(program, "127.0.0.1:1", facility.expired("user/alice"))
    async with asyncio.timeout(60):
        stdout, stderr = await process.communicate()
    assert (process.returncode, stdout) == (2, b"")
    assert b"enrol again" in stderr


async def test_nobody_answering_is_said_so(program: list[str], facility: Facility) -> None:
    status, lines = await finish(await start(program, f"127.0.0.1:{free_port()}", facility.member("user/alice")))
    assert status == 1
    assert lines[-1]["error"]["reason"] == "UNAVAILABLE"
