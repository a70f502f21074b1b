"""Cost of adapters on every layer of a Stable Diffusion 1.5 UNet: `python benchmarks/adapters.py
--unet`.

The UNet has full size and random weights; latents are 32x32, batch 1, one thread, fp32. A step is
the forward and backward pass of the mean square of the output. The floor is the frozen UNet with
gradients to the latents and to the conditioning. For the time, all variants take turns in one
process and share the base weights. For the peak memory, each variant has its own process.
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

from benchmarks.bars import Bar
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
ON_REQUEST = ("BOFT", "GLoRA")
"""Algorithms that are measured only with --only."""
TIME_BARS = {
    "LoRA r8": 1.08,
    "LoHa r8": 1.30,
    "LoKr full f8": 1.20,
    "LoKr r8": 1.20,
    "OFT b32": 1.15,
}
"""Largest time relative to the floor."""
MEMORY_BAR = 0.5
"""GB over the floor's peak memory."""
LATENT_SIZE, TINY_LATENT_SIZE = 32, 8


def base_unet(config: dict[str, Any]) -> nn.Module:
    """Return a frozen UNet with random weights. No weight is allocated twice."""
    unet = empty_unet(config).to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(float(name.endswith("weight")))
    return unet.requires_grad_(False)


def empty_unet(config: dict[str, Any]) -> nn.Module:
    """Return a UNet without values."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config).requires_grad_(False)


def attach_adapters(name: str, unet: nn.Module) -> nn.Module:
    """Put the adapters of a variant on all Linear and Conv layers of `unet`, and return it."""
    layers = list(adaptable_layers(unet))
    if name == PEFT:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=layers), unet)
    elif name != FLOOR:
        attach(unet, dict.fromkeys(layers, SPECS[name]), 0)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                # so that no factor is zero
                parameter += 1e-3 * torch.randn_like(parameter)
    return unet.train()


def make_step(name: str, unet: nn.Module, size: int) -> Callable[[], Tensor]:
    """Return a function that does one forward and backward pass. The floor has gradients of its
    inputs only."""
    is_floor = name == FLOOR
    width = unet.config.cross_attention_dim  # type: ignore[union-attr]
    latents = torch.randn(1, 4, size, size, requires_grad=is_floor)
    cond = torch.randn(1, 77, width, requires_grad=is_floor)
    tensors_with_grad = [latents, cond]
    if not is_floor:
        tensors_with_grad = [p for p in unet.parameters() if p.requires_grad]

    def step() -> Tensor:
        for tensor in tensors_with_grad:
            tensor.grad = None
        prediction = unet(latents, torch.tensor([500]), cond, return_dict=False)[0]
        loss = prediction.square().mean()
        loss.backward()
        return loss.detach()

    return step


def set_checkpointing(unet: Any, is_on: bool) -> None:
    """Turn gradient checkpointing on or off."""
    if is_on:
        unet.enable_gradient_checkpointing()
    else:
        unet.disable_gradient_checkpointing()


def peak_of_process(name: str, checkpointing: bool, tiny: bool) -> int:
    """Return the peak memory of a process that takes two steps, in bytes."""
    argv = [sys.executable, "-m", "benchmarks.unet", json.dumps([name, checkpointing, tiny])]
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=root)
    if result.returncode:
        raise RuntimeError(f"{name} failed: {result.stderr}")
    return int(result.stdout.split()[-1])


def print_peak(name: str, checkpointing: bool, tiny: bool) -> None:
    """Take two steps, and print the peak memory of this process."""
    torch.set_num_threads(1)
    unet = attach_adapters(name, base_unet(TINY if tiny else CONFIG))
    set_checkpointing(unet, checkpointing)
    step = make_step(name, unet, TINY_LATENT_SIZE if tiny else LATENT_SIZE)
    step()
    step()
    print(peak_memory())


def times(
    names: list[str], checkpointing: bool, repeats: int, tiny: bool
) -> dict[str, list[float]]:
    """Return the CPU seconds of each step. The variants take turns; the first turn warms up."""
    config = TINY if tiny else CONFIG
    size = TINY_LATENT_SIZE if tiny else LATENT_SIZE
    base = base_unet(config)
    steps = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        unet = base if name == FLOOR else empty_unet(config)
        unet.load_state_dict(base.state_dict(), assign=True)
        attach_adapters(name, unet.requires_grad_(False))
        steps[name] = make_step(name, unet, size)
        set_checkpointing(unet, checkpointing)
    for turn in range(-1, repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.process_time()
            steps[name]()
            if turn >= 0:
                seconds[name].append(time.process_time() - start)
    return seconds


def variant_names(only: list[str]) -> list[str]:
    """Return the variants to measure, the floor first. `only`: algorithms; empty: the usual
    ones."""
    names = [FLOOR]
    for name, spec in SPECS.items():
        is_selected = spec.algorithm in only if only else spec.algorithm not in ON_REQUEST
        if is_selected:
            names.append(name)
    if not only or "LoRA" in only:
        names.append(PEFT)
    return names


def compare(only: list[str], repeats: int, tiny: bool = False) -> int:
    """Print the tables and a line per bar; return 1 if a bar is missed. `only`: algorithms."""
    names = variant_names(only)
    bars = []
    for checkpointing in (False, True):
        bars += compare_variants(names, checkpointing, repeats, tiny)
    print()
    for bar in bars:
        print(f"{'met   ' if bar.is_met else 'MISSED'} {bar.text}")
    return 0 if tiny else int(not all(bar.is_met for bar in bars))


def compare_variants(names: list[str], checkpointing: bool, repeats: int, tiny: bool) -> list[Bar]:
    """Print the table with or without gradient checkpointing; return its bars."""
    seconds = times(names, checkpointing, repeats, tiny)
    mode = "with" if checkpointing else "without"
    print(
        f"\nSD 1.5 UNet, fp32, one thread, {mode} gradient checkpointing, medians of {repeats} "
        "turns"
    )
    print(f"{'':16}{'s/step':>8}{'ratio':>8}{'peak GB':>9}{'over floor':>12}", flush=True)
    bars = []
    floor_memory = peak_of_process(FLOOR, checkpointing, tiny) / 1e9
    for name in names:
        memory = floor_memory
        if name != FLOOR:
            memory = peak_of_process(name, checkpointing, tiny) / 1e9
        ratio = median(a / b for a, b in zip(seconds[name], seconds[FLOOR], strict=True))
        over = memory - floor_memory
        row = f"{median(seconds[name]):8.2f}{ratio:8.3f}{memory:9.2f}{over:12.2f}"
        print(f"{name:16}{row}", flush=True)
        label = f"{name}, {mode} checkpointing:"
        if name in TIME_BARS:
            bar = TIME_BARS[name]
            text = f"{label} {ratio:.3f} of the floor's time, bar {bar}"
            bars.append(Bar(text, ratio <= bar, depends_on_time=True))
        if name in SPECS:
            text = f"{label} {over:.2f} GB over the floor, bar {MEMORY_BAR}"
            bars.append(Bar(text, over <= MEMORY_BAR, depends_on_time=False))
    return bars


if __name__ == "__main__":
    print_peak(*json.loads(sys.argv[1]))
