"""Train an adapter on a frozen diffusion model: `accelerate launch train_lora.py [recipe.yaml]
[--option value]`.

Commands that work on data: `python train_lora.py data|export-dataset [recipe.yaml] [--option
value]` (docs/data.md). Commands that work on files: `python train_lora.py
inspect|convert|merge|resize|extract FILE` (docs/formats.md). Commands that read the folders of runs:
`python train_lora.py report|status|push OUTPUT_DIR` (docs/report.md). `python train_lora.py models`
lists the models (docs/memory.md).
"""

import os
import signal
import sys

import tools
from common.errors import UserError
from training.cli import load_config
from training.memory.kept_changes import with_kept_changes
from training.numerics import prepare_environment
from training.run import launched_rank, print_error, run_training
from training.run_folder import check_output_dir
from training.stopping.signals import RunStopped, SignalHandler, end_with_launcher, report_stop


def main(argv: list[str] | None = None) -> int:
    """Run a training or a command; return the exit code: 2 for a mistake in the input, 1 for other
    failures."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in tools.COMMANDS:
            prepare_environment()
            return tools.run_command(argv)
        config = load_config(argv)
        prepare_environment(config)
        if launched_rank() == 0:
            check_output_dir(with_kept_changes(config))
    except UserError as error:
        print_error(str(error))
        return 2
    signals = SignalHandler()
    with signals.installed():
        end_with_launcher()
        try:
            return run_training(config, signals)
        except RunStopped as stopped:
            report_stop(stopped, launched_rank())
            return stopped.code


def closed_pipe() -> int:
    """Return the exit code after a reader such as `head` has closed the output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + getattr(signal, "SIGPIPE", 13)


if __name__ == "__main__":
    try:
        try:
            code = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        code = closed_pipe()
    sys.exit(code)
