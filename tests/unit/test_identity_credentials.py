"""A member's files: their modes, renewal, damage, and the TLS connections made of them."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import ssl
import stat
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials, new_key_and_csr
from beamwire.mesh.identity.trust import Trust
from beamwire.testing.facility import Facility


@pytest.fixture
def facility(tmp_path: Path) -> Facility:
    return Facility(tmp_path / "facility")


def test_a_key_is_private_from_its_creation(facility: Facility) -> None:
    directory = facility.member("user/alice").directory
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in directory.iterdir()} == {
        "key.pem": 0o600,
        "chain.pem": 0o644,
        "bundle.pem": 0o644,
    }
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_credentials_know_who_they_are(facility: Facility) -> None:
    saved = facility.member("user/alice", lifetime=timedelta(hours=2))
    loaded = Credentials.load(saved.directory)
    assert loaded.identity == facility.id("user/alice")
    assert loaded.not_after == saved.not_after
    assert loaded.verifier.trust_domain == "facility.test"


def test_missing_credentials_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BeamwireError, match=r"key\.pem is missing: there are no credentials; enrol first") as caught:
        Credentials.load(tmp_path)
    assert caught.value.reason is Reason.CERTIFICATE_INVALID


@pytest.mark.parametrize("name", ["key.pem", "chain.pem", "bundle.pem"])
def test_a_damaged_file_is_refused_at_first_and_survived_later(
    facility: Facility, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    credentials = facility.member("user/alice")
    path = credentials.directory / name
    path.write_bytes(b"-----BEGIN NOTHING-----\n")
    with pytest.raises(BeamwireError, match="cannot be read"):
        Credentials.load(credentials.directory)
    with caplog.at_level(logging.WARNING):
        assert not credentials.reload()
    assert "credentials kept as they were" in caplog.text
    assert credentials.identity == facility.id("user/alice")
    credentials.client_context()


def test_a_key_and_a_chain_must_belong_together(facility: Facility) -> None:
    alice, bob = facility.member("user/alice"), facility.member("user/bob")
    shutil.copy(bob.directory / "key.pem", alice.directory / "key.pem")
    with pytest.raises(BeamwireError, match=r"chain\.pem does not belong to key\.pem; enrol again"):
        Credentials.load(alice.directory)


def test_saving_what_does_not_fit_changes_nothing(facility: Facility) -> None:
    credentials = facility.member("user/alice")
    before = {p.name: p.read_bytes() for p in credentials.directory.iterdir()}
    other_key, _ = new_key_and_csr()
    with pytest.raises(BeamwireError, match="does not belong"):
        Credentials.save(credentials.directory, other_key, before["chain.pem"], before["bundle.pem"])
    assert {p.name: p.read_bytes() for p in credentials.directory.iterdir()} == before


def test_a_save_that_was_cut_short_is_finished_by_the_next_reader(facility: Facility) -> None:
    old, new = facility.member("user/alice"), facility.member("user/alice")
    pending = old.directory / "pending"
    shutil.copytree(new.directory, pending)
    (pending / "key.pem").replace(old.directory / "key.pem")
    found = Credentials.load(old.directory)
    assert (old.directory / "chain.pem").read_bytes() == (new.directory / "chain.pem").read_bytes()
    assert found.not_after == new.not_after
    assert not pending.exists()


def test_readers_never_see_half_a_renewal(facility: Facility, caplog: pytest.LogCaptureFixture) -> None:
    credentials = facility.member("user/alice")
    done = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        while not done.is_set():
            try:
                Credentials.load(credentials.directory).check()
                credentials.channel_credentials()
            except (BeamwireError, OSError) as error:
                failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(50):
        facility.renew(credentials)
    done.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert caplog.records == []


def test_a_process_that_is_forked_during_a_change_keeps_nobody_from_the_files(facility: Facility) -> None:
    member = facility.member("user/alice")
    forked: list[int] = []

    def change(trust: Trust) -> Trust:
        child = os.fork()
        if not child:
            signal.pause()
        forked.append(child)
        return trust

    member.change_trust(change)
    reading = threading.Thread(target=Credentials.load, args=(member.directory,), daemon=True)
    reading.start()
    reading.join(5)
    waits = reading.is_alive()
    os.kill(forked[0], signal.SIGKILL)
    os.waitpid(forked[0], 0)
    assert not waits


def test_renewal_is_seen_by_the_next_connection(facility: Facility) -> None:
    credentials = facility.member("user/alice", lifetime=timedelta(hours=1))
    facility.renew(credentials, lifetime=timedelta(hours=5))
    credentials.client_context()
    assert credentials.not_after == Credentials.load(credentials.directory).not_after
    assert credentials.reload()


def test_a_request_carries_a_hint_and_no_name() -> None:
    _, csr = new_key_and_csr("user/alice")
    request = x509.load_pem_x509_csr(csr)
    assert request.subject.rfc4514_string() == "CN=user/alice"
    assert list(request.extensions) == []


def handshake(server: Credentials, client: Credentials, *, server_name: str = "localhost") -> tuple[object, object]:
    """A TLS connection between two members: who each side found at the other end, or the error of each."""
    listener, dialer = socket.socketpair()
    found: dict[str, object] = {}

    def accept() -> None:
        try:
            with server.server_context().wrap_socket(listener, server_side=True) as tls:
                found["server"] = server.peer_identity(tls)
                tls.sendall(b"ok")
        except (ssl.SSLError, BeamwireError, OSError) as error:
            found["server"] = error
            listener.close()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        with client.client_context().wrap_socket(dialer, server_hostname=server_name) as tls:
            found["client"] = client.peer_identity(tls)
            assert tls.recv(2) == b"ok"
    except (ssl.SSLError, BeamwireError, OSError, AssertionError) as error:
        found["client"] = error
        dialer.close()
    finally:
        thread.join(10)
    assert not thread.is_alive()
    return found["server"], found["client"]


def test_two_members_know_each_other_on_the_data_plane(facility: Facility) -> None:
    cache, alice = facility.member("cache/b1"), facility.member("user/alice", server_names=())
    assert handshake(cache, alice) == (alice.identity, cache.identity)
    assert handshake(cache, alice, server_name="127.0.0.1") == (alice.identity, cache.identity)


def test_a_server_under_another_name_is_refused(facility: Facility) -> None:
    cache, alice = facility.member("cache/b1", server_names=["cache.facility.test"]), facility.member("user/alice")
    _, at_client = handshake(cache, alice)
    assert isinstance(at_client, ssl.SSLCertVerificationError)
    assert "Hostname mismatch" in str(at_client)


def test_strangers_and_the_expired_are_refused_on_the_data_plane(facility: Facility) -> None:
    cache = facility.member("cache/b1")
    for stranger in (facility.foreign("user/alice"), facility.expired("user/alice")):
        at_server, _ = handshake(cache, stranger)
        assert isinstance(at_server, ssl.SSLError)


def test_a_server_insists_on_a_certificate(facility: Facility, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = facility.member("cache/b1")
    anonymous = facility.member("user/alice")
    bare = ssl.create_default_context(cadata=facility.roots_pem.decode())
    monkeypatch.setattr(anonymous, "client_context", lambda: bare)
    at_server, _ = handshake(cache, anonymous)
    assert isinstance(at_server, ssl.SSLError)
    assert "peer did not return a certificate" in str(at_server).lower()


def test_the_data_plane_speaks_no_old_tls(facility: Facility) -> None:
    member = facility.member("cache/b1")
    for context in (member.client_context(), member.server_context()):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2
        assert context.verify_mode is ssl.CERT_REQUIRED
    assert member.client_context().check_hostname
