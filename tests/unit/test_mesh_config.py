"""Settings: where they come from, and what a wrong one is told."""

from pathlib import Path

import pytest
from pydantic import Field

from beamwire.mesh.config import Section, Settings, load
from beamwire.mesh.errors import BeamwireError, Reason


class Server(Section):
    address: str = "127.0.0.1:0"
    workers: int = Field(default=1, ge=1)


class Limits(Section):
    transfers: int = 10


class Sample(Settings):
    trust_domain: str
    server: Server = Server()
    limits: Limits | None = None


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "facility.toml"


def refused(file: Path | None) -> BeamwireError:
    with pytest.raises(BeamwireError) as caught:
        load(Sample, file)
    assert caught.value.reason is Reason.INVALID_FIELD
    return caught.value


def test_from_a_file(file: Path) -> None:
    file.write_text('trust_domain = "x.org"\n[server]\nworkers = 4\n[limits]\ntransfers = 3\n')
    settings = load(Sample, file)
    assert settings == Sample(trust_domain="x.org", server=Server(workers=4), limits=Limits(transfers=3))


def test_the_environment_wins_key_by_key(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('trust_domain = "x.org"\n[server]\nworkers = 4\naddress = "a:1"\n')
    monkeypatch.setenv("BEAMWIRE_SERVER__WORKERS", "7")
    assert load(Sample, file).server == Server(workers=7, address="a:1")


def test_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEAMWIRE_TRUST_DOMAIN", "x.org")
    assert load(Sample, None) == Sample(trust_domain="x.org")


def test_one_load_does_not_touch_the_next(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('trust_domain = "x.org"\n[server]\nworkers = 4\n')
    load(Sample, file)
    monkeypatch.setenv("BEAMWIRE_TRUST_DOMAIN", "y.org")
    assert load(Sample, None).server.workers == 1


@pytest.mark.parametrize(
    ("text", "field", "says"),
    [
        ('trust_domian = "x"', "trust_domian", "unknown key; did you mean trust_domain?"),
        ("[server]\nadress = 'x'", "server.adress", "unknown key; did you mean server.address?"),
        ("[limits]\ntransfer = 1", "limits.transfer", "did you mean limits.transfers?"),
        ("workers = 3", "workers", "did you mean server.workers?"),
        ("zzzzzzzzzzzz = 3", "zzzzzzzzzzzz", "unknown key"),
        ("[server]\nworkers = 0", "server.workers", "greater than or equal to 1, not 0"),
        ("[server]\nworkers = 'two'", "server.workers", "not 'two'"),
    ],
)
def test_a_wrong_key_is_named_with_its_file_and_remedy(file: Path, text: str, field: str, says: str) -> None:
    wanted = "" if text.startswith("trust") else 'trust_domain = "x"\n'
    file.write_text(wanted + text)
    error = refused(file)
    violation = next(violation for violation in error.violations if violation.field == field)
    assert says in violation.description
    assert f"{file}: {field}: {violation.description}" in error.message.splitlines()


def test_every_wrong_key_is_told_at_once(file: Path) -> None:
    file.write_text("[server]\nworkers = 0\nport = 3\n")
    error = refused(file)
    assert {violation.field for violation in error.violations} == {"trust_domain", "server.workers", "server.port"}
    assert "trust_domain: is required and missing" in error.message


def test_a_wrong_variable_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('trust_domain = "x"\n[server]\nworkers = 1\n')
    monkeypatch.setenv("BEAMWIRE_SERVER__WORKERS", "none")
    assert "environment variable BEAMWIRE_SERVER__WORKERS: server.workers" in refused(file).message


def test_an_unknown_nested_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEAMWIRE_TRUST_DOMAIN", "x")
    monkeypatch.setenv("BEAMWIRE_SERVER__WORKER", "2")
    error = refused(None)
    assert "environment variable BEAMWIRE_SERVER__WORKER" in error.message
    assert "did you mean server.workers?" in error.message


@pytest.mark.parametrize(
    ("content", "says"), [(b"a = = 1", "line 1, column 5"), (b"\xff", "cannot be read"), (None, "No such file")]
)
def test_a_file_that_cannot_be_read(file: Path, content: bytes | None, says: str) -> None:
    if content is not None:
        file.write_bytes(content)
    error = refused(file)
    assert str(file) in error.message
    assert says in error.message
