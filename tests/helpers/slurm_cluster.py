"""A real SLURM on this machine, for tests: a slurmctld, and a slurmd for each of a few simulated nodes.

The nodes are n1, n2, ... and have separate addresses on the loopback device. All files are in one folder, and no daemon
outlives the process that started it.
"""

import os
import random
import shlex
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from helpers.hosts import Machine, missing

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
NODE_DOWN_AFTER = 5  # seconds without an answer

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
MpiDefault=none
# the processes that torchrun starts have separate sessions, and proctrack/pgid would lose them
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/spool/%n.pid
# two clusters on one machine must not derive the same rendezvous port from their jobs' ids
FirstJobId={first_job}
KillWait=20
ReturnToService=2
SlurmdTimeout={node_down_after}
JobRequeue=1
# nodes may claim any resources
SlurmdParameters=config_overrides
GresTypes=gpu
"""
NODE = "NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} CPUs=2 RealMemory=8192 Gres=gpu:2"
PARTITION = "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"


def why_not() -> str | None:
    """Return why SLURM cannot run here; None if it can."""
    return missing(*PROGRAMS)


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for a condition. Raises AssertionError after `seconds`. `what`: names the condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)


class SlurmCluster:
    """A cluster that is started once. Tests must call `stop` at the end, also after a failure."""

    def __init__(self, folder: Path, nodes: int = 2):
        self.folder = folder
        self.addresses = {f"n{k}": f"127.0.0.{10 + k}" for k in range(1, nodes + 1)}
        self.machines: dict[str, Machine] = {}
        self.daemons: list[subprocess.Popen] = []
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        (self.folder / "spool").mkdir()
        (self.folder / "state").mkdir()
        self._write_config()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = {"key-file": key} | {
            f"{f}-file": self.folder / f"munge.{f}" for f in ("pid", "seed", "log")
        }
        # --force: munged requires that nobody else can write to the folders above this one
        munge = [f"--{name}={path}" for name, path in files.items()]
        self._daemon(
            "munged", "--foreground", "--force", f"--socket={self.folder / 'munge.socket'}", *munge
        )
        until((self.folder / "munge.socket").exists, 10, "munged is up")
        self._daemon("slurmctld", "-D")
        for name in self.addresses:
            self.start_node(name)
        until(
            lambda: self.nodes("idle") == set(self.addresses),
            30,
            f"nodes are up; see {self.folder}/*.log",
        )

    def _write_config(self) -> None:
        port = free_ports(len(self.addresses) + 1)
        fields = {"host": socket.gethostname().split(".")[0], "port": port, "folder": self.folder,
                  "first_job": random.randint(1, 20000), "node_down_after": NODE_DOWN_AFTER}  # fmt: skip
        nodes = [NODE.format(name=name, address=address, port=port + 1 + i)
                 for i, (name, address) in enumerate(self.addresses.items())]  # fmt: skip
        (self.folder / "slurm.conf").write_text(
            "\n".join([CONFIG.format(**fields), *nodes, PARTITION, ""])
        )
        # simulated GPUs: devices that every machine has, and that are only counted
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        (self.folder / "cgroup.conf").touch()
        hosts = [
            "127.0.0.1 localhost",
            *(f"{address} {name}" for name, address in self.addresses.items()),
        ]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.log").open("a") as out:
            words = ["setpriv", "--pdeathsig", "KILL", *command]
            self.daemons.append(
                subprocess.Popen(words, env=self.environment, stdout=out, stderr=out)
            )

    def start_node(self, name: str) -> None:
        """Start a node. In its jobs gethostname() returns its name, as on a real cluster."""
        words = ["env", f"SLURM_CONF={self.folder / 'slurm.conf'}", "slurmd", "-D", "-N", name]
        self.machines[name] = Machine(
            name, self.folder / "hosts", words, self.folder / f"slurmd-{name}.log"
        )

    def stop(self) -> None:
        for machine in self.machines.values():
            machine.crash()
        for daemon in reversed(self.daemons):
            daemon.kill()
            daemon.wait()

    def run(self, *command: str) -> str:
        """Run a command of SLURM; return its output."""
        result = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, f"{shlex.join(command)}: {result.stderr}"
        return result.stdout.strip()

    def nodes(self, *states: str) -> set[str]:
        return {line.split()[0] for line in self.run("sinfo", "-hN", "-o", "%N %T").splitlines()
                if line.split()[1] in states}  # fmt: skip

    def submit(self, *words: str, cwd: Path, **environment: str) -> str:
        """Submit a batch job; return its id."""
        result = subprocess.run(["sbatch", "--parsable", *words], cwd=cwd, env={**self.environment, **environment},
                                capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Return the facts of a job: JobState, ExitCode, Restarts, NodeList, ..."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, job: str) -> bool:
        """Return whether a job has ended. It is checked twice, because a requeued job seems to end for a moment."""
        active_states = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
        for pause in (0, 1.5):
            time.sleep(pause)
            if self.job(job)["JobState"] in active_states:
                return False
        return True

    def requeued(self, job: str, restarts: int) -> bool:
        known = self.job(job)
        return known["JobState"] == "PENDING" and known["Restarts"] == str(restarts)

    def start_now(self, job: str) -> None:
        """Let a requeued job start now. SLURM would wait for two minutes."""
        # a job that starts before its old processes have ended gets a wrong allocation
        clean = ("idle", "mixed", "allocated")
        until(lambda: self.nodes(*clean) == set(self.addresses), 60, "nodes are clean")
        time.sleep(
            2
        )  # slurmd does not start a job in the second in which it ended the previous one
        self.run("scontrol", "update", f"jobid={job}", "starttime=now")

    def ranks(self) -> list[psutil.Process]:
        """Return the training processes of all nodes."""
        return [
            rank for machine in self.machines.values() for rank in machine.running("train_lora.py")
        ]


def free_ports(count: int) -> int:
    """Return the first of `count` consecutive free ports, below the range of outgoing connections."""
    while True:
        first = random.randint(16000, 30000)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("", port))
            return first
        except OSError:
            continue
