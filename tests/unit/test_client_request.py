"""Requests: LCLStreamer's YAML and plain mappings become the Transfer that the service takes, or all their faults."""

from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from beamwire.buffer.v1.buffer_service_pb2 import DELIVERY_PUSH, OVERFLOW_POLICY_BLOCK, TRANSPORT_TCP
from beamwire.client.request import parse_request
from beamwire.client.source import parse_source
from beamwire.client.values import parse_seconds
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.connect import ConnectString
from beamwire.request.v1.request_service_pb2 import Component, StreamConfig, Transfer

LCLSTREAMER = """\
source_identifier: exp=mfx100903824,run=27
skip_incomplete_events: true
max_events: 100
event_source:
  type: Psana2EventSource
data_sources:
  timestamp:
    type: Psana2Timestamp
  detector_data:
    type: Psana2DetectorInterface
    psana_name: jungfrau
    psana_fields: [calib, raw]
processing_pipeline:
  type: PeaknetPreprocessingPipeline
  batch_size: 16
  add_channel_dim: true
data_serializer:
  type: HDF5BinarySerializer
  compression: null
  fields:
    detector_data: /data/data
data_handlers:
  - type: BinaryFileWritingDataHandler
    file_prefix: run27_
    file_suffix: hdf5
    write_directory: workspace/output
  - type: BinaryDataStreamingDataHandler
    urls: ["tcp://127.0.0.1:12321"]
    role: client
"""
MINIMAL = {"event_source": {"type": "InternalEventSource"}, "data_sources": {"x": {"type": "IntValue", "value": 3}}}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "request.yaml"
    path.write_text(text)
    return path


def plain(component: Component) -> dict[str, Any]:
    return MessageToDict(component.parameters)


def problems(request: object) -> dict[str, str]:
    with pytest.raises(BeamwireError) as caught:
        parse_request(request)  # type: ignore[arg-type]
    assert caught.value.reason is Reason.INVALID_FIELD
    return {violation.field: violation.description for violation in caught.value.violations}


def test_a_file_of_lclstreamer_becomes_a_transfer(tmp_path: Path) -> None:
    parsed = parse_request(write(tmp_path, LCLSTREAMER))
    config = parsed.transfer.config
    assert config.source_identifier == "exp=mfx100903824,run=27"
    assert config.skip_incomplete_events
    assert config.max_event_count == 100
    assert config.event_source == Component(type="Psana2EventSource")
    assert set(config.data_sources) == {"timestamp", "detector_data"}
    assert plain(config.data_sources["detector_data"])["psana_fields"] == ["calib", "raw"]
    (stage,) = config.processing_pipeline
    assert stage.type == "PeaknetPreprocessingPipeline"
    assert stage.parameters["batch_size"] == 16
    assert stage.parameters["add_channel_dim"] is True
    serializer = plain(config.data_serializer)
    assert serializer["compression"] is None
    assert serializer["fields"]["detector_data"] == "/data/data"


def test_the_file_handler_says_where_get_writes_and_the_streaming_handler_is_us(tmp_path: Path) -> None:
    output = parse_request(write(tmp_path, LCLSTREAMER)).output
    assert output.directory == Path("workspace/output")
    assert (output.prefix, output.suffix) == ("run27_", "hdf5")


def test_our_own_keys() -> None:
    request = MINIMAL | {
        "processes": 4,
        "lease": "2h",
        "labels": {"sample": "lysozyme", "run": 27, "good": True},
        "buffer": {
            "capacity_bytes": 2**30,
            "capacity_frames": 64,
            "delivery": "push",
            "overflow_policy": "block",
            "transport": "tcp",
            "consumers": ["spiffe://facility.test/user/bob"],
        },
    }
    transfer = parse_request(request).transfer
    assert transfer.process_count == 4
    assert transfer.lease.seconds == 7200
    assert dict(transfer.labels) == {"sample": "lysozyme", "run": "27", "good": "true"}
    spec = transfer.buffer_spec
    assert (spec.capacity_bytes, spec.capacity_frames) == (2**30, 64)
    assert (spec.delivery, spec.overflow_policy, spec.transport) == (
        DELIVERY_PUSH,
        OVERFLOW_POLICY_BLOCK,
        TRANSPORT_TCP,
    )
    assert list(spec.consumers) == ["spiffe://facility.test/user/bob"]


def test_what_is_not_given_is_not_set() -> None:
    transfer = parse_request(MINIMAL).transfer
    assert not transfer.HasField("buffer_spec")
    assert not transfer.HasField("lease")
    assert not transfer.config.HasField("data_serializer")
    assert transfer.process_count == 0
    assert not transfer.config.processing_pipeline


