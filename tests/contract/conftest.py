"""Reads the descriptor set into lists of what is ours in it, for the tests of this folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from google.api import field_behavior_pb2, resource_pb2
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)

ROOT = Path(__file__).resolve().parents[2]
# What travels on the data plane goes both ways: its fields are nobody's to fill in particular.
DATA_PLANE = "beamwire.stream.v1."
Kind: TypeAlias = FieldDescriptorProto.Type.ValueType
# Any, because the annotations of google.api are known to nobody's stubs.
RESOURCE: Any = resource_pb2.resource
REFERENCE: Any = resource_pb2.resource_reference
BEHAVIOR: Any = field_behavior_pb2.field_behavior


@dataclass(frozen=True)
class Element:
    """Anything that has a name in a file of ours, and the comment before it."""

    name: str
    comment: str


@dataclass(frozen=True)
class Message(Element):
    """A message; nested ones too, map entries not."""

    proto: DescriptorProto

    @property
    def fields(self) -> dict[str, FieldDescriptorProto]:
        return {field.name: field for field in self.proto.field}

    @property
    def resource(self) -> resource_pb2.ResourceDescriptor | None:
        options = self.proto.options
        return options.Extensions[RESOURCE] if options.HasExtension(RESOURCE) else None

    def behavior(self, name: str) -> set[str]:
        """What field_behavior says of a field."""
        numbers: Sequence[int] = self.fields[name].options.Extensions[BEHAVIOR]
        return {field_behavior_pb2.FieldBehavior.Name(number) for number in numbers}

    def reference(self, name: str) -> str:
        """The kind of resource that a field names; empty if it names none."""
        kind: str = self.fields[name].options.Extensions[REFERENCE].type
        return kind

    def has(self, name: str, kind: Kind, behavior: str = "", type_name: str = "") -> bool:
        """Whether there is a field of this name, type and behavior."""
        field = self.fields.get(name)
        return (
            field is not None
            and field.type == kind
            and (not behavior or self.behavior(name) == {behavior})
            and (not type_name or field.type_name == f".{type_name}")
        )

    @property
    def has_life(self) -> bool:
        """Whether it is a resource that changes: one with a State."""
        return self.resource is not None and "state" in self.fields


@dataclass(frozen=True)
class Method(Element):
    """A method of a service."""

    proto: MethodDescriptorProto
    request: Message
    response: Message

    @property
    def verb_and_noun(self) -> tuple[str, str]:
        found = re.fullmatch(r"([A-Z][a-z]+)([A-Z]\w+)?", self.proto.name)
        assert found is not None, f"{self.name} is not a verb and a noun"
        return found[1], found[2] or ""


class Contract:
    """The descriptor set, as lists of what is ours in it."""

    def __init__(self, descriptors: FileDescriptorSet) -> None:
        self.files = [file for file in descriptors.file if file.package.startswith("beamwire.")]
        self.elements: list[Element] = []
        self.messages: dict[str, Message] = {}
        self.enums: dict[str, EnumDescriptorProto] = {}
        for file in self.files:
            comments = {tuple(place.path): place.leading_comments.strip() for place in file.source_code_info.location}
            self._read(file, comments)
        self.methods = [
            self._method(file, service, method)
            for file in self.files
            for service in file.service
            for method in service.method
        ]

    def _read(self, file: FileDescriptorProto, comments: dict[tuple[int, ...], str]) -> None:
        def add(name: str, path: tuple[int, ...]) -> str:
            self.elements.append(Element(name, comments.get(path, "")))
            return name

        def read_enum(enum: EnumDescriptorProto, scope: str, path: tuple[int, ...]) -> None:
            self.enums[add(f"{scope}.{enum.name}", path)] = enum
            for index, value in enumerate(enum.value):
                add(f"{scope}.{enum.name}.{value.name}", (*path, 2, index))

        def read_message(message: DescriptorProto, scope: str, path: tuple[int, ...]) -> None:
            if message.options.map_entry:
                return
            name = add(f"{scope}.{message.name}", path)
            self.messages[name] = Message(name, comments.get(path, ""), message)
            for index, field in enumerate(message.field):
                add(f"{name}.{field.name}", (*path, 2, index))
            for index, nested in enumerate(message.nested_type):
                read_message(nested, name, (*path, 3, index))
            for index, enum in enumerate(message.enum_type):
                read_enum(enum, name, (*path, 4, index))

        for index, message in enumerate(file.message_type):
            read_message(message, file.package, (4, index))
        for index, enum in enumerate(file.enum_type):
            read_enum(enum, file.package, (5, index))
        for index, service in enumerate(file.service):
            add(f"{file.package}.{service.name}", (6, index))
            for number, method in enumerate(service.method):
                add(f"{file.package}.{service.name}.{method.name}", (6, index, 2, number))
        for index, extension in enumerate(file.extension):
            add(f"{file.package}.{extension.name}", (7, index))

    def _method(
        self, file: FileDescriptorProto, service: ServiceDescriptorProto, method: MethodDescriptorProto
    ) -> Method:
        request, response = (self.messages[kind.lstrip(".")] for kind in (method.input_type, method.output_type))
        return Method(f"{file.package}.{service.name}.{method.name}", "", method, request, response)

    def fields(self) -> Iterator[tuple[str, FieldDescriptorProto]]:
        """Every field with its full name."""
        for message in self.messages.values():
            for field in message.proto.field:
                yield f"{message.name}.{field.name}", field

    def resources(self) -> list[Message]:
        return [message for message in self.messages.values() if message.resource is not None]

    def requested(self) -> dict[str, Message]:
        """The messages that a caller fills: each request, and what is in it apart from OUTPUT_ONLY fields."""
        found: dict[str, Message] = {}
        waiting = [method.request for method in self.methods]
        while waiting:
            message = waiting.pop()
            if message.name not in found:
                found[message.name] = message
                waiting += [
                    self.messages[inner]
                    for field in message.proto.field
                    if "OUTPUT_ONLY" not in message.behavior(field.name) and (inner := self._message_in(message, field))
                ]
        return found

    def _message_in(self, message: Message, field: FieldDescriptorProto) -> str:
        """The message of ours that a field or a map field holds; empty if none."""
        kind = field.type_name.lstrip(".")
        for entry in message.proto.nested_type:
            if entry.options.map_entry and kind == f"{message.name}.{entry.name}":
                kind = entry.field[1].type_name.lstrip(".")
        return kind if kind in self.messages and not kind.startswith(DATA_PLANE) else ""


@pytest.fixture(scope="session")
def contract() -> Contract:
    """The contract as it is generated."""
    return Contract(FileDescriptorSet.FromString((ROOT / "gen" / "beamwire.binpb").read_bytes()))
