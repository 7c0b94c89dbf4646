"""Traces and logs: their names, the W3C context that joins processes, and where spans go.

Spans go to a collector if there is one, else to bounded JSON-lines files that `read_spans` reads. Every name here is a
row of docs/telemetry.md.
"""

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Link, Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from beamwire.mesh.errors import BeamwireError, Reason

SPAN_CLIENT_TRANSFER: Final = "beamwire.client.transfer"
SPAN_RPC_SERVER: Final = "beamwire.rpc.server"
SPAN_TRANSFER_RUN: Final = "beamwire.transfer.run"
SPAN_JOB_RUN: Final = "beamwire.job.run"
SPAN_STREAMER_RUN: Final = "beamwire.streamer.run"
SPAN_FRAME_SEND: Final = "beamwire.frame.send"
SPAN_CACHE_RUN: Final = "beamwire.cache.run"
SPAN_CACHE_RELAY: Final = "beamwire.cache.relay"
SPAN_FRAME_RECEIVE: Final = "beamwire.frame.receive"

ATTR_SERVICE: Final = "service.name"
ATTR_TRUST_DOMAIN: Final = "beamwire.trust_domain"
ATTR_CALLER: Final = "beamwire.caller"
ATTR_TRANSFER: Final = "beamwire.transfer"
ATTR_JOB: Final = "beamwire.job"
ATTR_BUFFER: Final = "beamwire.buffer"
ATTR_EPOCH: Final = "beamwire.epoch"
ATTR_PRODUCER: Final = "beamwire.producer"
ATTR_CONSUMER: Final = "beamwire.consumer"
ATTR_SEQUENCE: Final = "beamwire.sequence"
ATTR_EVENTS: Final = "beamwire.events"
ATTR_REASON: Final = "beamwire.reason"
ATTR_FOUND: Final = "beamwire.found"
ATTR_RPC_METHOD: Final = "rpc.method"

LOG_TIME: Final = "time"
LOG_LEVEL: Final = "level"
LOG_SERVICE: Final = "service"
LOG_LOGGER: Final = "logger"
LOG_MESSAGE: Final = "message"
LOG_TRACE_ID: Final = "trace_id"
LOG_SPAN_ID: Final = "span_id"
LOG_ERROR: Final = "error"

FRAME_SAMPLE_PERIOD: Final = 64
"""One frame in so many is traced, besides the first."""
EXPORT_TIMEOUT: Final = 2
"""Seconds after which one export to a collector is given up."""
MAX_FILE_BYTES: Final = 8 * 2**20
"""Size at which a process's span file becomes its `.1`, in place of the one before."""
MAX_FILES: Final = 256
"""Span files kept in a directory; the oldest are removed when a process begins to write there."""

_PREFIX: Final = "beamwire."
_TRACEPARENT: Final = "traceparent"
_propagator = TraceContextTextMapPropagator()
_current: "Telemetry | None" = None


class Telemetry:
    """The tracing of this process, current until `shutdown`."""

    def __init__(self, provider: TracerProvider, exporter: SpanExporter | None) -> None:
        self.provider = provider
        self.tracer = provider.get_tracer("beamwire")
        self._bounded = None if exporter is None else _BoundedExporter(exporter)
        if self._bounded is not None:
            provider.add_span_processor(
                BatchSpanProcessor(
                    self._bounded, max_queue_size=4096, schedule_delay_millis=500, max_export_batch_size=512
                )
            )

    def flush(self) -> None:
        """Writes out what has ended; a collector that does not answer is given up after about 4 s."""
        with self._limited():
            self.provider.force_flush()

    def shutdown(self) -> None:
        """Writes out what has ended, as `flush` does, and stops; another `setup` may follow."""
        global _current
        if _current is self:
            _current = None
        with self._limited():
            self.provider.shutdown()

    @contextmanager
    def _limited(self) -> Iterator[None]:
        if self._bounded is not None:
            self._bounded.deadline = time.monotonic() + EXPORT_TIMEOUT
        yield
        if self._bounded is not None:
            self._bounded.deadline = float("inf")


class _BoundedExporter(SpanExporter):
    """Drops what comes after a deadline: the SDK would try each batch of a full queue to the end, one by one."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self.deadline = float("inf")

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if time.monotonic() > self.deadline:
            return SpanExportResult.FAILURE
        return self._exporter.export(spans)

    def shutdown(self) -> None:
        self._exporter.shutdown()


def setup(service: str, *, trace_dir: Path | None, otlp_endpoint: str = "", trust_domain: str = "") -> Telemetry:
    """Begins the tracing of this process, as `service`.

    Spans go to the collector at `otlp_endpoint` (`http://host:4317`), else to files in `trace_dir`, else nowhere; trace
    ids are passed on in any case. ILLEGAL_STATE if it was begun already, UNSUPPORTED if a collector is named and the
    extra `beamwire[otlp]` is not installed.
    """
    global _current
    if _current is not None:
        raise BeamwireError(Reason.ILLEGAL_STATE, "telemetry is set up already; call its shutdown() first")
    attributes = {ATTR_SERVICE: service, **({ATTR_TRUST_DOMAIN: trust_domain} if trust_domain else {})}
    exporter: SpanExporter | None = None
    if otlp_endpoint:
        exporter = _otlp_exporter(otlp_endpoint)
    elif trace_dir is not None:
        exporter = LocalSpanExporter(trace_dir, service)
    provider = TracerProvider(resource=Resource(attributes), shutdown_on_exit=False)
    _current = Telemetry(provider, exporter)
    return _current


@contextmanager
def span(
    name: str,
    *,
    parent: str | Context | None = None,
    attributes: Mapping[str, AttributeValue] | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    links: Sequence[str] = (),
    begun: int | None = None,
) -> Iterator[Span]:
    """A span around the block, current in it, ended with an error status if the block raises.

    `parent` is a traceparent or a context; default: the current span. `links` are traceparents. `begun` is when it
    began, in nanoseconds since the Unix epoch, if not now. Without `setup`, the parent's context is passed on and
    nothing is recorded.
    """
    context = context_from(parent) if isinstance(parent, str) else parent
    linked = [Link(trace.get_current_span(context_from(link)).get_span_context()) for link in links]
    tracer: trace.Tracer = trace.NoOpTracer() if _current is None else _current.tracer
    with tracer.start_as_current_span(name, context, kind, attributes, linked, begun) as current:
        yield current


def inject() -> dict[str, str]:
    """{"traceparent": …} of the current span, for metadata and environments; empty if there is none."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return {key: value for key, value in carrier.items() if key == _TRACEPARENT}


