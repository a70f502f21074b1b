"""Quantized base weights: their errors, and that layers and adapters compute as with the rounded weights."""

import copy
from typing import get_args

import pytest
import torch
from helpers.adapter_cases import ALL_SPECS, randomized
from helpers.family_cases import cases, family_of
from helpers.project import BASE
from torch import Tensor, nn

from benchmarks.checkpointing import new_bytes
from lora_algos.attach import attach
from lora_algos.config import LayerSpec
from models.config import ModelConfig, Quantization
from models.detect import get_family
from models.quantization import FORMATS, quantize, quantize_blocks
from models.quantized_weight import QuantizedWeight
from training.memory.phase_memory import ACTIVATIONS

MAX_ERRORS = {"fp8": 0.03, "int8": 0.01, "nf4": 0.1}
"""Format -> relative error of normally distributed weights."""
BITS = {"fp8": 8.1, "int8": 8.1, "nf4": 4.3}
NF4_CODES = (
    "0000000000000011111111111111112222222223333333444445555556666677"
    "77888899999aaaaabbbbbcccccccddddddddeeeeeeeeeeeeeeefffffffffffff"
)
each_format = pytest.mark.parametrize("name", FORMATS)


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def layer_and_rounded(
    name: str, dtype: torch.dtype, bias: bool = True
) -> tuple[nn.Linear, nn.Linear]:
    """A quantized layer, and a plain one with the same values."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 16, bias=bias).to(dtype).requires_grad_(False)
    rounded = copy.deepcopy(layer)
    layer.weight = nn.Parameter(quantize(layer.weight, FORMATS[name]), requires_grad=False)
    rounded.weight.copy_(layer.weight.values())
    return layer, rounded


def test_the_choices_are_the_formats():
    assert get_args(Quantization) == ("none", *FORMATS)


@each_format
def test_error_and_size(name):
    values = matrix(512, 1024, dtype=torch.bfloat16)
    weight = quantize(values, FORMATS[name])
    error = (weight.values().float() - values.float()).norm() / values.float().norm()
    assert error < MAX_ERRORS[name]
    assert 8 * weight.num_bytes / values.numel() < BITS[name]


@each_format
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-38, 1e30, 3e38])
def test_values_of_any_size_stay_finite_and_close(name, scale):
    values = matrix(8, 64).clamp(-1, 1) * scale
    values[3] = 0
    rounded = quantize(values, FORMATS[name]).values()
    assert rounded.isfinite().all()
    assert not rounded[3].any()
    assert (rounded - values).abs().max() <= max(0.15 * scale, 1e-37)


def test_nf4_has_the_codes_of_bitsandbytes():
    """The expected bytes are from bitsandbytes 0.50.2: quantize_4bit(values, blocksize=64, quant_type="nf4")."""
    values = torch.linspace(-1, 1, 128).sin().reshape(2, 64)
    values = values * torch.tensor([[0.5], [1.0]]) / values.abs().amax(1, keepdim=True)
    codes = quantize(values, FORMATS["nf4"]).stored["codes"].flatten()
    assert bytes(codes.tolist()).hex() == NF4_CODES


@each_format
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_the_rounded_weight(name, bias, dtype):
    layer, rounded = layer_and_rounded(name, dtype, bias)
    results = []
    for module in (layer, rounded):
        x = matrix(2, 5, 12, dtype=dtype).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    for own, expected in zip(*results, strict=True):
        assert torch.equal(own, expected)


@each_format
def test_a_backward_pass_keeps_the_stored_form(name):
    layer, _ = layer_and_rounded(name, torch.float32)
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(matrix(5, 12).requires_grad_())
    assert any(isinstance(tensor, QuantizedWeight) for tensor in saved)
    assert not any(tensor.shape in ((16, 12), (12, 16)) for tensor in saved
                   if not isinstance(tensor, QuantizedWeight))  # fmt: skip


def passes(module: nn.Module, trained: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of the input and of what is trained."""
    x = matrix(2, 5, 12).requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in trained)]


