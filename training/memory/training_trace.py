"""The memory of training, validation and samples, traced with tensors that have no values."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from adapter_files.spellings import layer_spellings
from common.errors import ConfigError
from data.batches import Batch
from data.media.buckets import Crop, Size
from data.store.schema import token_names
from lora_algos.traits import Layers
from models.base import TensorLayout
from models.blocks import inner_blocks
from models.diffusers_family import DiffusersFamily
from models.empty_components import cast_weights, empty_encoders, empty_other_denoisers
from models.encoder_placement import modules_of
from training import build
from training.block_classes import outermost
from training.block_offload import offloaded_blocks
from training.config import TrainConfig
from training.distributed.engine import Engine
from training.loss import LossFunction
from training.memory.encoding_trace import label_modules
from training.memory.live_bytes import LiveBytes
from training.memory.phase_memory import (
    ACTIVATIONS,
    ADAPTERS,
    BASE,
    GRADIENTS,
    HOST,
    OPTIMIZER,
    SAMPLES,
    TRAINING,
    VAE,
    VALIDATION,
    PhaseMemory,
    PhaseName,
)
from training.memory.sample_shape import SampleShape, sample_of_size
from training.optim.ema import EmaWeights
from training.optim.registry import OPTIMIZERS
from training.optim.schedule import build_optimizer
from training.sampling.draw import has_bf16_weights
from training.sampling.prepare import sample_frames, sample_side
from training.sampling.prompts import configured_prompts
from training.validation import validation_batch_size

UNPLANNED_ERRORS = (DataDependentOutputException, NotImplementedError, RuntimeError)
"""Errors of an optimizer that needs more than shapes."""


@dataclass(frozen=True)
class TraceInputs:
    """Inputs of a trace besides the model, made while tensors have values."""

    config: TrainConfig
    family: DiffusersFamily
    accelerator: Accelerator
    loss_function: LossFunction
    sample: SampleShape
    cond_layout: dict[str, TensorLayout]
    """Tensors of one sample's conditioning."""
    unit: int
    """See LiveBytes."""
    assistant: Layers = field(default_factory=dict)
    """The assistant LoRA, on meta."""

    def batch(self, batch_size: int, latents: tuple[int, ...]) -> Batch:
        """Return a batch with the longest captions. `latents`: their shape in one sample."""
        num_crop_fields = len(Crop.__dataclass_fields__)
        return Batch(
            latents=torch.empty(batch_size, *latents),
            noise=torch.empty(batch_size, *latents),
            quantile=torch.empty(batch_size),
            cond=self.cond(batch_size),
            weight=torch.empty(batch_size),
            crop=torch.empty(batch_size, num_crop_fields),
            visits=range(batch_size),
        )

    def cond(self, batch_size: int) -> dict[str, Any]:
        """Return the conditioning of the longest captions.

        Captions of variable length have a mask and their lengths too, as in a run."""
        cond: dict[str, Any] = {}
        for name, layout in self.cond_layout.items():
            shape = (batch_size, *layout.shape)
            cond[name] = torch.empty(shape, dtype=layout.dtype)
        for name, (mask_name, lengths_name) in token_names(self.family.variable_length).items():
            num_tokens = cond[name].shape[1]
            mask = torch.ones(batch_size, num_tokens)
            cond[mask_name] = mask.bool()
            cond[lengths_name] = (num_tokens,) * batch_size
        return cond


