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
from training.config import SCHEMA, TrainConfig
from training.config_errors import config_errors
from training.kohya_names import KOHYA_NAMES

Parsed = TypeVar("Parsed")
PROJECT = Path(__file__).resolve().parent.parent
COMMAND_NAMES = (
    "plan",
    "data",
    "export-dataset",
    "inspect",
    "convert",
    "merge",
    "resize",
    "extract",
    "report",
    "status",
    "push",
    "models",
)
PROGRAM = f"train_lora.py [RECIPE | {' | '.join(COMMAND_NAMES)}]"
DEMO_RECIPE = PROJECT / "recipes" / "demo.yaml"
MAX_ERRORS = 100
TYPE_MESSAGES = {
    "tuple_type": "expected a list. Write [first, second]",
    "dataclass_type": "expected a section. Write its options on indented lines below it",
}
"""Type of a pydantic error -> what to say instead of its message."""


def load_config(argv: list[str] | None = None) -> TrainConfig:
    """Return the config of `[recipe.yaml] [--option value ...]`. `argv`: None means the command
    line.

    Raises ConfigError naming all errors. tyro ends the program with exit code 2 for wrong names and
    types on the command line."""
    arguments = sys.argv[1:] if argv is None else argv
    config = parse_options(list(arguments), lambda config: config, PROGRAM)
    config = validate_options(asdict(config), source="the command line", prefix="--")
    errors = config_errors(config)
    if errors:
        raise ConfigError(error_list("cannot start", errors, MAX_ERRORS))
    return config


def parse_options(argv: list[str], make: Callable[[TrainConfig], Parsed], program: str) -> Parsed:
    """Parse options after an optional recipe. `make`: builds the object to fill from the defaults.

    Without a recipe, a model and data, the demo's recipe is used. `--help`, and tyro's messages
    about mistakes, then still show the options' own defaults."""
    recipe: Path | None = None
    options = argv
    if argv and not argv[0].startswith("-"):
        recipe = Path(argv[0])
        options = argv[1:]
    arguments = normalized_arguments(options)
    errors = list_option_errors(arguments) + kohya_name_errors(arguments)
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
    names_input = [arg for arg in arguments if arg.startswith(("--model.path", "--data.path"))]
    if names_input:
        return parsed
    return parse_over(read_recipe(DEMO_RECIPE))


class RecipeLoader(yaml.SafeLoader):
    """A safe loader that refuses an option that a recipe sets twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = set()
        for key_node, _ in node.value:
            key = key_node.value
            line = key_node.start_mark.line + 1
            if key in keys:
                raise yaml.YAMLError(f"line {line}: {key} is set twice. Delete one of the lines")
            keys.add(key)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> TrainConfig:
    """Return the config in a YAML file. `{project}` in a text is the folder of train_lora.py."""
    if not path.is_file():
        recipes = ", ".join(sorted(file.name for file in DEMO_RECIPE.parent.glob("*.yaml")))
        raise ConfigError(
            f"{path} is not a file; expected a recipe (a YAML file, such as "
            f"recipes/{DEMO_RECIPE.name}) or a command. The recipes are {recipes}. The commands "
            f"are {', '.join(COMMAND_NAMES)}"
        )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), RecipeLoader) or {}
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
    keys = [str(key) for key in entry["loc"]]
    name = ".".join(key for key in keys if not key.startswith(("function-", "constrained-")))
    flag = prefix + name
    if entry["type"] != "unexpected_keyword_argument":
        value = as_typed(entry["input"])
        reason = TYPE_MESSAGES.get(entry["type"])
        if reason is None:
            reason = lower_first(entry["msg"].removeprefix("Value error, "))
        return f"{flag} {value}: {reason}"
    similar_name = similar_option(name)
    if similar_name is None:
        return f"{flag}: no such option"
    if similar_name == name:
        section, _, key = name.rpartition(".")
        return f"{flag}: dots are for the command line. Write `{section}:`, and `{key}:` below it"
    return f"{flag}: no such option; did you mean {similar_name}?"


def as_typed(value: Any) -> str:
    """Return a value in the form of the command line."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "(empty)"
    return repr(value)


def lower_first(sentence: str) -> str:
    """Return a sentence with a lower-case first letter."""
    return sentence[0].lower() + sentence[1:]


def similar_option(name: str) -> str | None:
    """Return the option that a misspelled or misplaced name probably means."""
    option_names = [option for option, _ in option_types()]
    option_names += [item.name for item in fields(TrainConfig)]
    if name in KOHYA_NAMES:
        return KOHYA_NAMES[name]
    close_matches = difflib.get_close_matches(name, option_names, n=1)
    if close_matches:
        return close_matches[0]
    last_word = name.split(".")[-1]
    for option in option_names:
        if option.split(".")[-1] == last_word:
            return option
    return None


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
    list_options = [name for name, hint in option_types() if is_section_list(hint)]
    errors = []
    for argument in arguments:
        option = argument.removeprefix("--").replace("-", "_")
        for name in list_options:
            if argument.startswith("--") and f"{option}.".startswith(f"{name}."):
                errors.append(
                    f"--{name}: is a list of sections, which only a recipe can contain "
                    "(docs/options.md). Write a recipe and name it first: train_lora.py "
                    "recipe.yaml"
                )
    return list(dict.fromkeys(errors))


def kohya_name_errors(arguments: list[str]) -> list[str]:
    """Return errors for flags that have a name of kohya's scripts."""
    option_names = {name for name, _ in option_types()}
    errors = []
    for argument in arguments:
        name = argument.removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name in KOHYA_NAMES and name not in option_names:
            errors.append(f"{argument}: is a name of kohya's scripts. Use --{KOHYA_NAMES[name]}")
    return errors


def is_section_list(hint: Any) -> bool:
    """Return whether an option with this type is a list of sections."""
    return any(is_dataclass(item_type) for item_type in typing.get_args(hint))


def normalized_choice(value: Any, hint: Any) -> Any:
    """Return the choice of `hint` that `value` means; upper and lower case are equal."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for member in typing.get_args(hint):
            normalized = normalized_choice(value, member)
            if normalized != value:
                return normalized
    if typing.get_origin(hint) is not Literal:
        return value
    choices = typing.get_args(hint)
    if isinstance(value, bool) and "true" in choices:
        return str(value).lower()  # YAML reads an unquoted true as a boolean
    for choice in choices:
        if isinstance(value, str) and str(choice).lower() == value.lower():
            return choice
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
        is_flag = argument.startswith("--")
        tokens += argument.split("=", 1) if is_flag else [argument]
    result: list[str] = []
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--") or not tokens:
            result.append(token)
            continue
        hint = hints.get(token[2:].replace("-", "_"))
        value = tokens[0].lower()
        if hint is bool and value in ("true", "false"):
            tokens.pop(0)
            token = switch(token, is_on=value == "true")
        elif hint is not None:
            tokens[0] = normalized_choice(tokens[0], hint)
        result.append(token)
    return result


def switch(flag: str, is_on: bool) -> str:
    """Return the flag that turns a switch on or off: `--section.name` or `--section.no_name`."""
    if is_on:
        return flag
    section, dot, name = flag[2:].rpartition(".")
    return f"--{section}{dot}no_{name}"
