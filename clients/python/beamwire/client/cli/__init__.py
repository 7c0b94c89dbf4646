"""The `beamwire` command: each module holds one group of subcommands."""

from beamwire.client.cli.app import main

__all__ = ["main"]
