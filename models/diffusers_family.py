"""DiffusersFamily: a family of models that diffusers has a pipeline for."""

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from models.base import ModelFamily, Role, TensorLayout, TokenCounts
from models.block_format import PLAIN, BlockFormat
from models.checkpoint_files import VAE_PREFIXES, hub_id_of_shapes, read_config
from models.comfy import ComfyLayout
from models.component_loaders import (
    ComponentLoaders,
    check_fp16,
    encoder_loaders,
    load_vae,
    set_vae_dtype,
    vae_file_config,
)
from models.config import ModelConfig
from models.latents import LatentScale
from models.limits import Limits
from models.model_files import LOADING_ERRORS, FamilyComponents, ModelFiles
from models.quiet import hide_progress_bars
from models.released import CONFIG_NAMES
from models.text_encoder_files import check_tokenizer
from objectives.config import ObjectiveConfig
from objectives.processes import NoiseProcess
from objectives.schedulers import process_from_scheduler


class DiffusersFamily(ModelFamily):
    """Loading and encoding by diffusers, whose classes and components the class attributes name."""

    denoiser_class: ClassVar[str]
    """diffusers' class of the denoiser."""
    vae_class: ClassVar[str] = "AutoencoderKL"
    """diffusers' class of the VAE."""
    text_components: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    """Components of the pipeline that encode captions."""
    caption_tokenizer: ClassVar[str] = "tokenizer"
    """The tokenizer that limits the length of a caption."""
    other_denoisers: tuple[str, ...] = ()
    """Denoisers of the pipeline that are not trained, but draw too."""
    unused_components: ClassVar[tuple[str, ...]] = ()
    """Components of the pipeline that are not loaded."""
    file_prefixes: ClassVar[Mapping[str, tuple[str, ...]]] = {"vae": VAE_PREFIXES}
    """Components besides the denoiser that diffusers reads from a single file -> prefixes of their
    tensors."""
    latent_shift: ClassVar[float] = 0.0
    """Shift of the latents, of a VAE whose config does not have it."""
    latent_scale: ClassVar[float] = 1.0
    """Scale of the latents, of a VAE whose config does not have it."""
    frame_step: ClassVar[int] = 1
    """Limits.frame_step."""
    reads_quantized_files: ClassVar[bool] = False
    """True if single files may be GGUF, or have scaled codes."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        components = FamilyComponents(
            family=self.name,
            denoiser=self.denoiser_component,
            text=self.text_components,
            file_prefixes=self.file_prefixes,
        )
        self.files = ModelFiles(config, components, self.find_source)

    # Facts about a model, from its configurations.

    @property
    def components(self) -> tuple[str, ...]:
        """The components of the pipeline that are loaded for previews."""
        denoisers = (self.denoiser_component, *self.other_denoisers)
        return (*self.text_components, "vae", *denoisers, "scheduler")

    def identity_components(self, role: Role) -> tuple[str, ...]:
        """Return the components of the pipeline that decide what `role` computes."""
        if role == "denoiser":
            return (self.denoiser_component,)
        if role == "vae":
            return ("vae",)
        return self.text_components

    def identity_files(self, role: Role) -> list[Path]:
        files: dict[Path, None] = {}
        for component in self.identity_components(role):
            files |= dict.fromkeys(self.files.files_of_component(component))
        return list(files)

    def find_source(self) -> str:
        """Return the Hub id with the configurations of a single file, by its tensors."""
        return hub_id_of_shapes(self.files.shapes)

    def component_config(self, component: str) -> dict[str, Any]:
        """Return the configuration of a component, with its class as `_class_name`."""
        if component == "vae" and self.config.vae is not None:
            vae: Any = load_vae(self.files, self.vae_class, self.config.vae)
            return dict(vae.config)
        with self.files.loading_errors():
            # read here, because importing the classes is slow and only encoding needs them
            file_name = CONFIG_NAMES.get(component, "config.json")
            return read_config(self.files.source, f"{component}/{file_name}")

    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        """The configuration of the denoiser."""
        import diffusers

        denoiser_class = getattr(diffusers, self.denoiser_class)
        with self.files.loading_errors():
            return denoiser_class.load_config(self.files.source, subfolder=self.denoiser_component)

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        return self.component_config("vae")

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        return self.component_config("scheduler")

    @property
    def latent_step(self) -> int:
        """Pixels per latent: each level of the VAE but the last halves the sides."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def patch_size(self) -> int:
        """Latents per image token, along height and width."""
        return 2

    @property
    def pixel_step(self) -> int:
        """Limits.pixel_step."""
        return self.latent_step * self.patch_size

    @property
    def fps(self) -> float:
        """Limits.fps."""
        return 16.0

    @cached_property
    def limits(self) -> Limits:
        return Limits(
            latent_step=self.latent_step,
            pixel_step=self.pixel_step,
            patch_size=self.patch_size,
            is_video=self.media == "video",
            frame_step=self.frame_step,
            fps=self.fps,
            allows_images=not self.has_image_input,
        )

    def check(self) -> None:
        super().check()
        _ = self.files.text_encoder_files  # first, so that its errors are reported first
        self.files.check_single_file(self.pipelines, self.reads_quantized_files)
        try:
            config = read_config(self.files.source, f"{self.denoiser_component}/config.json")
        except LOADING_ERRORS:
            return  # reported when the denoiser is loaded, which not every command does
        self.check_denoiser(config)

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        """Raise ModelError if a denoiser of this configuration cannot be trained."""

    # Captions.

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that limits the length of a caption."""
        return getattr(self.load_components(self.caption_tokenizer), self.caption_tokenizer)

    @property
    def max_tokens(self) -> int:
        """Tokens of a caption that are encoded, with those of the template around it."""
        return self.tokenizer.model_max_length

    def num_template_tokens(self) -> int:
        """Return the number of tokens that the encoder gets besides those of a caption."""
        return self.tokenizer.num_special_tokens_to_add()

    def count_tokens(self, captions: list[str]) -> TokenCounts:
        limit = self.max_tokens - self.num_template_tokens()
        return TokenCounts.of_captions(self.tokenizer, captions, limit)

    @property
    @abstractmethod
    def cond_width(self) -> int:
        """Width of the embeddings of tokens that the denoiser takes."""

    @property
    def pooled_width(self) -> int:
        """Width of the pooled embedding that the denoiser takes; 0 if it takes none."""
        return 0

    def cond_layout(self) -> dict[str, TensorLayout]:
        encoder = self.caption_tokenizer.replace("tokenizer", "text_encoder")
        dtype = self.files.component_dtype(encoder)
        layout = {"prompt_embeds": TensorLayout((self.max_tokens, self.cond_width), dtype)}
        if self.pooled_width:
            layout["pooled_prompt_embeds"] = TensorLayout((self.pooled_width,), torch.float32)
        return layout

    @cached_property
    def comfy(self) -> ComfyLayout:
        return ComfyLayout(
            self.cond_width,
            max_tokens=self.variable_length.get("prompt_embeds"),
            required=self.sample_conditioning,
            has_frame_axis=self.media == "video",
        )

    # Loading.

    def load_denoiser(self, dtype: torch.dtype | None, blocks: BlockFormat = PLAIN) -> nn.Module:
        import diffusers

        if dtype is None:
            dtype = self.files.trained_dtype()
        hide_progress_bars()
        denoiser_class = getattr(diffusers, self.denoiser_class)
        denoiser: Any
        with self.files.loading_errors():
            if self.files.is_single_file:
                denoiser = self.load_single_file(denoiser_class, dtype, blocks)
            else:
                denoiser = denoiser_class.from_pretrained(
                    self.files.path,
                    subfolder=self.denoiser_component,
                    dtype=dtype,
                    variant=self.config.variant,
                    use_safetensors=True,
                    **blocks.diffusers_options(self.blocks),
                )
        self.check_denoiser(denoiser.config)
        self.adapt_denoiser(denoiser)
        return denoiser

    def use_stored_formats(self, denoiser: nn.Module) -> None:
        """WHEN: memory is planned. Give empty layers the formats of their weights in the file."""

    def load_single_file(
        self, denoiser_class: Any, dtype: torch.dtype, blocks: BlockFormat
    ) -> nn.Module:
        """Load the denoiser of a single file by diffusers' converter."""
        options = blocks.diffusers_options(self.blocks)
        if self.config.config:
            options |= {"config": self.config.config, "subfolder": self.denoiser_component}
        return denoiser_class.from_single_file(str(self.files.path), dtype=dtype, **options)

    def empty_denoiser(self, device: str = "meta") -> nn.Module:
        import diffusers

        denoiser_class = getattr(diffusers, self.denoiser_class)
        with self.files.loading_errors(), torch.device(device):
            denoiser = denoiser_class.from_config(self.denoiser_config)
        self.check_denoiser(denoiser.config)
        self.adapt_denoiser(denoiser)
        return denoiser

    def adapt_denoiser(self, denoiser: nn.Module) -> None:
        """WHEN: the denoiser was made. Change how it computes, where `predict` needs it."""

    def stored_keys(self, denoiser: nn.Module) -> dict[str, str]:
        if self.files.is_single_file:
            return self.layer_names.file_keys(denoiser, self.files.shapes)
        return {name: name for name, _ in denoiser.named_parameters()}

    def load_encoders(self, role: Literal["text", "media"]) -> Any:
        if role == "media":
            return self.load_media_encoders("vae")
        encoders = self.load_components(*self.text_components)
        for component in self.text_components:
            if component.startswith("tokenizer"):
                encoder = getattr(encoders, component.replace("tokenizer", "text_encoder"))
                check_tokenizer(self.config.path, getattr(encoders, component), encoder)
        self.trim_text_encoders(encoders)
        return encoders

    def load_media_encoders(self, *components: str) -> Any:
        """Load the VAE and other components. Raises ModelError if `model.vae_dtype` overflows."""
        if self.config.vae_dtype == "fp16":
            check_fp16(vae_file_config(self.config.vae) if self.config.vae else self.vae_config)
        pipeline = self.load_components(*components)
        set_vae_dtype(pipeline.vae, self.config.vae_dtype)
        return pipeline

    @property
    def media_cache_tag(self) -> str:
        tags: list[str] = []
        if self.config.vae_dtype != "fp32":
            tags.append(self.config.vae_dtype)
        if self.config.vae_tiling:
            tags.append("tiling")
        return " ".join(tags)

    def pipeline(self, denoiser: nn.Module | None, with_text_encoders: bool = True) -> Any:
        names = list(self.components)
        if denoiser is not None:
            names.remove(self.denoiser_component)
        if not with_text_encoders:
            names = [name for name in names if name not in self.text_components]
        return self.load_components(*names, denoiser=denoiser)

    def load_components(self, *components: str, denoiser: nn.Module | None = None) -> Any:
        """Load the pipeline with these components and `denoiser`; the others are None."""
        hide_progress_bars()
        with self.files.loading_errors(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            replacements = {}
            for component, load in self.replacement_loaders().items():
                if component in components:
                    replacements[component] = load()
            names = {*components} - replacements.keys()
            arguments = self._component_arguments(names)
            if denoiser is not None:
                arguments[self.denoiser_component] = denoiser
            pipeline = self.pipeline_class.from_pretrained(
                self.files.source,
                **arguments,
                **self.pipeline_options,
                **self.files.load_options,
            )
        pipeline.register_modules(**replacements)
        if self.config.vae_tiling and pipeline.vae is not None:
            pipeline.vae.enable_tiling()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _component_arguments(self, components: set[str]) -> dict[str, Any]:
        """Return from_pretrained's arguments for these components of the pipeline.

        Those that are not loaded are None or their stand-ins, those from elsewhere are modules."""
        loaders = self.component_loaders()
        stand_ins = self.stand_ins()
        dtypes: dict[str, torch.dtype] = {"default": torch.float32}
        arguments: dict[str, Any] = {"dtype": dtypes}
        for component in self.all_components():
            if component not in components or component in self.files.missing_components:
                arguments[component] = stand_ins.get(component)
            elif component in loaders:
                arguments[component] = loaders[component]()
            elif component not in ("vae", self.denoiser_component):
                dtypes[component] = self.files.component_dtype(component)
        return arguments

    def component_loaders(self) -> ComponentLoaders:
        """Return the loaders of all components that do not come from the source as they are."""
        files = self.files
        loaders = encoder_loaders(
            files, self.pipelines[0], self.all_components(), self.pipeline_options
        )
        if "vae" in files.contained_components:
            loaders["vae"] = partial(load_vae, files, self.vae_class, str(files.path))
        if self.config.vae is not None:
            loaders["vae"] = partial(load_vae, files, self.vae_class, self.config.vae)
        if files.is_single_file:
            loaders[self.denoiser_component] = partial(self.load_denoiser, torch.float32)
        return loaders

    def all_components(self) -> list[str]:
        """Return the components of the pipeline, also those that are not loaded."""
        return list(dict.fromkeys((*self.components, *self.unused_components)))

    def stand_ins(self) -> dict[str, Any]:
        """WHEN: components are not loaded. OUT: objects that the pipeline's class needs for them."""
        return {}

    def replacement_loaders(self) -> ComponentLoaders:
        """Return the loaders of components that are registered after the pipeline is made."""
        return {}

    # Media.

    def encode_media(self, encoders: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = encoders.vae.encode(pixels.to(encoders.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def decode_media(self, encoders: Any, latents: Tensor) -> Tensor:
        decoded = encoders.vae.decode(latents.to(encoders.vae.dtype)).sample
        return decoded.float().clamp(-1, 1)

    @cached_property
    def _scale(self) -> LatentScale:
        return LatentScale(self.vae_config, self.latent_shift, self.latent_scale)

    def normalize(self, latents: Tensor) -> Tensor:
        return self._scale(latents)

    def process(self, config: ObjectiveConfig) -> NoiseProcess:
        with self.files.loading_errors():
            return process_from_scheduler(self.scheduler_config, config)
