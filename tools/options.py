"""Options of the commands that work on finished files. Imports no torch, so that `--help` and
errors appear at once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from models.config import FamilyName, ModelConfig, index_path, path_error
from tools.argument_checks import (
    PEFT_CONFIG,
    adapter_errors,
    is_replaceable,
    number_or_nan,
    overlaps,
    pattern_errors,
    rank_errors,
)

Dtype = Literal["fp32", "bf16", "fp16"]
Format = Literal["kohya", "comfyui", "diffusers", "peft"]
Patterns = UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that all commands have."""

    command: ClassVar[str]

    family: FamilyName | None = None
    """Model family (docs/models.md). Detected from the model if not set; must match it."""
    variant: str | None = None
    """Weight variant of a diffusers folder, such as fp16."""
    config: str | None = None
    """For a model in a single file: a diffusers folder or Hub id with the configuration."""

    def errors(self) -> list[str]:
        """Return the errors in the values. No file is opened."""
        raise NotImplementedError

    def model_config(self, path: str) -> ModelConfig:
        """Return the config of a model of this command."""
        return ModelConfig(path, self.family, self.variant, self.config)

    def model_errors(self, name: str, path: str | None) -> list[str]:
        """Return an error if a path cannot be a model. `name`: of the argument, such as --model."""
        if path is None:
            return []
        error = path_error(self.model_config(path))
        return [f"{name}{error}"] if error else []


@dataclass(frozen=True, kw_only=True)
class WritingOptions(Options):
    """Options of commands that write. Each of them has a field `out`, after its inputs."""

    overwrite: bool = False
    """Replace OUT if it exists."""

    def out_errors(
        self, path: str, inputs: Mapping[str, str], marker_file: str | None = None
    ) -> list[str]:
        """Return why OUT cannot be written.

        `inputs`: name of an argument -> path. `marker_file`: OUT is a folder that has this file,
        and no other folder is replaced."""
        out = Path(path)
        for name, input_path in inputs.items():
            if overlaps(Path(input_path), out):
                return [
                    f"OUT {out}: would overwrite {name} {input_path}. Choose a path outside of it, "
                    "and not a folder that contains it"
                ]
        errors = []
        if marker_file is None and out.suffix != ".safetensors":
            errors.append(f"OUT {out}: must end in .safetensors")
        if marker_file is not None and out.suffix == ".safetensors":
            errors.append(f"OUT {out}: will be a folder, so it cannot end in .safetensors")
        if not out.parent.is_dir():
            errors.append(f"OUT {out}: the folder {out.parent} does not exist")
        if out.exists() and not self.overwrite:
            errors.append(f"OUT {out}: already exists. Choose another path, or add --overwrite")
        elif out.exists() and not is_replaceable(out, marker_file):
            expected = "a file" if marker_file is None else f"a folder with {marker_file}"
            errors.append(
                f"OUT {out}: exists and is not {expected}, so --overwrite does not replace it. "
                "Choose another path"
            )
        return errors


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Options):
    """Print the content of an adapter file. With a model, also print which keys fit it; the exit
    code is 1 if some do not."""

    command: ClassVar[str] = "inspect"

    file: Annotated[Positional[str], arg(metavar="FILE")]
    """A .safetensors file, or a folder of PEFT."""
    model: str | None = None
    """Base model: a diffusers folder, a Hub id or a single file."""
    against: str | None = None
    """Base model as another program loads it, for example in fp8: print how much of the adapter stays
    if that program merges it into the weights."""

    def errors(self) -> list[str]:
        return [
            *adapter_errors("FILE", self.file),
            *self.model_errors("--model", self.model),
            *self.model_errors("--against", self.against),
        ]


