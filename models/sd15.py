"""Stable Diffusion 1.x and 2.x: a UNet over 4-channel latents with CLIP text conditioning; epsilon or v-prediction.

What the base was trained to predict, and its noise schedule, are read from its scheduler's config.
"""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.base import ModelFamily, Native, check_comfy_cond
from models.config import ModelError, ObjectiveConfig
from models.ldm_names import native_names
from models.objectives import DDPM

COMPONENTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
UNUSED = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
FOLDERS = {"denoiser": ("unet",), "vae": ("vae",), "text": ("text_encoder", "tokenizer")}
UNLOADABLE = (OSError, ValueError, RuntimeError, KeyError, SafetensorError, SingleFileComponentError)
SCALING_FACTOR = 0.18215  # of a VAE whose config does not say
ATTENTION = r".*\.attn[12]\.to_(q|k|v|out\.0)"


class StableDiffusion(ModelFamily):
    name = "sd15"
    media = "image"
    latent_channels = 4
    component = "unet"
    file_formats = ("kohya",)
    kohya_is_native = False
    targets = {  # noqa: RUF012
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|.*\.ff\.net\.(0\.proj|2)",
        "all": r".*",
    }

    @cached_property
    def path(self) -> Path:
        """The diffusers folder or the single file; a hub id is downloaded, or found in the hub's cache, first."""
        assert self.config.path is not None  # load_config refuses a run without a model
        path = Path(self.config.path)
        return path if path.exists() else self._download(self.config.path)

    def _download(self, hub_id: str) -> Path:
        from diffusers import DiffusionPipeline  # slow import, needed for hub ids only

        try:
            return Path(DiffusionPipeline.download(hub_id, variant=self.config.variant, use_safetensors=True))
        except (OSError, ValueError) as error:
            raise ModelError(f"--model.path {hub_id} could not be had from the hub: {error}") from error

    def _load(self, *wanted: str, dtype: torch.dtype = torch.float32, unet: nn.Module | None = None) -> Any:
        """diffusers' pipeline with the components `wanted` loaded, `unet` put in if given, and no others."""
        from diffusers import StableDiffusionPipeline  # slow import, needed for encoding and previews only
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()

        absent = {name: None for name in COMPONENTS if name not in wanted}
        given = {} if unet is None else {"unet": unet}
        options: dict[str, Any] = {**absent, **UNUSED, **given, "torch_dtype": dtype}
        with self._faults_told(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            if self.path.is_dir():
                options |= {"variant": self.config.variant, "use_safetensors": True, "local_files_only": True}
                pipeline = StableDiffusionPipeline.from_pretrained(self.path, requires_safety_checker=False, **options)
            else:
                pipeline = StableDiffusionPipeline.from_single_file(
                    str(self.path), config=self.config.config, **options
                )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @contextmanager
    def _faults_told(self, what: str = "") -> Iterator[None]:
        """Turns what the libraries raise on a bad model into a message for the user, in which `what` comes first."""
        try:
            yield
        except ModelError:
            raise
        except UNLOADABLE as error:
            reason = str(error).partition("\nPlease load the component")[0]  # diffusers goes on with Python to type
            hint = ""
            if self.path.is_file() and self.config.config is None:
                hint = "\n  Without a network, name a diffusers folder of the same model as --model.config"
            message = f"--model.path {self.config.path} could not be loaded as {self.name}: {what}{reason}{hint}"
            raise ModelError(message) from error

    def load_denoiser(self, dtype: torch.dtype | None) -> nn.Module:
        if dtype is None:
            stored = self.stored_dtype()
            dtype = torch.float32 if stored == torch.float16 else stored
        with self._faults_told():
            if self.path.is_dir():
                denoiser = UNet2DConditionModel.from_pretrained(
                    self.path, subfolder="unet", torch_dtype=dtype, variant=self.config.variant, use_safetensors=True
                )
            else:
                denoiser = self._load("unet", dtype=dtype).unet
        return self._of_this_family(denoiser)

    def _of_this_family(self, denoiser: Any) -> nn.Module:
        if denoiser.config.addition_embed_type is not None:
            raise ModelError(
                f"--model.path {self.config.path} is not of the family sd15: its UNet wants size conditioning"
            )
        return denoiser

    def empty_denoiser(self) -> nn.Module:
        with self._faults_told(), torch.device("meta"):
            folder = self.path if self.path.is_dir() else self.config.config or self._config_of_file()
            config = UNet2DConditionModel.load_config(folder, subfolder="unet")
            return self._of_this_family(UNet2DConditionModel.from_config(config))

    def _config_of_file(self) -> str:
        """The hub id whose configuration diffusers takes for this single file, by the shapes in it."""
        from diffusers.loaders.single_file_utils import fetch_diffusers_config

        with safe_open(self.path, framework="pt") as file:
            shapes = {key: torch.empty(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]

    def stored_names(self, denoiser: nn.Module) -> dict[str, str]:
        names = {name: name for name, _ in denoiser.named_parameters()}
        if self.path.is_dir():
            return names
        native, parts = self.native_names(denoiser), {name: name.rsplit(".", 1) for name in names}
        return {name: f"model.diffusion_model.{native[layer].name}.{kind}" for name, (layer, kind) in parts.items()}

    def stored_dtype(self) -> torch.dtype:
        weights = [f for f in self.component_files("denoiser") if f.suffix == ".safetensors"]
        if not weights:
            raise ModelError(f"--model.path {self.config.path} has no .safetensors weights in its folder unet")
        with self._faults_told(f"{weights[0]}: "), safe_open(weights[0], framework="pt") as file:
            # a single file holds other things first, some of them in another dtype
            names = sorted(file.keys(), key=lambda name: not name.startswith("model.diffusion_model."))
            return file.get_tensor(names[0]).dtype

    def latent_step(self) -> int:
        return 2 ** (len(self._vae_config["block_out_channels"]) - 1)  # each level but the last halves the sides

    def pixel_step(self) -> int:
        levels = len(self.empty_denoiser().config.block_out_channels)  # type: ignore[union-attr, arg-type]
        return self.latent_step() * 2 ** (levels - 1)

    def load_encoders(self, what: Literal["text", "media"]) -> Any:
        if what == "media":
            return self._load("vae")
        encoders = self._load("text_encoder", "tokenizer")
        known, wanted = len(encoders.tokenizer), encoders.text_encoder.config.vocab_size
        if known < wanted:  # transformers makes an empty tokenizer where the files are missing
            raise ModelError(
                f"--model.path {self.config.path} has an incomplete tokenizer: it knows {known} tokens, "
                f"the text encoder {wanted}"
            )
        return encoders

    def component_files(self, component: str) -> list[Path]:
        if self.path.is_file():
            configs = Path(self.config.config).glob("*/*") if self.config.config else ()
            return [self.path, *sorted(f for f in configs if f.suffix in (".json", ".txt"))]
        return [file for folder in FOLDERS[component] for file in self._files_read(self.path / folder)]

    def _files_read(self, folder: Path) -> list[Path]:
        """What diffusers reads in one folder: the weights of the variant if there are any, else those of none."""
        files = sorted(folder.glob("*"))
        weights: list[Path] = []
        for variant in (self.config.variant, None):
            ending = (re.escape(f".{variant}") if variant else "") + r"(-\d+-of-\d+)?\.safetensors"
            weights = weights or [f for f in files if re.fullmatch("[^.]+" + ending, f.name)]
        return [*(f for f in files if f.suffix in (".json", ".txt")), *weights]

    def encode_media(self, encoders: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = encoders.vae.encode(pixels).latent_dist
        return posterior.mean, posterior.std

    def decode_media(self, encoders: Any, latents: Tensor) -> Tensor:
        return encoders.vae.decode(latents).sample.clamp(-1, 1)

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        embeds, _ = encoders.encode_prompt(captions, encoders.text_encoder.device, 1, False)
        return [{"prompt_embeds": embed} for embed in embeds]

    @cached_property
    def _tokenizer(self) -> Any:
        return self._load("tokenizer").tokenizer

    def token_counts(self, captions: list[str]) -> tuple[list[int], int]:
        tokenizer = self._tokenizer
        counts = [len(tokens) for tokens in tokenizer(captions, add_special_tokens=False, verbose=False).input_ids]
        return counts, tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()

    def cond_bytes(self) -> int:
        return self._tokenizer.model_max_length * self._cond_width * torch.float32.itemsize

    @cached_property
    def _cond_width(self) -> int:
        return self.empty_denoiser().config.cross_attention_dim  # type: ignore[union-attr, return-value]

    def cond_from_comfy(self, cond: Tensor, extras: dict[str, Any]) -> dict[str, Tensor]:
        check_comfy_cond(cond, self._cond_width)
        return {"prompt_embeds": cond[0]}  # several chunks of 77 tokens in a row are as good as one

    def cond_to_comfy(self, cond: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        return cond["prompt_embeds"][None], {"pooled_output": None}

    @cached_property
    def _vae_config(self) -> dict:
        if self.path.is_dir():
            with self._faults_told():  # read here: AutoencoderKL is a slow import that only encoding needs
                return json.loads((self.path / "vae" / "config.json").read_text(encoding="utf-8"))
        return self._load("vae").vae.config

    def normalise(self, latents: Tensor) -> Tensor:
        return latents * self._vae_config.get("scaling_factor", SCALING_FACTOR)

    def objective(self, config: ObjectiveConfig) -> DDPM:
        with self._faults_told():
            if self.path.is_dir():
                scheduler = DDPMScheduler.from_pretrained(self.path, subfolder="scheduler")
            else:
                scheduler = DDPMScheduler.from_config(self._load("scheduler").scheduler.config)
            return DDPM(scheduler.alphas_cumprod, scheduler.config.prediction_type, config.loss_space)

    def predict(self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return denoiser(noisy, timestep, encoder_hidden_states=cond["prompt_embeds"], return_dict=False)[0]

    def pipeline(self, denoiser: nn.Module | None) -> Any:
        loaded = [name for name in COMPONENTS if name != "unet" or denoiser is None]
        return self._load(*loaded, unet=denoiser)

    def native_names(self, denoiser: nn.Module) -> dict[str, Native]:
        return {name: Native(native) for name, native in native_names(denoiser).items()}

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        second = denoiser.config.cross_attention_dim == 1024  # type: ignore[union-attr]
        v_prediction = self.objective(ObjectiveConfig()).prediction_type == "v_prediction"
        version = "sd_v2" if second else "sd_v1"
        architecture = "stable-diffusion-v1"
        if second:
            architecture = "stable-diffusion-v2-768-v" if v_prediction else "stable-diffusion-v2-512"
        return {
            "ss_base_model_version": f"{version}_v" if v_prediction else version,
            "ss_v2": str(second),
            "modelspec.architecture": f"{architecture}/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.prediction_type": "v" if v_prediction else "epsilon",
        }


FAMILY = StableDiffusion
