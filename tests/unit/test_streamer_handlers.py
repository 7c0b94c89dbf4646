"""Several handlers at once, and plain sockets: nothing is lost without a count, nobody waits beyond the policy."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pynng
import pytest
import zmq

from beamwire.common.v1.account_pb2 import (
    END_CAUSE_CANCELLED,
    END_CAUSE_DONE,
    END_CAUSE_FAILED,
    LOSS_CAUSE_NOT_READ,
    LOSS_CAUSE_OVERFLOW,
    LOSS_CAUSE_VETOED,
)
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream import push_socket
from beamwire.mesh.stream.frame import decode
from beamwire.services.streamer.components import Message, Share, StreamInfo
from beamwire.services.streamer.handlers.lanes import Handlers, Pace
from beamwire.services.streamer.handlers.sockets import BinaryDataStreamingDataHandler
from beamwire.testing.ports import free_port

WAIT = 20.0
INFO = StreamInfo(Share(), (), 0, {}, "NativeSerializer")


@dataclass
class Taker:
    """A handler that goes through a gate with each message."""

    gate: threading.Semaphore | None = None
    broken: bool = False
    ids: list[int] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)
    skipped: dict[int, int] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    entered: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def open(self, info: StreamInfo) -> None:
        assert info is INFO

    def send(self, message: Message) -> None:
        self.entered.set()
        if self.gate is not None:
            assert self.gate.acquire(timeout=WAIT)
        if self.broken:
            raise BeamwireError(Reason.CACHE_FAILED, "the cache is gone")
        self.ids += message.event_ids.tolist()
        self.sums.append(int(np.asarray(message.arrays["image"]).sum()))

    def skip(self, cause: int, count: int = 1) -> None:
        self.skipped[cause] = self.skipped.get(cause, 0) + count

    def end(self, cause: int, detail: str = "") -> None:
        self.ends.append(cause)
        self.ended.set()


MEMORY = np.zeros((2, 50), np.uint16)


def message(number: int) -> Message:
    """Two events, in memory that is used again for each message."""
    MEMORY[:] = number
    return Message(np.array([2 * number, 2 * number + 1], np.uint64), {"image": MEMORY})


def made(*takers: tuple[Taker, Pace]) -> Handlers:
    handlers = Handlers([(taker, pace, f"handler {place}") for place, (taker, pace) in enumerate(takers)])
    handlers.open(INFO)
    return handlers


def test_a_single_handler_needs_no_thread():
    taker = Taker()
    before = set(threading.enumerate())
    handlers = made((taker, Pace()))
    handlers.send(message(1))
    assert (taker.ids, set(threading.enumerate()) - before) == ([2, 3], set())
    handlers.end(END_CAUSE_DONE)


def test_each_of_several_gets_everything_in_order_though_memory_is_used_again():
    takers = [Taker(), Taker(), Taker()]
    handlers = made(*((taker, Pace()) for taker in takers))
    for number in range(50):
        handlers.send(message(number))
    handlers.skip(LOSS_CAUSE_VETOED, 3)
    handlers.end(END_CAUSE_DONE)
    for taker in takers:
        assert taker.ids == list(range(100))
        assert taker.sums == [100 * number for number in range(50)]
        assert (taker.skipped, taker.ends) == ({LOSS_CAUSE_VETOED: 3}, [END_CAUSE_DONE])


def test_a_stuck_one_that_may_drop_holds_up_nobody_and_its_losses_are_counted():
    quick, stuck = Taker(), Taker(gate=threading.Semaphore(0))
    handlers = made((quick, Pace()), (stuck, Pace(when_slow="drop", patience=0.05)))
    for number in range(40):
        handlers.send(message(number))
    assert stuck.gate is not None
    for _ in range(40):
        stuck.gate.release()
    handlers.end(END_CAUSE_DONE)
    assert quick.ids == list(range(80))
    assert quick.skipped == {}
    lost = stuck.skipped[LOSS_CAUSE_OVERFLOW]
    assert 0 < lost == 80 - len(stuck.ids)
    assert handlers.dropped == {"handler 1": lost}
    assert stuck.ends == [END_CAUSE_DONE]


def test_what_belongs_to_the_whole_stream_is_never_dropped():
    stuck = Taker(gate=threading.Semaphore(0))
    handlers = made((Taker(), Pace()), (stuck, Pace(when_slow="drop", patience=0.0)))
    for number in range(20):
        handlers.send(message(number))
    handlers.send(Message(np.empty(0, np.uint64), {"image": np.full(1, 77)}))
    assert stuck.gate is not None
    stuck.gate.release(20)
    handlers.end(END_CAUSE_DONE)
    assert stuck.sums[-1] == 77


def test_one_that_is_waited_for_makes_the_others_wait_and_loses_nothing():
    quick, slow = Taker(), Taker(gate=threading.Semaphore(0))
    handlers = made((quick, Pace()), (slow, Pace()))

    def send_all() -> None:
        for number in range(20):
            handlers.send(message(number))
        handlers.end(END_CAUSE_DONE)

    sender = threading.Thread(target=send_all)
    sender.start()
    assert slow.gate is not None
    assert len(quick.ids) < 40
    for _ in range(20):
        slow.gate.release()
    sender.join(WAIT)
    assert quick.ids == slow.ids == list(range(40))


def test_one_that_must_not_be_slow_ends_the_run():
    stuck = Taker(gate=threading.Semaphore(0))
    handlers = made((Taker(), Pace()), (stuck, Pace(when_slow="fail", patience=0.05)))
    with pytest.raises(BeamwireError, match="handler 1 took nothing") as caught:
        for number in range(20):
            handlers.send(message(number))
    assert caught.value.reason is Reason.TIMED_OUT
    assert stuck.gate is not None
    stuck.gate.release(20)
    handlers.end(END_CAUSE_FAILED, "it is slow")
    assert stuck.ends == [END_CAUSE_FAILED]


def test_what_goes_wrong_in_a_lane_is_raised_and_the_others_are_ended():
    good, broken = Taker(), Taker(broken=True)
    handlers = made((good, Pace()), (broken, Pace()))
    with pytest.raises(BeamwireError, match="the cache is gone"):
        for number in range(1000):
            handlers.send(message(number))
    with pytest.raises(BeamwireError, match="the cache is gone"):
        handlers.end(END_CAUSE_FAILED, "")
    assert good.ends == [END_CAUSE_FAILED]


def test_a_bad_end_accounts_for_what_was_not_sent_any_more():
    """What waits in a lane, and what was skipped behind it, is in the END of that lane."""
    quick, slow = Taker(), Taker(gate=threading.Semaphore(0))
    handlers = made((quick, Pace()), (slow, Pace(when_slow="drop", patience=0.01)))
    for number in range(10):
        handlers.send(message(number))
    handlers.skip(LOSS_CAUSE_VETOED, 3)
    handlers.skip(LOSS_CAUSE_NOT_READ, 7)
    assert slow.gate is not None
    slow.gate.release()
    handlers.end(END_CAUSE_CANCELLED, "stopped")
    assert len(slow.ids) < 20
    for taker in (quick, slow):
        assert taker.skipped[LOSS_CAUSE_VETOED] == 3
        assert len(taker.ids) + sum(taker.skipped.values()) == 20 + 3 + 7


def test_one_that_has_failed_keeps_no_other_from_the_account():
    broken, good = Taker(broken=True), Taker()
    handlers = made((broken, Pace()), (good, Pace()))
    with pytest.raises(BeamwireError, match="the cache is gone"):
        for number in range(1000):
            handlers.send(message(number))
    handlers.skip(LOSS_CAUSE_NOT_READ, 5)
    with pytest.raises(BeamwireError, match="the cache is gone"):
        handlers.end(END_CAUSE_FAILED, "")
    assert good.skipped[LOSS_CAUSE_NOT_READ] >= 5


def test_stuck_ones_are_told_of_a_bad_end_together_and_keep_no_other_from_it():
    gates = [threading.Semaphore(0) for _ in range(3)]
    stuck = [Taker(gate=gate) for gate in gates]
    good = Taker()
    handlers = made(*((taker, Pace()) for taker in stuck), (good, Pace()))
    handlers.send(message(1))
    assert all(taker.entered.wait(WAIT) for taker in stuck)
    begin = time.monotonic()
    with pytest.raises(BeamwireError, match="handler 0 took nothing"):
        handlers.end(END_CAUSE_CANCELLED, "stopped")
    # The process is gone 1.5 s after a signal, whatever happens.
    assert time.monotonic() - begin < 1.4
    assert good.ends == [END_CAUSE_CANCELLED]
    for gate in gates:
        gate.release(2)
    assert all(taker.ended.wait(WAIT) for taker in stuck)


def test_a_lane_that_is_stuck_for_long_keeps_no_list_of_what_it_lost():
    stuck = Taker(gate=threading.Semaphore(0))
    handlers = made((Taker(), Pace()), (stuck, Pace(when_slow="drop", patience=0)))
    for number in range(2000):
        handlers.send(message(number))
        handlers.skip(LOSS_CAUSE_VETOED, 1)
    lane = handlers._lanes[1]
    assert len(lane._acts) < 20
    assert stuck.gate is not None
    stuck.gate.release(10)
    handlers.end(END_CAUSE_DONE)
    assert stuck.skipped[LOSS_CAUSE_VETOED] == 2000
    assert len(stuck.ids) + stuck.skipped[LOSS_CAUSE_OVERFLOW] == 4000


# Plain sockets.


def handler(**parameters: Any) -> BinaryDataStreamingDataHandler:
    parameters.setdefault("timeout", 10.0)
    return BinaryDataStreamingDataHandler(
        BinaryDataStreamingDataHandler.Parameters(**parameters), lambda: pytest.fail("plain sockets have no identity")
    )


def blob(number: int) -> Message:
    return Message(
        np.array([number], np.uint64), data=b"%06d" % number + bytes(100_000), media_type="x/y", suffix="bin"
    )


def test_zeromq_gets_everything_also_what_it_has_not_read_at_the_end():
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        pull.set(zmq.RCVTIMEO, 10_000)
        port = pull.bind_to_random_port("tcp://127.0.0.1")
        sends = handler(urls=[f"tcp://127.0.0.1:{port}"])
        sends.open(INFO)
        got: list[int] = []

        def read() -> None:
            got.extend(int(pull.recv()[:6]) for _ in range(200))

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(200):
            sends.send(blob(number))
        sends.end(END_CAUSE_DONE)
        reader.join(WAIT)
    assert got == list(range(200))


def test_zeromq_as_a_server_sends_native_frames():
    port = free_port()
    sends = handler(urls=[f"tcp://127.0.0.1:{port}"], role="server")
    sends.open(INFO)
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        pull.set(zmq.RCVTIMEO, 10_000)
        pull.connect(f"tcp://127.0.0.1:{port}")
        sends.send(message(3))
        frame = decode(memoryview(pull.recv()))
        sends.end(END_CAUSE_DONE)
    assert frame.header.event_ids == [6, 7]
    assert np.array_equal(frame.arrays["image"], np.full((2, 50), 3, np.uint16))


@pytest.mark.parametrize("library", ["zmq", "nng"])
def test_nobody_there_is_an_error_and_not_a_silence(library):
    sends = handler(urls=[f"tcp://127.0.0.1:{free_port()}"], library=library, timeout=0.3)
    sends.open(INFO)
    with pytest.raises(BeamwireError, match="nobody took a message at tcp://") as caught:
        sends.send(blob(1))
    assert caught.value.reason is Reason.TIMED_OUT
    sends.end(END_CAUSE_FAILED, "")


@pytest.mark.parametrize("library", ["zmq", "nng"])
def test_a_port_that_is_taken_is_named(library):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(BeamwireError, match=url):
            handler(urls=[url], role="server", library=library).open(INFO)


def test_nng_listens_for_pynng_and_drains():
    port = free_port()
    sends = handler(urls=[f"tcp://127.0.0.1:{port}"], role="server", library="nng")
    sends.open(INFO)

    def send_all() -> None:
        for number in range(100):
            sends.send(blob(number))
        sends.end(END_CAUSE_DONE)

    sender = threading.Thread(target=send_all)
    sender.start()
    with pynng.Pull0(dial=f"tcp://127.0.0.1:{port}", recv_timeout=10_000) as pull:
        got = [int(pull.recv()[:6]) for _ in range(100)]
    sender.join(WAIT)
    assert (got, sender.is_alive()) == (list(range(100)), False)


def test_nng_dials_pynng_and_shares_between_two(monkeypatch: pytest.MonkeyPatch):
    # A listener of a busy machine may greet late.
    monkeypatch.setattr(push_socket, "_GRACE", 4.0)
    with (
        pynng.Pull0(listen="tcp://127.0.0.1:0", recv_timeout=10_000) as first,
        pynng.Pull0(listen="tcp://127.0.0.1:0", recv_timeout=10_000) as second,
    ):
        urls = [f"tcp://{pull.listeners[0].local_address}" for pull in (first, second)]
        sends = handler(urls=urls, library="nng")
        sends.open(INFO)
        for number in range(10):
            sends.send(blob(number))
        got = sorted(int(pull.recv()[:6]) for pull in (first, second) for _ in range(5))
        sends.end(END_CAUSE_DONE)
    assert got == list(range(10))


def test_with_distribute_each_rank_has_a_url_of_its_own():
    with zmq.Context() as context, context.socket(zmq.PULL) as zero, context.socket(zmq.PULL) as one:
        urls = [f"tcp://127.0.0.1:{pull.bind_to_random_port('tcp://127.0.0.1')}" for pull in (zero, one)]
        for pull in (zero, one):
            pull.set(zmq.RCVTIMEO, 10_000)
        for rank in range(2):
            sends = handler(urls=urls, distribute=True)
            sends.open(StreamInfo(Share(rank, 2), (), 0, {}, ""))
            sends.send(blob(rank))
            sends.end(END_CAUSE_DONE)
        assert [int(pull.recv()[:6]) for pull in (zero, one)] == [0, 1]


@pytest.mark.parametrize("url", ["http://host:1", "tcp://host", "host:5555", "tcp://host:port"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="no address of a socket"):
        handler(urls=[url])


@pytest.mark.parametrize("said", [b"", b"\0SP\0", b"GET / HTTP/1.1\r\n\r\n"])
def test_strangers_hold_up_nobody(said):
    port = free_port()
    sends = handler(urls=[f"tcp://127.0.0.1:{port}"], role="server", library="nng")
    sends.open(INFO)
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    for stranger in strangers:
        stranger.sendall(said)
    # It is greeted when something is sent.
    with pynng.Pull0(recv_timeout=10_000) as pull:
        pull.dial(f"tcp://127.0.0.1:{port}", block=False)
        begin = time.monotonic()
        for number in range(20):
            sends.send(blob(number))
            assert int(pull.recv()[:6]) == number
        assert time.monotonic() - begin < 3
    sends.end(END_CAUSE_FAILED, "")
    for stranger in strangers:
        stranger.close()


def test_a_place_that_never_answers_holds_up_nobody():
    """It takes the connection and says nothing."""
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pynng.Pull0(listen="tcp://127.0.0.1:0", recv_timeout=10_000) as pull,
    ):
        urls = [f"tcp://127.0.0.1:{silent.getsockname()[1]}", f"tcp://{pull.listeners[0].local_address}"]
        sends = handler(urls=urls, library="nng")
        sends.open(INFO)
        begin = time.monotonic()
        for number in range(20):
            sends.send(blob(number))
            assert int(pull.recv()[:6]) == number
        assert time.monotonic() - begin < 3
        sends.end(END_CAUSE_FAILED, "")


@pytest.mark.parametrize("library", ["zmq", "nng"])
def test_a_consumer_that_dies_and_another_that_comes_lose_no_more_than_the_first_had(library):
    port = free_port()
    sends = handler(urls=[f"tcp://127.0.0.1:{port}"], library=library, buffer=2)
    sends.open(INFO)
    code = (
        "import pynng; pull = pynng.Pull0(listen='tcp://127.0.0.1:{0}', recv_buffer_size=1)"
        if library == "nng"
        else "import zmq; pull = zmq.Context().socket(zmq.PULL); pull.rcvhwm = 1; pull.bind('tcp://127.0.0.1:{0}')"
    )
    # Slow enough to be stopped before it has taken all.
    code += "\nimport time\nwhile True: print(int(pull.recv()[:6]), flush=True); time.sleep(0.002)"
    first = subprocess.Popen([sys.executable, "-c", code.format(port)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    got = []

    def send_all() -> None:
        for number in range(300):
            sends.send(blob(number))
        sends.end(END_CAUSE_DONE)

    sender = threading.Thread(target=send_all)
    sender.start()
    got += [int(first.stdout.readline()) for _ in range(50)]
    first.send_signal(signal.SIGSTOP)
    # It has taken all that it can.
    sender.join(0.5)
    assert sender.is_alive()
    first.kill()
    got += [int(line) for line in first.stdout]
    first.communicate()
    second = subprocess.Popen([sys.executable, "-c", code.format(port)], stdout=subprocess.PIPE, text=True)
    assert second.stdout is not None
    sender.join(WAIT)
    assert not sender.is_alive()
    while not got or got[-1] != 299:
        got.append(int(second.stdout.readline()))
    second.kill()
    second.communicate()
    # What lay in the sockets of the one that died is gone, and nothing else.
    missing = sorted(set(range(300)) - set(got))
    assert missing == list(range(missing[0], missing[-1] + 1)) if missing else True
    assert len(got) == len(set(got))
    assert len(missing) < 150
