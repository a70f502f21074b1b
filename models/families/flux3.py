"""FLUX 3 Image Klein Base (Black Forest Labs 2026): a transformer over one stream of text and image.

Text and image go through separate blocks before they are joined. Eight layers of Qwen3-VL 4B are the
conditioning, and the VAE is that of FLUX.2. The model also edits, which is not trained.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.base import TokenCounts, base_metadata
from models.component_loaders import ComponentLoaders
from models.encoder_placement import keep_first_layers
from models.families.flux2_vae import Flux2VaeFamily
from models.families.modular_family import ModularFamily
from models.families.packing import image_ids
from models.layer_names.tables import Names, Rule, SwappedHalves, TableNames

MAX_TOKENS = 8192
"""Tokens of a caption with the template around it, the pipeline's default."""
USUAL_TOKENS = 1280
"""Tokens of a long caption, for estimates: 16 windows of 80."""
TEXT_LAYERS = (4, 8, 12, 16, 20, 24, 28, 32)
"""Hidden states of the text encoder, the pipeline's default."""
POSITION_SCALE = 0.5
"""Distance between an image token and the next one."""
SHIFT = 6.93
"""The shift of the noise levels. The pipeline makes its scheduler with it, no folder names it."""
REFERENCE = "image_cond"
"""Name of the layers that only see reference images."""
FLOW_MAP_KEY = "ref_time_in.in_layer.weight"
BLOCKS = r"(mode_blocks\.image|txt_mode_blocks|single_transformer_blocks)\.\d+"
ATTENTION = rf"{BLOCKS}\.attn\.to_(q|k|v|out\.0)"
BLOCK: Names = {
    "attn.to_q": "q_proj",
    "attn.to_k": "k_proj",
    "attn.to_v": "v_proj",
    "attn.to_out.0": "attn_out",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "ff.linear_in": "mlp_in",
    "ff.linear_out": "mlp_out",
}
TOP_LEVEL: Names = {
    "timestep_embedder.linear_1": "time_in.in_layer",
    "timestep_embedder.linear_2": "time_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedders.image": "emb_in.image",
    "x_embedders.image_cond": "emb_in.image_cond",
    "norm_out.linear": SwappedHalves("final_layer.image.adaLN_modulation.1"),
    "proj_out": "final_layer.image.linear",
}
TABLE = (
    Rule(r"mode_blocks\.(\w+\.\d+)\.", r"content_mode_blocks.\1.", BLOCK),
    Rule(r"txt_mode_blocks\.(\d+)\.", r"txt_mode_blocks.\1.", BLOCK),
    Rule(r"single_transformer_blocks\.(\d+)\.", r"single_blocks.\1.", BLOCK),
    Rule(r"(\w+_stream_modulations\.\w+)\.", r"\1.", {"linear": "lin"}),
    Rule("", "", TOP_LEVEL),
)


