"""Z-Image omni (Tongyi-MAI, not released yet): Z-Image, given any number of images to edit.

The tokens of control images have no noise, and come before those of the noisy image. The tokens of
SigLIP 2, which sees the control images too, come after it.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.base import TensorLayout, base_metadata
from models.comfy import ComfyLayout
from models.component_loaders import ComponentLoaders
from models.controls import ControlImage, ControlLimits, ControlSize, control_features
from models.families.flux2_controls import MAX_CONTROL_PIXELS, cropped_size, side_error
from models.families.vision_family import VisionFamily
from models.families.z_image import ATTENTION, SIGLIP_KEY, TABLE, Z_IMAGE_KEYS, ZImage
from models.families.z_image_omni_text import (
    FRAME_TOKENS,
    OmniLayout,
    encode_captions,
    segments,
)
from models.layer_names.tables import TableNames

SIGLIP, SIGLIP_PROCESSOR = "siglip", "siglip_processor"
OUTSIDE_SIGLIP = r"(?!siglip_)"
"""The presets leave out the branch of the SigLIP features, whose layers ComfyUI knows by its own names
alone."""


class ZImageOmni(VisionFamily, ZImage):
    """Z-Image omni. Samples without a control image are trained as text to image."""

    name = "z_image_omni"
    name_check = "those of Z-Image; of the SigLIP layers by ComfyUI's source, which was not run"
    undistilled_model = ""
    pipelines = ("ZImageOmniPipeline",)
    vision_components = (SIGLIP, SIGLIP_PROCESSOR)
    layer_names = TableNames(table=TABLE, original_only=r"siglip_.*")
    variable_length: ClassVar = {"prompt_embeds": None, "edit_embeds": None}
    controls = ControlLimits(max_count=3, usual_count=1)  # as many as ComfyUI's node takes
    targets: ClassVar = {
        "attention": OUTSIDE_SIGLIP + ATTENTION,
        "attention-mlp": rf"{OUTSIDE_SIGLIP}({ATTENTION}|.*\.feed_forward\.w[123])",
        "all": r".*",
    }
    comfy_nodes = None

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return shapes.keys() >= {*Z_IMAGE_KEYS, SIGLIP_KEY}

    def find_source(self) -> str:
        return "Tongyi-MAI/Z-Image-Omni-Base"

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        if config.get("siglip_feat_dim") is None:
            raise ModelError(
                f"--model.path {self.config.path}: its denoiser takes no SigLIP features "
                "(siglip_feat_dim); expected that of an omni model. Use a folder whose "
                "model_index.json names ZImagePipeline for other models"
            )

    def adapt_denoiser(self, denoiser: nn.Module) -> None:
        from models.families.z_image_omni_transformer import compute_all_layers

        compute_all_layers(denoiser)

    def replacement_loaders(self) -> ComponentLoaders:
        return {SIGLIP_PROCESSOR: self._load_processor}

    def _load_processor(self) -> Any:
        """Load the processor that scales with Pillow on all machines, also with torchvision."""
        from transformers.models.siglip2.image_processing_pil_siglip2 import (
            Siglip2ImageProcessorPil,
        )

        return Siglip2ImageProcessorPil.from_pretrained(
            self.files.source,
            subfolder=SIGLIP_PROCESSOR,
            local_files_only=self.files.load_options["local_files_only"],
        )

    # Captions.

    @cached_property
    def comfy(self) -> ComfyLayout:
        return OmniLayout(self.cond_width)

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        return encode_captions(encoders, captions)

    def cond_layout(self) -> dict[str, TensorLayout]:
        caption = super().cond_layout()["prompt_embeds"]
        layout = {"prompt_embeds": caption, "edit_embeds": caption}
        for name, num_tokens in FRAME_TOKENS.items():
            layout[name] = TensorLayout((num_tokens, self.cond_width), caption.dtype)
        return layout

    # Control images.

    def control_error(self, width: int, height: int) -> str | None:
        return side_error(width, height, "Z-Image omni")

    def control_size(self, width: int, height: int, max_pixels: int | None) -> ControlSize:
        return cropped_size(width, height, max_pixels, self.pixel_step)

    def encode_control(self, encoders: Any, pixels: Tensor) -> Tensor:
        rounded = pixels.bfloat16()  # as the pipeline does, for a VAE of any dtype
        return super().encode_control(encoders, rounded)

    def control_features(self, encoders: Any, image: ControlImage) -> Tensor:
        device = encoders._execution_device
        ((features,),) = encoders.prepare_siglip_embeds([image.scaled()], 1, device, torch.float32)
        return features

    def features_layout(self) -> TensorLayout:
        config = self.component_config(SIGLIP)
        side = round(config["num_patches"] ** 0.5)
        return TensorLayout((side, side, config["hidden_size"]), torch.float32)

    def control_options(self, images: list[Any], width: int, height: int) -> dict[str, Any]:
        """Return the images in the sizes of training: the pipeline would shrink large ones to the area
        of the preview."""
        if not images:
            return {}
        from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

        shrink = Flux2ImageProcessor._resize_if_exceeds_area
        return {"image": [shrink(image, MAX_CONTROL_PIXELS) for image in images]}

    # Denoising.

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        _, *controls = self.with_controls(noisy, cond)
        num_controls = len(controls)
        features = [tensor.to(noisy.dtype) for tensor in control_features(cond)]
        images = []
        captions = []
        seen: list[list[Tensor | None] | None] = []
        for sample in range(len(noisy)):
            latents = [image[sample] for image in (*controls, noisy)]
            images.append([image.unsqueeze(1) for image in latents])  # videos of one frame
            captions.append(segments(cond, sample, num_controls))
            sample_features = [tensor[sample] for tensor in features]
            seen.append([*sample_features, None] if features else None)
        predictions = denoiser(
            images,
            (1000 - timestep) / 1000,
            captions,
            siglip_feats=seen,
            image_noise_mask=[[0] * num_controls + [1]] * len(noisy),
            return_dict=False,
        )[0]
        return -torch.stack(predictions).squeeze(2)

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        source = "https://github.com/Tongyi-MAI/Z-Image"
        return base_metadata("z_image_omni", "Z-Image-Omni", source)


FAMILY = ZImageOmni
