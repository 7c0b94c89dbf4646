"""ZeroMQ as pyzmq has it: its proxy in C, a forwarder of two threads in C, and ends that do not copy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import zmq

from bench.ends import Job, depth, payload
from bench.meter import Meter


def library() -> Path:
    """The libzmq that pyzmq has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.partition("/")[2]
        if "libzmq" in path:
            return Path("/" + path)
    raise FileNotFoundError("libzmq is not a library of its own here")


# mallopt(3): so that large messages come from memory that is used again, and not from the kernel each time.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MOST = -1, -3, 1 << 30
TUNED_MALLOC: Final = {"MALLOC_TRIM_THRESHOLD_": str(_MOST), "MALLOC_MMAP_THRESHOLD_": str(_MOST)}


def _tune_malloc() -> None:
    libc = ctypes.CDLL(None)
    for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        libc.mallopt(parameter, _MOST)


def _socket(context: zmq.Context[Any], kind: int, high: int) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = context.socket(kind)
    socket.set_hwm(high)
    return socket


def proxy(tell: Callable[[int, int], None], size: int) -> None:
    """`zmq.proxy`: C code that moves messages without copying them."""
    context = zmq.Context()
    source, sink = _socket(context, zmq.PULL, depth(size)), _socket(context, zmq.PUSH, depth(size))
    tell(source.bind_to_random_port("tcp://127.0.0.1"), sink.bind_to_random_port("tcp://127.0.0.1"))
    zmq.proxy(source, sink)


def push(job: Job) -> None:
    """The same memory again and again, not copied; pyzmq copies messages below 64 KiB because that is faster."""
    socket = _socket(zmq.Context(), zmq.PUSH, depth(job.size))
    socket.connect(f"tcp://127.0.0.1:{job.target.producer_port}")
    data = payload(job.size).data
    while True:
        socket.send(data, copy=False)


def pull(job: Job, meter: Meter) -> None:
    """Messages as the library received them, not copied."""
    socket = _socket(zmq.Context(), zmq.PULL, depth(job.size))
    socket.connect(f"tcp://127.0.0.1:{job.target.consumer_port}")
    counter = meter.counter(job.size)
    small = job.size < zmq.COPY_THRESHOLD
    while True:
        if small:
            socket.recv()
        else:
            socket.recv(copy=False)
        counter.add()


def push_tuned(job: Job) -> None:
    """As `push`, with malloc told not to give memory back."""
    _tune_malloc()
    push(job)


def pull_tuned(job: Job, meter: Meter) -> None:
    """As `pull`, with malloc told not to give memory back."""
    _tune_malloc()
    pull(job, meter)
