"""Compiles and loads guard.cpp. Imports no torch, because the library has to be loaded first."""

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def has_compiler() -> bool:
    return shutil.which("g++") is not None


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
