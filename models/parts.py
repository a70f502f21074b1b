"""Where the parts of a model are: a folder or hub id of diffusers, a whole checkpoint, or files of single parts, whose
configuration comes from a diffusers folder.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError

from models.base import ModelFamily
from models.checkpoints import (
    VAE_PREFIXES,
    config_of,
    config_path,
    configs_in,
    files_read,
    hub_id_by_shapes,
    local_path,
    num_parameters,
    part_folder,
    shapes_of,
    weight_dtype,
)
from models.config import ModelError
from models.text_files import recognised, wanted

UNLOADABLE = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
LARGE = 1_000_000_000  # parameters: parts that are not trained are loaded in bf16 beyond it


class LocatedFamily(ModelFamily):
    """A family whose models are made of diffusers' parts; loads none of them."""

    text: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    """The parts of the pipeline that encode captions."""
    in_file: ClassVar[dict[str, tuple[str, ...]]] = {"vae": VAE_PREFIXES}
    """Parts besides the denoiser that diffusers reads from a single file -> how the names of their tensors begin."""

    @property
    def components(self) -> tuple[str, ...]:
        return (*self.text, "vae", self.component, "scheduler")

    @cached_property
    def path(self) -> Path:
        return local_path(self.config)

    @cached_property
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a single file."""
        with self._faults_told():
            return shapes_of(self.path)

    @cached_property
    def held(self) -> set[str]:
        """The parts of `in_file` that are taken from there; none in a folder."""
        names = () if self.path.is_dir() else self.stored_shapes
        there = {part for part, prefixes in self.in_file.items() if any(name.startswith(prefixes) for name in names)}
        return there - self.text_files.keys()

    @cached_property
    def text_files(self) -> dict[str, Path]:
        """The text encoders that are taken from files of their own -> these files. ModelError if one is of none."""
        if not self.config.text_encoders:
            return {}
        names = [name for name in self.text if name.startswith("text_encoder")]
        with self._faults_told("the configurations that --model.text_encoders are recognised by: "):
            there = [name for name in names if self.pipeline_config.get(name, [None])[0] is not None]
            encoders = {name: wanted(config_of(self.source, f"{name}/config.json")) for name in there}
        return recognised(self.config.text_encoders, encoders)

    @cached_property
    def source(self) -> str:
        """The diffusers folder or hub id that holds the configuration, and all that a single file lacks."""
        return str(self.path) if self.path.is_dir() else self.config.config or self._config_of_file()

    def _config_of_file(self) -> str:
        """The hub id that has the configuration of this single file, by the shapes in it."""
        return hub_id_by_shapes(self.stored_shapes)

    @contextmanager
    def _faults_told(self, what: str = "") -> Iterator[None]:
        """Turns what the libraries raise on a bad model into a message for the user, in which `what` comes first."""
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        try:
            yield
        except ModelError:
            raise
        except (*UNLOADABLE, SingleFileComponentError) as error:
            reason = str(error).partition("\nPlease load the component")[0]  # diffusers goes on with Python to type
            hint = ""
            if self.path.is_file() and self.config.config is None:
                hint = "\n  Without a network, name a diffusers folder of the same model as --model.config"
            message = f"--model.path {self.config.path} could not be loaded as {self.name}: {what}{reason}{hint}"
            raise ModelError(message) from error

    @cached_property
    def pipeline_config(self) -> dict[str, Any]:
        with self._faults_told():
            return config_of(self.source, "model_index.json")

    def stored_dtype(self) -> torch.dtype:
        weights = [f for f in self.component_files("denoiser") if f.suffix == ".safetensors"]
        if not weights:
            raise ModelError(f"--model.path {self.config.path} has no .safetensors weights in {self.component}/")
        with self._faults_told(f"{weights[0]}: "):
            return weight_dtype(weights[0])

    def _text_dtype(self, name: str) -> torch.dtype:
        """Large encoders, and a denoiser beside the trained one, would take twice the memory in fp32 for no digit that
        their training had."""
        held = name in self.held
        if held or name in self.text_files:
            files = [self.text_files.get(name, self.path)]
        else:
            files = files_read(part_folder(self.source, name), self.config.variant)
        count = num_parameters(files, self.in_file[name] if held else ("",))
        return torch.bfloat16 if count > LARGE else torch.float32

    def component_files(self, component: str) -> list[Path]:
        if component == "vae" and self.config.vae is not None:
            path = Path(self.config.vae)
            inside = path / "vae" if (path / "vae").is_dir() else path
            return [path] if path.is_file() else files_read(inside, self.config.variant)
        parts = {"denoiser": (self.component,), "vae": ("vae",), "text": self.text}[component]
        held = {self.component, *self.held} if self.path.is_file() else set()
        elsewhere = [part for part in parts if part.replace("tokenizer", "text_encoder") not in held]
        found = [self.path, *configs_in(self.config.config)] if len(elsewhere) < len(parts) else []
        own = {name: file for name, file in self.text_files.items() if name in elsewhere}
        with self._faults_told():
            found += [path for name in own for path in (own[name], config_path(self.source, f"{name}/config.json"))]
            folders = [part_folder(self.source, part) for part in elsewhere if part not in own]
        found += [file for folder in folders for file in files_read(folder, self.config.variant)]
        return list(dict.fromkeys(found))
