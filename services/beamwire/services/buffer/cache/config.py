"""What a cache process is told when it starts: `cache.json` in its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from beamwire.mesh.errors import invalid_field
from beamwire.mesh.stream.connect import Transport

CONFIG_FILE: Final = "cache.json"


class CacheConfig(BaseModel):
    """One buffer's cache.

    `producers` and `consumers` are the SPIFFE ids that are let in. `credentials` is a directory; if it holds none yet,
    the cache enrols with the token in `join_token_file`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    buffer: str
    transfer: str = ""
    epoch: int = Field(default=1, ge=0, lt=2**32)
    capacity_bytes: int = Field(default=256 * 1024 * 1024, gt=0)
    capacity_frames: int = Field(default=1024, gt=0)
    producer_count: int = Field(default=1, gt=0)
    producers: frozenset[str] = frozenset()
    consumers: frozenset[str] = frozenset()
    transport: Transport = "tls+tcp"
    host: str = "127.0.0.1"
    advertise: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, lt=65536)
    credentials: Path | None = None
    join_token_file: Path | None = None
    trace_dir: Path | None = None
    otlp_endpoint: str = ""
    traceparent: str = ""

    @classmethod
    def load(cls, directory: Path) -> Self:
        """The configuration in a directory; BeamwireError INVALID_FIELD says what is wrong with it."""
        path = directory / CONFIG_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise invalid_field(CONFIG_FILE, f"{path} cannot be read: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or CONFIG_FILE
            raise invalid_field(place, f"{first['msg']} in {path}") from error
