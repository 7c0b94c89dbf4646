"""What a service of another facility may have run: what its rule names, and nothing that changes what that is."""

from __future__ import annotations

from pathlib import Path

import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.ids import Role
from beamwire.mesh.patterns import Patterns
from beamwire.mesh.policy import Grant
from beamwire.services.job.model import Callback, InputFile, JobSpec, Placement, Resources
from beamwire.services.job.partners import check

PARTNER = "spiffe://b.test/service/request"


def may(spec: JobSpec, *executables: str) -> None:
    check(spec, PARTNER, Grant(Role.PARTNER, "consumers", executables=Patterns.of(*executables)), 4)


def refused(spec: JobSpec, *executables: str, reason: Reason = Reason.POLICY_REFUSED) -> BeamwireError:
    with pytest.raises(BeamwireError) as error:
        may(spec, *executables)
    assert error.value.reason is reason
    return error.value


def test_it_runs_what_the_rule_names():
    environment = {"BEAMWIRE_CONNECT": "x", "BEAMWIRE_FACILITY": "b.test", "RUN": "7"}
    may(JobSpec(executable="/opt/bin/consume", environment=environment), "/opt/bin/consume")
    may(JobSpec(executable="peaknet.serve", mpi=True), "module:peaknet.*")


@pytest.mark.parametrize(
    "executable",
    ["/opt/bin/../bin/consume", "//opt/bin/consume", "/opt/bin/./consume", "consume", "./consume", "/opt/bin/consume\0",
     "/opt/bin/consume ", "/OPT/bin/consume", "", "/opt/bin/consume/", "module:x", "-c"],
)  # fmt: skip
def test_another_way_to_write_it_is_not_the_same(executable):
    error = refused(JobSpec(executable=executable), "/opt/bin/consume")
    assert "'consumers'" in error.message
    assert error.metadata["field"] == "job.spec.executable"


def test_a_rule_without_programs_gives_none():
    refused(JobSpec(executable="/bin/true"))
    refused(JobSpec(executable="this", mpi=True), "/bin/true")


@pytest.mark.parametrize("module", ["../x", "/opt/bin/consume", "a b", "peaknet.", "-m", "peaknet;x", ""])
def test_a_module_is_a_name(module):
    refused(JobSpec(executable=module, mpi=True), "module:**", "/opt/bin/consume")


def test_a_module_is_not_a_program_of_that_name():
    refused(JobSpec(executable="module:peaknet"), "module:peaknet")


def test_a_pattern_must_also_fit_what_a_link_leads_to(tmp_path: Path):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "real").touch()
    (tools / "inside").symlink_to(tools / "real")
    (tools / "outside").symlink_to("/bin/sh")
    for name in ("real", "inside"):
        may(JobSpec(executable=f"{tools}/{name}"), f"{tools.resolve()}/*")
    refused(JobSpec(executable=f"{tools}/outside"), f"{tools.resolve()}/*")
    # Named in full, it is what the operator meant: an interpreter of a virtual environment is a link too.
    may(JobSpec(executable=f"{tools}/outside"), f"{tools}/outside")


@pytest.mark.parametrize(
    "name",
    ["PATH", "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "BEAMWIRE_JOIN_TOKEN_FILE",
     "BEAMWIRE_CREDENTIALS_DIR", "HOME", "BASH_ENV", "ENV", "IFS", "TMPDIR", "NODE_OPTIONS", "JAVA_TOOL_OPTIONS",
     "HTTPS_PROXY", "https_proxy", "SSL_CERT_FILE", "HYDRA_LAUNCHER_EXEC", "OMPI_MCA_plm_rsh_agent", "GIT_SSH_COMMAND",
     "HDF5_PLUGIN_PATH",
     "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", "TORCHINDUCTOR_CACHE_DIR", "GTK_MODULES",
     "OTEL_EXPORTER_OTLP_ENDPOINT", "VIRTUAL_ENV", "ld_preload", "BASH_FUNC_x"],
)  # fmt: skip
def test_it_may_not_change_what_runs_by_the_environment(name):
    error = refused(JobSpec(executable="/bin/true", environment={"OK": "1", name: "x"}), "/bin/true")
    assert name in error.message


@pytest.mark.parametrize("name", ["", "A=B", "A B", "A\0", "BASH_FUNC_x%%", "1A"])
def test_a_variable_has_a_name(name):
    refused(JobSpec(executable="/bin/true", environment={name: "x"}), "/bin/true", reason=Reason.INVALID_FIELD)


def test_it_runs_in_its_own_directory_with_as_many_processes_as_a_transfer():
    refused(JobSpec(executable="/bin/true", directory="/tmp"), "/bin/true", reason=Reason.INVALID_FIELD)
    spec = JobSpec(executable="x", mpi=True, resources=Resources(process_count=5))
    refused(spec, "module:x", reason=Reason.INVALID_FIELD)
    may(spec.model_copy(update={"resources": Resources(process_count=4)}), "module:x")


def test_it_ends_soon_when_it_is_told_to():
    refused(JobSpec(executable="/bin/true", grace=3600), "/bin/true", reason=Reason.INVALID_FIELD)
    may(JobSpec(executable="/bin/true", grace=60), "/bin/true")


@pytest.mark.parametrize(
    "brought",
    [
        {"executable": "", "script": "#!/bin/sh\nid\n"},
        {"bundle": "env.tar", "input_files": (InputFile(path="env.tar"),)},
        {"inherit_environment": True},
        {"placement": Placement(backend="slurm", attributes={"constraint": "gpu"})},
        {"callback": Callback(url="http://127.0.0.1:8000/", secret=b"0123456789abcdef")},
        {"executable": "./uploaded"},
        {"environment": {"PATH": "/tmp"}},
    ],
)
def test_only_who_may_run_anything_may_bring_it(brought):
    spec = JobSpec(executable="/bin/true").model_copy(update=brought)
    refused(spec, "/bin/*")
    may(spec, "**")


@pytest.mark.parametrize("own", [{"identity_path": "cache/x"}, {"server_names": ("a.test",)}, {"directory": "/tmp"}])
def test_who_may_run_anything_is_still_nobody_else(own):
    refused(JobSpec(executable="/bin/true", enroll=True).model_copy(update=own), "**", reason=Reason.INVALID_FIELD)
    refused(JobSpec(executable="/bin/true", environment={"BEAMWIRE_CREDENTIALS_DIR": "/"}), "**")
