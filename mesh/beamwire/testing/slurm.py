"""A throw-away Slurm for tests: munged, slurmctld and two nodes on this host, with accounting if asked for.

Everything lies below one directory, listens on free ports, and is gone when the block is left, however it is left.
Debian's packages: slurm-wlm munge, and for accounting slurmdbd mariadb-server.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from beamwire.testing.keeping import Kept
from beamwire.testing.ports import free_port, free_ports

SLURM_PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "squeue")
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacctmgr")
# Seconds.
START_TIMEOUT = 60.0
COMMAND_TIMEOUT = 30.0
# Where Debian has the daemons, which are not on every user's path.
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# Cores that each node is said to have: jobs of tests sleep more than they compute.
NODE_CORES = 16
NODE_MEGABYTES = 4000
# Well below the 2^26 at which Slurm starts over.
MAX_FIRST_JOB_ID = 60_000_000

# What slurmd says once it has its own place and takes jobs.
_SLURMD_UP = "slurmd started on"

_SLURM_CONF = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.sock
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=pmi2
EnforcePartLimits=ALL
MailProg=/bin/true
ReturnToService=2
SlurmdTimeout={slurmd_timeout}
KillWait=5
InactiveLimit=0
SchedulerParameters=sched_min_interval=10000,batch_sched_delay=0,bf_interval=1
MinJobAge={min_job_age}
FirstJobId={first_job_id}
{accounting}
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node1_port} CPUs={cores} RealMemory={megabytes}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node2_port} CPUs={cores} RealMemory={megabytes}
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=60 DefaultTime=10 State=UP
PartitionName=short Nodes=node2 MaxTime=1 State=UP
"""

_ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={directory}/munge.sock
"""

_SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={directory}/munge.sock
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
PidFile={directory}/slurmdbd.pid
"""


