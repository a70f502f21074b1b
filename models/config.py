"""The `model` and `objective` sections of the config. No torch here: `--help` reads them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import ConfigDict, Field

from models import FAMILIES

if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[tuple(FAMILIES)]

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ModelError(ValueError):
    """A path that is not a model of the family, or a model that cannot be had."""


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    __pydantic_config__ = STRICT

    path: str | None = None
    """A diffusers folder, a hub id (owner/name), or a single .safetensors file: a checkpoint, or the denoiser alone."""
    family: FamilyName | None = None
    """The model's family; None: recognised. Another one than the model is of is refused. sd15 is Stable Diffusion 1.x
    and 2.x, sd3 is 3 and 3.5, wan is Wan 2.1 and 2.2 of text, wan_i2v of an image."""
    variant: str | None = None
    """Weight variant of a diffusers folder or hub id, such as fp16."""
    config: str | None = None
    """For a single .safetensors file: a diffusers folder or hub id that holds the configuration and the tokenizers, and
    the text encoders and VAE if the file has none."""
    train_text_encoder: bool = False
    """Adapt the CLIP text encoders too (Stable Diffusion 1, 2 and XL): captions are then encoded in every step, not
    once before training. Their layers' names begin with text_encoder."""
    vae: str | None = None
    """A VAE in place of the model's own: a .safetensors file or a folder of diffusers."""
    text_encoders: tuple[str, ...] = ()
    """Text encoders in place of the model's own, or for a file without any: .safetensors files as in ComfyUI's
    text_encoders folder. Which one each is, is recognised; configuration and tokenizer are those of `config`."""
    guidance: Annotated[float, Field(ge=0)] | None = None
    """The guidance that a guidance-distilled model (FLUX.1 dev, FLUX.2 dev) is told in training; None: 1. Previews have
    their own."""
    expert: Literal["high", "low"] | None = None
    """Of a model with two denoisers (Wan 2.2 A14B), the one that is trained, within its noise levels: the one for high
    noise or the one for low noise. None: the one for high noise, and of a single file, which holds either, an error. An
    adapter of each is trained in a run of its own."""


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


def is_hub_id(path: str) -> bool:
    """Whether it can only be the name of something on the hub: owner/name, where there is no folder `owner` here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path)) and not Path(path).parent.exists()


def text_encoder_faults(config: ModelConfig) -> list[str]:
    """What is wrong with the names of `config.text_encoders`."""
    faults = []
    for path in map(Path, config.text_encoders):
        if path.is_file() and path.suffix != ".safetensors":
            faults.append(f"{path} is a {path.suffix or 'nameless'} file; only .safetensors files are read")
        elif not path.is_file():
            faults.append(f"{path} {'is a folder: name the files in it' if path.is_dir() else 'does not exist'}")
    return faults


def path_fault(config: ModelConfig) -> str | None:
    """Why `config.path` cannot be a model, or None; looks at names only, so that a typo is found before torch loads."""
    if config.path is None:
        return "no model given. Name a diffusers folder, a hub id or a single .safetensors file"
    path = Path(config.path)
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return None
        return f"{config.path} is a folder without model_index.json, so not a diffusers model"
    if path.is_file():
        if path.suffix == ".safetensors":
            return None
        return f"{config.path} is a {path.suffix or 'nameless'} file; only .safetensors checkpoints are read"
    if is_hub_id(config.path) and path.suffix != ".safetensors":
        return None  # a hub id: asked when the model is loaded
    return f"{config.path} does not exist"
