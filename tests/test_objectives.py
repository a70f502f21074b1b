"""The noise process against diffusers' and against the formulas, and the loss that is made of it."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import BASE
from diffusers import DDPMScheduler
from torch import Tensor, nn

from data.batches import Batch
from models.objectives import DDPM
from training.step import LOSSES, LossFunction

PREDICTION_TYPES = ["epsilon", "v_prediction"]
SHAPE = (5, 4, 6, 7)
QUANTILES = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.9995])


def normal(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scheduler(**changes: object) -> DDPMScheduler:
    return DDPMScheduler.from_pretrained(BASE, subfolder="scheduler", **changes)


@pytest.mark.parametrize(
    ("quantile", "timestep"),
    [(0.0, 0), (0.0005, 0), (0.001, 1), (0.0010001, 1), (0.4999, 499), (0.5, 500), (0.9989, 998), (0.99999994, 999)],
)
def test_the_quantile_picks_the_timestep(quantile, timestep):
    objective = DDPM(scheduler().alphas_cumprod, "epsilon", "prediction")
    one = torch.zeros(1, 4, 2, 2)
    assert objective.noised(one, one, torch.tensor([quantile])).timestep.tolist() == [timestep]


@pytest.mark.parametrize("count", [1000, 50])
def test_even_quantiles_pick_every_timestep_once(count):
    objective = DDPM(scheduler(num_train_timesteps=count).alphas_cumprod, "epsilon", "prediction")
    zeros = torch.zeros(count, 1, 1, 1)
    assert objective.noised(zeros, zeros, (torch.arange(count) + 0.5) / count).timestep.tolist() == list(range(count))


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_noise_and_target_equal_diffusers(prediction_type, beta_schedule):
    reference = scheduler(prediction_type=prediction_type, beta_schedule=beta_schedule)
    x0, noise = normal(0), normal(1)
    noised = DDPM(reference.alphas_cumprod, prediction_type, "prediction").noised(x0, noise, QUANTILES)
    torch.testing.assert_close(noised.noisy, reference.add_noise(x0, noise, noised.timestep))
    target = noise if prediction_type == "epsilon" else reference.get_velocity(x0, noise, noised.timestep)
    torch.testing.assert_close(noised.target, target)
    assert noised.error_scale.tolist() == [1.0] * len(x0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_right_prediction_denoises_as_diffusers_would(prediction_type):
    reference = scheduler(prediction_type=prediction_type, clip_sample=False)
    x0, noise = normal(0, torch.float64), normal(1, torch.float64)
    noised = DDPM(reference.alphas_cumprod, prediction_type, "prediction").noised(x0, noise, QUANTILES)
    for i, timestep in enumerate(noised.timestep):
        step = reference.step(noised.target[i], timestep, noised.noisy[i])
        torch.testing.assert_close(step.pred_original_sample, x0[i], rtol=0, atol=1e-4)


def denoised(prediction_type: str, noisy: Tensor, prediction: Tensor, alpha_cumprod: Tensor) -> Tensor:
    """x0 as the sampler would read it off `prediction`."""
    a = alpha_cumprod.view(-1, 1, 1, 1)
    if prediction_type == "epsilon":
        return (noisy - (1 - a).sqrt() * prediction) / a.sqrt()
    return a.sqrt() * noisy - (1 - a).sqrt() * prediction


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_x0_space_compares_the_denoised_latents(prediction_type):
    alphas = scheduler().alphas_cumprod
    x0, noise, prediction = (normal(seed, torch.float64) for seed in range(3))
    noised = DDPM(alphas, prediction_type, "x0").noised(x0, noise, QUANTILES)
    a = alphas[noised.timestep].double()
    error = (prediction - noised.target) * noised.error_scale.view(-1, 1, 1, 1)
    # less noise predicted is more signal left: the error of x0 has the opposite sign, which no loss here sees
    expected = denoised(prediction_type, noised.noisy, prediction, a) - x0
    torch.testing.assert_close(error, -expected, rtol=1e-9, atol=1e-9)
    # the weights of the squared error, with s the ratio of noise to signal, as in ComfyUI's node
    s_squared = (1 - a) / a
    weight = s_squared if prediction_type == "epsilon" else s_squared / (s_squared + 1)
    torch.testing.assert_close(noised.error_scale**2, weight, rtol=1e-9, atol=0)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="sample"):
        DDPM(scheduler().alphas_cumprod, "sample", "prediction")  # type: ignore[arg-type]


class Maths:
    """Stands in for a family where only its arithmetic counts: normalise triples, the prediction is given."""

    def __init__(self, prediction: Tensor):
        self.prediction = prediction

    def normalise(self, latents: Tensor) -> Tensor:
        return latents * 3

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.seen = (noisy, timestep, cond)
        return self.prediction


TORCH_LOSSES = {"MSE": nn.MSELoss, "L1": nn.L1Loss, "Huber": nn.HuberLoss, "SmoothL1": nn.SmoothL1Loss}


def batch_of(latents: Tensor, noise: Tensor) -> Batch:
    cond = {"prompt_embeds": torch.ones(len(latents), 3, 2), "attention_mask": torch.ones(len(latents), 3).long()}
    count = len(latents)
    return Batch(latents, noise, QUANTILES, cond, torch.ones(count), torch.zeros(count, 8), range(count))


def test_masks_and_weights_scale_the_loss_of_their_samples():
    objective = DDPM(scheduler().alphas_cumprod, "epsilon", "prediction")
    latents, noise, prediction = normal(0), normal(1), normal(2)
    loss = LossFunction(Maths(prediction), objective, "MSE", torch.float32)
    mask = torch.rand(len(latents), *latents.shape[-2:])
    weight = torch.rand(len(latents))
    batch = replace(batch_of(latents, noise), mask=mask, weight=weight)
    expected = ((prediction - noise) ** 2 * mask[:, None]).mean((1, 2, 3)) * weight
    torch.testing.assert_close(loss(nn.Identity(), batch), expected)


def test_latents_that_are_stored_in_bf16_are_noised_in_fp32():
    objective = DDPM(scheduler().alphas_cumprod, "epsilon", "prediction")
    family, latents = Maths(normal(2)), normal(0).bfloat16()
    LossFunction(family, objective, "MSE", torch.float32)(nn.Identity(), batch_of(latents, normal(1)))
    assert family.seen[0].equal(objective.noised(latents.float() * 3, normal(1), QUANTILES).noisy)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_equals_torchs_over_the_whole_batch(name, prediction_type):
    objective = DDPM(scheduler().alphas_cumprod, prediction_type, "prediction")
    latents, noise, prediction = normal(0), normal(1), normal(2) * 2  # both sides of the losses' bend at 1
    losses = LossFunction(Maths(prediction), objective, name, torch.float32)(nn.Identity(), batch_of(latents, noise))
    assert losses.shape == (len(latents),)
    target = objective.noised(latents * 3, noise, QUANTILES).target
    torch.testing.assert_close(losses.mean(), TORCH_LOSSES[name]()(prediction, target))
    torch.testing.assert_close(losses[2], TORCH_LOSSES[name]()(prediction[2], target[2]))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_the_x0_loss_equals_torchs_over_the_denoised_latents(name, prediction_type):
    alphas = scheduler().alphas_cumprod
    objective = DDPM(alphas, prediction_type, "x0")
    latents, noise, prediction = normal(0), normal(1), normal(2)
    losses = LossFunction(Maths(prediction), objective, name, torch.float32)(nn.Identity(), batch_of(latents, noise))
    x0 = latents * 3
    noised = objective.noised(x0, noise, QUANTILES)
    answer = denoised(prediction_type, noised.noisy, prediction, alphas[noised.timestep])
    torch.testing.assert_close(losses.mean(), TORCH_LOSSES[name]()(answer, x0), rtol=1e-4, atol=1e-6)


def test_the_denoiser_works_in_its_own_dtype_and_the_loss_in_fp32():
    objective = DDPM(scheduler().alphas_cumprod, "epsilon", "prediction")
    family = Maths(normal(2).bfloat16())
    latents, noise = normal(0), normal(1)
    losses = LossFunction(family, objective, "MSE", torch.bfloat16)(nn.Identity(), batch_of(latents, noise))
    noisy, timestep, cond = family.seen
    expected = objective.noised(latents * 3, noise, QUANTILES)
    assert noisy.equal(expected.noisy.bfloat16())
    assert timestep.equal(expected.timestep)
    assert {key: tensor.dtype for key, tensor in cond.items()} == {
        "prompt_embeds": torch.bfloat16,
        "attention_mask": torch.long,
    }
    assert losses.dtype == torch.float32
    # the target is not rounded: only the prediction is in bf16
    assert math.isclose(losses.mean(), ((family.prediction.double() - noise.double()) ** 2).mean(), rel_tol=1e-6)
