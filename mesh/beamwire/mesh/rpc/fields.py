"""Holds requests to the field behaviors of the contract: REQUIRED must be there, OUTPUT_ONLY is not listened to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from google.api import field_behavior_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason

_OURS: Final = "beamwire."
# googleapis-common-protos has no stubs, so a type checker cannot see that this is an extension.
_FIELD_BEHAVIOR: Final[Any] = field_behavior_pb2.field_behavior


@dataclass(frozen=True, slots=True)
class _Rule:
    name: str
    required: bool
    output_only: bool
    message: Descriptor | None  # of ours, and has rules itself
    repeated: bool
    is_map: bool
    presence: bool


def apply(request: Message) -> None:
    """Clear the OUTPUT_ONLY fields of a request; INVALID_FIELD names every REQUIRED field that is missing."""
    violations = [FieldViolation(path, "is required") for path in _missing(request, "")]
    if violations:
        fields = ", ".join(v.field for v in violations)
        verb = "is" if len(violations) == 1 else "are"
        raise BeamwireError(Reason.INVALID_FIELD, f"{fields} {verb} required", violations=violations)


def _missing(message: Message, prefix: str) -> Iterator[str]:
    for rule in _rules(message.DESCRIPTOR):
        if rule.output_only:
            message.ClearField(rule.name)
        elif not _present(message, rule):
            if rule.required:
                yield prefix + rule.name
        elif rule.message is not None:
            for path, child in _children(getattr(message, rule.name), rule):
                yield from _missing(child, f"{prefix}{rule.name}{path}.")


def _present(message: Message, rule: _Rule) -> bool:
    return message.HasField(rule.name) if rule.presence else bool(getattr(message, rule.name))


def _children(value: Any, rule: _Rule) -> Iterator[tuple[str, Message]]:
    if rule.is_map:
        yield from ((f"[{key}]", child) for key, child in sorted(value.items()))
    elif rule.repeated:
        yield from ((f"[{index}]", child) for index, child in enumerate(value))
    else:
        yield "", value


@cache
def _rules(message: Descriptor) -> tuple[_Rule, ...]:
    return tuple(rule for field in message.fields if (rule := _rule(field)) is not None)


def _rule(field: FieldDescriptor) -> _Rule | None:
    behaviors = field.GetOptions().Extensions[_FIELD_BEHAVIOR]
    required = field_behavior_pb2.REQUIRED in behaviors
    output_only = field_behavior_pb2.OUTPUT_ONLY in behaviors
    child = field.message_type
    is_map = child is not None and child.GetOptions().map_entry
    if child is not None and is_map:
        child = child.fields_by_name["value"].message_type
    if child is not None and not (child.full_name.startswith(_OURS) and _has_rules(child, frozenset())):
        child = None
    if not (required or output_only or child):
        return None
    return _Rule(field.name, required, output_only, child, field.is_repeated, is_map, field.has_presence)


def _has_rules(message: Descriptor, seen: frozenset[str]) -> bool:
    """Whether a message or anything in it has a rule; `seen` ends the search in messages that hold themselves."""
    if message.full_name in seen:
        return False
    below = seen | {message.full_name}
    for field in message.fields:
        behaviors = field.GetOptions().Extensions[_FIELD_BEHAVIOR]
        if field_behavior_pb2.REQUIRED in behaviors or field_behavior_pb2.OUTPUT_ONLY in behaviors:
            return True
        if field.message_type is not None and _has_rules(field.message_type, below):
            return True
    return False
