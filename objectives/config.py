"""The `objective` section of the config. Importing it imports no torch, because `--help` reads it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field

from common.config_fields import STRICT
from common.errors import counted
from objectives import DENSITIES, LOSSES, WEIGHTINGS

if TYPE_CHECKING:
    DensityName = str
    WeightingName = str
else:
    DensityName, WeightingName = (Literal[tuple(names)] for names in (DENSITIES, WEIGHTINGS))


@dataclass(frozen=True)
class PreserveConfig:
    """Preservation: the adapted model is also trained to predict what the frozen base predicts for
    neutral prompts, so that what is not trained stays."""

    __pydantic_config__ = STRICT

    weight: Annotated[float, Field(ge=0)] = 0.0
    """Factor on the mean squared difference from the base's prediction. 0: off."""
    every: Annotated[int, Field(ge=1)] = 1
    """Do this in every so many steps."""
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = ("",)
    """Neutral prompts. Each batch draws one: the class without the trigger, such as "a photo of a dog".
    An empty text is the empty prompt."""
    class_word: str = ""
    """Use the captions of the batch instead of `prompts`, with this class instead of
    data.captions.trigger: "a dog in the snow" for "sks in the snow" and the class "a dog"."""


class SliderPrompts(NamedTuple):
    """The prompts of one target of a slider."""

    target: str
    positive: str
    negative: str


@dataclass(frozen=True)
class SliderConfig:
    """A slider: an adapter for the difference between two prompts. It needs no images.

    The adapted model learns to predict for a target what the base predicts for it, plus the
    difference between the base's predictions for the positive and the negative prompt."""

    __pydantic_config__ = STRICT

    targets: tuple[str, ...] = ()
    """Prompts that the slider changes, such as "a photo of a person". Each batch draws one. Empty:
    no slider."""
    positives: tuple[str, ...] = ()
    """For each target, the prompt to which strength 1 leads: "a photo of a very old person"."""
    negatives: tuple[str, ...] = ()
    """For each target, the prompt from which strength 1 leads away: "a photo of a very young
    person". To remove a concept, name it here and in targets, and its replacement in positives."""
    scale: Annotated[float, Field(gt=0)] = 2.0
    """Factor on the difference. 1 leads from the negative to the positive prompt; more exaggerates."""
    both_directions: bool = True
    """Train half of the batches at strength -1, with the opposite difference. Off: strength 1 only,
    as for removing a concept."""
    start_from: Literal["noise", "images"] = "noise"
    """noise: draw with the adapted model down to the noise level of the batch, without any image.
    images: add noise to the images of `data`, which is faster. Their captions are not used."""
    denoising_steps: Annotated[int, Field(ge=1)] = 10
    """start_from noise: steps from pure noise to the noise level of the batch."""
    guidance: Annotated[float, Field(ge=1)] = 3.0
    """start_from noise: classifier-free guidance of these steps. 1: none, for models that are
    distilled for guidance (FLUX.1) or for few steps."""

    @property
    def prompts(self) -> list[SliderPrompts]:
        """Return the prompts of each target. Their numbers are checked beforehand."""
        columns = (self.targets, self.positives, self.negatives)
        return [SliderPrompts(*texts) for texts in zip(*columns, strict=False)]

    @property
    def needs_no_images(self) -> bool:
        """Return whether this is a slider that is trained without images."""
        return bool(self.targets) and self.start_from == "noise"

    @property
    def uses_guidance(self) -> bool:
        """Return whether the steps from noise have classifier-free guidance."""
        return self.needs_no_images and self.guidance > 1


