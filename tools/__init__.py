"""Commands of the script that work on finished files and on data. Options are checked before torch
is imported."""

import ctypes
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from common.atomic import WriteError
from common.errors import AdapterError, ConfigError, ModelError, error_list
from tools.catalog.options import ModelsOptions, parse_models_options
from tools.data.options import DataOptions, ExportOptions
from tools.options import OPTIONS, Options, parse
from tools.planning.options import PlanOptions
from tools.run_options import RunOptions, read_run_options
from tools.runs.options import FOLDER_OPTIONS, parse_folder_options
from training.run import leave_process_group, print_error, quiet_libraries

RUN_COMMANDS: dict[str, type[RunOptions]] = {
    options.command: options for options in (PlanOptions, DataOptions, ExportOptions)
}
"""Commands that take the options of a run."""
COMMANDS = (*RUN_COMMANDS, *OPTIONS, *FOLDER_OPTIONS, ModelsOptions.command)
M_MMAP_THRESHOLD = -3
"""Parameter number of mallopt(3)."""
LARGE_TENSOR = 1 << 20
"""Bytes."""
COMMAND_FLAGS = {
    "--model.path ": "",
    "--model.family": "--family",
    "--model.variant": "--variant",
    "--model.config": "--config",
    "--export.formats": "--format",
    "--export.convert": "--convert",
}
"""Option of the trainer -> option of the commands that work on files."""


def run_command(argv: list[str]) -> int:
    """Run the command in `argv`; return the exit code. Raises UserError for a mistake in the
    input."""
    if argv[0] in FOLDER_OPTIONS:
        return run_on_folders(argv)
    if argv[0] == ModelsOptions.command:
        return list_models(argv)
    options: Options | RunOptions
    is_run_command = argv[0] in RUN_COMMANDS
    if is_run_command:
        options = read_run_options(RUN_COMMANDS[argv[0]], argv)
        module = options.module
    else:
        options = read_options(argv)
        module = f"tools.{options.command}"
    with terminated_cleanly():
        try:
            quiet_libraries()
            return run_module(module, options, is_run_command)
        except KeyboardInterrupt:
            print_error("interrupted; nothing was written")
            return 130


def list_models(argv: list[str]) -> int:
    """Run the command that lists the models; return its exit code."""
    from tools.catalog.models import run

    quiet_libraries()
    options = parse_models_options(argv)
    errors = options.errors()
    if errors:
        raise ConfigError(error_list(options.command, errors))
    return run(options)


def run_on_folders(argv: list[str]) -> int:
    """Run a command that reads the folders of runs; return its exit code."""
    options = parse_folder_options(argv)
    errors = options.errors()
    if errors:
        raise ConfigError(error_list(options.command, errors))
    quiet_libraries()
    try:
        return import_module(f"tools.runs.{options.command}").run(options)
    except WriteError as error:
        print_error(str(error))
        return 1


def read_options(argv: list[str]) -> Options:
    """Return the options of a command that works on files. Raises ConfigError naming all errors."""
    options = parse(argv)
    errors = options.errors()
    if errors:
        raise ConfigError(error_list(options.command, errors))
    return options


def run_module(module: str, options: object, is_run_command: bool) -> int:
    """Run a command's module; return the exit code: 0, or 1 if it found or met a problem."""
    # imports torch, which takes long enough to be interrupted
    from tools.rewrite import ToolError

    if not is_run_command:
        return_memory_early()
    try:
        return import_module(module).run(options)
    except (ToolError, WriteError) as error:
        print_error(str(error))
        return 1
    except (AdapterError, ModelError) as error:
        if is_run_command:
            raise
        raise type(error)(with_command_flags(str(error))) from error
    finally:
        if is_run_command:
            leave_process_group()


@contextmanager
def terminated_cleanly() -> Iterator[None]:
    """Let SIGTERM raise SystemExit in this block, so that unfinished files are removed."""

    def exit_on_signal(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    earlier_handler = signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier_handler or signal.SIG_DFL)


def return_memory_early() -> None:
    """Let glibc return large tensors to the system when they are freed; kept for larger ones, they
    would add up."""
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_TENSOR)
    except (OSError, AttributeError, TypeError):
        return  # another C library


def with_command_flags(message: str) -> str:
    """Replace the trainer's option names in a message by the names that the commands have."""
    for trainer_flag, command_flag in COMMAND_FLAGS.items():
        message = message.replace(trainer_flag, command_flag)
    return message
