"""What is LTX-2's own: audio that is left out, connectors behind the text encoder, statistics that are weights."""

import math

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2.pipeline_ltx2 import calculate_shift
from helpers.families import ltx2
from helpers.family_cases import PROMPTS, SIDE, family_of, folder_of, native_tensors
from helpers.predictions import prediction, rows_of
from PIL import Image
from safetensors.torch import save_file

from common.errors import ModelError
from models.config import ModelConfig
from models.detect import get_family
from models.empty_components import empty_encoders
from models.released import configuration_folder, released_models
from objectives.config import ObjectiveConfig
from training.output_config import SampleConfig
from training.sampling.draw import draw_sample, pipeline_options
from training.sampling.encoded_prompts import encode_prompts, replayed
from training.sampling.prompts import SamplePrompt

LTX2, LTX23 = ltx2.CASES
CPU = torch.device("cpu")
each_version = pytest.mark.parametrize("case", ltx2.CASES, ids=str)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@each_version
def test_the_prediction_is_the_denoisers_whatever_the_audio_is(case):
    family, rows = family_of(case), rows_of(case)
    noisy = random(2, ltx2.CHANNELS, 2, 3, 4)
    denoiser = family.load_denoiser(torch.float32).eval()
    timestep = torch.full((2,), 700.0)
    with torch.no_grad():
        expected = denoiser(
            hidden_states=ltx2.LTX2Pipeline._pack_latents(noisy), timestep=timestep, sigma=timestep,
            audio_hidden_states=random(2, 9, 8),
            encoder_hidden_states=torch.stack([row["prompt_embeds"] for row in rows]),
            audio_encoder_hidden_states=random(2, 1024, family.text_widths[1]),
            encoder_attention_mask=torch.ones(2, 1024), audio_encoder_attention_mask=torch.ones(2, 1024),
            num_frames=2, height=3, width=4, fps=24.0, audio_num_frames=9, isolate_modalities=True,
            use_cross_timestep=True,
        ).sample  # fmt: skip
    expected = ltx2.LTX2Pipeline._unpack_latents(expected, 2, 3, 4)
    found = prediction(case, rows, noisy)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [LTX2, pytest.param(LTX23, marks=pytest.mark.long)], ids=str)
def test_prompts_that_are_encoded_before_draw_what_diffusers_pipeline_draws(case):
    """The pipeline is given the states of all layers, which its own connectors read while it draws."""
    family = family_of(case)
    config = SampleConfig(num_inference_steps=2, guidance_scale=3.0)
    prompt = SamplePrompt("a red fox in the snow", negative="sad").completed(0, SIDE, config)
    (encoded,) = encode_prompts(family, ModelConfig(), [prompt], CPU)
    assert encoded[0][0].shape == (1, 1024, sum(family.text_widths))
    denoiser = family.load_denoiser(torch.float32)
    untouched = family.pipeline(denoiser)
    options = pipeline_options(family, untouched, prompt)
    expected = draw_sample(untouched, prompt, options)
    pipeline = family.pipeline(denoiser, with_text_encoders=False)
    with replayed(pipeline, encoded, CPU):
        drawn = draw_sample(pipeline, prompt, options)
    assert drawn.shape == (1, SIDE, SIDE, 3)
    assert expected.std() > 1e-2
    torch.testing.assert_close(torch.tensor(drawn), torch.tensor(expected), rtol=0, atol=1e-5)


def test_captions_are_cut_where_the_count_says():
    family = family_of(LTX2)
    limit = family.count_tokens([""]).limit
    captions = ["a" + " owl" * (count - 1) for count in (limit - 1, limit, limit + 1)]
    assert family.count_tokens(captions).counts == [limit - 1, limit, limit + 1]
    less, fits, over = (row["prompt_embeds"] for row in rows_of(LTX2, captions))
    assert less.shape == fits.shape == (1024, ltx2.WIDTH)
    assert torch.equal(fits, over)
    assert not torch.equal(less, fits)


@pytest.mark.parametrize("num_tokens", [400, 1024, 6144])
def test_the_shift_is_the_pipelines(num_tokens):
    expected = math.exp(calculate_shift(num_tokens, 1024, 4096, 0.95, 2.05))
    assert family_of(LTX2).process(ObjectiveConfig()).shift(num_tokens) == pytest.approx(expected)


