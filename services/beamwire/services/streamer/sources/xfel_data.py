"""What to take from a train of the European XFEL besides its detectors: slow values, what instruments sent, ids."""

from __future__ import annotations

from typing import Annotated, Any

import h5py
import numpy as np
from pydantic import Field

from beamwire.mesh.errors import invalid_field
from beamwire.services.streamer.components import Array, ComponentParameters, Event, EventSource
from beamwire.services.streamer.sources.hdf5_rows import as_text, decoded
from beamwire.services.streamer.sources.xfel import TrainRows, XfelEventSource

_SOURCE = "XfelEventSource"


class XfelControl:
    """A slow value, one for each train: a number, an array, or a text. A train without it lacks it."""

    event_source = _SOURCE
    ragged = False

    class Parameters(ComponentParameters):
        """The source, `SA1_XTD2_XGM/DOOCS/MAIN`, and the key, `beamPosition.ixPos`, with or without `.value`."""

        source: str
        key: str

    def __init__(self, parameters: XfelControl.Parameters, source: EventSource) -> None:
        assert isinstance(source, XfelEventSource)
        key = source.key(parameters.source, parameters.key)
        if not key.is_control:
            raise invalid_field("source", f"{parameters.source} has no slow values; see XfelInstrument")
        self._name = f"{parameters.source} {key.key}"
        self._rows = TrainRows(key, source.train_ids)
        self._text: np.dtype[Any] | None = None
        if h5py.check_string_dtype(key.dtype) is not None and key.dtype.hasobject:
            longest = max((len(text) for text in key.ndarray().ravel()), default=1)
            self._text = np.dtype(f"U{max(longest, 1)}")
        self.unit = key.units or ""

    def read(self, event: Event) -> Array | None:
        """The value at the train, in the element type of the file."""
        values = self._rows.read_one(event.data.train, 0)
        if values is None or self._text is None:
            return values
        return as_text(decoded(values), self._text, self._name)


class XfelInstrument:
    """What an instrument sent in a train: one entry as it is; ragged, (entries, …), if trains have several.

    Of a table, `members` are its columns, along the last axis if there are several. With `drop_nan` the entries are put
    end to end, without those whose first member is NaN: the hits of a delay line detector become ragged rows. Every
    pulse of a train has what the train has.
    """

    event_source = _SOURCE

    class Parameters(ComponentParameters):
        """The source, `SQS_REMI_DLD6/DET/TOP:output`, and the key, `rec.hits`; what of it."""

        source: str
        key: str
        members: Annotated[list[str], Field(min_length=1)] | str | None = None
        drop_nan: bool = False

    def __init__(self, parameters: XfelInstrument.Parameters, source: EventSource) -> None:
        assert isinstance(source, XfelEventSource)
        key = source.key(parameters.source, parameters.key)
        if key.is_control:
            raise invalid_field("source", f"{parameters.source} has slow values; see XfelControl")
        members = parameters.members
        self._one_member = members if isinstance(members, str) else None
        self._members = [members] if isinstance(members, str) else members or []
        self._drop = parameters.drop_nan
        self._rows = TrainRows(key, source.train_ids)
        _check_members(self._rows.dtype, self._members, parameters)
        self._one = int(self._rows.counts.max(initial=0)) <= 1
        self.ragged = self._drop or not self._one
        self.unit = key.units or ""

    def read(self, event: Event) -> Array | None:
        """The entries of the train; None if it has none."""
        entries = self._rows.read(event.data.train)
        if entries is None:
            return None
        if self._drop:
            entries = entries.reshape(-1, *entries.shape[2:]) if entries.ndim > 1 else entries
            first = entries[self._members[0]] if self._members else entries
            good = ~np.isnan(first)
            entries = entries[good if good.ndim == 1 else good.all(axis=tuple(range(1, good.ndim)))]
        elif self._one:
            entries = entries[0]
        if self._one_member is not None:
            return np.ascontiguousarray(entries[self._one_member])
        return np.stack([entries[name] for name in self._members], axis=-1) if self._members else entries


class XfelTrainId:
    """The id of the train: uint64, scalar."""

    event_source = _SOURCE
    unit = ""
    ragged = False

    class Parameters(ComponentParameters):
        """None."""

    def __init__(self, parameters: XfelTrainId.Parameters, source: EventSource) -> None:
        del parameters
        assert isinstance(source, XfelEventSource)
        self._ids = source.train_ids

    def read(self, event: Event) -> Array:
        """The id."""
        return np.array(self._ids[event.data.train])


class XfelPulseId:
    """The id of the pulse in its train: uint64, scalar; where the events are pulses."""

    event_source = _SOURCE
    unit = ""
    ragged = False

    class Parameters(ComponentParameters):
        """None."""

    def __init__(self, parameters: XfelPulseId.Parameters, source: EventSource) -> None:
        del parameters
        assert isinstance(source, XfelEventSource)
        if not source.pulses:
            raise invalid_field("type", "trains have many pulse ids; set events: pulses in the event source")

    def read(self, event: Event) -> Array:
        """The id."""
        return np.array(event.data.pulse, dtype=np.uint64)


def _check_members(dtype: np.dtype[Any], members: list[str], parameters: XfelInstrument.Parameters) -> None:
    names = dtype.names or ()
    where = f"{parameters.source} {parameters.key}"
    if unknown := [name for name in members if name not in names]:
        has = f"; it has {', '.join(names)}" if names else ": it is no table"
        raise invalid_field("members", f"{where} has no {unknown[0]!r}{has}")
    if names and not members:
        raise invalid_field("members", f"{where} is a table of {', '.join(names)}; say which")
    first = dtype[members[0]].base if members else dtype
    if parameters.drop_nan and first.kind != "f":
        raise invalid_field("drop_nan", f"{members[0] if members else where} holds {first}, which is never NaN")
