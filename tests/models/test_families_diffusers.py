"""diffusers' own loader makes of every family's LoRA file, that of default first, the weights that were trained."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers.family_cases import Case, cases, family_of
from safetensors.torch import save_file

from adapter_files import files
from adapter_files.spellings import layer_spellings
from adapter_files.writers import preferred_format
from lora_algos.adapted_model import AdaptedModel
from lora_algos.attach import attach
from lora_algos.config import AdapterConfig
from lora_algos.plan import AdapterPlan

WAN_ALL = r"(?!patch_embedding).*"  # by ComfyUI's names diffusers refuses what its converter has no name for
HUNYUAN_ALL = (
    r"(?!x_embedder).*"  # PEFT merges a Conv3d with a kernel of one as if it were a Conv2d
)
COMFYUI_ALONE = ("chroma", "flux2", "flux2_klein", "ideogram4", "z_image_omni")
"""Families with layers that ComfyUI does not know by diffusers' names: those of the preset all are in no one file."""


def adapter(case: Case, targets: str, algorithm: str = "LoRA") -> AdaptedModel:
    """An adapter with random weights."""
    family = family_of(case)
    denoiser = family.load_denoiser(torch.float32)
    plan = AdapterPlan(AdapterConfig(alpha=3.0, targets=(targets,)), algorithm, 2, "auto")
    adapted = attach(denoiser, plan.specs(denoiser, family.targets), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.named_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted


def default_of(case: Case, adapted: AdaptedModel) -> str:
    """The format that a run writes if none is asked for."""
    family = family_of(case)
    names = layer_spellings(family, adapted.model)
    return preferred_format(family.layer_names.file_formats, files.adapter_layers(adapted), names)


def check_loads(case: Case, adapted: AdaptedModel, file_format: str, folder) -> None:
    """diffusers' loader makes of the file the weights that the adapter is merged into."""
    family = family_of(case)
    names, layers = layer_spellings(family, adapted.model), files.adapter_layers(adapted)
    content = files.file_content(layers, adapted.model, names, file_format, torch.float32)
    save_file(content.tensors, folder / "lora.safetensors", content.metadata)
    merged = family.load_denoiser(torch.float32)
    adapted.merge_into(merged)
    expected = merged.state_dict()
    pipeline = family.pipeline(None)
    fuse_file(pipeline, family.denoiser_component, folder)
    found = getattr(pipeline, family.denoiser_component).state_dict()
    assert found.keys() == expected.keys()
    base = family.load_denoiser(torch.float32).state_dict()
    changed = [name for name, tensor in expected.items() if not torch.equal(tensor, base[name])]
    assert len(changed) == len(layers)
    assert not [
        name
        for name in changed
        if not torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
    ]


def fuse_file(pipeline: Any, component: str, folder: Path) -> None:
    """Let diffusers load the file and merge it into the denoiser."""
    options: dict[str, Any] = {"weight_name": "lora.safetensors"}
    if not loads_adapters(pipeline):
        denoiser = getattr(pipeline, component)
        denoiser.load_lora_adapter(folder, prefix="transformer", **options)
        denoiser.fuse_lora()
        denoiser.unload_lora()
        return
    if component == "transformer_2":
        options["load_into_transformer_2"] = True
    pipeline.load_lora_weights(folder, **options)
    pipeline.fuse_lora(components=[component])
    pipeline.unload_lora_weights()


def loads_adapters(pipeline: Any) -> bool:
    """Whether a pipeline or its class loads adapters; else the denoiser does, by diffusers' names alone."""
    return hasattr(pipeline, "load_lora_weights")


@pytest.mark.parametrize("preset", ["attention-mlp", "all"])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_diffusers_loads_the_file_that_is_written_by_default(case, preset, tmp_path):
    adapted = adapter(case, WAN_ALL if preset == "all" and "wan" in case.family else preset)
    file_format = default_of(case, adapted)
    is_unread = not loads_adapters(getattr(diffusers, family_of(case).pipelines[0]))
    if is_unread or (preset == "all" and case.family in COMFYUI_ALONE):
        assert file_format == "comfyui"
        return
    check_loads(case, adapted, file_format, tmp_path)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_diffusers_loads_its_own_format_with_all_layers(case, tmp_path):
    targets = HUNYUAN_ALL if "hunyuan" in case.family else "all"
    check_loads(case, adapter(case, targets), "diffusers", tmp_path)


@pytest.mark.parametrize("algorithm", ["DoRA", "LoHa", "LoKr", "OFT"])
@pytest.mark.parametrize(
    "case", [case for case in cases() if not case.family.startswith(("sd15", "sdxl"))], ids=str
)
def test_what_diffusers_format_does_not_hold_for_comfyui_is_written_by_comfyuis_names(
    case, algorithm
):
    assert default_of(case, adapter(case, "attention-mlp", algorithm)) == "comfyui"
