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
    def of(cls, error: BeamwireError | OSError) -> Failure:
        """Keep what is worth keeping of an error; what the system refused (a full disk, say) is LAUNCH_FAILED."""
        if isinstance(error, OSError):
            return cls(reason=Reason.LAUNCH_FAILED.name, message=str(error))
        return cls(reason=error.reason.name, message=error.message, metadata=dict(error.metadata))

    def to_error(self) -> BeamwireError:
        """Return the error that was kept."""
        return BeamwireError(Reason[self.reason], self.message, metadata=self.metadata)
