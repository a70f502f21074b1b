"""Two machines with a network between them: a run over both, and what becomes of it when the network fails."""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hosts import Machine, missing
from helpers.project import BASE, PROJECT, TWEMOJI, accelerate_launch
from safetensors.torch import load_file

WHY_NOT = missing("ip")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(WHY_NOT), reason=f"no made-up hosts: {WHY_NOT}"),
]
STEPS = 60
TIMEOUT = 20.0  # seconds
ADDRESSES = {"host1": "10.78.0.1", "host2": "10.78.0.2"}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Machine]]:
    """host1 and host2, with one cable between them and no way to anywhere else."""
    names = tmp_path / "hosts"
    names.write_text(
        "127.0.0.1 localhost\n"
        + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
    )
    machines = [
        Machine(name, names, ["sleep", "infinity"], tmp_path / "hosts.log", network=True)
        for name in ADDRESSES
    ]
    try:
        ends = [["eth0", "netns", str(machine.first.pid)] for machine in machines]
        run("ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for machine in machines:
            ip(machine, "addr", "add", f"{ADDRESSES[machine.name]}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip(machine, "link", "set", device, "up")
        yield machines
    finally:
        for machine in machines:
            machine.crash()


def run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=30)


def ip(machine: Machine, *words: str) -> None:
    assert machine.inside("ip", *words).wait(timeout=30) == 0, words


class Launch:
    """`accelerate launch` on both machines."""

    def __init__(self, machines: list[Machine], folder: Path, cache_dir: Path):
        self.logs = [folder.parent / f"{folder.name}-{machine.name}.log" for machine in machines]
        self.folder = folder
        config = str(PROJECT / "accelerate_configs" / "multi_node.yaml")
        options = [
            f"--model.path={BASE}", f"--data.path={TWEMOJI / 'train'}", f"--data.cache_dir={cache_dir}",
            "--data.resolution=64", f"--output_dir={folder}", f"--steps={STEPS}", "--rank=4", "--training_dtype=fp32",
            "--lora_dtype=fp32", "--no_gradient_checkpointing", "--no_preview", "--adapter.targets=attention",
            "--checkpoint.every=10", f"--distributed.timeout_minutes={TIMEOUT / 60}",
        ]  # fmt: skip
        self.launchers = []
        for rank, (machine, log) in enumerate(zip(machines, self.logs, strict=True)):
            launcher = accelerate_launch(
                "--config_file", config, "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank),
                "--main_process_ip", "host1", "--main_process_port", "29500",
            )  # fmt: skip
            environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
            words = [*launcher, str(PROJECT / "train_lora.py"), *options]
            with log.open("w") as out:
                self.launchers.append(
                    machine.inside(*words, stdout=out, stderr=out, env=environment)
                )

    def wait_for_checkpoint(self) -> None:
        deadline = time.monotonic() + 240
        while not any(self.folder.glob("checkpoints/step_*")):
            assert time.monotonic() < deadline, self.output()
            assert all(launcher.poll() is None for launcher in self.launchers), self.output()
            time.sleep(0.05)

    def ended(self, seconds: float) -> list[int]:
        """The launchers' exit codes."""
        deadline = time.monotonic() + seconds
        return [
            launcher.wait(timeout=max(0.1, deadline - time.monotonic()))
            for launcher in self.launchers
        ]

    def output(self) -> str:
        return "\n".join(
            f"{log.name}:\n{log.read_text(encoding='utf-8')[-4000:]}" for log in self.logs
        )


@pytest.mark.long
def test_a_cut_link_ends_the_run_on_both_hosts_and_the_same_command_goes_on(
    hosts, cache_dir, tmp_path
):
    straight = Launch(hosts, tmp_path / "straight", cache_dir)
    assert straight.ended(240) == [0, 0], straight.output()

    cut = Launch(hosts, tmp_path / "cut", cache_dir)
    cut.wait_for_checkpoint()
    ip(hosts[1], "link", "set", "eth0", "down")
    since = time.monotonic()
    assert cut.ended(TIMEOUT + 60) == [1, 1], cut.output()
    print(f"ended {time.monotonic() - since:.1f} s after the link")
    for log in cut.logs:
        assert re.search(r"[Tt]imed out|[Tt]imeout|Connection", log.read_text(encoding="utf-8")), (
            cut.output()
        )
    assert not (tmp_path / "cut" / "lora.safetensors").exists()

    ip(hosts[1], "link", "set", "eth0", "up")
    again = Launch(hosts, tmp_path / "cut", cache_dir)
    assert again.ended(240) == [0, 0], again.output()
    assert any("resumed at step" in log.read_text(encoding="utf-8") for log in again.logs), (
        again.output()
    )
    adapters = [load_file(tmp_path / name / "lora.safetensors") for name in ("straight", "cut")]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(adapters[1][name].equal(tensor) for name, tensor in adapters[0].items())
