"""Adapter files: their names at full size, the way back, and that diffusers and PEFT read them as the same function."""

import copy
import functools
import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import BASE, PROJECT
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_algos import formats
from lora_algos.base import Adapted, LayerSpec, adaptable_layers, attach, attach_from_file
from lora_algos.config import AdapterError

SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
CONV, LINEAR = "down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@functools.cache
def base() -> nn.Module:
    return UNet2DConditionModel.from_pretrained(BASE, subfolder="unet", torch_dtype=torch.float32)


def unet() -> nn.Module:
    return copy.deepcopy(base())


def layers_with(kind: str) -> dict[str, LayerSpec]:
    """Specs for every layer of the embedded UNet: one for all, several ranks, or several ranks and alphas."""
    names = adaptable_layers(base())
    ranks = {"uniform": [4], "ranks": [2, 5, 3], "alphas": [2, 5, 3]}[kind]
    alphas = {"uniform": [6.0], "ranks": [6.0], "alphas": [3.0, 0.5, 8.0, 1.0]}[kind]
    return {n: LayerSpec(ranks[i % len(ranks)], alphas[i % len(alphas)]) for i, n in enumerate(names)}


@torch.no_grad()
def trained(kind: str = "uniform", scale: float = 0.1) -> Adapted:
    """The embedded UNet with an adapter on every layer, its weights as after training."""
    adapted = attach(unet(), "LoRA", layers_with(kind), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.named_parameters().values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return adapted


@torch.no_grad()
def output(denoiser: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    noisy, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 24, 96, generator=generator)
    return denoiser(noisy, torch.tensor([10, 700]), text).sample


def written(adapted: Adapted, path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Writes the adapter's file and returns its tensors as they are read back."""
    path.write_bytes(formats.to_bytes(formats.to_file(adapted, dtype), {"ss_network_dim": "4"}))
    tensors, metadata = formats.read(path)
    assert metadata == {"ss_network_dim": "4"}
    return tensors


def test_every_matrix_of_sd15_is_written_under_a_name_and_in_a_shape_comfyui_takes():
    weights = json.loads((PROJECT / "tests" / "data" / "comfy_sd15_keys.json").read_text())["weights"]
    with torch.device("meta"):
        denoiser = UNet2DConditionModel.from_config(SD15)
    specs = dict.fromkeys(adaptable_layers(denoiser), LayerSpec(rank=2, alpha=1.0))
    adapted = attach(denoiser, "LoRA", specs, seed=0)
    for _, layer in adapted.algorithm.layers(denoiser):
        for name, child in layer.named_children():
            if name != "base_layer":
                child.to_empty(device="cpu")  # the base stays without memory: it would take 3.4 GB
    tensors = formats.to_file(adapted, torch.bfloat16)
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in tensors.items():
        prefix, _, suffix = key.partition(".")
        layers.setdefault(prefix, {})[suffix] = tuple(tensor.shape)
    assert layers.keys() == weights.keys()
    for prefix, (out, *rest) in weights.items():
        up = (out, 2, *[1] * (len(rest) - 1))
        assert layers[prefix] == {"lora_down.weight": (2, *rest), "lora_up.weight": up, "alpha": ()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["uniform", "ranks"])
def test_a_file_restores_the_adapter_bit_by_bit(tmp_path, kind, dtype):
    adapted = trained(kind)
    tensors = written(adapted, tmp_path / "lora.safetensors", dtype)
    assert {t.dtype for key, t in tensors.items() if not key.endswith("alpha")} == {dtype}
    model = unet()
    restored = attach_from_file(model, "LoRA", *formats.from_file(tensors, model))
    assert restored.specs() == adapted.specs()
    state, expected = restored.state_dict(), adapted.state_dict()
    assert state.keys() == expected.keys()
    assert all(state[name].equal(expected[name].to(dtype).float()) for name in expected)
    assert all(not p.requires_grad or p.dtype == torch.float32 for p in model.parameters())


def test_alphas_of_layers_are_folded_into_one(tmp_path):
    adapted = trained("alphas")
    assert len({spec.alpha for spec in adapted.specs().values()}) == 4
    tensors = written(adapted, tmp_path / "lora.safetensors")
    assert {tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")} == {3.0}
    model = unet()
    restored = attach_from_file(model, "LoRA", *formats.from_file(tensors, model))
    assert {n: s.rank for n, s in restored.specs().items()} == {n: s.rank for n, s in adapted.specs().items()}
    expected = dict(adapted.deltas())
    for name, delta in restored.deltas():
        torch.testing.assert_close(delta, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["uniform", "ranks", "alphas"])
def test_diffusers_loads_a_file_as_the_same_function(tmp_path, caplog, kind):
    adapted = trained(kind, scale=0.05)
    written(adapted, tmp_path / "lora.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    before = output(pipeline.unet)
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_warning()
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    finally:
        diffusers_logging.set_verbosity(verbosity)
    # on unexpected or missing keys; it also warns that a text encoder's keys were looked for, which are not ours
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert not [text for text in warnings if "No LoRA keys associated to CLIPTextModel" not in text]
    expected = output(adapted.model)
    assert (expected - before).abs().max() > 0.05
    torch.testing.assert_close(output(pipeline.unet), expected, rtol=0, atol=1e-5)


def test_peft_loads_the_tensors_as_the_same_function(tmp_path):
    adapted = trained("uniform", scale=0.05)
    tensors = written(adapted, tmp_path / "lora.safetensors")
    model = unet()
    names = list(adaptable_layers(model))
    spec = adapted.specs()[CONV]
    inject_adapter_in_model(LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=names), model)
    renamed = {
        f"{name}.lora_{theirs}.weight": tensors[f"lora_unet_{name.replace('.', '_')}.lora_{ours}.weight"]
        for name in names
        for ours, theirs in (("down", "A"), ("up", "B"))
    }
    result = set_peft_model_state_dict(model, renamed)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    torch.testing.assert_close(output(model), output(adapted.model), rtol=0, atol=1e-6)


def test_convolutions_flattened_to_matrices_are_read(tmp_path):
    adapted = trained()
    tensors = written(adapted, tmp_path / "lora.safetensors")
    flat = {key: t.flatten(1) if t.ndim > 2 else t for key, t in tensors.items()}  # as ComfyUI's node writes them
    assert flat[f"lora_unet_{CONV.replace('.', '_')}.lora_down.weight"].ndim == 2
    model = unet()
    restored = attach_from_file(model, "LoRA", *formats.from_file(flat, model)).state_dict()
    assert all(restored[name].equal(tensor) for name, tensor in adapted.state_dict().items())


def test_a_file_without_alpha_is_scaled_by_one(tmp_path):
    tensors = written(trained("ranks"), tmp_path / "lora.safetensors")
    model = unet()
    without = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    specs = attach_from_file(model, "LoRA", *formats.from_file(without, model)).specs()
    assert {spec.rank for spec in specs.values()} == {2, 3, 5}
    assert all(spec.alpha == spec.rank for spec in specs.values())


def keys_of(layer: str, **tensors: Tensor) -> dict[str, Tensor]:
    """Tensors of one layer under the keys of a file; `down` and `up` for short."""
    short = {"down": "lora_down.weight", "up": "lora_up.weight"}
    return {f"lora_unet_{layer.replace('.', '_')}.{short.get(key, key)}": t for key, t in tensors.items()}


# the embedded UNet's CONV has a weight of (56, 56, 3, 3), its LINEAR one of (128, 128)
GOOD = keys_of("mid_block.resnets.0.time_emb_proj", down=torch.ones(2, 224), up=torch.ones(128, 2))
MISFITS: dict[str, tuple[dict[str, Tensor], list[str]]] = {
    "unknown layers": (
        {**keys_of("no.such", down=torch.ones(2, 9), up=torch.ones(9, 2)), "lora_te_mlp_fc1.alpha": torch.ones(())},
        ["3 faults", "lora_unet_no_such.lora_down.weight (2, 9)", "(9, 2)", "lora_te_mlp_fc1.alpha ()"],
    ),
    "wrong shapes": (
        {
            **keys_of(CONV, down=torch.ones(2, 56, 1, 1), up=torch.ones(56, 2, 1, 1)),
            **keys_of(LINEAR, down=torch.ones(2, 128), up=torch.ones(96, 2)),
        },
        ["2 faults", f"{CONV}: ", "(2, 56, 1, 1)", "(56, 56, 3, 3)", f"{LINEAR}: ", "(96, 2)", "(128, 128)"],
    ),
    "an unknown layer and a wrong shape": (
        {
            **keys_of("no.such", down=torch.ones(2, 9)),
            **keys_of(LINEAR, down=torch.ones(2, 127), up=torch.ones(128, 2)),
        },
        ["2 faults", "lora_unet_no_such.lora_down.weight (2, 9)", f"{LINEAR}: ", "(2, 127)", "(128, 128)"],
    ),
    "ranks that differ": (keys_of(LINEAR, down=torch.ones(2, 128), up=torch.ones(128, 3)), ["(2, 128)", "(128, 3)"]),
    "transposed": (keys_of(LINEAR, down=torch.ones(2, 128), up=torch.ones(2, 128)), [LINEAR, "(2, 128)"]),
    "no matrix": (keys_of(LINEAR, down=torch.ones(()), up=torch.ones(128)), [LINEAR, "()", "(128,)"]),
    "missing halves": (
        {**keys_of(CONV, down=torch.ones(2, 56, 3, 3)), **keys_of(LINEAR, up=torch.ones(128, 2))},
        ["2 faults", f"{CONV}: lora_up.weight", f"{LINEAR}: lora_down.weight"],
    ),
    "another algorithm": (keys_of(LINEAR, hada_w1_a=torch.ones(128, 2)), [LINEAR, "no LoRA"]),
    "tensors of another algorithm beside": (
        keys_of(LINEAR, down=torch.ones(2, 128), up=torch.ones(128, 2), dora_scale=torch.ones(128, 1)),
        [f"{LINEAR}.dora_scale"],
    ),
    "nothing": ({}, ["no tensors"]),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_listed_by_name_and_shape(tmp_path, case):
    tensors, words = MISFITS[case]
    save_file({**tensors, **GOOD} if tensors else {}, tmp_path / "lora.safetensors")
    model = unet()
    with pytest.raises(AdapterError) as caught:
        attach_from_file(model, "LoRA", *formats.from_file(formats.read(tmp_path / "lora.safetensors")[0], model))
    text = str(caught.value)
    assert not [word for word in words if word not in text], text
    assert "time_emb_proj" not in text


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", None], ids=["empty", "text", "missing"])
def test_a_file_that_is_no_safetensors_is_a_message(tmp_path, content):
    path = tmp_path / "lora.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AdapterError) as caught:
        formats.read(path)
    assert str(path) in str(caught.value)
    assert "safetensors file" in str(caught.value)
