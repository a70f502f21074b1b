"""HunyuanVideo 1.5 (Tencent 2025, arXiv 2511.18870), text to video: a transformer over videos.

Its text encoders are Qwen2.5-VL, and ByT5 for the texts in quotes: glyphs that the video shows.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.base import TensorLayout, base_metadata
from models.comfy import ComfyConditioning, ComfyLayout, Conditioning, MaskedLayout
from models.comfy_nodes import ComfyNodes
from models.families.hunyuan_video15_names import HUNYUAN_NAMES
from models.families.qwen_image import AFTER_CAPTION, rows_without_padding
from models.families.transformer_family import ATTENTION, MLP
from models.families.video_family import VideoFamily
from models.guiders import set_guider
from models.quiet import hide_guider_notes

TOKENS = 1000
"""Tokens of a caption and of the template after it, the pipeline's limit."""
GLYPH_TOKENS = 256
"""Tokens of glyphs, the pipeline's limit."""
GLYPHS = "glyph_embeds"
COMFYUI_GLYPHS = "conditioning_byt5small"
BLOCK = r"(?=transformer_blocks\.)"
PATCHES_KEY = "img_in.proj.weight"
OUTPUT_KEY = "final_layer.linear.weight"
FILE_KEYS = {"byt5_in.fc1.weight", "vision_in.proj.1.weight", PATCHES_KEY, OUTPUT_KEY}


class GlyphLayout(MaskedLayout):
    """ComfyUI's tokens, with those of glyphs if a text has any."""

    def __init__(self, width: int, glyph_width: int, required: tuple[str, ...] = ()):
        super().__init__(width, max_tokens=TOKENS, required=required, has_frame_axis=True)
        self.glyph_width = glyph_width

    def tensors(self, cond: Tensor, extras: dict[str, Any]) -> Conditioning:
        tensors = super().tensors(cond, extras)
        glyphs = extras.get(COMFYUI_GLYPHS)
        if glyphs is None:
            glyphs = cond.new_zeros(1, 0, self.glyph_width)
        tensors[GLYPHS] = glyphs[0]
        return tensors

    def conditioning(self, tensors: Conditioning) -> ComfyConditioning:
        cond, extras = super().conditioning(tensors)
        if len(tensors[GLYPHS]):
            extras[COMFYUI_GLYPHS] = tensors[GLYPHS][None]
        return cond, extras


