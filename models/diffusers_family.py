"""How diffusers loads the parts of a family's models, wherever they are
(models/diffusers_family.py)."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from common.errors import ModelError
from models.base import ModelFamily
from models.checkpoint_files import (
    VAE_PREFIXES,
    check_tokenizer,
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
from models.quiet import quieten
from models.text_encoder_files import load_encoder, recognized, wanted
from objectives.config import ObjectiveConfig
from objectives.processes import NoiseProcess
from objectives.schedulers import process_from_scheduler

WIDENED = {
    torch.float16: torch.float32,
    **dict.fromkeys((torch.float8_e4m3fn, torch.float8_e5m2), torch.bfloat16),
}
CONFIG_NAMES = {"scheduler": "scheduler_config.json"}  # all others have a config.json
UNLOADABLE = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
LARGE = 1_000_000_000  # parameters: parts that are not trained are loaded in bf16 beyond it


class LatentScale:
    """(x - shift) * scale, or (x - mean) * scale / std per channel, as the VAE's config says."""

    def __init__(self, config: Mapping[str, Any], shift: float, scale: float):
        """`shift` and `scale` are of a VAE without statistics whose config does not say."""
        self.shift = config.get("shift_factor") or shift
        self.scale = config.get("scaling_factor") or scale
        self.moments: tuple[Tensor, Tensor] | None = None
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            self.moments = (
                torch.tensor(mean),
                torch.tensor(std) / (config.get("scaling_factor") or 1.0),
            )

    def __call__(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, [F,] h, w) normalized."""
        if self.moments is None:
            return (latents - self.shift) * self.scale if self.shift else latents * self.scale
        if self.moments[0].device != latents.device:  # once: later steps copy nothing
            self.moments = self.moments[0].to(latents.device), self.moments[1].to(latents.device)
        mean, deviation = (moment.view(-1, *[1] * (latents.ndim - 2)) for moment in self.moments)
        return ((latents - mean) / deviation).to(latents.dtype)


class LocatedFamily(ModelFamily):
    """A family whose models are made of diffusers' parts; loads none of them."""

    text: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    """The parts of the pipeline that encode captions."""
    in_file: ClassVar[dict[str, tuple[str, ...]]] = {"vae": VAE_PREFIXES}
    """Parts besides the denoiser that diffusers reads from a single file -> how the names of their
    tensors begin."""

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
        there = {
            part
            for part, prefixes in self.in_file.items()
            if any(name.startswith(prefixes) for name in names)
        }
        return there - self.text_files.keys()

    @cached_property
    def text_files(self) -> dict[str, Path]:
        """The text encoders that are taken from files of their own -> these files. ModelError if
        one is of none."""
        if not self.config.text_encoders:
            return {}
        names = [name for name in self.text if name.startswith("text_encoder")]
        with self._faults_told("the configurations that --model.text_encoders are recognized by: "):
            there = [
                name for name in names if self.pipeline_config.get(name, [None])[0] is not None
            ]
            encoders = {
                name: wanted(config_of(self.source, f"{name}/config.json")) for name in there
            }
        return recognized(self.config.text_encoders, encoders)

    @cached_property
    def source(self) -> str:
        """The diffusers folder or hub id that holds the configuration, and all that a single file
        lacks."""
        return (
            str(self.path) if self.path.is_dir() else self.config.config or self._config_of_file()
        )

    def _config_of_file(self) -> str:
        """The hub id that has the configuration of this single file, by the shapes in it."""
        return hub_id_by_shapes(self.stored_shapes)

    @contextmanager
    def _faults_told(self, what: str = "") -> Iterator[None]:
        """Turns what the libraries raise on a bad model into a message for the user, in which
        `what` comes first."""
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        try:
            yield
        except ModelError:
            raise
        except (*UNLOADABLE, SingleFileComponentError) as error:
            reason = str(error).partition("\nPlease load the component")[
                0
            ]  # diffusers goes on with Python to type
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
            raise ModelError(
                f"--model.path {self.config.path} has no .safetensors weights in {self.component}/"
            )
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
        elsewhere = [
            part for part in parts if part.replace("tokenizer", "text_encoder") not in held
        ]
        found = [self.path, *configs_in(self.config.config)] if len(elsewhere) < len(parts) else []
        own = {name: file for name, file in self.text_files.items() if name in elsewhere}
        with self._faults_told():
            found += [
                path
                for name in own
                for path in (own[name], config_path(self.source, f"{name}/config.json"))
            ]
            folders = [part_folder(self.source, part) for part in elsewhere if part not in own]
        found += [file for folder in folders for file in files_read(folder, self.config.variant)]
        return list(dict.fromkeys(found))


