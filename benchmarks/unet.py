"""What adapters on every layer of a Stable Diffusion 1.5 UNet cost: `python benchmarks/adapters.py
--unet`.

The UNet has full size and random weights; latents 32x32, batch 1, one thread, fp32. A step is
forward and backward of the mean square of the output. The floor is the frozen UNet with gradients
to the latents and to the conditioning. For the time, all take turns in one process, sharing the
base's weights; for the peak memory each has a process of its own.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory import peak_memory
from lora_algos.attach import attach
from lora_algos.config import AdapterOptions, LayerSpec
from lora_algos.targets import adaptable_layers

CONFIG = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TINY = {**CONFIG, "block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 64}
FLOOR, PEFT = "floor", "PEFT LoRA r8"
SPECS = {
    "LoRA r8": LayerSpec(8, 8.0, "LoRA"),
    "LoHa r8": LayerSpec(8, 8.0, "LoHa"),
    "LoKr full f8": LayerSpec(8, 8.0, "LoKr", AdapterOptions(factor=8, full_matrix=True)),
    "LoKr r8": LayerSpec(8, 8.0, "LoKr"),
    "OFT b32": LayerSpec(algorithm="OFT"),
    "DoRA r8": LayerSpec(8, 8.0, "DoRA"),
    "BOFT": LayerSpec(algorithm="BOFT"),
    "GLoRA r8": LayerSpec(8, 8.0, "GLoRA"),
}
ON_REQUEST = ("BOFT", "GLoRA")  # with --only alone
TIME_BARS = {
    "LoRA r8": 1.08,
    "LoHa r8": 1.30,
    "LoKr full f8": 1.20,
    "LoKr r8": 1.20,
    "OFT b32": 1.15,
}
MEMORY_BAR = 0.5  # GB over the floor's


def base_unet(config: dict[str, Any]) -> nn.Module:
    """A frozen UNet with random weights, of which none is allocated twice."""
    unet = skeleton(config).to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(float(name.endswith("weight")))
    return unet.requires_grad_(False)


def skeleton(config: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config).requires_grad_(False)


def adapted(name: str, unet: nn.Module) -> nn.Module:
    """`unet` with the adapters of `name` on all its Linear and Conv layers."""
    layers = list(adaptable_layers(unet))
    if name == PEFT:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=layers), unet)
    elif name != FLOOR:
        attach(unet, dict.fromkeys(layers, SPECS[name]), 0)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter += 1e-3 * torch.randn_like(parameter)  # what is zero at first too
    return unet.train()


def stepper(name: str, unet: nn.Module, size: int) -> Callable[[], Tensor]:
    """One step: forward, backward. The floor needs gradients of its inputs, or it would have none."""
    latents = torch.randn(1, 4, size, size, requires_grad=name == FLOOR)
    cond = torch.randn(1, 77, unet.config.cross_attention_dim, requires_grad=name == FLOOR)  # type: ignore[union-attr]
    wanted = [latents, cond] if name == FLOOR else [p for p in unet.parameters() if p.requires_grad]

    def step() -> Tensor:
        for tensor in wanted:
            tensor.grad = None
        loss = unet(latents, torch.tensor([500]), cond, return_dict=False)[0].square().mean()
        loss.backward()
        return loss.detach()

    return step


def set_checkpointing(unet: Any, on: bool) -> None:
    unet.enable_gradient_checkpointing() if on else unet.disable_gradient_checkpointing()


def alone(name: str, checkpointing: bool, tiny: bool) -> int:
    """Peak memory of two steps in a process of its own."""
    argv = [sys.executable, "-m", "benchmarks.unet", json.dumps([name, checkpointing, tiny])]
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=root)
    if result.returncode:
        raise RuntimeError(f"{name} failed: {result.stderr}")
    return int(result.stdout.split()[-1])


def child(name: str, checkpointing: bool, tiny: bool) -> None:
    torch.set_num_threads(1)
    unet = adapted(name, base_unet(TINY if tiny else CONFIG))
    set_checkpointing(unet, checkpointing)
    step = stepper(name, unet, 8 if tiny else 32)
    step()
    step()
    print(peak_memory())


def times(
    names: list[str], checkpointing: bool, repeats: int, tiny: bool
) -> dict[str, list[float]]:
    """CPU seconds of each step, in turns; the first turn warms up."""
    config = TINY if tiny else CONFIG
    base = base_unet(config)
    steps, seconds = {}, {name: [] for name in names}
    for name in names:
        unet = base if name == FLOOR else skeleton(config)
        unet.load_state_dict(base.state_dict(), assign=True)
        steps[name] = stepper(name, adapted(name, unet.requires_grad_(False)), 8 if tiny else 32)
        set_checkpointing(unet, checkpointing)
    for turn in range(-1, repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.process_time()
            steps[name]()
            if turn >= 0:
                seconds[name].append(time.process_time() - start)
    return seconds


def compare(only: list[str], repeats: int, tiny: bool = False) -> int:
    """Prints the table and a line per bar; `only`: algorithms."""
    chosen = [
        n
        for n, s in SPECS.items()
        if (s.algorithm in only if only else s.algorithm not in ON_REQUEST)
    ]
    names = [FLOOR, *chosen, *([PEFT] if not only or "LoRA" in only else [])]
    bars: list[tuple[str, bool]] = []
    for checkpointing in (False, True):
        seconds = times(names, checkpointing, repeats, tiny)
        print(
            f"\nSD 1.5 UNet, fp32, one thread, {'with' if checkpointing else 'without'} gradient checkpointing,",
            end=" ",
        )
        print(
            f"medians of {repeats} turns\n{'':16}{'s/step':>8}{'ratio':>8}{'peak GB':>9}{'over floor':>12}",
            flush=True,
        )
        memory: dict[str, float] = {}
        for name in names:
            memory[name] = alone(name, checkpointing, tiny) / 1e9
            ratio = median(a / b for a, b in zip(seconds[name], seconds[FLOOR], strict=True))
            over = memory[name] - memory[FLOOR]
            print(
                f"{name:16}{median(seconds[name]):8.2f}{ratio:8.3f}{memory[name]:9.2f}{over:12.2f}",
                flush=True,
            )
            what = f"{name}, {'with' if checkpointing else 'without'} checkpointing:"
            if name in TIME_BARS:
                bar = TIME_BARS[name]
                bars.append((f"{what} {ratio:.3f} of the floor's time, bar {bar}", ratio <= bar))
            if name in SPECS:
                bars.append(
                    (f"{what} {over:.2f} GB over the floor, bar {MEMORY_BAR}", over <= MEMORY_BAR)
                )
    print("\n" + "\n".join(f"{'met   ' if met else 'MISSED'} {what}" for what, met in bars))
    return 0 if tiny else int(not all(met for _, met in bars))


if __name__ == "__main__":
    child(*json.loads(sys.argv[1]))