@dataclass(frozen=True, kw_only=True)
class RewritingOptions(WritingOptions):
    """Options of commands that write an adapter again."""

    file: Annotated[Positional[str], arg(metavar="IN")]
    """A .safetensors file in any format, or a folder of PEFT."""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """Path of the new adapter."""
    dtype: Dtype | None = None
    """dtype of OUT. None: that of IN."""
    drop: Patterns = ()
    """Regular expression. Keys of IN that it matches completely are left out, as with --drop
    'lora_te.*'."""

    def input_errors(self, model: str | None) -> list[str]:
        """Return the errors in IN, in --model and in --drop."""
        return [
            *adapter_errors("IN", self.file),
            *self.model_errors("--model", model),
            *pattern_errors(self.drop),
        ]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(RewritingOptions):
    """Write an adapter file in another program's format, or as another algorithm."""

    command: ClassVar[str] = "convert"

    format: Format
    """Format of OUT. peft: a folder."""
    model: str
    """Base model: a diffusers folder, a Hub id or a single file."""
    convert: Literal["none", "lora-exact", "lora-svd", "full"] = "none"
    """lora-exact: write LoHa and LoKr as a larger LoRA that is the same function. lora-svd:
    write any algorithm as the nearest LoRA of --rank. full: write any algorithm as whole
    matrices."""
    rank: int | None = None
    """Rank for --convert lora-svd."""

    def errors(self) -> list[str]:
        inputs = {"IN": self.file, "--model": self.model}
        marker_file = PEFT_CONFIG if self.format == "peft" else None
        return [
            *self.input_errors(self.model),
            *rank_errors(self.rank),
            *self.conversion_errors(),
            *self.out_errors(self.out, inputs, marker_file),
        ]

    def conversion_errors(self) -> list[str]:
        """Return an error if --rank does not go with --convert."""
        needs_rank = self.convert == "lora-svd"
        if needs_rank and self.rank is None:
            return ["--rank: --convert lora-svd needs the rank of the LoRA"]
        if needs_rank or self.rank is None:
            return []
        return [
            f"--rank {self.rank}: has no effect with --convert {self.convert}; expected --convert "
            "lora-svd. Leave --rank out"
        ]


