"""Notes about GPUs that are slow or unused, and the threads of the host."""

from types import SimpleNamespace

import pytest
import torch

from training.distributed import device
from training.distributed.device import device_notes, host_threads

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def cuda_fails(monkeypatch, message: str) -> None:
    """CUDA starts with an error."""

    def init() -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(torch.cuda, "init", init)


@pytest.fixture
def on_gpu_host(monkeypatch):
    """A computer with an NVIDIA driver, and a CUDA build of PyTorch that finds no GPU."""
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(device, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cuda_fails(monkeypatch, "No CUDA GPUs are available")


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
def test_a_gpu_that_this_process_may_not_use_is_said():
    (note,) = device_notes(CPU, "bf16")
    assert "No CUDA GPUs are available. A container needs the option --gpus" in note


@pytest.mark.usefixtures("on_gpu_host")
@pytest.mark.parametrize(
    ("visible", "expected"), [("", "is empty"), (" ", "is empty"), ("-1", "is -1")]
)
def test_a_hidden_gpu_is_said(visible, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert f"CUDA_VISIBLE_DEVICES {expected}" in device_notes(CPU, "bf16")[0]


@pytest.mark.usefixtures("on_gpu_host")
@pytest.mark.parametrize("visible", ["0", "1", "11"])
def test_an_old_driver_is_said(visible, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cuda_fails(monkeypatch, "The NVIDIA driver is too old (found version 11040).\nMore")
    (note,) = device_notes(CPU, "bf16")
    assert "too old (found version 11040). Update the driver" in note
    assert "More" not in note


@pytest.mark.usefixtures("on_gpu_host")
def test_a_build_without_cuda_is_said(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in device_notes(CPU, "bf16")[0]


@pytest.mark.usefixtures("on_gpu_host")
@pytest.mark.parametrize(
    "variable", ["ACCELERATE_USE_CPU=true", "ACCELERATE_USE_CPU=yes", "ACCELERATE_TORCH_DEVICE=cpu"]
)
def test_a_chosen_cpu_is_no_mistake(variable, monkeypatch):
    monkeypatch.setenv(*variable.split("="))
    assert device_notes(CPU, "bf16") == []


def test_a_computer_without_a_gpu_gets_no_note(monkeypatch):
    monkeypatch.setattr(device, "has_nvidia_gpu", lambda: False)
    assert device_notes(CPU, "bf16") == []


LAUNCHED = {"LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("kind", "variables", "expected"),
    [
        (CUDA, LAUNCHED, 12),
        (CUDA, {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, 12),
        (CUDA, {**LAUNCHED, "LOCAL_WORLD_SIZE": "4"}, 3),
        (CUDA, {**LAUNCHED, "LOCAL_WORLD_SIZE": "32"}, 1),
        (CUDA, {"OMP_NUM_THREADS": "1"}, None),  # the user's own
        (CUDA, {"LOCAL_RANK": "0", "OMP_NUM_THREADS": "4"}, None),
        (CUDA, {"LOCAL_RANK": "0"}, None),
        (CPU, LAUNCHED, None),
    ],
)
def test_a_launched_process_with_a_gpu_takes_its_share_of_the_cores(
    monkeypatch, kind, variables, expected
):
    names = ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(device, "available_cores", lambda: 12)
    earlier = torch.get_num_threads()
    with host_threads(SimpleNamespace(device=kind, num_processes=1)):
        assert numbers == ([] if expected is None else [expected])
    assert numbers == ([] if expected is None else [expected, earlier])


@pytest.mark.parametrize(("other_share", "expected"), [(5, 5), (99, 16), (0, 0)])
def test_all_processes_take_the_same_number_of_cores(other_share, expected, monkeypatch):
    """0: on another computer the user has set a number."""
    for name, value in {**LAUNCHED, "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(device, "available_cores", lambda: 64)
    monkeypatch.setattr(device, "gather_object", lambda shares: [*shares, other_share])
    accelerator = SimpleNamespace(num_processes=2)
    assert device.shared_number_of_threads(accelerator) == expected
