"""diffusers schedulers: the noise process that a config describes, and the scheduler for previews.

A config is a dict with the scheduler's `_class_name`, as in a model's scheduler_config.json.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import diffusers
from diffusers import DDIMScheduler, DDPMScheduler

from common.errors import ModelError, error_list
from objectives.config import ObjectiveConfig, changed_options
from objectives.processes import DDPM, EDM, Flow, NoiseProcess, Shift

V_PREDICTION = {"prediction_type": "v_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""Sampling must begin with the last timestep then (Lin et al. 2024, section 3.3)."""


def process_from_scheduler(config: Mapping[str, Any], options: ObjectiveConfig) -> NoiseProcess:
    """Return the noise process of a model with this scheduler, changed by the options.

    Raises ValueError for a scheduler that no process matches, ModelError for options without effect
    on the process."""
    process_class = process_class_of(config)
    check_options(process_class, options)
    prediction_type = config.get("prediction_type", "epsilon")
    if options.prediction_type != "auto":
        prediction_type = options.prediction_type
    if process_class is EDM:
        sigma_data = config.get("sigma_data", 0.5)
        return EDM(prediction_type, sigma_data, options.edm_mean, options.edm_std)
    if process_class is Flow:
        num_timesteps = config.get("num_train_timesteps", 1000)
        is_inverted = config.get("invert_sigmas", False)
        return Flow(shift_of_scheduler(config, options), num_timesteps, is_inverted)
    return ddpm_from_scheduler(config, prediction_type, options)


def process_class_of(config: Mapping[str, Any]) -> type[NoiseProcess]:
    """Return the class of the noise process that a scheduler config describes."""
    class_name = str(config.get("_class_name", ""))
    if class_name.startswith("EDM"):
        return EDM
    if class_name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return Flow
    if config.get("prediction_type") == "flow_prediction":
        return Flow
    return DDPM


def check_options(process_class: type[NoiseProcess], options: ObjectiveConfig) -> None:
    """Raise ModelError for options that belong to other noise processes."""
    other_options: set[str] = set()
    for other_class in (DDPM, Flow, EDM):
        other_options |= set(other_class.supported_options)
    other_options -= set(process_class.supported_options)
    errors = [
        f"--objective.{name} {getattr(options, name)}: has no effect on {process_class.name}, "
        "the model's noise process"
        for name in changed_options(options, sorted(other_options))
    ]
    if errors:
        raise ModelError(error_list("the objective does not fit the model", errors))


def ddpm_from_scheduler(
    config: Mapping[str, Any], prediction_type: str, options: ObjectiveConfig
) -> DDPM:
    """Return DDPM with the betas of a scheduler config."""
    changes = ZERO_SNR if options.zero_terminal_snr else {}
    scheduler = DDPMScheduler.from_config(dict(config), **changes)
    if options.continuous_timesteps:
        # ComfyUI, which the interpolation between timesteps follows, multiplies in fp64
        alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    else:
        alphas_cumprod = scheduler.alphas_cumprod
    return DDPM(alphas_cumprod, prediction_type, options.continuous_timesteps)


def shift_of_scheduler(config: Mapping[str, Any], options: ObjectiveConfig) -> Shift:
    """Return the shift of a flow-matching scheduler, with diffusers' defaults, or the option's."""
    if options.shift is not None:
        return Shift(options.shift)
    if config.get("use_flow_sigmas") or "flow_shift" in config:
        return Shift(config.get("flow_shift", 1.0))
    return Shift(
        constant=config.get("shift", 1.0),
        low=(config.get("base_image_seq_len", 256), config.get("base_shift", 0.5)),
        high=(config.get("max_image_seq_len", 4096), config.get("max_shift", 1.15)),
        dynamic=config.get("use_dynamic_shifting", False),
        exponential=config.get("time_shift_type", "exponential") == "exponential",
    )


def scheduler_from_config(config: Mapping[str, Any]) -> Any:
    """Return diffusers' scheduler of a config.

    It is DDIMScheduler if the config has zero terminal SNR and the named class does not support
    it."""
    scheduler_class = getattr(diffusers, config["_class_name"])
    parameters = signature(scheduler_class.__init__).parameters
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in parameters:
        scheduler_class = DDIMScheduler
    return scheduler_class.from_config(dict(config))


def override_scheduler(pipeline: Any, options: ObjectiveConfig) -> Any:
    """Apply the options that correct a model's scheduler config to a pipeline, and return it.

    These are prediction_type and zero_terminal_snr: images must be sampled as was trained."""
    changes: dict[str, Any] = {}
    if options.prediction_type != "auto":
        changes["prediction_type"] = options.prediction_type
    if options.zero_terminal_snr:
        changes |= ZERO_SNR
    if changes:
        class_name = type(pipeline.scheduler).__name__
        config = {**pipeline.scheduler.config, "_class_name": class_name, **changes}
        pipeline.scheduler = scheduler_from_config(config)
    return pipeline
