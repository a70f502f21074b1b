"""Estimates of communication in large runs, calculated from real models without weights. Part of
benchmarks/scaling.py, which prints them with `--paper`. Only sizes and FLOPs are measured.

n GPUs in nodes of 8 form one ring that leaves and enters every node once. Summing S bytes sends
2 (n-1)/n S over each link of the ring; gathering S bytes sends (n-1)/n S. The narrowest link
sets the time. Each of the n-1 hops adds a delay, twice for a sum: n/8 hops are between nodes, if
there are several, and the others are inside a node.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lora_algos.attach import attach
from lora_algos.config import LayerSpec
from lora_algos.targets import select_layers

RANK = 16
GPUS_PER_NODE = 8
GPUS = (8, 64, 1024)
FLOPS_PER_SECOND = 0.4 * 989e12
"""Assumed: 40 % of an H100's dense bf16."""
FP32_BYTES, BF16_BYTES = 4, 2
UNLIMITED = 2**20
"""Number of GPUs that a network between nodes connects."""
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
    """A connection of a node to others, or of the GPUs in a node."""

    name: str
    speed: float
    """Bytes per second."""
    delay: float
    """Seconds per hop; assumed."""
    max_gpus: int
    """Largest number of GPUs that it connects."""

    def connects(self, gpus: int) -> bool:
        """Return whether a run of this size uses the link: networks are for several nodes."""
        is_network = self.max_gpus == UNLIMITED
        return gpus <= self.max_gpus and (gpus > GPUS_PER_NODE or not is_network)


NVLINK = Link("NVLink 450 GB/s", 450e9, 2e-6, 72)
LINKS = (
    NVLINK,
    Link("PCIe 25 GB/s", 25e9, 5e-6, GPUS_PER_NODE),
    Link("IB 50 GB/s per GPU", GPUS_PER_NODE * 50e9, 5e-6, UNLIMITED),
    Link("IB 50 GB/s per node", 50e9, 5e-6, UNLIMITED),
    Link("Ethernet 25 Gb/s per node", 25e9 / 8, 30e-6, UNLIMITED),
)


@dataclass(frozen=True)
class Workload:
    """A step of one GPU, with gradient checkpointing: numbers of parameters and blocks, and
    FLOPs."""

    name: str
    adapters: int
    base: int
    in_blocks: int
    """Base parameters in blocks. They are gathered for the forward and for the backward pass; other
    parameters are gathered once."""
    blocks: int
    flops: float

    @property
    def seconds(self) -> float:
        return self.flops / FLOPS_PER_SECOND

    @property
    def summed_bytes(self) -> int:
        """Return the size of the gradients."""
        return self.adapters * FP32_BYTES

    @property
    def gathered_bytes(self) -> int:
        """Return the size of the base model's shards that a GPU gathers, its own shard included."""
        return (self.base + self.in_blocks) * BF16_BYTES

    @property
    def gathers(self) -> int:
        return 2 * self.blocks + 1


@dataclass(frozen=True)
class Cost:
    """Seconds of communication per step, and the share of the step's time that computes."""

    seconds: float
    computing_share: float

    def __str__(self) -> str:
        return f"{milliseconds(self.seconds)} ({100 * self.computing_share:.0f} %)"


def hop_seconds(gpus: int, link: Link) -> float:
    """Return the delay once around the ring. The ring is inside one node or NVLink domain, or
    leaves the nodes over `link`."""
    if gpus <= GPUS_PER_NODE or link is NVLINK:
        return (gpus - 1) * link.delay
    hops_between = gpus // GPUS_PER_NODE
    return hops_between * link.delay + (gpus - 1 - hops_between) * NVLINK.delay


def sum_seconds(work: Workload, gpus: int, link: Link) -> float:
    """Return the time per step of summing the gradients, after the last one is computed."""
    sent_bytes = 2 * (gpus - 1) / gpus * work.summed_bytes
    return sent_bytes / link.speed + 2 * hop_seconds(gpus, link)


def gather_seconds(work: Workload, gpus: int, link: Link) -> float:
    """Return the time per step of gathering a base model that is sharded over all GPUs."""
    sent_bytes = (gpus - 1) / gpus * work.gathered_bytes
    return sent_bytes / link.speed + work.gathers * hop_seconds(gpus, link)


