"""Anima beyond the tests of every family: its conditioner, cut captions, single files, the missing torchvision."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AnimaTextConditioner
from helpers.families.anima import CASE
from helpers.family_cases import (
    collate,
    diffusers_pipeline,
    family_of,
    folder_of,
    native_tensors,
    values_of_file,
)
from helpers.predictions import noise, prediction, rows_of
from helpers.quantized_files import write_gguf, write_scaled
from safetensors.torch import save_file
from torch import Tensor

from adapter_files.keys import guess_model
from common.errors import ModelError
from models.config import ModelConfig
from models.detect import get_family
from models.empty_components import empty_encoders
from models.released import configuration_folder, released_models
from objectives.config import ObjectiveConfig
from training.memory.encoding_trace import takes_tokens

CAPTIONS = ["owl", "a photo of a smiling red cat on the moon", ""]


def test_captions_of_any_length_in_a_batch_are_seen_as_alone():
    rows = rows_of(CASE, CAPTIONS)
    assert len({len(row["prompt_embeds"]) for row in rows}) == len(CAPTIONS)
    noisy = noise(len(rows))
    together = prediction(CASE, rows, noisy)
    alone = [
        prediction(CASE, rows_of(CASE, [caption]), noisy[i : i + 1])
        for i, caption in enumerate(CAPTIONS)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert together.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_of_the_tokenizers_does_not_count(side):
    family = family_of(CASE)
    encoders = family.load_encoders("text")
    encoders.tokenizer.padding_side = encoders.t5_tokenizer.padding_side = side
    with torch.no_grad():
        rows = family.encode_prompt(encoders, CAPTIONS)
    for caption, row in zip(CAPTIONS, rows, strict=True):
        (alone,) = rows_of(CASE, [caption])
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


def test_what_is_stored_is_the_conditioning_of_the_pipeline_without_zeros():
    pipeline = diffusers_pipeline(CASE)
    family = family_of(CASE)
    rows = rows_of(CASE, CAPTIONS)
    for caption, row in zip(CAPTIONS, rows, strict=True):
        state = pipeline(
            prompt=caption, height=32, width=32, num_inference_steps=1, output_type="np"
        )
        expected = state.get("prompt_embeds")
        assert expected.shape == (1, 512, 16)
        (padded,) = collate(family, [row])["prompt_embeds"]
        torch.testing.assert_close(padded, expected[0], rtol=1e-4, atol=1e-5)


def test_captions_are_cut_where_the_count_says():
    family = family_of(CASE)
    limit = family.count_tokens([""]).limit
    assert limit == 511
    captions = [" owl" * count for count in (limit - 1, limit, limit + 1)]
    assert family.count_tokens(captions).counts == [limit - 1, limit, limit + 1]
    less, fits, over = (row["prompt_embeds"] for row in rows_of(CASE, captions))
    assert [len(less), len(fits), len(over)] == [511, 512, 512]
    torch.testing.assert_close(fits, over)


def test_noise_levels_are_shifted_by_three_for_all_sizes():
    shift = family_of(CASE).process(ObjectiveConfig()).shift
    assert [shift(256), shift(4096)] == [3.0, 3.0]


def other_conditioner(prefix: str) -> dict[str, Tensor]:
    """The tensors of a file whose conditioner has other values than the folder's."""
    tensors = native_tensors(CASE, prefix)
    return {name: t + ("llm_adapter" in name) for name, t in tensors.items()}


@pytest.mark.parametrize("prefix", ["net.", "model.diffusion_model.", ""])
def test_a_file_of_the_original_names_is_the_same_model(prefix, tmp_path):
    path = str(tmp_path / "model.safetensors")
    save_file(other_conditioner(prefix), path)
    values_of_file(CASE, path)
    family = get_family(ModelConfig(path=path, config=str(folder_of(CASE))))
    conditioner = family.load_encoders("text").text_conditioner
    assert isinstance(conditioner, AnimaTextConditioner)
    assert not conditioner.training
    check_conditioner(conditioner, other_conditioner(""))
    assert Path(path) in family.identity_files("text")
    assert Path(path) not in family_of(CASE).identity_files("text")


