"""The preparation of samples before training: their prompts are encoded."""

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from training.sampling.draw import uses_negative_prompt
from training.sampling.encoded_prompts import EncodedPrompt, encode_prompts
from training.sampling.prompts import SamplePrompt, configured_prompts, size_errors

NUM_CAPTIONS = 4
"""Captions that are the prompts, if none are given."""
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


def check_prompts(config: TrainConfig, family: ModelFamily) -> None:
    """Raise ConfigError for prompts that the model cannot draw. WHEN: before anything is encoded."""
    errors = size_errors(config.sample, family.limits.pixel_step)
    if errors:
        raise ConfigError(error_list("samples of these sizes cannot be drawn", errors))


def prepare_samples(
    config: TrainConfig, family: ModelFamily, datasets: Datasets, device: torch.device
) -> PreparedSamples:
    """Return the prompts, encoded. An error does not end the run: nothing is drawn then."""
    dataset = datasets.validation or datasets.train
    prompts = run_prompts(config, family, dataset)
    notes = []
    if has_unused_negatives(family, prompts):
        notes.append("note: this model uses no negative prompts: --n has no effect on samples")
        prompts = [replace(prompt, negative=None) for prompt in prompts]
    encoded: list[EncodedPrompt] | None = None
    error_text = None
    if not config.model.train_text_encoder:
        try:
            encoded = stored_or_encoded(config, family, prompts, device)
        except Exception as error:  # drawing is worth less than the training
            encoded, error_text = [], describe_error(error, config)
    return PreparedSamples(prompts, encoded, error_text, tuple(notes))


def has_unused_negatives(family: ModelFamily, prompts: Sequence[SamplePrompt]) -> bool:
    """Return whether prompts have negative prompts, and the model does not use them."""
    import diffusers

    if all(prompt.negative is None for prompt in prompts):
        return False
    pipeline_class = getattr(diffusers, family.pipelines[0])
    return not uses_negative_prompt(pipeline_class, family.preview_options(1.0))


def run_prompts(
    config: TrainConfig, family: ModelFamily, dataset: LatentDataset
) -> list[SamplePrompt]:
    """Return the prompts of the options, or captions of the data set, with all options."""
    prompts = configured_prompts(config.sample)
    if not prompts:
        prompts = [SamplePrompt(caption) for caption in default_captions(family, dataset)]
    side = sample_side(config, family)
    completed = []
    for number, prompt in enumerate(prompts):
        completed.append(prompt.completed(number, side, config.sample))
    return completed


def default_captions(family: ModelFamily, dataset: LatentDataset) -> list[str]:
    """Return captions of the data set: different ones, or for models that need an image those of
    the first clips."""
    if family.has_image_input:
        return list(islice(dataset.first_captions(), NUM_CAPTIONS))
    return dataset.captions(NUM_CAPTIONS)


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
    device: torch.device,
) -> list[EncodedPrompt]:
    """Return the encoded prompts. Those that the cache lacks are encoded and stored."""
    cache_dir = Path(config.data.cache_dir)
    model_hash = hash_of_files(family.identity_files("text"), cache_dir)
    paths = {}
    for prompt in prompts:
        key = prompt_key(family, model_hash, prompt)
        paths[prompt] = cache_dir / "prompts" / f"{key}.pt"
    encoded = {}
    for prompt, path in paths.items():
        result = read_prompt(path)
        if result is not None:
            encoded[prompt] = result
    missing = [prompt for prompt in paths if prompt not in encoded]
    if missing:
        results = encode_prompts(family, config.model, missing, device)
        for prompt, result in zip(missing, results, strict=True):
            write_prompt(paths[prompt], result)
            encoded[prompt] = result
    return [encoded[prompt] for prompt in prompts]


def prompt_key(family: ModelFamily, model_hash: str, prompt: SamplePrompt) -> str:
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
    return hash_of(*facts, repr(replace(prompt, strength=None)))


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