def missing(accounting: bool = False) -> str:
    """Return why no Slurm can be started here; empty if one can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root to run as they do at a site"
    wanted = SLURM_PROGRAMS + (ACCOUNTING_PROGRAMS if accounting else ())
    absent = [program for program in wanted if shutil.which(program, path=PATH) is None]
    packages = "slurm-wlm munge" + (" slurmdbd mariadb-server" if accounting else "")
    return f"{', '.join(absent)} not installed; on Debian: apt-get install {packages}" if absent else ""


class Slurm:
    """A cluster of two nodes, `node1` and `node2`, with the partitions `main` and `short`.

    Args:
        directory: of its own; for sockets, so not too long.
        min_job_age: seconds for which the controller knows a job that has ended, at least 2.
        slurmd_timeout: seconds after which a node that says nothing is down, and with it what ran there.
        accounting: whether sacct knows of jobs too.
    """

    def __init__(
        self, directory: Path, *, min_job_age: int = 300, slurmd_timeout: int = 60, accounting: bool = False
    ) -> None:
        self.directory = directory
        self._kept: dict[str, Kept] = {}
        self._accounting = accounting
        self._min_job_age = min_job_age
        self._slurmd_timeout = slurmd_timeout
        self._dbd_port = free_port()

    @property
    def conf(self) -> Path:
        """The file that SLURM_CONF names."""
        return self.directory / "slurm.conf"

    @property
    def environment(self) -> Mapping[str, str]:
        """What Slurm's commands need in their environment."""
        return {"PATH": PATH, "SLURM_CONF": str(self.conf), "HOME": str(self.directory), "LANG": "C.UTF-8"}

    def start(self) -> None:
        """Start everything, and wait until jobs can run."""
        self._write_files()
        munge = ("munged", "--foreground", "--force", *self._munge_options())
        self._keep("munged", *munge)
        _until((self.directory / "munge.sock").exists, "munged", self.log)
        if self._accounting:
            self._start_accounting()
        self.start_controller()
        for node in ("node1", "node2"):
            self.start_node(node)
        _until(lambda: self.node_states() == {"node1": "idle", "node2": "idle"}, "two idle nodes", self.log)

    def stop(self) -> None:
        """Kill everything, jobs first."""
        for name in reversed(list(self._kept)):
            self._kept.pop(name).kill()

    def start_controller(self) -> None:
        """Start slurmctld, on the state that an earlier one left."""
        self._keep("slurmctld", "slurmctld", "-D")
        _until(lambda: self.command("scontrol", "ping", check=False).returncode == 0, "slurmctld", self.log)

    def stop_controller(self) -> None:
        """End slurmctld: an outage. Jobs go on. Killed, it would forget what it was told in the last seconds."""
        self._kept.pop("slurmctld").end()

    def start_node(self, node: str, hidden: Sequence[Path] = ()) -> None:
        """Start the slurmd of a node, where some files of this host cannot be read or run."""
        log = self.directory / f"{node}.log"
        before = log.read_text(errors="replace").count(_SLURMD_UP) if log.exists() else 0
        hide = 'for file; do mount --bind /dev/null "$file" || exit 1; done; exec "$0" -D -N ' + node
        masked = ("unshare", "-m", "sh", "-c", hide, "slurmd", *map(str, hidden))
        kept = self._keep(node, *(masked if hidden else ("slurmd", "-D", "-N", node)))
        _until(lambda: kept.log().count(_SLURMD_UP) > before, node, self.log)

    def kill_node(self, node: str) -> None:
        """End a node as a power cut does: its slurmd, and all that runs on it."""
        self._kept.pop(node).kill()

    def command(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands as an operator."""
        done = subprocess.run(
            command,
            env=self.environment,
            # Where jobs write that are not told where to.
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT,
            check=False,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
        return done

    def node_states(self) -> dict[str, str]:
        """Return the state of each node, in sinfo's words."""
        done = self.command("sinfo", "--noheader", "--Node", "-p", "main", "-o", "%N %t", check=False)
        return dict(line.split() for line in done.stdout.splitlines())

    def jobs(self) -> list[str]:
        """Return the ids of the jobs that have not ended."""
        return self.command("squeue", "--noheader", "-o", "%i").stdout.split()

    def log(self) -> str:
        """Return what all daemons printed."""
        return "".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in self.directory.glob("*.log"))

    def _keep(self, name: str, *command: str) -> Kept:
        env = {**self.environment, **{k: v for k, v in os.environ.items() if k in ("PYTHONPATH", "VIRTUAL_ENV")}}
        log = self.directory / f"{name}.log"
        self._kept[name] = Kept(command, log=log, env=env, cwd=self.directory)
        return self._kept[name]

    def _munge_options(self) -> list[str]:
        names = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munge.out"}
        names["seed-file"] = "munge.seed"
        return [f"--{option}={self.directory / name}" for option, name in names.items()]

    def _write_files(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        # munged trusts no key and no socket in a directory that others may write.
        self.directory.chmod(0o755)
        for name in ("state", "spool-node1", "spool-node2"):
            (self.directory / name).mkdir(exist_ok=True)
        self.command("mungekey", "--create", f"--keyfile={self.directory / 'munge.key'}")
        accounting = _ACCOUNTING.format(port=self._dbd_port, directory=self.directory) if self._accounting else ""
        ports = dict(zip(("controller_port", "node1_port", "node2_port"), free_ports(3), strict=True))
        text = _SLURM_CONF.format(
            host=socket.gethostname(),
            directory=self.directory,
            cores=NODE_CORES,
            megabytes=NODE_MEGABYTES,
            min_job_age=self._min_job_age,
            slurmd_timeout=self._slurmd_timeout,
            # MPICH names its shared memory by the job: two clusters on one host must have no job of the same number.
            first_job_id=random.randrange(1, MAX_FIRST_JOB_ID),
            accounting=accounting,
            **ports,
        )
        self.conf.write_text(text)

    def _start_accounting(self) -> None:
        data, sock = self.directory / "mysql", self.directory / "mysql.sock"
        self.command("mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db")
        options = (f"--datadir={data}", f"--socket={sock}", "--skip-networking", "--user=root", "--skip-grant-tables")
        self._keep("mariadbd", "mariadbd", "--no-defaults", *options, "--innodb-buffer-pool-size=64M")
        _until(sock.exists, "mariadbd", self.log)
        path = self.directory / "slurmdbd.conf"
        text = _SLURMDBD_CONF.format(directory=self.directory, host=socket.gethostname(), port=self._dbd_port)
        path.write_text(text)
        path.chmod(0o600)
        my_cnf = self.directory / "my.cnf"
        my_cnf.write_text(f"[client]\nsocket={sock}\n")
        self._keep("slurmdbd", "env", f"MYSQL_UNIX_PORT={sock}", "slurmdbd", "-D")
        _until(
            lambda: self.command("sacctmgr", "-i", "add", "cluster", "throwaway", check=False).returncode == 0,
            "slurmdbd",
            self.log,
        )


@contextlib.contextmanager
def throwaway_slurm(*, min_job_age: int = 300, slurmd_timeout: int = 60, accounting: bool = False) -> Iterator[Slurm]:
    """A Slurm for as long as the block lasts. `missing()` says beforehand whether there can be one."""
    # Its sockets lie there. Jobs are lost where the path of one has more than 107 characters, as that of a test may.
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as directory:
        slurm = Slurm(Path(directory), min_job_age=min_job_age, slurmd_timeout=slurmd_timeout, accounting=accounting)
        try:
            slurm.start()
            yield slurm
        finally:
            slurm.stop()


def _until(condition: Callable[[], bool], what: str, log: Callable[[], str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come up within {START_TIMEOUT:g} s:\n{log()}")
        time.sleep(0.02)
