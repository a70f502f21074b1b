"""The preparation of samples before training: their prompts are encoded."""

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch

from common.atomic import write_file
from common.errors import ConfigError, error_list
from common.hashing import hash_of, hash_of_files
from data.dataset import LatentDataset
from data.precompute.build import Datasets
from models.base import ModelFamily
from models.checkpoint_files import read_config
from training.config import TrainConfig
from training.distributed.failures import describe_error
from training.sampling.control_images import (
    ControlImages,
    check_controls,
    images_of_prompts,
    missing_images_error,
)
from training.sampling.draw import uses_negative_prompt
from training.sampling.encoded_prompts import EncodedPrompt, encode_prompts
from training.sampling.prompts import (
    NUM_DEFAULT_PROMPTS,
    SamplePrompt,
    configured_prompts,
    size_errors,
)

READING_ERRORS = (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError)
"""Errors of a stored prompt that is incomplete."""


@dataclass(frozen=True)
class PreparedSamples:
    """The prompts of a run's samples, with all their options."""

    prompts: list[SamplePrompt]
    encoded: list[EncodedPrompt] | None
    """The encoded prompts. None: the pipeline encodes them, because the text encoders are trained."""
    error: str | None = None
    """The error that encoding ended with. Then nothing is drawn."""
    notes: tuple[str, ...] = ()
    controls: list[ControlImages] = field(default_factory=list)
    """The control images of each prompt; none for models that do not edit."""


def check_prompts(config: TrainConfig, family: ModelFamily) -> None:
    """Raise ConfigError for prompts that the model cannot draw. WHEN: before anything is encoded."""
    errors = size_errors(config.sample, family.limits.pixel_step)
    if errors:
        raise ConfigError(error_list("samples of these sizes cannot be drawn", errors))
    check_controls(config.sample, family, config.data.background)


def prepare_samples(
    config: TrainConfig,
    family: ModelFamily,
    datasets: Datasets,
    device: torch.device,
    sample_controls: Sequence[Sequence[bytes]] = (),
) -> PreparedSamples:
    """Return the prompts, encoded. An error does not end the run: nothing is drawn then.

    `sample_controls`: the files of the control images of the first samples."""
    dataset = datasets.validation or datasets.train
    has_images = bool(sample_controls) or family.paints_masks
    prompts = run_prompts(config, family, dataset, has_images)
    controls = images_of_prompts(prompts, family, config.data, sample_controls)
    notes = []
    if has_unused_negatives(family, prompts):
        notes.append("note: this model uses no negative prompts: --n has no effect on samples")
        prompts = [replace(prompt, negative=None) for prompt in prompts]
    if lacks_control_images(dataset, prompts, sample_controls):
        notes.append(
            "note: the data has control images that cannot be read here, so samples are drawn without. "
            "Name one for each prompt: --ci FILE"
        )
    encoded: list[EncodedPrompt] | None = None
    error_text = missing_images_error(family, controls)
    if not config.model.train_text_encoder and error_text is None:
        try:
            encoded = stored_or_encoded(config, family, prompts, controls, device)
        except Exception as error:  # drawing is worth less than the training
            encoded, error_text = [], describe_error(error, config)
    return PreparedSamples(prompts, encoded, error_text, tuple(notes), controls)


def lacks_control_images(
    dataset: LatentDataset,
    prompts: Sequence[SamplePrompt],
    sample_controls: Sequence[Sequence[bytes]],
) -> bool:
    """Return whether samples are drawn without control images, though the data has them: those of an
    encoded data set are latents."""
    has_controls = dataset.num_controls(0) > 0
    return has_controls and not sample_controls and not all(prompt.controls for prompt in prompts)


def has_unused_negatives(family: ModelFamily, prompts: Sequence[SamplePrompt]) -> bool:
    """Return whether prompts have negative prompts, and the model does not use them."""
    if all(prompt.negative is None for prompt in prompts):
        return False
    return not uses_negative_prompt(family.pipeline_class, family.preview_options(1.0))


