"""Two facilities on two hosts that share nothing but an introduction use each other's streams."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

from beamwire.client.cli.failures import REFUSED
from beamwire.mesh.identity.credentials import Credentials, new_key_and_csr
from beamwire.mesh.identity.generations import Generations
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.mesh.names import new_id
from beamwire.testing.namespaces import Host, TwoHosts, namespaces_missing
from tests.conftest import BIN, run, wait_until

PLAY = Path(__file__).with_name("federation_programs.py")
TIMEOUT = 120.0
STREAMS = 50
# At 100 in a second: longer than a rotation takes.
EVENTS = 12_000
# What issue and threat model promise, in seconds. The goal for streams is 250 ms, which a machine that does other
# things does not keep (0.96 s was seen there); what was measured is printed.
UNARY, STREAM, PIPE, PEER = 1.0, 2.0, 1.0, 60.0
PROGRAM = str(BIN / "beamwire")


@dataclass
class Place:
    """A facility on a host of its own, and the people there."""

    name: str
    host: Host
    directory: Path
    people: Path
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{self.host.address}:7443"

    def run(self, *command: str, user: str = "", check: bool = True, timeout: float = TIMEOUT) -> str:
        """Run a program on the host to its end; what it printed."""
        process = self.start(*command, user=user)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        self.running.remove(process)
        assert not check or process.returncode == 0, f"{command} ended with {process.returncode}:\n{out!r}\n{err!r}"
        return (out if check else out + err).decode()

    def start(self, *command: str, user: str = "") -> subprocess.Popen[bytes]:
        """Start a program on the host, as a person there if one is named."""
        env = {**os.environ, "BEAMWIRE_TRACE_DIR": str(self.people / "traces")}
        if user:
            env["BEAMWIRE_CONFIG_DIR"] = str(self.config(user))
        process = self.host.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=self.people)
        self.running.append(process)
        return process

    def beamwire(self, *arguments: str, user: str = "", check: bool = True) -> str:
        return self.run(PROGRAM, *arguments, user=user, check=check)

    def trust(self, command: str, *arguments: str, check: bool = True) -> str:
        return self.beamwire("trust", command, *arguments, "--dir", str(self.directory), check=check)

    def beamwired(self, *arguments: str) -> str:
        return self.run(str(BIN / "beamwired"), *arguments)

    def play(self, *arguments: str) -> subprocess.Popen[bytes]:
        return self.start(sys.executable, str(PLAY), *arguments)

    def config(self, user: str) -> Path:
        return self.people / user

    def make(self) -> None:
        """Make the facility and serve it."""
        here = self.host.address
        self.people.mkdir()
        self.beamwired(
            *("facility", "init", str(self.directory), "--trust-domain", self.name),
            *("--address", self.address, "--enroll-address", f"{here}:7444", "--server-name", here),
            *("--data-host", here, "--data-advertise", here),
        )
        self.serve()

    def serve(self) -> None:
        with (self.directory / "serve.log").open("ab") as log:
            command = [str(BIN / "beamwired"), "serve", "--dir", str(self.directory)]
            server = self.host.start(command, stderr=log, cwd=self.people)
        self.running.append(server)
        wait_until(lambda: server.poll() is not None or self._answers(), 60, f"serving {self.name}")
        assert server.poll() is None, (self.directory / "serve.log").read_text()

    def _answers(self) -> bool:
        return "sequence" in self.beamwire("trust", "show", self.name, "--dir", str(self.directory), check=False)

    def enroll(self, user: str) -> None:
        token = self.people / f"{user}.token"
        self.beamwired("token", f"user/{user}", "--dir", str(self.directory), "-o", str(token))
        self.beamwire("enroll", "--token-file", str(token), user=user)

    def allow(self, **rule: Any) -> None:
        """Add a rule to the policy, before all others."""
        path = self.directory / "policy.toml"
        lines = [f"{key} = {json.dumps(value)}" for key, value in rule.items()]
        path.write_text("\n".join(["[[rule]]", *lines, "", path.read_text()]))
        time.sleep(1.0)  # the policy is looked at twice a second


@dataclass
class Two:
    """Two facilities that believe each other: alice is of a.test, bob of b.test."""

    a: Place
    b: Place

    def introduce(self) -> None:
        for here, there in ((self.a, self.b), (self.b, self.a)):
            document = here.people / f"{here.name}-{new_id()}.introduction"
            here.trust("introduce", "-o", str(document))
            said = json.loads(here.trust("introduce", "--json", "-q"))
            assert said["trust_domain"] == here.name
            accepted = there.trust("accept", str(document), "--fingerprint", _fingerprint(document))
            assert f"{here.name} is believed here, at {there.name}" in accepted


def _fingerprint(document: Path) -> str:
    from beamwire.mesh.identity.introduction import fingerprint

    return fingerprint(document.read_text().strip())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    if reason := namespaces_missing():
        pytest.skip(reason)
    with TwoHosts() as hosts:
        directory = tmp_path_factory.mktemp("federation")
        a = Place("a.test", hosts.left, directory / "a", directory / "people-a")
        b = Place("b.test", hosts.right, directory / "b", directory / "people-b")
        try:
            for place in (a, b):
                place.make()
            a.enroll("alice")
            b.enroll("bob")
            both = Two(a, b)
            both.introduce()
            yield both
        finally:
            hosts.close()
            for process in (*a.running, *b.running):
                process.wait(30)
                for pipe in (process.stdout, process.stderr):
                    if pipe is not None:
                        pipe.close()
            for place in (a, b):
                # Their caches were killed with the hosts: what they held in shared memory is left.
                run([str(BIN / "beamwired"), "clean", "--dir", str(place.directory)], check=False)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """The facilities outlive each test; their hosts end them all."""


@pytest.fixture(scope="module")
def allowed(two: Two) -> Two:
    """Both facilities have let each other's users and jobs in."""
    for here, there in ((two.a, two.b), (two.b, two.a)):
        everybody = [f"spiffe://{there.name}/user/*"]
        here.allow(name="users of the other", identities=everybody, datasets=["path:/*/open/**", "path:/**/open/**"])
        here.allow(
            name="its jobs",
            identities=[f"spiffe://{there.name}/job/*"],
            methods=["BufferService/IssueTicket", "BufferService/Consume"],
        )
        here.allow(
            name="its services",
            identities=[f"spiffe://{there.name}/service/request"],
            methods=["JobService/*"],
            executables=[PROGRAM],
        )
    two.a.allow(name="alice", identities=["user/alice"], datasets=["**"], executables=[PROGRAM])
    return two


