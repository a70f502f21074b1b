"""At full size, on the meta device: how many layers each preset of targets matches, and how many parameters each
algorithm trains with rank 16. `python tests/test_families_full.py` writes what it finds to data/full_size.json, to be
read critically."""

import json
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from helpers import comfy_keys
from helpers.comfy_keys import FAMILIES
from helpers.exported_keys import empty_layers, exported
from helpers.project import FIXTURES
from torch import nn

from adapter_files import files
from adapter_files.spellings import layer_spellings
from adapter_files.writers import preferred_format
from common.errors import AdapterError
from lora_algos import ALGORITHMS
from lora_algos.attach import attach
from lora_algos.config import AdapterOptions, LayerSpec
from lora_algos.targets import select_layers
from models.config import ModelConfig
from models.detect import family_classes, get_family
from models.released import released_models

GOLDEN = FIXTURES / "full_size.json"
WITHOUT_KEYS = {
    "FLUX 3 Image Klein Base": "flux3",
    "Ideogram 4": "ideogram4",
    "Z-Image-Omni-Base": "z_image_omni",
}
"""Released model -> family, of those whose names in ComfyUI are not in tests/keys."""
RANK = 16


def empty_denoiser(architecture: str) -> nn.Module:
    if architecture in FAMILIES:
        return comfy_keys.empty_denoiser(architecture)
    config = released_models()[architecture]["components"]["transformer"]
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)


def found(architecture: str) -> dict[str, dict[str, int | None]]:
    """Layers by preset; parameters by algorithm on the preset attention, None where it does not fit."""
    family = {**FAMILIES, **WITHOUT_KEYS}[architecture]
    presets = family_classes()[family].targets
    denoiser = empty_denoiser(architecture)
    layers = {preset: select_layers(denoiser, (preset,), presets) for preset in presets}
    counts = {
        algorithm: parameters(architecture, layers["attention"], algorithm)
        for algorithm in ALGORITHMS
    }
    return {
        "layers": {preset: len(names) for preset, names in layers.items()},
        "parameters": counts,
    }


def parameters(architecture: str, layers: list[str], algorithm: str) -> int | None:
    denoiser = empty_denoiser(architecture)
    spec = LayerSpec(RANK, float(RANK), algorithm, AdapterOptions())
    try:
        adapted = attach(denoiser, dict.fromkeys(layers, spec), 0)
    except AdapterError:
        return None
    return sum(
        parameter.numel() for parameter in adapted.model.parameters() if parameter.requires_grad
    )


LARGE = (
    "flux_schnell",
    "flux2_klein_9b",
    "sd35_medium",
    "sd35_large",
    "wan21_14b",
    "wan22_5b",
    "ltx2",
    "hunyuan_video15",
)
"""Architectures with very many layers, or like a smaller one; make test-long has them."""


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=pytest.mark.long if name in LARGE else ())
        for name in (*FAMILIES, *WITHOUT_KEYS)
    ],
)
def test_presets_match_and_algorithms_train_what_they_did(architecture):
    assert found(architecture) == json.loads(GOLDEN.read_text())[architecture]


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Architecture -> the family's own view of a folder of that size without weights, and the empty denoiser."""
    found = {}

    def family_and_denoiser(architecture: str):
        if architecture not in found:
            folder, family = (
                tmp_path_factory.mktemp(architecture),
                family_classes()[FAMILIES[architecture]],
            )
            index = {"_class_name": family.pipelines[0]}
            (folder / "model_index.json").write_text(json.dumps(index))
            name = family(ModelConfig(path=str(folder))).denoiser_component
            comfy_keys.empty_denoiser(architecture).save_config(folder / name)
            bound = get_family(ModelConfig(path=str(folder)))
            found[architecture] = bound, bound.empty_denoiser()
        return found[architecture]

    return family_and_denoiser


WITH_EVERY_ALGORITHM = ("sdxl", "flux", "z_image", "wan21_1.3b")
"""Architectures that make test exports with every algorithm; of the others it exports LoRA."""


def exported_pairs() -> Iterator[Any]:
    """Every architecture and algorithm; many are marked as long."""
    for architecture in FAMILIES:
        for algorithm in ALGORITHMS:
            is_short = algorithm == "LoRA" or architecture in WITH_EVERY_ALGORITHM
            marks = () if is_short else pytest.mark.long
            yield pytest.param(architecture, algorithm, marks=marks)


@pytest.mark.parametrize(("architecture", "algorithm"), exported_pairs())
def test_comfyui_knows_every_key_of_every_algorithm(architecture, algorithm, full_size):
    family, denoiser = full_size(architecture)
    names = layer_spellings(family, denoiser)
    layers = dict.fromkeys(select_layers(denoiser, ("all",), family.targets), algorithm)
    for file_format in {"comfyui", *family.layer_names.file_formats}:
        plain = file_format == "diffusers"
        if plain and algorithm != "LoRA":
            continue
        known = (
            {name: algorithm for name in layers if name not in names.original_only}
            if plain
            else layers
        )
        tensors = exported(denoiser, names, known, file_format, biases=not plain)
        assert len(tensors) > len(known) / 2
        assert comfy_keys.resolve(tensors, architecture) == []


BY_COMFYUIS_NAMES = {("chroma", "all"), ("flux2", "all"), ("flux2_klein", "all")}
"""Families and presets with layers that ComfyUI does not know by diffusers' names, besides families whose
files have ComfyUI's names only."""


@pytest.mark.parametrize("preset", ["attention", "attention-mlp", "all"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_comfyui_knows_every_key_of_the_lora_that_is_written_by_default(
    architecture, preset, full_size
):
    family, denoiser = full_size(architecture)
    names = layer_spellings(family, denoiser)
    lora = dict.fromkeys(select_layers(denoiser, (preset,), family.targets), "LoRA")
    layers = empty_layers(denoiser, lora, biases=False)
    file_format = preferred_format(family.layer_names.file_formats, layers, names)
    if family.name == "sdxl":
        assert file_format == "kohya"
    else:
        has_one_format = family.layer_names.file_formats == ("comfyui",)
        by_comfyui = (family.name, preset) in BY_COMFYUIS_NAMES or has_one_format
        assert file_format == ("comfyui" if by_comfyui else "diffusers")
    tensors = files.file_content(layers, denoiser, names, file_format, torch.bfloat16).tensors
    assert len(tensors) >= 2 * len(names.groups(layers))
    assert comfy_keys.resolve(tensors, architecture) == []


if __name__ == "__main__":
    GOLDEN.write_text(
        json.dumps({name: found(name) for name in (*FAMILIES, *WITHOUT_KEYS)}, indent=1) + "\n"
    )