class Flux3(ModularFamily, Flux2VaeFamily):
    """Conditioning is (L, D): the states of the caption in a chat template, and of the padding after it.

    The padding fills a window of 80 tokens, or of several. The denoiser sees it."""

    name = "flux3"
    comfyui_reads_diffusers = False
    name_check = "those of diffusers' converters; not compared with ComfyUI"
    pipelines = ("Flux3ModularPipeline", "Flux3DistilledModularPipeline")
    denoiser_class = "Flux3Transformer2DModel"
    unused_components = ("prompt_upsampler", "prompt_upsampler_processor")
    skipped_steps = ("prompt_upsampler",)
    layer_names = TableNames(
        table=TABLE,
        writes_alpha=False,  # diffusers' converter knows none
    )
    variable_length: ClassVar = {"prompt_embeds": None}
    max_tokens = USUAL_TOKENS
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|{BLOCKS}\.ff\.linear_(in|out)",
        "all": r".*",
    }
    comfy_widths: ClassVar = {20480: "FLUX 3 Image Klein"}

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        is_of_images = "emb_in.video.weight" not in shapes
        return is_of_images and "early_stream_modulations.image.lin.weight" in shapes

    def check(self) -> None:
        if self.files.is_single_file and FLOW_MAP_KEY in self.files.denoiser_shapes:
            self.refuse_flow_map()
        super().check()

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        if config.get("flow_map"):
            self.refuse_flow_map()

    def refuse_flow_map(self) -> None:
        """Raise ModelError for the distilled model, which predicts where a long step leads."""
        raise ModelError(
            f"--model.path {self.config.path}: is FLUX 3 Image Klein, which was distilled to few steps "
            "as a flow map, which is not trained here; expected FLUX 3 Image Klein Base "
            "(black-forest-labs/flux-3-image-klein-base). Its adapters fit both"
        )

    # Captions.

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": SHIFT}

    @cached_property
    def tokenizer(self) -> Any:
        from models.image_text_processor import load_tokenizer

        return load_tokenizer(self.files, "tokenizer")

    def component_loaders(self) -> ComponentLoaders:
        return {**super().component_loaders(), "tokenizer": self._load_processor}

    def _load_processor(self) -> Any:
        from models.image_text_processor import ImageTextProcessor3, load_processor

        return load_processor(self.files, self.tokenizer, ImageTextProcessor3, "tokenizer")

    def trim_text_encoders(self, pipeline: Any) -> None:
        keep_first_layers(pipeline.text_encoder, TEXT_LAYERS[-1])

    def num_template_tokens(self) -> int:
        messages = [{"role": "user", "content": ""}]
        template = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return len(self.tokenizer(template).input_ids)

    def count_tokens(self, captions: list[str]) -> TokenCounts:
        limit = MAX_TOKENS - self.num_template_tokens()
        return TokenCounts.of_captions(self.tokenizer, captions, limit)

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep

        rows = []
        for caption in captions:
            embeds = Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds(
                encoders.text_encoder,
                encoders.tokenizer,
                caption,
                device=encoders._execution_device,
                max_sequence_length=MAX_TOKENS,
                hidden_states_layers=TEXT_LAYERS,
            )
            rows.append({"prompt_embeds": embeds[0]})
        return rows

    # Denoising.

    def adapt_denoiser(self, denoiser: nn.Module) -> None:
        from models.families.flux3_attention import hide_padding

        hide_padding(denoiser)

    def idle_layers(self, denoiser: nn.Module) -> list[str]:
        """Return the layers that only see reference images."""
        return [name for name, _ in denoiser.named_modules() if name.endswith(REFERENCE)]

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        height, width = noisy.shape[-2:]
        embeds = cond["prompt_embeds"]
        text_positions = positions_of_text(embeds.shape[1], noisy.device)
        positions = image_ids(height, width, noisy.device, axes=4) * POSITION_SCALE
        if len(set(cond["lengths"])) > 1:
            is_padding = ~cond["attention_mask"]
            text_positions = torch.cat([text_positions, is_padding.T], 1)
            positions = nn.functional.pad(positions, (0, len(noisy)))
        tokens = noisy.flatten(2)
        predicted = denoiser(
            hidden_states=tokens.transpose(1, 2),
            encoder_hidden_states=embeds,
            timestep=timestep / 1000,
            img_ids=positions,
            txt_ids=text_positions,
            return_dict=False,
        )[0]
        return predicted.transpose(1, 2).unflatten(2, (height, width))

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        source = "https://github.com/black-forest-labs/flux-3-image-klein"
        return base_metadata("flux_3_image_klein", "Flux.3-image-klein", source)


def positions_of_text(num_tokens: int, device: torch.device) -> Tensor:
    """Return the positions (tokens, 4) of a text, which are on the last axis."""
    order = torch.arange(num_tokens, dtype=torch.float32, device=device)
    return nn.functional.pad(order[:, None], (3, 0))


FAMILY = Flux3
