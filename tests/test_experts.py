"""Models of two denoisers, one for high and one for low noise: each is trained on its own levels."""

import pytest
import torch
from family_cases import cases, family_of, folder_of

from models import get_family
from models.config import ModelConfig, ModelError, ObjectiveConfig
from models.objectives import Objective

BORDER = 0.875
PAIR = {name: next(case for case in cases() if case.name == f"wan2.2-{name}") for name in ("high", "low")}
EXPERTS = pytest.mark.parametrize("expert", ["high", "low"])


def sigmas(expert: str, **options: object) -> torch.Tensor:
    """The noise levels of many even quantiles, in order."""
    config = ObjectiveConfig(**options)
    objective = Objective(family_of(PAIR[expert]).process(config), config)
    latents = torch.zeros(1001, 1)
    return objective.noised(latents, latents, torch.linspace(0, 1, 1001), tokens=4).levels.sigma


@pytest.mark.parametrize("options", [{}, {"shift": 1.0}, {"density": "logit-normal"}], ids=str)
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
    with pytest.raises(ModelError, match=r"level_range = 0 0\.3: this denoiser is for levels from 0\.583 to 1"):
        sigmas("high", level_range=(0.0, 0.3))


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
        with pytest.raises(ModelError, match=r"--model\.expert = low: .* has one denoiser"):
            get_family(ModelConfig(path=str(folder_of(case)), expert="low"))
    assert family_of(one).process(ObjectiveConfig()).span == (0.0, 1.0)
