"""Runs train_lora.py as on a system without fcntl, SIGUSR1 and os.fork, such as Windows.

`python tests/helpers/portable_run.py [OPTION ...]` imports all modules of the project, then trains.
The libraries are imported first: on Linux some of them need what is taken away.
"""

import importlib
import os
import pkgutil
import signal
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
LIBRARIES = (
    "accelerate", "datasets", "deepspeed", "diffusers", "filelock", "matplotlib.figure", "peft", "PIL.Image",
    "pydantic", "safetensors.torch", "torch", "torch.distributed.fsdp", "tqdm", "transformers", "tyro", "wandb",
)  # fmt: skip
PACKAGES = (
    "adapter_files", "common", "data", "lora_algos", "models", "objectives", "tools", "training",
)  # fmt: skip


def import_libraries() -> None:
    """Import the libraries that are installed, with the lazy classes that a run uses."""
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError:
            print(f"not installed: {name}")
    from diffusers import StableDiffusionPipeline  # noqa: F401
    from transformers import CLIPTextModel  # noqa: F401


def remove_posix() -> None:
    """Take fcntl, SIGUSR1 and os.fork away from this process."""
    sys.modules["fcntl"] = None  # type: ignore[assignment]
    del signal.SIGUSR1, os.fork


def import_project() -> int:
    """Import every module of the project; return their number."""
    names = []
    for package in PACKAGES:
        for module in pkgutil.walk_packages([str(PROJECT / package)], f"{package}."):
            names.append(module.name)
    for name in names:
        importlib.import_module(name)
    return len(names)


if __name__ == "__main__":
    sys.path.insert(0, str(PROJECT))
    import_libraries()
    remove_posix()
    print(f"imported {import_project()} modules")
    from train_lora import main

    sys.exit(main(sys.argv[1:]))