def check_conditioner(conditioner: Any, expected: dict[str, Tensor]) -> None:
    for name, tensor in conditioner.state_dict().items():
        assert tensor.equal(expected[f"llm_adapter.{name}"]), name


@pytest.mark.parametrize("suffix", [".gguf", ".safetensors"])
def test_the_conditioner_of_a_quantized_file_has_its_values(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    tensors = other_conditioner("")
    if suffix == ".gguf":
        expected = write_gguf(path, tensors, "Q8_0")
    else:
        expected = write_scaled(path, tensors)
    family = get_family(ModelConfig(path=str(path), config=str(folder_of(CASE))))
    check_conditioner(family.load_encoders("text").text_conditioner, expected)


def test_a_file_without_the_conditioner_is_another_model(tmp_path):
    path = str(tmp_path / "model.safetensors")
    tensors = native_tensors(CASE, "net.")
    save_file({name: t for name, t in tensors.items() if "llm_adapter" not in name}, path)
    with pytest.raises(ModelError, match="not a model of a supported family"):
        get_family(ModelConfig(path=path, config=str(folder_of(CASE))))


def test_a_conditioner_that_is_not_complete_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = native_tensors(CASE, "net.")
    tensors["net.llm_adapter.embed.weight"] = torch.zeros(4, 16)
    save_file(tensors, path)
    family = get_family(ModelConfig(path=str(path), config=str(folder_of(CASE))))
    with pytest.raises(ModelError, match="could not be loaded as anima"):
        family.load_encoders("text")


def test_comfyuis_conditioning_before_the_conditioner_is_refused():
    family = family_of(CASE)
    cond, extras = family.comfy.write(rows_of(CASE, CAPTIONS[:1])[0])
    assert family.comfy.read(cond, extras)["prompt_embeds"].equal(cond[0])
    with pytest.raises(ModelError, match="before the model's conditioner"):
        family.comfy.read(cond, {**extras, "t5xxl_ids": torch.zeros(4)})


def test_the_mask_is_scaled_as_torchvision_does_it():
    """Nearest values, to the size of the latents."""
    from diffusers.models.transformers import transformer_cosmos

    transforms = transformer_cosmos.transforms
    mask = torch.arange(64.0).view(1, 1, 8, 8)
    small = transforms.functional.resize(
        mask, [4, 4], interpolation=transforms.InterpolationMode.NEAREST
    )
    assert small.equal(mask[..., ::2, ::2])


def test_the_released_model_has_its_size():
    """2.0 billion parameters of the transformer, 0.6 of Qwen3, 0.1 of the conditioner."""
    with configuration_folder(released_models()["Anima"]) as folder:
        family = get_family(ModelConfig(path=str(folder)))
        sizes = [sum(map(torch.numel, family.empty_denoiser().parameters()))]
        with torch.device("meta"):
            encoders = empty_encoders(family, "text")
        layout = family.cond_layout()["prompt_embeds"]
    parts = (encoders.text_encoder, encoders.text_conditioner)
    assert [takes_tokens(part) for part in parts] == [True, False], "memory is planned so"
    for encoder in parts:
        sizes.append(sum(map(torch.numel, encoder.parameters())))
        assert next(encoder.parameters()).dtype == torch.float32
    assert [round(size / 1e8) for size in sizes] == [20, 6, 1]
    assert (layout.shape, math.prod(layout.shape) * 4) == ((512, 1024), 2**21)


def test_files_are_told_from_those_of_wan():
    """Both have blocks with self_attn and cross_attn."""
    assert guess_model(native_tensors(CASE, "diffusion_model.")) == "Anima"
    assert guess_model(["diffusion_model.blocks.0.self_attn.q.lora_A.weight"]) == "Wan"