@each_format
@pytest.mark.parametrize("mode", ["auto", "true", "false"])
@pytest.mark.parametrize("spec", ALL_SPECS.values(), ids=ALL_SPECS.keys())
def test_adapters_compute_with_the_rounded_weight(name, mode, spec):
    spec = LayerSpec(spec.rank, spec.alpha, spec.algorithm, spec.options, bypass_mode=mode)
    results = []
    for base in layer_and_rounded(name, torch.float32):
        model = nn.ModuleDict({"layer": base})
        adapted = randomized(attach(model, {"layer": spec}, seed=0))
        adapted.prepare_once_per_step()
        results.append(passes(model["layer"], list(adapted.named_parameters().values())))
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)


@each_format
def test_a_weight_can_be_moved_converted_and_copied(name):
    layer, rounded = layer_and_rounded(name, torch.bfloat16)
    assert torch.equal(copy.deepcopy(layer).weight.values(), rounded.weight)
    layer.float()
    assert layer.weight.dtype == layer.weight.values().dtype == torch.float32
    layer.to("meta")
    assert {tensor.device.type for tensor in layer.weight.stored.values()} == {"meta"}
    assert isinstance(layer.weight, QuantizedWeight)


@each_format
def test_a_merged_update_is_rounded_and_can_be_taken_out(name):
    layer, rounded = layer_and_rounded(name, torch.float32)
    model = nn.ModuleDict({"layer": layer})
    adapted = randomized(attach(model, {"layer": ALL_SPECS["LoRA"]}, seed=0))
    delta = model["layer"].delta_weight()
    adapted.merge()
    merged = model["layer"].base_layer.weight
    assert torch.equal(merged.values(), quantize(rounded.weight + delta, FORMATS[name]).values())
    adapted.unmerge()
    assert torch.equal(merged.values(), rounded.weight)


@each_format
def test_a_change_in_place_is_rounded(name):
    layer, rounded = layer_and_rounded(name, torch.float32)
    layer.weight.mul_(3)
    assert torch.equal(layer.weight.values(), quantize(rounded.weight * 3, FORMATS[name]).values())


PLAIN_PARTS = (
    "embed", "proj_out", "norm_out", "final_layer", "text_encoder", "conv", "time", "guidance", "context", "x_",
    "img_in", "txt_in", "stream_modulation", "projector", "text_proj", "adaLN_modulation.1", "final_norm",
    "final_linear", "modulation.1", "proj_in", "caption_projection", "av_cross_attn", "adaln", "input_proj",
    "llm_cond_proj",
)  # fmt: skip
"""One of these is in the name of each layer that stays as it was."""


@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_blocks_of_a_family_are_quantized(case):
    check_family(family_of(case))


@pytest.mark.parametrize("with_text_encoder", [False, True])
def test_the_blocks_of_a_unet_are_quantized(with_text_encoder):
    check_family(get_family(ModelConfig(path=str(BASE), train_text_encoder=with_text_encoder)))


def check_family(family) -> None:
    denoiser = family.load_denoiser(torch.bfloat16)
    names = [name for name, layer in denoiser.named_modules() if isinstance(layer, nn.Linear)]
    count = quantize_blocks(family.blocks(denoiser, 1), "int8")
    plain = [
        name
        for name in names
        if not isinstance(denoiser.get_submodule(name).weight, QuantizedWeight)
    ]
    assert len(plain) == len(names) - count
    assert count > 0.5 * sum("text_encoder" not in name for name in names)
    assert not [name for name in plain if not any(part in name for part in PLAIN_PARTS)]
    inner = [name for name in plain if "text_encoder" not in name and "embed" not in name]
    assert not [name for name in inner if ".attn" in name or ".ff" in name or "attention" in name]


@each_format
def test_no_second_matrix_is_made(name):
    """Codes are converted, and then scaled in place."""
    weight = quantize(matrix(256, 512, dtype=torch.bfloat16), FORMATS[name])
    with new_bytes(list(weight.stored.values())) as live:
        values = weight.values()
    index_bytes = 2 * weight.numel() if name == "nf4" else 0  # int32 indices of pairs
    assert live.at_peak[ACTIVATIONS] <= values.nbytes + index_bytes + 10_000
