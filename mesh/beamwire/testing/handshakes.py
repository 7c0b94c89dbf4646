"""Two members meet, over gRPC and on the data plane: whether they believe each other."""

from __future__ import annotations

import socket
import ssl
import threading
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.rpc.server import Server


async def check_health(server: Credentials, client: Credentials) -> int:
    """Ask a server of one member for its health as another member; the status, or the error of the call."""
    serving = Server(server, services=[])
    port = await serving.start()
    try:
        async with connect(f"127.0.0.1:{port}", client) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
            return int(answer.status)
    finally:
        await serving.stop(0)


def shake_hands(server: Credentials, client: Credentials) -> SpiffeId:
    """Both sides of a handshake of the data plane; who the server takes the client for."""
    near, far = socket.socketpair()
    failures: list[Exception] = []

    def dial() -> None:
        try:
            with client.client_context().wrap_socket(far, server_hostname="localhost") as connection:
                connection.recv(1)
        except (ssl.SSLError, OSError) as error:
            failures.append(error)

    dialling = threading.Thread(target=dial)
    dialling.start()
    try:
        with server.server_context().wrap_socket(near, server_side=True) as connection:
            return server.peer_identity(connection)
    finally:
        near.close()
        dialling.join()
        far.close()
        if failures:
            raise failures[0]
