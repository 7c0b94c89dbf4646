"""psana2's event source and detectors as the tests of them open them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from beamwire.services.streamer.components import Share, SourceContext
from beamwire.services.streamer.sources.psana2 import Psana2EventSource
from beamwire.services.streamer.sources.psana2_data import Psana2DetectorInterface

OpenPsana2 = Callable[..., Psana2EventSource]


@contextmanager
def opening() -> Iterator[OpenPsana2]:
    """Opens sources, and closes them at the end."""
    sources: list[Psana2EventSource] = []

    def open_psana2(identifier: str, share: Share | None = None, max_events: int = 0, **more: Any) -> Psana2EventSource:
        pause = more.pop("pause", None)
        context = SourceContext(identifier, share or Share(), max_events, **({"pause": pause} if pause else {}))
        sources.append(Psana2EventSource(Psana2EventSource.Parameters(**more), context))
        return sources[-1]

    yield open_psana2
    for source in sources:
        source.close()


def detector(source: Psana2EventSource, name: str, fields: Any = None, **more: Any) -> Psana2DetectorInterface:
    parameters = Psana2DetectorInterface.Parameters(psana_name=name, psana_fields=fields, **more)
    return Psana2DetectorInterface(parameters, source)
