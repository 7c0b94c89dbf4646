"""NNG's own caches, as pynng makes them easy to write. Their ends are ours, which are faster than the library's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pynng
from pynng import _nng

from beamwire.mesh.identity.credentials import BUNDLE_FILE, CHAIN_FILE, KEY_FILE

Tell = Callable[[int, int], None]


def byte_cache(tell: Tell, credentials: Path | None) -> None:
    """Every message through `recv()` and `send()`."""
    pull, push = pynng.Pull0(**_options(credentials)), pynng.Push0(**_options(credentials))
    _listen(tell, pull, push, credentials)
    while True:
        push.send(pull.recv())


def device(tell: Tell, credentials: Path | None) -> None:
    """`nng_device`: the library's forwarder in C."""
    pull = pynng.Pull0(opener=_nng.lib.nng_pull0_open_raw, **_options(credentials))
    push = pynng.Push0(opener=_nng.lib.nng_push0_open_raw, **_options(credentials))
    _listen(tell, pull, push, credentials)
    raise ConnectionError(f"nng_device ended with {_nng.lib.nng_device(pull.socket, push.socket)}")


def _listen(tell: Tell, pull: pynng.Socket, push: pynng.Socket, credentials: Path | None) -> None:
    url = "tls+tcp://127.0.0.1:0" if credentials else "tcp://127.0.0.1:0"
    ports = [int(str(side.listen(url).local_address).rpartition(":")[2]) for side in (pull, push)]
    tell(*ports)


def _options(credentials: Path | None) -> dict[str, pynng.TLSConfig]:
    if credentials is None:
        return {}
    config = pynng.TLSConfig(
        pynng.TLSConfig.MODE_SERVER,
        ca_string=(credentials / BUNDLE_FILE).read_text(),
        own_key_string=(credentials / KEY_FILE).read_text(),
        own_cert_string=(credentials / CHAIN_FILE).read_text(),
        auth_mode=pynng.TLSConfig.AUTH_MODE_REQUIRED,
    )
    return {"tls_config": config}