class HunyuanVideo15(VideoFamily):
    """Conditioning is the last state but two of Qwen2.5-VL, and the state of ByT5.

    The pipeline's padding has no effect on the other tokens. Text to video is given zeros where
    image to video is given the latents of a first frame and their mask."""

    name = "hunyuan_video15"
    pipelines: ClassVar[tuple[str, ...]] = ("HunyuanVideo15Pipeline",)
    frame_step = 4
    fps = 24.0
    denoiser_class = "HunyuanVideo15Transformer3DModel"
    vae_class = "AutoencoderKLHunyuanVideo15"
    text_components = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    layer_names = HUNYUAN_NAMES
    variable_length: ClassVar = {"prompt_embeds": None, GLYPHS: None}
    max_tokens = TOKENS
    cond_width_key = "text_embed_dim"
    targets: ClassVar = {
        "attention": BLOCK + ATTENTION,
        "attention-mlp": f"{BLOCK}({ATTENTION}|{MLP})",
        "all": r".*",
    }
    comfy_widths: ClassVar = {3584: "HunyuanVideo 1.5"}
    comfy_nodes = ComfyNodes(
        text_encoders=("qwen_2.5_vl_7b.safetensors", "byt5_small_glyphxl_fp16.safetensors"),
        text_encoder_type="hunyuan_video_15",
        vae="hunyuanvideo15_vae_fp16.safetensors",
        latents="EmptyHunyuanVideo15Latent",
        shift="ModelSamplingSD3",
    )

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        if not shapes.keys() >= FILE_KEYS:
            return False
        return shapes[PATCHES_KEY][1] == num_inputs(shapes[OUTPUT_KEY][0])

    def find_source(self) -> str:
        return "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v"

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        channels = config["in_channels"]
        expected_channels = num_inputs(config["out_channels"])
        if channels != expected_channels:
            raise ModelError(
                f"--model.path {self.config.path}: its denoiser takes {channels} channels, not "
                f"{expected_channels}. Use a model of a supported kind"
            )

    @property
    def components(self) -> tuple[str, ...]:
        return (*super().components, "guider")

    @property
    def latent_channels(self) -> int:  # type: ignore[override]
        return self.vae_config["latent_channels"]

    @property
    def latent_step(self) -> int:
        return self.vae_config["spatial_compression_ratio"]

    @property
    def patch_size(self) -> int:
        return self.denoiser_config["patch_size"]

    @property
    def glyph_width(self) -> int:
        """Width of the embeddings of glyphs."""
        return self.denoiser_config["text_embed_2_dim"]

    @cached_property
    def comfy(self) -> ComfyLayout:
        return GlyphLayout(self.cond_width, self.glyph_width, self.sample_conditioning)

    # Loading.

    def stand_ins(self) -> dict[str, Any]:
        """Return an empty VAE for the VAE, without which the pipeline's class fails."""
        from diffusers import AutoencoderKLHunyuanVideo15

        with torch.device("meta"):
            return {"vae": AutoencoderKLHunyuanVideo15.from_config(self.vae_config)}

    def load_components(self, *components: str, denoiser: nn.Module | None = None) -> Any:
        hide_guider_notes()
        pipeline = super().load_components(*components, denoiser=denoiser)
        if "vae" not in components:
            pipeline.vae = None
        return pipeline

    def adapt_denoiser(self, denoiser: nn.Module) -> None:
        from models.families.hunyuan_video15_forward import replace_forward

        replace_forward(denoiser)

    # Videos. The VAE's attention fails for batches of several.

    def encode_media(self, encoders: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        encoders.vae.enable_slicing()
        return super().encode_media(encoders, pixels)

    def decode_media(self, encoders: Any, latents: Tensor) -> Tensor:
        encoders.vae.enable_slicing()
        return super().decode_media(encoders, latents)

    # Captions.

    def num_template_tokens(self) -> int:
        return super().num_template_tokens() + len(self.tokenizer(AFTER_CAPTION).input_ids)

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        embeds, mask, glyphs, glyph_mask = encoders.encode_prompt(
            captions,
            device=encoders._execution_device,
            dtype=torch.float32,
            batch_size=len(captions),
        )
        embeds = embeds.to(self.files.component_dtype("text_encoder"))
        rows = rows_without_padding(embeds, mask.bool())
        glyph_rows = rows_without_padding(glyphs, glyph_mask.bool())
        for row, glyph_row in zip(rows, glyph_rows, strict=True):
            row[GLYPHS] = glyph_row["prompt_embeds"]
        return rows

    def cond_layout(self) -> dict[str, TensorLayout]:
        glyphs = TensorLayout((GLYPH_TOKENS, self.glyph_width), torch.float32)
        return {**super().cond_layout(), GLYPHS: glyphs}

    # Training and previews.

    def idle_layers(self, denoiser: nn.Module) -> list[str]:
        """Return the last block's layers for the text, which nothing reads, and layers that are given
        nothing."""
        blocks: Any = denoiser.transformer_blocks
        last_number = len(blocks) - 1
        last_block = f"transformer_blocks.{last_number}"
        layers = [f"{last_block}.attn.to_add_out", f"{last_block}.ff_context"]
        if not self.has_image_input:
            layers.append("image_embedder")
        time_embed: Any = denoiser.time_embed
        if time_embed.use_meanflow:
            layers.append("time_embed.timestep_embedder_r")
        return layers

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        first_frame = torch.zeros_like(noisy)
        frame_mask = torch.zeros_like(noisy[:, :1])
        inputs = torch.cat([noisy, first_frame, frame_mask], 1)
        return self.predict_from(denoiser, inputs, timestep, cond, image_embeds=None)

    def predict_from(
        self,
        denoiser: nn.Module,
        inputs: Tensor,
        timestep: Tensor,
        cond: dict[str, Any],
        image_embeds: Tensor | None,
    ) -> Tensor:
        """Return the prediction for all channels of the input. Without padding there is no mask, and
        attention is faster."""
        glyph_lengths = cond[f"{GLYPHS}_lengths"]
        has_glyphs = any(glyph_lengths)
        has_padding = len(set(cond["lengths"])) > 1 or len(set(glyph_lengths)) > 1
        return denoiser(
            hidden_states=inputs,
            timestep=timestep,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond["attention_mask"] if has_padding else None,
            encoder_hidden_states_2=cond[GLYPHS],
            encoder_attention_mask_2=cond[f"{GLYPHS}_attention_mask"] if has_padding else None,
            image_embeds=image_embeds,
            has_glyphs=has_glyphs,
        )[0]

    def preview_options(self, guidance_scale: float) -> dict[str, Any]:
        return {"num_frames": 1}

    def set_guidance(self, pipeline: Any, scale: float) -> None:
        set_guider(pipeline, scale)

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return base_metadata(
            "hunyuan_video_1_5",
            "hunyuan-video-1.5",
            "https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5",
        )


def num_inputs(num_outputs: int) -> int:
    """Return the input channels: noisy latents, a first frame's latents, and their mask."""
    return 2 * num_outputs + 1


FAMILY = HunyuanVideo15
