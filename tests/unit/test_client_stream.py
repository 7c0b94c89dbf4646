"""Streams from creation to receipt, over real gRPC and real TLS, against a service that does what each test says."""

import asyncio
import json
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from beamwire.buffer.v1.buffer_service_pb2 import ConsumerCounters
from beamwire.client import AsyncClient, BeamwireError, Client, Reason, connect
from beamwire.client.portal import Portal
from beamwire.common.v1.account_pb2 import END_CAUSE_DONE, END_CAUSE_FAILED
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.rpc.server import Server, Service
from beamwire.mesh.rpc.status import to_status
from beamwire.mesh.stream.link import Link
from beamwire.mesh.stream.sockets import PAIR, PULL, PUSH
from beamwire.mesh.stream.tls import TlsConnection
from beamwire.mesh.stream.writer import FrameWriter
from beamwire.request.v1 import request_service_pb2 as pb
from beamwire.request.v1.request_service_pb2 import Receipt, Transfer
from beamwire.request.v1.request_service_pb2_grpc import (
    RequestServiceServicer,
    add_RequestServiceServicer_to_server,
)
from beamwire.stream.v1.frame_pb2 import (
    FRAME_KIND_DATA,
    FRAME_KIND_END,
    FRAME_KIND_HEADER,
    Field,
    FrameHeader,
    StreamEnd,
    StreamHeader,
)
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, Signal, Welcome
from beamwire.testing.facility import Facility

REQUEST = {"event_source": {"type": "InternalEventSource"}, "data_sources": {"x": {"type": "IntValue"}}}
EVENTS = 3


class Cache:
    """Sends a header, so many frames, and an end to each consumer; counts what was confirmed."""

    def __init__(
        self, credentials: Credentials, *, frames: int = 4, end: int = END_CAUSE_DONE, break_off: bool = False
    ):
        self.confirmed = 0
        self.frames, self.end, self.break_off = frames, end, break_off
        self.proceed = threading.Event()
        self.proceed.set()
        self.begin = threading.Event()
        self.begin.set()
        self.finished = threading.Event()
        self.context = credentials.server_context()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.connect = f"beamwire://127.0.0.1:{self.listener.getsockname()[1]}/buffers/b1?epoch=1"
        if break_off:
            # An acknowledged connection would be made again.
            self.connect += "&delivery=push"
        self.thread = threading.Thread(target=self._accept)
        self.thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with suppress(OSError, ValueError), self.context.wrap_socket(sock, server_side=True) as secured:
                connection = TlsConnection(secured)
                if connection.receive_greeting() == PULL:
                    connection.send_greeting(PUSH)
                    self._send_all(connection)
                else:
                    connection.send_greeting(PAIR)
                    self._serve(connection)

    def _serve(self, connection: TlsConnection) -> None:
        link = Link(connection)
        try:
            assert link.receive(_no_frame).hello.role == LINK_ROLE_CONSUME
            link.send_signal(Signal(welcome=Welcome(epoch=1)))
            self._send_all(connection)
            acknowledged = 0
            while acknowledged < self.frames + 1:
                signal = link.receive(_no_frame)
                if signal is None:
                    return
                acknowledged = signal.acknowledgement.delivery_count
            self.confirmed += self.frames * EVENTS
            self.finished.set()
            link.finish()
        finally:
            link.close()

    def _send_all(self, connection: TlsConnection) -> None:
        assert self.begin.wait(20)
        fields = [Field(name="x", dtype="<f8", shape=[2], unit="eV")]
        stream = StreamHeader(buffer="buffers/b1", transfer="transfers/other", producer_count=1, fields=fields)
        self._send(connection, FrameHeader(epoch=1, kind=FRAME_KIND_HEADER, stream=stream))
        for sequence in range(1, self.frames + 1):
            ids = range(sequence * 10, sequence * 10 + EVENTS)
            header = FrameHeader(epoch=1, kind=FRAME_KIND_DATA, sequence=sequence, event_count=EVENTS, event_ids=ids)
            self._send(connection, header, {"x": np.full((EVENTS, 2), float(sequence))})
        assert self.proceed.wait(20)
        if self.break_off:
            return
        end = StreamEnd(cause=self.end, detail="as told")  # type: ignore[arg-type]
        self._send(connection, FrameHeader(epoch=1, kind=FRAME_KIND_END, sequence=self.frames + 1, end=end))

    def _send(self, connection, header, arrays=None) -> None:
        connection.send(FrameWriter().encode(header, arrays))

    def close(self) -> None:
        self.begin.set()
        self.proceed.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(20)


