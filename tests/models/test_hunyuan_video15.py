"""HunyuanVideo 1.5 beyond the tests of every family: glyphs, guidance, previews, and names in files."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideo15Pipeline
from helpers import family_cases
from helpers.families import hunyuan_video15
from helpers.family_cases import collate, family_of, folder_of, native_tensors
from helpers.predictions import rows_of
from safetensors.torch import save_file

from common.errors import ModelError
from models.config import ModelConfig
from models.detect import get_family
from models.families.hunyuan_video15_names import released_key
from training.sampling.draw import draw_sample, pipeline_options
from training.sampling.prompts import SamplePrompt

CASE = hunyuan_video15.CASE
QUOTED = ['a sign that says "cat"', "an owl", 'a \u201cred\u201d house, and "a longer text" on it']
GLYPHS = "glyph_embeds"
PROMPT = SamplePrompt(
    'a "red" cat', width=32, height=32, seed=1, guidance_scale=3.0, num_inference_steps=2
)


def predicted(rows: list[dict[str, Any]], noisy: torch.Tensor) -> torch.Tensor:
    """At timestep 700."""
    family = family_of(CASE)
    denoiser = family.load_denoiser(torch.float32).eval()
    timestep = torch.full((len(noisy),), 700.0)
    with torch.no_grad():
        return family.predict(denoiser, noisy, timestep, collate(family, rows))


def test_glyphs_are_seen_as_in_the_pipeline(monkeypatch):
    monkeypatch.setattr(family_cases, "PROMPTS", QUOTED)
    call, family, rows = family_cases.run_pipeline(CASE), family_of(CASE), rows_of(CASE, QUOTED)
    # the bytes of: Text "cat". And one token that ends it
    assert [len(row[GLYPHS]) for row in rows] == [13, 0, 35]
    denoiser = family.load_denoiser(torch.float32).eval()
    timestep = call.timestep.expand(len(QUOTED)).float()
    with torch.no_grad():
        found = family.predict(denoiser, call.noisy, timestep, collate(family, rows))
        none = [{**row, GLYPHS: row[GLYPHS][:0]} for row in rows]
        without = family.predict(denoiser, call.noisy, timestep, collate(family, none))
    atol = 1e-5 * float(call.prediction.abs().max())
    torch.testing.assert_close(found, call.prediction, rtol=1e-5, atol=atol)
    torch.testing.assert_close(without[1], found[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(without[0], found[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("captions", "has_mask"),
    [(["owl"], False), (QUOTED[:1], False), (["owl"] * 2, False), (["owl", QUOTED[0]], True)],
)
def test_only_padding_is_masked(captions, has_mask, monkeypatch):
    rows = rows_of(CASE, captions)
    attention, masks = torch.nn.functional.scaled_dot_product_attention, []

    def record_mask(*tensors: Any, attn_mask: Any = None, **options: Any) -> Any:
        masks.append(attn_mask is not None)
        return attention(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record_mask)
    predicted(rows, torch.randn(len(rows), 4, 1, 2, 2))
    assert set(masks) == {has_mask}


def test_glyphs_come_back_from_comfyuis_layout():
    family = family_of(CASE)
    for row in rows_of(CASE, QUOTED):
        cond, extras = family.comfy.write(row)
        assert ("conditioning_byt5small" in extras) == (len(row[GLYPHS]) > 0)
        back = family.comfy.read(cond, extras)
        assert all(back[name].equal(row[name]) for name in row)


def test_captions_are_cut_where_the_count_says():
    family = family_of(CASE)
    limit = family.count_tokens([""]).limit
    assert limit == 995
    captions = [" owl" * count for count in (limit - 1, limit, limit + 20)]
    assert family.count_tokens(captions).counts == [limit - 1, limit, limit + 20]
    assert [len(row["prompt_embeds"]) for row in rows_of(CASE, captions)] == [999, 1000, 1000]


def test_previews_are_those_of_diffusers_with_the_guidance_of_the_prompt():
    family = family_of(CASE)
    pipeline = family.pipeline(family.load_denoiser(torch.float32).eval())
    drawn = draw_sample(pipeline, PROMPT, pipeline_options(family, pipeline, PROMPT))
    own = HunyuanVideo15Pipeline.from_pretrained(folder_of(CASE))
    own.set_progress_bar_config(disable=True)
    frames = {}
    for scale in (1.0, 3.0):
        own.guider = own.guider.new(guidance_scale=scale)
        noise = torch.Generator().manual_seed(1)
        frames[scale] = own(
            PROMPT.text,
            height=32,
            width=32,
            num_frames=1,
            num_inference_steps=2,
            generator=noise,
        ).frames[0]
    np.testing.assert_allclose(drawn, frames[3.0], atol=1e-4)
    assert not np.allclose(drawn, frames[1.0], atol=1e-3)


def test_a_file_that_comfyui_renames_is_the_same_model(tmp_path):
    path = str(tmp_path / "model.safetensors")
    tensors = {released_key(name): tensor for name, tensor in native_tensors(CASE).items()}
    names = {
        "double_blocks.0.img_attn_qkv.weight",
        "double_blocks.0.txt_attn_k_norm.weight",
        "double_blocks.1.img_mod.linear.bias",
        "double_blocks.1.txt_mlp.fc2.weight",
        "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight",
        "txt_in.individual_token_refiner.blocks.0.mlp.fc1.weight",
        "txt_in.c_embedder.linear_1.weight",
        "txt_in.t_embedder.mlp.2.weight",
        "time_in.mlp.0.weight",
        "vision_in.proj.3.weight",
        "byt5_in.fc3.weight",
    }
    assert names <= tensors.keys()
    save_file(tensors, path)
    family = get_family(ModelConfig(path=path, config=str(folder_of(CASE))))
    assert family.name == "hunyuan_video15"
    expected = family_of(CASE).load_denoiser(torch.float32).state_dict()
    found = family.load_denoiser(None).state_dict()
    assert found.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())


def test_other_models_with_these_names_are_refused(tmp_path):
    """The model of HunyuanVideo 1.5 that makes videos larger is given more channels."""
    path = str(tmp_path / "model.safetensors")
    tensors = native_tensors(CASE)
    tensors["img_in.proj.weight"] = torch.zeros(32, 14, 1, 1, 1)
    save_file(tensors, path)
    with pytest.raises(ModelError, match="is not a model of a supported family"):
        get_family(ModelConfig(path=path))


def test_a_file_as_vae_is_refused(tmp_path):
    path = tmp_path / "vae.safetensors"
    save_file({"encoder.conv_in.conv.weight": torch.zeros(1)}, str(path))
    family = get_family(ModelConfig(path=str(folder_of(CASE)), vae=str(path)))
    with pytest.raises(ModelError, match="diffusers reads no files of AutoencoderKLHunyuanVideo15"):
        family.load_encoders("media")
