"""`beamwire bridge` as people run it, between a real cache and the client libraries of the consumers it is for."""

from __future__ import annotations

import ast
import io
import json
import shutil
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import cbor2
import h5py
import msgpack
import numpy as np
import pynng
import pytest
import zmq

from beamwire.client.bridges.hub import FRAME_WENT_BACK, KEPT_TOO_LONG
from beamwire.mesh.formats.dectris import Series
from beamwire.mesh.stream.frame import Ragged
from beamwire.mesh.stream.producer import Producer
from beamwire.stream.v1.frame_pb2 import Field, StreamHeader
from beamwire.testing.ports import free_port
from tests.conftest import BIN, wait_until
from tests.judges import decompress, need_decompress

WAIT = 60.0
SHAPE = (24, 40)


def image(event: int, dtype: str = "<u2", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return (np.arange(np.prod(shape)) % 211 + event % 1000).reshape(shape).astype(dtype)


def field(name: str, dtype: str, shape: tuple[int, ...] = (), unit: str = "") -> Field:
    return Field(name=name, dtype=dtype, shape=shape, unit=unit)


DETECTOR = field("detector_data", "<u2", SHAPE)


def images(ids: np.ndarray) -> dict[str, np.ndarray]:
    return {"detector_data": np.stack([image(int(event)) for event in ids])}


def send(
    cache,
    count: int,
    batch: int,
    fields: list[Field],
    arrays: Callable[[np.ndarray], dict],
    pause: Callable[[int], object] | None = None,
) -> threading.Thread:
    """Send events 0, 1, … in batches, in a thread."""

    def work() -> None:
        header = StreamHeader(buffer=f"buffers/{cache.connect.buffer}", producer_count=1, fields=fields)
        with Producer(cache.connect, cache.user, header) as out:
            for first in range(0, count, batch):
                if pause is not None:
                    pause(first)
                ids = np.arange(first, min(first + batch, count), dtype=np.uint64)
                out.send(arrays(ids), ids)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@dataclass
class BridgeProcess:
    """A bridge in a process of its own."""

    process: subprocess.Popen[str]

    def stop(self) -> dict:
        self.process.send_signal(signal.SIGTERM)
        return self.end(143)

    def end(self, code: int = 0) -> dict:
        """Its account, once it has ended with a code."""
        out, err = self.process.communicate(timeout=WAIT)
        assert self.process.returncode == code, err
        lines = [json.loads(line) for line in out.splitlines()]
        account = next(line["account"] for line in reversed(lines) if "account" in line)
        assert account["balanced"], account
        assert account["received"] == account["served"] + account["refused"] + account["left"]
        return account


StartBridge = Callable[..., BridgeProcess]


@pytest.fixture
def start_bridge(tmp_path: Path, facility, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartBridge]:
    directory = tmp_path / "config" / "facilities" / facility.trust_domain
    shutil.copytree(facility.member("user/alice").directory, directory)
    member = {"trust_domain": facility.trust_domain, "address": "127.0.0.1:9", "enroll_address": "127.0.0.1:9"}
    (directory / "member.json").write_text(json.dumps(member))
    monkeypatch.setenv("BEAMWIRE_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("BEAMWIRE_TRACE_DIR", str(tmp_path / "traces"))
    started: list[subprocess.Popen[str]] = []

    def start(kind: str, cache, *options: object) -> BridgeProcess:
        command = [str(BIN / "beamwire"), "--json", "bridge", kind, str(cache.connect), *map(str, options)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return BridgeProcess(process)

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=WAIT)


class Indexamajig:
    """What `--zmq-request=next` does: asks, ignores an answer of 15 bytes or less, else looks at it and asks again."""

    def __init__(self, port: int, *, limit: int = 10**9) -> None:
        self.seen: list[dict] = []
        self.raw: list[bytes] = []
        self.refusals = 0
        self._limit = limit
        self._stop = threading.Event()
        self._context = zmq.Context()
        self._port = port
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        sock = self._context.socket(zmq.REQ)
        sock.linger = 0
        sock.connect(f"tcp://127.0.0.1:{self._port}")
        while len(self.raw) < self._limit:
            sock.send(b"next")
            while not sock.poll(50):
                if self._stop.is_set():
                    sock.close()
                    return
            answer = sock.recv()
            if len(answer) > 15:
                self.raw.append(answer)
            else:
                self.refusals += 1
        # Dies with an event in its hands.
        sock.close()

    @property
    def ids(self) -> list[int]:
        return [int(find(msgpack.unpackb(raw, strict_map_key=False), "event_id")) for raw in self.raw]

    def wait(self) -> None:
        self._thread.join(WAIT)
        assert not self._thread.is_alive()
        self._context.term()

    def stop(self) -> None:
        self._stop.set()
        self.wait()


def find(map_: dict, key: str):
    """A value as CrystFEL looks it up: the first key that is the beginning of the one wanted."""
    return next(value for name, value in map_.items() if key.startswith(name))


@contextmanager
def pulling(socket_type: int, *, bind: int = 0, connect: int = 0) -> Iterator[zmq.Socket]:
    context = zmq.Context()
    sock = context.socket(socket_type)
    sock.linger = 0
    sock.rcvtimeo = int(1000 * WAIT)
    if bind:
        sock.bind(f"tcp://127.0.0.1:{bind}")
    if connect:
        sock.connect(f"tcp://127.0.0.1:{connect}")
    try:
        yield sock
    finally:
        sock.close()
        context.term()


def with_peaks(ids: np.ndarray) -> dict:
    lengths = [int(event) % 4 for event in ids]
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    columns = {
        "fs": np.concatenate([np.arange(length) + event / 8 for event, length in zip(ids, lengths, strict=True)]),
        "ss": np.concatenate([np.arange(length) * 2.0 + event for event, length in zip(ids, lengths, strict=True)]),
        "intensity": np.concatenate(
            [np.full(length, 100.0 + event) for event, length in zip(ids, lengths, strict=True)]
        ),
    }
    rows = {f"peaks_{name}": Ragged(values.astype("<f4"), offsets) for name, values in columns.items()}
    return {**images(ids), **rows, "beam_energy": np.full(len(ids), 9.5), "event": ids}


PEAKS = [field(f"peaks_{name}", "<f4", (-1,)) for name in ("fs", "ss", "intensity")]


def test_crystfel_gets_each_event_once_as_it_wants_it(start_cache, start_bridge):
    cache = start_cache(transport="tcp", delivery="ACKED")
    port = free_port()
    fields = [DETECTOR, *PEAKS, field("beam_energy", "<f8", unit="keV"), field("event", "<u8")]
    bridge = start_bridge(
        "crystfel", cache, "--listen", f"tcp://127.0.0.1:{port}", "--distance", "121.5", "--linger", "0.5"
    )
    workers = [Indexamajig(port) for _ in range(3)]
    # While there is nothing each is told so.
    wait_until(lambda: all(worker.refusals for worker in workers), WAIT)
    sending = send(cache, 60, 7, fields, with_peaks)
    account = bridge.end()
    sending.join(WAIT)
    for worker in workers:
        worker.stop()
    assert (account["served"], account["left"], account["repeated"]) == (60, 0, {})
    assert Counter(number for worker in workers for number in worker.ids) == Counter(range(60))
    for raw in (raw for worker in workers for raw in worker.raw):
        event = msgpack.unpackb(raw)
        number = int(event["event_id"])
        data = find(event, "detector_data")
        assert (data["type"], data["shape"]) == ("<i4", list(SHAPE))
        np.testing.assert_array_equal(np.frombuffer(data["data"], "<i4").reshape(SHAPE), image(number))
        assert find(event, "beam_energy") == 9500.0
        assert find(event, "detector_distance") == 121.5
        peaks = find(event, "peak_list")
        assert len(peaks["fs"]) == len(peaks["ss"]) == len(peaks["intensity"]) == number % 4
        assert all(type(value) is float for column in peaks.values() for value in column)
        assert peaks["ss"] == [2.0 * peak + number for peak in range(number % 4)]
        keys = [*event]
        assert not any(one != other and other.startswith(one) for one in keys for other in keys)
    assert cache.ended().counters.losses == {}


def test_an_event_of_a_worker_that_died_goes_to_another(start_cache, start_bridge):
    cache = start_cache(transport="tcp", delivery="ACKED")
    port = free_port()
    bridge = start_bridge("crystfel", cache, "--listen", f"tcp://127.0.0.1:{port}", "--linger", "0.5")
    mortal = Indexamajig(port, limit=5)
    sending = send(cache, 40, 4, [DETECTOR], images)
    mortal.wait()
    other = Indexamajig(port)
    account = bridge.end()
    other.stop()
    sending.join(WAIT)
    # The one in its hands when it died, and no other.
    assert Counter(mortal.ids) + Counter(other.ids) == Counter(range(40)) + Counter([mortal.ids[-1]])
    assert account["served"] == 40
    assert account["repeated"] == {"its worker left before it asked for another": 1}


def test_workers_stay_while_a_bridge_is_stopped_and_another_goes_on(start_cache, start_bridge):
    cache = start_cache(transport="tcp", delivery="ACKED")
    port = free_port()
    more = threading.Event()
    workers = [Indexamajig(port) for _ in range(3)]
    options = ("--listen", f"tcp://127.0.0.1:{port}", "--linger", "0.5")
    first = start_bridge("crystfel", cache, *options)
    sending = send(cache, 90, 5, [DETECTOR], images, lambda event: event != 45 or more.wait(WAIT))
    wait_until(lambda: sum(len(worker.raw) for worker in workers) >= 20, WAIT)
    one = first.stop()
    more.set()
    other = start_bridge("crystfel", cache, *options).end()
    sending.join(WAIT)
    for worker in workers:
        worker.stop()
    seen = Counter(number for worker in workers for number in worker.ids)
    assert set(seen) == set(range(90))
    assert sum(seen.values()) - 90 == sum(one["repeated"].values()) == 0
    assert one["served"] + other["served"] == 90
    assert one["served"] >= 20


def test_a_worker_that_never_asks_again_is_not_waited_for(start_cache, start_bridge):
    cache = start_cache(transport="tcp", delivery="ACKED", frame_lease=1.0)
    port = free_port()
    bridge = start_bridge("crystfel", cache, "--listen", f"tcp://127.0.0.1:{port}", "--linger", "0.5")
    with pulling(zmq.REQ, connect=port) as stuck:
        stuck.send(b"next")
        sending = send(cache, 300, 1, [DETECTOR], images)
        kept = int(msgpack.unpackb(stuck.recv())["event_id"])
        other = Indexamajig(port)
        account = bridge.end()
        other.stop()
        sending.join(WAIT)
    assert Counter(other.ids) == Counter(range(300))
    assert kept in other.ids
    assert (account["served"], account["received"], account["refused"]) == (300, 300, 0)
    assert account["repeated"][KEPT_TOO_LONG] >= 1


def test_after_a_bridge_was_killed_another_misses_nothing(start_cache, start_bridge):
    cache = start_cache(transport="tcp", delivery="ACKED", reconnect_grace=0.2)
    port = free_port()
    options = ("--listen", f"tcp://127.0.0.1:{port}", "--linger", "0.5")
    workers = [Indexamajig(port) for _ in range(3)]
    first = start_bridge("crystfel", cache, *options)
    sending = send(cache, 400, 1, [DETECTOR], images)
    wait_until(lambda: sum(len(worker.raw) for worker in workers) >= 60, WAIT)
    first.process.kill()
    first.process.communicate(timeout=WAIT)
    for worker in workers:
        worker.stop()
    workers += [Indexamajig(port) for _ in range(3)]
    start_bridge("crystfel", cache, *options).end()
    sending.join(WAIT)
    for worker in workers[3:]:
        worker.stop()
    seen = Counter(number for worker in workers for number in worker.ids)
    assert set(seen) == set(range(400))
    # What it had in its hands, or had no time to acknowledge, came again; the cache knows how much that was.
    assert seen.total() - 400 <= cache.ended().counters.groups[0].redelivered_frame_count


@pytest.mark.parametrize("memory", ["1", "12Mi"])
def test_no_more_is_read_than_memory_allows(start_cache, start_bridge, memory):
    cache = start_cache(transport="tcp", delivery="ACKED", capacity_bytes=2**27)
    port = free_port()
    shape = (1024, 1024)
    bridge = start_bridge(
        "crystfel", cache, "--listen", f"tcp://127.0.0.1:{port}", "--memory", memory, "--drain", "0.1"
    )
    large = field("detector_data", "<f4", shape)
    sending = send(cache, 20, 1, [large], lambda ids: {"detector_data": np.zeros((1, *shape), "<f4")})
    sending.join(WAIT)
    with pulling(zmq.REQ, connect=port) as stuck:
        stuck.send(b"next")
        stuck.recv()
        account = bridge.stop()
    assert account["received"] <= (1 if memory == "1" else 4)
    cache.seal("CANCELLED")


def test_crystfel_gets_hdf5_files(start_cache, start_bridge):
    cache = start_cache(transport="tcp", delivery="ACKED")
    port = free_port()
    options = ("--listen", f"tcp://127.0.0.1:{port}", "--linger", "0.5", "--encoding", "hdf5", "--energy", "8000")
    bridge = start_bridge("crystfel", cache, *options)
    worker = Indexamajig(port)
    sending = send(
        cache,
        6,
        3,
        [DETECTOR, *PEAKS],
        lambda ids: {key: value for key, value in with_peaks(ids).items() if key not in ("beam_energy", "event")},
    )
    assert bridge.end()["served"] == 6
    worker.stop()
    sending.join(WAIT)
    for raw in worker.raw:
        with h5py.File(io.BytesIO(raw)) as file:
            number = int(file["event_id"].asstr()[()])
            np.testing.assert_array_equal(file["detector_data"], image(number))
            assert file["beam_energy"][()] == 8000.0
            assert file["peak_list"].shape == (number % 4, 3)


def test_a_stream_that_does_not_fit_is_refused_with_what_to_do(start_cache, start_bridge):
    cache = start_cache(transport="tcp", delivery="ACKED")
    bridge = start_bridge("crystfel", cache, "--listen", "tcp://127.0.0.1:0", "--drain", "1")
    three = field("detector_data", "<u2", (2, *SHAPE))
    sending = send(cache, 2, 1, [three], lambda ids: {"detector_data": np.zeros((len(ids), 2, *SHAPE), "<u2")})
    out, err = bridge.process.communicate(timeout=WAIT)
    assert bridge.process.returncode == 2
    assert "3 axes instead of 2; CrystFEL takes one flat image: put a stage before" in err
    last = json.loads(out.splitlines()[-1])
    assert last["error"]["reason"] == "INVALID_FIELD"
    cache.seal("CANCELLED")
    sending.join(WAIT)


def test_peaknet_gets_npz_batches_also_from_a_socket_that_binds_later(start_cache, start_bridge):
    cache = start_cache(transport="tcp", delivery="ACKED")
    port = free_port()
    shape = (2, 16, 20)
    fields = [
        field("detector_data", "<f4", shape),
        field("detector_data_original_shape", "<i4", (2,)),
        field("timestamp", "<u8"),
        field("photon_wavelength", "<f8", unit="nm"),
    ]

    def arrays(ids: np.ndarray) -> dict:
        return {
            "detector_data": np.stack([image(int(event), "<f4", shape) for event in ids]),
            "detector_data_original_shape": np.tile(np.array([15, 18], "<i4"), (len(ids), 1)),
            "timestamp": ids + np.uint64(2**60),
            "photon_wavelength": np.full(len(ids), 0.13),
        }

    bridge = start_bridge("peaknet", cache, "--connect", f"tcp://127.0.0.1:{port}")
    sending = send(cache, 22, 5, fields, arrays)
    seen: list[int] = []
    with pulling(zmq.PULL, bind=port) as sock:
        while len(seen) < 22:
            with np.load(io.BytesIO(sock.recv())) as batch:
                ids = (batch["timestamp"] - np.uint64(2**60)).tolist()
                assert batch["detector_data"].shape == (len(ids), *shape)
                np.testing.assert_array_equal(batch["detector_data"][0], image(ids[0], "<f4", shape))
                np.testing.assert_allclose(batch["photon_wavelength"], 1.3)
                np.testing.assert_array_equal(batch["original_shape"], [[15, 18]] * len(ids))
                seen += ids
        account = bridge.end()
    sending.join(WAIT)
    assert Counter(seen) == Counter(range(22))
    assert (account["served"], account["messages"], account["repeated"]) == (22, 5, {})


def test_what_a_pull_socket_had_not_taken_goes_to_the_next(start_cache, start_bridge):
    """Large messages, so that the sockets' buffers are full when the consumer dies."""
    cache = start_cache(transport="tcp", delivery="ACKED", capacity_bytes=2**28)
    port = free_port()
    shape = (1024, 1024)
    fields = [field("detector_data", "<f4", shape)]

    def arrays(ids: np.ndarray) -> dict:
        return {"detector_data": np.broadcast_to(ids.astype("<f4")[:, None, None], (len(ids), *shape)).copy()}

    def ids_in(message: bytes) -> list[int]:
        with np.load(io.BytesIO(message)) as batch:
            return [int(event) for event in batch["timestamp"]]

    bridge = start_bridge("peaknet", cache, "--connect", f"tcp://127.0.0.1:{port}", "--wavelength", "1.3")
    sending = send(cache, 30, 1, fields, arrays)
    seen: list[int] = []
    context = zmq.Context()
    first = context.socket(zmq.PULL)
    first.rcvhwm = 1
    # The kernel would let it grow with the load, to 32 MB on newer ones.
    first.rcvbuf = 2**20
    first.linger = 0
    first.bind(f"tcp://127.0.0.1:{port}")
    for _ in range(3):
        seen += ids_in(first.recv())
    first.close()
    context.term()
    with pulling(zmq.PULL, bind=port) as sock:
        # Until the bridge has ended and nothing more comes.
        while bridge.process.poll() is None or sock.poll(500):
            if sock.poll(100):
                seen += ids_in(sock.recv())
        account = bridge.end()
    sending.join(WAIT)
    assert account["served"] == 30
    # The dead one's host had some that it never looked at; nobody else's are missing, and what came twice is counted.
    twice = sum(Counter(seen).values()) - len(set(seen))
    assert twice <= account["repeated"].get("its consumer's connection was lost", 0)
    missing = set(range(30)) - set(seen)
    assert len(missing) <= 4, missing


@pytest.mark.parametrize("consumers", [1, 2])
def test_maxie_gets_each_image_with_a_header_that_python_reads(start_cache, start_bridge, consumers):
    cache = start_cache(transport="tcp", delivery="ACKED")
    port = free_port()
    bridge = start_bridge("maxie", cache, "--listen", f"tcp://127.0.0.1:{port}")
    pulls = [pynng.Pull0(recv_timeout=int(WAIT * 1000)) for _ in range(consumers)]
    for pull in pulls:
        pull.dial(f"tcp://127.0.0.1:{port}", block=False)
    wait_until(lambda: all(pull.pipes for pull in pulls), WAIT)
    sending = send(cache, 30, 4, [DETECTOR], images)
    seen: Counter[int] = Counter()
    lock = threading.Lock()

    def work(pull: pynng.Pull0) -> None:
        while True:
            try:
                message = pull.recv()
            except pynng.Closed:
                return
            line, _, data = message.partition(b"\n")
            header = ast.literal_eval(line.decode())
            got = np.frombuffer(data, np.float32).reshape(header["shape"])
            np.testing.assert_array_equal(got, image(header["index"]))
            with lock:
                seen[header["index"]] += 1

    threads = [threading.Thread(target=work, args=(pull,)) for pull in pulls]
    for thread in threads:
        thread.start()
    account = bridge.end()
    wait_until(lambda: seen.total() >= 30, WAIT)
    for pull in pulls:
        pull.close()
    for thread in threads:
        thread.join(WAIT)
    sending.join(WAIT)
    assert seen == Counter(range(30))
    assert (account["served"], account["messages"], account["consumers"]) == (30, 30, consumers)


def test_a_bridge_that_pushes_is_stopped_and_another_goes_on(start_cache, start_bridge):
    cache = start_cache(transport="tcp", delivery="ACKED")
    port = free_port()
    more = threading.Event()
    seen: Counter[int] = Counter()
    options = ("--listen", f"tcp://127.0.0.1:{port}")
    pull = pynng.Pull0()
    pull.dial(f"tcp://127.0.0.1:{port}", block=False)

    def work() -> None:
        with suppress(pynng.Closed):
            while True:
                seen[index_of(pull.recv())] += 1

    reading = threading.Thread(target=work)
    reading.start()
    first = start_bridge("maxie", cache, *options)
    sending = send(cache, 200, 3, [DETECTOR], images, lambda event: event != 99 or more.wait(WAIT))
    wait_until(lambda: seen.total() >= 40, WAIT)
    one = first.stop()
    more.set()
    other = start_bridge("maxie", cache, *options).end()
    sending.join(WAIT)
    wait_until(lambda: len(seen) == 200, WAIT)
    pull.close()
    reading.join(WAIT)
    assert one["served"] + other["served"] == 200
    assert one["repeated"] == other["repeated"] == {}
    assert seen == Counter(range(200))


def test_what_goes_back_because_a_consumer_takes_nothing_more_is_counted(start_cache, start_bridge):
    cache = start_cache(transport="tcp", delivery="ACKED")
    port = free_port()
    seen: Counter[int] = Counter()
    options = ("--listen", f"tcp://127.0.0.1:{port}", "--drain", "0.5")
    with pynng.Pull0(recv_timeout=int(WAIT * 1000), recv_buffer_size=1) as pull:
        pull.dial(f"tcp://127.0.0.1:{port}", block=False)
        first = start_bridge("maxie", cache, *options)
        sending = send(cache, 3000, 3, [DETECTOR], images)
        seen[index_of(pull.recv())] += 1
        one = first.stop()
        assert one["served"] < 3000
        second = start_bridge("maxie", cache, *options)
        while len(seen) < 3000:
            seen[index_of(pull.recv())] += 1
        other = second.end()
        sending.join(WAIT)
    missing = 3000 - one["served"]
    assert missing <= other["received"] <= missing + one["repeated"].get(FRAME_WENT_BACK, 0)
    assert other["served"] == other["received"]
    # What is counted may have arrived twice; nothing else has.
    assert 0 <= seen.total() - 3000 <= sum(one["repeated"].values())


def index_of(message: bytes) -> int:
    return ast.literal_eval(message.partition(b"\n")[0].decode())["index"]


def hits(ids: np.ndarray) -> dict:
    rng = np.random.default_rng(int(ids[0]))
    nedges = rng.integers(0, 4, (len(ids), 3)).astype("<i4")
    channels = np.concatenate([np.repeat(np.arange(3), row) for row in nedges]).astype("<u2")
    offsets = np.concatenate(([0], np.cumsum(nedges.sum(1)))).astype(np.int64)
    events = np.repeat(ids, nedges.sum(1)).astype("<f8")
    return {
        "hits_nedges": nedges,
        "hits_channel": Ragged(channels, offsets),
        "hits_tof": Ragged(1000.0 * events + 100.0 * channels + np.arange(len(events)) * 1e-3, offsets),
        "hits_slope": Ragged((events + 0.5).astype("<f4"), offsets),
    }


def test_tmo_gets_the_hits_of_each_channel_in_csr_arrays(start_cache, start_bridge):
    cache = start_cache(transport="tcp", delivery="ACKED")
    port = free_port()
    fields = [
        field("hits_nedges", "<i4", (3,)),
        field("hits_channel", "<u2", (-1,)),
        field("hits_tof", "<f8", (-1,), "ns"),
        field("hits_slope", "<f4", (-1,)),
    ]
    bridge = start_bridge("tmo", cache, "--listen", f"tcp://127.0.0.1:{port}")
    seen: Counter[int] = Counter()
    with pynng.Pull0(recv_timeout=int(WAIT * 1000)) as pull:
        pull.dial(f"tcp://127.0.0.1:{port}", block=False)
        sending = send(cache, 25, 6, fields, hits)
        while seen.total() < 25:
            with h5py.File(io.BytesIO(pull.recv())) as file:
                assert sorted(file) == ["port_0", "port_1", "port_2"]
                seen.update(file["port_0/events"][:].tolist())
                for channel in range(3):
                    group = file[f"port_{channel}"]
                    assert group["tofs"].attrs["units"] == "ns"
                    starts = group["addresses"][:]
                    assert starts[0] == 0
                    assert len(group["tofs"]) == len(group["slopes"]) == group["nedges"][:].sum()
                    for event, begin, count in zip(group["events"], starts, group["nedges"], strict=True):
                        tofs = group["tofs"][begin : begin + count]
                        # Each time says of which event and channel it is.
                        assert (tofs // 1000 == event).all()
                        assert (tofs % 1000 // 100 == channel).all()
                        assert (np.diff(tofs) > 0).all()
                        assert (group["slopes"][begin : begin + count] == event + 0.5).all()
        account = bridge.end()
        sending.join(WAIT)
    assert seen == Counter(range(25))
    assert (account["served"], account["messages"]) == (25, 5)


def decode_typed(tag, immutable=False):
    """Tags as a Stream V2 client reads them."""
    types = {64: "|u1", 69: "<u2", 70: "<u4", 77: "<i2", 78: "<i4", 85: "<f4"}
    if tag.tag == 40:
        shape, data = tag.value
        return np.asarray(data).reshape(shape)
    if tag.tag == 56500:
        algorithm, element, data = tag.value
        return decompress(data, algorithm, elem_size=element)
    if tag.tag in types:
        return np.frombuffer(tag.value, types[tag.tag])
    return tag


@pytest.mark.parametrize("compression", ["none", "bslz4"])
def test_dectris_tools_get_stream_v2(start_cache, start_bridge, compression):
    if compression == "bslz4":
        need_decompress()
    cache = start_cache(transport="tcp", delivery="ACKED")
    port = free_port()
    options = ("--listen", f"tcp://127.0.0.1:{port}", "--compression", compression)
    bridge = start_bridge("dectris", cache, *options)
    messages: list[bytes] = []
    received: list[dict] = []
    with pulling(zmq.PULL, connect=port) as sock:
        sending = send(cache, 12, 5, [DETECTOR], images)
        while not received or received[-1]["type"] != "end":
            messages.append(sock.recv())
            received.append(cbor2.loads(messages[-1], tag_hook=decode_typed))
        account = bridge.end()
    sending.join(WAIT)
    start, *shots, end = received
    assert (start["type"], start["image_dtype"], start["image_size_x"], start["image_size_y"]) == (
        "start",
        "uint16",
        40,
        24,
    )
    assert len({(message["series_id"], message["series_unique_id"]) for message in received}) == 1
    assert sorted(message["image_id"] for message in shots) == list(range(12))
    for message in shots:
        assert message["type"] == "image"
        np.testing.assert_array_equal(message["data"]["threshold_1"], image(message["user_data"]["event_id"]))
    assert all((b"bslz4" in message) == (compression == "bslz4") for message in messages[1:-1])
    assert Counter(message["user_data"]["event_id"] for message in shots) == Counter(range(12))
    assert (account["served"], account["left"]) == (12, 0)
    assert end["type"] == "end"


def test_stream_v2_messages_are_passed_on_also_by_a_bridge_that_missed_the_start(start_cache, start_bridge):
    cache = start_cache(transport="tcp", delivery="ACKED")
    port = free_port()
    series = Series(7, "run-7", "uint16", SHAPE[1], SHAPE[0], facts={"incident_energy": 9500.0})
    header = StreamHeader(buffer=f"buffers/{cache.connect.buffer}", producer_count=1)
    options = ("--listen", f"tcp://127.0.0.1:{port}")
    nobody = np.empty(0, np.uint64)
    received: list[dict] = []
    with pulling(zmq.PULL, connect=port) as sock, Producer(cache.connect, cache.user, header) as out:

        def shoot(events: range) -> None:
            for event in events:
                ids = np.array([event], np.uint64)
                out.send_opaque(series.image(event, image(event)), "application/cbor", ids)

        first = start_bridge("dectris", cache, *options)
        out.send_opaque(series.start(), "application/cbor", nobody)
        shoot(range(5))
        received += [cbor2.loads(sock.recv(), tag_hook=decode_typed) for _ in range(6)]
        one = first.stop()
        shoot(range(5, 9))
        second = start_bridge("dectris", cache, *options)
        received += [cbor2.loads(sock.recv(), tag_hook=decode_typed) for _ in range(5)]
        out.send_opaque(series.end(), "application/cbor", nobody)
        out.end()
        received.append(cbor2.loads(sock.recv(), tag_hook=decode_typed))
        other = second.end()
    assert (one["served"], other["served"], one["repeated"], other["repeated"]) == (5, 4, {}, {})
    assert [message["type"] for message in received] == ["start", *["image"] * 5, "start", *["image"] * 4, "end"]
    assert received[0]["incident_energy"] == 9500.0
    assert received[6]["image_dtype"] == "uint16"
    assert (received[6]["series_id"], received[6]["image_size_x"]) == (7, 40)
    assert sorted(m["image_id"] for m in received if m["type"] == "image") == list(range(9))


def test_the_wrong_kind_of_socket_is_turned_away_and_the_right_one_served(start_cache, start_bridge):
    cache = start_cache(transport="tcp", delivery="ACKED")
    port = free_port()
    bridge = start_bridge("dectris", cache, "--listen", f"tcp://127.0.0.1:{port}")
    with pulling(zmq.REQ, connect=port), pulling(zmq.PULL, connect=port) as sock:
        sending = send(cache, 3, 1, [DETECTOR], images)
        kinds = [cbor2.loads(sock.recv(), tag_hook=decode_typed)["type"] for _ in range(5)]
        assert bridge.end()["served"] == 3
    sending.join(WAIT)
    assert kinds == ["start", "image", "image", "image", "end"]