def test_a_pipeline_may_be_a_list_of_stages() -> None:
    stages = [{"type": "Crop", "height": 10}, {"type": "BatchProcessingPipeline", "batch_size": 2}]
    config = parse_request(MINIMAL | {"processing_pipeline": stages}).transfer.config
    assert [stage.type for stage in config.processing_pipeline] == ["Crop", "BatchProcessingPipeline"]


def test_a_transfer_is_taken_as_it_is_and_copied() -> None:
    transfer = Transfer(config=StreamConfig(source_identifier="x"))
    parsed = parse_request(transfer).transfer
    assert parsed == transfer
    parsed.config.source_identifier = "y"
    assert transfer.config.source_identifier == "x"


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"even_source": 1}, "even_source", "did you mean 'event_source'?"),
        ({"zzzz": 1}, "zzzz", "known keys: buffer, consumer_jobs, contract, data_handlers"),
        ({"lclstreamer": {}}, "lclstreamer", "older layout"),
        ({"event_source": None}, "event_source", "is missing"),
        ({"event_source": "Psana2EventSource"}, "event_source", "mapping with a `type`, not text"),
        ({"event_source": {"path": "x"}}, "event_source.type", "is missing"),
        ({"data_sources": {}}, "data_sources", "at least one"),
        ({"data_sources": {"x": 3}}, "data_sources.x", "not a number"),
        ({"processing_pipeline": [{"type": "A"}, 3]}, "processing_pipeline[1]", "mapping"),
        ({"data_serializer": {"type": 3}}, "data_serializer.type", "is missing"),
        ({"source_identifier": 3}, "source_identifier", "must be text"),
        ({"skip_incomplete_events": "yes"}, "skip_incomplete_events", "true or false"),
        ({"max_events": -1}, "max_events", "whole number from 0"),
        ({"max_events": True}, "max_events", "whole number"),
        ({"max_events": 2**63}, "max_events", "whole number"),
        ({"processes": 0}, "processes", "whole number from 1"),
        ({"processes": 2.5}, "processes", "whole number"),
        ({"lease": "soon"}, "lease", "90s, 30m, 2h"),
        ({"lease": -5}, "lease", "seconds"),
        ({"labels": ["a"]}, "labels", "mapping"),
        ({"labels": {"a": [1]}}, "labels.a", "must be a word"),
        ({"buffer": 7}, "buffer", "mapping"),
        ({"buffer": {"capacity": 7}}, "buffer.capacity", "unknown key"),
        ({"buffer": {"capacity_bytes": "256MB"}}, "buffer.capacity_bytes", "whole number"),
        ({"buffer": {"delivery": "pull"}}, "buffer.delivery", "one of push, acked"),
        ({"buffer": {"delivery": ["push"]}}, "buffer.delivery", "one of push, acked"),
        ({"buffer": {"consumers": "bob"}}, "buffer.consumers", "list of SPIFFE ids"),
        ({"buffer": {"groups": "training"}}, "buffer.groups", "list of names"),
        ({"buffer": {"frame_lease": "soon"}}, "buffer.frame_lease", "must be seconds"),
        ({"buffer": {"shard_count": 0}}, "buffer.shard_count", "whole number"),
        ({"buffer": {"retain_bytes": -1}}, "buffer.retain_bytes", "whole number"),
        ({"data_handlers": [{"type": "ZmqHandler"}]}, "data_handlers[0].type", "cannot be honoured"),
        ({"data_handlers": ["x"]}, "data_handlers[0].type", "cannot be honoured"),
        (
            {"data_handlers": [{"type": "BinaryFileWritingDataHandler", "directory": "x"}]},
            "data_handlers[0].directory",
            "did you mean 'write_directory'?",
        ),
        (
            {"data_handlers": [{"type": "BinaryFileWritingDataHandler", "file_prefix": "../x"}]},
            "data_handlers[0].file_prefix",
            "must not contain",
        ),
        ({"event_source": {"type": "A", "n": float("nan")}}, "event_source.n", "must be a number"),
        ({"event_source": {"type": "A", "n": [{"b": {1, 2}}]}}, "event_source.n[0].b", "not a set"),
        ({"event_source": {"type": "A", "id": 2**53 + 1}}, "event_source.id", "too large"),
    ],
)
def test_each_fault_names_its_key(changes: dict[str, object], field: str, words: str) -> None:
    found = problems(MINIMAL | changes)
    assert set(found) == {field}
    assert words in found[field]


