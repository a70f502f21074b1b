"""Reads the config: defaults < recipe YAML < command line. All errors are reported at once. Imports
no torch."""

import difflib
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
import yaml
from pydantic import ValidationError

from common.errors import ConfigError, error_list
from data.config import DataConfig
from models.config import is_hub_id, path_error, text_encoder_errors
from objectives.config import objective_errors
from training.config import SCHEMA, TrainConfig

Parsed = TypeVar("Parsed")
PROJECT = Path(__file__).resolve().parent.parent
COMMAND_NAMES = ("data", "export-dataset", "inspect", "convert", "merge", "resize", "extract")
PROGRAM = f"train_lora.py [RECIPE | {' | '.join(COMMAND_NAMES)}]"
DEMO_RECIPE = PROJECT / "recipes" / "demo.yaml"
MAX_ERRORS = 100


def load_config(argv: list[str] | None = None) -> TrainConfig:
    """Return the config of `[recipe.yaml] [--option value ...]`. `argv`: None means the command
    line.

    Raises ConfigError naming all errors. tyro ends the program with exit code 2 for wrong names and types on the
    command line."""
    config = parse_options(
        list(sys.argv[1:] if argv is None else argv), lambda config: config, PROGRAM
    )
    config = validate_options(asdict(config), source="the command line", prefix="--")
    errors = path_errors(config) + objective_errors(config.objective, config.loss_function)
    if errors:
        raise ConfigError(error_list("cannot start", errors, MAX_ERRORS))
    return config


def parse_options(argv: list[str], make: Callable[[TrainConfig], Parsed], program: str) -> Parsed:
    """Parse options after an optional recipe. `make`: builds the object to fill from the defaults.

    Without a recipe, a model and data, the demo's recipe is used. `--help`, and tyro's messages about mistakes, then
    still show the options' own defaults."""
    recipe = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    arguments = normalized_arguments(argv if recipe is None else argv[1:])
    errors = list_option_errors(arguments)
    if errors:
        raise ConfigError(error_list("the command line", errors, MAX_ERRORS))

    def parse_over(defaults: TrainConfig) -> Parsed:
        instance = make(defaults)
        return tyro.cli(
            type(instance), default=instance, args=arguments, use_underscores=True, prog=program
        )

    if recipe is not None:
        return parse_over(read_recipe(recipe))
    parsed = parse_over(TrainConfig())
    names_model_or_data = any(
        argument.startswith(("--model.path", "--data.path")) for argument in arguments
    )
    return parsed if names_model_or_data else parse_over(read_recipe(DEMO_RECIPE))


def read_recipe(path: Path) -> TrainConfig:
    """Return the config in a YAML file. `{project}` in a text stands for the folder of
    train_lora.py."""
    if not path.is_file():
        recipes = ", ".join(sorted(file.name for file in DEMO_RECIPE.parent.glob("*.yaml")))
        raise ConfigError(
            f"{path} is not a file; expected a recipe (a YAML file, such as recipes/{DEMO_RECIPE.name}) or a command. "
            f"The recipes are {recipes}. The commands are {', '.join(COMMAND_NAMES)}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is a {type(values).__name__}; expected options (name: value)")
    return validate_options(
        normalized_values(values, dict(option_types())), source=str(path), prefix=""
    )


def validate_options(values: dict, source: str, prefix: str) -> TrainConfig:
    """Return `values` as a config. Raises ConfigError with all errors, each with the name of its
    option."""
    try:
        return SCHEMA.validate_python(values)
    except ValidationError as error:
        messages = [describe_option_error(entry, prefix) for entry in error.errors()]
        raise ConfigError(error_list(source, messages, MAX_ERRORS)) from error


def describe_option_error(entry: Any, prefix: str) -> str:
    """Return a pydantic error as `--option value: what is wrong`."""
    location = [
        str(part)
        for part in entry["loc"]
        if not str(part).startswith(("function-", "constrained-"))
    ]
    name = ".".join(location)
    if entry["type"] == "unexpected_keyword_argument":
        similar_name = similar_option(name)
        return f"{prefix}{name}: no such option" + (
            f"; did you mean {similar_name}?" if similar_name else ""
        )
    message = entry["msg"].removeprefix("Value error, ")
    return f"{prefix}{name} {as_typed(entry['input'])}: {message[0].lower()}{message[1:]}"


