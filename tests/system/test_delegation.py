"""Delegation tokens in a whole facility: alice hands a transfer over to bob, who narrows it, and takes it back."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest

from beamwire.buffer.v1.buffer_service_pb2 import BufferSpec
from beamwire.client import BeamwireError, Client, Reason, connect
from beamwire.client.session import Via
from beamwire.mesh.identity.biscuits import attenuate, inspect
from beamwire.mesh.identity.delegation import Restriction
from beamwire.request.v1.request_service_pb2 import Transfer
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, LINK_ROLE_PRODUCE
from beamwire.testing.ports import free_port
from tests.conftest import STOP_TIMEOUT, LiveFacility, wait_until

ALICE = "spiffe://facility.test/user/alice"
BOB = "spiffe://facility.test/user/bob"
# Seconds from the word that a right is gone to the last event. It takes half a second, and more on a busy machine.
CUT = 10.0
# The client then looks for a better explanation, for some seconds.
EXPLAINED = 40.0
NOT_PERMITTED = 3


def request(events: int = 64, *, rate: float | None = None) -> dict:
    source = {"type": "SyntheticEventSource", "number_of_events": events, "shape": [16, 16]}
    if rate is not None:
        source["events_per_second"] = rate
    return {
        "event_source": source,
        "data_sources": {"detector_data": {"type": "SyntheticDetector"}},
        "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 4}],
    }


@pytest.fixture
def alice(live_facility: LiveFacility) -> Iterator[Client]:
    with connect(config_dir=live_facility.config_dir) as client:
        yield client
        for transfer in client.list_transfers("state=STREAMING"):
            client.cancel_transfer(transfer.name)


@pytest.fixture(scope="module")
def bobs(live_facility: LiveFacility, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration directory of bob."""
    return live_facility.enroll("user/bob", tmp_path_factory.mktemp("bob"))


Streaming = Callable[[], Transfer]


@pytest.fixture
def streaming(alice: Client) -> Streaming:
    """Begins a transfer of alice's that streams on and on."""

    def begin() -> Transfer:
        created = alice.create_transfer(request(1_000_000, rate=200))
        return next(transfer for transfer in alice.watch_transfer(created.name) if transfer.connect_string)

    return begin


def refused(action: Callable[[], object], reason: Reason = Reason.TOKEN_REFUSED) -> BeamwireError:
    with pytest.raises(BeamwireError) as caught:
        action()
    assert caught.value.reason is reason, caught.value
    return caught.value


def is_revoked(client: Client, transfer: str) -> bool:
    """Whether the token of a client is refused because it was revoked."""
    try:
        client.get_transfer(transfer)
    except BeamwireError as error:
        return error.reason is Reason.TOKEN_REFUSED and error.metadata.get("check") == "revocation"
    return False


@dataclass
class Reading:
    """A stream that is read in a thread until it ends."""

    client: Client
    source: str
    via: Via = "data"
    error: BeamwireError | None = None
    events: int = 0
    last: float = 0.0
    end: float = 0.0
    _thread: threading.Thread = field(init=False)

    def __enter__(self) -> Reading:
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        wait_until(lambda: self.events or not self._thread.is_alive(), what="the first batch")
        assert self._thread.is_alive(), self.error
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)

    def _read(self) -> None:
        try:
            with self.client.stream(self.source, via=self.via) as stream:
                for batch in stream:
                    self.events += len(batch.event_ids)
                    self.last = time.monotonic()
        except BeamwireError as error:
            self.error = error
        self.end = time.monotonic()

    def ended(self, since: float) -> BeamwireError:
        """Why it ended, which it does soon."""
        self._thread.join(60)
        assert self.error is not None
        assert self.last - since < CUT, f"events came for {self.last - since:.2f} s more: {self.error}"
        assert self.end - since < EXPLAINED, f"it took {self.end - since:.2f} s to say why: {self.error}"
        return self.error


