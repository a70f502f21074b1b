"""Adapter files as they are written: their names at full size, and that other programs take them for the same
function."""

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from helpers.adapter_file_cases import (
    LAYERS,
    SPECS,
    names,
    on_layers,
    output,
    trained,
    unet,
    with_norms,
    written,
)
from helpers.project import BASE, FIXTURES
from peft import PeftModel

from adapter_files import convert, files
from adapter_files.reader import import_layers
from adapter_files.spellings import LayerSpellings
from adapter_files.writers import FileContent
from common.errors import AdapterError
from lora_algos import ALGORITHMS, get_algorithm
from lora_algos.attach import attach_from_file
from lora_algos.config import LayerSpec
from lora_algos.targets import adaptable_layers, norm_layers
from models.layer_names.unet import original_names

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}  # the rest are the class's defaults
PEFT_CASES = [
    "LoRA",
    "LoRA rslora",
    "LoRA pissa",
    "DoRA",
    "LoHa",
    "LoHa Tucker",
    "LoKr",
    "LoKr both",
    "LoKr full",
]


def comfy_modules() -> dict[str, tuple[str, tuple[int, ...]]]:
    modules = json.loads((FIXTURES / "comfy_sd15_keys.json").read_text())["modules"]
    return {name: (native, tuple(shape)) for name, (native, shape) in modules.items()}


def full_size() -> torch.nn.Module:
    with torch.device("meta"):
        return UNet2DConditionModel(**SD15)


def test_original_names_are_comfyuis_for_every_module_with_a_weight():
    assert original_names(full_size()) == {
        name: native for name, (native, _) in comfy_modules().items()
    }


