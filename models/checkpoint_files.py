"""Files of models on disk and on the Hub: paths, configurations, and headers of .safetensors."""

import json
import math
import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download, is_offline_mode, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open

from common.errors import ModelError
from models.config import INDEX, MODULAR_INDEX, WEIGHT_SUFFIXES, ModelConfig

if TYPE_CHECKING:
    import torch

Shapes = dict[str, tuple[int, ...]]
"""Shapes of the tensors in a file, by name."""

DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.")
"""Beginnings of the names of a denoiser's tensors in a single file."""
VAE_PREFIXES = ("first_stage_model.", "vae.")
SAFETENSORS_SUFFIX, GGUF_SUFFIX = ".safetensors", ".gguf"
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
"""Ends of the names of the scales of quantized weights."""
COMPANION_SUFFIXES = (
    *SCALE_SUFFIXES,
    ".scale_input",
    ".input_scale",
    ".comfy_quant",
    "scaled_fp8",
)
"""Ends of the names of tensors that say how weights are quantized."""
UNUSED_COMPONENTS = ("safety_checker", "feature_extractor", "pe", "pe_tokenizer")
"""Components that no family needs; they are not downloaded."""
TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja")
"""Suffixes of configurations, vocabularies and templates."""


@lru_cache(maxsize=8)
def local_path(config: ModelConfig) -> Path:
    """Return the diffusers folder or the single file of a model. A Hub id is downloaded first."""
    path = config.path
    assert path is not None  # validated when the config is loaded
    if Path(path).exists():
        return Path(path)
    try:
        folder = downloaded_folder(path, config.variant)
    except (OSError, ValueError) as error:
        if is_offline_mode():
            raise ModelError(
                f"--model.path {path}: could not be downloaded from the Hub, because HF_HUB_OFFLINE "
                "forbids it, and is not in the cache. Unset HF_HUB_OFFLINE, or name a folder"
            ) from error
        raise ModelError(
            f"--model.path {path}: could not be downloaded from the Hub: {error}"
        ) from error
    return Path(folder)


def downloaded_folder(hub_id: str, variant: str | None) -> str:
    """Return the folder with the files of a Hub id, which may be downloaded. Raises OSError or
    ValueError."""
    from diffusers import DiffusionPipeline  # slow import, needed for Hub ids only

    index = modular_index(hub_id)
    if index is None:
        unused_components = dict.fromkeys(UNUSED_COMPONENTS)
        return DiffusionPipeline.download(
            hub_id, variant=variant, use_safetensors=True, **unused_components
        )
    patterns = [MODULAR_INDEX]
    for name, entry in index.items():
        if is_modular_entry(entry) and name not in UNUSED_COMPONENTS:
            patterns.append(f"{name}/*")
    return snapshot_download(hub_id, allow_patterns=patterns)


def modular_index(hub_id: str) -> dict[str, Any] | None:
    """Return the index of a Hub repository that has only that of a modular pipeline; else None.

    The cache is enough for both, without a connection."""
    try:
        read_config(hub_id, INDEX)
    except (OSError, EntryNotFoundError):
        pass
    else:
        return None
    try:
        return read_config(hub_id, MODULAR_INDEX)
    except (OSError, EntryNotFoundError):
        return None  # the error of the download says what is wrong


def read_index(source: str) -> dict[str, Any]:
    """Read the index of a diffusers folder or Hub repository: component -> [library, class].

    Raises OSError or ValueError."""
    try:
        return read_config(source, INDEX)
    except (FileNotFoundError, EntryNotFoundError) as error:
        try:
            index = read_config(source, MODULAR_INDEX)
        except (OSError, EntryNotFoundError):
            raise error from None  # most models have the other one
    for name, entry in index.items():
        if is_modular_entry(entry):
            index[name] = component_class(entry)
    return index


def is_modular_entry(entry: Any) -> bool:
    """Return whether an entry of a modular pipeline's index is of a component."""
    return isinstance(entry, list) and isinstance(entry[-1], dict)


def component_class(entry: list[Any]) -> list[str | None]:
    """Return library and class of a component in a modular pipeline's index.

    Those of a component that was not loaded when the index was written are in its third part."""
    library, class_name, loading = entry
    if library is None:
        return list(loading["type_hint"])
    return [library, class_name]


def config_path(source: str, file: str) -> Path:
    """Return the path of a file in a diffusers folder or Hub repository, which may be downloaded.

    Raises OSError."""
    if Path(source).is_dir():
        return Path(source) / file
    return Path(hf_hub_download(source, file))


def read_config(source: str, file: str) -> dict[str, Any]:
    """Read a JSON file of a diffusers folder or Hub repository. Raises OSError or ValueError."""
    return json.loads(config_path(source, file).read_text(encoding="utf-8"))