class DiffusersFamily(LocatedFamily):
    """A family that diffusers has a pipeline for; its members name the pipeline's classes and
    parts."""

    denoiser_class: ClassVar[str]
    """diffusers' class of the denoiser."""
    vae_class: ClassVar[str]
    """diffusers' class of the VAE."""
    tokenizer: ClassVar[str] = "tokenizer"
    """The one of them that tells how long a caption may be."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Parts of the pipeline that are left out."""
    pipeline_options: ClassVar[dict[str, Any]] = {}
    latent_shift, latent_scale = 0.0, 1.0
    """Of a VAE whose config does not say."""

    @cached_property
    def _from_pretrained(self) -> dict[str, Any]:
        """Options of from_pretrained."""
        variant = self.config.variant if self.path.is_dir() else None
        return {
            "variant": variant,
            "use_safetensors": True,
            "local_files_only": Path(self.source).is_dir(),
        }

    def _load(self, *wanted: str, denoiser: nn.Module | None = None) -> Any:
        """diffusers' pipeline with the components `wanted` loaded, `denoiser` put in if given, and
        no others."""
        import diffusers

        quieten()
        pipeline_class = getattr(diffusers, self.pipelines[0])
        given: dict[str, Any] = {} if denoiser is None else {self.component: denoiser}
        if self.component in wanted and self.path.is_file():
            given[self.component] = self.load_denoiser(torch.float32)
        if "vae" in wanted and self.config.vae is not None:
            given["vae"] = self._vae_alone(self.config.vae)
        with self._faults_told(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            own = self.own_parts(wanted)
            lacking = {name for name, part in self.pipeline_config.items() if part == [None, None]}
            there = {*wanted} - lacking - own.keys()  # diffusers wants to be told of those too
            given |= {
                name: self._encoder_alone(name)
                for name in self.text
                if name in there & self.text_files.keys()
            }
            absent = {name: None for name in (*self.components, *self.unused)}
            for name in (there & self.held) - given.keys():
                given[name] = self._part_of_file(
                    pipeline_class, name, {**absent, **self.pipeline_options}
                )
            left_out = {name: None for name in absent if name not in there}
            dtypes = {
                name: self._text_dtype(name)
                for name in there - {"vae", self.component} - given.keys()
            }
            options = {
                **left_out,
                **given,
                **self.pipeline_options,
                "dtype": {"default": torch.float32, **dtypes},
            }
            pipeline = pipeline_class.from_pretrained(
                self.source, **options, **self._from_pretrained
            )
        pipeline.register_modules(**own)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def own_parts(self, wanted: tuple[str, ...]) -> dict[str, Any]:
        """Those of the parts `wanted` that diffusers could not load."""
        return {}

    def _part_of_file(self, pipeline_class: Any, name: str, options: dict[str, Any]) -> nn.Module:
        """A part that the single file holds; `options` without all parts."""
        if name == "vae":
            return self._vae_alone(str(self.path))
        options = {part: value for part, value in options.items() if part != name}
        dtype = self._text_dtype(name)
        return getattr(
            pipeline_class.from_single_file(
                str(self.path), config=self.source, dtype=dtype, **options
            ),
            name,
        )

    def _vae_alone(self, path: str) -> nn.Module:
        """A VAE from a file or a folder of its own."""
        import diffusers

        vae_class = getattr(diffusers, self.vae_class)
        with self._faults_told(f"--model.vae {path}: " if path == self.config.vae else ""):
            if Path(path).is_dir():
                inside = "vae" if (Path(path) / "vae").is_dir() else None
                return vae_class.from_pretrained(path, subfolder=inside, dtype=torch.float32)
            source = {"config": self.source, "subfolder": "vae"}
            return vae_class.from_single_file(path, dtype=torch.float32, **source)

    def _encoder_alone(self, name: str) -> nn.Module:
        """A text encoder from a file of its own."""
        file, class_name = self.text_files[name], self.pipeline_config[name][1]
        with self._faults_told(f"--model.text_encoders {file}: "):
            folder = config_path(self.source, f"{name}/config.json").parent
            return load_encoder(file, class_name, folder, self._text_dtype(name))

    def load_denoiser(self, dtype: torch.dtype | None) -> nn.Module:
        import diffusers

        if dtype is None:
            dtype = WIDENED.get(stored := self.stored_dtype(), stored)
        quieten()
        denoiser_class = getattr(diffusers, self.denoiser_class)
        with self._faults_told():
            if self.path.is_dir():
                denoiser = denoiser_class.from_pretrained(
                    self.path,
                    subfolder=self.component,
                    dtype=dtype,
                    variant=self.config.variant,
                    use_safetensors=True,
                )
            else:
                denoiser = self.denoiser_of_file(denoiser_class, dtype)
        self.check_denoiser(denoiser.config)
        return denoiser

    def denoiser_of_file(self, denoiser_class: Any, dtype: torch.dtype) -> nn.Module:
        """The denoiser in a single file, as diffusers reads it."""
        given = (
            {"config": self.config.config, "subfolder": self.component}
            if self.config.config
            else {}
        )
        return denoiser_class.from_single_file(str(self.path), dtype=dtype, **given)

    def check(self) -> None:
        _ = self.text_files  # whose faults are told before anything else
        try:
            config = config_of(self.source, f"{self.component}/config.json")
        except UNLOADABLE:
            return  # told when it is loaded, which may never be
        self.check_denoiser(config)

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        """Raises ModelError if a denoiser of that config is of another family after all."""

    def empty_denoiser(self) -> nn.Module:
        import diffusers

        denoiser_class = getattr(diffusers, self.denoiser_class)
        with self._faults_told(), torch.device("meta"):
            denoiser = denoiser_class.from_config(self.denoiser_config)
        self.check_denoiser(denoiser.config)
        return denoiser

    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        import diffusers

        with self._faults_told():
            return getattr(diffusers, self.denoiser_class).load_config(
                self.source, subfolder=self.component
            )

    def part_config(self, name: str) -> dict[str, Any]:
        """The configuration of a part, with its class as `_class_name`."""
        if name == "vae" and self.config.vae is not None:
            return dict(self._vae_alone(self.config.vae).config)  # type: ignore[arg-type]
        with (
            self._faults_told()
        ):  # read here: the classes are slow imports that only encoding needs
            return config_of(self.source, f"{name}/{CONFIG_NAMES.get(name, 'config.json')}")

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        return self.part_config("vae")

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        return self.part_config("scheduler")

    def load_encoders(self, what: Literal["text", "media"]) -> Any:
        if what == "media":
            return self._load("vae")
        encoders = self._load(*self.text)
        for name in self.text:
            if name.startswith("tokenizer"):
                encoder = getattr(encoders, name.replace("tokenizer", "text_encoder"))
                check_tokenizer(self.config.path, getattr(encoders, name), encoder)
        return encoders

    def pipeline(self, denoiser: nn.Module | None) -> Any:
        loaded = [name for name in self.components if name != self.component or denoiser is None]
        return self._load(*loaded, denoiser=denoiser)

    @cached_property
    def counting_tokenizer(self) -> Any:
        return getattr(self._load(self.tokenizer), self.tokenizer)

    def encode_media(self, encoders: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = encoders.vae.encode(pixels).latent_dist
        return posterior.mean, posterior.std

    def decode_media(self, encoders: Any, latents: Tensor) -> Tensor:
        return encoders.vae.decode(latents).sample.clamp(-1, 1)

    def latent_step(self) -> int:
        return 2 ** (
            len(self.vae_config["block_out_channels"]) - 1
        )  # each level but the last halves the sides

    def process(self, config: ObjectiveConfig) -> NoiseProcess:
        with self._faults_told():
            return process_from_scheduler(self.scheduler_config, config)

    @cached_property
    def _latent_scale(self) -> LatentScale:
        return LatentScale(self.vae_config, self.latent_shift, self.latent_scale)

    def normalize(self, latents: Tensor) -> Tensor:
        return self._latent_scale(latents)
