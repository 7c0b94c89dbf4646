"""Events through the facility's one port: a client whose way to the caches' ports is barred reads all the same."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import psutil
import pytest
import yaml

from beamwire.buffer.v1.buffer_service_pb2 import DELIVERY_PUSH, Buffer, BufferSpec
from beamwire.client import AsyncClient, BeamwireError, Client, Reason, connect
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.producer import Producer
from beamwire.stream.v1.frame_pb2 import StreamHeader
from beamwire.stream.v1.link_pb2 import LINK_ROLE_PRODUCE
from beamwire.testing.processes import matching
from tests.conftest import BIN, LiveFacility, wait_until


def request(events: int = 64, *, rate: float | None = None, shape=(32, 48)) -> dict:
    source = {"type": "SyntheticEventSource", "number_of_events": events, "shape": list(shape)}
    if rate is not None:
        source["events_per_second"] = rate
    return {
        "event_source": source,
        "data_sources": {"detector_data": {"type": "SyntheticDetector"}},
        "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 8}],
    }


@pytest.fixture
def client(live_facility: LiveFacility) -> Iterator[Client]:
    with connect(config_dir=live_facility.config_dir) as client:
        yield client


@pytest.fixture
def barred(monkeypatch: pytest.MonkeyPatch) -> None:
    """No consumer of this process reaches a cache by itself."""

    def unreachable(*_: object, **__: object) -> None:
        raise BeamwireError(Reason.CACHE_FAILED, "the firewall is in the way")

    monkeypatch.setattr("beamwire.client.session.dial", unreachable)


def ready_buffer(client: Client, **spec) -> Buffer:
    created = client.create_buffer(BufferSpec(**spec))
    return next(buffer for buffer in client.watch_buffer(created.name) if buffer.connect_string)


def producer_of(client: Client, buffer: Buffer, number: int = 0, count: int = 1) -> Producer:
    where = ConnectString.parse(buffer.connect_string)
    header = StreamHeader(buffer=buffer.name, producer_count=count)
    tickets = client.tickets(where, LINK_ROLE_PRODUCE)
    return Producer(where, client.credentials, header, producer=number, tickets=tickets)


def send(producer: Producer, ids: range, size: int) -> None:
    for number in ids:
        data = np.full((1, size), number % 251, np.uint8)
        producer.send({"data": data}, np.array([number], np.uint64))
    producer.end()


@pytest.mark.usefixtures("barred")
def test_a_transfer_is_read_through_the_service_and_balances(client: Client) -> None:
    ids: list[int] = []
    with client.stream({**request(), "processes": 2}, via="grpc") as stream:
        for batch in stream:
            assert batch["detector_data"].shape[1:] == (32, 48)
            ids += batch.event_ids.tolist()
    assert sorted(ids) == list(range(64))
    assert stream.receipt is not None
    assert stream.receipt.balanced
    assert stream.receipt.delivered_event_count == 64
    assert {consumer.identity for consumer in stream.receipt.consumers} == {str(client.credentials.identity)}


@pytest.mark.usefixtures("barred")
async def test_the_asynchronous_client_reads_through_the_service(live_facility: LiveFacility) -> None:
    async with AsyncClient(config_dir=live_facility.config_dir) as client:
        async with client.stream(request(), via="grpc", consumers=2) as stream:
            ids = [number async for batch in stream for number in batch.event_ids.tolist()]
        assert sorted(ids) == list(range(64))


@pytest.mark.usefixtures("barred")
def test_without_it_the_error_names_the_other_way(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beamwire.client.session._EXPLANATION_SECONDS", 0.5)
    with pytest.raises(BeamwireError, match="firewall") as caught, client.stream(request(100000, rate=20)) as stream:
        next(iter(stream))
    assert caught.value.reason is Reason.CACHE_FAILED
    assert any('via="grpc"' in note for note in caught.value.__notes__)


def test_large_frames_and_several_shards_pass(client: Client) -> None:
    buffer = ready_buffer(client, producer_count=2, shard_count=2)
    producers = [producer_of(client, buffer, number, 2) for number in range(2)]
    sending = [
        threading.Thread(target=send, args=(producer, range(number * 10, number * 10 + 10), 5_000_000))
        for number, producer in enumerate(producers)
    ]
    for thread in sending:
        thread.start()
    seen: dict[int, int] = {}
    with client.stream(buffer.connect_string, via="grpc") as stream:
        for batch in stream:
            assert (batch["data"] == batch.event_ids[0] % 251).all()
            seen[int(batch.event_ids[0])] = batch.producer
    for thread in sending:
        thread.join()
    assert sorted(seen) == list(range(20))
    assert Counter(seen.values()) == {0: 10, 1: 10}
    client.delete_buffer(buffer.name)


def test_a_direct_and_a_tunnelled_consumer_share_the_work(client: Client) -> None:
    buffer = ready_buffer(client)
    sending = threading.Thread(target=send, args=(producer_of(client, buffer), range(400), 100_000))
    ids: dict[str, list[int]] = {"data": [], "grpc": []}

    def read(via) -> None:
        with client.stream(buffer.connect_string, via=via) as stream:
            for batch in stream:
                ids[via] += batch.event_ids.tolist()
                # A reader for whom there is always something to do, so that neither gets everything.
                time.sleep(0.001)

    readers = [threading.Thread(target=read, args=(via,)) for via in ids]
    for thread in readers:
        thread.start()
    wait_until(
        lambda: sum(each.connected for each in client.get_buffer(buffer.name).counters.consumers) == 2,
        what="both readers",
    )
    sending.start()
    for thread in [*readers, sending]:
        thread.join()
    assert sorted(ids["data"] + ids["grpc"]) == list(range(400))
    assert ids["grpc"], "it had its share"
    client.delete_buffer(buffer.name)


def test_a_buffer_with_push_cannot_be_read_so(client: Client) -> None:
    buffer = ready_buffer(client, delivery=DELIVERY_PUSH)
    with (
        pytest.raises(BeamwireError, match="cannot be read through gRPC") as caught,
        client.stream(buffer.connect_string, via="grpc") as stream,
    ):
        next(iter(stream))
    assert caught.value.reason is Reason.UNSUPPORTED
    client.delete_buffer(buffer.name)


def test_a_stranger_cannot_consume_so(live_facility: LiveFacility, client: Client, tmp_path) -> None:
    buffer = ready_buffer(client)
    config = live_facility.enroll("user/mallory", tmp_path / "mallory")
    with (
        connect(config_dir=config) as stranger,
        pytest.raises(BeamwireError) as caught,
        stranger.stream(buffer.connect_string, via="grpc") as stream,
    ):
        next(iter(stream))
    assert caught.value.reason is Reason.NOT_OWNER
    client.delete_buffer(buffer.name)


def test_who_is_revoked_is_cut_off_within_a_second(client: Client) -> None:
    buffer = ready_buffer(client)
    producer = producer_of(client, buffer)
    with client.stream(buffer.connect_string, via="grpc") as stream:
        producer.send({"x": np.zeros((1, 3))}, np.array([1], np.uint64))
        batches = iter(stream)
        next(batches)
        client.revoke_access(buffer.name, str(client.credentials.identity))
        begin = time.monotonic()
        with pytest.raises(BeamwireError) as caught:
            next(batches)
    assert caught.value.reason in (Reason.NOT_OWNER, Reason.ROLE_NOT_ALLOWED)
    assert time.monotonic() - begin < 3
    producer.close()
    client.delete_buffer(buffer.name)


def test_a_cache_that_is_killed_comes_back_behind_the_tunnel(own_facility: LiveFacility) -> None:
    told: list[str] = []
    with connect(config_dir=own_facility.config_dir) as client:
        buffer = ready_buffer(client)
        producer = producer_of(client, buffer)
        sending = threading.Thread(target=send, args=(producer, range(300), 20_000))
        ids: list[int] = []
        with client.stream(buffer.connect_string, via="grpc", on_reconnect=told.append) as stream:
            sending.start()
            for batch in stream:
                ids += batch.event_ids.tolist()
                if len(ids) == 50:
                    kill_cache(own_facility)
        sending.join()
        assert ids == list(range(300)), "nothing lost, nothing twice, in order"
        assert any("is back after" in story for story in told)
        client.delete_buffer(buffer.name)


def kill_cache(facility: LiveFacility) -> None:
    def is_cache(process: psutil.Process) -> bool:
        command = process.cmdline()
        return "beamwire.services.buffer.cache" in command and str(facility.directory) in command[-1]

    for process in matching(is_cache):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def test_a_service_that_is_away_for_a_while_is_waited_for(own_facility: LiveFacility) -> None:
    with connect(config_dir=own_facility.config_dir) as client:
        buffer = ready_buffer(client)
        producer = producer_of(client, buffer)
        sending = threading.Thread(target=send, args=(producer, range(200), 20_000))
        ids: list[int] = []
        with client.stream(buffer.connect_string, via="grpc") as stream:
            sending.start()
            for batch in stream:
                ids += batch.event_ids.tolist()
                if len(ids) == 50:
                    restart(own_facility)
        sending.join()
        assert ids == list(range(200))
        client.delete_buffer(buffer.name)


def restart(facility: LiveFacility) -> None:
    old = facility.processes.pop()
    old.kill()
    old.wait()
    assert old.stdout is not None
    old.stdout.close()
    facility.start()


def test_the_command_line_reads_through_the_service(live_facility: LiveFacility, tmp_path) -> None:
    path = tmp_path / "request.yaml"
    path.write_text(yaml.safe_dump(request(32)))
    done = live_facility.beamwire("--json", "get", str(path), "-o", str(tmp_path / "out"), "--via", "grpc")
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["events"] == 32
    assert answer["receipt"]["balanced"]


@pytest.mark.parametrize("via", ["data", "grpc"])
def test_bench_measures_a_buffer_of_the_facility(live_facility: LiveFacility, via: str) -> None:
    done = live_facility.beamwire("--json", "bench", "--seconds", "1", "--size", "100k", "--via", via)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["frames"]["sent"] == answer["frames"]["read"] > 20
    assert answer["bytes_per_second"] == pytest.approx(answer["frames_per_second"] * 100_000, rel=0.01)
    assert 0 < answer["latency_seconds"]["p50"] <= answer["latency_seconds"]["p99"] < 5
    assert (answer["transport"], answer["delivery"], answer["via"]) == ("tls+tcp", "acked", via)
    assert answer["reconnects"] == {"sending": 0, "reading": 0}
    with connect(config_dir=live_facility.config_dir) as client, pytest.raises(BeamwireError):
        client.get_buffer(answer["buffer"])


def test_bench_takes_a_buffer_that_exists(live_facility: LiveFacility, client: Client) -> None:
    buffer = ready_buffer(client)
    done = live_facility.beamwire("bench", buffer.connect_string, "--seconds", "0.5", "--size", "4k")
    assert "frames/s of 4 kB" in done.stdout
    assert "latency" in done.stdout
    client.delete_buffer(buffer.name)


def test_bench_that_is_interrupted_leaves_nothing(live_facility: LiveFacility) -> None:
    command = [str(BIN / "beamwire"), "bench", "--local", "--seconds", "30"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=live_facility.env()
    )
    me = psutil.Process(process.pid)
    wait_until(lambda: len(me.children(recursive=True)) >= 3, 30, "the cache and both sides")
    children = me.children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130, said
    assert "interrupted" in said
    wait_until(lambda: not any(child.is_running() for child in children), 10, "the end of all of them")
