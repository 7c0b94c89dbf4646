"""Turns a data request, as a person writes it, into the Transfer that the Request service takes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.struct_pb2 import Struct

from beamwire.buffer.v1 import buffer_service_pb2 as buffer_pb2
from beamwire.client.demands import Demands
from beamwire.client.problems import Problems
from beamwire.client.values import INT32_MAX, INT64_MAX, kind_of
from beamwire.client.yamlfile import read_yaml
from beamwire.request.v1 import request_service_pb2 as request_pb2

Request = Mapping[str, object] | request_pb2.Transfer | os.PathLike[str]

_STREAM_KEYS = (
    "source_identifier",
    "skip_incomplete_events",
    "event_source",
    "data_sources",
    "processing_pipeline",
    "data_serializer",
    "data_handlers",
    "max_events",
)
_OWN_KEYS = (
    *("processes", "buffer", "lease", "labels", "consumer_jobs"),
    *("placement", "resources", "contract", "reuse", "keep"),
)
_KEYS = frozenset(_STREAM_KEYS + _OWN_KEYS)
_BUFFER_KEYS = frozenset(
    {
        "capacity_bytes",
        "capacity_frames",
        "overflow_policy",
        "delivery",
        "transport",
        "consumers",
        "groups",
        "frame_lease",
        "retain_bytes",
        "shard_count",
        "placement",
    }
)
_JOB_KEYS = frozenset(
    {"facility", "executable", "arguments", "environment", "processes", "mpi", "duration", "display_name"}
)
_HANDLER_KEYS = frozenset({"type", "write_directory", "file_prefix", "file_suffix"})
_OLD_LAYOUT = "this is the older layout of LCLStreamer; move what is under it to the top level, each with its `type`"
_EXACT_IN_DOUBLE = 2**53


@dataclass(frozen=True, slots=True)
class OutputDefaults:
    """Where a request's `BinaryFileWritingDataHandler` wants the files; None and empty where it does not say."""

    directory: Path | None = None
    prefix: str = ""
    suffix: str = ""


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request ready to be sent, and what it says about files on the client's side."""

    transfer: request_pb2.Transfer
    output: OutputDefaults


def parse_request(request: Request) -> ParsedRequest:
    """Read a request: a mapping or the path of a YAML file in LCLStreamer's layout, or a Transfer.

    Raises BeamwireError INVALID_FIELD with one violation per problem, each naming the key (and the line in a file).
    The components' own parameters are checked by the facility.
    """
    if isinstance(request, request_pb2.Transfer):
        copy = request_pb2.Transfer()
        copy.CopyFrom(request)
        return ParsedRequest(copy, OutputDefaults())
    if isinstance(request, Mapping):
        return _Conversion(Problems()).run(request)
    file = read_yaml(Path(request))
    return _Conversion(Problems(file.path, file.lines)).run(file.content)


