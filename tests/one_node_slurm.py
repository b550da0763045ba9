"""A real Slurm cluster of one node with two fake GPUs, for tests, with its own munge, ports, state and logs; with
`whole_node` of a second one, with four, which the partition "whole" hands out as a whole; with `limits` also with
accounting, in a database of its own, so that `sacctmgr` can set limits.

Needs root and the Debian packages that `.ci/system-packages` installs; no service of the machine is used.
What it starts ends with the `with` block, and with the process that started it.

    with OneNodeSlurm(folder) as cluster:
        subprocess.run(["sbatch", ...], env=cluster.environment)
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo", "srun")
PROGRAMS += ("slurmdbd", "sacctmgr", "mariadbd")
START_TIMEOUT_S = 60
_PR_SET_PDEATHSIG = 1

CONF = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=15
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=5
SlurmdTimeout=300
MessageTimeout=60
MaxArraySize=101
SchedulerParameters=sched_min_interval=0,sched_interval=1,batch_sched_delay=0,bf_interval=1
SelectType=select/cons_tres
DefMemPerCPU=1000
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=divided NodeAddr=127.0.0.1 Gres=gpu:2 CPUs={cpus} RealMemory=200000
PartitionName=debug Nodes=divided Default=YES MaxTime=UNLIMITED
"""
WHOLE_NODE = """\
NodeName=whole NodeAddr=127.0.0.1 Port={port} Gres=gpu:4 CPUs=8 RealMemory=200000
PartitionName=whole Nodes=whole OverSubscribe=EXCLUSIVE
"""
NO_ACCOUNTING = """\
AccountingStorageType=accounting_storage/none
"""
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageEnforce=limits
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.sock
"""
DATABASE = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost=localhost
DbdPort={port}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=root
"""
SYSTEM_TABLES = "m*/m*_system_tables.sql"  # below /usr/share; slurmdbd finds limits with stored procedures


