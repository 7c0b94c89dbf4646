"""Reads a YAML file together with the line of each key, and refuses keys that appear twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason


@dataclass(frozen=True, slots=True)
class YamlFile:
    """A parsed file: its mapping, and the line (from 1) of each key by its path, `event_source.type` say."""

    path: Path
    content: dict[str, object]
    lines: dict[str, int]


def read_yaml(path: Path) -> YamlFile:
    """Parse a file whose top level is a mapping; raises BeamwireError INVALID_FIELD naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _refusal(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise _refusal(f"{path}{line}: is not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise _refusal(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode) or not isinstance(content, dict):
        raise _refusal(f"{path}: must hold keys and values at its top level, such as `event_source:`")
    lines: dict[str, int] = {}
    for key, number in _keys(root, ""):
        if key in lines:
            raise _refusal(f"{path}:{number}: {key!r} was already given in line {lines[key]}")
        lines[key] = number
    return YamlFile(path, content, lines)


def _keys(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            yield key, key_node.start_mark.line + 1
            yield from _keys(value_node, f"{key}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            key = f"{prefix.removesuffix('.')}[{index}]"
            yield key, item.start_mark.line + 1
            yield from _keys(item, f"{key}.")


def _refusal(description: str) -> BeamwireError:
    return BeamwireError(Reason.INVALID_FIELD, description, violations=[FieldViolation("request", description)])