def _no_frame(length: int) -> memoryview:
    raise ValueError(f"a consumer sends no frames, and this one has {length} bytes")


class Requests(RequestServiceServicer):
    """One transfer; `script` says what becomes of it."""

    def __init__(self) -> None:
        self.transfer = Transfer()
        self.created: list[pb.CreateTransferRequest] = []
        self.cancelled: list[str] = []
        self.watches = 0
        self.break_first_watch = False
        self.script = lambda: None
        self.changed = asyncio.Condition()

    async def CreateTransfer(self, request, context):  # noqa: N802
        self.created.append(request)
        transfer = Transfer()
        transfer.CopyFrom(request.transfer)
        transfer.name = f"transfers/{request.transfer_id}"
        transfer.state = Transfer.STATE_PENDING
        self.transfer = transfer
        if not request.validate_only:
            self.script()
        return transfer

    async def GetTransfer(self, request, context):  # noqa: N802
        return self.transfer

    async def ListTransfers(self, request, context):  # noqa: N802
        start = int(request.page_token or 0)
        names = [f"transfers/t{number}" for number in range(start, min(start + request.page_size, 5))]
        token = str(start + request.page_size) if start + request.page_size < 5 else ""
        return pb.ListTransfersResponse(transfers=[Transfer(name=name) for name in names], next_page_token=token)

    async def WatchTransfer(self, request, context) -> AsyncIterator[pb.WatchTransferResponse]:  # noqa: N802
        self.watches += 1
        etag = request.etag
        while True:
            async with self.changed:
                while etag and self.transfer.etag == etag:
                    await self.changed.wait()
                etag = self.transfer.etag
            yield pb.WatchTransferResponse(transfer=self.transfer)
            if self.break_first_watch and self.watches == 1:
                raise BeamwireError(Reason.DRAINING, "going down")
            if self.transfer.state >= Transfer.STATE_SUCCEEDED and self.transfer.state != Transfer.STATE_CANCELLING:
                return

    async def CancelTransfer(self, request, context):  # noqa: N802
        self.cancelled.append(request.name)
        await self.set(state=Transfer.STATE_CANCELLED)
        return self.transfer

    async def unasked(self, request, context):
        raise BeamwireError(Reason.UNSUPPORTED, "nothing here asks for this")

    EstimateTransfer = ExtendTransfer = unasked

    async def set(self, **changes) -> None:
        async with self.changed:
            transfer = Transfer()
            transfer.CopyFrom(self.transfer)
            transfer.MergeFrom(Transfer(**changes))
            transfer.etag = str(int(transfer.etag or 0) + 1)
            self.transfer = transfer
            self.changed.notify_all()


class World:
    """A facility with that service, and a user enrolled in it."""

    def __init__(self, tmp_path: Path) -> None:
        self.facility = Facility(tmp_path / "facility")
        self.config = tmp_path / "config"
        self.portal = Portal()
        self.requests = Requests()
        self.caches: list[Cache] = []
        name = "beamwire.request.v1.RequestService"
        service = Service(name, add_RequestServiceServicer_to_server, self.requests)
        self.server = Server(self.facility.member("service/request"), services=[service])
        port = self.portal.call(self.server.start())
        directory = self.config / "facilities" / "facility.test"
        shutil.copytree(self.facility.member("user/alice").directory, directory)
        member = {"trust_domain": "facility.test", "address": f"127.0.0.1:{port}", "enroll_address": ""}
        (directory / "member.json").write_text(json.dumps(member))
        self.client = connect(config_dir=self.config)

    def cache(self, **behaviour) -> Cache:
        cache = Cache(self.facility.member("cache/b1"), **behaviour)
        self.caches.append(cache)
        return cache

    def set(self, **changes) -> None:
        self.portal.call(self.requests.set(**changes))

    def stream_from(self, cache: Cache) -> None:
        """Let the next transfer stream from a cache as soon as it is created."""
        tasks = []

        def script() -> None:
            changes = {"state": Transfer.STATE_STREAMING, "connect_string": cache.connect}
            tasks.append(asyncio.get_running_loop().create_task(self.requests.set(**changes)))

        self.requests.script = script

    def finish_after(self, cache: Cache, **changes) -> threading.Thread:
        """End the transfer once the cache has got its confirmation."""

        def run() -> None:
            assert cache.finished.wait(20)
            self.set(**changes)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def close(self) -> None:
        self.client.close()
        for cache in self.caches:
            cache.close()
        self.portal.call(self.server.stop(0))
        self.portal.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def receipt(events: int, consumers: int = 1) -> Receipt:
    return Receipt(
        selected_event_count=events,
        delivered_event_count=events,
        balanced=True,
        end_cause=END_CAUSE_DONE,
        consumers=[ConsumerCounters(consumer=number + 1) for number in range(consumers)],
    )


