"""A new family is one file, one line in models/__init__.py and a recipe. Here the line is added at run time."""

import numpy as np
import pytest
import torch
from helpers.families.toy import CASE, WIDTH
from helpers.family_cases import (
    PROMPTS,
    SIDE,
    collate,
    family_of,
    folder_of,
    native_tensors,
    run_pipeline,
)
from helpers.toy_family import Toy
from safetensors.torch import save_file

from adapter_files.spellings import layer_spellings
from common.errors import ModelError
from models import FAMILIES, family_classes
from models.base import ModelFamily, cond_bytes
from models.config import ModelConfig
from models.detect import get_family
from models.layer_names.names import RowSlice
from objectives.config import ObjectiveConfig


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The line in models/__init__.py."""
    monkeypatch.setitem(FAMILIES, "toy", "helpers.toy_family")


@pytest.fixture
def family() -> ModelFamily:
    return family_of(CASE)


def test_a_folder_is_detected_by_its_pipeline(family):
    assert type(family) is Toy
    assert family_classes()["toy"] is Toy
    with pytest.raises(ModelError, match="is toy, not sd15"):
        get_family(ModelConfig(path=str(folder_of(CASE)), family="sd15"))


def test_messages_name_the_new_family(tmp_path, family):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"Supported are sd15, .*, toy;"):
        get_family(ModelConfig(path=str(tmp_path / "other.safetensors")))
    with pytest.raises(ModelError, match=r"width 2048 \(SDXL\); this model takes width 40 \(Toy\)"):
        family.comfy.read(torch.zeros(1, 5, 2048), {})
    with pytest.raises(ModelError, match="models of the family toy have no guidance input"):
        get_family(ModelConfig(path=str(folder_of(CASE)), guidance_scale=2.0))
    with pytest.raises(ModelError, match=r"--model\.expert low: .* has one denoiser"):
        get_family(ModelConfig(path=str(folder_of(CASE)), expert="low"))
    with pytest.raises(ModelError, match="is toy, whose text encoders cannot be trained"):
        get_family(ModelConfig(path=str(folder_of(CASE)), train_text_encoder=True))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["plain", "ComfyUI"])
def test_a_single_file_of_the_original_names_is_the_same_model(tmp_path, family, prefix):
    tensors = native_tensors(CASE, prefix)
    assert f"{prefix}blocks.0.qkv.weight" in tensors, "three projections are one weight"
    save_file(tensors, tmp_path / "toy.safetensors")
    config = ModelConfig(path=str(tmp_path / "toy.safetensors"), config=str(folder_of(CASE)))
    single = get_family(config)
    assert type(single) is Toy
    expected = family.load_denoiser(torch.float32).state_dict()
    weights = single.load_denoiser(None).state_dict()
    assert weights.keys() == expected.keys()
    assert all(tensor.equal(weights[name]) for name, tensor in expected.items())
    assert single.identity_files("denoiser")[0] == tmp_path / "toy.safetensors"


def test_the_prediction_is_the_pipelines(family):
    call = run_pipeline(CASE)
    with torch.no_grad():
        rows = family.encode_prompt(family.load_encoders("text"), PROMPTS)
        timestep = call.timestep.expand(len(PROMPTS)).to(torch.float32)
        denoiser = family.load_denoiser(torch.float32).eval()
        prediction = family.predict(denoiser, call.noisy, timestep, collate(family, rows))
    scale = float(call.prediction.abs().max())
    torch.testing.assert_close(prediction, call.prediction, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(family.normalize(call.decoded), call.final)
    assert family.process(ObjectiveConfig()).describe() == "flow matching, velocity"


def test_captions_and_images_have_the_sizes_that_the_family_states(family):
    with torch.no_grad():
        row = family.encode_prompt(family.load_encoders("text"), PROMPTS[:1])[0]
        pixels = torch.rand(1, 3, 2 * SIDE, SIDE) * 2 - 1
        latents, _ = family.encode_media(family.load_encoders("media"), pixels)
    assert row["prompt_embeds"].shape == (256, WIDTH)
    assert cond_bytes(family) == row["prompt_embeds"].nbytes
    counts, limit = family.count_tokens(PROMPTS)
    assert 0 < counts[1] < counts[0] <= limit == 255
    step = family.limits.latent_step
    assert latents.shape == (1, family.latent_channels, 2 * SIDE // step, SIDE // step)
    assert family.limits.pixel_step == 2 * step
    assert family.limits.num_tokens(latents.shape) == latents[0, 0].numel() // 4
    assert family.limits.frame_error(5) == "this model makes images"
    back = family.comfy.read(*family.comfy.write(row))
    assert back["prompt_embeds"].equal(row["prompt_embeds"])


def test_files_name_the_layers_by_the_table(family):
    denoiser = family.empty_denoiser()
    originals = family.layer_names.original(denoiser)
    key = originals["joint_transformer_blocks.1.attn.to_k"]
    assert (key.name, key.row_slice) == ("blocks.1.qkv", RowSlice(16, 16))
    assert originals["proj_out"].name == "proj_out", "names without a rule are the same"
    names = layer_spellings(family, denoiser)
    assert names.original["joint_transformer_blocks.1.attn.to_v"] == "blocks.1.qkv"
    assert names.slices["joint_transformer_blocks.1.attn.to_v"] == (32, 16)


def test_blocks_are_those_of_the_transformer(family):
    denoiser = family.empty_denoiser()
    blocks = family.blocks(denoiser)
    names = [
        "joint_transformer_blocks.0",
        "joint_transformer_blocks.1",
        "single_transformer_blocks.0",
    ]
    assert [name for name in blocks if "transformer_blocks" in name] == names
    assert all(blocks[name] is denoiser.get_submodule(name) for name in blocks)
    inner = family.blocks(denoiser, depth=2)
    assert "joint_transformer_blocks.0.attn" in inner


def test_previews_are_made_by_diffusers_pipeline_with_the_trained_denoiser(family):
    denoiser = family.load_denoiser(torch.float32)
    pipeline = family.pipeline(denoiser)
    assert pipeline.transformer is denoiser
    image = pipeline(
        prompt="owl", height=SIDE, width=SIDE, num_inference_steps=1, output_type="np", negative_prompt="",
        **family.preview_options(2.0),
    ).images[0]  # fmt: skip
    assert image.shape == (SIDE, SIDE, 3)
    assert np.isfinite(image).all()