@dataclass(frozen=True)
class ObjectiveConfig:
    """Timestep sampling, target, loss weighting and noise.

    An option without effect on this model, or with these other options, is an error."""

    __pydantic_config__ = STRICT

    loss_space: Literal["prediction", "x0"] = "prediction"
    """prediction: compare the model's own output (noise or velocity). x0: compare the denoised
    latents, as ComfyUI's node does; this gives noisy samples far more weight."""
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """Overrides the prediction type in the model's scheduler config, for models whose config is
    wrong. auto: as in the config. Not for flow matching."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that the last timestep is pure noise (Lin et al. 2024), for a
    base model that was trained this way and whose config does not say so. For v_prediction only."""
    continuous_timesteps: bool = False
    """Sample sigma between the timesteps too, evenly in its logarithm; the model gets the nearest
    timestep. As in ComfyUI's node. For epsilon and v_prediction."""
    shift: Annotated[float, Field(gt=0)] | None = None
    """Flow matching: the factor a of sigma = a t / (1 + (a - 1) t). None: as in the model's
    scheduler config, where it may depend on the image size."""
    edm_mean: float = -1.2
    """EDM: mean of ln sigma, which is normally distributed (P_mean)."""
    edm_std: Annotated[float, Field(gt=0)] = 1.2
    """EDM: standard deviation of ln sigma (P_std)."""
    timestep_sampling: DensityName = "uniform"
    """Distribution of the noise level t in (0, 1), before the shift. logit-normal, mode and cosmap
    are those of Stable Diffusion 3 (Esser et al. 2024). For DDPM, t is timestep / timesteps; for
    EDM, t is the quantile of sigma."""
    logit_mean: float = 0.0
    """logit-normal: mean of ln(t / (1 - t)). Above 0, noisy levels are more frequent."""
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    """logit-normal: standard deviation of ln(t / (1 - t))."""
    mode_scale: Annotated[float, Field(ge=-1, le=1.75)] = 1.29
    """mode: above 0, middle levels are more frequent; below 0, the two ends are. 0 is uniform."""
    beta_a: Annotated[float, Field(ge=0.1, le=100)] = 2.0
    """beta: first parameter. The larger, the more frequent noisy levels are."""
    beta_b: Annotated[float, Field(ge=0.1, le=100)] = 2.0
    """beta: second parameter. The larger, the more frequent clean levels are."""
    timestep_range: tuple[
        Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]
    ] = (0.0, 1.0)
    """Lowest and highest t in training; the distribution is truncated there. Validation uses all
    levels."""
    stratified_timesteps: bool = False
    """Spread the noise levels of a step evenly over all its samples, of all processes, instead of
    drawing each one independently. The gradient varies less."""
    loss_weighting: WeightingName = "none"
    """Weight of a noise level in the loss, the same for every prediction type (docs/training.md).
    none: errors count equally in the loss_space."""
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    """min-snr: largest weight of a squared error of the denoised latents."""
    p2_k: Annotated[float, Field(gt=0)] = 1.0
    """p2: the k of 1 / (k + snr)^gamma."""
    p2_gamma: Annotated[float, Field(ge=0)] = 1.0
    """p2: the exponent gamma. 0 is no weighting for epsilon."""
    huber_delta: Annotated[float, Field(gt=0)] = 1.0
    """Huber, SmoothL1, pseudo-Huber: the error at which the loss changes from quadratic to linear.
    """
    huber_schedule: Literal["constant", "exponential", "snr"] = "constant"
    """huber_delta by noise level, as in kohya's scripts. exponential: huber_delta^t, from 1 (clean)
    to huber_delta. snr: (1 - huber_delta) / (1 + noise / signal)^2 + huber_delta."""
    noise_offset: Annotated[float, Field(ge=0)] = 0.0
    """Add a normal random number times this factor to all noise of a channel. The variance of the
    noise becomes 1 + noise_offset^2."""
    multires_noise_iterations: Annotated[int, Field(ge=0, le=16)] = 0
    """Add noise of this many lower resolutions (pyramid noise), scaled back to variance 1. 0: off.
    """
    multires_noise_discount: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Multi-resolution noise: strength of each resolution relative to the next higher one."""
    input_perturbation: Annotated[float, Field(ge=0)] = 0.0
    """Add this much more noise to the model's input, but not to its target (Ning et al. 2023 use
    0.1)."""
    preserve: PreserveConfig = field(default_factory=PreserveConfig)
    slider: SliderConfig = field(default_factory=SliderConfig)


DELTA_LOSSES = tuple(name for name, loss in LOSSES.items() if loss.delta_power is not None)
"""Values of `loss_function` with a delta."""
REQUIRED_CHOICE: dict[str, tuple[str, str]] = {
    "logit_mean": ("timestep_sampling", "logit-normal"),
    "logit_std": ("timestep_sampling", "logit-normal"),
    "mode_scale": ("timestep_sampling", "mode"),
    "beta_a": ("timestep_sampling", "beta"),
    "beta_b": ("timestep_sampling", "beta"),
    "min_snr_gamma": ("loss_weighting", "min-snr"),
    "p2_k": ("loss_weighting", "p2"),
    "p2_gamma": ("loss_weighting", "p2"),
}
"""Option -> the other option, and its value, without which it has no effect."""


def changed_options(config: ObjectiveConfig, names: Iterable[str]) -> list[str]:
    """Return those of the options `names` that differ from their default."""
    defaults = ObjectiveConfig()
    return [name for name in names if getattr(config, name) != getattr(defaults, name)]


def objective_errors(config: ObjectiveConfig, loss_function: str) -> list[str]:
    """Return the errors of the section that do not depend on the model, one line each."""
    requirements = unmet_requirements(config, loss_function)
    errors = [
        f"--objective.{name} {getattr(config, name)}: has no effect without {requirements[name]}"
        for name in changed_options(config, requirements)
    ]
    errors += preserve_errors(config)
    errors += slider_errors(config.slider)
    if config.slider.needs_no_images and config.input_perturbation:
        errors.append(
            f"--objective.input_perturbation {config.input_perturbation:g}: has no effect with "
            "--objective.slider.start_from noise, whose latents are drawn by the model"
        )
    low, high = config.timestep_range
    if low >= high:
        errors.append(
            f"--objective.timestep_range {low:g} {high:g}: expected the lower level first"
        )
    return errors


def preserve_errors(config: ObjectiveConfig) -> list[str]:
    """Return the errors of `objective.preserve`."""
    preserve = config.preserve
    errors = []
    if not preserve.weight and preserve != PreserveConfig():
        errors.append(
            "--objective.preserve: its options have no effect without --objective.preserve.weight"
        )
    if preserve.class_word and not preserve.class_word.strip():
        errors.append("--objective.preserve.class_word: is blank. Name the class, such as a dog")
    if preserve.class_word and preserve.prompts != PreserveConfig().prompts:
        errors.append(
            "--objective.preserve.prompts: have no effect with --objective.preserve.class_word. "
            "Remove one of them"
        )
    if preserve.weight and config.slider.needs_no_images:
        errors.append(
            f"--objective.preserve.weight {preserve.weight:g}: needs images, and "
            "--objective.slider.start_from noise has none. Use --objective.slider.start_from images"
        )
    return errors


def slider_errors(slider: SliderConfig) -> list[str]:
    """Return the errors of `objective.slider`."""
    if not slider.targets:
        if slider == SliderConfig():
            return []
        return ["--objective.slider: its options have no effect without --objective.slider.targets"]
    errors = []
    num_targets = len(slider.targets)
    for name in ("positives", "negatives"):
        texts = getattr(slider, name)
        if len(texts) != num_targets:
            errors.append(
                f"--objective.slider.{name}: {counted(len(texts), 'prompt')}; expected one for each "
                f"of {counted(num_targets, 'target')}"
            )
    for prompts in slider.prompts:
        if prompts.positive == prompts.negative:
            errors.append(
                f"--objective.slider: the positive and the negative prompt of {prompts.target!r} are "
                "equal, so there is nothing to learn. Use different prompts"
            )
    if slider.start_from == "images":
        defaults = SliderConfig()
        for name in ("denoising_steps", "guidance"):
            if getattr(slider, name) != getattr(defaults, name):
                errors.append(
                    f"--objective.slider.{name} {getattr(slider, name)}: has no effect with "
                    "--objective.slider.start_from images"
                )
    return errors


def unmet_requirements(config: ObjectiveConfig, loss_function: str) -> dict[str, str]:
    """Return the options that have no effect, each with what it requires."""
    requirements = {
        name: f"--objective.{choice} {value}; it is {getattr(config, choice)}"
        for name, (choice, value) in REQUIRED_CHOICE.items()
        if getattr(config, choice) != value
    }
    if loss_function not in DELTA_LOSSES:
        losses = f"{', '.join(DELTA_LOSSES[:-1])} or {DELTA_LOSSES[-1]}"
        needed = f"--loss_function {losses}; it is {loss_function}"
        requirements |= {"huber_delta": needed, "huber_schedule": needed}
    elif config.huber_delta == 1:
        requirements["huber_schedule"] = "--objective.huber_delta other than 1"
    if not config.multires_noise_iterations:
        requirements["multires_noise_discount"] = "--objective.multires_noise_iterations"
    return requirements
