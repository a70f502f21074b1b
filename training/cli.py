"""Reads a config: defaults < recipe YAML < command line, with every fault at once. No torch here."""

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
from models.config import is_hub_id, path_fault, text_encoder_faults
from objectives.config import objective_faults
from training.config import SCHEMA, TrainConfig

Parsed = TypeVar("Parsed")
PROJECT = Path(__file__).resolve().parent.parent
PROGRAM = "train_lora.py [RECIPE | data | export-dataset | inspect | convert | merge | resize | extract]"
DEMO_RECIPE = PROJECT / "recipes" / "demo.yaml"


def load_config(argv: list[str] | None = None) -> TrainConfig:
    """The config that `argv` (default: the command line) asks for: `[recipe.yaml] [--option value ...]`.

    Raises ConfigError naming every fault; wrong option names and types on the command line exit with code 2 (tyro).
    """
    said = parsed(list(sys.argv[1:] if argv is None else argv), lambda config: config, PROGRAM)
    config = validate(asdict(said), where="the command line", prefix="--")
    faults = path_faults(config) + objective_faults(config.objective, config.loss_function)
    if faults:
        raise ConfigError(error_list("cannot start", faults))
    return config


def parsed(argv: list[str], make: Callable[[TrainConfig], Parsed], program: str) -> Parsed:
    """The options in `argv`, which a recipe may come before; `make` makes them of a config in which the command line
    has not said anything yet. The demo is run where no recipe, model and images are named, but `--help` and what tyro
    says of mistakes show the options' own defaults then."""
    recipe = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    args = canonical_argv(argv if recipe is None else argv[1:])
    if faults := list_faults(args):
        raise ConfigError(error_list("the command line", faults))

    def over(defaults: TrainConfig) -> Parsed:
        given = make(defaults)
        return tyro.cli(type(given), default=given, args=args, use_underscores=True, prog=program)

    said = over(TrainConfig() if recipe is None else read_recipe(recipe))
    if recipe is None and not any(arg.startswith(("--model.path", "--data.images")) for arg in args):
        return over(read_recipe(DEMO_RECIPE))
    return said


