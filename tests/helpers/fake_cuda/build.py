"""Compiles and loads guard.cpp, which has to be loaded before torch is imported."""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def missing_requirement() -> str:
    """Returns why the device cannot be made here; empty if it can.

    A CUDA build of PyTorch has its own hooks, and ends the process if they are registered twice."""
    import torch

    if sys.platform != "linux":
        return "the fake device needs Linux"
    if torch.version.cuda is not None or torch.version.hip is not None:
        return "the fake device needs a CPU build of PyTorch"
    return "" if shutil.which("g++") else "g++ is not installed"


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def compile_guard(folder: Path) -> Path:
    """Compiles the device for the installed version of torch, which takes a few seconds; returns the library."""
    torch, library = torch_folder(), folder / "fake_cuda.so"
    command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{torch / 'include'}", str(SOURCE),
               "-o", str(library), f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def load_guard(library: Path) -> None:
    """Loads the device, and the libraries of torch that it needs. Call it before torch is imported."""
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))
