"""The device of a run: notes about GPUs that are slow or unused, and threads of the host."""

import os
import shutil
from pathlib import Path

import torch

BF16_CAPABILITY = (8, 0)
"""First compute capability with bf16 arithmetic: NVIDIA's Ampere, 2020."""


def device_notes(device: torch.device, training_dtype: str) -> list[str]:
    """Return notes about a GPU that emulates bf16, or a GPU that is not used."""
    if device.type == "cuda":
        return bf16_notes(device, training_dtype)
    if device.type == "cpu":
        return unused_gpu_notes()
    return []


def bf16_notes(device: torch.device, training_dtype: str) -> list[str]:
    """Return a note if the GPU has no bf16 arithmetic, which training in bf16 emulates."""
    is_amd = torch.version.hip is not None
    if is_amd or training_dtype != "bf16":
        return []
    if torch.cuda.get_device_capability(device) >= BF16_CAPABILITY:
        return []
    name = torch.cuda.get_device_name(device)
    return [
        f"{name} has no bf16 arithmetic, so bf16 is emulated, which is slow. "
        "--training_dtype fp32 is faster and needs about twice the memory"
    ]


def unused_gpu_notes() -> list[str]:
    """Return a note if this computer has an NVIDIA GPU and the user did not choose the CPU."""
    has_chosen_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")
    if has_chosen_cpu or not has_nvidia_gpu():
        return []
    return [f"training on the CPU, although there is an NVIDIA GPU: {unused_gpu_reason()}"]


def has_nvidia_gpu() -> bool:
    """Return whether a driver of NVIDIA is installed, on Linux or Windows."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def unused_gpu_reason() -> str:
    """Return the reason why torch does not use the GPU, and what to do."""
    if torch.version.cuda is None:
        return (
            f"PyTorch {torch.__version__} is built without CUDA. "
            "Install a CUDA build: https://pytorch.org/get-started"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip(" -1"):
        return f"CUDA_VISIBLE_DEVICES={visible} hides it. Unset the variable"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        return (
            f"{reason.rstrip('.')}. Update the driver, or install a PyTorch for its version of CUDA"
        )
    return "PyTorch finds none. Check that nvidia-smi lists it"


def set_host_threads(device: torch.device) -> None:
    """Give this process its share of the CPU cores, if it trains on a GPU.

    `accelerate launch` sets OMP_NUM_THREADS to 1, which suits the steps but not the singular values
    that some adapters start from or are exported with. Another number is the user's, and stays. So
    does the number of a run on the CPU, because it changes rounding."""
    if device.type == "cpu" or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, available_cores() // num_local_processes))


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