def read_recipe(path: Path) -> TrainConfig:
    """The config in a YAML file; `{project}` in a string stands for the folder of train_lora.py."""
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in DEMO_RECIPE.parent.glob("*.yaml")))
        raise ConfigError(
            f"{path} is not a file. A recipe is a YAML file; recipes/ holds {known}. Commands are data, "
            "export-dataset, inspect, convert, merge, resize and extract"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold options (name: value), but holds a {type(values).__name__}")
    return validate(canonical_values(values, dict(options())), where=str(path), prefix="")


def validate(values: dict, where: str, prefix: str) -> TrainConfig:
    """`values` as a TrainConfig; ConfigError lists all faults at once, each with its option's name."""
    try:
        return SCHEMA.validate_python(values)
    except ValidationError as error:
        faults = [describe(fault, prefix) for fault in error.errors()]
        raise ConfigError(error_list(where, faults)) from error


def describe(fault: Any, prefix: str) -> str:
    """One pydantic error as "option = value: what is wrong"."""
    parts = [str(part) for part in fault["loc"] if not str(part).startswith(("function-", "constrained-"))]
    name = ".".join(parts)
    if fault["type"] == "unexpected_keyword_argument":
        known = list(dict(options())) + [f.name for f in fields(TrainConfig)]
        near = difflib.get_close_matches(name, known, n=1) or [k for k in known if k.split(".")[-1] == parts[-1]]
        return f"{prefix}{name}: no such option" + (f"; did you mean {near[0]}?" if near else "")
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{prefix}{name} = {fault['input']!r}: {message}"


def path_faults(config: TrainConfig) -> list[str]:
    """What is wrong with the paths of `config`, found without opening a file."""
    faults = [*input_faults(config), *folder_faults("output_dir", config.output_dir)]
    if config.existing_lora is not None and not Path(config.existing_lora).exists():
        faults.append(f"--existing_lora: {config.existing_lora} does not exist")
    if config.optim.text_encoder_learning_rate is not None and not config.model.train_text_encoder:
        faults.append("--optim.text_encoder_learning_rate: only used with --model.train_text_encoder")
    return faults


def input_faults(config: TrainConfig) -> list[str]:
    """What is wrong with the paths of the model and of the data."""
    faults = [f"--model.path: {fault}"] if (fault := path_fault(config.model)) else []
    for flag, path in (("vae", config.model.vae), ("config", config.model.config)):
        if path is not None and not Path(path).exists() and (flag == "vae" or not is_hub_id(path)):
            faults.append(f"--model.{flag}: {path} does not exist")
    faults += [f"--model.text_encoders: {fault}" for fault in text_encoder_faults(config.model)]
    faults += source_faults(config.data)
    if config.data.validation_images is not None and config.data.validation_share:
        faults.append("--data.validation_share: not together with --data.validation_images, which already holds out")
    return faults + folder_faults("data.cache_dir", config.data.cache_dir)


def folder_faults(flag: str, path: str) -> list[str]:
    return [f"--{flag}: {path} exists and is not a folder"] if Path(path).exists() and not Path(path).is_dir() else []


def source_faults(data: DataConfig) -> list[str]:
    """What is wrong with the paths of the training data."""
    paths = [("data.images", data.images), ("data.validation_images", data.validation_images)]
    paths += [(f"data.sources.{i}.path", source.path) for i, source in enumerate(data.sources)]
    faults = [
        f"--{flag}: {path} is not a folder"
        for flag, path in paths
        if path is not None and not Path(path).is_dir() and not is_hub_id(path)
    ]
    if data.images is None and not data.sources:
        faults.append("--data.images: no training images given. Name a folder of images with caption files")
    return faults


def options(cls: type = TrainConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every option."""
    hints = typing.get_type_hints(cls)
    for item in fields(cls):
        hint = hints[item.name]
        if is_dataclass(hint):
            yield from options(typing.cast(type, hint), f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, hint


def list_faults(args: list[str]) -> list[str]:
    """What is wrong with the flags in `args`: an option that is a list of several options each is none."""
    lists = [name for name, hint in options() if any(is_dataclass(arm) for arm in typing.get_args(hint))]
    given = [f"{arg[2:].replace('-', '_')}." for arg in args if arg.startswith("--")]
    return [
        f"--{name}: a list of several options each, which stands in a recipe alone (docs/options.md). Write one, and "
        "give it before the options: train_lora.py recipe.yaml"
        for name in lists
        if any(flag.startswith(f"{name}.") for flag in given)
    ]


def canonical(value: Any, hint: Any) -> Any:
    """`value` with the case of the choice it means; choices of `hint` are case-insensitive."""
    if typing.get_origin(hint) is Literal and isinstance(value, bool) and "true" in typing.get_args(hint):
        return str(value).lower()  # YAML reads a bare true as more than a word
    if typing.get_origin(hint) is Literal and isinstance(value, str):
        return {c.lower(): c for c in typing.get_args(hint)}.get(value.lower(), value)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next((c for c in (canonical(value, arm) for arm in typing.get_args(hint)) if c != value), value)
    return value


def canonical_values(values: dict, hints: dict[str, Any], prefix: str = "") -> dict:
    """A recipe's values with choices in their own case and `{project}` filled in."""
    result = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            value = canonical_values(value, hints, f"{name}.")
        elif isinstance(value, str):
            value = canonical(value.replace("{project}", str(PROJECT)), hints.get(name))
        elif isinstance(value, bool):
            value = canonical(value, hints.get(name))
        result[key] = value
    return result


def canonical_argv(argv: list[str]) -> list[str]:
    """Command line with choices in their own case, and `--flag true` / `--flag=false` as `--flag` / `--no_flag`."""
    hints = dict(options())
    result: list[str] = []
    tokens = [part for a in argv for part in (a.split("=", 1) if a.startswith("--") and "=" in a else [a])]
    while tokens:
        token = tokens.pop(0)
        hint = hints.get(token[2:].replace("-", "_")) if token.startswith("--") else None
        if hint is bool and tokens and tokens[0].lower() in ("true", "false"):
            section, _, name = token[2:].rpartition(".")
            token = token if tokens.pop(0).lower() == "true" else f"--{section}{'.' if section else ''}no_{name}"
        elif hint is not None and tokens:
            tokens[0] = canonical(tokens[0], hint)
        result.append(token)
    return result
