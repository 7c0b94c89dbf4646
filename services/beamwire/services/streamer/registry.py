"""Finds components by their names: the built-in ones in a table, those of others through entry points."""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterable
from importlib import metadata
from pkgutil import resolve_name
from typing import Any

from beamwire.mesh.errors import BeamwireError, Reason


class Kind(enum.StrEnum):
    """The kinds of components; the value is the group of the entry points."""

    EVENT_SOURCE = "beamwire.event_sources"
    DATA_SOURCE = "beamwire.data_sources"
    STAGE = "beamwire.stages"
    SERIALIZER = "beamwire.serializers"
    HANDLER = "beamwire.handlers"

    @property
    def words(self) -> str:
        """The kind in words."""
        return self.name.lower().replace("_", " ")


_HERE = "beamwire.services.streamer"

BUILT_IN: dict[Kind, dict[str, str]] = {
    Kind.EVENT_SOURCE: {
        "HDF5EventSource": f"{_HERE}.sources.hdf5:HDF5EventSource",
        "InternalEventSource": f"{_HERE}.sources.generated:InternalEventSource",
        "Psana2EventSource": f"{_HERE}.sources.psana2:Psana2EventSource",
        "SyntheticEventSource": f"{_HERE}.sources.synthetic:SyntheticEventSource",
    },
    Kind.DATA_SOURCE: {
        "ConstValue": f"{_HERE}.sources.generated:ConstValue",
        "EventId": f"{_HERE}.sources.generated:EventId",
        "FloatValue": f"{_HERE}.sources.generated:FloatValue",
        "GenericRandomNumpyArray": f"{_HERE}.sources.generated:GenericRandomNumpyArray",
        "HDF5Dataset": f"{_HERE}.sources.hdf5:HDF5Dataset",
        "IntValue": f"{_HERE}.sources.generated:IntValue",
        "Psana2DetectorInterface": f"{_HERE}.sources.psana2_data:Psana2DetectorInterface",
        "Psana2RunInfo": f"{_HERE}.sources.psana2_data:Psana2RunInfo",
        "Psana2Timestamp": f"{_HERE}.sources.psana2_data:Psana2Timestamp",
        "SourceIdentifier": f"{_HERE}.sources.generated:SourceIdentifier",
        "SyntheticDetector": f"{_HERE}.sources.synthetic:SyntheticDetector",
        "SyntheticPeaks": f"{_HERE}.sources.synthetic:SyntheticPeaks",
    },
    Kind.STAGE: {
        "BatchProcessingPipeline": f"{_HERE}.stages.batching:BatchProcessingPipeline",
    },
    Kind.SERIALIZER: {
        "HDF5BinarySerializer": f"{_HERE}.serializers.hdf5:HDF5BinarySerializer",
        "NativeSerializer": f"{_HERE}.serializers.native:NativeSerializer",
    },
    Kind.HANDLER: {
        "BinaryDataStreamingDataHandler": f"{_HERE}.handlers.sockets:BinaryDataStreamingDataHandler",
        "BinaryFileWritingDataHandler": f"{_HERE}.handlers.files:BinaryFileWritingDataHandler",
        "BufferDataHandler": f"{_HERE}.handlers.buffer:BufferDataHandler",
    },
}

# Names that LCLStreamer documents and this release does not have.
UNSUPPORTED: dict[Kind, dict[str, str]] = {
    Kind.EVENT_SOURCE: {
        "Psana1EventSource": "psana1 (LCLS-I) is not in this release; LCLS-II runs are read by Psana2EventSource",
    },
    Kind.DATA_SOURCE: {
        "Psana1DetectorInterface": "psana1 (LCLS-I) is not in this release; see Psana2DetectorInterface",
        "Psana1Timestamp": "psana1 (LCLS-I) is not in this release; see Psana2Timestamp",
    },
    Kind.STAGE: {
        "PeaknetPreprocessingPipeline": "padding for PeakNet is not in this release; batch here, pad where it is read",
    },
    Kind.SERIALIZER: {
        "SimplonBinarySerializer": "the Simplon layout is not in this release; see NativeSerializer",
    },
    Kind.HANDLER: {},
}


def known_names(kind: Kind) -> list[str]:
    """All names of a kind, sorted."""
    return sorted({*BUILT_IN[kind], *(entry.name for entry in metadata.entry_points(group=kind))})


def nearest(name: str, known: Iterable[str]) -> str:
    """Words that help with an unknown name: the nearest one, or all of them."""
    known = sorted(known)
    lower = {word.lower(): word for word in known}
    if matches := difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6):
        return f"did you mean {lower[matches[0]]}?"
    return f"known: {', '.join(known)}" if known else "there are none"


def find(kind: Kind, name: str) -> Any:
    """The class registered under a name.

    Raises BeamwireError UNSUPPORTED for what this release does not have, INVALID_FIELD for an unknown name.
    """
    if path := BUILT_IN[kind].get(name):
        return resolve_name(path)
    if why := UNSUPPORTED[kind].get(name):
        raise BeamwireError(Reason.UNSUPPORTED, f"{name}: {why}", metadata={"component": name})
    for entry in metadata.entry_points(group=kind, name=name):
        return entry.load()
    raise BeamwireError(Reason.INVALID_FIELD, f"no {kind.words} is called {name!r}; {nearest(name, known_names(kind))}")
