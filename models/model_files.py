"""The files of one model: where its components come from.

A model is a diffusers folder, a Hub id, or a single file. A single file lacks configurations and
perhaps components, which come from its `source`: a diffusers folder or Hub id.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from common.errors import ModelError
from models import family_classes
from models.block_format import BlockFormat
from models.checkpoint_files import (
    GGUF_SUFFIX,
    SAFETENSORS_SUFFIX,
    Shapes,
    component_files,
    component_folder,
    config_files,
    config_path,
    denoiser_prefix,
    has_scales,
    is_quantized_file,
    local_path,
    num_parameters,
    read_config,
    read_index,
    tensor_shapes,
    weight_dtype,
    without_denoiser_prefix,
)
from models.config import WEIGHT_SUFFIXES, ModelConfig
from models.encoder_placement import TEXT_ENCODERS
from models.stored_formats import quantized_file_message
from models.text_encoder_files import Signature, assign_files

LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
"""Errors that libraries raise for a bad model."""
ENCODERS = (*TEXT_ENCODERS, "image_encoder", "connectors", "siglip")
"""Beginnings of the names of components that encode captions and images, besides the VAE."""
READ_HERE = ("text_conditioner",)
"""Components that this program reads from single files, not diffusers."""
WIDER_DTYPES = {
    torch.float16: torch.float32,
    torch.float8_e4m3fn: torch.bfloat16,
    torch.float8_e5m2: torch.bfloat16,
}
"""Dtype of weights on disk -> dtype in which they are trained."""
MIN_LARGE = 1_000_000_000
"""Components that are not trained are loaded in bf16 if they have more parameters than this."""


@dataclass(frozen=True)
class FamilyComponents:
    """The components of a family's diffusers pipeline that files contain."""

    family: str
    denoiser: str
    text: tuple[str, ...]
    """Text encoders and tokenizers."""
    file_prefixes: Mapping[str, tuple[str, ...]]
    """Components besides the denoiser in a single file -> prefixes of their tensors."""


def all_pipelines() -> list[str]:
    """Return diffusers' pipelines of all families."""
    pipelines: list[str] = []
    for family in family_classes().values():
        pipelines += family.pipelines
    return pipelines


