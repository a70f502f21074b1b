"""Ideogram 4 beyond the tests of every family: long captions, noise levels, statistics, single files, previews."""

import json
import math
import shutil

import pytest
import torch
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import (
    _logit_normal_sigmas,
    _resolution_aware_mu,
)
from helpers.families import ideogram4
from helpers.family_cases import family_of, folder_of, native_tensors, values_of_file
from helpers.predictions import rows_of
from safetensors.torch import save_file

from common.errors import ModelError
from models.config import ModelConfig
from models.detect import get_family
from models.empty_components import empty_other_denoisers
from models.released import configuration_folder, released_models
from objectives.config import ObjectiveConfig
from training.sampling.encoded_prompts import compact, widened

CASE = ideogram4.CASE


def test_long_captions_are_cut_and_keep_the_end_of_the_template(monkeypatch):
    """The pipeline itself refuses them."""
    monkeypatch.setattr("models.families.ideogram4.TOKENS", 20)
    monkeypatch.setattr("models.families.ideogram4.Ideogram4.max_tokens", 20)
    family = family_of(CASE)
    limit = family.count_tokens([""]).limit
    captions = [" owl" * count for count in (limit - 1, limit, limit + 1)]
    less, fits, over = (row["prompt_embeds"] for row in rows_of(CASE, captions))
    assert [len(less), len(fits), len(over)] == [19, 20, 20]
    assert torch.equal(fits, over)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (1024, 1024), (2048, 1024)])
def test_the_noise_levels_are_the_pipelines(height, width):
    """Its levels are evenly spaced quantiles of a logit-normal distribution."""
    mu = _resolution_aware_mu(height, width, base_mu=0.0)
    expected = _logit_normal_sigmas(9, mu, std=1.5)[1:].flip(0).double()
    config = ObjectiveConfig(timestep_sampling="logit-normal", logit_std=1.5)
    process = family_of(CASE).process(config)
    num_tokens = height * width // 256
    assert process.shift(num_tokens) == pytest.approx(math.exp(mu))
    t = torch.sigmoid(1.5 * torch.special.ndtri(torch.arange(1, 9, dtype=torch.float64) / 9))
    torch.testing.assert_close(process.levels(t, num_tokens).sigma, expected, rtol=1e-5, atol=1e-6)
    assert family_of(CASE).process(ObjectiveConfig(shift=2.0)).shift(num_tokens) == 2.0


def test_a_vae_file_of_flux2_is_refused(tmp_path):
    """Its statistics are in another order."""
    path = tmp_path / "flux2-vae.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"--model\.vae .*in the order of FLUX\.2"):
        get_family(ModelConfig(path=str(folder_of(CASE)), vae=str(path)))
    assert get_family(ModelConfig(path=str(folder_of(CASE)), vae=str(folder_of(CASE)))).vae_config


def test_a_folder_that_bitsandbytes_quantized_is_refused(tmp_path):
    """The released nf4 weights are such a folder."""
    folder = tmp_path / "model"
    shutil.copytree(folder_of(CASE), folder)
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(ModelError, match="has quantized weights, as Ideogram released them"):
        get_family(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_of_the_original_names_is_the_same_model(prefix, tmp_path):
    path = str(tmp_path / "model.safetensors")
    tensors = native_tensors(CASE, prefix)
    assert f"{prefix}layers.0.attention.qkv.weight" in tensors
    save_file(tensors, path)
    values_of_file(CASE, path)


def test_previews_have_both_transformers_and_no_prompt_enhancer():
    family = family_of(CASE)
    trained = family.load_denoiser(torch.float32)
    drawn = family.pipeline(trained)
    assert drawn.transformer is trained
    other = drawn.unconditional_transformer
    assert not other.input_proj.weight.equal(trained.input_proj.weight)
    assert drawn.prompt_enhancer_head is None


def test_the_plan_counts_the_other_transformer():
    with configuration_folder(released_models()["Ideogram 4"]) as folder, torch.device("meta"):
        (other,) = empty_other_denoisers(get_family(ModelConfig(path=str(folder))))
    assert {parameter.dtype for parameter in other.parameters()} == {torch.bfloat16}
    assert round(sum(parameter.numel() for parameter in other.parameters()) / 1e8) == 93


def test_the_rows_of_an_image_in_encoded_prompts_take_no_memory():
    family = family_of(CASE)
    encoders = family.load_encoders("text")
    with torch.no_grad():
        embeds, *others = encoders.encode_prompt("owl", 4, 4, 12, "cpu")
    stored = compact(embeds)
    assert stored.values().shape[0] < embeds.shape[1] / 2
    assert widened(stored).equal(embeds)
    assert not any(compact(other).is_sparse for other in others)
