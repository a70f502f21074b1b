"""What single files of UNets say that they predict, by the tensors that ComfyUI goes by: in training, in previews and
in what is exported."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, PNDMScheduler
from helpers.family_cases import cases, folder_of, native_tensors
from helpers.ldm import save_single_file
from helpers.project import BASE
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.config import ModelConfig
from models.detect import get_family
from models.families.unet_family import SD2_BIAS_KEY, SD2_TEXT_KEY, UNetFamily
from objectives.config import ObjectiveConfig
from objectives.schedulers import scheduler_from_config

SDXL = next(case for case in cases() if str(case) == "sdxl")


def sdxl_with(path: Path, **marks: torch.Tensor) -> UNetFamily:
    save_file(native_tensors(SDXL, "model.diffusion_model.") | marks, path)
    family = get_family(ModelConfig(path=str(path), config=str(folder_of(SDXL))))
    assert isinstance(family, UNetFamily)
    return family


@pytest.mark.parametrize(
    ("marks", "said"),
    [
        ((), "DDPM, epsilon"),
        (("v_pred",), "DDPM, v_prediction"),
        (("v_pred", "ztsnr"), "DDPM, v_prediction, zero terminal SNR"),
        (("ztsnr",), "DDPM, epsilon"),
    ],
)
def test_a_marked_file_is_trained_drawn_and_described_as_it_predicts(tmp_path, marks, said):
    family = sdxl_with(tmp_path / "model.safetensors", **{mark: torch.zeros(1) for mark in marks})
    assert family.process(ObjectiveConfig()).describe() == said
    scheduler = family.pipeline(family.empty_denoiser()).scheduler
    assert isinstance(scheduler, DDIMScheduler)
    zero = "zero" in said
    assert scheduler.config.prediction_type == ("v_prediction" if "v_" in said else "epsilon")
    assert (scheduler.alphas_cumprod[-1] == 0) == zero
    scheduler.set_timesteps(10)
    assert (scheduler.timesteps[0] == 999) == zero, "the first step is the last timestep"
    metadata = family.file_metadata(family.empty_denoiser())
    assert metadata["modelspec.prediction_type"] == ("v" if "v_" in said else "epsilon")
    assert metadata["ss_zero_terminal_snr"] == str(zero)


def test_a_file_marked_as_edm_is_one_that_predicts_v(tmp_path):
    """As CosXL, whose scheduler has these numbers."""
    limits = {
        "edm_vpred.sigma_max": torch.tensor(120.0),
        "edm_vpred.sigma_min": torch.tensor([0.002]),
    }
    family = sdxl_with(tmp_path / "model.safetensors", **limits)
    process = family.process(ObjectiveConfig())
    assert process.describe() == "EDM, v_prediction"
    scheduler = family.pipeline(family.empty_denoiser()).scheduler
    assert isinstance(scheduler, EDMEulerScheduler)
    assert (scheduler.config.sigma_max, scheduler.config.sigma_data) == (120, 1)
    assert scheduler.config.sigma_min == pytest.approx(0.002)
    levels, sigma = process.levels(torch.tensor([0.3]), 1), torch.tensor([0.7])
    sigma = (4 * levels.timestep).exp()
    sample, prediction = torch.randn(2, 1)
    wanted = scheduler.precondition_outputs(sample, prediction, sigma)
    seen = scheduler.precondition_inputs(
        sample, sigma
    )  # F of the wanted image, by the project's own formula
    noise = (sample - wanted) / sigma
    torch.testing.assert_close(levels.signal * wanted + levels.sigma * noise, seen)
    torch.testing.assert_close(
        levels.target_signal * wanted + levels.target_sigma * noise, prediction[None][0]
    )


@pytest.mark.parametrize(("spread", "wanted"), [(0.05, "epsilon"), (0.12, "v_prediction")])
def test_files_of_stable_diffusion_2_are_told_apart_as_comfyui_does(tmp_path, spread, wanted):
    bias = torch.tensor([-spread, spread] * 4)  # whose deviation is that
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        SD2_BIAS_KEY: bias,
    }
    path = tmp_path / "model.safetensors"
    save_file({**tensors, SD2_TEXT_KEY: torch.zeros(2, 1024)}, path)
    family = get_family(ModelConfig(path=str(path)))
    assert family.file_prediction == {"prediction_type": wanted}
    assert get_family(ModelConfig(path=str(path), config=str(BASE))).file_prediction == {}, (
        "the given one says it"
    )
    save_file({**tensors, SD2_TEXT_KEY: torch.zeros(2, 768)}, path)
    assert get_family(ModelConfig(path=str(path))).file_prediction == {}, (
        "as Stable Diffusion 1 has it"
    )


def test_a_scheduler_without_zero_terminal_snr_is_replaced_where_it_is_asked_for():
    asked = {**PNDMScheduler(beta_schedule="scaled_linear").config, "_class_name": "PNDMScheduler"}
    assert isinstance(scheduler_from_config(asked), PNDMScheduler)
    scheduler = scheduler_from_config(
        {**asked, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    )
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.config.beta_schedule == "scaled_linear"


def test_a_whole_run_says_what_its_base_predicts(options, run_here, capsys, tmp_path):
    path, out = tmp_path / "noob.safetensors", tmp_path / "out"
    save_single_file(BASE, path, torch.float32)
    save_file(load_file(path) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    more = [f"--model.path={path}", f"--model.config={BASE}", "--steps=1", "--export.merged_model"]
    assert run_here([*options, *more]) == 0
    assert "\nobjective   DDPM, v_prediction, zero terminal SNR\n" in capsys.readouterr().out
    with safe_open(next(out.glob("*.safetensors")), framework="pt") as adapter:
        assert adapter.metadata()["modelspec.prediction_type"] == "v"
    merged = json.loads(
        (out / "model_with_lora" / "scheduler" / "scheduler_config.json").read_text()
    )
    expected = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    assert {name: merged[name] for name in expected} == expected
