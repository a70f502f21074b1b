"""Speed and memory of steps of whole models on a GPU, for benchmarks/gpu.py."""

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_layers import SETTINGS, Context
from benchmarks.gpu_models import MODELS
from benchmarks.implementations import Setting, quiet, setting
from lora_algos.attach import attach
from lora_algos.targets import layers_of, select_layers
from models.blocks import find_blocks
from models.detect import family_classes
from training import compilation, gradient_checkpointing

STEPS, WARMUP_STEPS = 8, 3
TINY_STEPS, TINY_WARMUP_STEPS = 1, 1


@dataclass(frozen=True)
class Scenario:
    """A step of a model of true size."""

    model: str
    side: int
    batch_size: int
    checkpointed: bool = False
    compiled: bool = False
    settings: tuple[Setting, ...] = (setting("LoRA", "LoRA"),)
    with_peft: bool = False

    @property
    def key(self) -> str:
        parts = [self.model, f"{self.side}px", f"batch {self.batch_size}"]
        if self.checkpointed:
            parts.append("checkpointed")
        if self.compiled:
            parts.append("compiled")
        return ", ".join(parts)


SCENARIOS = (
    Scenario("flux2_klein_4b", 512, 2, checkpointed=True, settings=SETTINGS[:7], with_peft=True),
    Scenario("z_image", 1024, 1, settings=(setting("LoRA r64", "LoRA", 64),)),
    Scenario("z_image", 1024, 1, checkpointed=True, settings=(setting("LoRA r64", "LoRA", 64),)),
    Scenario("flux", 512, 1, checkpointed=True, compiled=True, with_peft=True),
    Scenario("flux", 512, 1, checkpointed=True),
    Scenario("sdxl", 1024, 1, with_peft=True),
)


@dataclass
class Step:
    """A training step of a denoiser."""

    denoiser: nn.Module
    inputs: dict[str, Any]
    trained: list[nn.Parameter]
    context: Context
    optimizer: torch.optim.Optimizer | None = field(default=None)

    def __post_init__(self) -> None:
        if self.trained:
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

    def take(self) -> None:
        with self.context.autocast():
            output = self.denoiser(**self.inputs, return_dict=False)[0]
        if isinstance(output, list):
            output = torch.stack(output)
        output.float().square().mean().backward()
        if self.optimizer is not None:
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def measure(self) -> dict[str, Any]:
        """Return the median seconds of a step, their spread, the peak memory in bytes, and where the
        host waited for the GPU."""
        context = self.context
        num_steps, num_warmup_steps = STEPS, WARMUP_STEPS
        if context.is_tiny:
            num_steps, num_warmup_steps = TINY_STEPS, TINY_WARMUP_STEPS
        for _ in range(num_warmup_steps):
            self.take()
        if context.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with context.counting_waits() as waits:
            self.take()
        seconds = []
        for _ in range(num_steps):
            context.synchronize()
            start = time.perf_counter()
            self.take()
            context.synchronize()
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if context.device.type == "cuda" else 0
        return {
            "seconds": median(seconds),
            "spread": max(seconds) - min(seconds),
            "peak": peak,
            "waits": waits,
        }


def measure_scenario(scenario: Scenario, context: Context) -> dict[str, Any]:
    """Return seconds and peak memory of the frozen model, our adapters, and PEFT's LoRA."""
    model = MODELS[scenario.model]
    family = family_classes()[model.family]
    torch.manual_seed(0)
    denoiser = model.build(context.device, context.is_tiny)
    side = 64 if context.is_tiny else scenario.side
    inputs = model.inputs(denoiser.config, scenario.batch_size, side, context.device)
    blocks = find_blocks(denoiser, 1)
    if scenario.compiled:
        compilation.apply(blocks)
    if scenario.checkpointed:
        gradient_checkpointing.apply(denoiser, blocks, has_dropout=False)
    results = {"frozen": Step(denoiser, with_gradient(inputs), [], context).measure()}
    originals = dict(layers_of(denoiser))
    names = select_layers(denoiser, ("attention-mlp",), family.targets)
    for measured in scenario.settings:
        adapted = attach(denoiser, dict.fromkeys(names, measured.spec), 0)
        denoiser.to(context.device)
        adapted.prepare_once_per_step()
        trained = list(adapted.named_parameters().values())
        results[measured.name] = Step(denoiser, inputs, trained, context).measure()
        for name in names:
            denoiser.set_submodule(name, originals[name])
    if scenario.with_peft:
        rank = scenario.settings[0].spec.rank
        trained = attach_peft(denoiser, names, rank)
        results["PEFT's LoRA"] = Step(denoiser, inputs, trained, context).measure()
    frozen = results["frozen"]["seconds"]
    for result in results.values():
        result["ratio"] = result["seconds"] / frozen
    return results


def with_gradient(value: Any) -> Any:
    """Return inputs that need a gradient, so that a frozen model has a backward pass."""
    if isinstance(value, dict):
        return {name: with_gradient(item) for name, item in value.items()}
    if isinstance(value, list):
        return [with_gradient(item) for item in value]
    if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
        return value.clone().requires_grad_()
    return value


def attach_peft(denoiser: nn.Module, names: list[str], rank: int) -> list[nn.Parameter]:
    """Attach PEFT's LoRA in fp32; return its trained tensors."""
    from peft import LoraConfig, inject_adapter_in_model

    with quiet():
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), denoiser)
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained
