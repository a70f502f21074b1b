"""Krea 2 beyond the tests of every family: lengths of captions, shift, single files, ComfyUI's layout."""

import math

import pytest
import torch
from diffusers import Krea2Transformer2DModel
from diffusers.pipelines.krea2.pipeline_krea2 import calculate_shift
from helpers.families import krea2
from helpers.family_cases import (
    collate,
    family_of,
    folder_of,
    native_tensors,
    values_of_file,
)
from helpers.predictions import noise, prediction, rows_of
from safetensors.torch import save_file

from models.config import ModelConfig
from models.detect import get_family
from models.released import configuration_folder, released_models
from objectives.config import ObjectiveConfig

RAW, TURBO = krea2.CASES
CAPTIONS = ["owl", "a photo of a smiling red cat on the moon", " owl" * 40]


def test_captions_of_any_length_in_a_batch_are_seen_as_alone():
    rows = rows_of(RAW, CAPTIONS)
    assert len({len(row["prompt_embeds"]) for row in rows}) == len(CAPTIONS)
    noisy = noise(len(rows))
    together = prediction(RAW, rows, noisy)
    alone = [prediction(RAW, [row], noisy[i : i + 1]) for i, row in enumerate(rows)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_captions_are_cut_where_the_count_says():
    family = family_of(RAW)
    limit = family.count_tokens([""]).limit
    captions = [" owl" * count for count in (limit - 1, limit, limit + 1)]
    assert family.count_tokens(captions).counts == [limit - 1, limit, limit + 1]
    less, fits, over = (row["prompt_embeds"] for row in rows_of(RAW, captions))
    assert [len(less), len(fits), len(over)] == [511, 512, 512]
    assert torch.equal(fits, over)


@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_the_shift_is_the_pipelines(side):
    num_tokens = (side // 16) ** 2
    expected = math.exp(calculate_shift(num_tokens, 256, 6400, 0.5, 1.15))
    assert family_of(RAW).process(ObjectiveConfig()).shift(num_tokens) == pytest.approx(expected)
    turbo = family_of(TURBO)
    assert turbo.process(ObjectiveConfig()).shift(num_tokens) == pytest.approx(math.exp(1.15))
    assert turbo.process(ObjectiveConfig(shift=2.0)).shift(num_tokens) == 2.0


def test_released_models_are_told_apart():
    kinds = {}
    for name in ("Krea 2 Raw", "Krea 2 Turbo"):
        with configuration_folder(released_models()[name]) as folder:
            kinds[name] = get_family(ModelConfig(path=str(folder))).is_distilled
    assert kinds == {"Krea 2 Raw": False, "Krea 2 Turbo": True}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_of_the_original_names_is_the_same_model(prefix, tmp_path):
    """It has each block's modulation as one row. diffusers' own converter reads the same."""
    path = str(tmp_path / "model.safetensors")
    tensors = native_tensors(RAW, prefix, "scale")
    tensors[f"{prefix}txtmlp.0.scale"] = tensors.pop(f"{prefix}txtmlp.0.weight")
    for name, tensor in tensors.items():
        if name.endswith("mod.lin"):
            tensors[name] = tensor.flatten().contiguous()
    save_file(tensors, path)
    values = values_of_file(RAW, path)
    by_diffusers = Krea2Transformer2DModel.from_single_file(
        path, config=str(folder_of(RAW)), subfolder="transformer"
    ).state_dict()
    assert values.keys() == by_diffusers.keys()
    for name, tensor in values.items():
        assert tensor.equal(by_diffusers[name]), name


def test_comfyui_has_the_layers_in_a_row():
    family, (row,) = family_of(RAW), rows_of(RAW, CAPTIONS[:1])
    cond, extras = family.comfy.write(row)
    num_tokens, num_layers, width = row["prompt_embeds"].shape
    assert cond.shape == (1, num_tokens, num_layers * width)
    longer = torch.cat([cond, torch.randn(1, 3, num_layers * width)], 1)
    mask = torch.arange(num_tokens + 3)[None] < num_tokens
    back = family.comfy.read(longer, {**extras, "attention_mask": mask})
    assert back["prompt_embeds"].equal(row["prompt_embeds"])


def test_a_long_caption_does_not_change_the_dtype_of_the_conditioning():
    family = family_of(RAW)
    cond = collate(family, rows_of(RAW, CAPTIONS))
    assert cond["prompt_embeds"].shape[2:] == (3, 16)
    assert cond["prompt_embeds"].dtype == family.cond_layout()["prompt_embeds"].dtype


def test_norms_cannot_be_trained(options, run_here, capsys):
    mine = [option for option in options if not option.startswith("--model.path")]
    more = [f"--model.path={folder_of(RAW)}", "--adapter.train_norms"]
    assert run_here([*mine, *more]) == 2
    assert "ComfyUI does not load the norms of krea2" in capsys.readouterr().err
