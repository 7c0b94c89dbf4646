"""Methods that take a stream and answer once: what is let in, what is refused, and that neither side waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from beamwire.buffer.v1 import buffer_service_pb2_grpc as buffer_pb_grpc
from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.job.v1 import job_service_pb2_grpc as pb_grpc
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.rpc.access import current_caller
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.rpc.limits import CallLimits
from beamwire.mesh.rpc.server import Server, Service
from beamwire.testing.facility import Facility
from beamwire.testing.ports import free_port

PIECE = bytes(256 * 1024)
BEGIN = pb.UploadFileRequest(start=pb.UploadFileRequest.Start(name="jobs/j", path="in/a.h5", sha256="0" * 64))


class Uploads:
    """Takes files, as far as the path that is said first lets it."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self.stuck = asyncio.Semaphore(0)

    async def UploadFile(  # noqa: N802
        self, requests: AsyncIterator[pb.UploadFileRequest], context: object
    ) -> pb.UploadFileResponse:
        try:
            first = await anext(requests)
            self.begun.set()
            if first.start.path == "full":
                raise BeamwireError(Reason.LIMIT_REACHED, "there is no room for more", quota="job_file_bytes")
            if first.start.path == "breaks":
                raise ZeroDivisionError("password=hunter2")
            if first.start.path == "stuck":
                self.stuck.release()
                await asyncio.Event().wait()
            size = 0
            async for request in requests:
                size += len(request.data)
            return pb.UploadFileResponse(
                file=pb.JobFile(path=f"{first.start.path} of {current_caller()}", size_bytes=size)
            )
        finally:
            self.ended.set()

    def __getattr__(self, name: str) -> Any:
        """The methods that no test waits for."""
        return self.UploadFile


class Served:
    """A server, and how to send something to it."""

    def __init__(self, tmp_path: Path) -> None:
        self.facility = Facility(tmp_path / "facility")
        self.uploads = Uploads()
        service = Service("beamwire.job.v1.JobService", pb_grpc.add_JobServiceServicer_to_server, self.uploads)
        self.server = Server(
            self.facility.member("service/job"), services=[service], limits=CallLimits(calls=4, streams=4)
        )
        self.address = ""
        self.sent = 0

    async def upload(
        self, path: str = "in/a.h5", *, pieces: int = 8, member: str = "user/alice", **options: Any
    ) -> pb.JobFile:
        async def requests() -> AsyncIterator[pb.UploadFileRequest]:
            begin = pb.UploadFileRequest()
            begin.CopyFrom(BEGIN)
            begin.start.path = path
            yield begin
            for _ in range(pieces):
                self.sent += 1
                yield pb.UploadFileRequest(data=PIECE)

        async with connect(self.address, self.facility.member(member)) as channel:
            return (await pb_grpc.JobServiceStub(channel).UploadFile(requests(), **options)).file


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(tmp_path)
    served.address = f"127.0.0.1:{await served.server.start()}"
    yield served
    await served.server.stop(0)


async def refusal(served: Served, path: str, **options: Any) -> BeamwireError:
    with pytest.raises(BeamwireError) as caught:
        await served.upload(path, **options)
    return caught.value


async def test_a_stream_is_answered_once(served: Served) -> None:
    answer = await served.upload(pieces=8)
    assert answer.size_bytes == 8 * len(PIECE)
    assert answer.path == "in/a.h5 of spiffe://facility.test/user/alice"


async def test_a_stream_is_refused_to_the_wrong_role(served: Served) -> None:
    # Nothing after the first: grpcio may lose an answer that comes while a request is being sent.
    error = await refusal(served, "in/a.h5", pieces=0, member="job/j")
    assert error.reason is Reason.ROLE_NOT_ALLOWED
    assert not served.uploads.begun.is_set()


async def test_what_the_first_request_must_say_is_asked_for(served: Served) -> None:
    error = await refusal(served, "", pieces=0)
    assert (error.reason, [v.field for v in error.violations]) == (Reason.INVALID_FIELD, ["start.path"])


