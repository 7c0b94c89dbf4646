"""The configuration of a streamer: LCLStreamer's keys, checked completely before anything is opened."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from beamwire.mesh import contracts
from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.services.streamer import registry
from beamwire.services.streamer.components import PRESENT_SUFFIX
from beamwire.services.streamer.handlers.lanes import Pace
from beamwire.services.streamer.registry import Kind, nearest
from beamwire.services.streamer.values import no_flag

ROOT = "config"


@dataclass(frozen=True, slots=True)
class Part:
    """One component: its name, its class, its checked parameters, and where it stands in the configuration."""

    type: str
    component: Any
    parameters: BaseModel
    path: str


@dataclass(frozen=True, slots=True)
class HandlerPart(Part):
    """A handler, and what happens when it does not keep up."""

    pace: Pace


@dataclass(frozen=True, slots=True)
class StreamerConfig:
    """A configuration without an error in it."""

    source_identifier: str
    skip_incomplete_events: bool
    event_source: Part
    data_sources: Mapping[str, Part]
    optional: frozenset[str]
    processing_pipeline: Sequence[Part]
    data_serializer: Part
    data_handlers: Sequence[HandlerPart]
    max_events: int = 0
    consumer: str = ""


@contextmanager
def located(path: str) -> Iterator[None]:
    """Adds where a component stands, `path`, to what it says of its parameters."""
    try:
        yield
    except BeamwireError as error:
        if not error.violations or error.violations[0].field.split(".")[0] == ROOT:
            raise
        violations = [FieldViolation(f"{path}.{at.field}", at.description) for at in error.violations]
        raise _refused(violations, error.reason) from None


class _Section(BaseModel):
    """A component as written: its type, and parameters that the component checks."""

    model_config = ConfigDict(extra="allow")
    _no_flag = field_validator("*", mode="wrap")(no_flag)
    type: str


class _DataSourceSection(_Section):
    required: bool = True


class _HandlerSection(_Section, Pace):
    model_config = ConfigDict(extra="allow")


class _Document(BaseModel):
    """The configuration as written."""

    model_config = ConfigDict(extra="forbid")
    _no_flag = field_validator("*", mode="wrap")(no_flag)
    source_identifier: str = ""
    skip_incomplete_events: bool = False
    event_source: _Section
    data_sources: Annotated[dict[str, _DataSourceSection], Field(min_length=1)]
    processing_pipeline: list[_Section] | _Section = Field(default_factory=list[_Section])
    data_serializer: _Section = Field(default_factory=lambda: _Section(type="NativeSerializer"))
    data_handlers: list[_HandlerSection] = Field(default_factory=list[_HandlerSection])
    max_events: Annotated[int, Field(ge=0)] = 0
    consumer: str = ""


def load(data: Mapping[str, Any]) -> StreamerConfig:
    """Checks a configuration and names everything that is wrong with it.

    Raises BeamwireError INVALID_FIELD with one violation for each error, their fields below "config".
    """
    if not isinstance(data, Mapping):
        raise _refused([FieldViolation(ROOT, f"must be a table of keys, not {type(data).__name__}")])
    try:
        document = _Document.model_validate(dict(data))
    except ValidationError as error:
        raise _refused(_violations(error, _Document, ROOT)) from None
    return _Reader(document).read()


@dataclass
class _Reader:
    """Turns the sections of a document into parts, and gathers what is wrong."""

    document: _Document
    violations: list[FieldViolation] = field(default_factory=list[FieldViolation])

    def read(self) -> StreamerConfig:
        document = self.document
        event_source = self._part(Kind.EVENT_SOURCE, document.event_source, "event_source")
        data_sources = {name: self._data_source(name, part) for name, part in document.data_sources.items()}
        pipeline = self._pipeline()
        serializer = self._part(Kind.SERIALIZER, document.data_serializer, "data_serializer")
        handlers = [self._handler(place, section) for place, section in enumerate(document.data_handlers)]
        self._check_fits(event_source, data_sources)
        self._check_names()
        self._check_consumer()
        self._raise()
        assert event_source is not None
        assert serializer is not None
        return StreamerConfig(
            source_identifier=document.source_identifier,
            skip_incomplete_events=document.skip_incomplete_events,
            event_source=event_source,
            data_sources={name: part for name, part in data_sources.items() if part},
            optional=frozenset(name for name, part in document.data_sources.items() if not part.required),
            processing_pipeline=pipeline,
            data_serializer=serializer,
            data_handlers=[part for part in handlers if part],
            max_events=document.max_events,
            consumer=document.consumer,
        )

    def _pipeline(self) -> list[Part]:
        written = self.document.processing_pipeline
        if isinstance(written, list):
            return self._parts(Kind.STAGE, written, "processing_pipeline")
        part = self._part(Kind.STAGE, written, "processing_pipeline")
        return [part] if part else []

    def _parts(self, kind: Kind, sections: Sequence[_Section], path: str) -> list[Part]:
        parts = [self._part(kind, section, f"{path}.{place}") for place, section in enumerate(sections)]
        return [part for part in parts if part]

    def _handler(self, place: int, section: _HandlerSection) -> HandlerPart | None:
        part = self._part(Kind.HANDLER, section, f"data_handlers.{place}")
        if part is None:
            return None
        pace = Pace(when_slow=section.when_slow, patience=section.patience)
        return HandlerPart(part.type, part.component, part.parameters, part.path, pace)

    def _data_source(self, name: str, section: _DataSourceSection) -> Part | None:
        path = f"data_sources.{name}"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name):
            self._wrong(path, "the name must be letters, digits, _, - and ., beginning with a letter")
        return self._part(Kind.DATA_SOURCE, section, path)

    def _part(self, kind: Kind, section: _Section, path: str) -> Part | None:
        try:
            component = registry.find(kind, section.type)
        except BeamwireError as error:
            self.violations.append(FieldViolation(f"{ROOT}.{path}.type", str(error)))
            return None
        try:
            parameters = component.Parameters.model_validate(section.model_extra or {})
        except ValidationError as error:
            self.violations += _violations(error, component.Parameters, f"{ROOT}.{path}", section)
            return None
        return Part(section.type, component, parameters, f"{ROOT}.{path}")

    def _check_fits(self, source: Part | None, data_sources: Mapping[str, Part | None]) -> None:
        """A data source may say which event sources it reads from."""
        for part in data_sources.values():
            wanted = getattr(part.component, "event_source", None) if part else None
            if part and source and wanted and source.type != wanted:
                self.violations.append(
                    FieldViolation(f"{part.path}.type", f"{part.type} needs {wanted}, not {source.type}")
                )

    def _check_consumer(self) -> None:
        known = contracts.known()
        if self.document.consumer and self.document.consumer not in known:
            self._wrong(
                "consumer",
                f"nobody knows what {self.document.consumer!r} takes; {nearest(self.document.consumer, known)}",
            )

    def _check_names(self) -> None:
        names = self.document.data_sources
        for name in names:
            if name.endswith(PRESENT_SUFFIX) and not getattr(
                names.get(name.removesuffix(PRESENT_SUFFIX)), "required", 1
            ):
                self._wrong(f"data_sources.{name}", "the name is taken: it says which events have the optional one")

    def _wrong(self, path: str, description: str) -> None:
        self.violations.append(FieldViolation(f"{ROOT}.{path}", description))

    def _raise(self) -> None:
        if self.violations:
            raise _refused(self.violations)


def _refused(violations: Sequence[FieldViolation], reason: Reason = Reason.INVALID_FIELD) -> BeamwireError:
    text = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
    return BeamwireError(reason, text, violations=violations)


def _violations(
    error: ValidationError, model: type[BaseModel], path: str, section: _Section | None = None
) -> list[FieldViolation]:
    """What pydantic found, in our words; `path` is where the model stands."""
    found: dict[str, str] = {}
    known = [*model.model_fields, *(type(section).model_fields if section is not None else [])]
    for detail in error.errors(include_url=False, include_context=False):
        names = [str(name) for name in detail["loc"] if not _is_tag(name)]
        where = ".".join([path, *names])
        if detail["type"] == "extra_forbidden":
            found[where] = f"unknown key; {nearest(names[-1], known)}"
        elif detail["type"] == "missing":
            found[where] = "is required"
        else:
            found.setdefault(where, f"{_lower_first(detail['msg'])} (it is {detail['input']!r:.80})")
    return [FieldViolation(where, what) for where, what in found.items()]


def _is_tag(name: str | int) -> bool:
    """pydantic puts the branch of a union into the path: `_Section`, `list[_Section]`, `tuple[int, ...]`."""
    return isinstance(name, str) and (name.startswith("_Section") or "[" in name or name in ("str", "int", "float"))


def _lower_first(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def parse_text(text: str) -> Mapping[str, Any]:
    """Reads a configuration written as YAML or JSON.

    Raises BeamwireError INVALID_FIELD with line and column if it is neither, or is not a table.
    """
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        node = loader.get_single_node()
        _check_once(node)
        data: object = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _refused([FieldViolation(ROOT, f"is neither YAML nor JSON: {' '.join(str(error).split())}")]) from None
    finally:
        loader.dispose()
    try:
        return TypeAdapter(dict[str, Any]).validate_python(data)
    except ValidationError:
        raise _refused([FieldViolation(ROOT, f"must be a table of keys, not {type(data).__name__}")]) from None


def _check_once(root: Any) -> None:
    """Of a key that is there twice YAML would take the last one, and say nothing."""
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen or isinstance(node.value, str):
            continue
        seen.add(id(node))
        keys = set[tuple[str, str]]()
        for item in node.value:
            if not isinstance(item, tuple):
                waiting.append(item)
                continue
            key: Any
            key, value = item
            waiting.append(value)
            if isinstance(key.value, str) and (key.tag, key.value) in keys:
                where = f"line {key.start_mark.line + 1}, column {key.start_mark.column + 1}"
                raise _refused([FieldViolation(ROOT, f"has the key {key.value!r} twice, again in {where}")])
            keys.add((key.tag, str(key.value)))
