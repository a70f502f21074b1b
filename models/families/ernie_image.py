"""ERNIE-Image and ERNIE-Image-Turbo (Baidu 2026, https://github.com/baidu/ERNIE-Image).

A transformer over one stream of image and text. The last state but one of Ministral 3 3B is the
conditioning, and the VAE is that of FLUX.2. The pipeline's prompt enhancer, a language model that
rewrites prompts, is not used: captions and prompts are encoded as they are.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from models.base import base_metadata
from models.comfy import ComfyLayout, MaskedLayout
from models.comfy_nodes import ComfyNodes
from models.encoder_placement import keep_first_layers
from models.families.flux2_vae import Flux2VaeFamily
from models.layer_names.tables import TableNames

TOKENS = 2048
"""Tokens to which the tokenizer of the released models cuts a caption, with the one before it."""
ATTENTION = r"layers\.\d+\.self_attention\.to_(q|k|v|out\.0)"


class ErnieImage(Flux2VaeFamily):
    """Conditioning is a state of the caption alone, without a template and without padding.

    ComfyUI has diffusers' names of layers."""

    name = "ernie_image"
    pipelines = ("ErnieImagePipeline",)
    denoiser_class = "ErnieImageTransformer2DModel"
    unused_components = ("pe", "pe_tokenizer")
    variance_offset = 1e-5  # the pipeline's, because the released VAE's config has another number
    layer_names = TableNames()
    variable_length: ClassVar = {"prompt_embeds": None}
    max_tokens = TOKENS
    undistilled_model = "ERNIE-Image (baidu/ERNIE-Image)"
    cond_width_key = "text_in_dim"
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|layers\.\d+\.mlp\.(gate_proj|up_proj|linear_fc2)",
        "all": r".*",
    }
    comfy_widths: ClassVar = {3072: "ERNIE-Image"}
    comfy_nodes = ComfyNodes(
        text_encoders=("ministral-3-3b.safetensors",),
        text_encoder_type="flux2",
        vae="flux2-vae.safetensors",
        latents="EmptyFlux2LatentImage",
        shift="ModelSamplingSD3",
    )

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return {"layers.0.adaLN_sa_ln.weight", "layers.0.mlp.linear_fc2.weight"} <= shapes.keys()

    def find_source(self) -> str:
        return "baidu/ERNIE-Image"  # diffusers would detect the file as Stable Diffusion 1

    @cached_property
    def comfy(self) -> ComfyLayout:
        return MaskedLayout(self.cond_width)

    def trim_text_encoders(self, pipeline: Any) -> None:
        num_layers = pipeline.text_encoder.config.text_config.num_hidden_layers
        keep_first_layers(pipeline.text_encoder, num_layers - 1)

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        embeds = encoders.encode_prompt(captions, encoders._execution_device)
        return [{"prompt_embeds": embed} for embed in embeds]

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        return denoiser(
            noisy,
            timestep,
            text_bth=cond["prompt_embeds"],
            text_lens=cond["attention_mask"].sum(1),
            return_dict=False,
        )[0]

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return base_metadata("ernie_image", "ERNIE-Image", "https://github.com/baidu/ERNIE-Image")


FAMILY = ErnieImage
