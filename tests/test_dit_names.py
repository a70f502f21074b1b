"""The names of diffusion transformers' layers are ComfyUI's, at full size."""

import re

import comfy_keys
import pytest
from torch import nn

from models import dit_names
from models.ldm_names import native_names
from models.base import Native

NO_LAYER = "(?!)"
TABLES = {
    "SD3Transformer2DModel": (dit_names.SD3, NO_LAYER),
    "FluxTransformer2DModel": (dit_names.FLUX, NO_LAYER),
    "Flux2Transformer2DModel": (dit_names.FLUX, dit_names.FLUX2_NATIVE_ONLY),
    "ChromaTransformer2DModel": (dit_names.FLUX, dit_names.CHROMA_NATIVE_ONLY),
    "QwenImageTransformer2DModel": (dit_names.QWEN_IMAGE, NO_LAYER),
    "ZImageTransformer2DModel": (dit_names.Z_IMAGE, NO_LAYER),
    "WanTransformer3DModel": (dit_names.WAN, dit_names.WAN_NATIVE_ONLY),
}
TRANSFORMERS = [name for name in comfy_keys.ARCHITECTURES if comfy_keys.key_map(name)["class"] in TABLES]


def natives(architecture: str, denoiser: nn.Module) -> dict[str, Native]:
    return dit_names.renamed(denoiser, *TABLES[comfy_keys.key_map(architecture)["class"]])


def test_every_architecture_has_a_table():
    assert len(TRANSFORMERS) == 15
    assert set(comfy_keys.ARCHITECTURES) - set(TRANSFORMERS) == {"sdxl"}


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_every_layer_is_where_comfyui_has_it(architecture):
    there, denoiser = comfy_keys.key_map(architecture), comfy_keys.empty_denoiser(architecture)
    found, covered = natives(architecture, denoiser), {}
    assert found.keys() == there["modules"].keys() | set(there["unknown"])
    for name, native in found.items():
        layer = denoiser.get_submodule(name)
        key, shape = f"{native.name}.weight", tuple(layer.weight.shape)
        if name in there["modules"]:
            assert comfy_keys.place_of(there, name) == comfy_keys.Place(key, native.rows, native.swapped)
        assert native.by_diffusers == (f"transformer.{name}" in comfy_keys.spellings(architecture))
        first, count = native.rows or (0, there["weights"][key][0])
        assert shape == (count, *there["weights"][key][1:])
        bias = there["weights"].get(f"{native.name}.bias")
        assert (bias is None) == (getattr(layer, "bias", None) is None), name
        covered.setdefault(key, []).append((first, first + count))
    for key, parts in covered.items():
        parts.sort()
        assert [start for start, _ in parts] == [0, *(end for _, end in parts[:-1])]
        assert parts[-1][1] == there["weights"][key][0]
    left = {key for key in there["weights"].keys() - covered.keys() if key.endswith(".weight")}
    assert not left
    parameters = {name for name, _ in denoiser.named_parameters()}
    assert not {n for n in parameters if re.search(r"\.(weight|bias)$", n) and n.rpartition(".")[0] not in found}


def test_sdxls_unet_is_named_by_the_table_of_unets():
    there, denoiser = comfy_keys.key_map("sdxl"), comfy_keys.empty_denoiser("sdxl")
    found = {name: f"{native}.weight" for name, native in native_names(denoiser).items()}
    assert found == {name: weight for name, (weight,) in there["modules"].items()}
