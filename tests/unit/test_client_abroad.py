"""A facility that is not enrolled is called as a member of one that believes it; operators, by the facility's files."""

from __future__ import annotations

import asyncio
import json
import socket
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from beamwire.client import AsyncClient
from beamwire.client.cli.app import cli
from beamwire.client.config import EnrolledFacility, choose_facility
from beamwire.client.operators import operated_facility
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.introduction import Introduction, fingerprint
from beamwire.mesh.identity.trust import DomainTrust, Trust
from beamwire.mesh.stream.connect import ConnectString
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME
from beamwire.testing.facility import Facility


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BEAMWIRE_FACILITY", "BEAMWIRE_HOME", "BEAMWIRE_FACILITY_DIR", "BEAMWIRE_CREDENTIALS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BEAMWIRE_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)


def enroll(config: Path, name: str, path: str = "user/alice") -> Path:
    """As `beamwire enroll` leaves it, without a facility that answers."""
    directory = config / "facilities" / name
    directory.parent.mkdir(parents=True, exist_ok=True)
    Facility(config / "made" / name, name).member(path).directory.rename(directory)
    member = {"trust_domain": name, "address": f"{name}:7443", "enroll_address": f"{name}:7444"}
    (directory / "member.json").write_text(json.dumps(member))
    return directory


def other(tmp_path: Path, name: str = "b.test") -> DomainTrust:
    roots = Facility(tmp_path / "other", name).roots_pem
    return DomainTrust(name, roots, 3, address=f"{name}:1,job={name}:2", enroll_address=f"{name}:3")


def believe(home: EnrolledFacility, domain: DomainTrust) -> Trust:
    return home.credentials().change_trust(lambda trust: trust.believe(domain))


def test_what_is_believed_at_home_can_be_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config"
    directory = enroll(config, "a.test")
    believe(choose_facility(config), other(tmp_path))
    found = choose_facility(config, "b.test")
    assert (found.trust_domain, found.home, found.directory) == ("b.test", "a.test", directory)
    assert (found.addresses.of("job"), found.addresses.of("request")) == ("b.test:2", "b.test:1")
    assert str(found.credentials().identity) == "spiffe://a.test/user/alice"
    assert choose_facility(config).trust_domain == "a.test"
    monkeypatch.setenv("BEAMWIRE_FACILITY", "b.test")
    assert choose_facility(config).trust_domain == "b.test"


def test_home_is_asked_only_if_nothing_is_known(tmp_path: Path) -> None:
    config = tmp_path / "config"
    enroll(config, "a.test")
    asked: list[str] = []

    def learn(home: EnrolledFacility) -> Trust:
        asked.append(home.trust_domain)
        return believe(home, other(tmp_path))

    with pytest.raises(BeamwireError, match=r"'b\.test' is not enrolled .*nor believed by a\.test"):
        choose_facility(config, "b.test")
    for _ in range(2):
        assert choose_facility(config, "b.test", learn=learn).home == "a.test"
    with pytest.raises(BeamwireError, match=r"beamwire trust accept"):
        choose_facility(config, "c.test", learn=learn)
    assert asked == ["a.test", "a.test"]


def test_of_several_homes_one_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config"
    for name in ("a.test", "x.test", "b.test"):
        enroll(config, name)
    for name in ("a.test", "x.test"):
        believe(choose_facility(config, name), other(tmp_path, "o.test"))
    with pytest.raises(BeamwireError, match=r"a\.test, x\.test.*--home"):
        choose_facility(config, "o.test")
    assert choose_facility(config, "o.test", "x.test").home == "x.test"
    monkeypatch.setenv("BEAMWIRE_HOME", "a.test")
    assert choose_facility(config, "o.test").home == "a.test"
    assert choose_facility(config).trust_domain == "a.test"
    with pytest.raises(BeamwireError, match=r"'q\.test' is not enrolled") as caught:
        choose_facility(config, "o.test", "q.test")
    assert caught.value.reason is Reason.INVALID_FIELD


def test_one_can_go_abroad_to_where_one_is_enrolled_too(tmp_path: Path) -> None:
    config = tmp_path / "config"
    enroll(config, "a.test")
    enroll(config, "b.test", "user/alice-at-b")
    believe(choose_facility(config, "a.test"), other(tmp_path))
    assert choose_facility(config, "b.test").home == "b.test"
    assert choose_facility(config, "b.test", "a.test").home == "a.test"


async def test_tickets_come_from_the_facility_of_the_buffer(tmp_path: Path) -> None:
    enroll(tmp_path / "config", "a.test")
    async with AsyncClient(config_dir=tmp_path / "config") as client:
        elsewhere = ConnectString((("h", 7),), "b1", 1, facility="b.test")
        with pytest.raises(BeamwireError, match=r"of b\.test, and this client calls a\.test.*--facility b\.test"):
            client.tickets(elsewhere, LINK_ROLE_CONSUME)
        here = ConnectString((("h", 7),), "b1", 1, facility="a.test")
        assert client.tickets(here, LINK_ROLE_CONSUME) is not None


