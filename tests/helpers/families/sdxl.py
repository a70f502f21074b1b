"""A tiny Stable Diffusion XL pipeline."""

from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from helpers.family_cases import Case
from helpers.tiny_models import CLIP_WIDTH, clip_encoder, clip_tokenizer, image_vae


def make(input_channels: int = 4) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, in_channels=input_channels, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), use_linear_projection=True,
        cross_attention_dim=2 * CLIP_WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + CLIP_WIDTH, norm_num_groups=8,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=image_vae(4, scaling_factor=0.13025), unet=unet, text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder(projection=True), tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
    )  # fmt: skip


CASE = Case("sdxl", make, guidance={"guidance_scale": 1.0})