def ddp_cost(work: Workload, gpus: int, link: Link) -> Cost:
    """Return the cost of DDP."""
    seconds = sum_seconds(work, gpus, link)
    return Cost(seconds, work.seconds / (work.seconds + seconds))


def fsdp_cost(work: Workload, gpus: int, link: Link) -> Cost:
    """Return the cost of FSDP2 at best: computation hides the gathers, as long as there is any."""
    exposed, hidden = sum_seconds(work, gpus, link), gather_seconds(work, gpus, link)
    return Cost(exposed + hidden, work.seconds / (max(work.seconds, hidden) + exposed))


def measure_sizes(name: str, model: nn.Module, pattern: str) -> Workload:
    """Attach LoRA to a model on the meta device, and return its sizes. `pattern`: of layer
    names."""
    model.requires_grad_(False)
    base = sum(parameter.numel() for parameter in model.parameters())
    # the trainer shards these modules one by one, unless Accelerate's config names others
    blocks = [
        module
        for module in model.modules()
        if type(module).__name__ in model._no_split_modules  # type: ignore[operator]
    ]
    block_parameters = {parameter for block in blocks for parameter in block.parameters()}
    in_blocks = sum(parameter.numel() for parameter in block_parameters)
    names = select_layers(model, (pattern,), {})
    adapted = attach(model, dict.fromkeys(names, LayerSpec(RANK, float(RANK), "LoRA")), 0)
    adapters = sum(parameter.numel() for parameter in adapted.named_parameters().values())
    return Workload(name, adapters, base, in_blocks, len(blocks), flops=0.0)


def count_flops(model: nn.Module, inputs: dict) -> float:
    """Return the FLOPs of forward and backward pass with gradient checkpointing, on the meta
    device."""
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


def flux_inputs() -> dict:
    """Return arguments of FLUX.1 at batch 1 and 1024 x 1024 pixels, without data."""
    return {
        "hidden_states": meta(1, 4096, 64),
        "encoder_hidden_states": meta(1, 512, 4096),
        "pooled_projections": meta(1, 768),
        "timestep": meta(1),
        "guidance": meta(1),
        "img_ids": meta(4096, 3),
        "txt_ids": meta(512, 3),
    }


def workloads() -> list[Workload]:
    """Return the workloads of SDXL and FLUX.1 at batch 1 and 1024 x 1024 pixels."""
    unet_inputs = {
        "sample": meta(1, 4, 128, 128),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 77, 2048),
        "added_cond_kwargs": {"text_embeds": meta(1, 1280), "time_ids": meta(1, 6)},
    }
    return [
        workload("SDXL", sdxl, UNET_ATTENTION, unet_inputs),
        workload("FLUX.1", flux, FLUX_ATTENTION, flux_inputs()),
    ]


def workload(name: str, build: Callable[[], nn.Module], pattern: str, inputs: dict) -> Workload:
    """Return the workload of a model. `pattern`: of the layers with adapters."""
    model = nn.Module.to(build(), torch.bfloat16)
    sizes = measure_sizes(name, model, pattern)
    return replace(sizes, flops=count_flops(model, inputs))


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}" if seconds < 0.1 else f"{1000 * seconds:,.0f}"


def main() -> int:
    """Print the tables of docs/scaling.md."""
    work_list = workloads()
    print(
        "| LoRA, attention, rank 16 | adapters | summed | base, bf16 | gathered | gathers | FLOPs "
        "| a step |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for work in work_list:
        print(
            f"| {work.name} | {work.adapters / 1e6:.2f} M | {work.summed_bytes / 1e6:.1f} MB "
            f"| {work.base * BF16_BYTES / 1e9:.2f} GB | {work.gathered_bytes / 1e9:.2f} GB "
            f"| {work.gathers} | {work.flops / 1e12:.1f} T | {milliseconds(work.seconds)} ms |"
        )
    print(f"\n| ms (computes) | GPUs | {' | '.join(link.name for link in LINKS)} |")
    print("|---" * (len(LINKS) + 2) + "|")
    for work in work_list:
        for engine, cost in (("DDP", ddp_cost), ("FSDP2", fsdp_cost)):
            for gpus in GPUS:
                cells = ["-"] * len(LINKS)
                for column, link in enumerate(LINKS):
                    if link.connects(gpus):
                        cells[column] = str(cost(work, gpus, link))
                print(f"| {work.name} {engine} | {gpus} | {' | '.join(cells)} |")
    return 0
