"""The names of diffusion transformers' layers are ComfyUI's, at full size."""

import functools
import re

import pytest
import torch
from helpers import comfy_keys
from helpers.exported_keys import exported
from torch import nn

from adapter_files.keys import group_keys
from adapter_files.spellings import LayerSpellings
from lora_algos import ALGORITHMS
from lora_algos.targets import adaptable_layers, norm_layers
from models import family_classes
from models.layer_names.names import LayerNames, OriginalLayer
from models.layer_names.unet import original_names

NAMES: dict[str, LayerNames] = {
    family.denoiser_class: family.layer_names
    for family in family_classes().values()
    if family.denoiser_class != "UNet2DConditionModel"
}
NOT_IN_DIFFUSERS = {"pos_embed"}  # a table of sines, which diffusers makes anew
CONNECTORS = ("audio_embeddings_connector.", "video_embeddings_connector.")
"""Parts of LTX-2 that are in ComfyUI's denoiser, and in a module of diffusers that is not trained."""
TRANSFORMERS = [
    name for name in comfy_keys.ARCHITECTURES if comfy_keys.key_map(name)["class"] in NAMES
]


@functools.lru_cache(1)
def denoiser_of(architecture: str) -> nn.Module:
    return comfy_keys.empty_denoiser(architecture)


def names_of(architecture: str) -> LayerNames:
    return NAMES[comfy_keys.key_map(architecture)["class"]]


def natives(architecture: str) -> dict[str, OriginalLayer]:
    return names_of(architecture).original(denoiser_of(architecture))


def names(architecture: str, by_diffusers: str) -> LayerSpellings:
    found = natives(architecture)
    return LayerSpellings(
        {layer: native.name for layer, native in found.items()},
        "transformer",
        kohya_uses_original=True,
        slices={layer: native.row_slice for layer, native in found.items() if native.row_slice},
        swapped=frozenset(layer for layer, native in found.items() if native.swapped_halves),
        comfyui_prefix=by_diffusers,
    )


def test_every_architecture_has_a_table():
    assert len(TRANSFORMERS) == 21
    assert set(comfy_keys.ARCHITECTURES) - set(TRANSFORMERS) == {"sdxl"}


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_every_layer_is_where_comfyui_has_it(architecture):
    there, denoiser = comfy_keys.key_map(architecture), denoiser_of(architecture)
    found, covered = natives(architecture), {}
    assert found.keys() == there["modules"].keys() | set(there["unknown"])
    for name, native in found.items():
        layer = denoiser.get_submodule(name)
        key, shape = f"{native.name}.weight", tuple(layer.weight.shape)
        if not names_of(architecture).comfyui_loads_norms and "norm" in name:
            key = f"{native.name}.scale"
        if name in there["modules"]:
            assert comfy_keys.place_of(there, name) == comfy_keys.Place(
                key, native.row_slice, native.swapped_halves
            )
        assert native.known_by_diffusers_name == (
            f"transformer.{name}" in comfy_keys.spellings(architecture)
        )
        first, count = native.row_slice or (0, there["weights"][key][0])
        assert shape == (count, *there["weights"][key][1:])
        bias = there["weights"].get(f"{native.name}.bias")
        assert (bias is None) == (getattr(layer, "bias", None) is None), name
        covered.setdefault(key, []).append((first, first + count))
    for key, parts in covered.items():
        parts.sort()
        assert [start for start, _ in parts] == [0, *(end for _, end in parts[:-1])]
        assert parts[-1][1] == there["weights"][key][0]
    covered = {key for key in covered if key.endswith(".weight")}
    left = {key for key in there["weights"].keys() - covered if key.endswith(".weight")}
    assert not {key for key in left if not key.startswith(CONNECTORS)}
    parameters = {name for name, _ in denoiser.named_parameters()}
    assert not {
        n
        for n in parameters
        if re.search(r"\.(weight|bias)$", n) and n.rpartition(".")[0] not in found
    }


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_every_parameter_is_found_in_a_single_file(architecture):
    there, denoiser = comfy_keys.key_map(architecture)["weights"], denoiser_of(architecture)
    parts: dict[str, int] = {}
    for name, key in names_of(architecture).file_keys(denoiser, there).items():
        parts[key] = parts.get(key, 0) + denoiser.get_parameter(name).numel()
    assert parts == {key: torch.Size(shape).numel() for key, shape in there.items() if key in parts}
    left = there.keys() - parts.keys() - NOT_IN_DIFFUSERS
    assert not {key for key in left if not key.startswith(CONNECTORS)}


