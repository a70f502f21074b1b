"""The device of a run: notes about GPUs that are slow or unused, and threads of the host."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, parse_flag_from_env

from common.process import available_cores

BF16_CAPABILITY = (8, 0)
"""First compute capability with bf16 arithmetic: NVIDIA's Ampere, 2020."""
MAX_HOST_THREADS = 16


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
        "--training_dtype fp32 is probably faster, and needs about twice the memory"
    ]


def unused_gpu_notes() -> list[str]:
    """Return a note if this computer has an NVIDIA GPU, and nobody chose the CPU."""
    has_chosen_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    has_chosen_device = "ACCELERATE_TORCH_DEVICE" in os.environ
    if has_chosen_cpu or has_chosen_device or not has_nvidia_gpu():
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
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {visible.strip() or 'empty'}"
    error = cuda_error()
    if "too old" in error:
        return f"{error}. Update the driver, or install a PyTorch for an older CUDA"
    return (
        f"{error or 'PyTorch did not find it'}. A container needs the option --gpus, and a job has "
        "to ask for a GPU; nvidia-smi lists those that this process may use"
    )


def cuda_error() -> str:
    """Return the first line of the error with which CUDA starts, without its full stop."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0].rstrip(".")
    return ""


@contextmanager
def host_threads(accelerator: Accelerator) -> Iterator[None]:
    """Compute with this process's share of the CPU cores in a block. Collective.

    `accelerate launch` sets OMP_NUM_THREADS to 1 for a process with a GPU. That suits the steps, but
    not the singular values that some adapters start from or are exported with. All processes use
    the same number of threads, which changes rounding. Without a launcher, and on the CPU, the
    number is not changed."""
    number = 0
    if accelerator.device.type != "cpu":
        number = shared_number_of_threads(accelerator)
    if not number:
        yield
        return
    earlier_number = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(earlier_number)


def shared_number_of_threads(accelerator: Accelerator) -> int:
    """Return the smallest share of the CPU cores that a process has; 0 if a user chose another
    number of threads on any computer. Collective."""
    share = 0
    is_launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if is_launched and os.environ.get("OMP_NUM_THREADS") == "1":
        num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        share = max(1, available_cores() // num_local_processes)
    shares = [share]
    if accelerator.num_processes > 1:
        shares = gather_object(shares)
    return min(*shares, MAX_HOST_THREADS)
