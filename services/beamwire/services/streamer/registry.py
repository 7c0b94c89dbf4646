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
        "DectrisEventSource": f"{_HERE}.sources.dectris:DectrisEventSource",
        "HDF5EventSource": f"{_HERE}.sources.hdf5:HDF5EventSource",
        "InternalEventSource": f"{_HERE}.sources.generated:InternalEventSource",
        "Psana1EventSource": f"{_HERE}.sources.psana1:Psana1EventSource",
        "Psana2EventSource": f"{_HERE}.sources.psana2:Psana2EventSource",
        "ReplayEventSource": f"{_HERE}.sources.replay:ReplayEventSource",
        "SyntheticEventSource": f"{_HERE}.sources.synthetic:SyntheticEventSource",
        "SyntheticTofEventSource": f"{_HERE}.sources.synthetic_tof:SyntheticTofEventSource",
        "XfelEventSource": f"{_HERE}.sources.xfel:XfelEventSource",
    },
    Kind.DATA_SOURCE: {
        "ConstValue": f"{_HERE}.sources.generated:ConstValue",
        "DectrisImage": f"{_HERE}.sources.dectris_data:DectrisImage",
        "DectrisMetadata": f"{_HERE}.sources.dectris_data:DectrisMetadata",
        "DectrisTrigger": f"{_HERE}.sources.dectris_data:DectrisTrigger",
        "EventId": f"{_HERE}.sources.generated:EventId",
        "FloatValue": f"{_HERE}.sources.generated:FloatValue",
        "GenericRandomNumpyArray": f"{_HERE}.sources.generated:GenericRandomNumpyArray",
        "HDF5Dataset": f"{_HERE}.sources.hdf5:HDF5Dataset",
        "IntValue": f"{_HERE}.sources.generated:IntValue",
        "Psana1DetectorInterface": f"{_HERE}.sources.psana1:Psana1DetectorInterface",
        "Psana1Timestamp": f"{_HERE}.sources.psana1:Psana1Timestamp",
        "Psana2DetectorInterface": f"{_HERE}.sources.psana2_data:Psana2DetectorInterface",
        "Psana2HsdPeaks": f"{_HERE}.sources.psana2_hsd:Psana2HsdPeaks",
        "Psana2HsdWaveforms": f"{_HERE}.sources.psana2_hsd:Psana2HsdWaveforms",
        "Psana2RunInfo": f"{_HERE}.sources.psana2_data:Psana2RunInfo",
        "Psana2Timestamp": f"{_HERE}.sources.psana2_data:Psana2Timestamp",
        "ReplayArray": f"{_HERE}.sources.replay:ReplayArray",
        "SourceIdentifier": f"{_HERE}.sources.generated:SourceIdentifier",
        "SyntheticDetector": f"{_HERE}.sources.synthetic:SyntheticDetector",
        "SyntheticPeaks": f"{_HERE}.sources.synthetic:SyntheticPeaks",
        "SyntheticTofFragments": f"{_HERE}.sources.synthetic_tof:SyntheticTofFragments",
        "SyntheticTofHits": f"{_HERE}.sources.synthetic_tof:SyntheticTofHits",
        "SyntheticTofWaveforms": f"{_HERE}.sources.synthetic_tof:SyntheticTofWaveforms",
        "XfelControl": f"{_HERE}.sources.xfel_data:XfelControl",
        "XfelDetector": f"{_HERE}.sources.xfel_detector:XfelDetector",
        "XfelInstrument": f"{_HERE}.sources.xfel_data:XfelInstrument",
        "XfelModules": f"{_HERE}.sources.xfel_detector:XfelModules",
        "XfelPulseId": f"{_HERE}.sources.xfel_data:XfelPulseId",
        "XfelTrainId": f"{_HERE}.sources.xfel_data:XfelTrainId",
    },
    Kind.STAGE: {
        "AduToPhotons": f"{_HERE}.stages.photons:AduToPhotons",
        "Assemble": f"{_HERE}.stages.assembly:Assemble",
        "AzimuthalIntegration": f"{_HERE}.stages.azimuthal:AzimuthalIntegration",
        "BatchProcessingPipeline": f"{_HERE}.stages.batching:BatchProcessingPipeline",
        "Bin": f"{_HERE}.stages.roi:Bin",
        "Calibrate": f"{_HERE}.stages.calibration:Calibrate",
        "CommonMode": f"{_HERE}.stages.common_mode:CommonMode",
        "Covariance": f"{_HERE}.stages.covariance:Covariance",
        "Crop": f"{_HERE}.stages.roi:Crop",
        "Histogram": f"{_HERE}.stages.histograms:Histogram",
        "HitVeto": f"{_HERE}.stages.hits:HitVeto",
        "Mask": f"{_HERE}.stages.masks:Mask",
        "PeakFinder8": f"{_HERE}.stages.peakfinder:PeakFinder8",
        "PeaknetPreprocessing": f"{_HERE}.stages.peaknet:PeaknetPreprocessing",
        "PeaknetPreprocessingPipeline": f"{_HERE}.stages.peaknet:PeaknetPreprocessingPipeline",
        "RunningHistogram": f"{_HERE}.stages.histograms:RunningHistogram",
        "RunningSums": f"{_HERE}.stages.sums:RunningSums",
        "Sparsify": f"{_HERE}.stages.sparsify:Sparsify",
        "TofHits": f"{_HERE}.stages.tof:TofHits",
        "ZeroSuppress": f"{_HERE}.stages.zero_suppression:ZeroSuppress",
    },
    Kind.SERIALIZER: {
        "DectrisStreamV2Serializer": f"{_HERE}.serializers.dectris:DectrisStreamV2Serializer",
        "HDF5BinarySerializer": f"{_HERE}.serializers.hdf5:HDF5BinarySerializer",
        "MsgpackSerializer": f"{_HERE}.serializers.msgpack:MsgpackSerializer",
        "NativeSerializer": f"{_HERE}.serializers.native:NativeSerializer",
        "NpzSerializer": f"{_HERE}.serializers.npz:NpzSerializer",
        "SimplonBinarySerializer": f"{_HERE}.serializers.simplon:SimplonBinarySerializer",
    },
    Kind.HANDLER: {
        "BinaryDataStreamingDataHandler": f"{_HERE}.handlers.sockets:BinaryDataStreamingDataHandler",
        "BinaryFileWritingDataHandler": f"{_HERE}.handlers.files:BinaryFileWritingDataHandler",
        "BufferDataHandler": f"{_HERE}.handlers.buffer:BufferDataHandler",
    },
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
    """The class registered under a name; BeamwireError INVALID_FIELD if there is none."""
    if path := BUILT_IN[kind].get(name):
        return resolve_name(path)
    for entry in metadata.entry_points(group=kind, name=name):
        return entry.load()
    raise BeamwireError(Reason.INVALID_FIELD, f"no {kind.words} is called {name!r}; {nearest(name, known_names(kind))}")
