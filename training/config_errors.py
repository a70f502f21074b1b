"""Errors in the options of a run that their types cannot say. No file is opened, and torch is not
imported."""

import importlib.util
from pathlib import Path

from common.hub import repo_error
from data.config import DataConfig
from models.config import assistant_error, is_hub_id, path_error, text_encoder_errors
from objectives.config import objective_errors
from training.config import TrainConfig
from training.sampling.prompts import prompt_errors

OTHER_PACKAGES = {"tensorboard": ("tensorboardX",)}  # that trackers work with too


def config_errors(config: TrainConfig) -> list[str]:
    """Return all errors in the options."""
    return [
        *path_errors(config),
        *output_errors(config),
        *objective_errors(config.objective, config.loss_function),
    ]


def path_errors(config: TrainConfig) -> list[str]:
    """Return the errors in the paths of a config. No file is opened."""
    errors = input_errors(config)
    errors += folder_errors("output_dir", config.output_dir)
    errors += output_dir_errors(config.data, config.output_dir)
    errors += missing_path_errors("existing_lora", config.existing_lora)
    strength = config.sample.assistant_strength
    if strength and config.model.assistant_lora is None:
        errors.append(
            f"--sample.assistant_strength {strength:g}: has no effect without --model.assistant_lora"
        )
    error = assistant_error(config.model)
    if error:
        errors.append(f"--model.assistant_lora{error}")
    errors += missing_path_errors("sample.score_model", config.sample.score_model)
    has_text_rate = config.optim.text_encoder_learning_rate is not None
    if has_text_rate and not config.model.train_text_encoder:
        errors.append(
            "--optim.text_encoder_learning_rate: has no effect without --model.train_text_encoder"
        )
    return errors


def output_errors(config: TrainConfig) -> list[str]:
    """Return the errors in the options of samples, trackers and the Hub."""
    errors = prompt_errors(config.sample)
    tracker = config.tracking.report_to
    packages = [tracker, *OTHER_PACKAGES.get(tracker, ())]
    if tracker != "none" and not any(map(importlib.util.find_spec, packages)):
        errors.append(
            f"--tracking.report_to {tracker}: the package {tracker} is not installed. Use pip "
            f"install {tracker}"
        )
    if config.tracking.artifacts and tracker != "wandb":
        errors.append(
            "--tracking.artifacts: only W&B stores artifacts. Also set --tracking.report_to wandb"
        )
    formats = config.export.formats
    for name in sorted(set(formats)):
        if formats.count(name) > 1:
            errors.append(
                f"--export.formats {' '.join(formats)}: {name} is repeated. Name each format once"
            )
    if config.sample.grid and not config.export.every:
        errors.append(
            f"--sample.grid {config.sample.grid}: needs exported steps. Also set --export.every"
        )
    repo = config.hub.push
    if repo is not None:
        error = repo_error(repo)
        if error:
            errors.append(f"--hub.push {repo}: {error}")
    return errors


def output_dir_errors(data: DataConfig, path: str) -> list[str]:
    """Return an error if a run would write its files into a folder of images."""
    output_dir = Path(path).resolve()
    errors = []
    for flag, source in source_paths(data).items():
        if source is not None and output_dir.is_relative_to(Path(source).resolve()):
            errors.append(
                f"--output_dir {path}: is in the folder of --{flag}, so its pictures would become "
                "training images. Choose a folder outside of it"
            )
    return errors


def input_errors(config: TrainConfig) -> list[str]:
    """Return the errors in the paths of the model and of the data."""
    model, data = config.model, config.data
    errors = []
    error = path_error(model)
    if error:
        errors.append(f"--model.path{error}")
    errors += missing_path_errors("model.vae", model.vae)
    if model.config is not None and not is_hub_id(model.config):
        errors += missing_path_errors("model.config", model.config)
    for error in text_encoder_errors(model):
        errors.append(f"--model.text_encoders {error}")
    errors += source_errors(data)
    errors += missing_data_errors(config)
    errors += class_word_errors(config)
    if data.validation_path is not None and data.validation_fraction:
        errors.append(
            "--data.validation_fraction: cannot be used together with --data.validation_path. "
            "Choose one"
        )
    errors += folder_errors("data.cache_dir", data.cache_dir)
    return errors


def missing_path_errors(flag: str, path: str | None) -> list[str]:
    """Return an error if a path is set and does not exist."""
    if path is None or Path(path).exists():
        return []
    return [f"--{flag} {path}: does not exist. Check the path"]


def folder_errors(flag: str, path: str) -> list[str]:
    """Return an error if a path exists and is not a folder."""
    folder = Path(path)
    if folder.is_dir():
        return []
    if not folder.exists():
        return []
    return [f"--{flag} {path}: exists and is not a folder"]


def source_errors(data: DataConfig) -> list[str]:
    """Return the errors in the paths of the data."""
    errors = []
    for flag, path in source_paths(data).items():
        if path is not None and not Path(path).is_dir() and not is_hub_id(path):
            errors.append(f"--{flag} {path}: is not a folder. Check the path")
    for flag, paths in control_paths(data).items():
        for path in paths:
            if not Path(path).is_dir():
                errors.append(f"--{flag} {path}: is not a folder. Check the path")
    return errors


def missing_data_errors(config: TrainConfig) -> list[str]:
    """Return errors if there are no training images, or images that are not used."""
    data, slider = config.data, config.objective.slider
    if not slider.needs_no_images:
        if data.path is not None or data.sources:
            return []
        return ["--data.path: no training images given. Name a folder of images with caption files"]
    names = ("path", "sources", "validation_path")
    unused = [f"--data.{name}" for name in names if getattr(data, name)]
    if not unused:
        return []
    return [
        f"{' and '.join(unused)}: not used with --objective.slider.start_from noise, which needs no "
        "images. Remove the option, or use --objective.slider.start_from images"
    ]


def class_word_errors(config: TrainConfig) -> list[str]:
    """Return an error if a class is to replace a trigger that does not exist."""
    preserve = config.objective.preserve
    class_word = preserve.class_word
    if not class_word or not preserve.weight:
        return []
    triggers = {source.captions.trigger.strip() for source in config.data.all_sources()} - {""}
    if not triggers:
        return [
            f"--objective.preserve.class_word {class_word}: replaces --data.captions.trigger, which is "
            "not set. Set it if captions are not encoded yet, or use --objective.preserve.prompts"
        ]
    return [
        f"--objective.preserve.class_word {class_word}: contains the trigger {trigger!r}, so it would "
        "preserve what is trained. Name the class alone"
        for trigger in sorted(triggers)
        if trigger in class_word
    ]


def source_paths(data: DataConfig) -> dict[str, str | None]:
    """Return the path of each source of samples, by its option."""
    paths = {
        "data.path": data.path,
        "data.validation_path": data.validation_path,
    }
    for index, source in enumerate(data.sources):
        flag = f"data.sources.{index}.path"
        paths[flag] = source.path
    return paths


def control_paths(data: DataConfig) -> dict[str, tuple[str, ...]]:
    """Return the folders with control images, by their option."""
    paths = {
        "data.control_paths": data.control_paths or (),
        "data.validation_control_paths": data.validation_control_paths or (),
    }
    for index, source in enumerate(data.sources):
        paths[f"data.sources.{index}.control_paths"] = source.control_paths or ()
    return paths