def test_the_holder_reads_the_one_transfer_and_nothing_else(
    live_facility: LiveFacility, alice: Client, bobs: Path
) -> None:
    shared = alice.create_transfer(request())
    other = alice.create_transfer(request())
    token = alice.create_token(BOB, shared.name, read_only=True).token
    with connect(config_dir=bobs) as bob:
        refused(lambda: bob.get_transfer(shared.name), Reason.NOT_OWNER)
        refused(lambda: bob.issue_ticket(shared.buffer, LINK_ROLE_CONSUME), Reason.NOT_OWNER)
    with connect(config_dir=bobs, token=token) as bob:
        ids: list[int] = []
        with bob.stream(shared.name) as stream:
            for batch in stream:
                ids += batch.event_ids.tolist()
        assert len(set(ids)) == 64
        receipt = bob.get_transfer(shared.name).receipt
        assert receipt.balanced
        assert [consumer.identity for consumer in receipt.consumers] == [BOB]
        assert bob.get_buffer(shared.buffer).owner == ALICE
        assert b"".join(piece.data for piece in bob.jobs.logs(shared.job)) is not None
        for action in (
            lambda: bob.cancel_transfer(shared.name),
            lambda: bob.revoke_access(shared.buffer, ALICE),
            lambda: bob.delete_buffer(shared.buffer),
            lambda: bob.issue_ticket(shared.buffer, LINK_ROLE_PRODUCE),
            lambda: bob.create_transfer(request()),
            lambda: bob.create_token(BOB, shared.name),
            lambda: bob.get_transfer(other.name),
            lambda: bob.get_buffer(other.buffer),
            lambda: bob.issue_ticket(other.buffer, LINK_ROLE_CONSUME),
            lambda: list(bob.list_transfers()),
        ):
            refused(action)
    with connect(config_dir=live_facility.config_dir, token=token) as nobody:
        assert refused(lambda: nobody.get_transfer(shared.name)).metadata["check"] == "holder"
    alice.cancel_transfer(other.name)


def test_a_token_that_may_change_cancels(alice: Client, bobs: Path, streaming: Streaming) -> None:
    transfer = streaming()
    with connect(config_dir=bobs, token=alice.create_token(BOB, transfer.name).token) as bob:
        bob.cancel_transfer(transfer.name)
        last = list(bob.watch_transfer(transfer.name))[-1]
    assert last.state == Transfer.STATE_CANCELLED


def test_a_token_for_everything_covers_a_buffer_of_its_owners_own(alice: Client, bobs: Path) -> None:
    created = alice.create_buffer(BufferSpec(capacity_bytes=1 << 20))
    try:
        next(buffer for buffer in alice.watch_buffer(created.name) if buffer.connect_string)
        with connect(config_dir=bobs, token=alice.create_token(BOB).token) as bob:
            assert bob.issue_ticket(created.name, LINK_ROLE_CONSUME).text
            assert bob.get_buffer(created.name).name == created.name
            assert {transfer.owner for transfer in bob.list_transfers()} == {ALICE}
            refused(lambda: bob.issue_ticket(created.name, LINK_ROLE_PRODUCE))
    finally:
        alice.delete_buffer(created.name)


@pytest.mark.parametrize("via", ["data", "grpc"])
def test_a_revoked_token_cuts_the_stream(alice: Client, bobs: Path, streaming: Streaming, via: Via) -> None:
    transfer = streaming()
    made = alice.create_token(BOB, transfer.name, read_only=True)
    with connect(config_dir=bobs, token=made.token) as bob, Reading(bob, transfer.name, via) as reading:
        since = time.monotonic()
        alice.revoke_token(made.revocation_ids[0])
        assert reading.ended(since).reason is Reason.TOKEN_REFUSED
        assert "revoked" in refused(lambda: bob.get_transfer(transfer.name)).message


def test_a_revoked_token_cuts_a_watch(alice: Client, bobs: Path, streaming: Streaming) -> None:
    transfer = streaming()
    made = alice.create_token(BOB, transfer.name, read_only=True)
    with connect(config_dir=bobs, token=made.token) as bob:
        watch = bob.watch_transfer(transfer.name)
        next(watch)
        since = time.monotonic()
        alice.revoke_token(made.revocation_ids[0])
        assert refused(lambda: list(watch)).metadata["check"] == "revocation"
        assert time.monotonic() - since < CUT


@pytest.mark.parametrize("via", ["data", "grpc"])
def test_a_token_that_expires_cuts_the_stream(alice: Client, bobs: Path, streaming: Streaming, via: Via) -> None:
    transfer = streaming()
    made = alice.create_token(BOB, transfer.name, read_only=True, ttl=timedelta(seconds=15))
    with connect(config_dir=bobs, token=made.token) as bob, Reading(bob, transfer.name, via) as reading:
        left = made.expire_time.ToNanoseconds() / 1e9 - time.time()
        error = reading.ended(time.monotonic() + left)
        assert error.reason in (Reason.TOKEN_REFUSED, Reason.TICKET_EXPIRED)
        assert refused(lambda: bob.get_transfer(transfer.name)).metadata["check"] == "time"


@pytest.mark.parametrize("whom", [ALICE, BOB])
def test_access_that_the_owner_takes_ends_the_holders_stream(
    alice: Client, bobs: Path, streaming: Streaming, whom: str
) -> None:
    transfer = streaming()
    token = alice.create_token(BOB, transfer.name, read_only=True).token
    with connect(config_dir=bobs, token=token) as bob, Reading(bob, transfer.name) as reading:
        since = time.monotonic()
        alice.revoke_access(transfer.buffer, whom)
        assert reading.ended(since).reason in (Reason.NOT_OWNER, Reason.ROLE_NOT_ALLOWED)
        refused(lambda: bob.issue_ticket(transfer.buffer, LINK_ROLE_CONSUME), Reason.NOT_OWNER)


