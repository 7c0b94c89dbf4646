"""For which of our programs interpreters are kept ready, and what these have imported."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

from beamwire.mesh.spares import PipedSpare, ShimSpare, Spares
from beamwire.services.request.preflight import MOST_LINE_BYTES

_STREAMER: Final = "beamwire.services.streamer"
_STREAMED: Final = (
    f"{_STREAMER}.parallel",
    f"{_STREAMER}.sources.generated",
    f"{_STREAMER}.sources.hdf5",
    f"{_STREAMER}.serializers.native",
)
# The cache brings all that it needs. The streamer finds its parts by the names that a configuration gives.
_JOBS: Final[Mapping[str, tuple[str, ...]]] = {
    _STREAMER: (
        *_STREAMED,
        f"{_STREAMER}.run",
        f"{_STREAMER}.handlers.buffer",
        "beamwire.mesh.identity.membership",
        "beamwire.mesh.reporting",
    )
}
_CACHES: Final = {"beamwire.services.buffer.cache": ("beamwire.services.buffer.cache.server",)}
_CHECKS: Final = {_STREAMER: (*_STREAMED, f"{_STREAMER}.check")}


def for_jobs() -> Spares[ShimSpare]:
    """Return those that run streamers."""
    return Spares(_JOBS, ShimSpare.make)


def for_caches() -> Spares[ShimSpare]:
    """Return those that run caches."""
    return Spares(_CACHES, ShimSpare.make)


def for_checks() -> Spares[PipedSpare]:
    """Return those that check datasets."""
    return Spares(_CHECKS, partial(PipedSpare.make, limit=MOST_LINE_BYTES))
