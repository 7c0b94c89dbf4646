"""A failure as a fact to be stored: what a resource that failed keeps of the error."""

from __future__ import annotations

from pydantic import BaseModel

from beamwire.mesh.errors import BeamwireError, Reason


class Failure(BaseModel, frozen=True):
    """Why a resource failed: the reason's name, a sentence for a person, and facts for a program."""

    reason: str
    message: str
    metadata: dict[str, str] = {}

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Keep what is worth keeping of an error."""
        known = as_error(error)
        return cls(reason=known.reason.name, message=known.message, metadata=dict(known.metadata))

    def to_error(self) -> BeamwireError:
        """Return the error that was kept."""
        return BeamwireError(Reason[self.reason], self.message, metadata=self.metadata)


def as_error(error: Exception) -> BeamwireError:
    """Return what an exception means to somebody outside.

    What the system refused (a full disk, say) is LAUNCH_FAILED; anything unforeseen is INTERNAL and tells nothing.
    """
    if isinstance(error, BeamwireError):
        return error
    if isinstance(error, OSError):
        return BeamwireError(Reason.LAUNCH_FAILED, str(error))
    return BeamwireError(Reason.INTERNAL, "the service has a fault; its log has the details")
