"""diffusers' own loader makes of every family's LoRA file the weights that were trained."""

from functools import partial

import pytest
import torch
from family_cases import Case, cases, family_of
from safetensors.torch import save_file

from lora_algos import formats
from lora_algos.attach import Plan, attach
from lora_algos.config import AdapterConfig
from training.names import file_names

FORMATS = {"sdxl": ("kohya", "diffusers"), "wan": ("comfyui", "diffusers"), "wan_i2v": ("comfyui", "diffusers")}
KNOWN = {"comfyui": r"(?!patch_embedding).*"}  # of Wan: diffusers refuses what its converter has no name for


def trained(case: Case, folder, file_format: str) -> dict[str, torch.Tensor]:
    """Writes a file of a LoRA with random weights on all layers, and returns the denoiser's weights with it."""
    family = family_of(case)
    denoiser = family.load_denoiser(torch.float32)
    names, targets = file_names(family, denoiser), (KNOWN.get(file_format, ".*"),)
    adapted = attach(
        denoiser, Plan(AdapterConfig(alpha=3.0, targets=targets), "LoRA", 2, "auto").specs(denoiser, family.targets), 0
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.named_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    layers = formats.layers_of_adapted(adapted)
    content = formats.to_file(layers, denoiser, names, file_format, torch.float32)
    save_file(content.tensors, folder / "lora.safetensors", content.metadata)
    merged = family.load_denoiser(torch.float32)
    adapted.merge_into(merged)
    return merged.state_dict()


@pytest.mark.parametrize(
    ("case", "file_format"),
    [(case, form) for case in cases() for form in FORMATS.get(case.family, ("diffusers",))], ids=str,
)  # fmt: skip
def test_diffusers_loads_what_was_trained(case, file_format, tmp_path):
    expected, family = trained(case, tmp_path, file_format), family_of(case)
    pipeline = family.pipeline(None)
    load = pipeline.load_lora_weights
    if family.component == "transformer_2":
        load = partial(load, load_into_transformer_2=True)
    load(tmp_path, weight_name="lora.safetensors")
    pipeline.fuse_lora(components=[family.component])
    pipeline.unload_lora_weights()
    found = getattr(pipeline, family.component).state_dict()
    assert found.keys() == expected.keys()
    base = family.load_denoiser(torch.float32).state_dict()
    changed = [name for name, tensor in expected.items() if not torch.equal(tensor, base[name])]
    assert len(changed) > 5
    assert not [name for name in changed if not torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)]
