"""Settings from a TOML file and the environment, refused with the file, the key and the nearest known key."""

import difflib
import os
import tomllib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason

ENV_PREFIX = "BEAMWIRE_"

_file: ContextVar[Path | None] = ContextVar("_file", default=None)


class Settings(BaseSettings):
    """The base of every settings class: arguments, then the environment, then the file, then defaults.

    `BEAMWIRE_SERVER__ADDRESS` is the key `server.address`. Unknown keys are refused; nested classes derive from
    `Section`.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, environment, file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=_file.get())


class Section(BaseModel):
    """A table of the file: the base of what a Settings class nests."""

    model_config = ConfigDict(extra="forbid", frozen=True)


C = TypeVar("C", bound=Settings)


def load(cls: type[C], path: Path | None) -> C:
    """The settings in `path` (None: no file) and the environment.

    INVALID_FIELD with one violation for each wrong key, and a message that names the file or variable, the key, what
    is wrong with it and, for an unknown key, the nearest known one.
    """
    if path is not None:
        _check_syntax(path)
    token = _file.set(path)
    try:
        return cls()
    except ValidationError as error:
        violations = [_violation(cls, details) for details in error.errors()]
        places = [_place(path, details) for details in error.errors()]
        lines = [f"{place}: {v.field}: {v.description}" for place, v in zip(places, violations, strict=True)]
        raise BeamwireError(Reason.INVALID_FIELD, "\n".join(lines), violations=violations) from None
    finally:
        _file.reset(token)


S = TypeVar("S", bound=Section)


def read(model: type[S], path: Path) -> S:
    """What one TOML file says, which the environment does not touch; INVALID_FIELD with a message as that of `load`."""
    document = _check_syntax(path)
    try:
        return model.model_validate(document)
    except ValidationError as error:
        violations = [_violation(model, details) for details in error.errors()]
        lines = [f"{path}: {v.field}: {v.description}" for v in violations]
        raise BeamwireError(Reason.INVALID_FIELD, "\n".join(lines), violations=violations) from None


def _check_syntax(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, f"cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise _unreadable(path, f"is not TOML: {error}") from None


def _unreadable(path: Path, problem: str) -> BeamwireError:
    return BeamwireError(Reason.INVALID_FIELD, f"{path} {problem}", metadata={"path": str(path)})


def _place(path: Path | None, details: ErrorDetails) -> str:
    """Where the wrong value stands: the environment wins over the file, and a missing key belongs in the file."""
    keys = [str(part) for part in details["loc"]]
    for length in range(len(keys), 0, -1):
        variable = ENV_PREFIX + "__".join(keys[:length]).upper()
        if any(name.upper() == variable for name in os.environ):
            return f"environment variable {variable}"
    return str(path) if path is not None else "settings"


def _violation(cls: type[BaseModel], details: ErrorDetails) -> FieldViolation:
    key = ".".join(str(part) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, list(_keys(cls)), n=1, cutoff=0.5)
        return FieldViolation(key, "unknown key" + (f"; did you mean {near[0]}?" if near else ""))
    if details["type"] == "missing":
        return FieldViolation(key, "is required and missing")
    if details["type"] == "value_error":  # our own words, which say it all
        return FieldViolation(key, details["msg"].removeprefix("Value error, "))
    return FieldViolation(key, f"{details['msg']}, not {details['input']!r}")


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from _keys(candidate, f"{prefix}{name}.")
