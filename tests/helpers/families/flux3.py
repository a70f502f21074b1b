"""A tiny FLUX 3 Image Klein Base, whose text encoder has as many layers as the pipeline looks into."""

from typing import Any

from diffusers import Flux3AutoBlocks, Flux3ModularPipeline, Flux3Transformer2DModel
from diffusers.modular_pipelines.flux3.encoders import Flux3VaeEncoderStep
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from helpers.families import tiny_flux2
from helpers.families.tiny_qwen import qwen3_vl, qwen_tokenizer
from helpers.family_cases import Case
from models.families.flux3 import TEXT_LAYERS
from models.guiders import set_guider
from models.image_text_processor import ImageTextProcessor3

WIDTH = 8


def processor() -> ImageTextProcessor3:
    tokenizer = qwen_tokenizer(has_images=True)
    image_processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56)
    return ImageTextProcessor3(image_processor, tokenizer, chat_template=tokenizer.chat_template)


def transformer() -> Flux3Transformer2DModel:
    return Flux3Transformer2DModel(
        num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=len(TEXT_LAYERS) * WIDTH, timestep_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip


def make() -> Flux3ModularPipeline:
    pipeline = Flux3AutoBlocks().init_pipeline()
    text_encoder = qwen3_vl(
        has_images=True, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=TEXT_LAYERS[-1] + 1
    )  # fmt: skip
    pipeline.update_components(
        text_encoder=text_encoder, tokenizer=processor(), vae=tiny_flux2.vae(levels=4), transformer=transformer()
    )  # fmt: skip
    return pipeline


def repair(pipeline: Any) -> None:
    """No prompt upsampler, no guidance, and a processor that needs no torchvision."""
    pipeline._blocks.sub_blocks.pop("prompt_upsampler")
    pipeline.update_components(tokenizer=processor())
    set_guider(pipeline, 1.0)


def stored(pipeline: Any, latents: Tensor) -> Tensor:
    """What a data set has of the latents that the pipeline decodes, which are the VAE's own."""
    pipeline._patchify_latents = Flux3VaeEncoderStep._patchify_latents
    return tiny_flux2.stored(pipeline, latents)


CASE = Case("flux3", make, unpack=tiny_flux2.unpack, stored=stored, repair=repair, alone=True)
