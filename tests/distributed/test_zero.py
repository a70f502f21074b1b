"""DeepSpeed's ZeRO-2, in an environment of its own: where it is installed, all else starts more slowly."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from helpers.project import PROJECT, RANKS
from helpers.runs import CONFIGS, assert_same_adapter, assert_same_run, common, launched, runs_file

pytestmark = pytest.mark.slow
OTHERS = {
    "LoHa": ["--algorithm=LoHa"],
    "LoKr": ["--algorithm=LoKr"],
    "OFT": ["--algorithm=OFT", "--adapter.block_size=28"],
    "EMA": ["--ema.decay=0.9", "--objective.preserve.weight=0.5"],
    "Lion": ["--optimizer=Lion", "--optim.eps=None"],
}
PACKAGES = ("deepspeed", "hjson", "msgpack", "ninja", "py-cpuinfo")


def without_extension(site_packages: Path) -> None:
    """Keeps DeepSpeed from compiling its collectives for CPUs, a minute of two cores; GPUs have none."""
    path = site_packages / "deepspeed" / "ops" / "op_builder" / "cpu" / "comm.py"
    text = path.read_text(encoding="utf-8")
    assert "return super().is_compatible(verbose)" in text
    path.write_text(text.replace("return super().is_compatible(verbose)", "return False"))


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    """Runs tests/ranks.py under deepspeed_zero2.yaml on two processes."""
    folder = tmp_path_factory.mktemp("zero")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    inside = next((folder / "venv" / "lib").iterdir()) / "site-packages"
    (inside / "here.pth").write_text(sysconfig.get_paths()["purelib"])
    install = [
        folder / "venv" / "bin" / "pip",
        "install",
        "-q",
        "--no-deps",
        "-c",
        PROJECT / "constraints.txt",
    ]
    installed = subprocess.run([*install, *PACKAGES], capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(
            f"DeepSpeed cannot be installed here: {installed.stderr.strip().splitlines()[-1]}"
        )
    without_extension(inside)
    python = folder / "venv" / "bin" / "python"
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{python.parent}:{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(folder / "built"),
    }  # fmt: skip

    def run(*runs: list[str]) -> None:
        command = [python, "-m", "accelerate.commands.launch", f"--config_file={CONFIGS / 'deepspeed_zero2.yaml'}",
                   RANKS, runs_file(folder, *runs)]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=500, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "resumed at step 2" in done.stdout or len(runs) == 1

    return run


@pytest.mark.parametrize(
    "names", [["OFT"], pytest.param([*OTHERS], marks=pytest.mark.long)], ids=len
)
def test_zero_is_the_same_run_and_its_checkpoints_are_everyones(zero, names, tmp_path):
    """Straight, stopped and gone on with, and gone on with by DDP."""
    others = {name: OTHERS[name] for name in names}
    options = [*common(tmp_path / "cache"), "--grad_accumulation_steps=2", "--steps=5"]
    whole, halves, other, ddp = (tmp_path / name for name in ("whole", "halves", "other", "ddp"))
    zero(
        [*options, f"--output_dir={whole}"],
        [*options, f"--output_dir={halves}", "--steps=2"],
        [*options, f"--output_dir={halves}"],
        [*options, f"--output_dir={other}", "--steps=2"],
        *([*options, *more, f"--output_dir={tmp_path / name}"] for name, more in others.items()),
    )
    assert_same_adapter(whole, halves)
    runs = [[*options, f"--output_dir={ddp}"], [*options, f"--output_dir={other}"]]
    runs += [[*options, *more, f"--output_dir={ddp / name}"] for name, more in others.items()]
    result = launched("ddp", 2, runs_file(tmp_path, *runs))
    assert result.returncode == 0, result.stderr
    assert "resumed at step 2" in result.stdout
    for folder in (ddp, other):
        assert_same_run(whole, folder)
    for name in others:
        # of a gradient that is nothing but rounding Lion takes the sign
        assert_same_run(tmp_path / name, ddp / name, 1e-3 if name == "Lion" else 1e-5)