class _Conversion(Demands):
    """One request on its way to a Transfer; goes on after a problem to find the others."""

    def run(self, content: Mapping[str, object]) -> ParsedRequest:
        for key in content:
            if key not in _KEYS:
                self.problems.unknown_key(str(key), str(key), _KEYS, _OLD_LAYOUT if key == "lclstreamer" else "")
        transfer = request_pb2.Transfer(
            config=self._config(content),
            process_count=self.count("processes", content.get("processes"), INT32_MAX, least=1),
            labels=self.words_by_name("labels", content.get("labels")),
            consumer_jobs=self._consumer_jobs(content.get("consumer_jobs")),
            reuse=self.flag("reuse", content.get("reuse")),
        )
        for key, part, convert in (
            ("placement", transfer.streamer_placement, self.placement),
            ("resources", transfer.streamer_resources, self.resources),
            ("contract", transfer.contract, self.contract),
            ("keep", transfer.keep, self.length),
        ):
            if content.get(key) is not None:
                part.CopyFrom(convert(key, content[key]))  # type: ignore[arg-type]
        if content.get("buffer") is not None:
            transfer.buffer_spec.CopyFrom(self._buffer(content["buffer"]))
        if content.get("lease") is not None:
            transfer.lease.CopyFrom(self.length("lease", content["lease"]))
        output = self._handlers(content.get("data_handlers"))
        self.problems.check()
        return ParsedRequest(transfer, output)

    def _config(self, content: Mapping[str, object]) -> request_pb2.StreamConfig:
        config = request_pb2.StreamConfig(
            source_identifier=self.text("source_identifier", content.get("source_identifier")),
            skip_incomplete_events=self.flag("skip_incomplete_events", content.get("skip_incomplete_events")),
            max_event_count=self.count("max_events", content.get("max_events"), INT64_MAX),
            processing_pipeline=self._pipeline(content.get("processing_pipeline")),
            data_sources=self._sources(content.get("data_sources")),
        )
        if content.get("event_source") is None:
            self.problems.add("event_source", "is missing; say where events come from, `type: Psana2EventSource`, say")
        else:
            config.event_source.CopyFrom(self._component("event_source", content["event_source"]))
        if content.get("data_serializer") is not None:
            config.data_serializer.CopyFrom(self._component("data_serializer", content["data_serializer"]))
        return config

    def _sources(self, value: object) -> dict[str, request_pb2.Component]:
        if not isinstance(value, Mapping) or not value:
            self.problems.add("data_sources", "must name at least one data source, each with its `type`")
            return {}
        return {str(name): self._component(f"data_sources.{name}", item) for name, item in value.items()}

    def _pipeline(self, value: object) -> list[request_pb2.Component]:
        if value is None:
            return []
        if isinstance(value, list | tuple):
            return [self._component(f"processing_pipeline[{index}]", item) for index, item in enumerate(value)]
        return [self._component("processing_pipeline", value)]

    def _component(self, path: str, value: object) -> request_pb2.Component:
        if not isinstance(value, Mapping):
            self.problems.add(path, f"must be a mapping with a `type`, not {kind_of(value)}")
            return request_pb2.Component()
        kind = value.get("type")
        if not isinstance(kind, str) or not kind:
            self.problems.add(f"{path}.type", "is missing; it names the component")
            return request_pb2.Component()
        parameters = {str(name): self._plain(f"{path}.{name}", item) for name, item in value.items() if name != "type"}
        component = request_pb2.Component(type=kind)
        if parameters:
            component.parameters.CopyFrom(_struct(parameters))
        return component

    def _plain(self, path: str, value: object) -> object:
        """Return a value as protobuf's Struct can hold it, with no loss."""
        if isinstance(value, Mapping):
            return {str(name): self._plain(f"{path}.{name}", item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._plain(f"{path}[{index}]", item) for index, item in enumerate(value)]
        if isinstance(value, bool | str) or value is None:
            return value
        if isinstance(value, int) and abs(value) > _EXACT_IN_DOUBLE:
            self.problems.add(path, f"{value} is too large to be sent exactly; write it in quotes if it is a name")
            return 0.0
        if isinstance(value, int | float) and math.isfinite(value):
            return value
        self.problems.add(path, f"must be a number, text, true or false, a list or a mapping, not {kind_of(value)}")
        return None

    def _buffer(self, value: object) -> buffer_pb2.BufferSpec:
        spec = buffer_pb2.BufferSpec()
        if not isinstance(value, Mapping):
            self.problems.add("buffer", f"must be a mapping, not {kind_of(value)}")
            return spec
        for key in value:
            if key not in _BUFFER_KEYS:
                self.problems.unknown_key(f"buffer.{key}", str(key), _BUFFER_KEYS)
        spec.capacity_bytes = self.count("buffer.capacity_bytes", value.get("capacity_bytes"), INT64_MAX, least=1)
        spec.capacity_frames = self.count("buffer.capacity_frames", value.get("capacity_frames"), INT32_MAX, least=1)
        spec.overflow_policy = self._choice(value, "overflow_policy", buffer_pb2.OverflowPolicy)
        spec.delivery = self._choice(value, "delivery", buffer_pb2.Delivery)
        spec.transport = self._choice(value, "transport", buffer_pb2.Transport)
        spec.retain_bytes = self.count("buffer.retain_bytes", value.get("retain_bytes"), INT64_MAX)
        spec.shard_count = self.count("buffer.shard_count", value.get("shard_count"), INT32_MAX, least=1)
        who = "SPIFFE ids, such as spiffe://facility.example/user/bob"
        spec.consumers.extend(self.words("buffer.consumers", value.get("consumers"), who))
        spec.groups.extend(self.words("buffer.groups", value.get("groups"), "names, such as training"))
        if value.get("placement") is not None:
            spec.placement.CopyFrom(self.placement("buffer.placement", value["placement"]))
        if value.get("frame_lease") is not None:
            spec.frame_lease.CopyFrom(self.length("buffer.frame_lease", value["frame_lease"]))
        return spec

    def _choice(self, mapping: Mapping[str, object], key: str, enum: Any) -> Any:
        """Return the number of the value that a word names; `enum` is one of the contract's."""
        word = mapping.get(key)
        prefix = f"{key.upper()}_"
        words = {name.removeprefix(prefix).lower(): number for name, number in enum.items() if number}
        word = word.lower() if isinstance(word, str) else word
        if word is not None and (not isinstance(word, str) or word not in words):
            self.problems.add(f"buffer.{key}", f"must be one of {', '.join(words)}, not {word!r}")
            return 0
        return words[word] if word is not None else 0

    def _handlers(self, value: object) -> OutputDefaults:
        output = OutputDefaults()
        if value is None:
            return output
        for index, item in enumerate(value if isinstance(value, list | tuple) else [value]):
            path = f"data_handlers[{index}]"
            handler = item if isinstance(item, Mapping) else {}
            match handler.get("type"):
                case "BinaryDataStreamingDataHandler":
                    continue  # Delivery to this client takes its place.
                case "BinaryFileWritingDataHandler":
                    output = self._file_handler(path, handler)
                case kind:
                    self.problems.add(
                        f"{path}.type",
                        f"{kind!r} cannot be honoured: events are delivered to you; leave it out, or use "
                        "BinaryFileWritingDataHandler to say where `beamwire get` writes",
                    )
        return output

    def _file_handler(self, path: str, item: Mapping[str, object]) -> OutputDefaults:
        for key in item:
            if key not in _HANDLER_KEYS:
                self.problems.unknown_key(f"{path}.{key}", str(key), _HANDLER_KEYS)
        directory = self.text(f"{path}.write_directory", item.get("write_directory"))
        return OutputDefaults(
            directory=Path(directory) if directory else None,
            prefix=self._name_part(f"{path}.file_prefix", item.get("file_prefix")),
            suffix=self._name_part(f"{path}.file_suffix", item.get("file_suffix")).removeprefix("."),
        )

    def _name_part(self, path: str, value: object) -> str:
        text = self.text(path, value)
        if "/" in text or "\0" in text:
            self.problems.add(path, "must not contain `/`; the directory is `write_directory`")
            return ""
        return text

    def _consumer_jobs(self, value: object) -> list[request_pb2.ConsumerJob]:
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            self.problems.add("consumer_jobs", f"must be a list of programs to run, not {kind_of(value)}")
            return []
        return [self._consumer_job(f"consumer_jobs[{index}]", item) for index, item in enumerate(value)]

    def _consumer_job(self, path: str, value: object) -> request_pb2.ConsumerJob:
        consumer = request_pb2.ConsumerJob()
        if not isinstance(value, Mapping):
            self.problems.add(path, f"must be a mapping with an `executable`, not {kind_of(value)}")
            return consumer
        for key in value:
            if key not in _JOB_KEYS:
                self.problems.unknown_key(f"{path}.{key}", str(key), _JOB_KEYS)
        consumer.trust_domain = self.text(f"{path}.facility", value.get("facility"))
        spec = consumer.spec
        spec.executable = self.text(f"{path}.executable", value.get("executable"))
        if not spec.executable:
            self.problems.add(f"{path}.executable", "is missing; it names the program")
        spec.arguments.extend(self.words(f"{path}.arguments", value.get("arguments"), "words"))
        spec.environment.update(self.words_by_name(f"{path}.environment", value.get("environment")))
        spec.display_name = self.text(f"{path}.display_name", value.get("display_name"))
        spec.mpi = self.flag(f"{path}.mpi", value.get("mpi"))
        spec.resources.process_count = self.count(f"{path}.processes", value.get("processes"), INT32_MAX, least=1)
        if value.get("duration") is not None:
            spec.resources.duration.CopyFrom(self.length(f"{path}.duration", value["duration"]))
        return consumer


def _struct(parameters: dict[str, Any]) -> Struct:
    struct = Struct()
    struct.update(parameters)
    return struct
