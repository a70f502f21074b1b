"""UNetFamily: the UNets of Stable Diffusion 1, 2 and XL."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from safetensors import safe_open
from torch import Tensor, nn

from common.errors import ModelError
from models.base import base_metadata
from models.checkpoint_files import Shapes
from models.comfy_nodes import ComfyNodes
from models.diffusers_family import ComponentLoaders, DiffusersFamily
from models.layer_names.unet import UNetNames
from objectives.schedulers import V_PREDICTION, ZERO_SNR, scheduler_from_config

ATTENTION = r".*\.attn[12]\.to_(q|k|v|out\.0)"
EDM_PREFIX = "edm_vpred."
SD2_TEXT_KEY = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
SD2_BIAS_KEY = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
SD2_WIDTH = 1024
"""Width of the conditioning of Stable Diffusion 2."""
MIN_V_DEVIATION = 0.09
"""Stable Diffusion 2's models of v have a larger deviation of that bias, those of epsilon a smaller
one. This is how ComfyUI tells them apart, because their shapes are the same."""
INPUT_KEY = "input_blocks.0.0.weight"
"""The first convolution in a single file."""
SIZE_KEY = "label_emb.0.0.weight"
"""A layer of SDXL's size conditioning in a single file."""
INPAINTING_CHANNELS = 9
"""Channels of the input of a UNet that paints a part of an image."""
INPUT_HINTS = {
    4: "It makes images from text alone. Use --model.family sd15 or sdxl",
    INPAINTING_CHANNELS: "It paints a part of an image. Use --model.family sd15_inpaint or sdxl_inpaint",
}
OTHER_INPUT = "It edits an image in another way, which cannot be trained here. Use another model"


class UNetFamily(DiffusersFamily):
    """A UNet over latents of 4 channels, with CLIP text conditioning.

    Its prediction type and noise schedule are in its scheduler's config. A single file may have
    tensors that say otherwise."""

    media = "image"
    latent_channels = 4
    num_input_channels: ClassVar[int] = 4
    """Channels of the denoiser's input."""
    denoiser_component = "unet"
    denoiser_class = "UNet2DConditionModel"
    layer_names = UNetNames()
    comfy_nodes = ComfyNodes(latents="EmptyLatentImage", separate_vae="vae.safetensors")
    penultimate_encoders: ClassVar[tuple[str, ...]] = ()
    """Text encoders whose last layer is not used, but the output of the layer before it."""
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|.*\.ff\.net\.(0\.proj|2)",
        "all": r".*",
    }

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        channels = config.get("in_channels", self.num_input_channels)
        if channels != self.num_input_channels:
            hint = INPUT_HINTS.get(channels, OTHER_INPUT)
            raise ModelError(
                f"--model.path {self.config.path}: takes {channels} channels; expected the "
                f"{self.num_input_channels} of {self.name}. {hint}"
            )

    @property
    def pixel_step(self) -> int:
        num_levels = len(self.denoiser_config["block_out_channels"])
        return self.latent_step * 2 ** (num_levels - 1)

    @property
    def cond_width(self) -> int:
        return self.denoiser_config["cross_attention_dim"]

    @property
    def max_tokens(self) -> int:
        return self.component_config("text_encoder")["max_position_embeddings"]

    @cached_property
    def file_prediction(self) -> dict[str, Any]:
        """Changes of the scheduler's config that the tensors of a single file require."""
        if not self.files.is_single_file:
            return {}
        with self.files.loading_errors():
            has_config = self.config.config is not None
            return prediction_of_file(self.files.path, self.files.shapes, has_config)

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        return {**super().scheduler_config, **self.file_prediction}

    @property
    def prediction_type(self) -> str:
        """epsilon or v_prediction, as the base model was trained."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    def replacement_loaders(self) -> ComponentLoaders:
        if not self.file_prediction:
            return super().replacement_loaders()
        return {"scheduler": lambda: scheduler_from_config(self.scheduler_config)}

    @abstractmethod
    def denoiser_arguments(self, cond: dict[str, Any]) -> dict[str, Any]:
        """Return conditioning as the UNet's arguments."""

    @abstractmethod
    def encode_tokens(self, encoders: Any, cond: dict[str, Any]) -> dict[str, Any]:
        """Return `cond` with the embeddings of encode_prompt, for trained text encoders.

        `cond` has the tokens (B, L) of each text encoder under its name. `encoders` has the text
        encoders as attributes."""

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        (prediction,) = denoiser(
            noisy,
            timestep,
            **self.denoiser_arguments(cond),
            return_dict=False,
        )
        return prediction

    def unet_metadata(self, version: str, architecture: str) -> dict[str, str]:
        """Return `file_metadata` of a base model, as kohya and the model specification write it."""
        is_zero_snr = bool(self.scheduler_config.get("rescale_betas_zero_snr"))
        return {
            **base_metadata(version, architecture),
            "modelspec.prediction_type": "v"
            if self.prediction_type == "v_prediction"
            else "epsilon",
            "ss_zero_terminal_snr": str(is_zero_snr),
        }


def is_unet_file(
    shapes: Mapping[str, tuple[int, ...]],
    takes_sizes: bool,
    paints_masks: bool,
) -> bool:
    """Return whether a single file has a UNet of this kind, by the shapes of its tensors."""
    if INPUT_KEY not in shapes:
        return False
    _, channels, *_ = shapes[INPUT_KEY]
    has_mask_input = channels == INPAINTING_CHANNELS
    has_size_input = SIZE_KEY in shapes
    return has_mask_input == paints_masks and has_size_input == takes_sizes


def prediction_of_file(file: Path, shapes: Shapes, has_config: bool) -> dict[str, Any]:
    """Return what a single file says about its prediction, as changes of a scheduler's config.

    These are the tensors that ComfyUI reads (comfy/supported_models.py). `has_config`: a given
    configuration has the prediction type of Stable Diffusion 2. Raises OSError or
    SafetensorError."""
    if f"{EDM_PREFIX}sigma_max" in shapes:
        return edm_prediction(file, shapes)
    if "v_pred" in shapes:
        return {**V_PREDICTION, **ZERO_SNR} if "ztsnr" in shapes else V_PREDICTION
    is_sd2 = shapes.get(SD2_TEXT_KEY, ())[1:] == (SD2_WIDTH,) and SD2_BIAS_KEY in shapes
    if not is_sd2 or has_config:
        return {}
    with safe_open(file, framework="pt") as tensors:
        deviation = float(tensors.get_tensor(SD2_BIAS_KEY).float().std(unbiased=False))
    return V_PREDICTION if deviation > MIN_V_DEVIATION else {"prediction_type": "epsilon"}


def edm_prediction(file: Path, shapes: Shapes) -> dict[str, Any]:
    """Return the scheduler's config of a file that was trained as EDM, such as CosXL."""
    config = {"_class_name": "EDMEulerScheduler", **V_PREDICTION, "sigma_data": 1.0}
    with safe_open(file, framework="pt") as tensors:
        for option in ("sigma_min", "sigma_max"):
            key = f"{EDM_PREFIX}{option}"
            if key in shapes:
                config[option] = float(tensors.get_tensor(key))
    return config
