"""The embedded UNet with an adapter of each algorithm that looks trained, for the tests of adapter files."""

import copy
import functools
from collections.abc import Iterable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from adapter_files import files
from adapter_files.spellings import LayerSpellings
from adapter_files.verification import verify_content
from adapter_files.writers import FileContent
from helpers.project import BASE
from lora_algos.adapted_model import AdaptedModel
from lora_algos.attach import attach
from lora_algos.config import AdapterOptions, LayerSpec
from lora_algos.targets import adaptable_layers, norm_layers
from models.layer_names.unet import original_names

CONV, LINEAR = (
    "down_blocks.0.resnets.0.conv1",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
)
SPECS = {
    "LoRA": LayerSpec(4, 6.0),
    "LoRA rslora": LayerSpec(4, 6.0, options=AdapterOptions(rslora=True)),
    "LoRA pissa": LayerSpec(4, 6.0, options=AdapterOptions(init="pissa_niter_4")),
    "DoRA": LayerSpec(4, 6.0, "DoRA"),
    "LoHa": LayerSpec(3, 2.0, "LoHa"),
    "LoHa Tucker": LayerSpec(3, 2.0, "LoHa", AdapterOptions(tucker=True)),
    "LoKr": LayerSpec(2, 1.0, "LoKr", AdapterOptions(factor=4)),
    "LoKr both": LayerSpec(1, 0.5, "LoKr", AdapterOptions(decompose_both=True)),
    "LoKr full": LayerSpec(2, 1.0, "LoKr", AdapterOptions(full_matrix=True)),
    "OFT": LayerSpec(algorithm="OFT", options=AdapterOptions(block_size=16)),
    "OFT constraint": LayerSpec(
        algorithm="OFT", options=AdapterOptions(block_size=16, constraint=0.5)
    ),
    "BOFT": LayerSpec(algorithm="BOFT", options=AdapterOptions(block_size=28)),
    "GLoRA": LayerSpec(2, 1.0, "GLoRA"),
    "Full": LayerSpec(algorithm="Full"),
    "LoRA with biases": LayerSpec(4, 6.0, bias=True),
}


@functools.cache
def base() -> nn.Module:
    return UNet2DConditionModel.from_pretrained(BASE, subfolder="unet", torch_dtype=torch.float32)


def unet() -> nn.Module:
    return copy.deepcopy(base())


@functools.cache
def names() -> LayerSpellings:
    return LayerSpellings(original_names(base()))


# layers of every kind (1x1 and 3x3 convolutions, linear ones with and without bias), few so that the tests are quick
LAYERS = (
    CONV, LINEAR, "conv_in", "down_blocks.0.resnets.0.time_emb_proj", "down_blocks.0.downsamplers.0.conv",
    "mid_block.attentions.0.proj_in", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj", "up_blocks.0.resnets.0.conv_shortcut",
)  # fmt: skip


@torch.no_grad()
def trained(specs: dict[str, LayerSpec], scale: float = 0.05) -> AdaptedModel:
    """Return the embedded UNet with adapters that change each weight by a small share."""
    adapted = attach(unet(), specs, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, layer in adapted.layers().items():
        for parameter in layer.trained_tensors().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
        size, whole = layer.delta_weight().norm(), layer.base_layer.weight.norm()
        assert size > 1e-3 * whole, name
    return adapted


def on_layers(case: str, layers: Iterable[str] = LAYERS) -> AdaptedModel:
    """Return an adapter of the case on some layers."""
    return trained(dict.fromkeys(layers, SPECS[case]))


def with_norms() -> AdaptedModel:
    """Return LoRAs on all layers, of several ranks and alphas, with norms and biases, as ComfyUI's node trains."""
    ranks, alphas = (2, 5, 3), (3.0, 0.5, 8.0, 1.0)
    specs = {
        name: LayerSpec(ranks[i % 3], alphas[i % 4], bias=True)
        for i, name in enumerate(adaptable_layers(base()))
    }
    return trained(
        specs | dict.fromkeys(norm_layers(base()), LayerSpec(algorithm="Full", bias=True)),
        scale=0.02,
    )


@torch.no_grad()
def output(denoiser: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    noisy, text = (
        torch.randn(2, 4, 16, 16, generator=generator),
        torch.randn(2, 24, 96, generator=generator),
    )
    return denoiser(noisy, torch.tensor([10, 700]), text).sample


def written(
    adapted: AdaptedModel, file_format: str, dtype: torch.dtype = torch.float32
) -> FileContent:
    """Return the adapter as a file's content."""
    layers = files.adapter_layers(adapted)
    content = files.file_content(layers, adapted.model, names(), file_format, dtype)
    if dtype == torch.float32:
        assert verify_content(content, layers, adapted.model, names()) <= 1e-6
    return content
