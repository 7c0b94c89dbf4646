"""The `beamwired` command: make a facility, check it, serve it, let members in, look after its authority, clean up."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from beamwire.services.cli.authority import authority
from beamwire.services.cli.common import Commands
from beamwire.services.cli.database import db
from beamwire.services.cli.doctor import doctor, health
from beamwire.services.cli.facility import facility
from beamwire.services.cli.gc import gc
from beamwire.services.cli.hosts import host
from beamwire.services.cli.ledger import ledger
from beamwire.services.cli.member import member
from beamwire.services.cli.policy import policy
from beamwire.services.cli.running import clean, serve, validate
from beamwire.services.cli.token import token

__all__ = ["main"]


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done; 1 it failed, or is refused; 2 the command or what it was given is wrong.",
)
@click.version_option(package_name="beamwire", prog_name="beamwired")
def main() -> None:
    """Run a Beamwire facility: the Request, Job, Buffer and Certificate services.

    \b
    First steps:
      beamwired facility init         make one in ./facility
      beamwired serve                 serve it
      beamwired token user/alice      let alice in: she runs `beamwire enroll`
    """


for _command in (
    facility,
    serve,
    validate,
    token,
    member,
    policy,
    ledger,
    authority,
    db,
    host,
    clean,
    doctor,
    health,
    gc,
):
    main.add_command(_command)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL: `eval "$(beamwired completion bash)"`."""
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, "beamwired", "_BEAMWIRED_COMPLETE").source())