def test_every_layer_of_sd15_is_called_as_comfyui_accepts_it():
    denoiser, modules = full_size(), comfy_modules()
    spelt = LayerSpellings(original_names(denoiser))
    layers = {**adaptable_layers(denoiser), **norm_layers(denoiser)}
    assert layers.keys() == modules.keys()
    for name, layer in layers.items():
        native, shape = modules[name]
        assert spelt.comfyui(name) == f"diffusion_model.{native}"
        assert spelt.kohya(name) == f"lora_unet_{name.replace('.', '_')}"
        assert tuple(layer.weight.shape) == shape
    assert len({s for name in layers for s in spelt.spellings(name)}) == len(
        [s for n in layers for s in spelt.spellings(n)]
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tensors_fit_every_layer_of_sd15_as_comfyui_reads_them(algorithm):
    """Shapes alone: the update made of them has as many rows and columns as ComfyUI's weight."""
    for name, (_, shape) in comfy_modules().items():
        if len(shape) < 2 or (name == "conv_out" and algorithm == "BOFT"):
            continue
        spec = LayerSpec(4, 1.0, algorithm)
        shapes = get_algorithm(algorithm).shapes(spec, torch.Size(shape))
        if algorithm in ("LoRA", "DoRA"):
            assert shapes["lora_up.weight"][0] == shape[0]
            assert shapes["lora_down.weight"][1:] == shape[1:]
        elif algorithm == "OFT":
            blocks, side, _ = shapes["oft_blocks"]
            assert blocks * side == shape[0]
        elif algorithm == "LoKr":
            w1, w2 = (
                shapes.get(f"lokr_w{i}") or (shapes[f"lokr_w{i}_a"][0], shapes[f"lokr_w{i}_b"][1])
                for i in (1, 2)
            )
            assert w1[0] * w2[0] == shape[0]
            assert w1[1] * torch.Size(w2[1:]).numel() == torch.Size(shape[1:]).numel()


@pytest.mark.parametrize("file_format", ["kohya", "comfyui"])
@pytest.mark.parametrize("case", SPECS)
def test_a_file_comes_back_as_the_same_adapter(case, file_format):
    adapted = on_layers(case)
    content = written(adapted, file_format)
    model = unet()
    layers, unknown = import_layers(content.tensors, content.metadata, model, names())
    assert not unknown
    again = attach_from_file(model, layers, unknown)
    assert {n: s.algorithm for n, s in again.specs().items()} == {
        n: s.algorithm for n, s in adapted.specs().items()
    }
    expected, plain = output(adapted.model), output(unet())
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(output(model), expected, rtol=0, atol=2e-5)


def test_what_the_node_trains_is_written_whole():
    adapted = with_norms()
    content = written(adapted, "comfyui")
    assert sum(key.endswith(".diff_b") for key in content.tensors) == sum(
        getattr(layer.base_layer, "bias", None) is not None for layer in adapted.layers().values()
    )
    model = unet()
    attach_from_file(model, *import_layers(content.tensors, content.metadata, model, names()))
    torch.testing.assert_close(output(model), output(adapted.model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("file_format", ["kohya", "comfyui"])
def test_all_lora_layers_of_a_file_have_one_alpha(file_format):
    content = written(with_norms(), file_format)
    assert {float(t) for key, t in content.tensors.items() if key.endswith(".alpha")} == {3.0}


def test_rotations_are_written_with_alpha_0():
    for case in ("OFT", "OFT constraint", "BOFT"):
        tensors = written(on_layers(case), "kohya").tensors
        assert {float(t) for key, t in tensors.items() if key.endswith(".alpha")} == {0.0}


def load_in_diffusers(content: FileContent, folder: Path, caplog) -> StableDiffusionPipeline:
    """The embedded pipeline with the file loaded, and no warning about a key."""
    (folder / "lora.safetensors").write_bytes(files.to_bytes(content.tensors, content.metadata))
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_warning()
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            pipeline.load_lora_weights(folder, weight_name="lora.safetensors")
    finally:
        diffusers_logging.set_verbosity(verbosity)
    # on unexpected or missing keys; it also warns that a text encoder's keys were looked for, which are not ours
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert not [text for text in warnings if "No LoRA keys associated to CLIPTextModel" not in text]
    return pipeline


def image(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    result = pipeline(
        "a smiling face",
        height=64,
        width=64,
        num_inference_steps=3,
        generator=generator,
        output_type="np",
    )
    return torch.from_numpy(result.images[0])


@pytest.mark.parametrize(
    ("case", "file_format"),
    [("LoRA", "kohya"), ("LoRA pissa", "kohya"), ("LoRA", "diffusers"), ("DoRA", "diffusers"), ("LoHa", "diffusers"),
     ("LoKr", "diffusers"), ("LoKr full", "kohya")],
)  # fmt: skip
def test_diffusers_draws_our_images(tmp_path, caplog, case, file_format):
    adapted = on_layers(case)
    layers = files.adapter_layers(adapted)
    if case not in ("LoRA", "LoRA pissa", "DoRA"):
        layers = {
            n: convert.exact_lora(t, files.base_weights(adapted.model)[n].shape)
            for n, t in layers.items()
        }
    content = files.file_content(layers, adapted.model, names(), file_format, torch.float32)
    theirs = load_in_diffusers(content, tmp_path, caplog)
    ours = StableDiffusionPipeline.from_pretrained(
        BASE, torch_dtype=torch.float32, unet=adapted.model
    )
    ours.set_progress_bar_config(disable=True)
    expected = image(ours)
    plain = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    assert (image(plain) - expected).abs().max() > 1e-2
    torch.testing.assert_close(image(theirs), expected, rtol=0, atol=1e-4)


def test_diffusers_scales_layers_of_different_rank_and_alpha_rightly(tmp_path, caplog):
    alphas, ranks = (3.0, 0.5, 8.0, 1.0), (2, 5, 3)
    adapted = trained(
        {n: LayerSpec(ranks[i % 3], alphas[i % 4]) for i, n in enumerate(adaptable_layers(unet()))},
        0.02,
    )
    pipeline = load_in_diffusers(written(adapted, "kohya"), tmp_path, caplog)
    torch.testing.assert_close(output(pipeline.unet), output(adapted.model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", PEFT_CASES)
def test_peft_loads_the_folder_as_the_same_function(tmp_path, case):
    # PEFT splits the 4 channels of conv_in into 4 x 1 for the factor 4, where everyone else has 1 x 4
    layers = [
        n
        for n in LAYERS
        if (case != "LoHa Tucker" or "conv" in n) and (case != "LoKr" or n != "conv_in")
    ]
    adapted = on_layers(case, layers)
    content = written(adapted, "peft")
    (tmp_path / "adapter_model.safetensors").write_bytes(
        files.to_bytes(content.tensors, content.metadata)
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(content.config))
    model = PeftModel.from_pretrained(unet(), tmp_path)
    torch.testing.assert_close(output(model), output(adapted.model), rtol=0, atol=2e-5)
    again = unet()
    attach_from_file(again, *import_layers(*files.read_adapter(tmp_path), again, names()))
    torch.testing.assert_close(output(again), output(adapted.model), rtol=0, atol=2e-5)


@torch.no_grad()
def test_peft_and_diffusers_load_a_dora_in_bf16_with_its_fp32_magnitudes(tmp_path, caplog):
    adapted = on_layers("DoRA")
    content = written(adapted, "peft", torch.bfloat16)
    (tmp_path / "adapter_model.safetensors").write_bytes(
        files.to_bytes(content.tensors, content.metadata)
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(content.config))
    in_peft = PeftModel.from_pretrained(unet(), tmp_path)
    in_diffusers = load_in_diffusers(
        written(adapted, "diffusers", torch.bfloat16), tmp_path, caplog
    ).unet
    expected, plain = output(adapted.model), output(unet())
    for model in (in_peft, in_diffusers):
        assert (output(model) - expected).norm() < 0.01 * (plain - expected).norm()


def test_a_lokr_that_peft_would_split_otherwise_is_refused_by_layer():
    with pytest.raises(AdapterError, match=r"for every factor(.|\n)*conv_in"):
        written(on_layers("LoKr"), "peft")


@pytest.mark.parametrize(
    ("file_format", "case"),
    [("diffusers", "LoKr"), ("peft", "OFT"), ("diffusers", "LoRA with biases")],
)
def test_what_a_format_cannot_hold_is_refused(file_format, case):
    with pytest.raises(AdapterError, match=r"kohya and comfyui hold everything") as caught:
        written(on_layers(case), file_format)
    assert LAYERS[0] in str(caught.value)