def run_prompts(
    config: TrainConfig, family: ModelFamily, dataset: LatentDataset, has_images: bool = False
) -> list[SamplePrompt]:
    """Return the prompts of the options, or captions of the data set, with all options.

    `has_images`: the model is given images of the data set too."""
    prompts = configured_prompts(config.sample)
    if not prompts:
        captions = default_captions(dataset, has_images or family.has_image_input)
        prompts = [SamplePrompt(caption) for caption in captions]
        if has_images:
            prompts = in_own_sizes(prompts, dataset)
    side = sample_side(config, family)
    completed = []
    for number, prompt in enumerate(prompts):
        completed.append(prompt.completed(number, side, config.sample))
    return completed


def in_own_sizes(prompts: Sequence[SamplePrompt], dataset: LatentDataset) -> list[SamplePrompt]:
    """Return the captions of the first samples in the sizes of these samples: an edited image usually
    keeps its shape."""
    sized = []
    for row, prompt in enumerate(prompts):
        height, width = dataset.size(row)
        sized.append(replace(prompt, width=width, height=height))
    return sized


def default_captions(dataset: LatentDataset, has_images: bool) -> list[str]:
    """Return captions of the data set: different ones, or for models that are given images those of
    the first samples."""
    if has_images:
        return list(islice(dataset.first_captions(), NUM_DEFAULT_PROMPTS))
    return dataset.captions(NUM_DEFAULT_PROMPTS)


def sample_side(config: TrainConfig, family: ModelFamily) -> int:
    """Return height and width of a sample image in pixels, rounded as for buckets."""
    step = family.limits.pixel_step
    return max(step, config.data.resolution // step * step)


def sample_frames(config: TrainConfig, family: ModelFamily) -> int:
    """Return the number of frames of a sample: videos are drawn if samples are during training."""
    if family.has_image_input or (family.media == "video" and config.sample.every):
        return config.data.frames
    return 1


def stored_or_encoded(
    config: TrainConfig,
    family: ModelFamily,
    prompts: Sequence[SamplePrompt],
    controls: Sequence[ControlImages],
    device: torch.device,
) -> list[EncodedPrompt]:
    """Return the encoded prompts. Those that the cache lacks are encoded and stored."""
    cache_dir = Path(config.data.cache_dir)
    model_hash = hash_of_files(family.identity_files("text"), cache_dir)
    keys = []
    for prompt, images in zip(prompts, controls, strict=True):
        keys.append(prompt_key(family, model_hash, prompt, images))
    encoded = {}
    missing: dict[str, int] = {}
    for number, key in enumerate(keys):
        result = read_prompt(prompt_path(cache_dir, key))
        if result is None:
            missing.setdefault(key, number)
        else:
            encoded[key] = result
    if missing:
        numbers = missing.values()
        results = encode_prompts(
            family,
            config.model,
            [prompts[number] for number in numbers],
            device,
            [controls[number] for number in numbers],
        )
        for key, result in zip(missing, results, strict=True):
            write_prompt(prompt_path(cache_dir, key), result)
            encoded[key] = result
    return [encoded[key] for key in keys]


def prompt_path(cache_dir: Path, key: str) -> Path:
    """Return the path of a stored prompt."""
    return cache_dir / "prompts" / f"{key}.pt"


def prompt_key(
    family: ModelFamily, model_hash: str, prompt: SamplePrompt, controls: ControlImages
) -> str:
    """Return a hash of what the encoded prompt depends on."""
    import diffusers
    import transformers

    source = family.files.source
    denoiser_config = read_config(source, f"{family.denoiser_component}/config.json")
    facts = [
        family.name,
        family.pipelines[0],
        f"diffusers {diffusers.__version__}, transformers {transformers.__version__}",
        model_hash,
        family.text_cache_tag,
        # they decide whether there is a negative prompt, and what an empty one is
        repr(sorted(family.files.pipeline_config.items(), key=str)),
        repr(sorted(denoiser_config.items(), key=str)),
    ]
    for image in controls:
        facts.append(f"{image.size} {hash_of(image.tobytes())}")
    return hash_of(*facts, repr(replace(prompt, strength=None, controls=())))


def read_prompt(path: Path) -> EncodedPrompt | None:
    """Return a stored prompt; None if the file is missing or incomplete."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except READING_ERRORS:
        return None


def write_prompt(path: Path, encoded: EncodedPrompt) -> None:
    """Store an encoded prompt."""
    buffer = io.BytesIO()
    torch.save(encoded, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, buffer.getvalue(), is_shared=True)
