"""The phases of a run, traced with tensors that have no values, and the memory of each.

A phase is what a run does with one set of modules in memory: encode captions, encode images, train,
validate, draw a preview. The trace calls the code that the run calls.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from common.errors import ConfigError
from data.batches import Batch
from data.media.buckets import Buckets
from data.precompute.encode import media_batch_size
from lora_algos.adapted_model import AdaptedModel
from lora_algos.attach import attach
from models.diffusers_family import DiffusersFamily
from models.empty_components import cast_weights, empty_encoders
from training import build
from training.block_classes import outermost
from training.config import TrainConfig
from training.distributed.engine import Engine
from training.loss import LossFunction, build_loss
from training.memory.live_bytes import ACTIVATIONS, LiveBytes
from training.optim.schedule import build_optimizer
from training.preview import has_bf16_modules, preview_side
from training.validation import validation_batch_size

BASE, ENCODERS, VAE = "base model", "text encoders", "VAE"
ADAPTERS, GRADIENTS, OPTIMIZER = "adapters", "gradients", "optimizer"
CATEGORIES = (BASE, ENCODERS, VAE, ADAPTERS, GRADIENTS, OPTIMIZER, ACTIVATIONS)
GPU_ALLOCATION_UNIT = 512
"""Bytes of which PyTorch's CUDA allocator gives a multiple."""
UNPLANNED_ERRORS = (DataDependentOutputException, RuntimeError, AttributeError, ValueError)
"""Errors of an optimizer that needs more than shapes."""
CROP_FIELDS = 8
"""Fields of data.media.buckets.Crop."""
RGB = 3


PhaseName = Literal["encode captions", "encode images", "train", "validate", "preview"]
CAPTIONS: PhaseName = "encode captions"
IMAGES: PhaseName = "encode images"
TRAINING: PhaseName = "train"
VALIDATION: PhaseName = "validate"
PREVIEW: PhaseName = "preview"


@dataclass(frozen=True)
class PhaseMemory:
    """Memory of one phase at its peak."""

    name: PhaseName
    num_bytes: dict[str, int]
    """Category -> bytes."""

    @property
    def total(self) -> int:
        return sum(self.num_bytes.values())