def test_all_faults_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "even_source:\n  type: A\nevent_source:\n  type: A\n  n: .nan\n"
        "data_sources:\n  x:\n    value: 3\nlease: soon\n",
    )
    found = problems(path)
    assert set(found) == {"even_source", "event_source.n", "data_sources.x.type", "lease"}
    assert found["even_source"].startswith(f"{path}:1: ")
    assert found["event_source.n"].startswith(f"{path}:5: ")
    assert found["data_sources.x.type"].startswith(f"{path}:7: "), "a missing key is looked for where it belongs"
    assert found["lease"].startswith(f"{path}:9: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\n", "is not valid YAML"),
        ("- a\n", "keys and values"),
        ("", "keys and values"),
        ("lease: 1\nlease: 2\n", ":2: 'lease' was already given in line 1"),
        ("buffer:\n  delivery: push\n  delivery: acked\n", ":3: 'buffer.delivery' was already given"),
        ("a: !!python/object:os.system x\n", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_request(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(BeamwireError) as caught:
        parse_request(path)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert words in caught.value.message
    assert str(path) in caught.value.message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BeamwireError, match="No such file"):
        parse_request(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BeamwireError, match="cannot be read"):
        parse_request(binary)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(90, 90), (0.5, 0.5), ("90s", 90), ("30m", 1800), ("2h", 7200), ("1d12h", 129600), ("1.5h", 5400)],
)
def test_lengths_of_time(value: object, seconds: float) -> None:
    assert parse_seconds(value) == seconds


@pytest.mark.parametrize("value", [True, 0, -1, "", "2", "h", "2 h", "2w", "0s", None, float("inf")])
def test_what_is_no_length_of_time(value: object) -> None:
    assert parse_seconds(value) is None


def test_sources_are_told_apart(tmp_path: Path) -> None:
    connect = "beamwire://127.0.0.1:5000/buffers/abc?epoch=1"
    assert parse_source(connect) == ConnectString.parse(connect)
    assert parse_source("abc") == "transfers/abc"
    assert parse_source("transfers/abc") == "transfers/abc"
    path = write(tmp_path, LCLSTREAMER)
    for source in (path, str(path)):
        assert parse_source(source) == parse_request(path)
    for wrong in ("Some Text", "jobs/abc", "", 3):
        with pytest.raises(BeamwireError, match="connect string"):
            parse_source(wrong)  # type: ignore[arg-type]


def test_where_it_runs_what_it_needs_and_what_consumers_need() -> None:
    transfer = parse_request(
        MINIMAL
        | {
            "placement": {"backend": "slurm", "queue": "main", "attributes": {"exclusive": True}},
            "resources": {"nodes": 2, "cores_per_process": 4, "memory_bytes": 1024, "duration": "2h"},
            "buffer": {"placement": {"backend": "slurm"}},
            "contract": {
                "bridge": "peaknet",
                "arrays": [{"field": "x", "dtype": "uint16", "shape": [-1, 4]}, {"field": "e", "scalar": True}],
                "batch_size": 16,
            },
            "keep": "1h",
            "reuse": True,
        }
    ).transfer
    assert (transfer.streamer_placement.backend, transfer.streamer_placement.queue) == ("slurm", "main")
    assert dict(transfer.streamer_placement.attributes) == {"exclusive": "true"}
    resources = transfer.streamer_resources
    assert (resources.node_count, resources.cores_per_process, resources.memory_bytes) == (2, 4, 1024)
    assert (resources.duration.seconds, transfer.keep.seconds, transfer.reuse) == (7200, 3600, True)
    assert transfer.buffer_spec.placement.backend == "slurm"
    contract = transfer.contract
    assert (contract.bridge, contract.batch_size) == ("peaknet", 16)
    assert [(a.field, list(a.shape), a.scalar) for a in contract.arrays] == [("x", [-1, 4], False), ("e", [], True)]


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"placement": "slurm"}, "placement", "backend: slurm"),
        ({"placement": {"backnd": "x"}}, "placement.backnd", "did you mean 'backend'?"),
        ({"resources": {"nodes": 0}}, "resources.nodes", "whole number from 1"),
        ({"resources": {"processes": 2}}, "resources.processes", "unknown key"),
        ({"contract": {"arrays": {"x": 1}}}, "contract.arrays", "must be a list"),
        ({"contract": {"arrays": [{"dtype": "u2"}]}}, "contract.arrays[0].field", "is missing"),
        ({"contract": {"arrays": [{"field": "x", "shape": [-2]}]}}, "contract.arrays[0].shape", "-1 for any"),
        ({"keep": "soon"}, "keep", "must be seconds or text"),
        ({"reuse": "yes"}, "reuse", "must be true or false"),
    ],
)
def test_what_is_wrong_with_these_is_named(changes: dict[str, object], field: str, words: str) -> None:
    found = problems(MINIMAL | changes)
    assert set(found) == {field}
    assert words in found[field]
