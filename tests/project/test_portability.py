"""A single process trains on systems without fcntl, SIGUSR1 and os.fork, such as Windows."""

import re
import subprocess
import sys

from helpers.project import PROJECT

SCRIPT = PROJECT / "tests" / "helpers" / "portable_run.py"


def test_every_module_imports_and_a_run_trains_without_posix(options, tmp_path):
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *options, "--steps=1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    (count,) = re.findall(r"^imported (\d+) modules$", result.stdout, re.MULTILINE)
    assert int(count) > 100
    assert (tmp_path / "out" / "lora.safetensors").is_file()
    assert (tmp_path / "out" / "checkpoints" / "step_00000001").is_dir()
