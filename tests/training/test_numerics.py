"""Numerics of GPUs: set before torch reads them, in one place, and not against the user's own settings."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.project import PROJECT

from training.config import TrainConfig
from training.numerics import apply_numerics

CODE = """
import os, sys
import train_lora
from training import numerics, run
def stop(config, signals):
    assert "torch" not in sys.modules, "CUDA reads these variables when torch is imported"
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        print(name, os.environ.get(name))
    return 0
train_lora.run_training = stop
sys.exit(train_lora.main(sys.argv[1:]))
"""


def environment_of(options: list[str], tmp_path, **environment: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    result = subprocess.run(
        [sys.executable, "-c", CODE, f"--output_dir={tmp_path}", *options],
        cwd=PROJECT,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(line.split() for line in result.stdout.splitlines())


def test_variables_are_set_before_torch_is_imported(tmp_path):
    found = environment_of([], tmp_path)
    assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert found["CUBLAS_WORKSPACE_CONFIG"] == "None"
    found = environment_of(["--deterministic"], tmp_path)
    assert found["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_variables_stay(name, tmp_path):
    settings = {name: "max_split_size_mb:64", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    found = environment_of(["--deterministic"], tmp_path, **settings)
    assert found[name] == "max_split_size_mb:64"
    assert found["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert "expandable_segments:True" not in found.values()


@pytest.fixture
def restored():
    earlier = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.fp32_precision = earlier
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
def test_matrix_products_and_convolutions_have_one_precision(tf32, deterministic, restored):
    apply_numerics(TrainConfig(tf32=tf32, deterministic=deterministic))
    precision = "tf32" if tf32 else "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == precision
    assert torch.backends.cudnn.conv.fp32_precision == precision
    assert torch.backends.cudnn.benchmark is not deterministic
    assert torch.are_deterministic_algorithms_enabled() is deterministic


def test_a_deterministic_run_uses_no_algorithm_that_is_not(options, run_here, restored):
    assert (
        run_here([*options, "--deterministic", "--preview", "--sample.num_inference_steps=2"]) == 0
    )
