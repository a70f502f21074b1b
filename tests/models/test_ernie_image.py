"""ERNIE-Image beyond the tests of every family: the VAE's statistics, cut captions, the prompt enhancer."""

import json

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from helpers.families.ernie_image import CASE, VARIANCE_OFFSET
from helpers.family_cases import PROMPTS, family_of, folder_of, native_tensors
from helpers.predictions import rows_of
from safetensors.torch import save_file

from models.checkpoint_files import local_path
from models.config import ModelConfig
from models.detect import get_family


def test_latents_are_normalized_as_the_pipeline_does_it():
    """Not by the number in the VAE's configuration, which counts where variances are small."""
    family = family_of(CASE)
    pipeline = family.pipeline(None)
    vae = pipeline.vae
    vae.bn.running_var.uniform_(0, 1e-4)
    assert vae.config.batch_norm_eps == 1e-4 != VARIANCE_OFFSET
    size = {"height": 32, "width": 32, "num_inference_steps": 1}
    given = {**CASE.guidance, **size, "prompt": PROMPTS[:1]}
    latents, images = (
        pipeline(**given, output_type=kind, generator=torch.Generator().manual_seed(0)).images
        for kind in ("latent", "pt")
    )
    pixels = 2 * images - 1
    with torch.no_grad():
        torch.testing.assert_close(family.decode_media(pipeline, latents), pixels)
        mean, _ = family.encode_media(pipeline, pixels)
        cells = pipeline._patchify_latents(vae.encode(pixels).latent_dist.mean)
    statistics = vae.bn.running_mean, vae.bn.running_var
    torch.testing.assert_close(mean, F.batch_norm(cells, *statistics, eps=VARIANCE_OFFSET))


def test_captions_are_cut_where_the_count_says():
    family = family_of(CASE)
    limit = family.count_tokens([""]).limit
    assert limit == 2047
    captions = ["a" * count for count in (limit - 1, limit, limit + 1)]
    assert family.count_tokens(captions).counts == [limit - 1, limit, limit + 1]
    less, fits, over = (row["prompt_embeds"] for row in rows_of(CASE, captions))
    assert [len(less), len(fits), len(over)] == [2047, 2048, 2048]
    assert torch.equal(fits, over)


def test_an_empty_caption_is_one_token():
    (row,) = rows_of(CASE, [""])
    assert row["prompt_embeds"].shape == (1, 16)


def test_the_prompt_enhancer_is_neither_loaded_nor_downloaded(monkeypatch):
    index = json.loads((folder_of(CASE) / "model_index.json").read_text())
    assert index["pe"] == ["transformers", "Ministral3ForCausalLM"]
    pipeline = family_of(CASE).pipeline(None)
    assert pipeline.pe is None
    assert pipeline.pe_tokenizer is None
    left_out = {}

    def download(path, **options):
        left_out.update(options)
        return str(folder_of(CASE))

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    assert local_path(ModelConfig(path="baidu/ERNIE-Image")) == folder_of(CASE)
    assert left_out["pe"] is None
    assert left_out["pe_tokenizer"] is None


def test_the_text_encoder_is_loaded_without_its_vision_tower():
    family = family_of(CASE)
    encoder = family.load_encoders("text").text_encoder
    whole = family.pipeline(None).text_encoder
    names = [name for name, _ in encoder.named_parameters()]
    assert names
    assert all(name.startswith("language_model.") for name in names)
    assert len(encoder.language_model.layers) == len(whole.language_model.layers)


def test_a_single_file_is_known_and_gets_the_configuration_of_the_base(tmp_path):
    """diffusers would take it for Stable Diffusion 1."""
    path = str(tmp_path / "model.safetensors")
    save_file(native_tensors(CASE, "model.diffusion_model."), path)
    family = get_family(ModelConfig(path=path, config=str(folder_of(CASE))))
    assert family.name == "ernie_image"
    assert family.find_source() == "baidu/ERNIE-Image"
