"""Memory that a process has taken, for the metrics of a run. Accelerate requires psutil."""

import psutil
import torch

from training.memory.config import GIB


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Return memory in GiB: of this process on the host, and of its tensors on a GPU, now and at
    most so far."""
    process = psutil.Process()
    host_memory = process.memory_info()
    num_bytes = {"memory/host": host_memory.rss}
    if device.type == "cuda":
        num_bytes["memory/gpu"] = torch.cuda.memory_allocated(device)
        num_bytes["memory/gpu_peak"] = torch.cuda.max_memory_allocated(device)
    metrics = {}
    for name, size in num_bytes.items():
        metrics[name] = size / GIB
    return metrics
