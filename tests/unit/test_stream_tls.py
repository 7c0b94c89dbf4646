"""A TLS socket whose peer is gone before the handshake: the handshake says so, and nothing stays open."""

from __future__ import annotations

import gc
import socket
import ssl
import struct

import pytest

from beamwire.mesh.stream import tls


def test_a_peer_that_resets_before_the_handshake_leaves_no_socket_open():
    context = ssl.create_default_context()
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        # What is unread makes Python's own look at a lost connection fail, and not only find it lost.
        theirs.sendall(b"x")
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        secured = tls.secure(context, ours, server_hostname="localhost")
        with secured, pytest.raises((ConnectionError, ssl.SSLError)):
            secured.settimeout(5)
            secured.do_handshake()
    del secured, ours
    # A socket that was left open would warn now, and a warning fails the test.
    gc.collect()
