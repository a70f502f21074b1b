"""Checks of the optimizer's options against the signature of its class, before anything else is
done."""

import ast
import difflib
import inspect
import typing
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from common.errors import ConfigError
from training.config import OptimConfig, TrainConfig
from training.optim.registry import OPTIMIZERS, OptimizerEntry

SHARED_OPTIONS = ("weight_decay", "betas", "eps")
"""Options of the `optim` section that most optimizers have as arguments with the same name."""
REPLACEMENTS = {"lr": "--learning_rate", "warmup_steps": "--optim.lr_warmup_steps"}
"""Arguments that users cannot set -> the option to use instead."""
CONSTANTS = {"true": True, "false": False, "none": None, "null": None}
OPTIMIZER_ERRORS = (
    ValueError,
    TypeError,
    AssertionError,
    NotImplementedError,
    ZeroDivisionError,
    SystemExit,
)
"""Exceptions of constructors and steps. lion_pytorch ends the process if Triton is missing."""


@dataclass(frozen=True)
class Argument:
    """One argument that the user sets, with the option that it comes from."""

    name: str
    flag: str
    value: Any

    @property
    def is_shared_option(self) -> bool:
        return self.flag == f"--optim.{self.name}"


def optimizer_errors(config: TrainConfig) -> list[str]:
    """Return all errors in the options of the optimizer."""
    errors = combination_errors(config)
    try:
        arguments, argument_errors = optimizer_arguments(config)
    except ConfigError as error:
        return [*errors, str(error)]
    errors += argument_errors
    if not errors:
        errors = trial_errors(config.optimizer, arguments, config.learning_rate)
    return errors


def combination_errors(config: TrainConfig) -> list[str]:
    """Return the errors of options that this optimizer does not support together."""
    name, optim = config.optimizer, config.optim
    entry = OPTIMIZERS[name]
    errors = []
    if entry.is_schedule_free and optim.lr_scheduler != "constant":
        errors.append(
            f"--optim.lr_scheduler {optim.lr_scheduler}: {name} needs no schedule. Leave it constant; "
            "--optim.lr_warmup_steps works"
        )
    if entry.is_schedule_free and config.ema.decay:
        errors.append(
            f"--ema.decay {config.ema.decay:g}: {name} evaluates its own average. Leave it at 0"
        )
    if entry.needs_single_lr and has_several_learning_rates(config):
        errors.append(
            f"--adapter.loraplus_lr_ratio, lr_scale and --optim.text_encoder_learning_rate: {name} "
            "has one learning rate for all layers. Leave them out"
        )
    return errors


def has_several_learning_rates(config: TrainConfig) -> bool:
    """Return whether an option gives some layers another learning rate."""
    text_lr = config.optim.text_encoder_learning_rate
    if text_lr not in (None, config.learning_rate):
        return True
    scales = [override.lr_scale for override in config.adapter.overrides]
    scales.append(config.adapter.loraplus_lr_ratio)
    return any(scale not in (None, 1) for scale in scales)


def trial_errors(name: str, arguments: dict[str, Any], lr: float) -> list[str]:
    """Construct the optimizer and take a step; return the error that it raises, if any."""
    entry = OPTIMIZERS[name]
    try:
        parameter = torch.nn.Parameter(torch.zeros(2, 2))
        optimizer = optimizer_class(name)([parameter], lr=lr, **arguments)
        if entry.is_schedule_free:
            optimizer.train()
        parameter.grad = torch.ones(2, 2)
        if entry.package != "bitsandbytes":  # its steps may need a GPU
            optimizer.step()
        if entry.is_schedule_free:
            optimizer.eval()
    except OPTIMIZER_ERRORS as error:
        message = f"--optim: {name} raises: {describe_trial_error(error)}"
        values = [
            f"{key} = {value!r}" for key, value in arguments.items() if key not in entry.fixed_args
        ]
        if values:
            message += f". Its arguments are {', '.join(values)}"
        return [message]
    return []