@dataclass(frozen=True, kw_only=True)
class MergeOptions(WritingOptions):
    """Write a base model with adapters merged into its weights: W + the sum of strength x dW.
    Each dW is computed from the original W."""

    command: ClassVar[str] = "merge"

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Base model: a diffusers folder, a Hub id or a single file."""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """Path of the new model: a folder or a file, as MODEL is."""
    lora: UseAppendAction[
        tuple[Annotated[tuple[str, ...], arg(metavar="FILE[:STRENGTH] ...")], ...]
    ] = ()
    """Adapters, each with its strength. The default strength is 1."""
    drop: Patterns = ()
    """Regular expression. Keys of the adapters that it matches completely are left out, as with
    --drop 'lora_te.*'."""

    def strengths(self) -> dict[str, list[float]]:
        """Return path -> all strengths that are given for it; NaN for text that is not a number."""
        strengths: dict[str, list[float]] = {}
        for text in chain(*self.lora):
            path, _, number = text.rpartition(":")
            has_strength = path and not Path(text).exists()
            if not has_strength:
                path = text
                number = "1"
            strengths.setdefault(path, [])
            strengths[path].append(number_or_nan(number))
        return strengths

    def errors(self) -> list[str]:
        inputs = {"MODEL": self.model}
        for path in self.strengths():
            inputs[f"--lora {path}"] = path
        is_file = Path(self.model).is_file()
        marker_file = None if is_file else index_path(Path(self.model)).name
        return [
            *self.model_errors("MODEL", self.model),
            *pattern_errors(self.drop),
            *self.lora_errors(),
            *self.out_errors(self.out, inputs, marker_file),
        ]

    def lora_errors(self) -> list[str]:
        """Return the errors in --lora."""
        strengths = self.strengths()
        if not strengths:
            return ["--lora: no adapter given. Name at least one file"]
        errors = []
        for path, numbers in strengths.items():
            errors += adapter_errors("--lora", path)
            if len(numbers) > 1:
                errors.append(
                    f"--lora {path}: is given {len(numbers)} times. Name each adapter once, with "
                    "the sum of its strengths"
                )
            if not math.isfinite(sum(numbers)):
                errors.append(f"--lora {path}: the text after the last ':' is not a number")
        return errors


@dataclass(frozen=True, kw_only=True)
class ResizeOptions(RewritingOptions):
    """Write each layer of an adapter as the nearest LoRA of a rank."""

    command: ClassVar[str] = "resize"

    rank: int | None = None
    """Rank of every layer."""
    energy: float | None = None
    """Share of the energy to keep, such as 0.99: every layer gets the smallest sufficient rank. The
    energy is the sum of the squares of the singular values."""
    model: str | None = None
    """Base model: a diffusers folder, a Hub id or a single file. Needed for all algorithms except
    LoRA."""

    def errors(self) -> list[str]:
        size_errors = rank_errors(self.rank, self.energy)
        if self.rank is None and self.energy is None:
            size_errors.append(
                "--rank or --energy: neither is given. Choose the rank of every layer, or the "
                "share of the energy to keep"
            )
        inputs = {"IN": self.file}
        if self.model is not None:
            inputs["--model"] = self.model
        marker_file = PEFT_CONFIG if Path(self.file).is_dir() else None
        return [
            *self.input_errors(self.model),
            *size_errors,
            *self.out_errors(self.out, inputs, marker_file),
        ]


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(WritingOptions):
    """Write the difference between the denoisers of two models as an adapter. Text encoders and
    VAEs are not compared."""

    command: ClassVar[str] = "extract"

    base: Annotated[Positional[str], arg(metavar="BASE")]
    """Base model: a diffusers folder, a Hub id or a single file."""
    tuned: Annotated[Positional[str], arg(metavar="TUNED")]
    """The model that was trained from BASE."""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """Path of the new adapter."""
    algorithm: Literal["LoRA", "LoKr", "Full"]
    """LoRA: the nearest LoRA of a rank. LoKr: the nearest Kronecker product. Full: the exact
    difference, with norms and biases."""
    rank: int | None = None
    """LoRA: rank of every layer. LoKr: rank of the larger factor. None: the larger factor is not
    divided."""
    energy: float | None = None
    """Share of the energy to keep, such as 0.99, instead of a rank. The energy is the sum of the
    squares of the singular values."""
    factor: int | None = None
    """LoKr: largest side of the smaller factor. None: the split that is nearest to a square."""
    dtype: Dtype = "fp32"
    """dtype of OUT."""

    def errors(self) -> list[str]:
        return [
            *self.model_errors("BASE", self.base),
            *self.model_errors("TUNED", self.tuned),
            *rank_errors(self.rank, self.energy),
            *self.algorithm_errors(),
            *self.out_errors(self.out, {"BASE": self.base, "TUNED": self.tuned}),
        ]

    def algorithm_errors(self) -> list[str]:
        """Return the errors in options that do not go with --algorithm."""
        errors = []
        has_size = self.rank is not None or self.energy is not None
        if self.algorithm == "LoRA" and not has_size:
            errors.append("--rank or --energy: --algorithm LoRA needs one of them")
        if self.algorithm == "Full" and has_size:
            errors.append("--rank or --energy: has no effect with --algorithm Full. Leave it out")
        if self.factor is None:
            return errors
        if self.algorithm != "LoKr":
            errors.append(
                f"--factor {self.factor}: has no effect with --algorithm {self.algorithm}; "
                "expected --algorithm LoKr. Leave --factor out"
            )
        if self.factor < 1:
            errors.append(f"--factor {self.factor}: must be at least 1")
        return errors


COMMAND_CLASSES = (InspectOptions, ConvertOptions, MergeOptions, ResizeOptions, ExtractOptions)
OPTIONS: dict[str, type[Options]] = {cls.command: cls for cls in COMMAND_CLASSES}


def parse(argv: list[str]) -> Options:
    """Return the options in `argv`, which begins with the command.

    tyro ends the program with exit code 2 for wrong names and types."""
    command, *arguments = argv
    return tyro.cli(
        OPTIONS[command], args=arguments, use_underscores=True, prog=f"train_lora.py {command}"
    )
