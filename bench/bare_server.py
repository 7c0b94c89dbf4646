"""The baseline of the control suite: a gRPC server that echoes bytes over mutual TLS and does nothing else.

`python -m bench.bare_server CREDENTIALS` prints its port and serves until it is ended.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import grpc

from beamwire.mesh.identity.credentials import Credentials


async def _echo(request: bytes, _context: object) -> bytes:
    return request


async def _serve(directory: Path) -> None:
    server = grpc.aio.server()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(_echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Bare", {"Echo": handler}),))
    port = server.add_secure_port("127.0.0.1:0", Credentials.load(directory).server_credentials())
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
