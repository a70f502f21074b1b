"""Noise processes against diffusers' schedulers and against the formulas."""

import math

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from helpers.objective_cases import (
    PROCESSES,
    QUANTILES,
    TOKENS,
    config_of,
    even,
    normal,
    objective_of,
    process_of,
    sd_schedule,
)

from common.errors import ModelError
from objectives.config import ObjectiveConfig
from objectives.processes import DDPM, Flow
from objectives.schedulers import process_from_scheduler

PREDICTION_TYPES = ["epsilon", "v_prediction"]


@pytest.mark.parametrize(
    ("quantile", "timestep"),
    [
        (0.0, 0),
        (0.0005, 0),
        (0.001, 1),
        (0.0010001, 1),
        (0.4999, 499),
        (0.5, 500),
        (0.9989, 998),
        (0.99999994, 999),
    ],
)
def test_the_quantile_picks_the_timestep(quantile, timestep):
    one = torch.zeros(1, 4, 2, 2)
    noised = objective_of("epsilon").add_noise(one, one, torch.tensor([quantile]), TOKENS)
    assert noised.timestep.tolist() == [timestep]


@pytest.mark.parametrize("count", [1000, 50])
def test_even_quantiles_pick_every_timestep_once(count):
    alphas = sd_schedule(DDPMScheduler, {"num_train_timesteps": count}).alphas_cumprod
    assert DDPM(alphas, "epsilon").levels(even(count), TOKENS).timestep.tolist() == list(
        range(count)
    )


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_noise_and_target_of_ddpm_equal_diffusers(prediction_type, beta_schedule):
    reference = sd_schedule(
        DDPMScheduler, {"prediction_type": prediction_type, "beta_schedule": beta_schedule}
    )
    process = process_from_scheduler(config_of(reference), ObjectiveConfig())
    x0, noise, levels = normal(0), normal(1), process.levels(QUANTILES, TOKENS)
    assert levels.signal.equal(reference.alphas_cumprod[levels.timestep] ** 0.5)
    assert levels.sigma.equal((1 - reference.alphas_cumprod[levels.timestep]) ** 0.5)
    noisy, target = (a.view(-1, 1, 1, 1) * x0 + b.view(-1, 1, 1, 1) * noise for a, b in
                     ((levels.signal, levels.sigma), (levels.target_signal, levels.target_sigma)))  # fmt: skip
    assert noisy.equal(reference.add_noise(x0, noise, levels.timestep))
    expected = (
        noise
        if prediction_type == "epsilon"
        else reference.get_velocity(x0, noise, levels.timestep)
    )
    assert target.equal(expected)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_rise_with_the_quantile_and_are_finite(name, dtype):
    process = process_of(name)
    ends = torch.tensor([2**-24, 1e-6, 1 - 1e-6, 1 - 2**-24], dtype=dtype)
    levels = process.levels(torch.cat([ends[:2], even(3000, dtype)[1:-1], ends[2:]]), TOKENS)
    assert (levels.snr.diff() <= 0).all()
    assert (levels.flow_sigma.diff() >= 0).all()
    assert (process.relative_timestep(levels).diff() >= 0).all()
    for tensor in (
        levels.signal,
        levels.sigma,
        levels.target_signal,
        levels.target_sigma,
        levels.to_x0,
    ):
        assert tensor.isfinite().all()
        assert tensor.dtype == dtype
    assert (levels.sigma > 0).all()
    assert (process.relative_timestep(levels) >= 0).all()
    assert (process.relative_timestep(levels) <= 1).all()


