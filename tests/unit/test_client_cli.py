"""The command line: help, exit codes, what it prints when something is wrong, and the commands that need no service."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from beamwire.client.cli.app import cli
from beamwire.client.cli.failures import TerminatedError, error_document, exit_code, explain
from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.mesh.identity.enrollment import JoinToken
from beamwire.testing.facility import Facility

COMMANDS = sorted(cli.commands)
REQUEST = "event_source: {type: InternalEventSource}\ndata_sources: {x: {type: IntValue}}\n"


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEAMWIRE_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("BEAMWIRE_TRACE_DIR", str(tmp_path / "traces"))
    for name in ("BEAMWIRE_FACILITY", "BEAMWIRE_JOIN_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def beamwire(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(arguments), input=stdin)


def enrol(tmp_path: Path, domain: str = "facility.test", address: str = "127.0.0.1:9") -> Facility:
    facility = Facility(tmp_path / domain, domain)
    directory = tmp_path / "config" / "facilities" / domain
    shutil.copytree(facility.member("user/alice").directory, directory)
    member = {"trust_domain": domain, "address": address, "enroll_address": address}
    (directory / "member.json").write_text(json.dumps(member))
    return facility


def token_for(tmp_path: Path, domain: str = "facility.test") -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    facility = Facility(tmp_path / f"token-{domain}", domain)
    root = x509.load_pem_x509_certificate(facility.roots_pem).public_bytes(Encoding.DER)
    return JoinToken(domain, "127.0.0.1:9", "127.0.0.1:9", root, "secret-of-the-token").encode()


def test_the_commands_are_these() -> None:
    assert COMMANDS == [
        "bench", "bridge", "can", "cancel", "cert", "completion", "describe", "enroll", "estimate", "extend",
        "facilities", "get", "job", "list", "logs", "ls", "pull", "push", "receipt", "show", "start", "token", "trust",
        "watch", "whoami",
    ]  # fmt: skip


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_says_what_it_does_and_what_the_exit_codes_mean(command: list[str]) -> None:
    result = beamwire(*command, "--help")
    assert result.exit_code == 0
    for words in ("Usage: ", "--facility", "--config-dir", "--json", "Exit codes: 0 done;", "130 interrupted"):
        assert words in " ".join(result.output.split())
    if command:
        assert cli.commands[command[0]].help


def test_version() -> None:
    result = beamwire("--version")
    assert result.exit_code == 0
    assert result.output.startswith("beamwire, version ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["get"],
        ["get", "--consumers", "0", "x.yaml"],
        ["get", "--format", "csv", "x.yaml"],
        ["get", "x.yaml", "--no-such-option"],
        ["cancel"],
        ["push", "/does/not/exist"],
        ["list", "--state", "SLEEPING"],
        ["completion", "powershell"],
        ["enroll"],
        ["enroll", "--token", "a", "--token-file", __file__],
    ],
)
def test_usage_errors_end_with_2(arguments: list[str]) -> None:
    result = beamwire(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert "Error: " in result.output or "Usage: " in result.output


def test_an_invalid_request_ends_with_2_and_one_line_per_fault(tmp_path: Path) -> None:
    enrol(tmp_path)
    path = tmp_path / "request.yaml"
    path.write_text("even_source: 1\nlease: soon\ndata_sources: {x: {type: A}}\n")
    result = beamwire("get", str(path))
    assert result.exit_code == 2
    lines = result.output.splitlines()
    assert lines[0].startswith("error: even_source: ")
    assert f"  even_source: {path}:1: unknown key 'even_source'; did you mean 'event_source'?" in lines
    assert any(line.startswith(f"  lease: {path}:2: ") for line in lines)
    assert any(line.startswith(f"  event_source: {path}: is missing") for line in lines)


def test_a_request_that_is_not_there_ends_with_2(tmp_path: Path) -> None:
    enrol(tmp_path)
    result = beamwire("get", str(tmp_path / "none.yaml"))
    assert result.exit_code == 2
    assert "No such file" in result.output


@pytest.mark.parametrize(
    "arguments", [["whoami"], ["list"], ["get", "request.yaml"], ["watch", "x"], ["push", __file__]]
)
def test_without_a_facility_it_ends_with_3_and_says_what_to_do(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "request.yaml").write_text(REQUEST)
    result = beamwire(*arguments)
    assert result.exit_code == 3
    assert "beamwire enroll" in result.output


def test_a_facility_that_cannot_be_reached_ends_with_3(tmp_path: Path) -> None:
    enrol(tmp_path)
    (tmp_path / "request.yaml").write_text(REQUEST)
    for arguments in (["describe", "x"], ["get", str(tmp_path / "request.yaml"), "-o", str(tmp_path / "out")]):
        result = beamwire(*arguments)
        assert result.exit_code == 3, result.output
        assert "127.0.0.1:9 cannot be reached" in result.output
        assert "Traceback" not in result.output
    assert list((tmp_path / "out").iterdir()) == []


def test_a_name_that_is_none_ends_with_2(tmp_path: Path) -> None:
    enrol(tmp_path)
    for command in ("describe", "watch", "receipt", "logs", "cancel", "pull"):
        assert beamwire(command, "jobs/x").exit_code == 2


def test_whoami_and_facilities(tmp_path: Path) -> None:
    enrol(tmp_path)
    result = beamwire("whoami")
    assert result.exit_code == 0
    assert "identity  spiffe://facility.test/user/alice" in result.output
    assert " left" in result.output
    document = json.loads(beamwire("whoami", "--json").output)
    assert document["identity"] == "spiffe://facility.test/user/alice"
    assert document["address"] == "127.0.0.1:9"
    enrol(tmp_path, "other.test")
    assert beamwire("whoami").exit_code == 2
    assert "other.test/user/alice" in beamwire("--facility", "other.test", "whoami").output
    assert "other.test/user/alice" in beamwire("whoami", "--facility", "other.test").output
    listed = beamwire("facilities")
    assert [line.split()[0] for line in listed.output.splitlines()] == ["FACILITY", "facility.test", "other.test"]
    assert len(json.loads(beamwire("--json", "facilities").output)["facilities"]) == 2


def test_a_facility_with_broken_credentials_is_listed_as_such(tmp_path: Path) -> None:
    enrol(tmp_path)
    (tmp_path / "config/facilities/facility.test/key.pem").unlink()
    result = beamwire("facilities")
    assert result.exit_code == 0
    assert "key.pem is missing" in result.output
    assert beamwire("whoami").exit_code == 3


def test_enrolling_refuses_what_is_not_meant(tmp_path: Path) -> None:
    damaged = beamwire("enroll", "--token", "bwj1.nonsense")
    assert damaged.exit_code == 3
    assert "six parts" in damaged.output
    token = token_for(tmp_path)
    other = beamwire("enroll", "other.test", "--token", token)
    assert other.exit_code == 2
    assert "the token is for facility.test and not for other.test" in other.output
    path = tmp_path / "token"
    path.write_text(token + "\n")
    nobody = beamwire("enroll", "facility.test", "--token-file", str(path))
    assert nobody.exit_code == 3
    assert "127.0.0.1:9" in nobody.output
    assert "secret-of-the-token" not in damaged.output + other.output + nobody.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_command(shell: str) -> None:
    result = beamwire("completion", shell)
    assert result.exit_code == 0
    assert "_BEAMWIRE_COMPLETE" in result.output
    assert "beamwire" in result.output


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_an_exit_code(reason: Reason) -> None:
    code = exit_code(BeamwireError(reason, "x"))
    assert code in (1, 2, 3)
    if reason >= Reason.PRODUCER_FAILED:
        assert code == 1


def test_signals_have_exit_codes() -> None:
    assert exit_code(KeyboardInterrupt()) == 130
    assert exit_code(TerminatedError()) == 143
    assert exit_code(OSError(errno.ENOSPC, "x")) == 1


def test_explanations(capsys: pytest.CaptureFixture[str]) -> None:
    error = BeamwireError(
        Reason.LIMIT_REACHED,
        "too many active transfers",
        metadata={"log": "line 1\nline 2"},
        violations=[FieldViolation("a", "b")],
        quota="transfers per owner",
        retry_after=5,
    )
    error.add_note("and a note")
    explain(error)
    assert capsys.readouterr().err.splitlines() == [
        "error: too many active transfers",
        "  a: b",
        "  limit: transfers per owner",
        "  try again in 5 s",
        "  | line 1",
        "  | line 2",
        "  and a note",
    ]
    explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x.h5"))
    assert capsys.readouterr().err.startswith("error: /data/x.h5: No space left on device; free some space")
    explain(KeyboardInterrupt())
    assert capsys.readouterr().err == "interrupted\n"
    explain(error, verbose=True)
    assert "BeamwireError" in capsys.readouterr().err


def test_a_fault_of_ours_shows_its_traceback_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(config: Path) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("beamwire.client.cli.members.enrolled_facilities", break_down)
    result = beamwire("facilities")
    assert result.exit_code == 1
    assert "a fault of beamwire" in result.output
    assert "Traceback" not in result.output
    assert "Traceback" in beamwire("-v", "facilities").output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_without_a_traceback(tmp_path: Path, number: int, code: int) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        enrol(tmp_path, address=f"127.0.0.1:{silent.getsockname()[1]}")
        command = [sys.executable, "-c", "from beamwire.client.cli import main; main()", "describe", "x"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        silent.settimeout(20)
        connection, _ = silent.accept()
        with connection:
            # It is in the middle of a handshake.
            connection.settimeout(20)
            assert connection.recv(1)
            process.send_signal(number)
            _, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    assert err == "interrupted\n"


def only_json(result: Result) -> dict:
    """The one line of JSON that a failure prints on standard output."""
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def test_programs_get_failures_as_json(tmp_path: Path) -> None:
    enrol(tmp_path)
    path = tmp_path / "request.yaml"
    path.write_text("even_source: 1\nlease: soon\ndata_sources: {x: {type: A}}\n")
    result = CliRunner().invoke(cli, ["--json", "get", str(path)])
    assert result.exit_code == 2
    error = only_json(result)["error"]
    assert error["reason"] == "INVALID_FIELD"
    assert error["message"].startswith("even_source: ")
    assert "even_source" in [violation["field"] for violation in error["violations"]]
    assert result.stderr.startswith("error: even_source: "), "a person is told all the same"
    plain = CliRunner().invoke(cli, ["get", str(path)])
    assert plain.stdout == ""


def test_programs_get_wrong_usage_as_json() -> None:
    result = CliRunner().invoke(cli, ["--json", "get", "--consumers", "0", "x.yaml"])
    assert result.exit_code == 2
    error = only_json(result)["error"]
    assert error["reason"] == "INVALID_FIELD"
    assert "--consumers" in error["message"]


@pytest.mark.parametrize(
    ("error", "document"),
    [
        (BeamwireError(Reason.CACHE_FAILED, "it died"), {"reason": "CACHE_FAILED", "message": "it died"}),
        (KeyboardInterrupt(), {"reason": "INTERRUPTED", "message": "interrupted"}),
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/x.h5"),
            {
                "reason": "ENOSPC",
                "message": "/data/x.h5: No space left on device; free some space, or write elsewhere with -o",
            },
        ),
        (OSError("odd"), {"reason": "INTERNAL", "message": "odd"}),
        (ZeroDivisionError("oops"), {"reason": "INTERNAL", "message": "ZeroDivisionError('oops')"}),
    ],
)
def test_every_failure_is_a_document(error: BaseException, document: dict) -> None:
    assert error_document(error) == document
    error.add_note("what came before is kept")
    assert error_document(error) == {**document, "notes": ["what came before is kept"]}


@pytest.mark.parametrize("connect", [[], ["--connect", "beamwire://127.0.0.1:9/buffers/b?epoch=1"]])
def test_push_reads_the_files_before_it_makes_a_buffer(tmp_path: Path, connect: list[str]) -> None:
    enrol(tmp_path)
    np.save(tmp_path / "good.npy", np.zeros((2, 3)))
    (tmp_path / "bad.npz").write_bytes(b"nonsense")
    result = beamwire("push", *connect, str(tmp_path / "good.npy"), str(tmp_path / "bad.npz"))
    assert result.exit_code == 2, "3 would be the facility, which is not there"
    assert "bad.npz: cannot be read as numpy arrays" in result.output
