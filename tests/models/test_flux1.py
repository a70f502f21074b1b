"""What FLUX.1 and Chroma do beyond what every family does: guidance, lengths of text, shift, single files."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import ChromaPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from helpers.data_cases import SINGLE_PROCESS, data_config
from helpers.families import chroma as family_chroma
from helpers.families import flux1 as family_flux1
from helpers.family_cases import (
    PROMPTS,
    collate,
    family_of,
    folder_of,
    native_tensors,
    run_pipeline,
)
from helpers.predictions import noise, prediction, rows_of
from safetensors.torch import save_file
from torch import Tensor

from common.errors import ModelError
from data.precompute.build import build_datasets
from models.config import ModelConfig
from models.detect import get_family
from objectives.config import ObjectiveConfig

DEV, SCHNELL = family_flux1.CASES
CHROMA = family_chroma.CASE
ALL = pytest.mark.parametrize("case", [DEV, SCHNELL, CHROMA], ids=str)


def test_the_guidance_scale_of_the_config_is_the_pipelines_argument():
    call = run_pipeline(replace(DEV, guidance={"guidance_scale": 3.5}))
    family = get_family(ModelConfig(path=str(folder_of(DEV)), guidance_scale=3.5))
    denoiser = family.load_denoiser(torch.float32).eval()
    cond = collate(family, rows_of(DEV))
    with torch.no_grad():
        found = family.predict(denoiser, call.noisy, call.timestep.expand(2), cond)
    torch.testing.assert_close(found, call.prediction, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, prediction(DEV, rows_of(DEV), call.noisy), atol=1e-3)


@pytest.mark.parametrize("case", [SCHNELL, CHROMA], ids=str)
def test_guidance_is_an_error_for_models_without_a_guidance_input(case):
    with pytest.raises(ModelError, match=r"--model\.guidance_scale 3\.5: .* guidance input"):
        get_family(ModelConfig(path=str(folder_of(case)), guidance_scale=3.5)).load_denoiser(
            torch.float32
        )


@pytest.mark.parametrize("tokens", [256, 300])
def test_comfyuis_shorter_text_gives_what_the_pipeline_makes_of_as_many_tokens(tokens):
    call = run_pipeline(replace(DEV, guidance={**DEV.guidance, "max_sequence_length": tokens}))
    family = family_of(DEV)
    encoders = family.load_encoders("text")
    denoiser = family.load_denoiser(torch.float32).eval()
    with torch.no_grad():
        rows = [
            family.comfy.read(*family_flux1.comfy(encoders, caption, tokens)) for caption in PROMPTS
        ]
        found = family.predict(denoiser, call.noisy, call.timestep.expand(2), collate(family, rows))
    torch.testing.assert_close(found, call.prediction, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("case", "tokens"), [(DEV, 512), (SCHNELL, 256), (CHROMA, 512)], ids=str)
def test_a_caption_has_as_many_tokens_as_the_model_was_trained_with(case, tokens):
    family = family_of(case)
    assert {len(row["prompt_embeds"]) for row in rows_of(case, ["cat " * 600])} == {tokens}
    assert family.count_tokens(["cat"])[1] == tokens - 1
    assert family.preview_options(1.0).get("max_sequence_length", 512) == tokens
    assert case is CHROMA or {len(row["prompt_embeds"]) for row in rows_of(case, ["cat"])} == {
        tokens
    }


def test_dev_and_schnell_do_not_share_captions_though_they_share_encoders(images, tmp_path):
    other = tmp_path / "schnell"
    shutil.copytree(folder_of(DEV), other)
    config = json.loads((other / "transformer" / "config.json").read_text())
    (other / "transformer" / "config.json").write_text(
        json.dumps({**config, "guidance_embeds": False})
    )
    data = data_config(path=str(images), resolution=32, cache_dir=str(tmp_path / "cache"))
    lengths, encoded = [], []
    for folder in (folder_of(DEV), other, folder_of(DEV)):
        built = build_datasets(data, get_family(ModelConfig(path=str(folder))), SINGLE_PROCESS)
        lengths.append(len(built.train.cond(0)["prompt_embeds"]))
        encoded.append((built.encoded_images > 0, built.encoded_captions > 0))
    assert lengths == [512, 256, 512]
    assert encoded == [(True, True), (False, True), (False, False)]


@ALL
def test_texts_of_two_lengths_in_a_batch_are_seen_as_alone(case):
    long, short = rows_of(case)
    short = {**short, "prompt_embeds": short["prompt_embeds"][:2]}
    noisy = noise()
    together = prediction(case, [long, short], noisy)
    alone = torch.cat(
        [prediction(case, [row], noisy[i : i + 1]) for i, row in enumerate((long, short))]
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ALL
def test_gradients_through_padding_are_finite(case, dtype):
    family = family_of(case)
    denoiser = family.load_denoiser(dtype)
    long, short = rows_of(case)
    short = {**short, "prompt_embeds": short["prompt_embeds"][:2]}
    cond = {name: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
            for name, t in collate(family, [long, short]).items()}  # fmt: skip
    found = family.predict(denoiser, noise().to(dtype), torch.tensor([3.0, 997.0]), cond)
    found.float().square().mean().backward()
    gradients = [
        parameter.grad for parameter in denoiser.parameters() if parameter.grad is not None
    ]
    assert len(gradients) > 50
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_chromas_captions_have_one_token_of_padding():
    tokenizer = family_of(CHROMA).load_encoders("text").tokenizer
    lengths = [len(row["prompt_embeds"]) for row in rows_of(CHROMA, [*PROMPTS, "", "cat " * 600])]
    assert lengths == [*(len(tokenizer(caption).input_ids) + 1 for caption in (*PROMPTS, "")), 512]


def test_chroma_is_what_diffusers_unmended_pipeline_makes_of_captions_without_padding():
    """All captions are cut to two tokens: then the mask, which the pipeline wrongly adds, is the same for all."""
    case = replace(CHROMA, repair=None, guidance={**CHROMA.guidance, "max_sequence_length": 2})
    call, family = run_pipeline(case), family_of(CHROMA)
    denoiser = family.load_denoiser(torch.float32).eval()
    pipeline = ChromaPipeline.from_pretrained(folder_of(CHROMA), dtype=torch.float32)
    with torch.no_grad():
        embeds = pipeline.encode_prompt(
            [*PROMPTS], do_classifier_free_guidance=False, max_sequence_length=2
        )[0]
        cond = collate(family, [{"prompt_embeds": embed} for embed in embeds])
        found = family.predict(denoiser, call.noisy, call.timestep.expand(2), cond)
    torch.testing.assert_close(found, call.prediction, rtol=1e-4, atol=1e-5)


def test_chromas_previews_hide_padding():
    pipeline = family_of(CHROMA).pipeline(None)
    mask = pipeline._prepare_attention_mask(1, 3, torch.float32, torch.tensor([[1.0, 0.0]]))
    assert mask.tolist() == [[True, False, True, True, True]]
    assert pipeline._prepare_attention_mask(1, 3, torch.float32) is None


@pytest.mark.parametrize("side", [512, 1024, 1536])
def test_noise_levels_are_shifted_as_the_pipeline_shifts_them(side):
    family = family_of(DEV)
    shape = (1, 16, side // 8, side // 8)
    sigmas = torch.linspace(0.05, 0.95, 7)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        folder_of(DEV), subfolder="scheduler"
    )
    tokens = FluxPipeline._pack_latents(torch.empty(shape), *shape).shape[1]
    scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=calculate_shift(tokens))
    levels = family.process(ObjectiveConfig()).levels(sigmas, family.limits.num_tokens(shape))
    torch.testing.assert_close(levels.timestep, scheduler.timesteps, rtol=1e-5, atol=1e-3)


SPELT = {"BFL": ("", "scale"), "ComfyUI": ("model.diffusion_model.", "weight")}


@pytest.mark.parametrize("spelt", SPELT)
@ALL
def test_single_files_of_the_original_names_are_the_same_model(case, spelt, tmp_path):
    path = str(tmp_path / "model.safetensors")
    save_file(native_tensors(case, *SPELT[spelt]), path)
    family = get_family(ModelConfig(path=path, config=str(folder_of(case))))
    assert family.name == case.family
    wanted = family_of(case).load_denoiser(torch.float32).state_dict()
    found = family.load_denoiser(None)
    assert found.state_dict().keys() == wanted.keys()
    assert all(tensor.equal(wanted[name]) for name, tensor in found.state_dict().items())
    assert all(not buffer.is_meta for buffer in found.buffers())
    assert family.load_denoiser(torch.bfloat16).dtype == torch.bfloat16


def test_files_that_lack_tensors_or_have_another_config_are_errors(tmp_path):
    path, tensors = str(tmp_path / "model.safetensors"), native_tensors(DEV, *SPELT["BFL"])
    cut = {name: tensor for name, tensor in tensors.items() if name != "final_layer.linear.bias"}
    for there, config, message in (
        (cut, DEV, "lacks 1 tensors: final_layer.linear.bias"),
        (tensors, SCHNELL, "has a guidance input, like FLUX.1 dev, but --model.config"),
        (native_tensors(SCHNELL), DEV, "lacks 4 tensors: guidance_in"),
    ):  # fmt: skip
        save_file(there, path)
        with pytest.raises(ModelError, match=message):
            get_family(ModelConfig(path=path, config=str(folder_of(config)))).load_denoiser(None)