class TrainingTrace:
    """The denoiser with its adapters and their optimizer, in the phases that have them in memory.

    WHEN: in a block of `fake_tensors`. Samples come last: its components stay in memory."""

    def __init__(self, inputs: TraceInputs):
        self.inputs = inputs
        self.config = inputs.config
        self.family = inputs.family
        self.live_bytes = LiveBytes(inputs.unit)
        self.num_blocks = 0
        """Blocks that can be recomputed."""
        self.num_offloadable = 0
        """Blocks that can be offloaded."""
        denoiser = self._denoiser()
        names = layer_spellings(self.family, denoiser)
        adapted, _ = build.attach_adapters(
            self.config, self.family, denoiser, names, inputs.assistant
        )
        self.engine = Engine(
            self.config.optim,
            inputs.accelerator,
            adapted.model,
            adapted,
            build_optimizer(adapted, self.config),
        )
        label_modules(self.live_bytes, [adapted.model], BASE)
        self._label_offloaded_blocks(adapted.model)
        self.live_bytes.label(self.engine.trained, ADAPTERS)
        is_schedule_free = OPTIMIZERS[self.config.optimizer].is_schedule_free
        self.ema = EmaWeights(self.config.ema, self.engine, is_schedule_free)
        self.live_bytes.label(self.ema.ema, ADAPTERS)
        self._create_optimizer_state()
        if offloaded_blocks(adapted.model):
            with self._counting(ACTIVATIONS):  # learns the order of the blocks
                self._forward(1, inputs.sample.latents)

    def _denoiser(self) -> nn.Module:
        """Return the denoiser as a run prepares it."""
        config, family = self.config, self.family
        dtype = self.inputs.loss_function.dtype
        denoiser = family.empty_denoiser("cpu")
        denoiser = cast_weights(denoiser, dtype)
        family.use_stored_formats(denoiser)
        device = torch.device("cpu")
        build.prepare_denoiser(config, family, denoiser, device)
        blocks = family.blocks(denoiser, config.checkpoint_depth)
        self.num_blocks = len(outermost(blocks))
        self.num_offloadable = len(inner_blocks(outermost(blocks)))
        return denoiser

    def _label_offloaded_blocks(self, denoiser: nn.Module) -> None:
        """Count weights that wait in the memory of the host."""
        for block in offloaded_blocks(denoiser):
            self.live_bytes.label([block.host_weights.buffer], HOST)

    def _create_optimizer_state(self) -> None:
        """Update the weights once, with gradients of zero."""
        self._set_zero_gradients()
        try:
            with self._counting(OPTIMIZER):
                self.engine.update(self.config.learning_rate)
        except UNPLANNED_ERRORS as error:
            raise ConfigError(
                f"--optimizer {self.config.optimizer}: cannot be planned, because it reads values "
                "or needs a GPU. Plan with AdamW, whose state takes 8 bytes per trained number"
            ) from error
        for weight in self.engine.trained:
            weight.register_post_accumulate_grad_hook(self._label_gradient)

    def _set_zero_gradients(self) -> None:
        for weight in self.engine.trained:
            weight.grad = torch.zeros_like(weight)
            self._label_gradient(weight)

    def _label_gradient(self, weight: Tensor) -> None:
        if weight.grad is not None:
            self.live_bytes.label([weight.grad], GRADIENTS)

    @contextmanager
    def _counting(self, category: str) -> Iterator[None]:
        """Count new tensors in a block as this category."""
        self.live_bytes.category = category
        with self.live_bytes:
            yield

    def phase(self, name: PhaseName) -> PhaseMemory:
        """Return the memory of a phase."""
        if name == TRAINING:
            return self._peak_of(name, self._step)
        if name == VALIDATION:
            return self._peak_of(name, self._validate)
        return self._samples()

    def _peak_of(self, name: PhaseName, function: Callable[[], None]) -> PhaseMemory:
        """Return the memory of a phase that a function goes through."""
        self.live_bytes.reset_peak()
        with self._counting(ACTIVATIONS):
            function()
        return PhaseMemory(name, self.live_bytes.at_peak)

    def _step(self) -> None:
        """Take a training step; of several micro-batches, the last one.

        The gradients of the earlier micro-batches are in memory then."""
        if self.config.grad_accumulation_steps > 1:
            self._set_zero_gradients()
        batch_size = self.config.batch_size
        latents = self.inputs.sample.latents
        batch = self.inputs.batch(batch_size, latents)
        with self._strength():
            losses = self.inputs.loss_function(self.engine.denoiser, batch)
            self.engine.backward(losses.mean(), is_last=True)
        del batch
        self.engine.update(self.config.learning_rate)

    def _strength(self) -> AbstractContextManager:
        """Return the context of a step's passes: at strength -1 layers keep two outputs."""
        slider = self.config.objective.slider
        if slider.targets and slider.both_directions:
            return self.engine.adapted.at_strength(-1.0)
        return nullcontext()

    def _validate(self) -> None:
        latents = self.inputs.sample.latents
        batch_size = validation_batch_size(latents, self.config.batch_size)
        with self.ema.applied():
            self._forward(batch_size, latents)

    @torch.no_grad()
    def _forward(self, batch_size: int, latents: tuple[int, ...]) -> None:
        batch = self.inputs.batch(batch_size, latents)
        with self.inputs.accelerator.autocast():
            self.inputs.loss_function(self.engine.denoiser, batch)

    def _samples(self) -> PhaseMemory:
        """Return the memory of drawing samples.

        The denoiser and the optimizer's state stay in memory. Prompts were encoded before."""
        media = empty_encoders(self.family, "media")
        label_modules(self.live_bytes, modules_of(media), VAE)
        other_denoisers = empty_other_denoisers(self.family)  # kept, as they are on the device
        label_modules(self.live_bytes, other_denoisers, BASE)
        return self._peak_of(SAMPLES, partial(self._draw, media))

    @torch.no_grad()
    def _draw(self, media: Any) -> None:
        """Do what one step of drawing does: predict and decode.

        The prediction is for two samples: with and without the prompt."""
        latents = self._sample_latents()
        all_modules = [*modules_of(media), self.engine.denoiser]
        is_bf16 = any(has_bf16_weights(module) for module in all_modules)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            self._forward(2, latents)
        decoded_latents = torch.empty(1, *latents)
        self.family.decode_media(media, decoded_latents)

    def _sample_latents(self) -> tuple[int, ...]:
        """Return the shape of the largest sample's latents."""
        num_frames = sample_frames(self.config, self.family)
        side = sample_side(self.config, self.family)
        sizes = [Size(side, side)]
        for prompt in configured_prompts(self.config.sample):
            sizes.append(Size(prompt.width or side, prompt.height or side))
        largest = max(sizes, key=lambda size: size.width * size.height)
        sample = sample_of_size(self.family, largest, num_frames)
        return sample.latents