def failed(reason: Reason, message: str) -> dict[str, object]:
    return {"state": Transfer.STATE_FAILED, "error": to_status(BeamwireError(reason, message))}


def test_a_request_is_created_read_and_accounted_for(world: World) -> None:
    cache = world.cache()
    world.stream_from(cache)
    ending = world.finish_after(cache, state=Transfer.STATE_SUCCEEDED, receipt=receipt(12))
    with world.client.stream(REQUEST) as stream:
        assert stream.transfer is not None
        assert stream.transfer.name == f"transfers/{world.requests.created[0].transfer_id}"
        ids, sums = [], 0.0
        for batch in stream:
            assert batch["x"].shape == (EVENTS, 2)
            ids += batch.event_ids.tolist()
            sums += float(batch["x"].sum())
        assert ids == [s * 10 + k for s in range(1, 5) for k in range(EVENTS)]
        assert sums == 60.0
        assert [(field.name, field.unit) for field in stream.fields] == [("x", "eV")]
        assert (stream.counters.events, stream.counters.frames) == (12, 4)
        assert stream.receipt == receipt(12)
    ending.join()
    assert cache.confirmed == 12
    assert world.requests.cancelled == []


async def test_the_asynchronous_stream_means_the_same(world: World) -> None:
    cache = world.cache()
    world.stream_from(cache)
    ending = world.finish_after(cache, state=Transfer.STATE_SUCCEEDED, receipt=receipt(12))
    async with AsyncClient(config_dir=world.config) as client, client.stream(REQUEST) as stream:
        assert sum([len(batch) async for batch in stream]) == 12
        assert stream.receipt == receipt(12)
    await asyncio.to_thread(ending.join)


async def test_an_asynchronous_stream_that_is_left_cancels(world: World) -> None:
    cache = world.cache()
    cache.proceed.clear()
    world.stream_from(cache)

    async def read() -> None:
        async with AsyncClient(config_dir=world.config) as client, client.stream(REQUEST) as stream:
            async for _ in stream:
                pass

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read(), 2)
    assert world.requests.cancelled == [world.requests.transfer.name]


async def test_a_wait_that_is_cancelled_loses_no_batch(world: World) -> None:
    cache = world.cache()
    cache.begin.clear()
    async with AsyncClient(config_dir=world.config) as client, client.stream(cache.connect) as stream:
        world.requests.transfer = Transfer(state=Transfer.STATE_SUCCEEDED, receipt=receipt(12))
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), 0.2)
        cache.begin.set()
        assert [batch.sequence async for batch in stream] == [1, 2, 3, 4]


