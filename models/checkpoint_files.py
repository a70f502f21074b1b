"""Which family a model on disk is of: by the pipeline that model_index.json names, or by the
tensors of a file."""

import json
import math
import re
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import safe_open

from common.errors import ModelError
from models.config import ModelConfig
from objectives.schedulers import V_PREDICTION, ZERO_SNR

if TYPE_CHECKING:
    import torch


DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
VAE_PREFIXES = ("first_stage_model.", "vae.")
CLIP_L, CLIP_G, T5 = (f"text_encoders.{name}." for name in ("clip_l", "clip_g", "t5xxl"))
LEAST_KNOWN = 0.9  # of the text encoder's tokens, by its tokenizer
UNWANTED = ("safety_checker", "feature_extractor")  # by every family
# by which ComfyUI tells Stable Diffusion 2's v from its epsilon; their shapes are the same
SD2_TEXT = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
SD2_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
SD2_WIDTH, SD2_V_SPREAD = (1024,), 0.09
SCALES = (".scale_weight", ".weight_scale", "scaled_fp8")  # of quantized weights


@lru_cache(maxsize=8)
def local_path(config: ModelConfig, path: str | None = None) -> Path:
    """The diffusers folder or the single file `path`, or config.path; a hub id is downloaded, or found in the hub's
    cache, first."""
    path = path or config.path
    assert path is not None  # load_config refuses a run without a model
    if Path(path).exists():
        return Path(path)
    from diffusers import DiffusionPipeline  # slow import, needed for hub ids only

    try:
        options = {"variant": config.variant, "use_safetensors": True, **dict.fromkeys(UNWANTED)}
        return Path(DiffusionPipeline.download(path, **options))
    except (OSError, ValueError) as error:
        raise ModelError(f"--model.path {path} could not be had from the hub: {error}") from error


def config_path(source: str, file: str) -> Path:
    """A file in a diffusers folder, or in the hub's repository of that id, had first. Raises
    OSError."""
    return Path(source) / file if Path(source).is_dir() else Path(hf_hub_download(source, file))


def config_of(source: str, file: str) -> dict[str, Any]:
    """The same, which is JSON, read. Raises OSError or ValueError."""
    return json.loads(config_path(source, file).read_text(encoding="utf-8"))


def configs_in(folder: str | None) -> list[Path]:
    """The configurations and vocabularies of all parts in a diffusers folder; none of a hub id's."""
    return (
        sorted(f for f in Path(folder).glob("*/*") if f.suffix in (".json", ".txt"))
        if folder
        else []
    )


def part_folder(source: str, name: str) -> Path:
    """A part's folder in a diffusers folder, or of the hub's repository of that id, had first.
    Raises OSError."""
    if Path(source).is_dir():
        return Path(source) / name
    return Path(snapshot_download(source, allow_patterns=[f"{name}/*"])) / name


def files_read(folder: Path, variant: str | None) -> list[Path]:
    """What diffusers reads in one part's folder: the weights of the variant if there are any, else
    those of none."""
    files = sorted(folder.glob("*"))
    weights: list[Path] = []
    for ending in (variant, None):
        pattern = (
            r"[^.]+" + (re.escape(f".{ending}") if ending else "") + r"(-\d+-of-\d+)?\.safetensors"
        )
        weights = weights or [file for file in files if re.fullmatch(pattern, file.name)]
    return [
        *(file for file in files if file.suffix in (".json", ".txt", ".model", ".jinja")),
        *weights,
    ]


def denoiser_prefix(names: Collection[str]) -> str:
    """What stands before the names of the denoiser's weights in a single file with tensors of these
    names."""
    return next(
        (prefix for prefix in DENOISER_PREFIXES if any(name.startswith(prefix) for name in names)),
        "",
    )


def shapes_of(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a .safetensors file. Raises OSError or SafetensorError."""
    with safe_open(file, framework="pt") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118


def check_tokenizer(path: str | None, tokenizer: Any, encoder: Any) -> None:
    """Raises ModelError if both are there, but the tokenizer knows too few of the text encoder's
    tokens."""
    if tokenizer is None or encoder is None:
        return
    config = getattr(encoder.config, "text_config", encoder.config)
    known, wanted = len(getattr(tokenizer, "tokenizer", tokenizer)), config.vocab_size
    # transformers makes an empty tokenizer where the files are missing; models round their tables
    # up
    if known < LEAST_KNOWN * wanted:
        raise ModelError(
            f"--model.path {path} has an incomplete tokenizer: it knows {known} tokens, the text encoder {wanted}"
        )


def num_parameters(files: list[Path], prefixes: tuple[str, ...] = ("",)) -> int:
    """How many numbers the weights among `files` hold whose names have one of those prefixes."""
    weights = (
        item for file in files if file.suffix == ".safetensors" for item in shapes_of(file).items()
    )
    return sum(math.prod(shape) for name, shape in weights if name.startswith(prefixes))


def weight_dtype(file: Path) -> "torch.dtype":
    """The dtype of the denoiser's weights in a .safetensors file. Raises OSError or
    SafetensorError."""
    with safe_open(file, framework="pt") as tensors:
        # a single file holds other things first, some of them in another dtype; and biases may be
        # in another one
        names = sorted(
            tensors.keys(),
            key=lambda name: (not name.startswith(DENOISER_PREFIXES), "weight" not in name),
        )
        return tensors.get_tensor(names[0]).dtype


def hub_id_by_shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    """The hub id whose configuration diffusers takes for a single file with such tensors."""
    import torch
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return fetch_diffusers_config(tensors)["pretrained_model_name_or_path"]


def prediction_in(
    file: Path, shapes: dict[str, tuple[int, ...]], configured: bool
) -> dict[str, Any]:
    """What a single file says of its noise process and what it predicts, in the words of a scheduler's config: by the
    tensors that ComfyUI goes by (comfy/supported_models.py). `configured`: whether a configuration was given, which
    then says it of Stable Diffusion 2. Raises OSError or SafetensorError."""
    with safe_open(file, framework="pt") as tensors:
        if "edm_vpred.sigma_max" in shapes:
            limits = [name for name in ("sigma_min", "sigma_max") if f"edm_vpred.{name}" in shapes]
            found = {name: float(tensors.get_tensor(f"edm_vpred.{name}")) for name in limits}
            return {"_class_name": "EDMEulerScheduler", **V_PREDICTION, "sigma_data": 1.0, **found}
        if "v_pred" in shapes:
            return {**V_PREDICTION, **(ZERO_SNR if "ztsnr" in shapes else {})}
        if shapes.get(SD2_TEXT, ())[1:] == SD2_WIDTH and SD2_BIAS in shapes and not configured:
            spread = float(tensors.get_tensor(SD2_BIAS).float().std(unbiased=False))
            return V_PREDICTION if spread > SD2_V_SPREAD else {"prediction_type": "epsilon"}
    return {}
