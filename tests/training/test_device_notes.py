"""Notes about GPUs that are slow or unused, and the threads of the host."""

import pytest
import torch

from training.distributed import device
from training.distributed.device import device_notes, set_host_threads

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def on_gpu_host(monkeypatch):
    """A computer with an NVIDIA driver, and a CUDA build of PyTorch that finds no GPU."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)


def test_a_gpu_without_bf16_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    (note,) = device_notes(CUDA, "bf16")
    assert "Tesla T4" in note
    assert "--training_dtype fp32" in note
    assert device_notes(CUDA, "fp32") == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert device_notes(CUDA, "bf16") == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert device_notes(CUDA, "bf16") == []


@pytest.mark.usefixtures("on_gpu_host")
def test_an_unused_gpu_is_said_with_its_reason(monkeypatch):
    (note,) = device_notes(CPU, "bf16")
    assert "nvidia-smi" in note
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES= hides it" in device_notes(CPU, "bf16")[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    def init() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040).\nMore"
        )

    monkeypatch.setattr(torch.cuda, "init", init)
    (note,) = device_notes(CPU, "bf16")
    assert "too old (found version 11040). Update the driver" in note
    assert "More" not in note
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in device_notes(CPU, "bf16")[0]


@pytest.mark.usefixtures("on_gpu_host")
def test_a_chosen_cpu_is_no_mistake(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device_notes(CPU, "bf16") == []


def test_a_computer_without_a_gpu_gets_no_note(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(device, "has_nvidia_gpu", lambda: False)
    assert device_notes(CPU, "bf16") == []


@pytest.mark.parametrize(
    ("kind", "variables", "expected"),
    [
        (CUDA, {}, 16),
        (CUDA, {"OMP_NUM_THREADS": "1"}, 16),  # as accelerate launch sets it
        (CUDA, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "8"}, 2),
        (CUDA, {"LOCAL_WORLD_SIZE": "32"}, 1),
        (CUDA, {"OMP_NUM_THREADS": "4"}, None),
        (CPU, {}, None),
    ],
)
def test_a_process_with_a_gpu_takes_its_share_of_the_cores(monkeypatch, kind, variables, expected):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(device, "available_cores", lambda: 16)
    set_host_threads(kind)
    assert numbers == ([] if expected is None else [expected])
