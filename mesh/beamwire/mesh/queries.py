"""How records are asked for: one, those that have not ended, a page of a list that an index gives in order."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

from sqlalchemy import (
    ColumnElement,
    FromClause,
    Select,
    and_,
    bindparam,
    exists,
    func,
    literal,
    null,
    select,
    true,
    tuple_,
    union_all,
)

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.tables import labels, passed, published, resources

SelectRows = Select[*tuple[Any, ...]]

_LABEL = "labels."
_COLUMNS = ("state", "owner")


def rows(*, shared: bool, source: FromClause = resources) -> SelectRows:
    """All records: name, revision, create_time, document, and what is `shown` in its place, if anything.

    With several replicas that is the version which one of them has published.
    """
    columns = resources.c
    shown: ColumnElement[Any] = null()
    if shared:
        shown = published.c.document
        source = source.outerjoin(
            published,
            and_(
                published.c.name == columns.name,
                published.c.create_time == columns.create_time,
                published.c.revision == columns.revision,
            ),
        )
    found = select(columns.name, columns.revision, columns.create_time, columns.document, shown.label("shown"))
    return found.select_from(source)


def one(kind: str, *, shared: bool) -> SelectRows:
    """The record of the parameter `wanted`, a name, if it is of that kind."""
    return rows(shared=shared).where(resources.c.kind == kind, resources.c.name == bindparam("wanted"))


def page(kind: str, equals: Mapping[str, str], after: str, limit: int, *, shared: bool) -> SelectRows:
    """A page of a list, newest first. INVALID_FIELD for a path that is none, INVALID_PAGE_TOKEN for such a cursor."""
    names = [path for path in equals if path.startswith(_LABEL) and path != _LABEL]
    if names:
        # The index of labels has them in the order of the list: from one label on, the rest is looked at row by row.
        query = rows(shared=shared, source=labels.join(resources, labels.c.name == resources.c.name))
        ordered: tuple[ColumnElement[str], ...] = (labels.c.create_time, labels.c.name)
        query = query.where(labels.c.kind == kind, _has(labels.c, names[0], equals))
    else:
        query, ordered = rows(shared=shared), (resources.c.create_time, resources.c.name)
        query = query.where(resources.c.kind == kind)
    for path in names[1:]:
        other = labels.alias()
        query = query.where(exists().where(other.c.name == resources.c.name, _has(other.c, path, equals)))
    for path in equals.keys() - names:
        query = query.where(_column(path) == equals[path])
    if after:
        query = query.where(tuple_(*ordered) < tuple_(*map(literal, _position(after))))
    return query.order_by(*(column.desc() for column in ordered)).limit(limit)


def unfinished(kind: str, terminal: Collection[str], *, shared: bool) -> SelectRows:
    """Every record whose state is not among `terminal`.

    In no order: asked for one, SQLite would walk through all that have ended instead of looking up those few.
    """
    return rows(shared=shared).where(is_unfinished(kind, terminal))


def is_unfinished(kind: str, terminal: Collection[str]) -> ColumnElement[bool]:
    """That a record of a kind is in none of some states: it is in a range between them, and each is looked up."""
    other, ends = resources.alias(), sorted(terminal)
    state = other.c.state
    between = [and_(state > low, state < high) for low, high in pairwise(ends)]
    ranges = [state < ends[0], *between, state > ends[-1]] if ends else [true()]
    names = [select(other.c.name).where(other.c.kind == kind, each, state.not_in(ends)) for each in ranges]
    return resources.c.name.in_(union_all(*names))


def total(kind: str, path: str, owner: str) -> Select[float]:
    """The sum of a number that the documents of one owner's records have."""
    number = resources.c.document[_check(path)].as_float()
    return select(func.coalesce(func.sum(number), 0.0)).where(resources.c.kind == kind, resources.c.owner == owner)


def left_since(name: str, create_time: str, revision: int) -> SelectRows:
    """The last versions of the states that a record has left after a revision, oldest first."""
    found = select(passed.c.revision, passed.c.document).where(
        passed.c.name == name, passed.c.create_time == create_time, passed.c.revision > revision
    )
    return found.order_by(passed.c.revision)


def _has(columns: Any, path: str, equals: Mapping[str, str]) -> ColumnElement[bool]:
    _check(path)
    return and_(columns.key == path.removeprefix(_LABEL), columns.value == equals[path])


def _column(path: str) -> ColumnElement[str]:
    if path in _COLUMNS:
        return resources.c[path]
    column: ColumnElement[str] = resources.c.document[_check(path)].as_string()
    return column


def _check(path: str) -> tuple[str, ...]:
    parts = tuple(path.split("."))
    if '"' in path or not all(parts):
        raise invalid_field("filter", f"{path!r} is not a path into a document, such as labels.sample")
    return parts


def _position(cursor: str) -> tuple[str, str]:
    moment, bar, name = cursor.partition("|")
    if not bar:
        raise BeamwireError(Reason.INVALID_PAGE_TOKEN, f"{cursor!r} does not say where a page ended")
    return moment, name