@pytest.mark.parametrize(("path", "reason"), [("full", Reason.LIMIT_REACHED), ("breaks", Reason.INTERNAL)])
async def test_who_is_refused_in_the_middle_is_told_why(served: Served, path: str, reason: Reason) -> None:
    # What cuts a longer stream short is told in the next test.
    error = await refusal(served, path, pieces=0)
    assert error.reason is reason
    assert "hunter2" not in error.message


async def test_a_long_stream_that_is_refused_ends_soon(served: Served) -> None:
    async with asyncio.timeout(10):
        error = await refusal(served, "full", pieces=4000)
    # grpcio may lose the answer if it comes while a request is being sent.
    assert error.reason in (Reason.LIMIT_REACHED, Reason.SERVICE_UNAVAILABLE)
    assert served.sent < 400


async def test_a_handler_that_stops_reading_holds_back_who_sends(served: Served) -> None:
    task = asyncio.create_task(refusal(served, "stuck", pieces=4000, timeout=1.5))
    await asyncio.wait_for(served.uploads.begun.wait(), 5)
    error = await task
    # As above: the word of the deadline may be lost.
    assert error.reason in (Reason.TIMED_OUT, Reason.SERVICE_UNAVAILABLE)
    # Some MB on the way, and no more: neither side piles them up.
    assert served.sent < 100
    await asyncio.wait_for(served.uploads.ended.wait(), 5)


async def test_a_stream_that_is_given_up_ends_at_the_server(served: Served) -> None:
    task = asyncio.create_task(served.upload("stuck", pieces=1))
    await asyncio.wait_for(served.uploads.begun.wait(), 5)
    task.cancel()
    await asyncio.wait_for(served.uploads.ended.wait(), 5)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_stream_that_fails_at_the_callers_fails_the_call(served: Served) -> None:
    async def requests() -> AsyncIterator[pb.UploadFileRequest]:
        yield BEGIN
        raise FileNotFoundError("a.h5")

    async with connect(served.address, served.facility.member("user/alice")) as channel:
        with pytest.raises(FileNotFoundError, match=r"a\.h5"):
            await pb_grpc.JobServiceStub(channel).UploadFile(requests())
        with pytest.raises(ZeroDivisionError):
            await pb_grpc.JobServiceStub(channel).UploadFile(BEGIN for n in (1, 0) if 1 / n)
    await asyncio.wait_for(served.uploads.ended.wait(), 5)


async def test_a_connection_that_fails_when_the_stream_ends_cancels_nobody(tmp_path: Path) -> None:
    # grpcio cancels every call of this kind: its stream ends before the connection has failed.
    nobody = f"127.0.0.1:{free_port()}"
    async with connect(nobody, Facility(tmp_path).member("user/alice")) as channel:
        with pytest.raises(BeamwireError) as caught:
            await pb_grpc.JobServiceStub(channel).UploadFile(iter(()))
        assert caught.value.reason is Reason.SERVICE_UNAVAILABLE
        with pytest.raises(BeamwireError) as caught:
            await anext(aiter(buffer_pb_grpc.BufferServiceStub(channel).Consume(iter(()))))
        assert caught.value.reason is Reason.SERVICE_UNAVAILABLE


async def test_streams_have_places_too(served: Served) -> None:
    tasks = [asyncio.create_task(served.upload("stuck", pieces=1)) for _ in range(2)]
    async with asyncio.timeout(5):
        for _ in tasks:
            await served.uploads.stuck.acquire()
    # More than a window of flow control would be refused in the middle of a write.
    error = await refusal(served, "in/a.h5", pieces=0, timeout=0.2)
    # As above: the word of the deadline may be lost.
    assert error.reason in (Reason.OVERLOADED, Reason.TIMED_OUT, Reason.SERVICE_UNAVAILABLE)
    # Half of the places are for others.
    assert (await served.upload(member="user/bob")).size_bytes
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
