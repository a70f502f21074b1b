"""The `objective` section of the config."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from common.strict import STRICT


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is trained for: how noise levels are drawn, what the loss compares, how it is weighted, what the noise is.

    An option that the model or the other choices have no use for is refused."""

    __pydantic_config__ = STRICT

    loss_space: Literal["prediction", "x0"] = "prediction"
    """prediction: the model's own target (noise or velocity). x0: the denoised latents, as ComfyUI's node does, which
    weights noisy samples far more."""
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the base predicts, if its scheduler says it wrongly; not for flow matching. auto: what it says."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that the last timestep is pure noise (Lin et al. 2024), for a base that was trained
    so and whose scheduler does not say it; v_prediction only."""
    continuous: bool = False
    """Draw sigma between the timesteps too, evenly in its logarithm from one to the next; the model is given the
    nearest timestep. As ComfyUI's node does; for epsilon and v_prediction."""
    shift: Annotated[float, Field(gt=0)] | None = None
    """Flow matching: sigma = a t / (1 + (a - 1) t) with this a. None: what the model's scheduler has, which may depend
    on the image's size."""
    edm_mean: float = -1.2
    """EDM: mean of ln sigma, which is normally distributed (P_mean)."""
    edm_std: Annotated[float, Field(gt=0)] = 1.2
    """EDM: standard deviation of ln sigma (P_std)."""
    density: Literal["uniform", "logit-normal", "mode", "cosmap", "beta"] = "uniform"
    """How the noise level t in (0, 1), before any shift, is distributed. logit-normal, mode and cosmap are those of
    Stable Diffusion 3 (Esser et al. 2024). In DDPM t is timestep / timesteps, in EDM the quantile of sigma."""
    logit_mean: float = 0.0
    """logit-normal: mean of ln(t / (1 - t)); above 0 favours noise."""
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    """logit-normal: standard deviation of ln(t / (1 - t))."""
    mode_scale: Annotated[float, Field(ge=-1, le=1.75)] = 1.29
    """mode: above 0 favours the middle, below 0 the ends; 0 is uniform."""
    beta_a: Annotated[float, Field(ge=0.1, le=100)] = 2.0
    """beta: first parameter; larger favours noise."""
    beta_b: Annotated[float, Field(ge=0.1, le=100)] = 2.0
    """beta: second parameter; larger favours clean images."""
    level_range: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Lowest and highest t: the density is cut off there. Validation is not."""
    stratified: bool = False
    """Spread the noise levels of each step evenly over all its samples, on all ranks, instead of drawing each by
    itself: the gradient varies less."""
    weighting: Literal["none", "min-snr", "debiased", "p2", "sigma2", "inverse-sigma2", "cosmap"] = "none"
    """Weight of a noise level in the loss, the same for every kind of prediction: docs/objectives.md. none: errors
    count the same in the loss_space."""
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    """min-snr: the largest weight of a squared error of the denoised latents."""
    p2_k: Annotated[float, Field(gt=0)] = 1.0
    """p2: 1 / (k + snr)^gamma."""
    p2_gamma: Annotated[float, Field(ge=0)] = 1.0
    """p2: the exponent; 0 is no weighting for epsilon."""
    huber_delta: Annotated[float, Field(gt=0)] = 1.0
    """Huber, SmoothL1, pseudo-Huber: the error at which the loss turns from quadratic to linear."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "constant"
    """How huber_delta depends on the noise level. exponential: from 1 (clean) to huber_delta, as huber_delta^t. snr:
    (1 - huber_delta) / (1 + noise / signal)^2 + huber_delta. Both as in kohya's scripts."""
    noise_offset: Annotated[float, Field(ge=0)] = 0.0
    """Add so much of one more normal number per channel to all of its noise; the noise's variance becomes
    1 + noise_offset^2."""
    multires_iterations: Annotated[int, Field(ge=0, le=16)] = 0
    """Add noise of so many lower resolutions (pyramid noise), scaled back to variance 1; 0 none."""
    multires_discount: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Multi-resolution noise: strength of each resolution as a fraction of the one before."""
    input_perturbation: Annotated[float, Field(ge=0)] = 0.0
    """Add so much more noise to what the model sees, not to what it should answer (Ning et al. 2023, who take 0.1)."""


DELTA_LOSSES = ("Huber", "SmoothL1", "pseudo-Huber")
"""Values of `loss_function` that have a delta."""


USED_WITH: dict[str, tuple[str, str]] = {
    "logit_mean": ("density", "logit-normal"),
    "logit_std": ("density", "logit-normal"),
    "mode_scale": ("density", "mode"),
    "beta_a": ("density", "beta"),
    "beta_b": ("density", "beta"),
    "min_snr_gamma": ("weighting", "min-snr"),
    "p2_k": ("weighting", "p2"),
    "p2_gamma": ("weighting", "p2"),
}
"""Option -> the choice, and its value, without which it says nothing."""


def changed(config: ObjectiveConfig, names: Iterable[str]) -> list[str]:
    """Those of the options `names` that are not at their default."""
    plain = ObjectiveConfig()
    return [name for name in names if getattr(config, name) != getattr(plain, name)]


def objective_faults(config: ObjectiveConfig, loss_function: str) -> list[str]:
    """What is wrong in the `objective` section, whatever the model: one line each."""
    reasons = {
        name: f"{choice} {value}, but {choice} is {getattr(config, choice)}"
        for name, (choice, value) in USED_WITH.items()
        if getattr(config, choice) != value
    }
    if loss_function not in DELTA_LOSSES:
        needed = f"loss_function {', '.join(DELTA_LOSSES[:-1])} or {DELTA_LOSSES[-1]}, but it is {loss_function}"
        reasons |= {"huber_delta": needed, "huber_schedule": needed}
    elif config.huber_delta == 1:
        reasons["huber_schedule"] = "a huber_delta other than 1, which is the same at every noise level"
    if not config.multires_iterations:
        reasons["multires_discount"] = "multires_iterations"
    faults = [
        f"--objective.{name} = {getattr(config, name)}: only used with {reasons[name]}"
        for name in changed(config, reasons)
    ]
    low, high = config.level_range
    if low >= high:
        faults.append(f"--objective.level_range = {low:g} {high:g}: the first must be the smaller one")
    return faults
