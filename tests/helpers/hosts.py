"""Simulated machines for tests: Linux namespaces with a separate host name, processes and, optionally, network.

A machine lives as long as its first process. It leaves nothing on the real machine, even if the tests are killed.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil

TOOLS = ("unshare", "nsenter", "setpriv")


def missing(*programs: str) -> str | None:
    """Return why simulated machines with these programs are not possible here; None if they are."""
    if os.geteuid() != 0:
        return "simulated machines need root"
    absent = [name for name in (*TOOLS, *programs) if not shutil.which(name)]
    if absent:
        return f"not installed: {', '.join(absent)}"
    trial = ["unshare", "--uts", "--mount", "--net", "--pid", "--fork", "--mount-proc", "true"]
    result = subprocess.run(trial, capture_output=True, text=True, check=False)
    return f"no namespaces here: {result.stderr.strip()}" if result.returncode else None


class Machine:
    """A machine with a name and an /etc/hosts file, and `command` as its first process."""

    def __init__(
        self, name: str, hosts: Path, command: list[str], log: Path, network: bool = False
    ):
        prepare = 'echo "$1" > /proc/sys/kernel/hostname; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
        spaces = ["--uts", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child"]
        spaces += ["--net"] if network else []
        words = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            *spaces,
            "sh",
            "-ec",
            prepare,
            "sh",
            name,
            str(hosts),
        ]
        self.name = name
        with log.open("a") as out:
            self.process = subprocess.Popen(
                [*words, *command], stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

        deadline = time.monotonic() + 10
        while not self._ready():
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
            time.sleep(0.01)

    def _ready(self) -> bool:
        children = psutil.Process(self.process.pid).children()
        return bool(children) and children[0].name() not in ("unshare", "sh")

    @property
    def first(self) -> psutil.Process:
        """Return the first process of the machine, from which all others on it descend."""
        return psutil.Process(self.process.pid).children()[0]

    def running(self, words: str) -> list[psutil.Process]:
        """Return the Python processes with `words` in their command line, without launchers."""
        found = []
        for process in self.first.children(recursive=True):
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if (
                line
                and "python" in Path(line[0]).name
                and words in " ".join(line)
                and "launch" not in line
            ):
                found.append(process)
        return found

    def inside(self, *command: str, **options) -> subprocess.Popen:
        """Run a command on the machine."""
        enter = ["nsenter", "--target", str(self.first.pid), "--uts", "--mount", "--pid", "--net"]
        return subprocess.Popen([*enter, *command], **options)

    def crash(self) -> None:
        """End all processes of the machine at once, as a power cut does."""
        self.process.kill()
        self.process.wait()
