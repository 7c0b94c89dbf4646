"""Traces across processes, and to a real collector, alive and dead."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from beamwire.mesh import telemetry
from beamwire.mesh.telemetry import read_spans, setup, span

CHILD = """
import os, sys
from pathlib import Path
from beamwire.mesh import telemetry
current = telemetry.setup("child", trace_dir=Path(sys.argv[1]))
with telemetry.span(telemetry.SPAN_STREAMER_RUN, parent=os.environ["TRACEPARENT"]):
    pass
{end}
"""


def child(trace_dir: Path, end: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "TRACEPARENT": telemetry.current_traceparent()}
    return subprocess.run([sys.executable, "-c", CHILD.format(end=end), str(trace_dir)], env=environment, check=False)


def test_one_trace_through_two_processes(tmp_path: Path) -> None:
    current = setup("parent", trace_dir=tmp_path)
    with span(telemetry.SPAN_JOB_RUN):
        assert child(tmp_path, "current.shutdown()").returncode == 0
    current.shutdown()
    job, streamer = read_spans(tmp_path)
    assert (job["service"], streamer["service"]) == ("parent", "child")
    assert streamer["trace_id"] == job["trace_id"]
    assert streamer["parent_span_id"] == job["span_id"]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_was_flushed_survives_a_kill(tmp_path: Path) -> None:
    current = setup("parent", trace_dir=tmp_path)
    with span(telemetry.SPAN_JOB_RUN):
        killed = child(tmp_path, "current.flush(); os.kill(os.getpid(), 9)")
    current.shutdown()
    assert killed.returncode == -signal.SIGKILL
    assert {found["service"] for found in read_spans(tmp_path)} == {"parent", "child"}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """The receiving end of OTLP."""

    def __init__(self) -> None:
        self.received: list[trace_service_pb2.ExportTraceServiceRequest] = []

    def Export(  # noqa: N802
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.received.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, int]]:
    servicer = Collector()
    with futures.ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield servicer, port
        server.stop(None).wait()


def test_a_collector_receives_the_spans(collector: tuple[Collector, int], tmp_path: Path) -> None:
    servicer, port = collector
    current = setup("unit", trace_dir=tmp_path, otlp_endpoint=f"http://127.0.0.1:{port}", trust_domain="x.org")
    with span(telemetry.SPAN_JOB_RUN, attributes={telemetry.ATTR_JOB: "jobs/a"}):
        pass
    current.shutdown()
    (request,) = servicer.received
    resource = {one.key: one.value.string_value for one in request.resource_spans[0].resource.attributes}
    assert resource == {"service.name": "unit", "beamwire.trust_domain": "x.org"}
    assert request.resource_spans[0].scope_spans[0].spans[0].name == "beamwire.job.run"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", ["flush", "shutdown"])
def test_a_dead_collector_costs_nothing(end: str) -> None:
    current = setup("unit", trace_dir=None, otlp_endpoint="http://127.0.0.1:1")
    began = time.monotonic()
    for _ in range(20_000):
        with span("x"):
            pass
    assert time.monotonic() - began < 10
    began = time.monotonic()
    getattr(current, end)()
    assert time.monotonic() - began < 15
    current.shutdown()
