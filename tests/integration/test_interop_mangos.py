"""A Go program that knows only mangos, Protobuf and docs/frame.md exchanges streams with a cache."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.producer import Producer
from beamwire.stream.v1.frame_pb2 import StreamHeader

SOURCE = Path(__file__).resolve().parent.parent / "interop"
HEADER = StreamHeader(buffer="buffers/b0", producer_count=1)
FRAMES = 40
VALUES = 1000
TIMEOUT = 60.0
TRANSPORTS = pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("go") is None:
        pytest.skip("go is not installed, so the program with mangos cannot be built here")
    binary = tmp_path_factory.mktemp("interop") / "interop"
    built = subprocess.run(["go", "build", "-o", binary, "."], cwd=SOURCE, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return binary


@pytest.fixture
def start(binary) -> Iterator[Start]:
    """Start the program for a cache: `push` with its number of frames, or `pull`."""
    processes: list[subprocess.Popen[str]] = []

    def start(cache, *arguments: str) -> subprocess.Popen[str]:
        ((host, port),) = cache.connect.hosts
        role, *options = arguments
        url = f"{'tls+tcp' if cache.user else 'tcp'}://{'localhost' if cache.user else host}:{port}"
        credentials = [str(cache.user.directory)] if cache.user else []
        process = subprocess.Popen(
            [str(binary), role, url, *options, *credentials],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=TIMEOUT)


def lines(process: subprocess.Popen[str]) -> list[dict]:
    """What the program printed of each frame; it must have ended well."""
    out, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in out.splitlines()]


def finish(process: subprocess.Popen[str]) -> None:
    """Let a program that has sent everything go."""
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors


def check_lines(seen: list[dict]) -> None:
    kinds = [line["kind"].removeprefix("FRAME_KIND_") for line in seen]
    assert kinds == ["HEADER", *["DATA"] * FRAMES, "END"]
    data = seen[1:-1]
    assert [line["sequence"] for line in data] == list(range(1, FRAMES + 1))
    assert [line["events"] for line in data] == [[n] for n in range(1, FRAMES + 1)]
    assert [line["sum"] for line in data] == [n * VALUES for n in range(1, FRAMES + 1)]


@TRANSPORTS
@pytest.mark.parametrize("delivery", ["PUSH", "ACKED"])
def test_mangos_sends_to_our_consumer(start_cache, start, transport, delivery):
    cache = start_cache(transport=transport, delivery=delivery)
    sending = start(cache, "push", str(FRAMES))
    with Consumer(cache.connect, cache.user) as stream:
        seen = [(int(frame.event_ids[0]), int(frame.arrays["x"].sum())) for frame in stream]
    finish(sending)
    assert seen == [(n, n * VALUES) for n in range(1, FRAMES + 1)]
    status = cache.ended()
    assert (status.counters.delivered_event_count, status.counters.losses) == (FRAMES, {})


@TRANSPORTS
@pytest.mark.parametrize("delivery", ["PUSH", "ACKED"])
def test_our_producer_sends_to_mangos(start_cache, start, transport, delivery):
    cache = start_cache(transport=transport, delivery=delivery)
    receiving = start(cache, "pull")
    with Producer(cache.connect, cache.user, HEADER) as out:
        for n in range(1, FRAMES + 1):
            out.send({"x": np.full((1, VALUES), n, np.uint64)}, np.array([n], np.uint64))
    check_lines(lines(receiving))
    status = cache.ended()
    assert (status.counters.delivered_event_count, status.counters.losses) == (FRAMES, {})


@TRANSPORTS
def test_mangos_on_both_sides(start_cache, start, transport):
    cache = start_cache(transport=transport)
    sending = start(cache, "push", str(FRAMES))
    receiving = start(cache, "pull")
    check_lines(lines(receiving))
    finish(sending)
    assert cache.ended().counters.delivered_event_count == FRAMES


def test_mangos_is_not_let_in_without_a_certificate(start_cache, start, facility):
    cache = start_cache()
    cache.user = facility.foreign("user/alice")
    refused = start(cache, "pull")
    _, errors = refused.communicate(timeout=TIMEOUT)
    assert refused.returncode == 1
    assert errors
    assert cache.wait(lambda status: status.counters.refused_peer_count > 0).counters.consumers == ()
