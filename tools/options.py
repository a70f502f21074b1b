"""What the sub-commands are told. No torch here: `--help` and faults answer at once."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from models.config import FamilyName, ModelConfig, path_error

Dtype = Literal["fp32", "bf16", "fp16"]
Format = Literal["kohya", "comfyui", "diffusers", "peft"]
Patterns = UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all sub-commands are told."""

    command: ClassVar[str]

    family: FamilyName | None = None
    """The model's family; None: recognized."""
    variant: str | None = None
    """Weight variant of a diffusers folder, such as fp16."""
    config: str | None = None
    """For a model in a single file: a diffusers folder or hub id that holds the configuration."""

    def faults(self) -> list[str]:
        """What is wrong with the values, found without opening a file."""
        raise NotImplementedError

    def model_config(self, path: str) -> ModelConfig:
        return ModelConfig(path, self.family, self.variant, self.config)

    def model_faults(self, flag: str, path: str | None) -> list[str]:
        fault = path_error(self.model_config(path)) if path is not None else None
        return [f"{flag}: {fault}"] if fault else []


@dataclass(frozen=True, kw_only=True)
class Writing(Options):
    """What sub-commands that write something are told. Each has a field `out`, after its inputs."""

    overwrite: bool = False
    """Replace OUT if it exists."""

    def out_faults(self, path: str, inputs: dict[str, str], folder_with: str = "") -> list[str]:
        """Why OUT cannot be written, as a file, or as a folder of the kind that has the file `folder_with`: nothing
        that is there is lost without being asked for."""
        out, faults = Path(path), []
        for name, given in inputs.items():
            there, here = Path(given).resolve(), out.resolve()
            if there == here or here in there.parents or (there.is_dir() and there in here.parents):
                return [
                    f"OUT {out}: is {name}, in it or around it; a file that is read is never written"
                ]
        if not folder_with and out.suffix != ".safetensors":
            faults.append(f"OUT {out}: must end in .safetensors")
        if not out.parent.is_dir():
            faults.append(f"OUT {out}: the folder {out.parent} does not exist")
        if out.exists() and not self.overwrite:
            faults.append(f"OUT {out}: exists. Name another, or add --overwrite")
        elif out.exists() and not (out / folder_with if folder_with else out).is_file():
            kind = f"folder with {folder_with}" if folder_with else "file"
            faults.append(
                f"OUT {out}: exists and is not a {kind}, so --overwrite does not replace it"
            )
        return faults


def adapter_faults(name: str, path: str) -> list[str]:
    """Why `path` cannot be an adapter."""
    if Path(path).is_dir() and not (Path(path) / "adapter_config.json").is_file():
        return [f"{name} {path}: a folder without adapter_config.json, so not PEFT's"]
    return [] if Path(path).exists() else [f"{name} {path}: does not exist"]


def pattern_faults(patterns: tuple[str, ...]) -> list[str]:
    faults = []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            faults.append(f"--drop {pattern}: not a regular expression ({error})")
    return faults


def rank_faults(rank: int | None, energy: float | None = None) -> list[str]:
    faults = [] if rank is None or rank >= 1 else [f"--rank {rank}: must be at least 1"]
    if energy is not None and not 0 < energy <= 1:
        faults.append(f"--energy {energy:g}: must be above 0 and at most 1")
    if rank is not None and energy is not None:
        faults.append(f"--rank {rank} and --energy {energy:g}: give one of them")
    return faults


@dataclass(frozen=True, kw_only=True)
class Inspect(Options):
    """Shows what is in an adapter file; with a model, also what of it fits (exit code 1 if
    something does not)."""

    command: ClassVar[str] = "inspect"

    file: Annotated[Positional[str], arg(metavar="FILE")]
    """A .safetensors file, or a folder of PEFT's."""
    model: str | None = None
    """The base model: a diffusers folder, hub id or single file."""

    def faults(self) -> list[str]:
        return [*adapter_faults("FILE", self.file), *self.model_faults("--model", self.model)]


@dataclass(frozen=True, kw_only=True)
class Convert(Writing):
    """Writes an adapter file in another program's format, or as another algorithm."""

    command: ClassVar[str] = "convert"

    file: Annotated[Positional[str], arg(metavar="IN")]
    """A .safetensors file in any format, or a folder of PEFT's."""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """What to write."""
    format: Format
    """Whose keys OUT has. peft writes a folder."""
    model: str
    """The base model: a diffusers folder, hub id or single file."""
    convert: Literal["none", "lora-exact", "lora-svd", "full"] = "none"
    """lora-exact: LoHa and LoKr as the same function in a larger LoRA. lora-svd: anything as the nearest LoRA of rank
    RANK. full: anything as whole matrices."""
    rank: int | None = None
    """Rank for lora-svd."""
    dtype: Dtype | None = None
    """dtype of OUT; none means that of IN."""
    drop: Patterns = ()
    """Regular expression; keys of IN of which it matches the whole are left out, such as
    'lora_te.*'."""

    def faults(self) -> list[str]:
        faults = [*adapter_faults("IN", self.file), *self.model_faults("--model", self.model)]
        faults += [*rank_faults(self.rank), *pattern_faults(self.drop)]
        if (self.rank is None) == (self.convert == "lora-svd"):
            faults.append(
                f"--rank {self.rank}: goes with --convert lora-svd, and --convert is {self.convert}"
            )
        return faults + self.out_faults(
            self.out,
            {"IN": self.file, "--model": self.model},
            "adapter_config.json" if self.format == "peft" else "",
        )