def describe_trial_error(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "it ends the program, perhaps because a package that it needs is missing"
    return str(error) or type(error).__name__


def optimizer_class(name: str) -> Any:
    """Import the class of an optimizer. Raises ConfigError if its package is not installed."""
    entry = OPTIMIZERS[name]
    try:
        return getattr(import_module(entry.module), entry.class_name)
    except ImportError as error:
        raise ConfigError(
            f"--optimizer {name}: the package {entry.package} cannot be imported ({error}). Run "
            f"pip install {entry.package}, or in the project's folder pip install -e "
            f"'.[{entry.extra}]'"
        ) from error


def optimizer_arguments(config: TrainConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of the optimizer besides parameters and learning rate, and all errors in
    them."""
    entry, class_ = OPTIMIZERS[config.optimizer], optimizer_class(config.optimizer)
    parameters = dict(inspect.signature(class_.__init__).parameters)
    del parameters["self"]
    hints: dict[str, Any] = {}
    with suppress(NameError, TypeError):
        hints = typing.get_type_hints(class_.__init__)
    arguments, errors = dict(entry.fixed_args), []
    for argument in configured_arguments(config.optim):
        error = name_error(argument, parameters, entry)
        if error is not None:
            errors.append(error)
            continue
        parameter = parameters[argument.name]
        hint = hints.get(argument.name)
        try:
            arguments[argument.name] = converted(argument.value, parameter, hint)
        except ValidationError as failure:
            default = f"{config.optimizer}'s default is {parameter.default!r}"
            errors.append(value_error(argument, failure, default))
    return arguments, errors


def configured_arguments(config: OptimConfig) -> Iterator[Argument]:
    """Yield the arguments that the options set."""
    for name in SHARED_OPTIONS:
        value = getattr(config, name)
        if value is not None:
            flag = f"--optim.{name}"
            yield Argument(name, flag, value)
    for pair in config.args:
        name, _, text = pair.partition("=")
        flag = f"--optim.args {name}"
        value = parsed_value(text)
        yield Argument(name, flag, value)


def name_error(
    argument: Argument, parameters: dict[str, inspect.Parameter], entry: OptimizerEntry
) -> str | None:
    """Return why an optimizer with these parameters cannot have the argument, or None."""
    name = argument.name
    if name in entry.reserved_args and name in parameters:
        hint = f". Use {REPLACEMENTS[name]}" if name in REPLACEMENTS else ""
        return f"{argument.flag}: is set by the trainer{hint}"
    if name not in parameters:
        usable_names = sorted(parameters.keys() - {*entry.reserved_args})
        similar = difflib.get_close_matches(name, usable_names, n=1)
        if similar and not argument.is_shared_option:
            hint = f"; did you mean {similar[0]}?"
        else:
            hint = f". It has {', '.join(usable_names)}"
        return f"{argument.flag}: {entry.class_name} has no such argument{hint}"
    if argument.is_shared_option or name not in SHARED_OPTIONS:
        return None
    if fits_option(name, parameters[name].default):
        return f"{argument.flag}: use --optim.{name} instead"
    return None


def value_error(argument: Argument, failure: ValidationError, default: str) -> str:
    """Return the message for a value of the wrong type."""
    first_error = failure.errors()[0]
    reason = first_error["msg"]
    reason = reason[0].lower() + reason[1:]
    message = f"{argument.flag} {argument.value!r}: {reason}; {default}"
    if argument.is_shared_option:
        message += f". Use --optim.args {argument.name}=..."
    return message


def fits_option(name: str, default: Any) -> bool:
    """Return whether an argument has the form of the shared option: two betas, one eps, one
    weight_decay."""
    is_pair = isinstance(default, tuple | list) and len(default) == 2
    return is_pair == (name == "betas")


def converted(value: Any, parameter: inspect.Parameter, hint: Any) -> Any:
    """Convert a value to the declared type of an argument, else to the type of its default.

    Raises ValidationError."""
    if hint is None:
        hint = type_of_default(parameter.default)
    settings = ConfigDict(arbitrary_types_allowed=True)
    try:
        return TypeAdapter(hint, config=settings).validate_python(value)
    except PydanticSchemaGenerationError:
        return value


def type_of_default(default: Any) -> Any:
    """Return the type that an argument without annotation has by its default value."""
    if default is None or default is inspect.Parameter.empty:
        return Any
    if isinstance(default, tuple | list):
        return tuple[tuple(type_of_default(item) for item in default)]  # type: ignore[misc]
    if isinstance(default, int) and not isinstance(default, bool):
        return int | float  # a whole number stays an int, which some arguments must be
    return type(default)


def parsed_value(text: str) -> Any:
    """Parse a value in the notation of Python or YAML; anything else is a text."""
    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
