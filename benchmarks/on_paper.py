"""What large runs would send and how long that takes, reckoned from real models without weights:
part of benchmarks/scaling.py, which prints it with `--paper`. Nothing here is measured but sizes
and FLOPs.

n GPUs in nodes of 8 form one ring that leaves and enters every node once. Summing S bytes sends 2
(n-1)/n S over each of its links, gathering S bytes (n-1)/n S; the narrowest link sets the time. To
that each of the n-1 hops, of a sum twice, adds a delay: n/8 of them are between nodes, if there is
more than one, and the others inside.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lora_algos.attach import attach
from lora_algos.config import LayerSpec
from lora_algos.targets import select_layers

RANK, PER_NODE, GPUS = 16, 8, (8, 64, 1024)
FLOPS_PER_SECOND = 0.4 * 989e12  # assumed: 40 % of an H100's dense bf16
FP32, BF16 = 4, 2
SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNET_ATTENTION = r".*\.attn[12]\.to_(q|k|v|out\.0)"
FLUX_ATTENTION = r".*\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"


@dataclass(frozen=True)
class Link:
    """What leaves a node, or connects the GPUs in it: bytes per second and seconds of delay of a hop. The delays are
    assumed."""

    name: str
    speed: float
    delay: float
    most: int
    """GPUs that it connects at most."""


NVLINK = Link("NVLink 450 GB/s", 450e9, 2e-6, 72)
LINKS = (
    NVLINK,
    Link("PCIe 25 GB/s", 25e9, 5e-6, PER_NODE),
    Link("IB 50 GB/s per GPU", PER_NODE * 50e9, 5e-6, 2**20),
    Link("IB 50 GB/s per node", 50e9, 5e-6, 2**20),
    Link("Ethernet 25 Gb/s per node", 25e9 / 8, 30e-6, 2**20),
)


@dataclass(frozen=True)
class Work:
    """A step of one GPU, with gradient checkpointing: numbers of parameters, of gathers, and FLOPs."""

    name: str
    adapters: int
    base: int
    in_blocks: int
    """Of the base, those in blocks: gathered for the forward and for the backward pass; the rest
    once."""
    blocks: int
    flops: float

    @property
    def seconds(self) -> float:
        return self.flops / FLOPS_PER_SECOND

    @property
    def summed(self) -> int:
        """Bytes of the gradients."""
        return self.adapters * FP32

    @property
    def gathered(self) -> int:
        """Bytes of the base that a GPU gathers, its own part included."""
        return (self.base + self.in_blocks) * BF16

    @property
    def gathers(self) -> int:
        return 2 * self.blocks + 1


def hops(gpus: int, link: Link) -> float:
    """Seconds of delay once around the ring, which is inside one node or one NVLink domain, or
    leaves nodes."""
    if gpus <= PER_NODE or link is NVLINK:
        return (gpus - 1) * link.delay
    between = gpus // PER_NODE
    return between * link.delay + (gpus - 1 - between) * NVLINK.delay


def summing(work: Work, gpus: int, link: Link) -> float:
    """Seconds per step that summing the gradients takes, after the last of them is there."""
    return 2 * (gpus - 1) / gpus * work.summed / link.speed + 2 * hops(gpus, link)


def gathering(work: Work, gpus: int, link: Link) -> float:
    """Seconds per step that gathering the base takes if it is sharded over all GPUs."""
    return (gpus - 1) / gpus * work.gathered / link.speed + work.gathers * hops(gpus, link)


def ddp(work: Work, gpus: int, link: Link) -> tuple[float, float]:
    """Seconds of communication, and the share of the step that computes."""
    seconds = summing(work, gpus, link)
    return seconds, work.seconds / (work.seconds + seconds)


def fsdp(work: Work, gpus: int, link: Link) -> tuple[float, float]:
    """The same, at best: gathers wholly behind computation, as far as there is any."""
    exposed, hidden = summing(work, gpus, link), gathering(work, gpus, link)
    return exposed + hidden, work.seconds / (max(work.seconds, hidden) + exposed)


def sizes(name: str, model: nn.Module, pattern: str) -> Work:
    """Of a model on the meta device, to which it attaches LoRA."""
    model.requires_grad_(False)
    base = sum(parameter.numel() for parameter in model.parameters())
    # what the trainer shards one by one where Accelerate's config names nothing else
    split = [
        module for module in model.modules() if type(module).__name__ in model._no_split_modules
    ]  # type: ignore[operator]
    in_blocks = sum(p.numel() for p in {p for block in split for p in block.parameters()})
    names = select_layers(model, (pattern,), {})
    adapted = attach(model, dict.fromkeys(names, LayerSpec(RANK, float(RANK), "LoRA")), 0)
    adapters = sum(parameter.numel() for parameter in adapted.named_parameters().values())
    return Work(name, adapters, base, in_blocks, len(split), 0.0)


def flops_of(model: nn.Module, inputs: dict) -> float:
    """Of forward and backward pass with gradient checkpointing, on the meta device."""
    model.enable_gradient_checkpointing()  # type: ignore[operator]
    model.train()
    with FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", torch.bfloat16):
            prediction = model(**inputs, return_dict=False)[0]
        prediction.float().square().mean().backward()
    return float(counter.get_total_flops())


def sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(SDXL)


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


def meta(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, device="meta", dtype=torch.bfloat16)


def works() -> list[Work]:
    """Both at batch 1, 1024 x 1024 pixels."""
    size = {"text_embeds": meta(1, 1280), "time_ids": meta(1, 6)}
    unet_inputs = {
        "sample": meta(1, 4, 128, 128),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 77, 2048),
        "added_cond_kwargs": size,
    }
    flux_inputs = {
        "hidden_states": meta(1, 4096, 64),
        "encoder_hidden_states": meta(1, 512, 4096),
        "pooled_projections": meta(1, 768),
        "timestep": meta(1),
        "guidance": meta(1),
        "img_ids": meta(4096, 3),
        "txt_ids": meta(512, 3),
    }
    cases: list[tuple[str, Callable[[], nn.Module], str, dict]] = [
        ("SDXL", sdxl, UNET_ATTENTION, unet_inputs),
        ("FLUX.1", flux, FLUX_ATTENTION, flux_inputs),
    ]
    result = []
    for name, build, pattern, inputs in cases:
        model = nn.Module.to(build(), torch.bfloat16)
        plain = sizes(name, model, pattern)
        result.append(Work(**{**vars(plain), "flops": flops_of(model, inputs)}))
    return result


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}" if seconds < 0.1 else f"{1000 * seconds:,.0f}"


def connects(gpus: int, link: Link) -> bool:
    """A network is for more than one node, the others are for one, or for one domain."""
    return gpus <= link.most and (gpus > PER_NODE or link.most < 2**20)


def cell(seconds: float, share: float) -> str:
    return f"{milliseconds(seconds)} ({100 * share:.0f} %)"


def main() -> int:
    """Prints the tables of docs/scaling.md."""
    found = works()
    print(
        "| LoRA, attention, rank 16 | adapters | summed | base, bf16 | gathered | gathers | FLOPs | a step |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for work in found:
        print(
            f"| {work.name} | {work.adapters / 1e6:.2f} M | {work.summed / 1e6:.1f} MB "
            f"| {work.base * BF16 / 1e9:.2f} GB | {work.gathered / 1e9:.2f} GB | {work.gathers} "
            f"| {work.flops / 1e12:.1f} T | {milliseconds(work.seconds)} ms |"
        )
    print(f"\n| ms (computes) | GPUs | {' | '.join(link.name for link in LINKS)} |")
    print("|---" * (len(LINKS) + 2) + "|")
    for work in found:
        for engine, cost in (("DDP", ddp), ("FSDP2", fsdp)):
            for gpus in GPUS:
                cells = (
                    cell(*cost(work, gpus, link)) if connects(gpus, link) else "-" for link in LINKS
                )
                print(f"| {work.name} {engine} | {gpus} | {' | '.join(cells)} |")
    return 0
