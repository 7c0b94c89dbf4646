"""Which datasets a configuration would read, told from what is written in it, before anything is opened.

A component that does not say what it reads is a dataset of its own, `component:<type>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from beamwire.services.streamer.config import Part, StreamerConfig, located
from beamwire.services.streamer.named import Dataset, Opened, file
from beamwire.services.streamer.registry import BUILT_IN, Kind
from beamwire.services.streamer.sources.files import FIELD


def datasets(config: StreamerConfig) -> list[Dataset]:
    """Everything that a run would read. INVALID_FIELD if that cannot be told from what is written.

    An event source says what it reads by a static method `datasets(parameters, source_identifier)`, every component by
    its parameters of the types `FileName`, `ArrayName` and `pathlib.Path`, and by a static method
    `datasets(parameters)` if these do not tell it all.
    """
    found = list(_of_source(config.event_source, config.source_identifier))
    for part in config.data_sources.values():
        found += _of_part(Kind.DATA_SOURCE, part)
    for part in config.processing_pipeline:
        found += _of_part(Kind.STAGE, part)
    return [*found, *_of_part(Kind.SERIALIZER, config.data_serializer)]


def in_words(found: Sequence[Dataset]) -> dict[str, Any]:
    """As it is printed: {"datasets": [{"field", "named", "found"}]}."""
    return {"datasets": [{"field": each.field, "named": each.named, "found": list(each.found)} for each in found]}


def _of_source(part: Part, identifier: str) -> Iterator[Dataset]:
    yield from _of_part(Kind.EVENT_SOURCE, part)
    if hasattr(part.component, "datasets"):
        with located(part.path):
            yield from part.component.datasets(part.parameters, identifier)
    elif part.type not in BUILT_IN[Kind.EVENT_SOURCE]:
        yield from _guessed(FIELD, identifier)


def _of_part(kind: Kind, part: Part) -> Iterator[Dataset]:
    """The files that the parameters name. Of a component that does not say which do, all that could name one."""
    says = part.type in BUILT_IN[kind] or hasattr(part.component, "datasets")
    if not says:
        name = f"component:{part.type}"
        yield Dataset(f"{part.path}.type", name, (name,))
    elif kind is not Kind.EVENT_SOURCE and hasattr(part.component, "datasets"):
        with located(part.path):
            yield from part.component.datasets(part.parameters)
    for field, value, opened in _values(part.parameters, part.path):
        if isinstance(value, Path):
            yield file(field, value)
        elif opened and isinstance(value, str):
            if value:
                yield file(field, opened.file_of(value))
        elif not says and isinstance(value, str):
            yield from _guessed(field, value)


def _guessed(field: str, text: str) -> Iterator[Dataset]:
    """All that looks like a path in what a component was given that says nothing of it."""
    words = text.replace(",", " ").replace("=", " ").replace(":", " ").split()
    for word in dict.fromkeys((text, *words)):
        if word.startswith(("/", "~")) and "\0" not in word:
            yield file(field, Path(word).expanduser())


def _values(model: BaseModel, path: str) -> Iterator[tuple[str, Any, Opened | None]]:
    """Each value in some parameters, where it stands, and how it is marked if it names a file."""
    marked = _marked(type(model))
    for name, value in model:
        for leaf in _leaves(value, keys=name not in marked):
            if isinstance(leaf, BaseModel):
                yield from _values(leaf, f"{path}.{name}")
            else:
                yield f"{path}.{name}", leaf, marked.get(name)


def _leaves(value: Any, *, keys: bool) -> Iterator[Any]:
    """What is in tables and lists; of tables with `keys` these too."""
    if isinstance(value, Mapping):
        inside = [*value.keys(), *value.values()] if keys else [*value.values()]
        yield from _leaves(inside, keys=keys)
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes | BaseModel):
        for item in value:
            yield from _leaves(item, keys=keys)
    else:
        yield value.decode(errors="replace") if isinstance(value, bytes) else value


@cache
def _marked(model: type[BaseModel]) -> Mapping[str, Opened]:
    """The fields that name a file, may name one, or hold names of files."""
    found = {name: _mark(field.annotation, field.metadata) for name, field in model.model_fields.items()}
    return {name: mark for name, mark in found.items() if mark is not None}


def _mark(annotation: Any, metadata: Iterable[Any] = ()) -> Opened | None:
    for mark in (*metadata, *getattr(annotation, "__metadata__", ())):
        if isinstance(mark, Opened):
            return mark
    return next(filter(None, map(_mark, get_args(annotation))), None)
