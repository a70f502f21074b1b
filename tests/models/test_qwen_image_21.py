"""Qwen-Image 2.1 beyond the tests of every family: batches, transparency, single files, the processor."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import QwenImage21Pipeline, QwenImage21Transformer2DModel
from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_shift
from helpers.device_reads import device_reads
from helpers.families.qwen_image_21 import CASE, CHANNELS
from helpers.family_cases import (
    collate,
    family_of,
    folder_of,
    native_tensors,
    values_of_file,
)
from helpers.predictions import prediction, rows_of
from safetensors.torch import save_file

from common.errors import ModelError
from models.config import ModelConfig
from models.detect import get_family
from objectives.config import ObjectiveConfig
from training.sampling.draw import over_white

CAPTIONS = ["owl", "a photo of a smiling red cat on the moon", " owl" * 40]


def noise(count: int) -> torch.Tensor:
    """Latents of an image that is not square."""
    return torch.randn(count, CHANNELS, 4, 6, generator=torch.Generator().manual_seed(1))


def test_captions_of_any_length_in_a_batch_are_seen_as_alone():
    rows, noisy = rows_of(CASE, CAPTIONS), noise(len(CAPTIONS))
    assert len({len(row["prompt_embeds"]) for row in rows}) == len(CAPTIONS)
    together = prediction(CASE, rows, noisy)
    alone = [prediction(CASE, [row], noisy[i : i + 1]) for i, row in enumerate(rows)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_diffusers_places_an_image_behind_the_longest_caption_of_the_batch():
    """So its predictions of a batch differ, except that of the longest caption."""
    rows, noisy = rows_of(CASE, CAPTIONS), noise(len(CAPTIONS))
    cond = collate(family_of(CASE), rows)
    transformer = QwenImage21Transformer2DModel.from_pretrained(
        folder_of(CASE), subfolder="transformer"
    )
    height, width = noisy.shape[2:]
    is_image = torch.zeros(cond["prompt_embeds"].shape[:2], dtype=torch.bool)
    slots = is_image.new_ones(len(rows), height * width // 4)
    with torch.no_grad():
        tokens = transformer(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_hidden_states_mask=cond["attention_mask"],
            timestep=torch.full((len(rows),), 0.7),
            img_shapes=[[(1, height, width)]] * len(rows),
            img_mask=torch.cat([is_image, slots], 1),
            return_dict=False,
        )[0]
    by_diffusers = tokens[:, -height * width :].transpose(1, 2).reshape(noisy.shape)
    found = prediction(CASE, rows, noisy)
    differences = (by_diffusers - found).abs().amax((1, 2, 3))
    assert differences[2] < 1e-5
    assert differences[:2].min() > 1e-4


@pytest.mark.parametrize("captions", [CAPTIONS[:1] * 2, CAPTIONS[:2]], ids=["alike", "different"])
def test_no_value_is_read_and_gradients_are_finite(captions):
    family = family_of(CASE)
    denoiser = family.load_denoiser(torch.bfloat16)
    cond = collate(family, rows_of(CASE, captions))
    cond["prompt_embeds"] = cond["prompt_embeds"].bfloat16()
    with device_reads() as reads:
        found = family.predict(denoiser, noise(2).bfloat16(), torch.tensor([3.0, 997.0]), cond)
        found.float().square().mean().backward()
    assert not reads.reads
    gradients = [p.grad for p in denoiser.parameters() if p.grad is not None]
    assert len(gradients) == len([*denoiser.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_images_are_opaque():
    family = family_of(CASE)
    encoders = family.load_encoders("media")
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, _ = family.encode_media(encoders, pixels)
        opaque = torch.cat([pixels, torch.ones(1, 1, 32, 32)], 1).unsqueeze(2)
        expected = encoders.vae.encode(opaque).latent_dist.mean
        decoded = encoders.vae.decode(expected).sample
        assert torch.equal(mean, expected.squeeze(2))
        assert torch.equal(family.decode_media(encoders, mean), decoded[:, :3].squeeze(2))


def test_samples_are_drawn_on_white():
    image = np.array([[[[0.2, 0.4, 0.6, 1.0], [0.2, 0.4, 0.6, 0.0], [0.0, 0.5, 1.0, 0.5]]]])
    expected = [[[[0.2, 0.4, 0.6], [1.0, 1.0, 1.0], [0.5, 0.75, 1.0]]]]
    np.testing.assert_allclose(over_white(image), expected)
    assert over_white(image[..., :3]).shape == (1, 1, 3, 3)


@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_the_shift_is_the_pipelines(side):
    family = family_of(CASE)
    num_tokens = family.limits.num_tokens((1, CHANNELS, side // 16, side // 16))
    assert num_tokens == (side // 16) ** 2
    expected = math.exp(calculate_shift(num_tokens, 256, 8192, 0.5, 0.9))
    assert family.process(ObjectiveConfig()).shift(num_tokens) == pytest.approx(expected)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_of_comfyuis_names_is_the_same_model(prefix, tmp_path):
    """It has two layers of the MLP as one weight. diffusers' own converter reads the same."""
    path = str(tmp_path / "model.safetensors")
    tensors = native_tensors(CASE, prefix)
    assert f"{prefix}transformer_blocks.0.img_mlp.gate_up.weight" in tensors
    save_file(tensors, path)
    values = values_of_file(CASE, path)
    by_diffusers = QwenImage21Transformer2DModel.from_single_file(
        path, config=str(folder_of(CASE)), subfolder="transformer"
    ).state_dict()
    assert values.keys() == by_diffusers.keys()
    for name, tensor in values.items():
        assert tensor.equal(by_diffusers[name]), name


def test_a_stored_pipeline_names_classes_that_diffusers_knows(tmp_path):
    family = family_of(CASE)
    family.pipeline(family.load_denoiser(torch.float32)).save_pretrained(tmp_path)
    stored, original = (QwenImage21Pipeline.load_config(p) for p in (tmp_path, folder_of(CASE)))
    assert stored["processor"] == ["transformers", "Qwen3VLProcessor"]
    for name in family.all_components():
        assert stored[name] == original[name]
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "QwenImage21Transformer2DModel"


def test_the_system_message_is_cut_off_whether_the_processor_is_there_or_not():
    family = family_of(CASE)
    encoders = family.load_encoders("text")
    before = encoders.prompt_template_t2i.partition("<|im_start|>user")[0]
    tokens = encoders.processor.tokenizer(before).input_ids
    assert encoders._drop_idx == len(tokens) > 5
    assert family.load_encoders("media")._drop_idx == 0  # it encodes no prompt


def test_an_incomplete_tokenizer_is_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folder_of(CASE), folder)
    (folder / "processor" / "tokenizer.json").unlink()
    with pytest.raises(ModelError):
        get_family(ModelConfig(path=str(folder))).load_encoders("text")


def test_guidance_needs_a_negative_prompt():
    family = family_of(CASE)
    assert "negative_prompt" not in family.preview_options(1.0)
    assert family.preview_options(4.0)["negative_prompt"] == " "
