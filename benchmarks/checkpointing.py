"""What gradient checkpointing costs and saves, per depth and policy: time of a step, and memory
beside the weights.

`python benchmarks/checkpointing.py` measures the embedded UNet, `--full` a UNet of Stable Diffusion
1.5's size with random weights and 32x32 latents; both with LoRA of rank 8 on all layers, fp32,
batch 1, one thread. A step is forward and backward. The variants take turns on one model; the ratio
is of CPU time, to no checkpointing in the same turn, the median of the turns.

Memory is counted by storages as operators make them, so it is exact, the same on every machine and
free of the allocator's slack: kept is what lives between forward and backward, peak the most at any
time of the step. Gradients are allocated before, and the scratch memory within one operator is not
seen.
"""

import argparse
import os
import sys
import time
import weakref
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
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from training import gradient_checkpointing  # noqa: E402

NONE, DIFFUSERS = "none", "diffusers' own"
POLICIES: tuple[gradient_checkpointing.Policy, ...] = ("full", "keep-attention-output")
DEPTHS = (1, 2, 3, 4)  # a UNet has nothing deeper
VARIANTS = [NONE, DIFFUSERS, *(f"{depth} {policy}" for depth in DEPTHS for policy in POLICIES)]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made under it and still live."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.seen = {
            t.untyped_storage().data_ptr() for t in known
        }  # views of what was there before are not new
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if not size or key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def select(unet: Any, variant: str) -> int:
    """Checkpoints as `variant` says; returns how many modules are."""
    gradient_checkpointing.remove(unet)
    if variant == DIFFUSERS:
        unet.enable_gradient_checkpointing()
    if variant in (NONE, DIFFUSERS):
        return 0
    depth, policy = variant.split(" ")
    return len(gradient_checkpointing.apply(unet, int(depth), policy))  # type: ignore[arg-type]


def embedded_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(PROJECT / "examples" / "emoji" / "base" / "unet")


def full_unet() -> nn.Module:
    from benchmarks.unet import CONFIG, base_unet

    return base_unet(CONFIG)


def with_lora(unet: nn.Module) -> nn.Module:
    from lora_algos.attach import attach
    from lora_algos.config import LayerSpec
    from lora_algos.targets import adaptable_layers

    attach(unet, dict.fromkeys(adaptable_layers(unet), LayerSpec(8, 8.0)), 0)
    return unet.train()


def stepper(unet: Any, size: int) -> Callable[[], Tensor]:
    """The forward pass to a loss; gradients have their place already."""
    torch.manual_seed(0)
    latents, cond = (
        torch.randn(1, 4, size, size),
        torch.randn(1, 77, unet.config.cross_attention_dim),
    )
    for parameter in unet.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return lambda: unet(latents, torch.tensor([500]), cond, return_dict=False)[0].square().mean()


def memory(unet: nn.Module, forward: Callable[[], Tensor]) -> tuple[float, float]:
    """MiB kept after the forward pass, and at the peak of the step."""
    known = [
        *unet.parameters(),
        *unet.buffers(),
        *(p.grad for p in unet.parameters() if p.grad is not None),
    ]
    with LiveBytes(known) as live:
        loss = forward()
        kept = live.now
        loss.backward()
    return kept / 2**20, live.peak / 2**20


def measure(unet: nn.Module, size: int, turns: int) -> None:
    """Prints the table."""
    forward = stepper(unet, size)
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for turn in range(-1, turns):  # the first one warms up
        for variant in VARIANTS[turn % len(VARIANTS) :] + VARIANTS[: turn % len(VARIANTS)]:
            select(unet, variant)
            start = time.process_time()
            forward().backward()
            if turn >= 0:
                seconds[variant].append(time.process_time() - start)
    print(
        f"{'depth policy':26}{'modules':>8}{'s/step':>9}{'ratio':>8}{'kept MiB':>10}{'peak MiB':>10}"
    )
    for variant in VARIANTS:
        count = select(unet, variant)
        kept, peak = memory(unet, forward)
        ratio = median(a / b for a, b in zip(seconds[variant], seconds[NONE], strict=True))
        print(
            f"{variant:26}{count or '':>8}{median(seconds[variant]):9.3f}{ratio:8.3f}{kept:10.1f}{peak:10.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="a UNet of full size")
    parser.add_argument(
        "--turns", type=int, help="timed steps of each variant (20, or 3 of full size)"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    unet = with_lora(full_unet() if given.full else embedded_unet())
    measure(unet, 32 if given.full else 16, given.turns or (3 if given.full else 20))


if __name__ == "__main__":
    main()
