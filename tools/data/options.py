"""What the commands `data` and `export-dataset` are told: the options of a run, and some of their
own. No torch."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from common.errors import ConfigError, error_list
from training.cli import folder_errors, input_errors, parse_options, validate_options
from training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a command that looks at a run's data is told."""

    command: ClassVar[str]
    module: ClassVar[str]
    """In tools.data; its `run` takes the options."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]

    def faults(self) -> list[str]:
        """What is wrong with the paths, found without opening a file."""
        return input_errors(self.config)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(RunOptions):
    """Writes the encoded data of a run into a folder of its own, from which other machines train, or ComfyUI does.
    Encodes what is not encoded yet."""

    command: ClassVar[str] = "export-dataset"
    module: ClassVar[str] = "export"

    out: str = ""
    """The folder to write; it must not be there."""
    form: Literal["encoded", "comfyui", "safetensors"] = "encoded"
    """encoded: for --data.path, with all captions, mirrored images and masks. comfyui: shards for ComfyUI's
    LoadTrainingDataset. safetensors: the same without pickle, which ComfyUI does not read."""

    def faults(self) -> list[str]:
        faults = super().faults()
        if not self.out:
            faults.append("--out: name the folder to write")
        elif Path(self.out).exists() or Path(self.out).is_symlink():
            faults.append(f"--out: {self.out} is there already; name another")
        return faults


@dataclass(frozen=True, kw_only=True)
class DataOptions(RunOptions):
    """Shows what a run with these options would be trained on: sources, buckets, captions, what is odd about them, and
    what will be encoded and how large that is. Trains nothing and encodes nothing."""

    command: ClassVar[str] = "data"
    module: ClassVar[str] = "report"

    sheets: str | None = None
    """Draw images with their captions into this folder, one PNG per bucket."""
    decode: bool = False
    """Draw what the VAE makes of the stored latents, in place of the images."""

    def faults(self) -> list[str]:
        faults = super().faults()
        if self.sheets is None:
            return faults + (["--decode: goes with --sheets"] if self.decode else [])
        faults += folder_errors("sheets", self.sheets)
        data, here = self.config.data, Path(self.sheets).resolve()
        paths = [*(source.path for source in data.all_sources()), data.validation_path]
        faults += [
            f"--sheets: {self.sheets} is in {path}, where the sheets would be training images"
            for path in paths
            if path is not None and Path(path).resolve() in (here, *here.parents)
        ]
        return faults


COMMANDS: dict[str, type[RunOptions]] = {
    options.command: options for options in (DataOptions, ExportOptions)
}


def read_options(argv: list[str]) -> RunOptions:
    """The options in `argv`, which begins with the command, checked; ConfigError naming every fault
    of theirs."""
    command = COMMANDS[argv[0]]
    program = f"train_lora.py {command.command} [RECIPE]"
    said = parse_options(argv[1:], lambda config: command(config=config), program)
    options = replace(
        said, config=validate_options(asdict(said.config), source="the command line", prefix="--")
    )
    if faults := options.faults():
        raise ConfigError(error_list("cannot start", faults))
    return options
