"""The baseline of the control suite: a gRPC server that answers over mutual TLS and does nothing else.

`python -m bench.bare_server CREDENTIALS ANSWERS` prints its port and serves until it is ended. Each file of ANSWERS is
an answer, under the name of its method: `beamwire.job.v1.JobService-GetJob`.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory

from beamwire.buffer.v1 import buffer_service_pb2
from beamwire.certificate.v1 import certificate_service_pb2
from beamwire.job.v1 import job_service_pb2
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.rpc.access import find_method
from beamwire.request.v1 import request_service_pb2

# The descriptors are found once they are imported.
_APIS = (buffer_service_pb2, certificate_service_pb2, job_service_pb2, request_service_pb2)


def _handler(path: str, answer: bytes) -> grpc.RpcMethodHandler[Any, Any]:
    """Reads the request and writes the answer, which is made already."""
    method = find_method(path)
    assert method is not None
    requests, answers = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
    message = answers.FromString(answer)

    async def handle(_request: object, _context: object) -> Any:
        return message

    return grpc.unary_unary_rpc_method_handler(handle, requests.FromString, answers.SerializeToString)


async def _serve(credentials: Path, answers: Path) -> None:
    server = grpc.aio.server()
    for file in answers.iterdir():
        service, _, method = file.name.partition("-")
        handlers = {method: _handler(f"/{service}/{method}", file.read_bytes())}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_secure_port("127.0.0.1:0", Credentials.load(credentials).server_credentials())
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), Path(sys.argv[2])))
