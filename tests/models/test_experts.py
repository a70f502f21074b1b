"""Models of two denoisers, one for high and one for low noise: each is trained on its own levels."""

import pytest
import torch
from helpers.family_cases import cases, family_of, folder_of, native_tensors
from safetensors.torch import save_file

from common.errors import ModelError
from models.config import ModelConfig
from models.detect import get_family
from objectives.config import ObjectiveConfig
from objectives.objective import Objective

BORDER = 0.875
PAIR = {
    name: next(case for case in cases() if case.name == f"wan2.2-{name}")
    for name in ("high", "low")
}
EXPERTS = pytest.mark.parametrize("expert", ["high", "low"])


def sigmas(expert: str, **options: object) -> torch.Tensor:
    """The noise levels of many even quantiles, in order."""
    config = ObjectiveConfig(**options)
    objective = Objective(family_of(PAIR[expert]).process(config), config)
    latents = torch.zeros(1001, 1)
    return objective.add_noise(latents, latents, torch.linspace(0, 1, 1001), tokens=4).levels.sigma


@pytest.mark.parametrize(
    "options", [{}, {"shift": 1.0}, {"timestep_sampling": "logit-normal"}], ids=str
)
@EXPERTS
def test_an_expert_is_trained_on_its_side_of_the_boundary(expert, options):
    found = sigmas(expert, **options)
    low, high = (BORDER, 1.0) if expert == "high" else (0.0, BORDER)
    assert found.diff().ge(0).all()
    assert found[0] < low + 0.03
    assert found[-1] > high - 0.03
    assert abs(found[0 if expert == "high" else -1] - BORDER) < 1e-5


def test_the_two_share_all_levels_as_one_denoiser_would_have_them():
    """With even t, a share of the levels as large as the expert's part of t is below any level."""
    shift, border = 5.0, BORDER / (5 - 4 * BORDER)
    t = border + (1 - border) * torch.linspace(0, 1, 1001)
    torch.testing.assert_close(sigmas("high"), shift * t / (1 + (shift - 1) * t), atol=1e-5, rtol=0)


def test_levels_of_the_other_expert_are_refused():
    with pytest.raises(
        ModelError,
        match=r"--objective\.timestep_range 0 0\.3: this denoiser is for levels from 0\.583 to 1",
    ):
        sigmas("high", timestep_range=(0.0, 0.3))


@EXPERTS
def test_previews_have_both(expert):
    family = family_of(PAIR[expert])
    trained = family.load_denoiser(torch.float32)
    drawn = family.pipeline(trained)
    mine, other = ("transformer", "transformer_2")[:: 1 if expert == "high" else -1]
    assert getattr(drawn, mine) is trained
    assert not getattr(drawn, other).proj_out.weight.equal(trained.proj_out.weight)
    assert drawn.config.boundary_ratio == BORDER


def test_a_model_of_one_denoiser_has_no_experts():
    one = next(case for case in cases() if str(case) == "wan")
    for case in (one, cases()[0]):
        with pytest.raises(
            ModelError, match=r"--model\.expert low: .* has one denoiser\. Remove the option"
        ):
            get_family(ModelConfig(path=str(folder_of(case)), expert="low"))
    assert family_of(one).process(ObjectiveConfig()).t_range == (0.0, 1.0)


ONE, I2V = (next(case for case in cases() if str(case) == name) for name in ("wan", "wan2.2-i2v"))


def of_file(path, case, **options):
    """The family of a single file, with the case's folder for the rest."""
    save_file(native_tensors(case), path)
    return get_family(ModelConfig(path=str(path), config=str(folder_of(case)), **options))


def test_the_error_for_an_expert_of_wan_2_1_names_the_config_of_wan_2_2(tmp_path):
    words = r"expert low: .* has one denoiser\. .* two files, use --model\.config Wan-AI/Wan2\.2-T2V-A14B-Diffusers"
    with pytest.raises(ModelError, match=words):
        of_file(tmp_path / "wan2.2_t2v_low_noise_14B.safetensors", ONE, expert="low")


def test_a_file_that_is_an_expert_by_its_name_is_not_trained_as_wan_2_1(tmp_path):
    path = tmp_path / "wan2.2_t2v_low_noise_14B.safetensors"
    assert of_file(path, ONE).process(ObjectiveConfig()).t_range == (
        0.0,
        1.0,
    )  # whose config says what it is
    words = r"--model\.config Wan-AI/Wan2\.2-T2V-A14B-Diffusers --model\.expert low"
    with pytest.raises(ModelError, match=words):
        get_family(ModelConfig(path=str(path))).process(ObjectiveConfig())


@pytest.mark.parametrize("case", [PAIR["high"], I2V], ids=str)
def test_a_single_file_of_a_pair_must_be_said_to_be_one_of_them(case, tmp_path):
    plain, named = tmp_path / "model.safetensors", tmp_path / "wan2.2_Low_Noise_14B.safetensors"
    with pytest.raises(
        ModelError, match=r"model\.safetensors: is one of two .* high or --model\.expert low$"
    ):
        of_file(plain, case).process(ObjectiveConfig())
    with pytest.raises(ModelError, match=r"--model\.expert low; by its name, this file is low$"):
        of_file(named, case).process(ObjectiveConfig())
    low, high = (
        of_file(plain, case, expert=expert).process(ObjectiveConfig()).t_range
        for expert in ("low", "high")
    )
    assert (low[0], high[1]) == (0.0, 1.0)
    assert low[1] == high[0]
