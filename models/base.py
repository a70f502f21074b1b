"""What a model family knows. One file per family holds the glue over diffusers; nothing else in the
project names one.

Conventions, for every family:
  pixels    (B, 3, H, W) in [-1, 1]; (B, 3, F, H, W) of videos with more than one frame
  latents   (B, C, [F,] h, w); raw as the VAE gives them on disk, normalized (family.normalize) in the loop
  quantile  (B,) in (0, 1): the random input of the noise process. 0 is clean, 1 is pure noise. Training draws it,
            validation fixes it; the timestep as the denoiser wants it is made from it
  cond      dict of conditioning tensors, batch first; and `lengths`, see ModelFamily.ragged
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.config import ModelConfig
from objectives.config import ObjectiveConfig
from objectives.processes import NoiseProcess

COMFY_WIDTHS = {
    768: "SD1.5's",
    1024: "SD2.1's",
    2048: "SDXL's",
    2304: "Lumina2's",
    2560: "Z-Image's",
    3584: "Qwen-Image's",
    4096: "that of SD3, Flux, Wan or another model with T5 or Llama",
    7680: "Flux2 klein's",
    12288: "Flux2 klein's",
    15360: "Flux2's",
}
"""Width of ComfyUI's conditioning -> whose it is: the only sign of its family that conditioning
carries."""


@dataclass(frozen=True)
class Native:
    """A layer in the original model, which is ComfyUI's: its weight is that of `name`, or a part of
    it."""

    name: str
    """Without `diffusion_model.` and `.weight`."""
    rows: tuple[int, int] | None = None
    """(first, count): the rows that the layer is of a weight that is fused of several layers."""
    swapped: bool = False
    """Whether the halves of its rows stand the other way round there: scale and shift."""
    by_diffusers: bool = True
    """Whether ComfyUI knows the layer by diffusers' name too, behind the family's `by_diffusers`.
    """


class ModelFamily(ABC):
    """Knowledge about a family of models, bound to one path; holds no weights."""

    name: str
    pipelines: ClassVar[tuple[str, ...]]
    """diffusers' pipelines of the family; the first one encodes and draws."""
    media: str
    """image, or video: latents then have F frames, and an image is a video of one."""
    latent_channels: int
    targets: ClassVar[dict[str, str]]
    """Presets of `--adapter.targets`: name -> regular expression over layer names."""

    component: str
    """diffusers' name of the denoiser in a pipeline."""
    file_formats: tuple[str, ...]
    """Formats of adapter files (lora_algos/formats), of which the first that holds an adapter for every program is
    written. The last one holds everything."""
    kohya_is_native: bool
    """Whether kohya's names of the layers are made of the original model's names."""
    takes_guidance: ClassVar[bool] = False
    """Whether some models of the family are distilled for guidance: they are told its scale
    (model.guidance_scale)."""
    ragged: ClassVar[dict[str, int | None]] = {}
    """Tensors of conditioning whose first dimension is tokens, as many as the caption has -> the length that a batch
    pads them to with zeros, or None for that of the longest in the batch. They are stored without padding. `cond` then
    has `attention_mask` (B, L) too, true where the first of them has tokens, or what the rows have under this name, and
    `lengths`, how many tokens those are, as a tuple: no device has to be asked for them."""
    frame_step: ClassVar[int] = 1
    """Videos have 1 + n times this many frames, and their latents 1 + n."""
    fps: ClassVar[float] = 16.0
    """Frames per second of the videos that the base model was trained on."""
    takes_image: ClassVar[bool] = False
    """Whether its pipeline wants a first frame beside the prompt, for previews."""
    comfy_frames: ClassVar[bool] = False
    """Whether ComfyUI's latents of images have a dimension of frames, where ours have none."""
    media_cond: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that encode_media_cond makes."""
    text_form: str = ""
    """What else than the text encoders' files and the family decides what encode_prompt makes of a
    caption."""
    by_diffusers: str = ""
    """What ComfyUI wants before diffusers' name of a layer, by which alone it knows the parts of a fused weight; empty:
    it knows none."""

    alphas: ClassVar[bool] = True
    """Whether LoRAs under ComfyUI's names say their alpha; else it is in their second factor."""

    def __init__(self, config: ModelConfig):
        self.config = config

    @classmethod
    @abstractmethod
    def holds(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """WHEN: to recognize a single file. IN: name -> shape of its tensors, those of the denoiser also
        without a prefix."""

    @property
    def has_experts(self) -> bool:
        """Whether there are two denoisers, for high and for low noise."""
        return False

    @property
    def without_experts(self) -> str:
        """What to do about `expert` where there is one denoiser."""
        return "leave it out"

    def check(self) -> None:
        """WHEN: first of all. Raises ModelError if the denoiser's configuration, where it can be had, is one that the
        family cannot train; reads no weights."""
        return

    @property
    @abstractmethod
    def path(self) -> Path:
        """Where the model is: a diffusers folder or a single file; a hub id's is had first."""

    @abstractmethod
    def load_denoiser(self, dtype: torch.dtype | None) -> nn.Module:
        """WHEN: once, before adapters are attached. OUT: the denoiser on the CPU, in `dtype`.

        dtype None means as stored, but fp32 for fp16, in which training would overflow.
        """

    @abstractmethod
    def empty_denoiser(self) -> nn.Module:
        """WHEN: for names and shapes alone. OUT: the denoiser on the meta device; no weight is
        read."""

    @abstractmethod
    def stored_names(self, denoiser: nn.Module) -> dict[str, str]:
        """WHEN: to read weights one at a time. IN: an empty denoiser will do. OUT: name of each parameter -> its key in
        the .safetensors files among component_files("denoiser"). In a single file, where `path` is one, a layer's
        weight and bias are the part of that tensor that native_names tells."""

    @abstractmethod
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the denoiser's weights on disk."""

    @abstractmethod
    def latent_step(self) -> int:
        """The side of a latent's cell in pixels."""

    @abstractmethod
    def pixel_step(self) -> int:
        """WHEN: to choose bucket sizes. OUT: what the sides of an image in pixels must be multiples
        of."""

    def frames_fault(self, frames: int) -> str | None:
        """WHEN: in precompute. OUT: what is wrong with training on so many frames, if anything."""
        return "this model makes images" if frames > 1 and self.media == "image" else None

    @abstractmethod
    def load_encoders(self, what: Literal["text", "media"]) -> Any:
        """WHEN: in precompute, only if something must be encoded. OUT: diffusers' pipeline with the text encoders
        or the VAE alone, fp32."""

    @abstractmethod
    def component_files(self, component: str) -> list[Path]:
        """The files that decide what `component` (denoiser, vae, text) computes: their content is
        its identity."""

    @abstractmethod
    def encode_media(self, encoders: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """WHEN: in precompute. IN: pixels. OUT: mean and deviation of the raw latents (B, C, [F,]
        h, w), unscaled."""

    def encode_media_cond(self, encoders: Any, pixels: Tensor) -> dict[str, Tensor]:
        """WHEN: in precompute, if `media_cond` has names. IN: the pixels of encode_media. OUT: under those names what
        conditions the denoiser on the sample itself (the first frame's latents, of image-to-video), batch first; it is
        stored beside the latents, and in `cond` of predict."""
        raise NotImplementedError(f"{self.name} has media_cond, but no encode_media_cond")

    @abstractmethod
    def decode_media(self, encoders: Any, latents: Tensor) -> Tensor:
        """WHEN: to look at what is stored. IN: raw latents (B, C, [F,] h, w). OUT: pixels (B, 3, [F,] H, W) in
        [-1, 1]."""

    @abstractmethod
    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        """WHEN: in precompute. OUT: per caption its conditioning tensors, without batch dimension; those in `ragged`
        with the caption's own number of tokens. They must not depend on the other captions."""

    @abstractmethod
    def token_counts(self, captions: list[str]) -> tuple[list[int], int]:
        """WHEN: to tell of captions that are cut; loads no encoder. OUT: tokens of each caption, and how many of them
        the encoder sees at most, both without the marks of start and end."""

    @abstractmethod
    def cond_bytes(self) -> int:
        """WHEN: to tell how large a store will be; loads no encoder. OUT: size of what encode_prompt makes of one
        caption, at most."""

    @abstractmethod
    def cond_from_comfy(self, cond: Tensor, extras: dict[str, Any]) -> dict[str, Tensor]:
        """WHEN: data that ComfyUI encoded are read. IN: one element of its CONDITIONING: cond (1, L, D) and its dict.
        OUT: conditioning tensors as encode_prompt's, and those of `media_cond`, which `extras` may have. Raises
        ModelError if they are of another family."""

    @abstractmethod
    def cond_to_comfy(self, cond: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """WHEN: data are written for ComfyUI. IN: conditioning tensors as encode_prompt's. OUT: cond (1, L, D) and its
        dict, in which "pooled_output" always is, None if the family has none."""

    @abstractmethod
    def normalize(self, latents: Tensor) -> Tensor:
        """WHEN: in the loop. IN: raw VAE latents. OUT: latents at the scale that the denoiser was
        trained on."""

    @abstractmethod
    def process(self, config: ObjectiveConfig) -> NoiseProcess:
        """The noise process and target that the base model was trained with, changed as `config`
        asks."""

    def tokens(self, shape: tuple[int, ...]) -> int:
        """WHEN: in the loop. IN: shape of the latents (B, C, [F,] h, w). OUT: how many image tokens the denoiser makes
        of each, on which the noise levels of some families depend: here patches of 2 x 2."""
        return math.prod(shape[2:]) // 4

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        """WHEN: in the loop. IN: noisy latents and their timestep. OUT: prediction, shaped like
        noisy."""

    @abstractmethod
    def pipeline(self, denoiser: nn.Module | None) -> Any:
        """WHEN: for previews and merged export. OUT: diffusers' pipeline, on the CPU, with
        `denoiser` if given."""

    def idle_layers(self, denoiser: nn.Module) -> list[str]:
        """WHEN: adapters are attached. OUT: names of layers, and of modules with layers, on whose output no prediction
        depends: adapters there get no gradients, for which several ranks would wait in vain."""
        return []

    def size_cond(self, crop: Tensor) -> dict[str, Tensor]:
        """WHEN: in the loop. IN: (B, 8), how each image was scaled and cropped: the fields of data.buckets.Crop. OUT:
        conditioning that is made of it, batch first."""
        return {}

    def preview_options(self, guidance_scale: float) -> dict[str, Any]:
        """WHEN: for previews. OUT: arguments of the pipeline's call."""
        return {"guidance_scale": guidance_scale}

    @abstractmethod
    def native_names(self, denoiser: nn.Module) -> dict[str, Native]:
        """WHEN: for adapter files and single-file models. OUT: diffusers' name -> where it is in the original model, of
        every layer."""

    def text_names(self, denoiser: nn.Module) -> dict[str, str]:
        """WHEN: for adapter files. OUT: kohya's names of the layers of text encoders that are part
        of `denoiser`."""
        return {}

    @abstractmethod
    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        """Keys of an adapter file by which ComfyUI, A1111 and Forge recognize the base model."""


def check_comfy_cond(cond: Tensor, width: int) -> None:
    """Raises ModelError, saying what it is, unless `cond` is ComfyUI's conditioning (1, L >= 1,
    `width`)."""
    if cond.ndim != 3 or cond.shape[0] != 1 or cond.shape[1] == 0:
        raise ModelError(f"conditioning of shape {tuple(cond.shape)}, not (1, tokens, {width})")
    if cond.shape[2] != width:
        whose = f", which is {COMFY_WIDTHS[cond.shape[2]]}" if cond.shape[2] in COMFY_WIDTHS else ""
        wanted = f", {COMFY_WIDTHS[width]}" if width in COMFY_WIDTHS else ""
        raise ModelError(
            f"conditioning of width {cond.shape[2]}{whose}; this model takes {width}{wanted}"
        )


def with_frames(latents: Tensor, frames: bool) -> Tensor:
    """Latents (B, C, [F,] h, w) with a dimension of frames, or if not `frames`, without that of one
    frame."""
    if (latents.ndim == 5) == frames:
        return latents
    return latents.unsqueeze(2) if frames else latents.squeeze(2)


def take_comfy_cond(family: ModelFamily, cond: Tensor, extras: dict[str, Any]) -> dict[str, Tensor]:
    """family.cond_from_comfy, of which all that the family needs is there and fits."""
    found = family.cond_from_comfy(cond, extras)
    for name, most in family.ragged.items():
        if most is not None and name in found and len(found[name]) > most:
            raise ModelError(f"conditioning of {len(found[name])} tokens; this model takes {most}")
    if lacking := [name for name in family.media_cond if name not in found]:
        raise ModelError(f"conditioning without {' and '.join(lacking)}, which this model needs")
    return found


def base_metadata(
    version: str, architecture: str, implementation: str = "diffusers"
) -> dict[str, str]:
    """What `file_metadata` says of every base model: kohya's name of its version, and the model specification's
    (modelspec) of what it is and whose code runs it."""
    return {
        "ss_base_model_version": version,
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": implementation,
    }
