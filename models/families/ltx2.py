"""LTX-2 and LTX-2.3, text to video (Lightricks 2026, arXiv 2601.03233): a transformer over video and audio.

Only the video is trained. Without audio, LTX's own trainer runs the video alone, and no layer
connects it with the audio. diffusers calls this `isolate_modalities`. The text encoder is Gemma 3,
followed by connectors.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from common.errors import ModelError
from models.base import TensorLayout, base_metadata
from models.comfy import ComfyConditioning, ComfyLayout, Conditioning
from models.encoder_placement import keep_first_layers
from models.families.ltx2_names import LTX2_NAMES
from models.families.ltx2_text import ConnectedEncoder, SplitEmbeds
from models.families.video_family import VideoFamily

TOKENS = 1024
"""Tokens of every caption, the pipeline's default. Learned ones take the place of padding."""
ATTENTION = r"transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)"
AUDIO_MODULE = re.compile(r"(.*\.)?(audio_\w+|av_cross_attn_\w+|video_to_audio_attn)")
"""Modules of the audio, and those between video and audio."""
LTX2_KEYS = {"patchify_proj.weight", "transformer_blocks.0.audio_to_video_attn.to_q.weight"}
PROMPT_MODULATION_KEY = "prompt_adaln_single.linear.weight"
"""LTX-2.3 has it."""
TEXT_GUIDANCE_ALONE: dict[str, Any] = {
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_scale": None,  # None: as for the video
    "audio_stg_scale": None,
    "audio_modality_scale": None,
    "audio_guidance_rescale": None,
}


class ConnectedLayout(ComfyLayout):
    """ComfyUI's tokens after the connectors: those for the video and for the audio in a row.

    In its other layout, of tokens before the connectors, they cannot be read."""

    def __init__(self, video_width: int, audio_width: int):
        super().__init__(video_width + audio_width, max_tokens=TOKENS, has_frame_axis=True)
        self.video_width = video_width

    def tensors(self, cond: Tensor, extras: dict[str, Any]) -> Conditioning:
        embeds = cond[0, :, : self.video_width]
        return {"prompt_embeds": embeds}

    def conditioning(self, tensors: Conditioning) -> ComfyConditioning:
        """Return ComfyUI's conditioning, with zeros for the audio."""
        embeds = tensors["prompt_embeds"]
        audio_width = self.width - self.video_width
        padded = nn.functional.pad(embeds, (0, audio_width))
        return padded[None], {"pooled_output": None}


