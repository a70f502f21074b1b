"""Cost and savings of gradient checkpointing, per depth and policy: time of a step, and memory
besides the weights.

`python benchmarks/checkpointing.py` measures the embedded UNet. `--full` measures a UNet of
Stable Diffusion 1.5's size with random weights and 32x32 latents. Both have LoRA of rank 8 on
all layers, fp32, batch 1, one thread. A step is a forward and backward pass. The variants take
turns on one model. The ratio is of CPU time, to no checkpointing in the same turn; the median of
the turns is printed.

Memory is the sum of the storages that operators create. It is therefore exact, equal on every
machine, and free of the allocator's overhead. "kept" lives between forward and backward pass;
"peak" is the maximum during the step. Gradients are allocated before the step. Scratch memory
within one operator is not counted.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from models.blocks import find_blocks  # noqa: E402
from training import gradient_checkpointing  # noqa: E402
from training.memory.live_bytes import LiveBytes  # noqa: E402
from training.memory.phase_memory import ACTIVATIONS  # noqa: E402

MIB = 2**20
NONE, DIFFUSERS = "none", "diffusers' own"
POLICIES: tuple[gradient_checkpointing.Policy, ...] = ("full", "keep-attention-output")
DEPTHS = (1, 2, 3, 4)
"""A UNet has no deeper blocks."""
VARIANTS = [NONE, DIFFUSERS, *(f"{depth} {policy}" for depth in DEPTHS for policy in POLICIES)]


def new_bytes(earlier_tensors: list[Tensor]) -> LiveBytes:
    """Return a counter of the tensors that are created in its block, as activations.

    `earlier_tensors`: exist before the block; they and their views are counted as such."""
    live_bytes = LiveBytes()
    live_bytes.label(earlier_tensors, "earlier")
    return live_bytes


def select(unet: Any, variant: str) -> int:
    """Turn on the checkpointing of a variant; return the number of checkpointed modules."""
    gradient_checkpointing.remove(unet)
    if variant == DIFFUSERS:
        unet.enable_gradient_checkpointing()
    if variant in (NONE, DIFFUSERS):
        return 0
    depth, policy = variant.split(" ")
    blocks = gradient_checkpointing.first_blocks(find_blocks(unet, int(depth)), None)
    gradient_checkpointing.apply(unet, blocks, policy)  # type: ignore[arg-type]
    return len(blocks)


def embedded_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(PROJECT / "examples" / "emoji" / "base" / "unet")


def full_unet() -> nn.Module:
    from benchmarks.unet import CONFIG, base_unet

    return base_unet(CONFIG)


def with_lora(unet: nn.Module) -> nn.Module:
    """Attach LoRA of rank 8 to all layers."""
    from lora_algos.attach import attach
    from lora_algos.config import LayerSpec
    from lora_algos.targets import adaptable_layers

    attach(unet, dict.fromkeys(adaptable_layers(unet), LayerSpec(8, 8.0)), 0)
    return unet.train()


def make_forward(unet: Any, size: int) -> Callable[[], Tensor]:
    """Return a function that computes a loss. Gradients are allocated here, before any step."""
    torch.manual_seed(0)
    latents = torch.randn(1, 4, size, size)
    cond = torch.randn(1, 77, unet.config.cross_attention_dim)
    for parameter in unet.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def forward() -> Tensor:
        prediction = unet(latents, torch.tensor([500]), cond, return_dict=False)[0]
        return prediction.square().mean()

    return forward


def memory(unet: nn.Module, forward: Callable[[], Tensor]) -> tuple[float, float]:
    """Return MiB that are kept after the forward pass, and at the peak of the step."""
    gradients = [p.grad for p in unet.parameters() if p.grad is not None]
    with new_bytes([*unet.parameters(), *unet.buffers(), *gradients]) as live:
        loss = forward()
        kept_bytes = live.current[ACTIVATIONS]
        loss.backward()
    return kept_bytes / MIB, live.at_peak[ACTIVATIONS] / MIB


def measure(unet: nn.Module, size: int, turns: int) -> None:
    """Print the table. `size`: of the latents."""
    forward = make_forward(unet, size)
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for turn in range(-1, turns):  # the first turn warms up
        shift = turn % len(VARIANTS)
        for variant in VARIANTS[shift:] + VARIANTS[:shift]:
            select(unet, variant)
            start = time.process_time()
            forward().backward()
            if turn >= 0:
                seconds[variant].append(time.process_time() - start)
    columns = f"{'modules':>8}{'s/step':>9}{'ratio':>8}{'kept MiB':>10}{'peak MiB':>10}"
    print(f"{'depth policy':26}{columns}")
    for variant in VARIANTS:
        num_modules = select(unet, variant)
        kept_mib, peak_mib = memory(unet, forward)
        ratio = median(a / b for a, b in zip(seconds[variant], seconds[NONE], strict=True))
        times = f"{median(seconds[variant]):9.3f}{ratio:8.3f}"
        print(f"{variant:26}{num_modules or '':>8}{times}{kept_mib:10.1f}{peak_mib:10.1f}")


def main() -> None:
    """Measure all variants on one UNet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="a UNet of full size")
    parser.add_argument(
        "--turns", type=int, help="timed steps of each variant (default 20; 3 for the full size)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.full:
        measure(with_lora(full_unet()), 32, arguments.turns or 3)
    else:
        measure(with_lora(embedded_unet()), 16, arguments.turns or 20)


if __name__ == "__main__":
    main()
