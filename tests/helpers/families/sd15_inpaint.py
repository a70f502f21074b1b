"""A tiny Stable Diffusion Inpainting pipeline."""

from typing import Any

from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel

from helpers.family_cases import Case
from helpers.tiny_models import CLIP_WIDTH, clip_encoder, clip_tokenizer, image_vae


def make() -> StableDiffusionInpaintPipeline:
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, in_channels=9, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, cross_attention_dim=CLIP_WIDTH, norm_num_groups=8,
    )  # fmt: skip
    return StableDiffusionInpaintPipeline(
        vae=image_vae(4, scaling_factor=0.18215), unet=unet, text_encoder=clip_encoder(), tokenizer=clip_tokenizer(),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def encode_means(pipeline: Any) -> None:
    """Let the pipeline encode the masked image without random numbers, as training does."""
    encode = pipeline.vae.encode

    def encode_mean(*arguments: Any, **options: Any) -> Any:
        output = encode(*arguments, **options)
        output.latent_dist.sample = lambda generator=None: output.latent_dist.mode()
        return output

    pipeline.vae.encode = encode_mean


MASKED: dict[str, Any] = {
    "repair": encode_means,
    "has_mask": True,
    "options": ("--data.masks=alpha",),
}
CASE = Case("sd15_inpaint", make, {"guidance_scale": 1.0}, **MASKED)
