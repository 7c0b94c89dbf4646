"""What stages ask of the arrays that come to them: the field that a parameter names, and that it is as they need it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from beamwire.mesh.errors import invalid_field
from beamwire.services.streamer.components import FieldSpec
from beamwire.services.streamer.registry import nearest

NUMBERS = "biuf"
"""The kinds of numpy's element types that are numbers."""


def pick(
    fields: Sequence[FieldSpec],
    name: str,
    *,
    parameter: str = "field",
    kinds: str = NUMBERS,
    ndim: Collection[int] | None = None,
    ragged: bool | None = False,
) -> FieldSpec:
    """The field of this name.

    `ndim` are the numbers of axes that one event may have; `ragged` says whether its length must vary, None if either
    will do. Raises BeamwireError INVALID_FIELD naming the parameter that asked for it.
    """
    found = next((spec for spec in fields if spec.name == name), None)
    if found is None:
        known = [spec.name for spec in fields]
        raise invalid_field(parameter, f"there is no array {name!r} here; {nearest(name, known)}")
    if found.dtype.kind not in kinds:
        raise invalid_field(parameter, f"{name} holds {found.dtype}, which this stage cannot use")
    if ragged is not None and found.ragged != ragged:
        what = "its length varies from event to event" if found.ragged else "it has the same length in every event"
        raise invalid_field(parameter, f"{name} does not fit: {what}")
    if ndim is not None and len(found.shape) not in ndim:
        wanted = " or ".join(map(str, sorted(ndim)))
        raise invalid_field(parameter, f"{name} has the shape {found.shape}; this stage needs {wanted} axes")
    return found


def behind(
    fields: Sequence[FieldSpec], *made: FieldSpec, without: Collection[str] = (), parameter: str = "output"
) -> Sequence[FieldSpec]:
    """The fields behind a stage that makes some, which take the place of those of the same name in `without`.

    Raises BeamwireError INVALID_FIELD if a name is taken.
    """
    left = [spec for spec in fields if spec.name not in without]
    taken = {spec.name for spec in left}
    for spec in made:
        if spec.name in taken:
            raise invalid_field(parameter, f"there is an array {spec.name!r} already; choose another name")
    # What is replaced stays where it was.
    by_name = {spec.name: spec for spec in made}
    order = [by_name.pop(spec.name, spec) for spec in fields if spec.name in by_name or spec.name not in without]
    return [*order, *by_name.values()]