def test_sdxls_unet_is_named_by_the_table_of_unets():
    there, denoiser = comfy_keys.key_map("sdxl"), comfy_keys.empty_denoiser("sdxl")
    found = {name: f"{native}.weight" for name, native in original_names(denoiser).items()}
    assert found == {name: weight for name, (weight,) in there["modules"].items()}


FORMS = {"comfyui": "transformer.", "comfyui without names of parts": "", "kohya": ""}
NUMBER = re.compile(r"\d+")


def mixed(architecture: str) -> dict[str, str]:
    """Every algorithm somewhere: in a model's blocks in turn, the parts of a fused weight alike."""
    algorithms, found = [*ALGORITHMS], natives(architecture)
    block = {
        layer: int((NUMBER.findall(native.name) or ["0"])[0]) for layer, native in found.items()
    }
    exported_layers = {
        layer: algorithms[number % len(algorithms)] for layer, number in block.items()
    }
    if not names_of(architecture).comfyui_loads_norms:
        exported_layers = {
            layer: name for layer, name in exported_layers.items() if "norm" not in layer
        }
    return exported_layers


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_comfyui_loads_every_key_of_every_file(architecture, form):
    prefix = (
        FORMS[form] and names_of(architecture).diffusers_prefix
    )  # not all are known by these names
    denoiser, spelt = denoiser_of(architecture), names(architecture, prefix)
    tensors = exported(denoiser, spelt, mixed(architecture), form.split()[0])
    assert not comfy_keys.resolve(tensors, architecture)
    layers = {**adaptable_layers(denoiser), **norm_layers(denoiser)}
    _, unknown = group_keys(
        {key: tuple(t.shape) for key, t in tensors.items()}, spelt.layers_by_spelling(layers)
    )
    assert not unknown


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_loras_in_diffusers_format_are_loaded_by_comfyui_too(architecture):
    denoiser, found = denoiser_of(architecture), natives(architecture)
    known = {
        layer: "LoRA"
        for layer in adaptable_layers(denoiser)
        if found[layer].known_by_diffusers_name
    }
    tensors = exported(denoiser, names(architecture, ""), known, "diffusers", biases=False)
    assert not comfy_keys.resolve(tensors, architecture)


def test_what_comfyui_would_not_load_is_found():
    tensors = {
        "transformer.norm_out.linear.oft_blocks": torch.empty(192, 32, 32),
        "transformer.norm_out.linear.alpha": torch.empty(()),
        "transformer.transformer_blocks.0.attn.to_q.diff_b": torch.empty(3072),
        "transformer.transformer_blocks.0.attn.to_q.diff": torch.empty(9216, 3072),
        "diffusion_model.double_blocks.0.img_attn.qkv.diff": torch.empty(9216, 3072),
        "diffusion_model.double_blocks.0.img_mod.lin.hada_w1_a": torch.empty(18432, 4),
        "diffusion_model.double_blocks.0.img_attn.to_q.diff": torch.empty(1),
        "diffusion_model.img_in.lora_up.weight": torch.empty(3072, 4),
        "diffusion_model.img_in.lora_down.weight": torch.empty(5, 64),
        "diffusion_model.txt_in.oft_blocks": torch.empty(96, 32, 32),
    }  # fmt: skip
    words = [
        "another function", "diff_b of a part is lost", "makes (9216, 3072) for a weight of (3072, 3072)",
        "replaces or adds to", "img_mod.lin: makes (-1, -1)", "img_attn.to_q.diff: no such name",
        "img_in: makes (-1, -1)", "rotation without alpha",
    ]  # fmt: skip
    faults = comfy_keys.resolve(tensors, "flux")
    assert not [word for word in words if not any(word in fault for fault in faults)], faults
