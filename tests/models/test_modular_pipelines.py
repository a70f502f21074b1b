"""Modular pipelines, which are called like diffusers' other pipelines, draw what diffusers draws by its own call."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ModularPipeline
from helpers.families.anima import CASE
from helpers.family_cases import SIDE, diffusers_pipeline, family_of, folder_of
from huggingface_hub import hf_hub_download, snapshot_download

from common.errors import ModelError
from models import checkpoint_files
from models.checkpoint_files import local_path, read_index
from models.config import MODULAR_INDEX, ModelConfig
from models.detect import get_family
from training.report.hub_folder import Publication, model_card
from training.report.run_files import read_run
from training.run_folder import FACTS_FILE
from training.sampling.draw import call_parameters, uses_negative_prompt

SIZE = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "output_type": "np"}
PROMPT = {"prompt": "a photo of a smiling red cat", "negative_prompt": "owl"}


def images(pipeline: Any, scale: float = 4.0, **options: Any) -> np.ndarray:
    family_of(CASE).set_guidance(pipeline, scale)
    return pipeline(
        **PROMPT, **SIZE, **options, generator=torch.Generator().manual_seed(0)
    ).images  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_an_image_is_that_of_diffusers_own_call(scale):
    expected = images(diffusers_pipeline(CASE), scale)
    assert expected.std() > 0.01
    assert np.array_equal(images(family_of(CASE).pipeline(None), scale), expected)


def test_a_saved_pipeline_is_loaded_by_diffusers_and_names_no_path(tmp_path):
    family_of(CASE).pipeline(None).save_pretrained(tmp_path / "made")
    moved = (tmp_path / "made").rename(tmp_path / "moved")
    assert str(tmp_path) not in (moved / MODULAR_INDEX).read_text()
    again = get_family(ModelConfig(path=str(moved))).pipeline(None)
    own = ModularPipeline.from_pretrained(str(moved))
    own.load_components(dtype=torch.float32)
    expected = images(family_of(CASE).pipeline(None))
    assert np.array_equal(images(again), expected)
    assert np.array_equal(images(own), expected)


def test_steps_are_reported_and_a_call_can_be_ended_between_them(caplog, capfd):
    class Ended(Exception):
        pass

    counts = []

    def count(pipeline, number, timestep, values) -> dict:
        counts.append(number)
        return {}

    def end(*_: Any) -> dict:
        raise Ended

    pipeline = family_of(CASE).pipeline(None)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        images(pipeline, callback_on_step_end=count)
        with pytest.raises(Ended):
            images(pipeline, callback_on_step_end=end)
    assert counts == [0, 1]
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_arguments_are_known_and_others_are_refused():
    pipeline = family_of(CASE).pipeline(None)
    parameters = call_parameters(type(pipeline))
    assert {"prompt", "height", "generator", "callback_on_step_end"} <= parameters.keys()
    assert uses_negative_prompt(type(pipeline), {})
    with pytest.raises(TypeError, match="takes no argument guidance_scale"):
        images(pipeline, guidance_scale=3.0)


def copy_of_case(folder: Path) -> Path:
    return Path(shutil.copytree(folder_of(CASE), folder / "model"))


def test_a_component_that_cannot_be_loaded_is_an_error(tmp_path):
    folder = copy_of_case(tmp_path)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"could not be loaded as anima.*vae"):
        get_family(ModelConfig(path=str(folder))).load_encoders("media")


def test_the_variant_is_taken_of_the_components_that_have_it(tmp_path):
    folder = copy_of_case(tmp_path)
    family = get_family(ModelConfig(path=str(folder), variant="bf16"))
    denoiser = family_of(CASE).load_denoiser(None)
    doubled = {name: 2 * tensor for name, tensor in denoiser.state_dict().items()}
    denoiser.load_state_dict(doubled)
    denoiser.save_pretrained(folder / "transformer", variant="bf16")
    pipeline = family.pipeline(None)
    for name, tensor in pipeline.transformer.state_dict().items():
        assert tensor.equal(doubled[name])
    assert pipeline.vae is not None


def test_an_index_without_loaded_components_names_their_classes(tmp_path):
    folder = copy_of_case(tmp_path)
    expected = read_index(str(folder))
    assert expected["transformer"] == ["diffusers", "CosmosTransformer3DModel"]
    path = folder / MODULAR_INDEX
    index = json.loads(path.read_text())
    for entry in index.values():
        if isinstance(entry, list):
            entry[0] = entry[1] = None
    path.write_text(json.dumps(index))
    assert read_index(str(folder)) == expected
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"/model_index\.json"):
        read_index(str(folder))


def test_a_modular_pipeline_of_the_hub_is_downloaded_by_its_own_index(monkeypatch):
    asked: dict[str, Any] = {}

    def snapshot(hub_id: str, allow_patterns: list[str]) -> str:
        asked[hub_id] = allow_patterns
        return str(folder_of(CASE))

    monkeypatch.setattr(checkpoint_files, "snapshot_download", snapshot)
    monkeypatch.setattr(
        checkpoint_files, "hf_hub_download", lambda _, file: str(folder_of(CASE) / file)
    )
    local_path.cache_clear()
    hub_id = "someone/anima"
    assert local_path(ModelConfig(path=hub_id)) == folder_of(CASE)
    assert {MODULAR_INDEX, "transformer/*", "t5_tokenizer/*", "vae/*"} <= set(asked[hub_id])


def test_a_modular_pipeline_in_the_cache_needs_no_connection(monkeypatch, tmp_path):
    commit = "a" * 40
    repository = tmp_path / "models--someone--anima"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder_of(CASE), repository / "snapshots" / commit)
    for function in (snapshot_download, hf_hub_download):
        in_cache = partial(function, cache_dir=tmp_path, local_files_only=True)
        monkeypatch.setattr(checkpoint_files, function.__name__, in_cache)
    local_path.cache_clear()
    path = local_path(ModelConfig(path="someone/anima"))
    assert path == repository / "snapshots" / commit


def test_the_code_of_a_model_card_runs(tmp_path):
    """A card's pipeline is loaded and called in diffusers as this test does."""
    (tmp_path / "config.yaml").write_text("algorithm: LoRA\n")
    (tmp_path / "lora.safetensors").touch()
    (tmp_path / FACTS_FILE).write_text(json.dumps({"is_modular": True}))
    card = model_card(read_run(tmp_path), {}, Publication("me/anima", None))
    for line in (
        'pipeline = ModularPipeline.from_pretrained("<base model>")',
        "pipeline.load_components(dtype=torch.bfloat16)",
        'pipeline(prompt="your prompt", output="images")[0].save("image.png")',
    ):
        assert line in card
    pipeline = ModularPipeline.from_pretrained(str(folder_of(CASE)))
    pipeline.load_components(dtype=torch.bfloat16)
    image = pipeline(prompt="owl", output="images", height=SIDE, width=SIDE, num_inference_steps=1)
    assert image[0].size == (SIDE, SIDE)
