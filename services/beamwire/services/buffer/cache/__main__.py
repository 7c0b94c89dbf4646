"""`python -m beamwire.services.buffer.cache <directory>`: one cache process."""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

from beamwire.mesh import telemetry
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.identity.credentials import CHAIN_FILE, Credentials
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.cache.nodes import own_name
from beamwire.services.buffer.cache.server import CacheServer


def main() -> int:
    """Run the cache that the directory describes. Exit code 0 if it was stopped, 1 if it could not begin."""
    parser = argparse.ArgumentParser(prog="beamwire.services.buffer.cache", description=main.__doc__)
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory.resolve()
    os.umask(0o077)
    telemetry.setup_logging("cache")
    _raise_file_limit()
    try:
        config = settle(CacheConfig.load(directory), directory, os.environ)
        credentials = _credentials(config, directory)
    except BeamwireError as error:
        print(f"the cache cannot begin: {error}", file=sys.stderr)
        return 1
    tracing = telemetry.setup("cache", trace_dir=config.trace_dir, otlp_endpoint=config.otlp_endpoint)
    try:
        with telemetry.span(
            telemetry.SPAN_CACHE_RUN,
            parent=config.traceparent or None,
            attributes={telemetry.ATTR_BUFFER: config.buffer, telemetry.ATTR_EPOCH: config.epoch},
        ):
            asyncio.run(_serve(config, directory, credentials))
    finally:
        tracing.shutdown()
    return 0


def _raise_file_limit() -> None:
    """Each peer is an open file, and the usual limit is lower than the number of peers that are let in."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def settle(config: CacheConfig, directory: Path, environment: Mapping[str, str]) -> CacheConfig:
    """Return what a cache on another host is told, with what only that host knows; CACHE_FAILED if it is none of ours.

    Any other is returned as it is.
    """
    if not config.distant:
        return config
    name = own_name(config.nodes)
    places = {
        "credentials": environment.get("BEAMWIRE_CREDENTIALS_DIR"),
        "join_token_file": environment.get("BEAMWIRE_JOIN_TOKEN_FILE"),
        "trace_dir": environment.get("BEAMWIRE_TRACE_DIR"),
    }
    found = {key: Path(text) for key, text in places.items() if text}
    ring = directory / config.ring if config.ring is not None else None
    return config.model_copy(update={"host": name, "advertise": name, "ring": ring, **found})


def _credentials(config: CacheConfig, directory: Path) -> Credentials | None:
    if config.transport != "tls+tcp":
        return None
    place = config.credentials or directory / "credentials"
    token_file = config.join_token_file
    if token_file is None or (place / CHAIN_FILE).exists():
        return Credentials.load(place)
    # Brings gRPC with it, which the cache needs for nothing else.
    from beamwire.mesh.identity.enrollment import STARTING_PATIENCE, JoinToken, enroll

    try:
        return enroll(JoinToken.parse(token_file.read_text()), place, patience=STARTING_PATIENCE)
    finally:
        # It can be used once; what is left of it is only a danger.
        token_file.unlink(missing_ok=True)


async def _serve(config: CacheConfig, directory: Path, credentials: Credentials | None) -> None:
    await CacheServer(config, directory, credentials).run()


if __name__ == "__main__":
    sys.exit(main())