def test_what_a_holder_narrows_is_narrower_and_ends_with_what_it_was_made_of(
    alice: Client, bobs: Path, live_facility: LiveFacility, tmp_path: Path, streaming: Streaming
) -> None:
    transfer, other = streaming(), streaming()
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    live_facility.beamwire("token", "create", "--all", "--holder", "user/bob", "--ttl", "10m", "-o", str(wide))
    assert stat.S_IMODE(wide.stat().st_mode) == 0o600
    live_facility.beamwire(
        *("token", "attenuate", str(wide), "--transfer", transfer.name, "--read-only", "--ttl", "5m"),
        *("-o", str(narrow)),
        config_dir=bobs,
    )
    said = json.loads(live_facility.beamwire("token", "inspect", str(narrow), "--json").stdout)
    assert (said["owner"], said["holder"], said["resource"], said["read_only"]) == (ALICE, BOB, transfer.name, True)
    with (
        connect(config_dir=bobs, token=wide.read_text()) as bob,
        connect(config_dir=bobs, token=narrow.read_text()) as less,
    ):
        assert bob.get_transfer(other.name).name == other.name
        assert less.get_transfer(transfer.name).name == transfer.name
        refused(lambda: less.get_transfer(other.name))
        refused(lambda: less.cancel_transfer(transfer.name))
        live_facility.beamwire("token", "revoke", str(wide))
        wait_until(lambda: is_revoked(bob, other.name), 1)
        wait_until(lambda: is_revoked(less, transfer.name), 1)


def test_the_commands_take_a_token_from_a_file_and_say_what_is_refused(
    alice: Client, bobs: Path, live_facility: LiveFacility, tmp_path: Path
) -> None:
    transfer = alice.create_transfer(request())
    file = tmp_path / "token"
    made = live_facility.beamwire(
        "token", "create", transfer.name, "--holder", "user/bob", "--read-only", "-o", str(file)
    )
    token = file.read_text().strip()
    assert token not in made.stdout + made.stderr
    assert f"{BOB} may look at and consume {transfer.name}" in made.stdout
    pulled = live_facility.beamwire(
        "--token-file", str(file), "pull", transfer.name, "--format", "none", config_dir=bobs
    )
    assert "64" in pulled.stdout + pulled.stderr
    receipt = live_facility.beamwire("receipt", transfer.name, "--token-file", str(file), config_dir=bobs)
    assert BOB in receipt.stdout or "64" in receipt.stdout
    cancel = live_facility.beamwire("cancel", transfer.name, "--token-file", str(file), config_dir=bobs, check=False)
    assert cancel.returncode == NOT_PERMITTED
    assert "may only read" in cancel.stderr
    twice = live_facility.beamwire(
        "token", "create", transfer.name, "--holder", "user/bob", "-o", str(file), check=False
    )
    assert twice.returncode != 0
    assert file.read_text().strip() == token
    nonsense = tmp_path / "nonsense"
    nonsense.write_bytes(b"\xff\xfe no token\n")
    bad = live_facility.beamwire("describe", transfer.name, "--token-file", str(nonsense), config_dir=bobs, check=False)
    assert bad.returncode == NOT_PERMITTED
    assert "Traceback" not in bad.stderr


def test_a_token_leaves_no_trace(alice: Client, bobs: Path, live_facility: LiveFacility) -> None:
    transfer = alice.create_transfer(request())
    token = alice.create_token(BOB, transfer.name).token
    with connect(config_dir=bobs, token=token) as bob:
        assert token[:40] not in f"{bob!r} {vars(bob)}"
        for _ in bob.watch_transfer(transfer.name):
            break
        refused(lambda: bob.create_transfer(request()))
        bob.cancel_transfer(transfer.name)
    state = live_facility.directory / "state"
    paths = [live_facility.directory / "serve.log"]
    # Unlike rglob, it passes over directories that vanish: transfers are being tidied away.
    paths += [Path(top, name) for top, _, names in os.walk(state) for name in names]
    for path in paths:
        # Files vanish too, and sockets cannot be read.
        with suppress(OSError):
            assert token.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("fields", "field_name"),
    [
        ({"holder": "bob"}, "holder"),
        ({"holder": "spiffe://unknown.test/user/bob"}, "holder"),
        ({"holder": BOB, "ttl": timedelta(days=400)}, "ttl"),
        ({"holder": BOB, "ttl": timedelta(0)}, "ttl"),
        ({"holder": BOB, "resource": "buffers/of-x"}, "name"),
    ],
)
def test_a_token_that_cannot_be_is_refused_with_the_field(alice: Client, fields: dict, field_name: str) -> None:
    error = refused(lambda: alice.create_token(**fields), Reason.INVALID_FIELD)
    assert [violation.field for violation in error.violations] == [field_name]


