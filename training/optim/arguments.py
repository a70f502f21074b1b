"""What an optimizer is told, checked against its own signature before anything else is done."""

import ast
import difflib
import inspect
import typing
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from common.errors import ConfigError
from training.config import TrainConfig
from training.optim.registry import OPTIMIZERS, Source

SHARED = ("weight_decay", "betas", "eps")
"""Options of the `optim` section that are arguments of most optimizers, under the same name."""
WORDS = {"true": True, "false": False, "none": None, "null": None}
# what constructors and steps raise; lion_pytorch ends the process where Triton is not installed
REFUSED = (ValueError, TypeError, AssertionError, NotImplementedError, ZeroDivisionError, SystemExit)


def optimizer_faults(config: TrainConfig) -> list[str]:
    """All that is wrong with what the optimizer of `config` is told."""
    name, optim = config.optimizer_name, config.optim
    source = OPTIMIZERS[name]
    faults = []
    if optim.name is not None and config.optimizer != "AdamW":
        faults.append(f"--optimizer {config.optimizer}: not together with --optim.name {optim.name}")
    if source.averages and optim.lr_schedule != "constant":
        faults.append(f"--optim.lr_schedule {optim.lr_schedule}: {name} needs none. Leave it constant; "
                      "--optim.warmup_steps works")  # fmt: skip
    if source.averages and config.ema.decay:
        faults.append(f"--ema.decay {config.ema.decay:g}: {name} evaluates an average of its own. Leave it at 0")
    scales = [override.lr_scale for override in config.adapter.overrides] + [config.adapter.lora_plus_ratio]
    text_rate = optim.text_encoder_learning_rate or config.learning_rate
    if source.one_rate and (text_rate != config.learning_rate or any(scale not in (None, 1) for scale in scales)):
        faults.append(f"--adapter.lora_plus_ratio, lr_scale and --optim.text_encoder_learning_rate: {name} has one "
                      "learning rate for all layers")  # fmt: skip
    try:
        values, more = arguments(config)
    except ConfigError as error:
        return [*faults, str(error)]
    faults += more
    if not faults and (fault := probe_fault(name, values, config.learning_rate)):
        faults.append(fault)
    return faults


def probe_fault(name: str, values: dict[str, Any], rate: float) -> str | None:
    """What the optimizer itself refuses: its constructor, its step, the way to its average."""
    source = OPTIMIZERS[name]
    try:
        probe = torch.nn.Parameter(torch.zeros(2, 2))
        optimizer = optimizer_class(name)([probe], lr=rate, **values)
        if source.averages:
            optimizer.train()
        probe.grad = torch.ones(2, 2)
        if source.package != "bitsandbytes":  # whose steps may be for GPUs alone
            optimizer.step()
        if source.averages:
            optimizer.eval()
    except REFUSED as error:
        told = ", ".join(f"{key} = {value!r}" for key, value in values.items() if key not in source.fixed)
        return f"--optim: {name} refuses: {error or type(error).__name__}" + (told and f". It was told {told}")
    return None


def optimizer_class(name: str) -> Any:
    """Raises ConfigError if its package is not installed."""
    source = OPTIMIZERS[name]
    try:
        return getattr(import_module(source.module), source.kind)
    except ImportError as error:
        raise ConfigError(
            f"--optim.name {name}: the package {source.package} cannot be imported ({error}). "
            f"pip install {source.package}, or in the project's folder pip install -e '.[{source.extra}]'"
        ) from error


def arguments(config: TrainConfig) -> tuple[dict[str, Any], list[str]]:
    """What the optimizer is constructed with besides parameters and rate, and all that is wrong with it."""
    name, optim = config.optimizer_name, config.optim
    source, kind = OPTIMIZERS[name], optimizer_class(name)
    known = {key: p for key, p in inspect.signature(kind.__init__).parameters.items() if key != "self"}
    hints: dict[str, Any] = {}
    with suppress(NameError, TypeError):
        hints = typing.get_type_hints(kind.__init__)
    values, faults = dict(source.fixed), []
    given = [(key, f"--optim.{key}", getattr(optim, key)) for key in SHARED]
    given += [(key, f"--optim.args {key}", parsed(text)) for key, text in (pair.split("=", 1) for pair in optim.args)]
    for key, flag, value in given:
        if value is None and key in SHARED:
            continue
        fault = place_fault(key, flag, known, source)
        if fault is None:
            try:
                values[key] = converted(value, known[key], hints.get(key))
                continue
            except ValidationError as error:
                default = known[key].default
                fault = f" = {value!r}: {error.errors()[0]['msg'][0].lower()}{error.errors()[0]['msg'][1:]}; "
                fault += f"{name}'s own is {default!r}"
                if flag == f"--optim.{key}":
                    fault += f". Give it as --optim.args {key}=..."
        faults.append(f"{flag}{fault}")
    return values, faults


def place_fault(key: str, flag: str, known: dict[str, inspect.Parameter], source: Source) -> str | None:
    """Why `flag` cannot be given to an optimizer with the arguments `known`."""
    in_args = flag.startswith("--optim.args")
    if key in source.ours and key in known:
        instead = {"lr": "--learning_rate", "warmup_steps": "--optim.warmup_steps"}.get(key)
        return ": is set by the trainer" + (f". Give {instead}" if instead else "")
    if key not in known:
        usable = sorted(known.keys() - {*source.ours})
        near = difflib.get_close_matches(key, usable, n=1)
        hint = f"; did you mean {near[0]}?" if near and in_args else f". It has {', '.join(usable)}"
        return f": {source.kind} has no such argument{hint}"
    if in_args and key in SHARED and fits_option(key, known[key].default):
        return f": give it as --optim.{key}"
    return None


def fits_option(key: str, default: Any) -> bool:
    """Whether an argument is what the option of its name holds: two betas, one eps, one weight_decay."""
    return (isinstance(default, tuple | list) and len(default) == 2) == (key == "betas")


def converted(value: Any, parameter: inspect.Parameter, hint: Any) -> Any:
    """`value` as the type that an argument is declared with, else that of its default; raises ValidationError."""
    if hint is None:
        hint = type_like(parameter.default)
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except PydanticSchemaGenerationError:
        return value


def type_like(default: Any) -> Any:
    if default is None or default is inspect.Parameter.empty:
        return Any
    if isinstance(default, tuple | list):
        return tuple[tuple(type_like(item) for item in default)]  # type: ignore[misc]
    if isinstance(default, int) and not isinstance(default, bool):
        return int | float  # which stays what it is: some ints are meant as such
    return type(default)


def parsed(text: str) -> Any:
    """A value as Python or YAML would write it; what is neither is the text."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
