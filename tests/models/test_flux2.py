"""What is FLUX.2's own: latents with channels of 2 x 2 cells, padded captions, guidance, the shift, single files."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers.family_cases import PROMPTS, SIDE, cases, collate, family_of, folder_of
from safetensors import safe_open
from safetensors.torch import save_file

from common.errors import ModelError
from models.config import ModelConfig
from models.detect import get_family
from objectives.config import ObjectiveConfig

BOTH = {case.family: case for case in cases() if case.family.startswith("flux2")}
both = pytest.mark.parametrize("case", BOTH.values(), ids=str)
TOKENS = 512
COMFY_MU = 2.02  # comfy/supported_models.py, Flux2: sampling_settings shift


@both
def test_only_what_the_conditioning_needs_of_the_text_encoder_is_kept(case):
    """Of Mistral Small, 9 of 40 layers, the head and the vision tower are left out."""
    family = family_of(case)
    pipeline = family.pipeline(None)
    whole = pipeline.text_encoder
    encoders = family.load_encoders("text")
    kept = encoders.text_encoder
    language_model = getattr(kept.model, "language_model", kept.model)
    num_layers = family.text_layers[-1] + 1
    assert (
        len(language_model.layers) == num_layers < whole.config.get_text_config().num_hidden_layers
    )
    with torch.no_grad():
        embeds, expected = encoders.encode_prompt(PROMPTS)[0], pipeline.encode_prompt(PROMPTS)[0]
    assert torch.equal(embeds, expected)
    assert isinstance(kept.lm_head, torch.nn.Identity)
    assert not any("vision_tower" in name for name, _ in kept.named_parameters())
    assert sum(p.numel() for p in whole.parameters()) > sum(p.numel() for p in kept.parameters())


@pytest.fixture(scope="module")
def encoded() -> dict:
    """Family -> (the rows of PROMPTS, the pipeline's embeddings of them, the pipeline)."""
    found = {}
    for name, case in BOTH.items():
        family = family_of(case)
        pipeline = family.load_encoders("text")
        with torch.no_grad():
            found[name] = (
                family.encode_prompt(pipeline, PROMPTS),
                pipeline.encode_prompt(PROMPTS)[0],
                pipeline,
            )
    return found


def predicted(case, cond: dict, **options) -> torch.Tensor:
    """The prediction for the same noise and conditioning of one caption."""
    family = get_family(ModelConfig(path=str(folder_of(case)), **options))
    noisy = torch.randn(1, 128, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        denoiser = family.load_denoiser(torch.float32).eval()
        return family.predict(denoiser, noisy, torch.tensor([700.0]), collate(family, [cond]))


@both
def test_raw_latents_are_comfyuis(case):
    """comfy/ldm/models/autoencoder.py: b c (i pi) (j pj) -> b (c pi pj) i j, then batch norm by what the VAE has."""
    family, pixels = family_of(case), torch.rand(2, 3, 2 * SIDE, SIDE) * 2 - 1
    pipeline = family.load_encoders("media")
    vae = pipeline.vae
    with torch.no_grad():
        mean, deviation = family.encode_media(pipeline, pixels)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape)
        of_vae = [posterior.mean, posterior.mean + posterior.std * noise]
        cells = [
            z.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
            for z in of_vae
        ]
        wanted = [F.batch_norm(z, vae.bn.running_mean, vae.bn.running_var, eps=1e-4) for z in cells]
        spread = (
            noise.unflatten(3, (-1, 2))
            .unflatten(2, (-1, 2))
            .permute(0, 1, 3, 5, 2, 4)
            .flatten(1, 3)
        )
        torch.testing.assert_close(mean, wanted[0])
        torch.testing.assert_close(mean + deviation * spread, wanted[1])
        decoded = family.decode_media(pipeline, mean)
        torch.testing.assert_close(
            decoded, vae.decode(posterior.mean).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5
        )


@both
def test_what_is_stored_of_a_caption_gives_the_pipelines_tokens(case, encoded):
    rows, embeds, _ = encoded[case.family]
    for row, wanted in zip(rows, embeds, strict=True):
        tokens, pad = row["prompt_embeds"], row["pad_embeds"]
        assert torch.cat([pad.expand(TOKENS - len(tokens), -1), tokens]).equal(wanted)


def test_mistrals_padding_is_stored_once_and_qwens_has_no_two_tokens_alike(encoded):
    rows, _, pipeline = encoded["flux2"]
    for row, prompt in zip(rows, PROMPTS, strict=True):
        text = f"<s>[SYSTEM_PROMPT]{pipeline.system_message}[/SYSTEM_PROMPT][INST]{prompt}[/INST]"
        ids = pipeline.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        assert len(row["prompt_embeds"]) == ids.shape[1] < TOKENS
        with torch.no_grad():  # ComfyUI encodes without padding
            states = pipeline.text_encoder(input_ids=ids, output_hidden_states=True).hidden_states
        alone = torch.cat([states[layer] for layer in (10, 20, 30)], -1)[0]
        torch.testing.assert_close(row["prompt_embeds"], alone, rtol=1e-4, atol=1e-5)
        assert row["pad_embeds"].any()
    assert all(
        len(row["prompt_embeds"]) == TOKENS and not row["pad_embeds"].any()
        for row in encoded["flux2_klein"][0]
    )


@pytest.mark.parametrize("tokens", [1, 40, 511, 512])
@both
def test_comfyuis_short_conditioning_is_padded_with_zeros_on_the_left(case, tokens):
    """comfy/model_base.py, Flux2.extra_conds: F.pad(cross_attn, (0, 0, 512 - tokens, 0))."""
    family = family_of(case)
    cond = torch.randn(1, tokens, family.cond_width, generator=torch.Generator().manual_seed(1))
    whole = F.pad(cond, (0, 0, TOKENS - tokens, 0))
    short = predicted(case, family.comfy.read(cond, {"pooled_output": None}))
    assert short.equal(predicted(case, family.comfy.read(whole, {"pooled_output": None})))
    direct = {"prompt_embeds": whole[0], "pad_embeds": torch.zeros(family.cond_width)}
    torch.testing.assert_close(short, predicted(case, direct))
    assert not torch.allclose(
        short, predicted(case, {**direct, "prompt_embeds": whole[0].flip(0)}), atol=1e-4
    )


@both
def test_conditioning_of_another_width_or_of_too_many_tokens_is_refused(case):
    family = family_of(case)
    with pytest.raises(ModelError, match="width 4096"):
        family.comfy.read(torch.zeros(1, 5, 4096), {})
    with pytest.raises(ModelError, match="600 tokens; this model takes 512"):
        family.comfy.read(torch.randn(1, 600, family.cond_width), {})


def test_dev_alone_has_a_guidance_input(encoded):
    case, cond = BOTH["flux2"], encoded["flux2"][0][0]
    default = predicted(case, cond)
    assert default.equal(predicted(case, cond, guidance_scale=1.0))
    assert not torch.allclose(default, predicted(case, cond, guidance_scale=4.0), atol=1e-4)
    with pytest.raises(ModelError, match=r"--model\.guidance_scale 4"):
        get_family(ModelConfig(path=str(folder_of(BOTH["flux2_klein"])), guidance_scale=4.0))


@pytest.mark.parametrize("tokens", [256, 4096, 6000])
@both
def test_the_shift_is_the_pipelines_at_its_default_number_of_steps(case, tokens):
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    family = family_of(case)
    scheduler = family.pipeline(None).scheduler
    plain = torch.linspace(1, 1 / 50, 50)[1:]
    scheduler.set_timesteps(sigmas=[1.0, *plain.tolist()], mu=compute_empirical_mu(tokens, 50))
    levels = family.process(ObjectiveConfig()).levels(plain, tokens)
    torch.testing.assert_close(levels.sigma, scheduler.sigmas[1:-1])
    torch.testing.assert_close(levels.timestep, scheduler.timesteps[1:])
    torch.testing.assert_close(
        family.process(ObjectiveConfig(shift=1.0)).levels(plain, tokens).sigma, plain
    )


def test_at_a_megapixel_the_shift_is_comfyuis():
    family = family_of(BOTH["flux2"])
    half = torch.tensor([0.5])
    sigma = (
        family.process(ObjectiveConfig())
        .levels(half, family.limits.num_tokens((1, 128, 64, 64)))
        .sigma
    )
    a = math.exp(COMFY_MU)
    torch.testing.assert_close(sigma, torch.tensor([a / (1 + a)]), rtol=0, atol=1e-3)


def test_captions_need_no_processor_for_images(tmp_path):
    """FLUX.2 dev's folder names PixtralProcessor, which needs torchvision."""
    case = BOTH["flux2"]
    folder = shutil.copytree(folder_of(case), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    family = get_family(ModelConfig(path=str(folder)))
    plain = family_of(case)
    assert family.count_tokens(PROMPTS) == plain.count_tokens(PROMPTS)
    with torch.no_grad():
        rows = family.encode_prompt(family.load_encoders("text"), PROMPTS[:1])
        wanted = plain.encode_prompt(plain.load_encoders("text"), PROMPTS[:1])
    assert rows[0]["prompt_embeds"].equal(wanted[0]["prompt_embeds"])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("norm", ["weight", "scale"])
@both
def test_a_single_file_with_native_names_holds_the_same_weights(case, prefix, norm, tmp_path):
    family, file = family_of(case), tmp_path / "model.safetensors"
    wanted = family.load_denoiser(torch.float32)
    native, parts = family.layer_names.original(wanted), {}
    for name, tensor in wanted.state_dict().items():
        place = native[name.removesuffix(".weight")]
        stored = torch.cat(tensor.chunk(2)[::-1]) if place.swapped_halves else tensor
        kind = norm if place.name.endswith("_norm") else "weight"
        parts.setdefault(f"{prefix}{place.name}.{kind}", []).append(
            (place.row_slice or (0, 0), stored)
        )
    # by the first row only: no two parts begin at the same
    tensors = {
        key: torch.cat([t for _, t in sorted(of, key=lambda part: part[0])])
        for key, of in parts.items()
    }
    save_file(tensors, file)
    alone = get_family(ModelConfig(path=str(file), config=str(folder_of(case))))
    assert alone.name == case.family
    found = alone.load_denoiser(torch.float32).state_dict()
    assert found.keys() == wanted.state_dict().keys()
    assert all(found[name].equal(tensor) for name, tensor in wanted.state_dict().items())
    with safe_open(file, framework="pt") as there:
        assert set(alone.stored_keys(wanted).values()) == set(there.keys())
