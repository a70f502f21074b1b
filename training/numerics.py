"""Numerics and memory segments on GPUs, decided in one place.

- Training in bf16: autocast computes products in bf16, and norms, losses and sums in fp32. Adapter
  weights, gradients and the optimizer state are fp32.
- Products of fp32 numbers: TF32 unless `tf32` is off, in matrix products and in convolutions alike.
- `deterministic` picks algorithms that give the same bits each time, which are slower. Without it,
  a resumed run equals an uninterrupted one up to rounding.
- cuDNN measures its algorithms for each new shape, unless `deterministic` is on.
- The allocator grows its segments, so buckets of many shapes do not fragment the memory.

Nothing here changes a run on CPUs.
"""

import os
import sys
from pathlib import Path

from training.config import TrainConfig

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""New and old name of the variable that sets up PyTorch's allocator."""


def prepare_environment(config: TrainConfig | None = None) -> None:
    """Set environment variables that CUDA reads only once. WHEN: before torch is imported.

    Variables that the user has set stay as they are. `config`: of a training run."""
    is_allocator_set = any(name in os.environ for name in ALLOCATOR_VARIABLES)
    has_expandable_segments = sys.platform != "win32"
    if has_expandable_segments and not is_allocator_set:
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    if config is not None:
        # kept between runs; the default folder may be emptied
        compiled_code = Path(config.data.cache_dir).resolve() / "compiled"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled_code))
    if config is not None and config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def apply_numerics(config: TrainConfig) -> None:
    """Set the precision of fp32 products, and the choice of algorithms."""
    import torch

    precision = "tf32" if config.tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.use_deterministic_algorithms(config.deterministic)
    # filling new memory costs time, and every value that is read is written before
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