def test_only_who_made_a_token_or_an_operator_ends_it(
    alice: Client, bobs: Path, live_facility: LiveFacility, tmp_path: Path
) -> None:
    made = alice.create_token(BOB, "transfers/any")
    (first,) = made.revocation_ids
    operators = live_facility.enroll("operator/olga", tmp_path)
    with connect(config_dir=bobs) as bob, connect(config_dir=operators) as olga:
        refused(lambda: bob.revoke_token(first), Reason.NOT_OWNER)
        refused(lambda: bob.revoke_token("0" * 128), Reason.NOT_OWNER)
        refused(lambda: alice.revoke_token("0" * 127), Reason.INVALID_FIELD)
        olga.revoke_token(first)
        olga.revoke_token(first)
        # Of a block that a holder added, which nobody told the service of.
        olga.revoke_token("f" * 128)
    with connect(config_dir=bobs, token=made.token) as bob:
        wait_until(lambda: is_revoked(bob, "any"), 5)


def test_a_revocation_outlives_the_services(own_facility: LiveFacility, tmp_path: Path) -> None:
    bobs = own_facility.enroll("user/bob", tmp_path / "bob")
    with connect(config_dir=own_facility.config_dir) as alice:
        transfer = alice.create_transfer(request())
        ended, good = (alice.create_token(BOB, transfer.name) for _ in range(2))
        alice.revoke_token(inspect(ended.token).ids[0])
        alice.cancel_transfer(transfer.name)
    for process in own_facility.processes:
        process.terminate()
        process.wait(STOP_TIMEOUT)
        assert process.stdout is not None
        process.stdout.close()
    own_facility.processes.clear()
    own_facility.start()
    with connect(config_dir=bobs, token=ended.token) as bob:
        assert refused(lambda: bob.get_transfer(transfer.name)).metadata["check"] == "revocation"
    with connect(config_dir=bobs, token=good.token) as bob:
        assert bob.get_transfer(transfer.name).name == transfer.name


@pytest.fixture
def abroad(live_facility: LiveFacility, tmp_path: Path) -> Iterator[LiveFacility]:
    """Another facility, `b.test`: each of the two believes the other, and neither's policy knows the other's people."""
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    other = LiveFacility(tmp_path / "b", tmp_path / "bob-of-b", addresses[0], "b.test")
    other.beamwired(
        *("facility", "init", str(other.directory), "--trust-domain", "b.test"),
        *("--address", addresses[0], "--enroll-address", addresses[1]),
    )
    other.start()
    try:
        for introduced, believer in ((live_facility, other), (other, live_facility)):
            paper = tmp_path / f"{introduced.trust_domain}.introduction"
            introduced.beamwire("trust", "introduce", "-d", str(introduced.directory), "-o", str(paper))
            believer.beamwire("trust", "accept", str(paper), "--yes", "-d", str(believer.directory))
        other.enroll("user/bob", other.config_dir)
        yield other
    finally:
        live_facility.beamwire("trust", "remove", "b.test", "-d", str(live_facility.directory))
        other.stop()


@pytest.mark.parametrize("via", ["data", "grpc"])
def test_a_member_of_a_believed_facility_needs_no_rule_for_what_a_token_names(
    abroad: LiveFacility, live_facility: LiveFacility, alice: Client, tmp_path: Path, via: Via
) -> None:
    transfer, other = alice.create_transfer(request()), alice.create_transfer(request())
    bob = "spiffe://b.test/user/bob"
    made = alice.create_token(bob, transfer.name, read_only=True)
    with connect("facility.test", config_dir=abroad.config_dir) as stranger:
        refused(lambda: stranger.get_transfer(transfer.name), Reason.POLICY_REFUSED)
    with connect("facility.test", config_dir=abroad.config_dir, token=made.token) as holder:
        ids: list[int] = []
        with holder.stream(transfer.name, via=via) as stream:
            for batch in stream:
                ids += batch.event_ids.tolist()
        assert len(set(ids)) == 64
        assert [consumer.identity for consumer in holder.get_transfer(transfer.name).receipt.consumers] == [bob]
        refused(lambda: holder.get_transfer(other.name))
        refused(lambda: holder.create_transfer(request()))
        assert attenuate(made.token, Restriction(read_only=True), holder.token_root())
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    wide.write_text(made.token)
    abroad.beamwire("token", "attenuate", str(wide), "--ttl", "1m", "-o", str(narrow), "--facility", "facility.test")
    with connect("facility.test", config_dir=abroad.config_dir, token=narrow.read_text()) as holder:
        assert holder.get_transfer(transfer.name).name == transfer.name
    alice.cancel_transfer(other.name)
