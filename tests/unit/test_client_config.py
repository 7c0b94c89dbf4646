"""Where the client looks for facilities, which one it chooses, and how little importing it costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from beamwire.client import connect
from beamwire.client.config import choose_facility, config_directory, enrolled_facilities, trace_directory
from beamwire.mesh.errors import BeamwireError, Reason


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BEAMWIRE_CONFIG_DIR", "BEAMWIRE_TRACE_DIR", "BEAMWIRE_FACILITY", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)


def enrol(config: Path, domain: str, text: str | None = None) -> Path:
    directory = config / "facilities" / domain
    directory.mkdir(parents=True)
    member = {"trust_domain": domain, "address": f"{domain}:7600", "enroll_address": f"{domain}:7601"}
    (directory / "member.json").write_text(json.dumps(member) if text is None else text)
    return directory


def test_the_configuration_directory_by_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_directory() == tmp_path / ".config/beamwire"
    assert trace_directory() == tmp_path / ".local/state/beamwire/traces"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert config_directory() == tmp_path / "xdg/beamwire"
    assert trace_directory() == tmp_path / "state/beamwire/traces"
    monkeypatch.setenv("BEAMWIRE_CONFIG_DIR", str(tmp_path / "named"))
    monkeypatch.setenv("BEAMWIRE_TRACE_DIR", str(tmp_path / "traces"))
    assert config_directory() == tmp_path / "named"
    assert trace_directory() == tmp_path / "traces"
    assert config_directory(tmp_path / "explicit") == tmp_path / "explicit"


def test_no_facility_says_how_to_enrol(tmp_path: Path) -> None:
    with pytest.raises(BeamwireError, match="beamwire enroll") as caught:
        connect(config_dir=tmp_path)
    assert caught.value.reason is Reason.CERTIFICATE_INVALID


def test_the_only_facility_is_the_default(tmp_path: Path) -> None:
    directory = enrol(tmp_path, "a.example")
    facility = choose_facility(tmp_path)
    assert facility.trust_domain == "a.example"
    assert facility.addresses.of("request") == "a.example:7600"
    assert facility.directory == directory


def test_of_several_one_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enrol(tmp_path, "b.example")
    enrol(tmp_path, "a.example")
    assert [facility.trust_domain for facility in enrolled_facilities(tmp_path)] == ["a.example", "b.example"]
    with pytest.raises(BeamwireError, match=r"several facilities are enrolled \(a\.example, b\.example\)") as caught:
        choose_facility(tmp_path)
    assert caught.value.reason is Reason.INVALID_FIELD
    monkeypatch.setenv("BEAMWIRE_FACILITY", "b.example")
    assert choose_facility(tmp_path).trust_domain == "b.example"
    assert choose_facility(tmp_path, "a.example").trust_domain == "a.example"
    with pytest.raises(BeamwireError, match=r"'c\.example' is not enrolled.*a\.example, b\.example"):
        choose_facility(tmp_path, "c.example")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"address": "x"}'])
def test_a_damaged_membership_says_so(tmp_path: Path, text: str) -> None:
    enrol(tmp_path, "a.example", text)
    with pytest.raises(BeamwireError, match=r"member\.json cannot be read") as caught:
        choose_facility(tmp_path)
    assert caught.value.reason is Reason.CERTIFICATE_INVALID


@pytest.mark.parametrize("module", ["beamwire.client", "beamwire.client.cli"])
def test_importing_is_light(module: str) -> None:
    heavy = ["h5py", "mpi4py", "psana", "sqlalchemy", "aiosqlite", "torch", "hdf5plugin", "beamwire.services"]
    script = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