class Ltx2(VideoFamily):
    """LTX-2, text to video. Images are videos of one frame.

    Raw latents are ComfyUI's, and those that are denoised: normalized by the VAE's statistics,
    which are weights. Conditioning is what the connectors make for the video."""

    name = "ltx2"
    pipelines = ("LTX2Pipeline",)
    latent_channels = 128
    latent_step = 32
    patch_size = 1
    frame_step = 8
    fps = 24.0
    denoiser_class = "LTX2VideoTransformer3DModel"
    vae_class = "AutoencoderKLLTX2Video"
    text_components = ("text_encoder", "tokenizer", "connectors")
    unused_components = ("processor", "prompt_enhancer", "duration_head")
    layer_names = LTX2_NAMES
    max_tokens = TOKENS
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",
        "all": r".*",
    }
    comfy_widths: ClassVar = {7680: "LTX-2", 6144: "LTX-2.3"}

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return shapes.keys() >= LTX2_KEYS

    def find_source(self) -> str:
        if PROMPT_MODULATION_KEY in self.files.denoiser_shapes:
            return "diffusers/LTX-2.3-Diffusers"
        return "Lightricks/LTX-2"

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        if not config.get("ff_bias", True):
            raise ModelError(
                f"--model.path {self.config.path}: is LTX-2.5, which is not supported. Use LTX-2 "
                "or LTX-2.3"
            )

    @property
    def components(self) -> tuple[str, ...]:
        return (*super().components, "audio_vae", "vocoder")

    @property
    def text_widths(self) -> tuple[int, int]:
        """Widths of the embeddings of tokens for the video and for the audio."""
        config = self.denoiser_config
        if config.get("use_prompt_embeddings", True):
            width = config["caption_channels"]
            return width, width
        return (
            config["cross_attention_dim"],
            config["audio_cross_attention_dim"],
        )

    @property
    def cond_width(self) -> int:
        return self.text_widths[0]

    @cached_property
    def comfy(self) -> ComfyLayout:
        return ConnectedLayout(*self.text_widths)

    def trim_text_encoders(self, pipeline: Any) -> None:
        encoder = pipeline.text_encoder
        connectors = pipeline.connectors
        num_states = connectors.config.text_proj_in_factor
        keep_first_layers(encoder, num_states - 1)
        pipeline.text_encoder = ConnectedEncoder(encoder, connectors)
        pipeline.connectors = SplitEmbeds(self.cond_width)

    def pipeline(self, denoiser: nn.Module | None, with_text_encoders: bool = True) -> Any:
        pipeline = super().pipeline(denoiser, with_text_encoders)
        if not with_text_encoders:
            pipeline.connectors = SplitEmbeds(self.cond_width)
        return pipeline

    def encode_media(self, encoders: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = super().encode_media(encoders, pixels)
        vae_mean, vae_deviation = vae_statistics(encoders.vae)
        normalized_mean = (mean - vae_mean) / vae_deviation
        normalized_deviation = deviation / vae_deviation
        return normalized_mean, normalized_deviation

    def decode_media(self, encoders: Any, latents: Tensor) -> Tensor:
        vae_mean, vae_deviation = vae_statistics(encoders.vae)
        vae_latents = latents * vae_deviation + vae_mean
        return super().decode_media(encoders, vae_latents)

    def normalize(self, latents: Tensor) -> Tensor:
        return latents

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        embeds, *_ = encoders.encode_prompt(
            captions,
            do_classifier_free_guidance=False,
            max_sequence_length=TOKENS,
            device=encoders._execution_device,
        )
        video_embeds = embeds[..., : self.cond_width]
        rows = []
        for caption_embeds in video_embeds:
            rows.append({"prompt_embeds": caption_embeds})
        return rows

    def cond_layout(self) -> dict[str, TensorLayout]:
        dtype = self.files.component_dtype("connectors")
        shape = (TOKENS, self.cond_width)
        return {"prompt_embeds": TensorLayout(shape, dtype)}

    def idle_layers(self, denoiser: nn.Module) -> list[str]:
        """Return the modules of the audio."""
        idle_layers = []
        for name, _ in denoiser.named_modules():
            if AUDIO_MODULE.fullmatch(name):
                idle_layers.append(name)
        return idle_layers

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        num_samples, _, *grid = noisy.shape
        num_frames, height, width = grid
        embeds = cond["prompt_embeds"]
        _, audio_text_width = self.text_widths
        audio_channels = self.denoiser_config["audio_in_channels"]
        # the denoiser needs some audio, which has no effect on the video: a token of zeros
        audio = noisy.new_zeros(num_samples, 1, audio_channels)
        audio_embeds = embeds.new_zeros(num_samples, 1, audio_text_width)
        video = noisy.flatten(2)
        tokens = denoiser(
            hidden_states=video.transpose(1, 2),
            audio_hidden_states=audio,
            encoder_hidden_states=embeds,
            audio_encoder_hidden_states=audio_embeds,
            timestep=timestep,
            sigma=timestep,
            num_frames=num_frames,
            height=height,
            width=width,
            fps=self.fps,
            audio_num_frames=1,
            isolate_modalities=True,
            return_dict=False,
        )[0]
        predicted = tokens.transpose(1, 2)
        return predicted.unflatten(2, grid)

    def preview_options(self, guidance_scale: float) -> dict[str, Any]:
        """Return options of previews with sound, which is left out, and with guidance by text alone."""
        return {
            "guidance_scale": guidance_scale,
            "num_frames": 1,
            "frame_rate": self.fps,
            **TEXT_GUIDANCE_ALONE,
        }

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        config: Any = denoiser.config
        version = "2.3" if config.cross_attn_mod else "2"
        return base_metadata(
            f"ltx{version}",
            f"LTX-{version}",
            "https://github.com/Lightricks/LTX-2",
        )


def vae_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Return the mean and deviation by which the VAE's latents are normalized, (1, C, 1, 1, 1)."""
    shape = (1, -1, 1, 1, 1)
    mean = vae.latents_mean.float()
    deviation = vae.latents_std.float()
    scaled_deviation = deviation / vae.config.scaling_factor
    return mean.view(shape), scaled_deviation.view(shape)


FAMILY = Ltx2
