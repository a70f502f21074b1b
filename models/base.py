"""ModelFamily: what the program must know about a family of models. Each family is one file.

To add a family, derive from TransformerFamily (models/families/transformer_family.py), which loads
diffusers' classes and converts single files. State the class attributes, and write four methods:
`matches_checkpoint`, `encode_prompt`, `predict` and `file_metadata`. All other methods have a
default, which a family overrides where it differs. tests/helpers/toy_family.py is a short example.

Conventions, for every family:
  pixels    (B, 3, H, W) in [-1, 1]; (B, 3, F, H, W) of videos with more than one frame
  latents   (B, C, [F,] h, w); stored raw, as the VAE makes them, and normalized in the loop
  quantile  (B,) in (0, 1): the noise quantile. 0 is clean, 1 is pure noise. Training draws it,
            validation fixes it; the noise process makes the denoiser's timestep from it
  cond      dict of conditioning tensors, batch first, and `lengths`, see `variable_length`
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.block_format import PLAIN, BlockFormat
from models.blocks import find_blocks
from models.comfy import ComfyLayout, Conditioning
from models.comfy_nodes import ComfyGuidance, ComfyNodes, cfg_guidance
from models.config import ModelConfig, has_distilled_name
from models.controls import NO_CONTROLS, ControlImage, ControlLimits, ControlSize
from models.layer_names.names import LayerNames
from models.limits import Limits
from models.model_files import ModelFiles
from objectives.config import ObjectiveConfig
from objectives.processes import NoiseProcess

Role = Literal["denoiser", "vae", "text"]


class TokenCounts(NamedTuple):
    """Tokens of captions, without those of the template around a caption."""

    counts: list[int]
    limit: int
    """Tokens of a caption that the text encoder sees."""

    @classmethod
    def of_captions(cls, tokenizer: Any, captions: list[str], limit: int) -> "TokenCounts":
        """Return the number of tokens of each caption, without special tokens."""
        tokens = tokenizer(captions, add_special_tokens=False, verbose=False).input_ids
        return cls([len(caption_tokens) for caption_tokens in tokens], limit)


class TensorLayout(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ModelFamily(ABC):
    """Knowledge about a family of models, bound to one model. It holds no weights."""

    name: str
    """`--model.family`."""
    pipelines: ClassVar[tuple[str, ...]]
    """diffusers' pipelines of the family. The first one encodes and makes previews."""
    pipeline_options: ClassVar[Mapping[str, Any]] = {}
    """Arguments of the pipeline's from_pretrained and constructor."""
    media: Literal["image", "video"]
    """video: latents have F frames, and an image is a video of one frame."""
    latent_channels: int
    targets: ClassVar[dict[str, str]]
    """Presets of `--adapter.targets`: name -> regular expression for names of layers."""
    layer_names: LayerNames
    """Names of the layers in adapter files and single-file models."""
    denoiser_component: str
    """diffusers' name of the denoiser in a pipeline."""
    variable_length: ClassVar[Mapping[str, int | None]] = {}
    """Conditioning tensors (L, ...) with as many tokens as the caption, stored without padding.
    The value is the length to which a batch pads them with zeros; None: that of its longest
    caption. `cond` then also has `attention_mask` (B, L), which is true for tokens that are not
    padding, unless a mask is stored. And it has `lengths`, the number of tokens of each caption, as
    a tuple that can be read without waiting for the device. These belong to the first tensor;
    before those of another one is its name: `<name>_attention_mask`, `<name>_lengths`."""
    has_guidance_input: ClassVar[bool] = False
    """True if some models of the family are guidance-distilled (--model.guidance_scale)."""
    undistilled_model: ClassVar[str] = ""
    """The model to train instead of one that was distilled to few steps."""
    has_image_input: ClassVar[bool] = False
    """True if its pipeline takes a first frame besides the prompt."""
    comfyui_reads_diffusers: ClassVar[bool] = True
    """False if nobody has compared ComfyUI's names with diffusers'."""
    name_check: ClassVar[str] = (
        "every layer at full size is in the table of names of ComfyUI 0.33.0, which was run"
    )
    """Proof that names in adapter files are right, which the command `models` shows."""
    paints_masks: ClassVar[bool] = False
    """True if it paints the part of an image that a mask shows, and is given the rest."""
    same_files_as: ClassVar[str | None] = None
    """A family whose single files have the same tensors: --model.family has to name this one."""
    controls: ClassVar[ControlLimits] = NO_CONTROLS
    """The control images that the model takes."""
    comfy_widths: ClassVar[Mapping[int, str]] = {}
    """Widths of ComfyUI's conditioning -> the model that has it. Messages name the model."""

    has_experts: bool = False
    """True if one denoiser is for high and another one for low noise levels (--model.expert)."""
    neutral_guidance: float = 1.0
    """Guidance scale of the pipeline that is the same as no guidance."""
    comfy_nodes: ComfyNodes | None = None
    """The nodes with which ComfyUI draws; None: a run writes no workflow for ComfyUI."""

    files: ModelFiles
    """The files of the model."""

    def __init__(self, config: ModelConfig):
        self.config = config

    @property
    def pipeline_class(self) -> Any:
        """diffusers' class of the pipeline that encodes and makes previews."""
        import diffusers

        return getattr(diffusers, self.pipelines[0])

    def make_pipeline(self, modules: Mapping[str, Any]) -> Any:
        """Return the pipeline of these components. Some may be None."""
        return self.pipeline_class(**modules, **self.pipeline_options)

    @property
    @abstractmethod
    def limits(self) -> Limits:
        """Sizes of images and videos that the model takes."""

    @property
    @abstractmethod
    def comfy(self) -> ComfyLayout:
        """ComfyUI's layout of conditioning and latents."""

    @property
    def is_distilled(self) -> bool:
        """True if the model was distilled to few steps, by its name or its configuration."""
        return has_distilled_name(self.config.path or "")

    @property
    def sample_conditioning(self) -> tuple[str, ...]:
        """Names of the tensors that encode_sample_conditioning makes."""
        return ()

    @property
    def text_cache_tag(self) -> str:
        """Facts that encode_prompt depends on besides the family and the text encoders' files."""
        if not self.files.quantized_encoders:
            return ""
        return f"text encoders in {self.config.text_encoder_quantization}"

    @property
    def block_storage(self) -> str | None:
        """Format of the weights of the denoiser's blocks in training, for messages. None: plain."""
        if self.config.quantization != "none":
            return self.config.quantization
        return "the file's format" if self.files.is_quantized else None

    @property
    def media_cache_tag(self) -> str:
        """Facts that encode_media depends on besides the VAE's files."""
        return ""

    # Every family writes these four.

    @classmethod
    @abstractmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """WHEN: a single file is detected. IN: shapes of its tensors by name; the denoiser's names
        also without their prefix."""

    @abstractmethod
    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        """WHEN: in precompute. IN: the pipeline of load_encoders. OUT: each caption's conditioning
        tensors, without batch dimension.

        Tensors in `variable_length` have the caption's own number of tokens. No tensor may depend
        on the other captions."""

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        """WHEN: in the loop. IN: noisy latents, and their timestep (B,) as the noise process makes
        it. OUT: the prediction, shaped like noisy. It must not read a value from the device."""

    @abstractmethod
    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        """WHEN: an adapter file is written. OUT: metadata by which ComfyUI, A1111 and Forge detect
        the base model; see base_metadata."""

    # DiffusersFamily writes these, from diffusers' classes and configurations.

    @abstractmethod
    def load_denoiser(self, dtype: torch.dtype | None, blocks: BlockFormat = PLAIN) -> nn.Module:
        """WHEN: once, before adapters are attached. OUT: the denoiser on the CPU.

        dtype None: as stored, but fp32 for fp16, in which training would overflow. `blocks`: the
        format of weights in blocks, into which each is converted when it was read."""

    @abstractmethod
    def empty_denoiser(self, device: str = "meta") -> nn.Module:
        """WHEN: only names and shapes are needed. OUT: the denoiser on the meta device.

        `device`: cpu in a FakeTensorMode."""

    @abstractmethod
    def load_encoders(self, role: Literal["text", "media"]) -> Any:
        """WHEN: in precompute, if something must be encoded. OUT: diffusers' pipeline, with the
        text encoders or the VAE alone, in fp32 (very large text encoders in bf16)."""

    @abstractmethod
    def pipeline(self, denoiser: nn.Module | None, with_text_encoders: bool = True) -> Any:
        """WHEN: for samples and for the export of a merged model. OUT: diffusers' whole pipeline
        on the CPU, with `denoiser` if it is given.

        Trained text encoders are in it always."""

    def trim_text_encoders(self, pipeline: Any) -> None:
        """WHEN: prompts will be encoded. Remove parts of text encoders that this does not need."""
        return

    @abstractmethod
    def encode_media(self, encoders: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """WHEN: in precompute. OUT: mean and standard deviation of the raw latents."""

    @abstractmethod
    def decode_media(self, encoders: Any, latents: Tensor) -> Tensor:
        """WHEN: stored data are shown. IN: raw latents. OUT: pixels (B, 3, [F,] H, W)."""

    @abstractmethod
    def normalize(self, latents: Tensor) -> Tensor:
        """WHEN: in the loop. IN: raw latents. OUT: latents at the scale of the denoiser's
        training."""

    @abstractmethod
    def process(self, config: ObjectiveConfig) -> NoiseProcess:
        """WHEN: once. OUT: the noise process and target that the base model was trained with,
        changed by the options."""

    @abstractmethod
    def count_tokens(self, captions: list[str]) -> TokenCounts:
        """WHEN: cut captions are reported. Loads a tokenizer, but no encoder."""

    @abstractmethod
    def cond_layout(self) -> dict[str, TensorLayout]:
        """WHEN: sizes are estimated. OUT: the tensors of encode_prompt for the longest caption.
        Loads no encoder."""

    @abstractmethod
    def identity_files(self, role: Role) -> list[Path]:
        """WHEN: caches and checkpoints are identified. OUT: the files whose content decides what
        the denoiser, the VAE or the text encoders compute."""

    @abstractmethod
    def stored_keys(self, denoiser: nn.Module) -> dict[str, str]:
        """WHEN: weights are read one at a time. IN: the denoiser, perhaps empty. OUT: the key of
        each parameter in the files of identity_files("denoiser").

        In a single file the key can be a fused weight, see `layer_names`."""

    # A family overrides these where it needs to.

    def check(self) -> None:
        """WHEN: first of all. Raises ModelError for options and models that the family cannot
        train. Reads no weights."""
        scale = self.config.guidance_scale
        if scale is not None and not self.has_guidance_input:
            raise ModelError(
                f"--model.guidance_scale {scale:g}: models of the family {self.name} have no "
                "guidance input. Remove the option"
            )
        self.check_expert()

    def check_expert(self) -> None:
        """Raise ModelError if --model.expert selects one denoiser of a model with a single one."""
        if self.config.expert is not None:
            raise ModelError(
                f"--model.expert {self.config.expert}: {self.config.path} has one denoiser. "
                "Remove the option"
            )

    def encode_sample_conditioning(
        self, encoders: Any, pixels: Tensor, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """WHEN: in precompute, if `sample_conditioning` has names. IN: as encode_media; the masks
        (B, H, W) of data.masks. OUT: the tensors of these names, batch first, which describe the
        sample itself.

        For example the latents of a video's first frame. They are stored with the latents, and are
        in `cond` of predict."""
        raise NotImplementedError(f"{self.name} does not encode {self.sample_conditioning}")

    def sample_layout(self, latents: tuple[int, ...]) -> dict[str, TensorLayout]:
        """WHEN: sizes are estimated. IN: shape of a sample's latents. OUT: the tensors of
        encode_sample_conditioning for one sample."""
        return {}

    def mask_pixels(self, channels: Tensor) -> Tensor:
        """WHEN: for previews of models that paint masks. IN: masks as encode_sample_conditioning
        makes them. OUT: the masks (B, 1, H, W)."""
        raise NotImplementedError(f"{self.name} paints no masks")

    def control_size(self, width: int, height: int, max_pixels: int | None) -> ControlSize:
        """WHEN: in precompute, if the model takes control images. IN: size of a control image, and the
        largest area after scaling. OUT: the size that the pipeline gives it. None: no other limit."""
        raise NotImplementedError(f"{self.name} takes no control images")

    def control_error(self, width: int, height: int) -> str | None:
        """WHEN: control images are checked. OUT: an error if the pipeline refuses this size."""
        return None

    def encode_control(self, encoders: Any, pixels: Tensor) -> Tensor:
        """WHEN: in precompute, for each control image. IN: its pixels, in the size of control_size.
        OUT: raw latents."""
        return self.encode_media(encoders, pixels)[0]

    def control_features(self, encoders: Any, image: ControlImage) -> Tensor | None:
        """WHEN: in precompute, for each control image. OUT: the features of a vision model, without
        batch dimension, which are stored with the latents. None: no vision model sees the image."""
        return None

    def features_layout(self) -> TensorLayout | None:
        """WHEN: sizes are estimated. OUT: the features of a square control image."""
        return None

    def encode_with_controls(self, encoders: Any, caption: str, images: list[Any]) -> Conditioning:
        """WHEN: in precompute, if the text encoder sees the control images. IN: a caption and the PIL
        images in their own sizes. OUT: as encode_prompt."""
        raise NotImplementedError(f"the text encoder of {self.name} sees no images")

    def control_options(self, images: list[Any], width: int, height: int) -> dict[str, Any]:
        """WHEN: for previews of models that take control images. IN: the PIL images, and the size of
        the preview. OUT: arguments of the pipeline's call."""
        return {"image": images} if images else {}

    def size_conditioning(self, crop: Tensor) -> dict[str, Tensor]:
        """WHEN: in the loop. IN: (B, 8), the fields of data.media.buckets.Crop: how each image was
        scaled and cropped. OUT: conditioning made from them, batch first."""
        return {}

    def preview_options(self, guidance_scale: float) -> dict[str, Any]:
        """WHEN: for previews. OUT: arguments of the pipeline's call."""
        return {"guidance_scale": guidance_scale}

    def set_guidance(self, pipeline: Any, scale: float) -> None:
        """WHEN: before a preview. Set the guidance scale of a pipeline whose call takes none."""
        return

    def prompt_options(self, prompt: str) -> dict[str, Any]:
        """WHEN: for previews. OUT: arguments of the pipeline's call that depend on the prompt."""
        return {}

    def comfy_guidance(self, scale: float) -> ComfyGuidance:
        """WHEN: a workflow for ComfyUI is written. IN: guidance scale of a sample. OUT: the same
        guidance in ComfyUI."""
        return cfg_guidance(scale + (1 - self.neutral_guidance))

    def idle_layers(self, denoiser: nn.Module) -> list[str]:
        """WHEN: adapters are attached. OUT: layers, and modules with layers, on whose output no
        prediction depends. Adapters there would never get gradients."""
        return []

    def blocks(self, denoiser: nn.Module, depth: int = 1) -> dict[str, nn.Module]:
        """WHEN: for gradient checkpointing, sharding and offloading. OUT: the denoiser's blocks at
        this depth, by name."""
        return find_blocks(denoiser, depth)


def cond_bytes(family: ModelFamily) -> int:
    """Return the size of the longest caption's conditioning."""
    return sum(tensor.num_bytes for tensor in family.cond_layout().values())


def base_metadata(
    version: str, architecture: str, implementation: str = "diffusers"
) -> dict[str, str]:
    """Return the metadata that adapter files of every family have.

    `version` is kohya's name of the base model. The model specification (modelspec) names its
    architecture and the code that runs it."""
    return {
        "ss_base_model_version": version,
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": implementation,
    }