def context_from(traceparent: str) -> Context:
    """The context whose current span is the one that `traceparent` names; an empty one if it names none."""
    return _propagator.extract({_TRACEPARENT: traceparent}, Context())


def current_traceparent() -> str:
    """The traceparent of the current span, or ""."""
    return inject().get(_TRACEPARENT, "")


def trace_id_of(traceparent: str) -> str:
    """The trace id, 32 hexadecimal digits; "" if `traceparent` is none."""
    context = trace.get_current_span(context_from(traceparent)).get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def frame_sampled(sequence: int) -> bool:
    """Whether the frame of this sequence number is traced; every stage decides alike."""
    return sequence == 1 or sequence % FRAME_SAMPLE_PERIOD == 0


class LocalSpanExporter(SpanExporter):
    """Appends spans to `<service>.<pid>.jsonl`, at most twice MAX_FILE_BYTES for a process."""

    def __init__(self, directory: Path, service: str, *, max_bytes: int = MAX_FILE_BYTES) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory = directory
        self._service = service
        self._max_bytes = max_bytes
        for old in sorted(_span_files(directory), key=_modified)[:-MAX_FILES]:
            old.unlink(missing_ok=True)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Appends one line for each span."""
        lines = "".join(json.dumps(_span_document(span), separators=(",", ":")) + "\n" for span in spans)
        path = self._directory / f"{self._service}.{os.getpid()}.jsonl"
        with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), "w", encoding="utf-8") as file:
            file.write(lines)
            size = file.tell()
        if size > self._max_bytes:
            path.replace(path.with_name(f"{path.name}.1"))
        return SpanExportResult.SUCCESS


def read_spans(trace_dir: Path) -> list[dict[str, Any]]:
    """Every span in the directory, by start time.

    Each has name, trace_id, span_id, parent_span_id ("" for a root), service, start_ns, end_ns (since the Unix epoch),
    attributes, status (UNSET, OK or ERROR), status_message and links ([{trace_id, span_id}]).
    """
    spans = []
    for path in _span_files(trace_dir):
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:  # rotated or removed since it was listed
            continue
        # A line without its end is still being written, or its writer was killed.
        spans += [json.loads(line) for line in lines if line.endswith("\n")]
    return sorted(spans, key=lambda span: int(span["start_ns"]))


def setup_logging(service: str, *, level: int = logging.INFO) -> None:
    """Logs to standard error: short lines on a terminal, else one JSON object for each, with the trace's ids.

    An `extra` whose key begins with `beamwire.` (an ATTR_ constant) becomes a field. Replaces earlier handlers.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_TerminalFormatter() if sys.stderr.isatty() else _JsonFormatter(service))
    logging.basicConfig(level=level, handlers=[handler], force=True)


class _JsonFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            LOG_TIME: datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            LOG_LEVEL: record.levelname,
            LOG_SERVICE: self._service,
            LOG_LOGGER: record.name,
            LOG_MESSAGE: record.getMessage(),
        }
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            fields[LOG_TRACE_ID] = trace.format_trace_id(context.trace_id)
            fields[LOG_SPAN_ID] = trace.format_span_id(context.span_id)
        fields |= {key: value for key, value in record.__dict__.items() if key.startswith(_PREFIX)}
        if record.exc_info and record.exc_info[0] is not None:
            fields[LOG_ERROR] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(fields, default=str)


class _TerminalFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S")


def _otlp_exporter(endpoint: str) -> SpanExporter:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise BeamwireError(
            Reason.UNSUPPORTED, f"sending traces to {endpoint} needs an extra: pip install 'beamwire[otlp]'"
        ) from None
    return OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=EXPORT_TIMEOUT)


def _span_files(directory: Path) -> list[Path]:
    return [*directory.glob("*.jsonl"), *directory.glob("*.jsonl.1")]


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _span_document(span: ReadableSpan) -> dict[str, Any]:
    context = span.get_span_context()
    assert context is not None
    return {
        "name": span.name,
        "trace_id": trace.format_trace_id(context.trace_id),
        "span_id": trace.format_span_id(context.span_id),
        "parent_span_id": trace.format_span_id(span.parent.span_id) if span.parent else "",
        "service": span.resource.attributes[ATTR_SERVICE],
        "start_ns": span.start_time,
        "end_ns": span.end_time,
        "attributes": dict(span.attributes or {}),
        "status": span.status.status_code.name,
        "status_message": span.status.description or "",
        "links": [
            {
                "trace_id": trace.format_trace_id(link.context.trace_id),
                "span_id": trace.format_span_id(link.context.span_id),
            }
            for link in span.links
        ],
    }