def lines(process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """What a program says, as it says it."""
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)
    assert process.stderr is not None
    assert process.wait(30) == 0, process.stderr.read().decode()


def until(said: Iterator[dict[str, Any]], what: str) -> dict[str, Any]:
    return next(line for line in said if line["what"] == what)


def finish(*said: Iterator[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [list(each) for each in said]


def percentile(values: Sequence[float], part: float) -> float:
    return float(np.percentile(np.asarray(values), part, method="higher"))


def report(story: str, done: dict[str, Any], said: list[dict[str, Any]]) -> dict[str, float]:
    """How long after an operator was answered each way was closed, in seconds; of the streams the 99th percentile."""
    begins = done["at"]
    after = {
        what: [line["at"] - begins for line in said if line["what"] == what] for what in ("unary", "stream", "pipe")
    }
    frames = [line["last_frame"] - begins for line in said if line["what"] == "pipe"]
    found = {
        "unary": max(after["unary"]),
        "stream": percentile(after["stream"], 99),
        "pipe": max(after["pipe"]),
        "last frame": max(frames),
    }
    answered = (begins - done["began"]) * 1000
    print(
        f"\n{story}, answered after {answered:.0f} ms: "
        + ", ".join(f"{what} {seconds * 1000:.0f} ms" for what, seconds in found.items())
    )
    return found


def data_file(place: Place, name: str, events: int = 24) -> Path:
    path = place.people / name / "run.h5"
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        file["image"] = np.arange(events * 12, dtype=np.float32).reshape(events, 3, 4)
    return path


def file_request(place: Place, path: Path, **more: Any) -> Path:
    content = {
        "source_identifier": str(path),
        "event_source": {"type": "HDF5EventSource"},
        "data_sources": {"image": {"type": "HDF5Dataset", "path": "image"}},
        "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 4}],
        **more,
    }
    request = place.people / f"{new_id()}.yaml"
    request.write_text(yaml.safe_dump(content))
    return request


def test_an_introduction_alone_lets_nobody_in(two: Two) -> None:
    listed = json.loads(two.a.trust("list", "--json"))["trust_bundles"]
    assert [bundle["name"] for bundle in listed] == ["trustBundles/a.test", "trustBundles/b.test"]
    assert not any("refresh_error" in bundle for bundle in listed)
    request = file_request(two.b, data_file(two.a, "open"))
    refused = two.b.run(PROGRAM, "get", str(request), "--facility", "a.test", user="bob", check=False)
    assert "no rule of the policy here is about spiffe://b.test/user/bob" in refused
    assert two.b.trust("show", "a.test", "--pem").startswith("-----BEGIN CERTIFICATE-----")


def test_a_user_there_consumes_a_dataset_here(allowed: Two) -> None:
    a, b = allowed.a, allowed.b
    request = file_request(b, data_file(a, "open"))
    b.beamwire("get", str(request), "--facility", "a.test", "-o", str(b.people / "out"), user="bob")
    (written,) = (b.people / "out").glob("*.h5")
    with h5py.File(written) as file:
        found = next(d for d in _datasets(file) if d.shape == (24, 3, 4))
        assert (found[()] == np.arange(24 * 12).reshape(24, 3, 4)).all()
    listed = json.loads(b.beamwire("list", "--facility", "a.test", "--json", user="bob"))["transfers"]
    assert {transfer["owner"] for transfer in listed} == {"spiffe://b.test/user/bob"}


def _datasets(group: h5py.Group) -> list[h5py.Dataset]:
    found: list[h5py.Dataset] = []
    group.visititems(lambda _, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
    return found


def test_what_the_rule_does_not_name_is_refused(allowed: Two) -> None:
    request = file_request(allowed.b, data_file(allowed.a, "closed"))
    process = allowed.b.start(PROGRAM, "get", str(request), "--facility", "a.test", user="bob")
    _, err = process.communicate(timeout=TIMEOUT)
    allowed.b.running.remove(process)
    assert process.returncode == REFUSED
    assert "users of the other" in err.decode()
    assert "run.h5" in err.decode()


def test_a_transfer_here_places_its_consumer_there(allowed: Two) -> None:
    a, b = allowed.a, allowed.b
    consumer = {"facility": "b.test", "executable": PROGRAM, "arguments": ["pull", "-o", "out"]}
    request = file_request(a, data_file(a, "open"), consumer_jobs=[consumer])
    name = a.beamwire("start", str(request), "-q", user="alice").strip()
    a.beamwire("watch", name, user="alice")
    transfer = json.loads(a.beamwire("describe", name, "--json", user="alice"))
    assert transfer["state"] == "STATE_SUCCEEDED"
    (placed,) = transfer["consumer_jobs"]
    assert placed["identity"] == f"spiffe://b.test/job/{placed['job'].removeprefix('jobs/')}"
    assert {c["identity"] for c in transfer["receipt"]["consumers"]} == {placed["identity"]}
    assert int(transfer["receipt"]["delivered_event_count"]) == 24
    (written,) = (b.directory / "state" / placed["job"] / "files" / "out").glob("*.h5")
    assert written.stat().st_size


@pytest.mark.parametrize(
    ("consumer", "story"),
    [
        ({"facility": "b.test", "executable": "/bin/sh"}, r"'alice'.* does not let .*/bin/sh"),
        ({"facility": "c.test", "executable": PROGRAM}, "c.test is not believed at a.test"),
        ({"facility": "b.test", "executable": PROGRAM, "environment": {"LD_PRELOAD": "x"}}, "b.test.*LD_PRELOAD"),
    ],
)
def test_a_consumer_that_may_not_be_is_refused_before_anything_starts(
    allowed: Two, consumer: dict[str, Any], story: str
) -> None:
    request = file_request(allowed.a, data_file(allowed.a, "open"), consumer_jobs=[consumer])
    refused = allowed.a.run(PROGRAM, "start", str(request), user="alice", check=False)
    assert re.search(story, refused), refused


def test_a_consumer_that_fails_there_fails_the_transfer_here(allowed: Two) -> None:
    consumer = {"facility": "b.test", "executable": PROGRAM, "arguments": ["pull", "--no-such-option"]}
    request = file_request(allowed.a, data_file(allowed.a, "open"), consumer_jobs=[consumer])
    name = allowed.a.beamwire("start", str(request), "-q", user="alice").strip()
    story = allowed.a.beamwire("watch", name, user="alice", check=False)
    assert re.search(r"the consumer job jobs/\w+ at b\.test failed: .*No such option", story, re.DOTALL), story


def test_the_authority_of_one_cannot_speak_for_the_other(allowed: Two) -> None:
    """b.test's authority signs a certificate with alice's name: refused on every way, at both facilities."""
    a, b = allowed.a, allowed.b
    a_name = json.loads(a.beamwire("start", str(file_request(a, data_file(a, "open"))), "--json", "-q", user="alice"))[
        "name"
    ]
    wait_until(lambda: _connect_string(a, a_name) != "", 30, "the buffer")
    forged = b.people / "forger" / "facilities" / "a.test"
    key, csr = new_key_and_csr()
    authority = Generations.load(b.directory / "authority").authority
    # By the name that is asked for, the authority itself refuses.
    with pytest.raises(Exception, match="outside the trust domain"):
        authority.issue(csr, SpiffeId("a.test", "user/alice"), (), _hour())
    authority.trust_domain = "a.test"
    issued = authority.issue(csr, SpiffeId("a.test", "user/alice"), (), _hour())
    for facility in ("a.test", "b.test"):
        directory = b.people / "forger" / "facilities" / facility
        place = a if facility == "a.test" else b
        roots = place.trust("show", facility, "--pem").encode()
        Credentials.save(directory, key, issued.chain_pem, roots)
        member = {"trust_domain": facility, "address": place.address, "enroll_address": f"{place.host.address}:7444"}
        (directory / "member.json").write_text(json.dumps(member))
    assert forged.is_dir()
    said = finish(lines(b.play("pretend", str(b.people / "forger"), "a.test", _connect_string(a, a_name))))[0]
    assert {line["what"]: line["reason"] for line in said} == {
        "unary": "CERTIFICATE_INVALID",
        "stream": "CERTIFICATE_INVALID",
        "pipe": "CERTIFICATE_INVALID",
    }
    a.beamwire("cancel", a_name, user="alice")


def _hour() -> Any:
    from datetime import timedelta

    return timedelta(hours=1)


def _connect_string(place: Place, name: str) -> str:
    return str(json.loads(place.beamwire("describe", name, "--json", user="alice")).get("connect_string", ""))


def outstanding(place: Place) -> int:
    """How many good certificates the generation before has signed whose holders have no newer ones."""
    shown = json.loads(place.beamwired("authority", "show", "--json", "--dir", str(place.directory)))
    return int(shown.get("outstanding_certificate_count", 0))


def await_renewals(*places: Place) -> None:
    """Wait until all that live have renewed: what is left are jobs and people that are gone."""
    before, since = [-1], time.monotonic()
    deadline = since + 60
    while time.monotonic() < min(since + 6, deadline):
        now = [outstanding(place) for place in places]
        if now != before:
            before, since = now, time.monotonic()


@pytest.mark.timeout(400)
def test_both_authorities_are_rotated_under_load(allowed: Two) -> None:
    """Streams across both ways, calls all the while: none fails, nothing is lost."""
    a, b = allowed.a, allowed.b
    there = b.play("load", str(b.config("bob")), "a.test", str(EVENTS))
    here = a.play("load", str(a.config("alice")), "b.test", str(EVENTS))
    said = [lines(there), lines(here)]
    for each in said:
        until(each, "ready")
    time.sleep(12)  # a streamer and a client keep themselves from their tenth second on
    began = time.monotonic()
    for phase in ("announced", "activated"):
        for place in (a, b):
            place.beamwired("authority", "rotate", "--to", phase, "--yes", "--dir", str(place.directory))
        await_renewals(a, b)
    for place in (a, b):
        place.beamwired("authority", "rotate", "--to", "stable", "--force", "--yes", "--dir", str(place.directory))
    took = time.monotonic() - began
    assert there.poll() is None, "the stream ended before the rotation did"
    ends = [until(each, "done") for each in said]
    print(f"\nboth authorities rotated in {took:.1f} s under load: {ends}")
    for end in ends:
        assert end["failed"] == []
        assert end["calls"] > 1000
        assert (end["events"], end["delivered"], end["twice"], end["balanced"]) == (EVENTS, EVENTS, 0, True)
    finish(*said)
    roots = {place.name: place.trust("show", place.name, "--pem") for place in (a, b)}
    assert a.trust("show", "b.test", "--pem") == roots["b.test"]
    assert b.trust("show", "a.test", "--pem") == roots["a.test"]
    assert roots["a.test"].count("BEGIN") == roots["b.test"].count("BEGIN") == 1


def test_a_user_who_is_revoked_at_home_is_out_at_both(allowed: Two) -> None:
    a, b = allowed.a, allowed.b
    a.enroll("carol")
    users = [a.play("use", str(a.config("carol")), facility, str(STREAMS)) for facility in ("a.test", "b.test")]
    said = [lines(user) for user in users]
    for each in said:
        until(each, "ready")
    revoked = finish(lines(a.play("revoke", str(a.directory), "spiffe://a.test/user/carol")))[0][0]
    home, abroad = finish(*said)
    at_home = report("revoked at home", revoked, home)
    at_peer = report("revoked, seen at the peer", revoked, abroad)
    for line in (*home, *abroad):
        assert line["reason"] == "CERTIFICATE_REVOKED", line
    assert len([line for line in home if line["what"] == "stream"]) == STREAMS
    assert at_home["unary"] <= UNARY
    assert at_home["stream"] <= STREAM
    assert at_home["pipe"] <= PIPE
    assert max(at_peer.values()) <= PEER
    assert "revoked" in b.run(
        PROGRAM, "list", "--facility", "b.test", "--config-dir", str(a.config("carol")), check=False
    )


def test_a_facility_that_is_removed_is_out(allowed: Two) -> None:
    a, b = allowed.a, allowed.b
    user = b.play("use", str(b.config("bob")), "a.test", str(STREAMS))
    said = lines(user)
    until(said, "ready")
    removed = finish(lines(a.play("remove", str(a.directory), "b.test")))[0][0]
    (ended,) = finish(said)
    took = report("removed", removed, ended)
    assert max(took.values()) <= PEER
    assert {line["reason"] for line in ended} == {"CERTIFICATE_INVALID"}
    refused = b.run(PROGRAM, "list", "--facility", "a.test", user="bob", check=False)
    assert "that a.test believes b.test" in refused
    # And back: an introduction is all that it takes.
    allowed.introduce()
    b.beamwire("list", "--facility", "a.test", user="bob")
