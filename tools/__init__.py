"""Sub-commands of the script that work on finished files. No torch here: arguments are checked before it loads."""

import ctypes
from importlib import import_module

from common.errors import AdapterError, ConfigError, ModelError, error_list
from tools.options import OPTIONS, Options, parse

COMMANDS = tuple(OPTIONS)
M_MMAP_THRESHOLD = -3  # mallopt(3)


def read_options(argv: list[str]) -> Options:
    """The options in `argv`, which begins with the command, checked; ConfigError naming every fault of theirs."""
    options = parse(argv)
    if faults := options.faults():
        raise ConfigError(error_list(options.command, faults))
    return options


def run(options: Options) -> int:
    """Does what `options` asks for. Returns the exit code: 0, or 1 where something was found that does not fit."""
    give_memory_back()
    try:
        return import_module(f"tools.{options.command}").run(options)
    except (AdapterError, ModelError) as error:
        raise type(error)(with_own_flags(str(error))) from error


def give_memory_back() -> None:
    """Has glibc return every tensor of 1 MB or more to the system: kept for others, which are larger, they add up."""
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    except (OSError, AttributeError, TypeError):
        return  # another C library


def with_own_flags(message: str) -> str:
    """A message of the trainer's with the names that its options have here."""
    return message.replace("--model.path ", "").replace("--model.config", "--config").replace("--export.", "--")