@dataclass(frozen=True)
class SampleShape:
    """Size of the largest sample of a run: pixels (3, [F,] H, W) and latents (C, [F,] h, w)."""

    pixels: tuple[int, ...]
    latents: tuple[int, ...]

    @classmethod
    def largest(cls, config: TrainConfig, family: DiffusersFamily) -> "SampleShape":
        """Return the size of the bucket with the most pixels."""
        limits = family.limits
        buckets = Buckets.of(config.data, limits.pixel_step, not config.bucket_mode)
        sizes = buckets.all_sizes()
        largest_size = max(sizes, key=math.prod)
        return cls.of_size(config, family, largest_size.height, largest_size.width)

    @classmethod
    def of_size(
        cls, config: TrainConfig, family: DiffusersFamily, height: int, width: int
    ) -> "SampleShape":
        limits = family.limits
        latent_size = (height // limits.latent_step, width // limits.latent_step)
        if not limits.is_video:
            return cls((RGB, height, width), (family.latent_channels, *latent_size))
        num_frames = config.data.frames
        latent_frames = 1 + (num_frames - 1) // limits.frame_step
        pixels = (RGB, height, width) if num_frames == 1 else (RGB, num_frames, height, width)
        return cls(pixels, (family.latent_channels, latent_frames, *latent_size))


class PhaseTracer:
    """Traces the phases of a run. WHEN: in a block of `fake_tensors`."""

    def __init__(
        self, config: TrainConfig, family: DiffusersFamily, accelerator: Accelerator, is_gpu: bool
    ):
        """`is_gpu`: count memory in the units of a GPU's allocator."""
        self.config, self.family, self.accelerator = config, family, accelerator
        self.unit = GPU_ALLOCATION_UNIT if is_gpu else 1
        self.sample = SampleShape.largest(config, family)
        self.cond_layout = {**family.cond_layout(), **family.sample_layout(self.sample.latents)}
        self.base_dtype = build.BASE_DTYPES[config.training_dtype] or torch.bfloat16
        # before tensors lose their values, which schedules are computed from
        self.loss_function: LossFunction = build_loss(
            family, config.objective, config.loss_function, self.base_dtype
        )

    def captions(self) -> PhaseMemory:
        """Return the memory of encoding captions."""
        placement = self.config.model.text_encoder_placement
        if placement == "cpu":
            return PhaseMemory(CAPTIONS, {})
        live_bytes = LiveBytes(self.unit)
        encoders = empty_encoders(self.family, "text")
        modules = text_encoders_of(encoders)
        if placement == "device":
            label_modules(live_bytes, modules, ENCODERS)
        with torch.no_grad(), live_bytes:
            for encoder in modules:
                self.encode_tokens(encoder, self.config.data.encode_batch_size)
        num_bytes = dict(live_bytes.at_peak)
        if placement == "layers":
            num_bytes[ENCODERS] = largest_layer(modules)
        return PhaseMemory(CAPTIONS, num_bytes)

    def encode_tokens(self, encoder: Any, batch_size: int) -> None:
        """Run a text encoder on as many tokens as captions have at most."""
        config = getattr(encoder.config, "text_config", encoder.config)
        positions = getattr(config, "max_position_embeddings", self.family.max_tokens)
        num_tokens = min(self.family.max_tokens, positions)
        tokens = torch.zeros(batch_size, num_tokens, dtype=torch.int64)
        encoder(tokens, attention_mask=torch.ones_like(tokens), output_hidden_states=True)

    def media(self) -> PhaseMemory:
        """Return the memory of encoding images or videos."""
        encoders = empty_encoders(self.family, "media")
        live_bytes = LiveBytes(self.unit)
        for component in encoders.components.values():
            if isinstance(component, nn.Module):
                label_modules(live_bytes, [component], VAE)
        batch_size = media_batch_size(self.config.data, self.sample.pixels)
        with torch.no_grad(), live_bytes:
            pixels = torch.empty(batch_size, *self.sample.pixels)
            self.family.encode_media(encoders, pixels)
        return PhaseMemory(IMAGES, dict(live_bytes.at_peak))

    def batch(self, batch_size: int, latents: tuple[int, ...]) -> Batch:
        """Return a batch with the longest captions."""
        cond: dict[str, Any] = {}
        for name, layout in self.cond_layout.items():
            cond[name] = torch.empty(batch_size, *layout.shape, dtype=layout.dtype)
        for name in self.family.variable_length:
            num_tokens = cond[name].shape[1]
            cond["attention_mask"] = torch.ones(batch_size, num_tokens, dtype=torch.bool)
            cond["lengths"] = (num_tokens,) * batch_size
        return Batch(
            latents=torch.empty(batch_size, *latents),
            noise=torch.empty(batch_size, *latents),
            quantile=torch.empty(batch_size),
            cond=cond,
            weight=torch.empty(batch_size),
            crop=torch.empty(batch_size, CROP_FIELDS),
            visits=range(batch_size),
        )


class TracedTraining:
    """The denoiser with its adapters and their optimizer, in phases that have them in memory."""

    def __init__(self, tracer: PhaseTracer):
        config, family = tracer.config, tracer.family
        self.tracer, self.config, self.family = tracer, config, family
        denoiser = cast_weights(family.empty_denoiser("cpu"), tracer.base_dtype)
        build.prepare_denoiser(config, family, denoiser, torch.device("cpu"))
        blocks = family.blocks(denoiser, config.checkpoint_depth)
        self.num_blocks = len(outermost(blocks))
        """Blocks that can be recomputed."""
        plan = build.adapter_plan(config)
        adapted = attach(denoiser, plan.specs(denoiser, family.targets), config.seed)
        for name in family.idle_layers(denoiser):
            denoiser.get_submodule(name).requires_grad_(False)
        self.adapted: AdaptedModel = adapted
        self.loss_function = tracer.loss_function
        optimizer = build_optimizer(adapted, config)
        self.engine = Engine(config.optim, tracer.accelerator, denoiser, adapted, optimizer)
        self.live_bytes = LiveBytes(tracer.unit)
        self.live_bytes.label(denoiser.parameters(), BASE)
        self.live_bytes.label(denoiser.buffers(), BASE)
        self.live_bytes.label(self.engine.trained, ADAPTERS)
        if config.ema.decay:
            self.ema = [weight.detach().clone() for weight in self.engine.trained]
            self.live_bytes.label(self.ema, ADAPTERS)
        self._create_optimizer_state()

    def _create_optimizer_state(self) -> None:
        """Update the weights once, with gradients of zero."""
        for weight in self.engine.trained:
            weight.grad = torch.zeros_like(weight)
        with self.counting(OPTIMIZER):
            try:
                self.engine.update(self.config.learning_rate)
            except UNPLANNED_ERRORS as error:
                raise ConfigError(
                    f"--optimizer {self.config.optimizer}: cannot be planned, because it reads "
                    "values or needs a GPU. Plan with AdamW, whose state is 8 bytes per weight"
                ) from error
        for weight in self.engine.trained:
            weight.register_post_accumulate_grad_hook(self._label_gradient)

    def _label_gradient(self, weight: Tensor) -> None:
        if weight.grad is not None:
            self.live_bytes.label([weight.grad], GRADIENTS)

    @contextmanager
    def counting(self, category: str = ACTIVATIONS) -> Iterator[None]:
        """Count tensors in a block, as this category."""
        self.live_bytes.category = category
        with self.live_bytes:
            yield
        self.live_bytes.category = ACTIVATIONS

    def peak_of(self, name: PhaseName, function: Callable[[], None]) -> PhaseMemory:
        """Return the memory of a phase that a function goes through."""
        self.live_bytes.reset_peak()
        with self.counting():
            function()
        return PhaseMemory(name, dict(self.live_bytes.at_peak))

    def phase(self, name: PhaseName) -> PhaseMemory:
        """Return the memory of a phase. The preview comes last: its components stay in memory."""
        if name == TRAINING:
            return self.step()
        if name == VALIDATION:
            return self.validation()
        return self.preview()

    def step(self) -> PhaseMemory:
        """Return the memory of a training step."""
        return self.peak_of(TRAINING, self._step)

    def _step(self) -> None:
        if self.config.grad_accumulation_steps > 1:
            # the gradients of the earlier micro-batches
            for weight in self.engine.trained:
                weight.grad = torch.zeros_like(weight)
                self._label_gradient(weight)
        batch = self.tracer.batch(self.config.batch_size, self.tracer.sample.latents)
        loss = self.loss_function(self.engine.denoiser, batch).mean()
        self.engine.backward(loss, is_last=True)
        del batch
        self.engine.update(self.config.learning_rate)

    def validation(self) -> PhaseMemory:
        """Return the memory of a validation."""
        latents = self.tracer.sample.latents
        batch_size = validation_batch_size(latents, self.config.batch_size)
        return self.peak_of(VALIDATION, partial(self._forward, batch_size, latents))

    @torch.no_grad()
    def _forward(self, batch_size: int, latents: tuple[int, ...]) -> None:
        batch = self.tracer.batch(batch_size, latents)
        with self.tracer.accelerator.autocast():
            self.loss_function(self.engine.denoiser, batch)

    def preview(self) -> PhaseMemory:
        """Return the memory of drawing a preview. The denoiser is in memory all the time."""
        text = empty_encoders(self.family, "text")
        media = empty_encoders(self.family, "media")
        text_encoders = text_encoders_of(text)
        is_whole = self.config.model.text_encoder_placement == "device"
        if is_whole:
            label_modules(self.live_bytes, text_encoders, ENCODERS)
        label_modules(self.live_bytes, [media.vae], VAE)
        phase = self.peak_of(PREVIEW, partial(self._draw, text_encoders, media))
        if not is_whole:
            phase.num_bytes[ENCODERS] = largest_layer(text_encoders)
        return phase

    @torch.no_grad()
    def _draw(self, text_encoders: list[nn.Module], media: Any) -> None:
        for encoder in text_encoders:
            self.tracer.encode_tokens(encoder, batch_size=1)
        side = preview_side(self.config, self.family)
        latents = SampleShape.of_size(self.config, self.family, side, side).latents
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16_modules(media)):
            self._forward(2, latents)  # with and without the prompt
        self.family.decode_media(media, torch.empty(1, *latents))


def text_encoders_of(pipeline: Any) -> list[nn.Module]:
    """Return the text encoders of a pipeline."""
    encoders = []
    for name, component in pipeline.components.items():
        if name.startswith("text_encoder") and component is not None:
            encoders.append(component)
    return encoders


def label_modules(live_bytes: LiveBytes, modules: list[nn.Module], category: str) -> None:
    """Put the weights of modules into a category."""
    for module in modules:
        live_bytes.label(module.parameters(), category)
        live_bytes.label(module.buffers(), category)


def largest_layer(modules: list[nn.Module]) -> int:
    """Return the bytes of the largest layer in modules."""
    sizes = [0]
    for module in modules:
        for layer in module.modules():
            parameters = layer.parameters(recurse=False)
            sizes.append(sum(parameter.nbytes for parameter in parameters))
    return max(sizes)
