"""Prompts that are encoded before training, so that drawing needs no text encoders.

A pipeline of diffusers is called, and what its `encode_prompt` returns is recorded. When the pipeline
draws, these results are replayed. So the arguments and the order of the calls stay those of diffusers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_map_only

from common.announce import announced
from models.base import ModelFamily
from models.config import ModelConfig
from models.encoder_placement import place_text_encoders, release_text_encoders
from training.sampling.draw import free_memory, pipeline_options, uses_bf16_modules
from training.sampling.masked_images import blank_image
from training.sampling.prompts import SamplePrompt

EncodedPrompt = list[Any]
"""The results of the calls of encode_prompt for one image, in their order, on the CPU."""


class EncodingDone(Exception):
    """The end of a call of a pipeline whose prompts are encoded."""


class EndOfEncoding:
    """A scheduler that ends the call of a pipeline when it is used."""

    def __getattr__(self, name: str) -> Any:
        raise EncodingDone


def encode_prompts(
    family: ModelFamily,
    config: ModelConfig,
    prompts: Sequence[SamplePrompt],
    device: torch.device,
    controls: Sequence[Sequence[Image.Image]] | None = None,
) -> list[EncodedPrompt]:
    """Load the text encoders, encode the prompts, and free the text encoders.

    `controls`: the control images of each prompt."""
    with announced("loading the text encoders for the prompts"):
        pipeline = family.load_encoders("text")
    encoding_device = device
    if config.text_encoder_placement == "cpu":
        encoding_device = torch.device("cpu")
    try:
        place_text_encoders(pipeline, config.text_encoder_placement, device)
        # pipelines read the denoiser's configuration
        object.__setattr__(pipeline, family.denoiser_component, family.empty_denoiser())
        object.__setattr__(pipeline, "scheduler", EndOfEncoding())
        pipeline.prepare_latents = end_encoding
        with on_device(pipeline, encoding_device), announced("encoding the prompts"):
            return [
                encode_prompt(family, pipeline, prompt, images)
                for prompt, images in zip(prompts, controls or [()] * len(prompts), strict=True)
            ]
    finally:
        release_text_encoders(pipeline)
        free_memory(device)


def encode_prompt(
    family: ModelFamily, pipeline: Any, prompt: SamplePrompt, controls: Sequence[Image.Image]
) -> EncodedPrompt:
    """Return what encode_prompt returns while a pipeline is called."""
    results: EncodedPrompt = []
    original = pipeline.encode_prompt

    def record(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        results.append(tree_map_only(Tensor, compact, result))
        return result

    options = pipeline_options(family, pipeline, prompt, controls)
    if family.paints_masks:
        assert prompt.width is not None  # it is completed
        assert prompt.height is not None
        blank = blank_image(prompt.width, prompt.height)  # some pipelines read it before the prompt
        options |= blank.options()
    with replaced_encoding(pipeline, record), uses_bf16_modules(pipeline):
        try:
            pipeline(**options)
        except EncodingDone:
            return results
    raise RuntimeError("the pipeline drew before it prepared latents")


def end_encoding(*_: Any, **__: Any) -> None:
    """Raise EncodingDone. It replaces a function of a pipeline that is called after the encoding."""
    raise EncodingDone


@contextmanager
def on_device(pipeline: Any, device: torch.device) -> Iterator[None]:
    """Let a pipeline without all its modules work on a device in a block."""
    pipeline_class = type(pipeline)
    members = {"_execution_device": property(lambda _: device)}
    pipeline.__class__ = type(pipeline_class.__name__, (pipeline_class,), members)
    try:
        yield
    finally:
        pipeline.__class__ = pipeline_class


@contextmanager
def replayed(pipeline: Any, encoded: EncodedPrompt, device: torch.device) -> Iterator[None]:
    """Let encode_prompt of a pipeline return recorded results in a block, in fp32.

    Pipelines make the noise in the dtype of the embeddings: in bf16 it would be another, coarser noise
    than ComfyUI's, and the latents would be rounded after each step."""
    remaining = list(encoded)

    def replay(*_: Any, **__: Any) -> Any:
        result = remaining.pop(0)
        return tree_map_only(Tensor, lambda tensor: widened(tensor.to(device)), result)

    with replaced_encoding(pipeline, replay):
        yield


def compact(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU. Embeddings become sparse if most of their rows are zeros.

    For example, embeddings of Ideogram 4 have a row for each token of the image, a gigabyte of zeros."""
    tensor = tensor.cpu()
    if tensor.ndim < 3 or not tensor.is_floating_point():
        return tensor
    is_nonzero = tensor.any(-1)
    if 2 * is_nonzero.sum() > is_nonzero.numel():
        return tensor
    return tensor.to_sparse(is_nonzero.ndim)


def widened(tensor: Tensor) -> Tensor:
    """Return embeddings in fp32, without gaps; masks and tokens as they are."""
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    return tensor.float() if tensor.is_floating_point() else tensor


@contextmanager
def replaced_encoding(pipeline: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Replace encode_prompt of a pipeline in a block.

    Afterwards the pipeline has no more attributes than before: its own method would be a circle."""
    attributes = vars(pipeline)
    own_function = attributes.get("encode_prompt")
    pipeline.encode_prompt = function
    try:
        yield
    finally:
        del pipeline.encode_prompt
        if own_function is not None:
            pipeline.encode_prompt = own_function