@pytest.mark.parametrize("name", PROCESSES)
def test_x0_is_read_off_a_prediction_and_an_error_grows_by_to_x0(name):
    if "zero terminal" in name:
        pytest.skip("the other cases have it; at snr 0 the division below is by zero")
    levels = process_of(name).levels(QUANTILES.double(), TOKENS)
    x0, noise, error = (normal(seed, torch.float64)[:, 0, 0, 0] for seed in range(3))
    noisy = levels.signal * x0 + levels.sigma * noise

    def denoised(prediction):
        """noisy and prediction solved for x0, by Cramer's rule."""
        determinant = levels.signal * levels.target_sigma - levels.sigma * levels.target_signal
        return (noisy * levels.target_sigma - levels.sigma * prediction) / determinant

    target = levels.target_signal * x0 + levels.target_sigma * noise
    torch.testing.assert_close(denoised(target), x0)
    torch.testing.assert_close((denoised(target + error) - x0).abs(), error.abs() * levels.to_x0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_right_prediction_denoises_as_diffusers_would(prediction_type):
    reference = sd_schedule(
        DDPMScheduler, {"prediction_type": prediction_type, "clip_sample": False}
    )
    name = {"epsilon": "epsilon", "v_prediction": "v"}[prediction_type]
    x0, noise = normal(0, torch.float64), normal(1, torch.float64)
    noised = objective_of(name).add_noise(x0, noise, QUANTILES.double(), TOKENS)
    for i, timestep in enumerate(noised.timestep):
        step = reference.step(noised.target[i], timestep, noised.noisy[i])
        torch.testing.assert_close(step.pred_original_sample, x0[i], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["flow", "flow, shift 3"])
def test_flow_matching_equals_diffusers_scale_noise(name):
    reference = sd_schedule(*PROCESSES[name][:2])
    x0, noise, count = normal(0), normal(1), reference.config.num_train_timesteps
    # the scheduler knows the sigmas of t = 1/1000, 2/1000, ...
    t = torch.tensor([1, 250, 500, 777, 1000]) / count
    levels = process_of(name).levels(t.clamp(max=1 - 2**-24), TOKENS)
    known = reference.timesteps.flip(0)[[0, 249, 499, 776, 999]]
    torch.testing.assert_close(levels.timestep, known)
    noised = objective_of(name).add_noise(x0, noise, t, TOKENS)
    torch.testing.assert_close(noised.noisy, reference.scale_noise(x0, known, noise))
    torch.testing.assert_close(noised.target, noise - x0)


def calculate_shift(tokens: int, config: dict) -> float:
    """mu as diffusers' pipelines reckon it."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    return calculate_shift(tokens, *(config[key] for key in keys))


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 9216])
def test_the_shift_by_size_equals_diffusers(kind, tokens):
    reference = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.4, max_shift=0.9, max_image_seq_len=8192, time_shift_type=kind,
        shift_terminal=0.1,
    )  # fmt: skip
    mu = calculate_shift(tokens, reference.config)
    t = torch.tensor([0.999, 0.75, 0.5, 0.001], dtype=torch.float64)
    process = process_from_scheduler(config_of(reference), ObjectiveConfig())
    levels = process.levels(t, tokens)
    torch.testing.assert_close(
        levels.sigma, reference.time_shift(mu, 1.0, t)
    )  # shift_terminal is inference's


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_solvers_of_flow_models_are_flow_matching(kind):
    reference = kind(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=8.0)
    process = process_from_scheduler(config_of(reference), ObjectiveConfig())
    assert isinstance(process, Flow)
    reference.set_timesteps(20)
    first, last = (
        sigma / (8 - 7 * sigma) for sigma in reference.sigmas[[0, -2]].double()
    )  # the shift, inverted
    levels = process.levels(
        torch.lerp(first, last, torch.arange(20).double() / 19), TOKENS
    )  # even before the shift
    torch.testing.assert_close(
        levels.sigma.float()[1:], reference.sigmas[1:-1], rtol=1e-4, atol=1e-5
    )
    assert (levels.timestep.long() - reference.timesteps)[1:].abs().max() <= 1


def test_inverted_timesteps_are_those_of_the_loop():
    reference = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    reference.set_timesteps(10)
    process = process_from_scheduler(config_of(reference), ObjectiveConfig())
    # the loop's sigma counts the signal
    levels = process.levels((1 - reference.sigmas[1:-1]).double(), TOKENS)
    torch.testing.assert_close(
        levels.timestep.float(), reference.timesteps[1:], rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("kind", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_edm_equals_diffusers_preconditioning(kind, prediction_type):
    reference = kind(prediction_type=prediction_type, sigma_data=0.7)
    process = process_from_scheduler(
        config_of(reference), ObjectiveConfig(edm_mean=-0.6, edm_std=1.4)
    )
    x0, noise, quantile = (normal(seed, torch.float64, (len(QUANTILES),)) for seed in (0, 1, 2))
    quantile = QUANTILES.double()
    levels = process.levels(quantile, TOKENS)
    sigma = torch.exp(-0.6 + 1.4 * torch.special.ndtri(quantile))
    noisy, target = (
        levels.signal * x0 + levels.sigma * noise,
        levels.target_signal * x0 + levels.target_sigma * noise,
    )
    torch.testing.assert_close(noisy, reference.precondition_inputs(x0 + sigma * noise, sigma))
    torch.testing.assert_close(levels.timestep, reference.precondition_noise(sigma))
    torch.testing.assert_close(
        reference.precondition_outputs(x0 + sigma * noise, target, sigma), x0
    )
    # a network's target has unit variance on data of deviation sigma_data
    torch.testing.assert_close(
        levels.target_signal**2 * 0.49 + levels.target_sigma**2, torch.ones_like(sigma)
    )
    torch.testing.assert_close(levels.to_x0, sigma * 0.7 / (sigma**2 + 0.49).sqrt())


def comfy_levels(alphas_cumprod, u):
    """percent_to_sigma of ComfyUI's ModelSamplingDiscrete and the timestep that its model gets, one u at a time."""
    log_sigmas = (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).log()
    t = (1 - u) * 999.0
    low, high, w = math.floor(t), math.ceil(t), t - math.floor(t)
    log_sigma = (1 - w) * log_sigmas[low] + w * log_sigmas[high]
    return log_sigma.exp().item(), int((log_sigma - log_sigmas).abs().argmin())


def test_continuous_levels_are_those_of_comfyuis_node():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    process = process_of("epsilon, continuous")
    for u in torch.rand(
        200, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).tolist():
        levels = process.levels(torch.tensor([1 - u], dtype=torch.float64), TOKENS)
        sigma, timestep = comfy_levels(alphas, u)
        assert math.isclose((levels.sigma / levels.signal).item(), sigma, rel_tol=2e-6)
        assert levels.timestep.item() == timestep
        assert math.isclose((levels.signal**2 + levels.sigma**2).item(), 1, rel_tol=1e-12)


def test_zero_terminal_snr_leaves_no_signal_and_is_no_epsilon_models():
    for name in ("v, zero terminal SNR", "v, zero terminal SNR asked for"):
        levels = process_of(name).levels(torch.tensor([0.0, 0.9999]), TOKENS)
        assert levels.signal[1] == 0
        assert (levels.sigma[1], levels.target_signal[1], levels.target_sigma[1]) == (1, -1, 0)
        assert levels.signal[0] == process_of("v").levels(torch.tensor([0.0]), TOKENS).signal[0]
    epsilon = config_of(sd_schedule(DDPMScheduler, {}))
    with pytest.raises(ValueError, match="zero terminal SNR"):
        process_from_scheduler(epsilon, ObjectiveConfig(zero_terminal_snr=True))
    both = ObjectiveConfig(zero_terminal_snr=True, prediction_type="v_prediction")
    assert process_from_scheduler(epsilon, both).prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("epsilon", {"shift": 2.0, "edm_std": 1.0}, ["DDPM", "--objective.shift 2.0: ", "--objective.edm_std 1.0: "]),
        ("flow", {"prediction_type": "epsilon", "continuous_timesteps": True, "zero_terminal_snr": True},
         ["flow matching", "prediction_type epsilon: ", "continuous_timesteps True: ", "zero_terminal_snr True: "]),
        ("EDM", {"shift": 2.0, "continuous_timesteps": True}, ["EDM", "shift 2.0: ", "continuous_timesteps True: "]),
    ],
)  # fmt: skip
def test_options_that_a_process_has_no_use_for_are_refused_all_at_once(name, options, words):
    with pytest.raises(ModelError) as caught:
        process_of(name, **options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", [DDPMScheduler, EDMDPMSolverMultistepScheduler])
def test_an_unknown_prediction_type_is_refused(kind):
    config = {**config_of(sd_schedule(kind, {})), "prediction_type": "sample"}
    with pytest.raises(ValueError, match="sample"):
        process_from_scheduler(config, ObjectiveConfig())


def test_the_prediction_type_can_be_overridden():
    config = config_of(sd_schedule(DDPMScheduler, {}))
    assert process_from_scheduler(
        config, ObjectiveConfig(prediction_type="v_prediction")
    ).prediction_type == ("v_prediction")