def config_files(folder: str | None) -> list[Path]:
    """Return the configurations and vocabularies in a diffusers folder; none for a Hub id."""
    if folder is None:
        return []
    return sorted(file for file in Path(folder).glob("*/*") if file.suffix in (".json", ".txt"))


def component_folder(source: str, component: str) -> Path:
    """Return a component's folder in a diffusers folder or Hub repository, which may be downloaded.

    Raises OSError."""
    if Path(source).is_dir():
        return Path(source) / component
    return Path(snapshot_download(source, allow_patterns=[f"{component}/*"])) / component


def component_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the files that diffusers reads in a component's folder.

    The weights are those of the variant or, if it has none, those without a variant."""
    files = sorted(folder.glob("*"))
    weights = weight_files(files, variant) or weight_files(files, None)
    return [file for file in files if file.suffix in TEXT_SUFFIXES] + weights


def weight_files(files: list[Path], variant: str | None) -> list[Path]:
    """Return the .safetensors files of a variant, whole or in shards."""
    suffix = re.escape(f".{variant}") if variant else ""
    pattern = rf"[^.]+{suffix}(-\d+-of-\d+)?\.safetensors"
    return [file for file in files if re.fullmatch(pattern, file.name)]


def tensor_shapes(file: Path) -> Shapes:
    """Return the shapes of the weights in a .safetensors or GGUF file.

    Raises OSError, SafetensorError or ModelError."""
    if file.suffix == GGUF_SUFFIX:
        from models.gguf_file import gguf_shapes  # imports torch, and the package gguf

        return gguf_shapes(file)
    with safe_open(file, framework="pt") as tensors:
        return {
            key: tuple(tensors.get_slice(key).get_shape())
            for key in tensors.keys()  # noqa: SIM118
            if not key.endswith(COMPANION_SUFFIXES)
        }


def denoiser_prefix(names: Collection[str]) -> str:
    """Return the beginning of the denoiser's tensors in a single file with these names."""
    for prefix in DENOISER_PREFIXES:
        if any(name.startswith(prefix) for name in names):
            return prefix
    return ""


def without_denoiser_prefix(shapes: Shapes) -> Shapes:
    """Return shapes that contain the denoiser's names also without their prefix."""
    result = dict(shapes)
    for prefix in DENOISER_PREFIXES:
        for name, shape in shapes.items():
            if name.startswith(prefix):
                result[name.removeprefix(prefix)] = shape
    return result


def is_quantized_file(file: Path) -> bool:
    """Return whether a file has weights that stay quantized: GGUF, or codes with scales.

    Raises OSError or SafetensorError."""
    if file.suffix == GGUF_SUFFIX:
        from models.gguf_file import has_quantized_tensors  # imports torch, and the package gguf

        return has_quantized_tensors(file)
    return has_scales(file)


def has_scales(file: Path, prefixes: tuple[str, ...] = ("",)) -> bool:
    """Return whether a .safetensors file has scales of weights whose names begin with a prefix.

    Raises OSError or SafetensorError."""
    with safe_open(file, framework="pt") as tensors:
        return any_scales(tensors.keys(), prefixes)


def any_scales(keys: Iterable[str], prefixes: tuple[str, ...] = ("",)) -> bool:
    """Return whether some of the keys are of scales, and begin with a prefix."""
    return any(key.endswith(SCALE_SUFFIXES) and key.startswith(prefixes) for key in keys)


def num_parameters(files: list[Path], prefixes: tuple[str, ...] = ("",)) -> int:
    """Count the parameters in files of weights whose names begin with a prefix."""
    count = 0
    for file in files:
        if file.suffix not in WEIGHT_SUFFIXES:
            continue
        for name, shape in tensor_shapes(file).items():
            if name.startswith(prefixes):
                count += math.prod(shape)
    return count


def weight_dtype(file: Path) -> "torch.dtype":
    """Return the dtype of the denoiser's weights in a .safetensors file.

    Other tensors of a single file, and biases, may have another dtype. Raises OSError or
    SafetensorError."""

    def priority(name: str) -> tuple[bool, bool]:
        return not name.startswith(DENOISER_PREFIXES), "weight" not in name

    with safe_open(file, framework="pt") as tensors:
        names = sorted(tensors.keys(), key=priority)
        return tensors.get_tensor(names[0]).dtype


def hub_id_of_shapes(shapes: Shapes) -> str:
    """Return the Hub id whose configuration diffusers uses for a single file with such tensors."""
    import torch
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return fetch_diffusers_config(tensors)["pretrained_model_name_or_path"]
