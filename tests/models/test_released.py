"""The stored configurations of released models: their sizes, their families, and the ids that recipes name."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers.comfy_keys import KEYS, empty_denoiser
from helpers.project import PROJECT

from models.config import ModelConfig
from models.detect import get_family
from models.empty_components import empty_encoders
from models.released import (
    complete_config,
    configuration_folder,
    find_released_model,
    released_hub_ids,
    released_models,
)

NUM_PARAMETERS = {
    "clip_l": 123, "clip_l_projection": 124, "clip_g": 695, "clip_h_vision": 631, "t5_xxl": 4762, "umt5_xxl": 5681,
    "qwen3_4b": 4022, "qwen3_4b_model": 4022, "qwen3_8b": 8191, "qwen2_5_vl_7b": 8292, "mistral_small_3": 24011,
    "qwen3_vl_4b": 4438, "ministral_3_3b": 3849, "qwen3_vl_8b": 8767, "qwen3_vl_8b_model": 8145, "gemma3_12b": 12187,
    "qwen3_0_6b": 596, "qwen2_5_vl_7b_text": 7071, "byt5_glyph": 219, "qwen3_vl_4b_with_head": 4438,
    "siglip2_so400m": 428,
}  # fmt: skip
"""Millions, from the model cards."""
NUM_TOKENS = {77, 256, 333, 512, 1000, 1024, 1280, 2048, 1024 + 1337, 1024 + 3 * 188}
"""Tokens of the longest captions, for which memory is planned."""
ARCHITECTURES = {
    "unet_sdxl": "sdxl", "flux1_dev": "flux", "flux1_schnell": "flux_schnell", "wan21_1_3b": "wan21_1.3b",
    "flux2_dev": "flux2", "sd3_medium": "sd3",
}  # fmt: skip
"""Component -> its name in tests/fixtures/keys, where this differs."""


def stored_components() -> dict[str, dict]:
    path = PROJECT / "models" / "released_models.json"
    return json.loads(path.read_text())["components"]


def test_recipes_train_released_models():
    known_ids = released_hub_ids()
    for recipe in PROJECT.glob("recipes/*.yaml"):
        path = yaml.safe_load(recipe.read_text()).get("model", {}).get("path", "")
        if path and "{project}" not in path:
            assert path in known_ids, recipe.name


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_encoders_have_their_size(name):
    import transformers

    configs = stored_components()
    config = complete_config(configs, name)
    model_class = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(config))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6) == NUM_PARAMETERS[name]


@pytest.mark.parametrize("path", sorted(KEYS.glob("*.json.gz")), ids=lambda path: path.name)
def test_denoisers_have_the_layers_of_comfyui(path: Path):
    """The fixtures were read off ComfyUI's full-size models."""
    import diffusers

    architecture = path.name.removesuffix(".json.gz")
    names = {ARCHITECTURES.get(name, name): name for name in stored_components()}
    config = stored_components()[names[architecture]]
    with torch.device("meta"):
        denoiser = getattr(diffusers, config["_class_name"]).from_config(config)
    expected = empty_denoiser(architecture)
    assert {name: p.shape for name, p in denoiser.named_parameters()} == {
        name: p.shape for name, p in expected.named_parameters()
    }


@pytest.mark.parametrize("name", released_models())
def test_every_model_is_of_a_family(name):
    model = released_models()[name]
    assert find_released_model(model["hub_ids"][0]) is model
    with configuration_folder(model) as folder:
        family = get_family(ModelConfig(path=str(folder)))
        assert family.pipelines[0] == model["pipeline"]
        num_tokens = family.cond_layout()["prompt_embeds"].shape[0]
        assert num_tokens in NUM_TOKENS
        assert family.limits.pixel_step in (16, 32, 64)


def test_text_encoders_are_cut_as_for_encoding():
    """FLUX.2's Mistral has 40 layers, and the denoiser is given states up to the thirtieth."""
    with configuration_folder(released_models()["FLUX.2 dev"]) as folder:
        family = get_family(ModelConfig(path=str(folder)))
        with torch.device("meta"):
            encoders = empty_encoders(family, "text")
    assert len(encoders.text_encoder.model.language_model.layers) == 31
    assert encoders.text_encoder.model.vision_tower is None
    assert next(encoders.text_encoder.parameters()).dtype == torch.bfloat16


def test_qwen_image_encodes_without_vision_and_head():
    """7.6 of 8.3 billion parameters are left, without the head 7.1."""
    with configuration_folder(released_models()["Qwen-Image"]) as folder:
        family = get_family(ModelConfig(path=str(folder)))
        with torch.device("meta"):
            encoders = empty_encoders(family, "text")
    count = sum(parameter.numel() for parameter in encoders.text_encoder.parameters())
    assert round(count / 1e8) == 71
    assert encoders.text_encoder.model.visual is None
