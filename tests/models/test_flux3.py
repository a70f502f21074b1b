"""FLUX.3 beyond the tests of every family: windows of captions, the flow map, names in files."""

import json
import shutil

import pytest
import torch
from diffusers import Flux3Transformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_flux3_lora_to_diffusers
from diffusers.modular_pipelines.flux3.before_denoise import (
    Flux3PrepareLatentsStep,
    Flux3SetTimestepsStep,
)
from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep
from helpers.families.flux3 import CASE
from helpers.family_cases import family_of, folder_of, native_tensors, values_of_file
from helpers.predictions import prediction, rows_of
from safetensors.torch import save_file

from adapter_files import files
from adapter_files.spellings import layer_spellings
from common.errors import ModelError
from lora_algos.attach import attach
from lora_algos.config import AdapterConfig
from lora_algos.plan import AdapterPlan
from models.config import MODULAR_INDEX, ModelConfig
from models.detect import get_family
from models.empty_components import empty_encoders
from models.families import flux3
from models.released import configuration_folder, released_models
from objectives.config import ObjectiveConfig
from training.memory.fake_tensors import fake_tensors

CAPTIONS = ["owl", "a photo of a smiling red cat on the moon", " owl" * 100, " owl" * 200]


def test_captions_of_other_windows_in_a_batch_are_seen_as_alone():
    rows = rows_of(CASE, CAPTIONS)
    assert [len(row["prompt_embeds"]) for row in rows] == [80, 80, 160, 240]
    noisy = torch.randn(len(rows), 128, 4, 2, generator=torch.Generator().manual_seed(1))
    together = prediction(CASE, rows, noisy)
    alone = [prediction(CASE, [row], noisy[i : i + 1]) for i, row in enumerate(rows)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    hidden = [{"prompt_embeds": row["prompt_embeds"][:-1]} for row in rows[:1]]
    assert not torch.allclose(prediction(CASE, hidden, noisy[:1]), alone[0], atol=1e-5)


def test_captions_are_cut_where_the_count_says(monkeypatch):
    monkeypatch.setattr(flux3, "MAX_TOKENS", 100)
    family = family_of(CASE)
    limit = family.count_tokens([""]).limit
    captions = [" owl" * count for count in (limit - 1, limit, limit + 20)]
    assert family.count_tokens(captions).counts == [limit - 1, limit, limit + 20]
    less, fits, over = (row["prompt_embeds"] for row in rows_of(CASE, captions))
    assert [len(less), len(fits), len(over)] == [100] * 3
    assert not torch.equal(less, fits)


def test_the_numbers_are_the_pipelines():
    defaults = {item.name: item.default for item in Flux3TextEncoderStep().inputs}
    assert defaults["max_sequence_length"] == flux3.MAX_TOKENS
    assert defaults["text_encoder_out_layers"] == flux3.TEXT_LAYERS
    assert flux3.USUAL_TOKENS % Flux3TextEncoderStep().pad_multiple == 0
    assert Flux3PrepareLatentsStep().image_rope_scale == flux3.POSITION_SCALE
    process = family_of(CASE).process(ObjectiveConfig())
    assert process.shift(16) == process.shift(4096) == Flux3SetTimestepsStep().shift
    assert family_of(CASE).process(ObjectiveConfig(shift=2.0)).shift(16) == 2.0


def test_the_distilled_model_is_refused(tmp_path):
    folder, file = tmp_path / "model", tmp_path / "model.safetensors"
    shutil.copytree(folder_of(CASE), folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "flow_map": True}))
    tensors = native_tensors(CASE)
    save_file({**tensors, "ref_time_in.in_layer.weight": torch.zeros(1)}, file)
    for config in ({"path": str(folder)}, {"path": str(file)}):
        with pytest.raises(ModelError, match=r"as a flow map.*expected FLUX 3 Image Klein Base"):
            get_family(ModelConfig(**config))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_of_the_original_names_is_the_same_model(prefix, tmp_path):
    """diffusers' own converter reads the same."""
    path = str(tmp_path / "model.safetensors")
    tensors = native_tensors(CASE, prefix, "scale")
    save_file(tensors, path)
    values = values_of_file(CASE, path)
    save_file({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, path)
    by_diffusers = Flux3Transformer2DModel.from_single_file(
        path, config=str(folder_of(CASE)), subfolder="transformer"
    ).state_dict()
    assert values.keys() == by_diffusers.keys()
    for name, tensor in values.items():
        assert tensor.equal(by_diffusers[name]), name


def test_diffusers_reads_loras_of_the_original_names():
    family = family_of(CASE)
    denoiser = family.load_denoiser(torch.float32)
    plan = AdapterPlan(AdapterConfig(alpha=3.0, targets=("attention-mlp",)), "LoRA", 2, "auto")
    adapted = attach(denoiser, plan.specs(denoiser, family.targets), 0)
    names, layers = layer_spellings(family, adapted.model), files.adapter_layers(adapted)
    original, expected = (
        files.file_content(layers, adapted.model, names, name, torch.float32).tensors
        for name in ("comfyui", "diffusers")
    )
    assert "diffusion_model.content_mode_blocks.image.0.q_proj.lora_A.weight" in {
        key.replace("lora_down", "lora_A") for key in original
    }
    found = _convert_non_diffusers_flux3_lora_to_diffusers(original)
    renamed = {
        key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): tensor
        for key, tensor in found.items()
    }
    assert renamed.keys() == expected.keys()


def test_a_saved_model_names_the_prompt_upsampler_as_before(tmp_path):
    """It is another model, which is neither loaded nor saved."""
    folder, place = tmp_path / "model", "black-forest-labs/flux-3-image-klein-pup"
    shutil.copytree(folder_of(CASE), folder)
    path = folder / MODULAR_INDEX
    index = json.loads(path.read_text())
    hint = ["transformers", "Qwen3_5ForConditionalGeneration"]
    loading = {"pretrained_model_name_or_path": place, "subfolder": "", "type_hint": hint}
    path.write_text(json.dumps({**index, "prompt_upsampler": [None, None, loading]}))
    pipeline = get_family(ModelConfig(path=str(folder))).pipeline(None)
    assert pipeline.prompt_upsampler is None
    pipeline.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / MODULAR_INDEX).read_text()
    saved = json.loads(text)["prompt_upsampler"]
    assert saved[2]["pretrained_model_name_or_path"] == place
    assert str(tmp_path) not in text


def test_the_planned_encoders_are_made_without_values():
    """The pipeline makes its scheduler itself, which reads values."""
    with configuration_folder(released_models()["FLUX 3 Image Klein Base"]) as folder:
        family = get_family(ModelConfig(path=str(folder)))
        with fake_tensors(is_gpu=True):
            encoders = empty_encoders(family, "text")
    assert encoders.scheduler.config.shift == flux3.SHIFT
    assert encoders.text_encoder.dtype == torch.bfloat16
    layers = encoders.text_encoder.model.language_model.layers
    assert len(layers) == flux3.TEXT_LAYERS[-1] + 1
