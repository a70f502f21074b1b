"""What the UNets of Stable Diffusion 1, 2 and XL have in common."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from common.errors import ModelError
from models.base import Native, base_metadata
from models.checkpoint_files import prediction_in
from models.diffusers_family import DiffusersFamily
from models.families.transformer_family import counts
from models.layer_names.unet import native_names
from objectives.schedulers import scheduler_from_config as sampler_of

ATTENTION = r".*\.attn[12]\.to_(q|k|v|out\.0)"


class UNetFamily(DiffusersFamily):
    """A UNet over 4-channel latents with CLIP text conditioning; what it was trained to predict, and its noise
    schedule, are read from its scheduler's config, and from the marks that a single file has of them.
    """

    media = "image"
    latent_channels = 4
    component = "unet"
    denoiser_class = "UNet2DConditionModel"
    vae_class = "AutoencoderKL"
    file_formats = ("kohya",)
    read_before_last: ClassVar[tuple[str, ...]] = ()
    """Text encoders of which the output of the last layer but one is taken, and no other."""
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|.*\.ff\.net\.(0\.proj|2)",
        "all": r".*",
    }

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        taken = config.get("in_channels", self.latent_channels)
        if taken != self.latent_channels:
            raise ModelError(
                f"--model.path {self.config.path} takes {taken} channels, not the {self.latent_channels} of noisy "
                "latents alone: it fills in or edits an image, which cannot be trained here"
            )

    def pixel_step(self) -> int:
        return self.latent_step() * 2 ** (len(self.denoiser_config["block_out_channels"]) - 1)

    def token_counts(self, captions: list[str]) -> tuple[list[int], int]:
        return counts(self.counting_tokenizer, captions, self.counting_tokenizer.model_max_length)

    @property
    def cond_width(self) -> int:
        return self.denoiser_config["cross_attention_dim"]

    @cached_property
    def told_by_file(self) -> dict[str, Any]:
        """What a single file says in place of its scheduler's config."""
        if self.path.is_dir():
            return {}
        with self._faults_told():
            return prediction_in(self.path, self.stored_shapes, self.config.config is not None)

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        return {**super().scheduler_config, **self.told_by_file}

    def own_parts(self, wanted: tuple[str, ...]) -> dict[str, Any]:
        if "scheduler" not in wanted or not self.told_by_file:
            return super().own_parts(wanted)
        return {**super().own_parts(wanted), "scheduler": sampler_of(self.scheduler_config)}

    @property
    def prediction_type(self) -> str:
        """epsilon or v_prediction, as the base was trained."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    @abstractmethod
    def inputs(self, cond: dict[str, Tensor]) -> dict[str, Any]:
        """Conditioning as the UNet's arguments."""

    @abstractmethod
    def embedded(self, encoders: Any, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """`cond` with the tokens (B, L) of each text encoder, under its name, as what encode_prompt makes of them;
        `encoders` has the text encoders as members."""

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Tensor]
    ) -> Tensor:
        return denoiser(noisy, timestep, **self.inputs(cond), return_dict=False)[0]

    def native_names(self, denoiser: nn.Module) -> dict[str, Native]:
        return {name: Native(native) for name, native in native_names(denoiser).items()}

    def stored_names(self, denoiser: nn.Module) -> dict[str, str]:
        names = {name: name for name, _ in denoiser.named_parameters()}
        if self.path.is_dir():
            return names
        native, parts = self.native_names(denoiser), {name: name.rsplit(".", 1) for name in names}
        return {
            name: f"model.diffusion_model.{native[layer].name}.{kind}"
            for name, (layer, kind) in parts.items()
        }

    def unet_metadata(self, version: str, architecture: str) -> dict[str, str]:
        """`file_metadata` of a base model of that version, as kohya and the model specification
        write them."""
        v_prediction = self.prediction_type == "v_prediction"
        return {
            **base_metadata(version, architecture),
            "modelspec.prediction_type": "v" if v_prediction else "epsilon",
            "ss_zero_terminal_snr": str(bool(self.scheduler_config.get("rescale_betas_zero_snr"))),
        }