async def test_who_asks_for_a_ticket_while_the_client_closes_is_told_so(tmp_path: Path) -> None:
    directory = enroll(tmp_path / "config", "a.test")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        document = {"trust_domain": "a.test", "address": address, "enroll_address": address}
        (directory / "member.json").write_text(json.dumps(document))
        async with AsyncClient(config_dir=tmp_path / "config") as client:
            issue = client.tickets(ConnectString((("h", 7),), "b1", 1), LINK_ROLE_CONSUME)
            assert issue is not None
            asking = asyncio.create_task(asyncio.to_thread(issue))
            taken, _ = await asyncio.to_thread(silent.accept)
        with taken, pytest.raises(BeamwireError) as caught:
            await asking
        assert caught.value.reason is Reason.CANCELLED


def make_facility(directory: Path, extra: str = "") -> Path:
    directory.mkdir()
    (directory / "facility.toml").write_text(f'trust_domain = "a.test"\n{extra}')
    made = Facility(directory / "made", "a.test").member("operator/somebody").directory
    (directory / "members" / "operator").mkdir(parents=True)
    made.rename(directory / "members" / "operator" / "somebody")
    return directory


def test_an_operator_calls_by_the_files_of_the_facility(tmp_path: Path) -> None:
    extra = 'address = "h:1"\nenroll_address = "h:2"\n[services]\njob = "h:3"\ncertificate = ""\n'
    found = operated_facility(make_facility(tmp_path / "a", extra))
    assert (found.trust_domain, found.home, found.enroll_address) == ("a.test", "a.test", "h:2")
    assert (found.addresses.of("job"), found.addresses.of("certificate")) == ("h:3", "h:1")
    assert str(found.credentials().identity) == "spiffe://a.test/operator/somebody"


@pytest.mark.parametrize("content", ["trust_domain =", "x = 1", "trust_domain = 'a'\nservices = 1"])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, content: str) -> None:
    directory = make_facility(tmp_path / "a")
    (directory / "facility.toml").write_text(content)
    with pytest.raises(BeamwireError, match=r"facility\.toml cannot be read"):
        operated_facility(directory)


def test_without_a_facility_or_an_operator_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(BeamwireError, match="--dir"):
        operated_facility(tmp_path)
    (make_facility(tmp_path / "a") / "members" / "operator" / "somebody").rename(tmp_path / "gone")
    with pytest.raises(BeamwireError, match="no operator's credentials"):
        operated_facility(tmp_path / "a")


def beamwire(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(cli, ["trust", *arguments], input=stdin)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    facility = Facility(tmp_path / "b", "b.test")
    introduction = Introduction(
        "b.test", "h:1", "h:2", (facility.authority.root_der,), 1, datetime(2999, 1, 1, tzinfo=UTC)
    )
    path = tmp_path / "b.introduction"
    path.write_text(facility.authority.sign_introduction(introduction) + "\n")
    return path


def test_nothing_is_accepted_unseen(tmp_path: Path, document: Path) -> None:
    directory = str(make_facility(tmp_path / "a", 'address = "127.0.0.1:1"\n'))
    silent = beamwire("accept", str(document), "--dir", directory)
    assert silent.exit_code == 2
    assert "--fingerprint" in silent.output
    wrong = beamwire("accept", str(document), "--dir", directory, "--fingerprint", "ab" * 32)
    assert wrong.exit_code == 3
    assert "not the one that was given" in wrong.output
    good = beamwire(
        "accept", str(document), "--dir", directory, "--fingerprint", fingerprint(document.read_text().strip())
    )
    assert "127.0.0.1:1 cannot be reached" in good.output


@pytest.mark.parametrize("text", ["", "hello", "bwi1.a.b.c", "bwi1." + "A" * 20_000])
def test_what_is_no_introduction_is_refused_before_anybody_is_asked(tmp_path: Path, text: str) -> None:
    result = beamwire("accept", "-", "--yes", stdin=text)
    assert result.exit_code == 3
    assert "the introduction cannot be used" in result.output
    assert len(result.output.splitlines()) == 1


def test_who_is_no_operator_anywhere_is_told_how(tmp_path: Path, document: Path) -> None:
    enroll(tmp_path / "config", "a.test")
    for command in (["introduce"], ["accept", str(document), "--yes"], ["refresh", "b.test"], ["remove", "b.test"]):
        result = beamwire(*command)
        assert result.exit_code == 2
        assert "--dir" in result.output