def test_videos_and_images_are_trained_on_together(videos, options, run_here, capsys):
    Image.new("RGB", (SIDE, SIDE), "red").save(videos / "image.png")
    (videos / "image.txt").write_text("red")
    mine = [option for option in options if not option.startswith(("--model.path", "--data.path"))]
    given = [
        *mine, f"--model.path={folder_of(LTX23)}", f"--data.path={videos}", f"--data.resolution={SIDE}",
        "--data.frames=9", "--steps=3", "--batch_size=1", "--adapter.targets=attention-mlp",
    ]  # fmt: skip
    assert run_here(given) == 0, capsys.readouterr().err
    assert "32x32 of 2 latent frames: 2, 32x32: 1" in capsys.readouterr().out


@pytest.mark.parametrize(("case", "prefix"), [(LTX2, "model.diffusion_model."), (LTX23, "")])
def test_a_file_of_the_original_names_is_the_same_model(case, prefix, tmp_path):
    """diffusers' own converter, which knows LTX-2 alone, reads the same."""
    path = str(tmp_path / "model.safetensors")
    expected = family_of(case).load_denoiser(torch.float32).state_dict()
    connectors = {f"{prefix}video_embeddings_connector.learnable_registers": random(128, 8)}
    save_file({**native_tensors(case, prefix), **connectors}, path)
    family = get_family(ModelConfig(path=path, config=str(folder_of(case))))
    assert family.name == "ltx2"
    assert family.find_source() == (
        "Lightricks/LTX-2" if case is LTX2 else "diffusers/LTX-2.3-Diffusers"
    )
    found = [family.load_denoiser(None).state_dict()]
    if case is LTX2:
        by_diffusers = LTX2VideoTransformer3DModel.from_single_file(
            path, config=str(folder_of(case)), subfolder="transformer"
        )
        found.append(by_diffusers.state_dict())
    for values in found:
        assert values.keys() == expected.keys()
        assert all(tensor.equal(expected[name]) for name, tensor in values.items())


def test_comfyui_has_the_tokens_of_the_audio_behind_those_of_the_video():
    family, (row, _) = family_of(LTX23), rows_of(LTX23)
    cond, _ = family.comfy.write(row)
    assert cond.shape == (1, 1024, ltx2.VIDEO_WIDTH + ltx2.AUDIO_WIDTH)
    assert not cond[..., ltx2.VIDEO_WIDTH :].any()
    cond[..., ltx2.VIDEO_WIDTH :] = 1
    assert family.comfy.read(cond, {})["prompt_embeds"].equal(row["prompt_embeds"])


@pytest.mark.parametrize(("name", "width"), [("LTX-2", 3840), ("LTX-2.3", 4096)])
def test_released_models_encode_by_gemma_and_connectors(name, width):
    """11.8 of 12.2 billion parameters of Gemma are left, without the vision tower and the head."""
    with configuration_folder(released_models()[name]) as folder:
        family = get_family(ModelConfig(path=str(folder)))
        layout = family.cond_layout()["prompt_embeds"]
        with torch.device("meta"):
            encoder = empty_encoders(family, "text").text_encoder
        assert family.comfy.width in family.comfy_widths
    assert (layout.shape, layout.dtype) == ((1024, width), torch.bfloat16)
    counts = [sum(p.numel() for p in part.parameters()) for part in encoder.children()]
    assert [round(count / 1e8) for count in counts] == [118, 14 if name == "LTX-2" else 32]
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}


def test_ltx_25_is_refused():
    family = family_of(LTX23)
    with pytest.raises(ModelError, match=r"is LTX-2\.5, which is not supported"):
        family.check_denoiser({**family.denoiser_config, "ff_bias": False})


def test_captions_of_a_batch_do_not_see_each_other():
    """The padding of a caption is on its left."""
    together = rows_of(LTX2, PROMPTS)
    for prompt, row in zip(PROMPTS, together, strict=True):
        (alone,) = rows_of(LTX2, [prompt])
        torch.testing.assert_close(row["prompt_embeds"], alone["prompt_embeds"])