class ModelFiles:
    """The files of one model of a family."""

    def __init__(
        self, config: ModelConfig, components: FamilyComponents, find_source: Callable[[], str]
    ):
        self.config, self.components = config, components
        self._find_source = find_source

    @cached_property
    def path(self) -> Path:
        """The diffusers folder or the single file; a Hub id is downloaded first."""
        return local_path(self.config)

    @property
    def is_single_file(self) -> bool:
        return not self.path.is_dir()

    @cached_property
    def is_quantized(self) -> bool:
        """True if the model is a single file whose weights stay quantized."""
        with self.loading_errors():
            return self.is_single_file and is_quantized_file(self.path)

    @property
    def has_plain_tensors(self) -> bool:
        """True if libraries read the weights: .safetensors files without codes."""
        return not self.is_quantized and self.path.suffix != GGUF_SUFFIX

    @cached_property
    def shapes(self) -> Shapes:
        """Shapes of the tensors of a single file."""
        with self.loading_errors():
            return tensor_shapes(self.path)

    @cached_property
    def denoiser_shapes(self) -> Shapes:
        """`shapes`, with the denoiser's names also without their prefix."""
        return without_denoiser_prefix(self.shapes)

    @cached_property
    def denoiser_prefix(self) -> str:
        """Beginning of the denoiser's tensors in a single file."""
        return denoiser_prefix(self.shapes)

    @cached_property
    def source(self) -> str:
        """The diffusers folder or Hub id with all configurations and missing components."""
        if not self.is_single_file:
            return str(self.path)
        return self.config.config or self._find_source()

    @cached_property
    def pipeline_config(self) -> dict[str, Any]:
        """The index of the source's pipeline: component -> [library, class]."""
        with self.loading_errors():
            return read_index(self.source)

    def check_single_file(self, pipelines: tuple[str, ...], reads_quantized: bool) -> None:
        """Raise ModelError if a single file has quantized weights that its family does not read, or
        if --model.config describes another kind of model.

        `pipelines`: of the family."""
        if not self.is_single_file:
            return
        if not self.has_plain_tensors and not reads_quantized:
            raise ModelError(quantized_file_message(self.config.path, self.components.family))
        if self.config.config is None:
            return
        pipeline = self.pipeline_config.get("_class_name")
        other_pipelines = set(all_pipelines()) - {*pipelines}
        if isinstance(pipeline, str) and pipeline in other_pipelines:
            raise ModelError(
                f"--model.config {self.config.config}: is the configuration of a {pipeline}, but "
                f"{self.config.path} is {self.components.family}. Use the configuration of the same "
                "model"
            )

    @cached_property
    def missing_components(self) -> set[str]:
        """Components of the pipeline that this model does not have."""
        return {name for name, entry in self.pipeline_config.items() if entry == [None, None]}

    @cached_property
    def contained_components(self) -> set[str]:
        """Components besides the denoiser that are read from the single file."""
        if not self.is_single_file:
            return set()
        contained = set()
        for component, prefixes in self.components.file_prefixes.items():
            if component in self.text_encoder_files:
                continue
            if any(name.startswith(prefixes) for name in self.shapes):
                contained.add(component)
        if self.is_quantized and self.path.suffix == SAFETENSORS_SUFFIX:
            self._check_contained(contained)
        return contained

    def _check_contained(self, contained: set[str]) -> None:
        """Raise ModelError if diffusers would read codes of these components without their scales."""
        for component in contained:
            is_replaced = component == "vae" and self.config.vae is not None
            prefixes = self.components.file_prefixes[component]
            is_unread = not is_replaced and component not in READ_HERE
            if is_unread and has_scales(self.path, prefixes):
                option = "--model.vae" if component == "vae" else "--model.text_encoders"
                raise ModelError(
                    f"--model.path {self.config.path}: contains {component} with scaled weights, "
                    f"which are not read from there. Also set {option} to its own file"
                )

    @cached_property
    def text_encoder_files(self) -> dict[str, Path]:
        """Text encoders that are read from files of --model.text_encoders.

        Raises ModelError if a file contains no text encoder of this model."""
        if not self.config.text_encoders:
            return {}
        signatures = {}
        with self.loading_errors("the configurations of the text encoders: "):
            for component in self.components.text:
                is_present = self.pipeline_config.get(component, [None])[0] is not None
                if component.startswith("text_encoder") and is_present:
                    config = read_config(self.source, f"{component}/config.json")
                    signatures[component] = Signature.of_config(config)
        return assign_files(self.config.text_encoders, signatures)

    @cached_property
    def load_options(self) -> dict[str, Any]:
        """Arguments of diffusers' from_pretrained for the source."""
        return {
            "variant": None if self.is_single_file else self.config.variant,
            "use_safetensors": True,
            "local_files_only": Path(self.source).is_dir(),
        }

    def files_of_component(self, component: str) -> list[Path]:
        """Return the files that decide what a component of the pipeline computes.

        A tokenizer belongs to its text encoder."""
        if component == "vae" and self.config.vae is not None:
            return self._vae_files(Path(self.config.vae))
        if self._is_in_single_file(component):
            return [self.path, *config_files(self.config.config)]
        with self.loading_errors():
            if component in self.text_encoder_files:
                config = config_path(self.source, f"{component}/config.json")
                return [self.text_encoder_files[component], config]
            return component_files(component_folder(self.source, component), self.config.variant)

    def _vae_files(self, path: Path) -> list[Path]:
        if path.is_file():
            return [path]
        folder = path / "vae" if (path / "vae").is_dir() else path
        return component_files(folder, self.config.variant)

    def _is_in_single_file(self, component: str) -> bool:
        if not self.is_single_file:
            return False
        contained_components = {self.components.denoiser, *self.contained_components}
        return component.replace("tokenizer", "text_encoder") in contained_components

    def component_dtype(self, component: str) -> torch.dtype:
        """Return the dtype in which a component is loaded that is not trained.

        It is bf16 for a very large one, which was trained in bf16 and would only take more memory
        in fp32."""
        return torch.bfloat16 if self.is_large(component) else torch.float32

    def is_large(self, component: str) -> bool:
        """Return whether a component has more parameters than MIN_LARGE."""
        if component in self.contained_components:
            prefixes = self.components.file_prefixes[component]
            count = num_parameters([self.path], prefixes)
        elif component in self.text_encoder_files:
            count = num_parameters([self.text_encoder_files[component]])
        else:
            folder = component_folder(self.source, component)
            count = num_parameters(component_files(folder, self.config.variant))
        has_no_files = not count and is_encoder(component)
        if has_no_files:  # a folder of configurations alone
            with torch.device("meta"):
                model = self.empty_encoder(component)
            count = sum(parameter.numel() for parameter in model.parameters())
        return count > MIN_LARGE

    @cached_property
    def quantized_encoders(self) -> list[str]:
        """Text encoders that --model.text_encoder_quantization quantizes: the very large ones."""
        if self.config.text_encoder_quantization == "none":
            return []
        names = []
        for component in self.components.text:
            is_encoder = component.startswith("text_encoder")
            is_present = component not in self.missing_components
            if is_encoder and is_present and self.is_large(component):
                names.append(component)
        return names

    def encoder_format(self, component: str) -> BlockFormat:
        """Return the format of the weights in a text encoder's layers."""
        quantization = self.config.text_encoder_quantization
        if component not in self.quantized_encoders:
            quantization = "none"
        device = torch.device("cuda") if torch.cuda.is_available() else None
        return BlockFormat(quantization, device, keeps_stored_format=True)

    def empty_encoder(self, component: str) -> nn.Module:
        """Return an encoder that is not loaded, on the current device: on meta, or in a
        FakeTensorMode."""
        library, class_name = self.pipeline_config[component]
        config = read_config(self.source, f"{component}/config.json")
        model: Any
        if library == "transformers":
            import transformers
            from transformers.initialization import no_init_weights

            model_class = getattr(transformers, class_name)
            with no_init_weights():  # some initial values are drawn until they fit
                model = model_class(model_class.config_class.from_dict(config))
            model.tie_weights()  # otherwise done when they are initialized
        else:  # of diffusers, or a module of its pipelines
            import diffusers

            module = diffusers if library == "diffusers" else getattr(diffusers.pipelines, library)
            model = getattr(module, class_name).from_config(config)
        return model.requires_grad_(False).eval()

    def denoiser_dtype(self) -> torch.dtype:
        """Return the dtype of the denoiser's weights on disk."""
        files = self.files_of_component(self.components.denoiser)
        weights = [file for file in files if file.suffix in WEIGHT_SUFFIXES]
        if not weights:
            raise ModelError(
                f"--model.path {self.config.path}: has no .safetensors weights in the folder "
                f"{self.components.denoiser}. Use a complete diffusers folder"
            )
        with self.loading_errors(f"{weights[0]}: "):
            if not self.has_plain_tensors:
                return torch.bfloat16  # of the values: each format's own is wider than needed
            return weight_dtype(weights[0])

    def trained_dtype(self) -> torch.dtype:
        """Return the dtype in which the denoiser's weights are trained, unless an option says it."""
        stored_dtype = self.denoiser_dtype()
        return WIDER_DTYPES.get(stored_dtype, stored_dtype)

    @contextmanager
    def loading_errors(self, subject: str = "") -> Iterator[None]:
        """Turn errors that libraries raise for a bad model into ModelError.

        `subject` is the beginning of the reason, for example an option and a file."""
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        try:
            yield
        except ModelError:
            raise
        except (*LOADING_ERRORS, SingleFileComponentError) as error:
            # diffusers appends Python code that the user cannot use
            reason = str(error).partition("\nPlease load the component")[0]
            message = (
                f"--model.path {self.config.path}: could not be loaded as "
                f"{self.components.family}: {subject}{reason}"
            )
            if self.path.is_file() and self.config.config is None:
                message += (
                    "\n  Without network access, set --model.config to a diffusers folder of the "
                    "same kind of model"
                )
            raise ModelError(message) from error


def is_encoder(component: str) -> bool:
    """Return whether a component of a pipeline is a model that encodes captions or images, besides the
    VAE."""
    return component.startswith(ENCODERS) and not component.endswith("_processor")
