"""What the tests of deploy/ share: that commands and settings named there exist."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import pytest

from beamwire.mesh.config import ENV_PREFIX, load
from beamwire.services.cli import main
from beamwire.services.config import FacilitySettings

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
# Settings of the commands themselves, and of the units.
OTHERS = {"BEAMWIRE_FACILITY_DIR", "BEAMWIRE_SERVE_OPTIONS"}


def check_command(arguments: Sequence[str]) -> None:
    """Fail unless `beamwired` would take these arguments."""
    command: click.Command = main
    context = click.Context(main, info_name="beamwired")
    rest = list(arguments)
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None, f"there is no command {name} in: beamwired {shlex.join(arguments)}"
        command, context = found, click.Context(found, parent=context, info_name=name)
    # Whether a file is there is not asked.
    command.make_context(command.name, rest, parent=context.parent, resilient_parsing=False)


def check_settings(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> FacilitySettings:
    """Fail unless each variable is a setting, and all together are ones that a facility can have."""
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)
    given = {name: value for name, value in environment.items() if name.startswith(ENV_PREFIX) and name not in OTHERS}
    known = set(_keys(FacilitySettings))
    for name, value in given.items():
        assert name.removeprefix(ENV_PREFIX).lower().replace("__", ".") in known, f"{name} is no setting"
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BEAMWIRE_TRUST_DOMAIN", given.get("BEAMWIRE_TRUST_DOMAIN", "facility.test"))
    return load(FacilitySettings, None)


def _keys(model, prefix=""):
    for name, field in model.model_fields.items():
        yield prefix + name
        if hasattr(field.annotation, "model_fields"):
            yield from _keys(field.annotation, f"{prefix}{name}.")