@dataclass(frozen=True, kw_only=True)
class Merge(Writing):
    """Writes a base model with adapters worked into its weights: W + strength x dW of each adapter, dW being what the
    adapter makes of the original W."""

    command: ClassVar[str] = "merge"

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """The base model: a diffusers folder, hub id or single file. OUT is of the same kind."""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """What to write."""
    lora: UseAppendAction[
        tuple[Annotated[tuple[str, ...], arg(metavar="FILE[:STRENGTH] ...")], ...]
    ] = ()
    """Adapters, each with its strength (1 if none is given)."""
    drop: Patterns = ()
    """Regular expression; keys of the adapters of which it matches the whole are left out, such as
    'lora_te.*'."""

    def loras(self) -> dict[str, list[float]]:
        """Path -> strengths; NaN for one that is no number."""
        found: dict[str, list[float]] = {}
        for given in (lora for loras in self.lora for lora in loras):
            path, _, strength = given.rpartition(":")
            if Path(given).exists() or not path:
                path, strength = given, "1"
            try:
                found.setdefault(path, []).append(float(strength))
            except ValueError:
                found.setdefault(path, []).append(math.nan)
        return found

    def faults(self) -> list[str]:
        faults = [*self.model_faults("MODEL", self.model), *pattern_faults(self.drop)]
        if not self.loras():
            faults.append("--lora: no adapter given")
        for path, strengths in self.loras().items():
            faults += adapter_faults("--lora", path)
            if len(strengths) > 1:
                faults.append(f"--lora {path}: given {len(strengths)} times")
            if not math.isfinite(sum(strengths)):
                faults.append(f"--lora {path}: what follows the last ':' is not a number")
        inputs = {"MODEL": self.model, **{f"--lora {path}": path for path in self.loras()}}
        return faults + self.out_faults(
            self.out, inputs, "" if Path(self.model).is_file() else "model_index.json"
        )


@dataclass(frozen=True, kw_only=True)
class Resize(Writing):
    """Writes every layer of an adapter as the nearest LoRA of a rank, or of the least rank that keeps a share of its
    energy (the sum of the squares of the update's singular values)."""

    command: ClassVar[str] = "resize"

    file: Annotated[Positional[str], arg(metavar="IN")]
    """A .safetensors file in any format, or a folder of PEFT's."""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """What to write."""
    rank: int | None = None
    """Rank of every layer."""
    energy: float | None = None
    """Share of the energy to keep, such as 0.99."""
    model: str | None = None
    """The base model, which all algorithms but LoRA need: a diffusers folder, hub id or single
    file."""
    dtype: Dtype | None = None
    """dtype of OUT; none means that of IN."""
    drop: Patterns = ()
    """Regular expression; keys of IN of which it matches the whole are left out, such as
    'lora_te.*'."""

    def faults(self) -> list[str]:
        faults = [*adapter_faults("IN", self.file), *self.model_faults("--model", self.model)]
        faults += [*rank_faults(self.rank, self.energy), *pattern_faults(self.drop)]
        if self.rank is None and self.energy is None:
            faults.append("--rank or --energy: give one of them")
        inputs = {"IN": self.file, **({"--model": self.model} if self.model else {})}
        return faults + self.out_faults(
            self.out, inputs, "adapter_config.json" if Path(self.file).is_dir() else ""
        )


@dataclass(frozen=True, kw_only=True)
class Extract(Writing):
    """Writes the difference of two models' denoisers as an adapter. Text encoders and VAEs are not
    compared."""

    command: ClassVar[str] = "extract"

    base: Annotated[Positional[str], arg(metavar="BASE")]
    """The base model: a diffusers folder, hub id or single file."""
    tuned: Annotated[Positional[str], arg(metavar="TUNED")]
    """The model that was made of it."""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """What to write."""
    algorithm: Literal["LoRA", "LoKr", "Full"]
    """LoRA: the nearest of a rank. LoKr: the nearest Kronecker product. Full: exact, norms and
    biases too."""
    rank: int | None = None
    """LoRA: rank of every layer. LoKr: rank of the larger factor; none keeps it whole."""
    energy: float | None = None
    """Instead of a rank: the share of the energy to keep, such as 0.99."""
    factor: int | None = None
    """LoKr: the smaller factor's side is at most this; none splits nearest to a square."""
    dtype: Dtype = "fp32"
    """dtype of OUT."""

    def faults(self) -> list[str]:
        faults = [*self.model_faults("BASE", self.base), *self.model_faults("TUNED", self.tuned)]
        faults += rank_faults(self.rank, self.energy)
        sized = self.rank is not None or self.energy is not None
        if self.algorithm == "LoRA" and not sized:
            faults.append("--rank or --energy: --algorithm LoRA needs one of them")
        if self.algorithm == "Full" and sized:
            faults.append("--rank or --energy: --algorithm Full has no rank")
        if self.factor is not None and (self.algorithm != "LoKr" or self.factor < 1):
            faults.append(f"--factor {self.factor}: at least 1, and with --algorithm LoKr alone")
        return faults + self.out_faults(self.out, {"BASE": self.base, "TUNED": self.tuned})


OPTIONS: dict[str, type[Options]] = {
    cls.command: cls for cls in (Inspect, Convert, Merge, Resize, Extract)
}


def parse(argv: list[str]) -> Options:
    """The options in `argv`, which begins with the command; a wrong name or type exits with code 2
    (tyro)."""
    command, *args = argv
    return tyro.cli(
        OPTIONS[command], args=args, use_underscores=True, prog=f"train_lora.py {command}"
    )