def as_typed(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "(empty)"
    return repr(value)


def similar_option(name: str) -> str | None:
    """Return the option that a misspelled or misplaced name probably means."""
    names = list(dict(option_types())) + [item.name for item in fields(TrainConfig)]
    similar_names = difflib.get_close_matches(name, names, n=1)
    similar_names += [known for known in names if known.split(".")[-1] == name.split(".")[-1]]
    return similar_names[0] if similar_names else None


def path_errors(config: TrainConfig) -> list[str]:
    """Return the errors in the paths of a config. No file is opened."""
    errors = [*input_errors(config), *folder_errors("output_dir", config.output_dir)]
    if config.existing_lora is not None and not Path(config.existing_lora).exists():
        errors.append(f"--existing_lora {config.existing_lora}: does not exist")
    if config.optim.text_encoder_learning_rate is not None and not config.model.train_text_encoder:
        errors.append(
            "--optim.text_encoder_learning_rate: has no effect without --model.train_text_encoder"
        )
    return errors


def input_errors(config: TrainConfig) -> list[str]:
    """Return the errors in the paths of the model and of the data."""
    model = config.model
    error = path_error(model)
    errors = [f"--model.path{error}"] if error else []
    if model.vae is not None and not Path(model.vae).exists():
        errors.append(f"--model.vae {model.vae}: does not exist")
    if model.config is not None and not Path(model.config).exists() and not is_hub_id(model.config):
        errors.append(f"--model.config {model.config}: does not exist")
    errors += [f"--model.text_encoders {error}" for error in text_encoder_errors(model)]
    errors += source_errors(config.data)
    if config.data.validation_path is not None and config.data.validation_fraction:
        errors.append(
            "--data.validation_fraction: cannot be used together with --data.validation_path. Choose one"
        )
    return errors + folder_errors("data.cache_dir", config.data.cache_dir)


def folder_errors(flag: str, path: str) -> list[str]:
    """Return an error if a path exists and is not a folder."""
    if Path(path).exists() and not Path(path).is_dir():
        return [f"--{flag} {path}: exists and is not a folder"]
    return []


def source_errors(data: DataConfig) -> list[str]:
    """Return the errors in the paths of the data."""
    paths = {"data.path": data.path, "data.validation_path": data.validation_path}
    paths |= {
        f"data.sources.{index}.path": source.path for index, source in enumerate(data.sources)
    }
    errors = []
    for flag, path in paths.items():
        if path is not None and not Path(path).is_dir() and not is_hub_id(path):
            errors.append(f"--{flag} {path}: is not a folder")
    if data.path is None and not data.sources:
        errors.append(
            "--data.path: no training images given. Name a folder of images with caption files"
        )
    return errors


def option_types(section: type = TrainConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted name and type of every option."""
    hints = typing.get_type_hints(section)
    for item in fields(section):
        hint = hints[item.name]
        if is_dataclass(hint):
            yield from option_types(typing.cast(type, hint), f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, hint


def list_option_errors(arguments: list[str]) -> list[str]:
    """Return errors for flags of options that are lists of sections, which only a recipe can
    contain."""
    list_options = [
        name
        for name, hint in option_types()
        if any(is_dataclass(arm) for arm in typing.get_args(hint))
    ]
    flags = [
        f"{argument[2:].replace('-', '_')}." for argument in arguments if argument.startswith("--")
    ]
    return [
        f"--{name}: is a list of structured entries and can only be set in a recipe file (docs/options.md). Write one "
        "and name it first: train_lora.py recipe.yaml"
        for name in list_options
        if any(flag.startswith(f"{name}.") for flag in flags)
    ]


def normalized_choice(value: Any, hint: Any) -> Any:
    """Return the choice of `hint` that `value` means; upper and lower case are equal."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if isinstance(value, bool) and "true" in choices:
            return str(value).lower()  # YAML reads an unquoted true as a boolean
        if isinstance(value, str):
            return {str(choice).lower(): choice for choice in choices}.get(value.lower(), value)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for arm in typing.get_args(hint):
            normalized = normalized_choice(value, arm)
            if normalized != value:
                return normalized
    return value


def normalized_values(values: dict, hints: dict[str, Any], prefix: str = "") -> dict:
    """Return a recipe's values with normalized choices, and with `{project}` replaced."""
    result = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            value = normalized_values(value, hints, f"{name}.")
        elif isinstance(value, str):
            value = normalized_choice(value.replace("{project}", str(PROJECT)), hints.get(name))
        elif isinstance(value, bool):
            value = normalized_choice(value, hints.get(name))
        result[key] = value
    return result


def normalized_arguments(argv: list[str]) -> list[str]:
    """Return the command line with normalized choices, and `--flag true|false` as `--flag` or
    `--no_flag`."""
    hints = dict(option_types())
    tokens: list[str] = []
    for argument in argv:
        tokens += (
            argument.split("=", 1) if argument.startswith("--") and "=" in argument else [argument]
        )
    result: list[str] = []
    while tokens:
        token = tokens.pop(0)
        hint = hints.get(token[2:].replace("-", "_")) if token.startswith("--") else None
        if hint is bool and tokens and tokens[0].lower() in ("true", "false"):
            token = switch(token, is_on=tokens.pop(0).lower() == "true")
        elif hint is not None and tokens:
            tokens[0] = normalized_choice(tokens[0], hint)
        result.append(token)
    return result


def switch(flag: str, is_on: bool) -> str:
    """Return the flag that turns a switch on or off: `--section.name` or `--section.no_name`."""
    section, dot, name = flag[2:].rpartition(".")
    return flag if is_on else f"--{section}{dot}no_{name}"
