"""The loss that is made of a noise process: its space, its weighting and how it compares."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.objective_cases import (
    PROCESSES,
    QUANTILES,
    TOKENS,
    even,
    normal,
    objective_of,
    process_of,
)
from helpers.objective_maths import FakeFamily, batch_of
from torch import Tensor, nn

from objectives import LOSSES, WEIGHTINGS, get_function
from objectives.config import DELTA_LOSSES, ObjectiveConfig, objective_errors
from objectives.objective import Objective
from objectives.processes import Flow, NoiseLevels, NoiseProcess, Shift
from objectives.weightings import inverse_sigma2
from training.loss import LossFunction

DIFFUSION = ["epsilon", "v"]
PUBLISHED = [name for name in WEIGHTINGS if name != "none"]


def losses_of(
    name: str, loss: str = "MSE", prediction: Tensor | None = None, **options: Any
) -> Tensor:
    """The losses of one random batch."""
    family = FakeFamily(normal(2) if prediction is None else prediction)
    function = LossFunction(family, objective_of(name, **options), loss, torch.float32)
    return function(nn.Identity(), batch_of(normal(0), normal(1)))


def noised(name: str, **options: Any) -> Any:
    return objective_of(name, **options).add_noise(normal(0) * 3, normal(1), QUANTILES, TOKENS)


def per_sample(tensor: Tensor) -> Tensor:
    return tensor.view(-1, 1, 1, 1)


def denoised(name: str, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """x0 as a sampler would read it off `prediction` of the random batch, and what it should be."""
    found = noised(name)
    levels = found.levels
    signal, sigma = per_sample(levels.signal), per_sample(levels.sigma)
    if name == "epsilon":
        return (found.noisy - sigma * prediction) / signal, normal(0) * 3
    if name == "v":
        return signal * found.noisy - sigma * prediction, normal(0) * 3
    return found.noisy - sigma * prediction, normal(0) * 3


@pytest.mark.parametrize("name", PROCESSES)
def test_errors_are_compared_as_they_are_unless_asked_otherwise(name):
    found = noised(name)
    assert found.error_scale.tolist() == [1.0] * len(QUANTILES)
    assert found.weight.tolist() == [1.0] * len(QUANTILES)


@pytest.mark.parametrize("name", DIFFUSION)
def test_x0_space_weights_the_squared_error_as_comfyuis_node(name):
    found = noised(name, loss_space="x0")
    s_squared = (found.levels.sigma / found.levels.signal) ** 2
    weight = s_squared if name == "epsilon" else s_squared / (s_squared + 1)
    torch.testing.assert_close(found.error_scale**2, weight)


def test_masks_and_weights_scale_the_loss_of_their_samples():
    latents, noise, prediction = normal(0), normal(1), normal(2)
    loss = LossFunction(FakeFamily(prediction), objective_of("epsilon"), "MSE", torch.float32)
    mask = torch.rand(len(latents), *latents.shape[-2:])
    weight = torch.rand(len(latents))
    batch = replace(batch_of(latents, noise), mask=mask, weight=weight)
    expected = ((prediction - noise) ** 2 * mask[:, None]).mean((1, 2, 3)) * weight
    torch.testing.assert_close(loss(nn.Identity(), batch), expected)


def test_latents_that_are_stored_in_bf16_are_noised_in_fp32():
    family, latents, objective = (
        FakeFamily(normal(2)),
        normal(0).bfloat16(),
        objective_of("epsilon"),
    )
    LossFunction(family, objective, "MSE", torch.float32)(
        nn.Identity(), batch_of(latents, normal(1))
    )
    assert family.seen[0].equal(
        objective.add_noise(latents.float() * 3, normal(1), QUANTILES, TOKENS).noisy
    )


def test_the_denoiser_may_see_other_noise_than_the_target_has():
    objective, seen = objective_of("v"), normal(3)
    family = FakeFamily(normal(2))
    loss = LossFunction(family, objective, "MSE", torch.float32)
    losses = loss(nn.Identity(), replace(batch_of(normal(0), normal(1)), input_noise=seen))
    assert family.seen[0].equal(objective.add_noise(normal(0) * 3, seen, QUANTILES, TOKENS).noisy)
    assert losses.equal(losses_of("v"))


def definition(name: str, e: Tensor, delta: Tensor) -> Tensor:
    """The losses as functions of the error, from their definitions."""
    size, half = e.abs(), e**2 / 2
    return {
        "MSE": e**2,
        "L1": size,
        "Huber": torch.where(size <= delta, half, delta * (size - delta / 2)),
        "SmoothL1": torch.where(size < delta, half / delta, size - delta / 2),
        "pseudo-Huber": delta**2 * ((1 + (e / delta) ** 2).sqrt() - 1),
        "log-cosh": torch.log(torch.cosh(e)),
    }[name]


TORCH_LOSSES = {
    "MSE": nn.MSELoss,
    "L1": nn.L1Loss,
    "Huber": nn.HuberLoss,
    "SmoothL1": nn.SmoothL1Loss,
}


@pytest.mark.parametrize("name", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("loss", TORCH_LOSSES)
def test_the_nodes_losses_equal_torchs_bit_for_bit(loss, name):
    prediction = normal(2) * 2  # both sides of the losses' bend at 1
    losses, target = losses_of(name, loss, prediction), noised(name).target
    assert losses.shape == (len(QUANTILES),)
    for i, found in enumerate(losses):
        elements = TORCH_LOSSES[loss](reduction="none")(prediction[i], target[i])
        assert found == elements.flatten().mean()
    torch.testing.assert_close(losses.mean(), TORCH_LOSSES[loss]()(prediction, target))


@pytest.mark.parametrize("space", ["prediction", "x0"])
@pytest.mark.parametrize("name", ["epsilon", "v", "flow", "EDM"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_its_definition_of_the_scaled_error(loss, name, space):
    found = noised(name, loss_space=space)
    error = (normal(2) - found.target).double() * per_sample(found.error_scale)
    one = torch.ones_like(error)
    expected = definition(loss, error, one).mean((1, 2, 3)).float()
    torch.testing.assert_close(
        losses_of(name, loss, loss_space=space), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("loss", TORCH_LOSSES)
def test_the_x0_loss_equals_torchs_over_the_denoised_latents(loss, name):
    answer, x0 = denoised(name, normal(2))
    losses = losses_of(name, loss, loss_space="x0")
    torch.testing.assert_close(
        losses.mean(), TORCH_LOSSES[loss]()(answer, x0), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("name", ["epsilon", "v", "flow", "EDM"])
@pytest.mark.parametrize("loss", DELTA_LOSSES)
def test_the_delta_follows_the_noise_level_as_in_kohyas_scripts(loss, name, schedule):
    delta, found = 0.1, noised(name)
    levels = found.levels
    deltas = torch.full_like(levels.sigma, delta)
    if schedule == "exponential":
        # their timestep of 1000; EDM, which they have not, by the sigma of flow matching
        time = (
            levels.sigma / (levels.sigma + levels.signal)
            if name == "EDM"
            else levels.timestep / 1000
        )
        deltas = torch.exp(math.log(delta) * time)
    elif schedule == "snr":
        deltas = (1 - delta) / (1 + levels.sigma / levels.signal) ** 2 + delta
    error = (normal(2) - found.target).double()
    expected = definition(loss, error, per_sample(deltas)).mean((1, 2, 3)).float()
    losses = losses_of(name, loss, huber_delta=delta, huber_schedule=schedule)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [1e-4, 0.1, 3.0, 30.0, 1e4])
def test_losses_and_their_gradients_are_exact_at_all_sizes(loss, size):
    error = torch.tensor([size, -size], requires_grad=True)
    wide = error.detach().double().requires_grad_()
    # ln cosh in fp64 overflows beyond 700
    expected = (
        wide.abs() - math.log(2)
        if loss == "log-cosh" and size > 30
        else definition(loss, wide, torch.ones(2))
    )
    found = get_function("losses", LOSSES[loss].function)(error, torch.zeros(2))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-12)
    gradients = (
        torch.autograd.grad(found.sum(), error)[0],
        torch.autograd.grad(expected.sum(), wide)[0].float(),
    )
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-12)


def test_the_denoiser_works_in_its_own_dtype_and_the_loss_in_fp32():
    objective = objective_of("epsilon")
    family = FakeFamily(normal(2).bfloat16())
    latents, noise = normal(0), normal(1)
    losses = LossFunction(family, objective, "MSE", torch.bfloat16)(
        nn.Identity(), batch_of(latents, noise)
    )
    noisy, timestep, cond = family.seen
    expected = objective.add_noise(latents * 3, noise, QUANTILES, TOKENS)
    assert noisy.equal(expected.noisy.bfloat16())
    assert timestep.equal(expected.timestep)
    assert {key: tensor.dtype for key, tensor in cond.items()} == {
        "prompt_embeds": torch.bfloat16,
        "attention_mask": torch.long,
    }
    assert losses.dtype == torch.float32
    # the target is not rounded: only the prediction is in bf16
    assert math.isclose(
        losses.mean(), ((family.prediction.double() - noise.double()) ** 2).mean(), rel_tol=1e-6
    )


# published weights of the squared error of the prediction: weighting -> process -> formula of snr and sigma
SNR_FORMS: dict[str, dict[str, Any]] = {
    # kohya and diffusers: min(snr, gamma) / snr for epsilon, / (snr + 1) for v
    "min-snr": {
        "epsilon": lambda snr, s: snr.clamp(max=5) / snr,
        "v": lambda snr, s: snr.clamp(max=5) / (snr + 1),
        "flow": lambda snr, s: snr.clamp(max=5) * s**2,
    },
    # kohya: 1 / sqrt(snr) for epsilon
    "debiased": {"epsilon": lambda snr, s: snr**-0.5, "v": lambda snr, s: snr**0.5 / (1 + snr)},
    "p2": {"epsilon": lambda snr, s: 1 / (1 + snr), "v": lambda snr, s: snr / (1 + snr) ** 2},
    # diffusers' compute_loss_weighting_for_sd3
    "inverse-sigma2": {"flow": lambda snr, s: s**-2.0},
    "cosmap": {"flow": lambda snr, s: 2 / (math.pi * (1 - 2 * s + 2 * s**2))},
    # what makes the squared error that of x0
    "sigma2": {
        "epsilon": lambda snr, s: 1 / snr,
        "v": lambda snr, s: 1 / (1 + snr),
        "flow": lambda snr, s: s**2,
    },
}


@pytest.mark.parametrize(
    ("weighting", "name"), [(w, p) for w, forms in SNR_FORMS.items() for p in forms]
)
def test_weightings_are_the_published_ones(weighting, name):
    found = noised(name, loss_weighting=weighting)
    expected = SNR_FORMS[weighting][name](found.levels.snr, found.levels.sigma)
    torch.testing.assert_close(found.weight, expected, rtol=1e-4, atol=0)


def test_diffusers_own_functions_agree():
    from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
    from helpers.objective_cases import sd_schedule

    found = noised("flow, shift 3", loss_weighting="cosmap")
    torch.testing.assert_close(
        found.weight, compute_loss_weighting_for_sd3("cosmap", found.levels.sigma)
    )
    found = noised("flow, shift 3", loss_weighting="inverse-sigma2")
    torch.testing.assert_close(
        found.weight, compute_loss_weighting_for_sd3("sigma_sqrt", found.levels.sigma)
    )
    found = noised("epsilon")
    snr = compute_snr(sd_schedule(*PROCESSES["epsilon"][:2]), found.timestep)
    torch.testing.assert_close(found.levels.snr, snr)


class Rescaled(NoiseProcess):
    """Another process at the same signal-to-noise ratios: what it mixes is scaled, and it predicts something else."""

    def __init__(self, inner: NoiseProcess):
        self.inner = inner

    def levels(self, quantile: Tensor, tokens: int) -> NoiseLevels:
        inner = self.inner.levels(quantile, tokens)
        signal, sigma = inner.signal * 7, inner.sigma * 7
        return NoiseLevels(signal, sigma, 0.3 * signal, -2 * sigma, inner.timestep)


@pytest.mark.parametrize("space", ["prediction", "x0"])
@pytest.mark.parametrize("weighting", PUBLISHED)
def test_a_weighting_means_the_same_for_every_prediction_and_space(weighting, space):
    """The weighted squared error of the same x0 is one number, however it is predicted."""
    options = ObjectiveConfig(loss_weighting=weighting, loss_space=space)
    flow = Flow(Shift())
    found = [
        Objective(process, options).add_noise(normal(0), normal(1), QUANTILES, TOKENS)
        for process in (flow, Rescaled(flow))
    ]
    # an error of 1 in x0 is an error of 1 / to_x0 in the prediction
    weighted = [one.weight * (one.error_scale / one.levels.to_x0) ** 2 for one in found]
    torch.testing.assert_close(*weighted)


@pytest.mark.parametrize("space", ["prediction", "x0"])
@pytest.mark.parametrize("weighting", PUBLISHED)
@pytest.mark.parametrize("name", PROCESSES)
def test_weights_are_finite_at_every_level(name, weighting, space):
    quantile = torch.cat([torch.tensor([0.0, 2**-24]), even(500), torch.tensor([1 - 2**-24])])
    objective = objective_of(name, loss_weighting=weighting, loss_space=space)
    one = torch.ones(len(quantile), 1, 1, 1)
    found = objective.add_noise(one, one, quantile, TOKENS)
    assert found.weight.isfinite().all()
    assert (found.weight >= 0).all()
    assert found.error_scale.isfinite().all()


def test_the_weight_that_rises_without_end_ends_at_the_lowest_level_of_a_thousand():
    share = torch.tensor([0.5, 1e-3, 1e-7])
    levels = NoiseLevels(1 - share, share, -torch.ones(3), torch.ones(3), share)
    of_velocity = inverse_sigma2(levels, ObjectiveConfig()) * share**2
    torch.testing.assert_close(of_velocity, torch.tensor([4.0, 1e6, 1e6]))


@pytest.mark.parametrize("weighting", PUBLISHED)
def test_the_weighted_mse_does_not_depend_on_the_loss_space(weighting):
    both = [
        losses_of("v", loss_weighting=weighting, loss_space=space) for space in ("prediction", "x0")
    ]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-7)


def test_validation_is_the_plain_squared_error_whatever_is_trained():
    plain = losses_of("v")
    options = {
        "loss_space": "x0", "loss_weighting": "min-snr", "timestep_sampling": "cosmap",
        "timestep_range": (0.5, 1.0), "huber_delta": 0.1, "shift": 2.0, "continuous_timesteps": True,
        "prediction_type": "v_prediction",
    }  # fmt: skip
    family = FakeFamily(normal(2), process_of("v"))
    trained = LossFunction(family, objective_of("v", **options), "Huber", torch.float32)
    batch = batch_of(normal(0), normal(1))
    assert not torch.allclose(trained(nn.Identity(), batch), plain)
    assert trained.for_validation(nn.Identity(), batch).equal(plain)
    assert family.asked == ObjectiveConfig(prediction_type="v_prediction"), (
        "what the base predicts stays"
    )


ERRORS = {
    "unused parameters": (
        {"logit_mean": 1.0, "mode_scale": 0.5, "min_snr_gamma": 3.0, "p2_k": 2.0,
         "multires_noise_discount": 0.3}, "MSE",
        ["logit_mean", "mode_scale", "min_snr_gamma", "p2_k", "multires_noise_discount"],
    ),
    "delta of a loss without": ({"huber_delta": 0.1, "huber_schedule": "snr"}, "log-cosh",
                                ["huber_delta", "huber_schedule"]),
    "schedule of delta 1": ({"huber_schedule": "snr"}, "Huber", ["huber_schedule"]),
    "empty range": ({"timestep_range": (0.5, 0.5)}, "MSE", ["timestep_range"]),
    "nothing": ({}, "MSE", []),
    "all in use": (
        {"timestep_sampling": "beta", "beta_a": 3.0, "loss_weighting": "p2", "p2_gamma": 2.0, "huber_delta": 0.1,
         "huber_schedule": "snr", "multires_noise_iterations": 3, "multires_noise_discount": 0.2}, "SmoothL1", [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_options_that_say_nothing_are_named_all_at_once(case):
    options, loss, named = ERRORS[case]
    errors = objective_errors(ObjectiveConfig(**options), loss)
    names = [error.removeprefix("--objective.").split(" ")[0] for error in errors]
    assert names == named