async def test_a_failure_is_still_told_after_a_wait_that_was_cancelled(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = world.cache(frames=0, end=END_CAUSE_FAILED)
    async with AsyncClient(config_dir=world.config) as client:
        asked = asyncio.Event()

        async def never(name: str) -> AsyncIterator[Transfer]:
            asked.set()
            await asyncio.Event().wait()
            yield Transfer(name=name)

        monkeypatch.setattr(client, "watch_transfer", never)
        with pytest.raises(BeamwireError, match="as told"):
            async with client.stream(cache.connect) as stream:
                waiting = asyncio.ensure_future(anext(stream))
                await asyncio.wait_for(asked.wait(), 20)
                waiting.cancel()
                await asyncio.wait([waiting])
                monkeypatch.setattr("beamwire.client.session._EXPLANATION_SECONDS", 0.1)
                await anext(stream)


@pytest.mark.parametrize("how", ["break", "error", "interrupt"])
def test_leaving_early_cancels_what_was_created(world: World, how: str) -> None:
    cache = world.cache()
    cache.proceed.clear()
    world.stream_from(cache)
    raised = {"break": None, "error": ZeroDivisionError, "interrupt": KeyboardInterrupt}[how]
    with suppress(*([raised] if raised else [])), world.client.stream(REQUEST) as stream:
        for _ in stream:
            if raised:
                raise raised
            break
    assert world.requests.cancelled == [world.requests.transfer.name]


def test_leaving_early_does_not_cancel_the_transfer_of_another(world: World) -> None:
    cache = world.cache()
    cache.proceed.clear()
    world.set(name="transfers/other", state=Transfer.STATE_STREAMING, connect_string=cache.connect)
    with world.client.stream("other") as stream:
        next(iter(stream))
    assert world.requests.cancelled == []


def test_an_interrupt_while_waiting_for_the_streamer_cancels(world: World) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        import signal

        signal.pthread_kill(main, signal.SIGINT)

    world.requests.script = lambda: threading.Timer(0.3, interrupt).start()
    with pytest.raises(KeyboardInterrupt), world.client.stream(REQUEST):
        pytest.fail("nobody said where to dial")
    assert world.requests.cancelled == [world.requests.transfer.name]


def test_a_failed_producer_is_told_in_its_own_words(world: World) -> None:
    cache = world.cache(end=END_CAUSE_FAILED)
    world.stream_from(cache)
    words = "the streamer ended with exit code 1: ValueError: no detector jungfrau"
    ending = world.finish_after(cache, **failed(Reason.PRODUCER_FAILED, words))
    with pytest.raises(BeamwireError, match="no detector jungfrau") as caught, world.client.stream(REQUEST) as stream:
        list(stream)
    ending.join()
    assert caught.value.reason is Reason.PRODUCER_FAILED
    assert caught.value.metadata["transfer"] == world.requests.transfer.name
    assert world.requests.cancelled == []


def test_a_broken_connection_is_explained_by_the_transfer(world: World) -> None:
    cache = world.cache(break_off=True)
    world.stream_from(cache)
    with pytest.raises(BeamwireError, match="the cache was killed") as caught, world.client.stream(REQUEST) as stream:
        threading.Timer(0.5, lambda: world.set(**failed(Reason.CACHE_FAILED, "the cache was killed"))).start()
        list(stream)
    assert caught.value.reason is Reason.CACHE_FAILED


def test_a_broken_connection_nobody_explains_is_an_error_and_cancels(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beamwire.client.session._EXPLANATION_SECONDS", 0.3)
    world.stream_from(world.cache(break_off=True))
    with pytest.raises(BeamwireError, match=r"broke|without END") as caught, world.client.stream(REQUEST) as stream:
        list(stream)
    assert caught.value.reason is Reason.STREAM_TRUNCATED
    assert world.requests.cancelled == [world.requests.transfer.name]


def test_a_success_that_this_consumer_did_not_see_is_an_error(world: World) -> None:
    world.stream_from(world.cache(break_off=True))
    with pytest.raises(BeamwireError) as caught, world.client.stream(REQUEST) as stream:
        threading.Timer(0.5, lambda: world.set(state=Transfer.STATE_SUCCEEDED, receipt=receipt(12))).start()
        list(stream)
    assert caught.value.reason is Reason.STREAM_TRUNCATED


@pytest.mark.parametrize(("consumers", "raises"), [(1, True), (2, False)])
def test_the_receipt_must_agree_with_the_only_consumer(world: World, consumers: int, raises: bool) -> None:
    cache = world.cache()
    world.stream_from(cache)
    ending = world.finish_after(cache, state=Transfer.STATE_SUCCEEDED, receipt=receipt(15, consumers))
    with world.client.stream(REQUEST) as stream:
        if raises:
            with pytest.raises(BeamwireError, match=r"read 12 events.*15 were delivered") as caught:
                list(stream)
            assert caught.value.reason is Reason.RECEIPT_UNBALANCED
        else:
            assert sum(map(len, stream)) == 12
    ending.join()


def test_a_transfer_that_succeeded_before_is_an_empty_stream(world: World) -> None:
    world.set(
        name="transfers/old",
        state=Transfer.STATE_SUCCEEDED,
        connect_string="beamwire://127.0.0.1:9/buffers/b1?epoch=1",
        receipt=receipt(12),
    )
    with world.client.stream("transfers/old") as stream:
        assert list(stream) == []
        assert stream.receipt == receipt(12)


def test_a_transfer_that_succeeds_while_we_dial_is_an_empty_stream(world: World) -> None:
    # Nobody listens there any more: without the service's word, dialling would go on for half a minute.
    gone = "beamwire://127.0.0.1:9/buffers/b1?epoch=1"
    world.set(name="transfers/old", state=Transfer.STATE_STREAMING, connect_string=gone)
    threading.Timer(0.5, lambda: world.set(state=Transfer.STATE_SUCCEEDED, receipt=receipt(12, 1))).start()
    with world.client.stream("transfers/old") as stream:
        assert list(stream) == []
        assert stream.header is None
        assert stream.receipt == receipt(12, 1), "another consumer took them all"


def test_a_transfer_that_failed_before_raises_its_error(world: World) -> None:
    world.set(name="transfers/old", **failed(Reason.LAUNCH_FAILED, "no such program"))
    with pytest.raises(BeamwireError, match="no such program"), world.client.stream("old") as stream:
        list(stream)


def test_a_bare_buffer_is_read_by_its_connect_string(world: World) -> None:
    cache = world.cache()
    world.set(name="transfers/other", state=Transfer.STATE_SUCCEEDED, receipt=receipt(12))
    with world.client.stream(cache.connect) as stream:
        assert sum(map(len, stream)) == 12
        assert stream.receipt == receipt(12), "the header names the transfer"
    assert world.requests.created == []


def test_a_stream_without_events_says_what_it_would_have_held(world: World) -> None:
    cache = world.cache(frames=0)
    world.set(name="transfers/other", state=Transfer.STATE_SUCCEEDED, receipt=receipt(0))
    with world.client.stream(cache.connect) as stream:
        assert stream.header is None, "nothing was read"
        (part,) = stream.split()
        assert list(part) == []
        assert part.header is not None
        assert [(field.name, field.unit) for field in part.header.fields] == [("x", "eV")]
        assert stream.wait() == receipt(0), "the header names the transfer"


def test_a_watch_survives_a_service_that_restarts(world: World) -> None:
    world.requests.break_first_watch = True
    cache = world.cache()
    world.stream_from(cache)
    ending = world.finish_after(cache, state=Transfer.STATE_SUCCEEDED, receipt=receipt(12))
    with world.client.stream(REQUEST) as stream:
        assert sum(map(len, stream)) == 12
    ending.join()
    assert world.requests.watches >= 2


def test_parts_are_read_by_threads_of_ones_own(world: World) -> None:
    cache = world.cache()
    world.stream_from(cache)
    ending = world.finish_after(cache, state=Transfer.STATE_SUCCEEDED, receipt=receipt(12))
    with world.client.stream(REQUEST) as stream:
        (part,) = stream.split()
        with pytest.raises(BeamwireError, match="read already"):
            stream.split()
        events: list[int] = []
        thread = threading.Thread(target=lambda: events.extend(len(batch) for batch in part))
        thread.start()
        thread.join()
        assert stream.wait() == receipt(12)
        assert sum(events) == part.counters.events == 12
    ending.join()
    assert world.requests.cancelled == []


def test_misuse_is_said_so(world: World) -> None:
    stream = world.client.stream(REQUEST)
    with pytest.raises(BeamwireError, match="use `with"):
        next(iter(stream))
    with pytest.raises(BeamwireError, match="prefetch: must be at least 1"):
        world.client.stream(REQUEST, prefetch=0)
    world.client.close()
    world.client.close()
    with pytest.raises(BeamwireError, match="closed before"):
        world.client.get_transfer("x")


def test_plain_calls(world: World) -> None:
    checked = world.client.create_transfer(REQUEST, validate_only=True)
    assert world.requests.created[0].validate_only
    assert world.requests.created[0].request_id
    assert checked.config.event_source.type == "InternalEventSource"
    names = [transfer.name for transfer in world.client.list_transfers(page_size=2)]
    assert names == [f"transfers/t{number}" for number in range(5)]
    assert world.client.get_transfer("x").name == checked.name
    assert world.client.cancel_transfer("x").state == Transfer.STATE_CANCELLED
    assert [seen.state for seen in world.client.watch_transfer("x")] == [Transfer.STATE_CANCELLED]
    with pytest.raises(BeamwireError) as caught:
        world.client.get_buffer("x")
    assert caught.value.reason in (Reason.UNSUPPORTED, Reason.ACCESS_UNDECLARED, Reason.INTERNAL)
    with pytest.raises(BeamwireError, match="must be transfers/<id>"):
        world.client.get_transfer("jobs/x")


def test_a_client_that_is_forgotten_ends_its_thread(world: World) -> None:
    client = Client(config_dir=world.config)
    thread = client._portal._thread
    client.get_transfer("x")
    del client
    thread.join(10)
    assert not thread.is_alive()
