"""The tables of the documents say which components there are, their parameters and their defaults, as the code has
them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from beamwire.services.streamer import config, registry
from beamwire.services.streamer.registry import BUILT_IN, Kind

DOCS = Path(__file__).parents[2] / "docs"
COMPONENTS = {name: kind for kind, names in BUILT_IN.items() for name in names}


def tables() -> Iterator[dict[str, str]]:
    """The rows of all tables, by the head of the column; the first column is `type`."""
    for name in ("streamer.md", "sources.md", "stages.md"):
        heads: list[str] = []
        for line in (DOCS / name).read_text().splitlines():
            if not line.startswith("|"):
                heads = []
                continue
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not heads:
                heads = ["type", *cells[1:]]
            elif not set(line) <= set("|- "):
                yield dict(zip(heads, cells, strict=True))


def documented() -> Iterator[tuple[str, str]]:
    """Each component with what the table says of its parameters."""
    before = ""
    for row in tables():
        names = re.findall(r"`(\w+)`", row["type"])
        if "parameters" in row and names and all(name in COMPONENTS for name in names):
            text = row["parameters"].replace("the same", before)
            for name in names:
                yield name, text
            before = text


ROWS = dict(documented())
# Its parameters have a paragraph of their own, as the table says.
PARAGRAPHS = {"DectrisStreamV2Serializer": r"\*\*Stream V2\*\*: (.*?)\. A quantity"}


def said(name: str) -> str:
    if name not in PARAGRAPHS:
        return ROWS[name]
    text = " ".join((DOCS / "streamer.md").read_text().split())
    (found,) = re.findall(PARAGRAPHS[name], text)
    return str(found)


def fields(name: str) -> dict[str, FieldInfo]:
    parameters: type[BaseModel] = registry.find(COMPONENTS[name], name).Parameters
    return parameters.model_fields


def test_every_component_has_its_row() -> None:
    assert set(COMPONENTS) - ROWS.keys() == set()


@pytest.mark.parametrize("name", sorted(COMPONENTS))
def test_every_parameter_is_in_the_row(name: str) -> None:
    assert fields(name).keys() - set(re.findall(r"`(\w+)`", said(name))) == set()


@pytest.mark.parametrize("name", sorted(COMPONENTS))
def test_the_row_names_no_other_parameter(name: str) -> None:
    begins = [re.match(r"`(\w+)`", part) for part in re.split(r" · | and |, or |; or |: ", said(name))]
    named = {found[1] for found in begins if found}
    allowed = {value for info in fields(name).values() for value in choices(info)}
    assert named - fields(name).keys() - allowed == set()


def choices(info: FieldInfo) -> list[str]:
    """The words that a parameter may be."""
    return re.findall(r"'([^']+)'", str(info.annotation))


def spelled(value: Any) -> set[str]:
    if isinstance(value, bool) or value is None:
        return {"null" if value is None else str(value).lower()}
    if isinstance(value, tuple | list):
        return {",".join(map(str, value))}
    return {str(value), f"{value:g}"} if isinstance(value, float) else {str(value)}


DEFAULT = r"`{}` (`[^`\[{{]+`|[^\s·;:(|`\[]+[^\s·;:(|,`]|[0-9a-z])(?=[ ,;]|$)"
"""What stands behind the name of a parameter, if it is one word or number."""


@pytest.mark.parametrize("name", sorted(COMPONENTS))
def test_the_defaults_are_those_of_the_code(name: str) -> None:
    for field, info in fields(name).items():
        for found in re.findall(DEFAULT.format(field), said(name)):
            word = found.strip("`")
            if word in ("of", "with", "and", "or", "a", "in") or (info.is_required() and word in choices(info)):
                continue
            assert not info.is_required(), (field, found)
            assert word in spelled(info.get_default(call_default_factory=True)), (field, found)


def test_defaults_are_looked_at() -> None:
    """What the test before looks for is what the tables have."""
    found = [
        word for name in COMPONENTS for field in fields(name) for word in re.findall(DEFAULT.format(field), said(name))
    ]
    assert {"median", "0.5", "5.943", "true", "1000"} <= set(found)
    assert len(found) > 60


def test_the_keys_of_a_configuration() -> None:
    keys = [re.findall(r"`(\w+)`", row["type"]) for row in tables() if "what it says" in row]
    assert sorted(key for (key,) in keys) == sorted(config._Document.model_fields)


def test_kinds_are_told_apart() -> None:
    assert len(COMPONENTS) == sum(map(len, BUILT_IN.values()))
    assert set(COMPONENTS.values()) == set(Kind)