def why_not() -> str:
    """Why there can be no cluster on this machine; empty if there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"Slurm is not installed here ({', '.join(missing)} missing): .ci/system-packages installs it"
    if os.geteuid() != 0:
        return "a cluster with fake GPUs can be started by root only"
    return ""


class OneNodeSlurm:
    """The cluster; `environment` is what its clients (sbatch, squeue, ...) need."""

    def __init__(
        self, folder: Path, cpus: int = 4, whole_node: bool = False, limits: bool = False, more: str = ""
    ):
        """`more`: further lines of slurm.conf."""
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": _path(),
        }
        self.daemons: dict[str, subprocess.Popen] = {}
        self.whole_node, self.limits = whole_node, limits
        for name in ("state", "dev"):
            (folder / name).mkdir(parents=True)
        for number in range(6):  # Slurm wants a character device for each GPU; these are /dev/null's twins
            os.mknod(folder / "dev" / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        controller_port, node_port, whole_port, accounting_port, self.database_port = _free_ports(5)
        conf = CONF.format(folder=folder, controller_port=controller_port, node_port=node_port, cpus=cpus)
        gres = f"NodeName=divided Name=gpu File={folder}/dev/gpu[0-1]\n"
        if whole_node:
            conf += WHOLE_NODE.format(port=whole_port)
            gres += f"NodeName=whole Name=gpu File={folder}/dev/gpu[2-5]\n"
        conf += (ACCOUNTING if limits else NO_ACCOUNTING).format(folder=folder, port=accounting_port)
        database = DATABASE.format(folder=folder, port=accounting_port, database_port=self.database_port)
        (folder / "slurmdbd.conf").write_text(database)
        (folder / "slurmdbd.conf").chmod(0o600)
        (folder / "slurm.conf").write_text(conf + more)
        (folder / "gres.conf").write_text(gres)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)

    def __enter__(self) -> "OneNodeSlurm":
        try:
            files = {name: self.folder / f"munge.{name}" for name in ("sock", "key", "pid", "log", "seed")}
            options = [f"--{name}-file={files[name]}" for name in ("key", "pid", "log", "seed")]
            self._start("munged", "munged", "--foreground", "--force", f"--socket={files['sock']}", *options)
            _wait(files["sock"].exists, "munge's socket")
            if self.limits:
                self.start_accounting()
            self.start_controller()
            self.start_node()
            if self.whole_node:
                self._start("slurmd whole", "slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", "whole")
            _wait(lambda: set(self.ask("sinfo", "--noheader", "--format=%t").split()) == {"idle"}, "the nodes")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start_accounting(self) -> None:
        """Start mariadbd and slurmdbd, and make the cluster known to it."""
        folder = self.folder / "database"
        folder.mkdir()
        program = ["mariadbd", "--no-defaults", "--user=root", f"--datadir={folder}", "--skip-grant-tables"]
        (statements,) = Path("/usr/share").glob(SYSTEM_TABLES)
        tables = f"create database mysql;\nuse mysql;\n{statements.read_text()}"
        prepare = [*program, "--bootstrap"]
        subprocess.run(prepare, input=tables, text=True, check=True, capture_output=True, env=self.environment)
        own = [f"--socket={folder}/sock", f"--pid-file={folder}/pid", f"--port={self.database_port}"]
        self._start("mariadbd", *program, *own, "--bind-address=127.0.0.1")
        _wait((folder / "sock").exists, "mariadbd")
        self._start("slurmdbd", "slurmdbd", "-D")
        _wait(lambda: self.ask("sacctmgr", "--immediate", "add", "cluster", "test"), "slurmdbd")

    def start_controller(self) -> None:
        """Start slurmctld and wait until it answers; its state is what the last one saved."""
        self._start("slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        _wait(lambda: "UP" in self.ask("scontrol", "ping"), "slurmctld")

    def start_node(self) -> None:
        self._start("slurmd", "slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", "divided")

    def end(self, name: str) -> None:
        """End a daemon as a restart does: slurmctld saves its state."""
        daemon = self.daemons.pop(name, None)
        if daemon:
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def crash_node(self) -> None:
        """End slurmd and everything that it started, as a power cut does, and let the controller notice it now
        (which it would by itself after SlurmdTimeout)."""
        self.daemons["slurmd"].kill()
        self.daemons.pop("slurmd").wait()
        self._kill_jobs()
        self.ask("scontrol", "update", "NodeName=divided", "State=down", "Reason=crash")

    def boot_node(self) -> None:
        """The node after a crash is there again."""
        self.start_node()
        self.ask("scontrol", "update", "NodeName=divided", "State=resume")

    def ask(self, *command: str) -> str:
        """What a client prints; empty if it fails."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout.strip()

    def stop(self) -> None:
        """Cancel all jobs, then end the daemons and what may be left of the jobs."""
        if "slurmctld" in self.daemons and "slurmd" in self.daemons:
            self.ask("scancel", "--user=root")
        self._kill_jobs()
        for name in ("slurmd", "slurmd whole", "slurmctld", "slurmdbd", "mariadbd", "munged"):
            self.end(name)

    def _start(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=out, preexec_fn=_die_with_parent
            )

    def _kill_jobs(self) -> None:
        for process in self._job_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _job_processes(self) -> list[int]:
        """Every process of a job, by the configuration in its environment, and its slurmstepd."""
        mark = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
        ours = {os.getpid(), *(daemon.pid for daemon in self.daemons.values())}
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) not in ours:
                with contextlib.suppress(OSError):
                    environment = (entry / "environ").read_bytes().split(b"\0")
                    in_job = any(item.startswith(b"SLURM_JOB_ID=") for item in environment)
                    name = (entry / "comm").read_text().strip()
                    if mark in environment and (in_job or name == "slurmstepd"):
                        found.append(int(entry.name))
        return found


def _path() -> str:
    """Debian's daemons lie in /usr/sbin, which not every PATH has."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(condition, what: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} is not there after {START_TIMEOUT_S} s")
        time.sleep(0.05)
