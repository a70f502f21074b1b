"""Draws the samples of a run. The processes share the prompts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor, nn

from common.announce import announced
from common.errors import counted
from data.media.pictures import to_image, to_levels
from models.base import ModelFamily
from objectives.schedulers import override_scheduler
from training.assistant import assistant_at_strength
from training.components import RunComponents
from training.distributed.failures import describe_error
from training.distributed.sharding import is_sharded
from training.memory.phase_memory import SAMPLES
from training.sampling.draw import (
    call_parameters,
    draw_sample,
    free_memory,
    pipeline_options,
)
from training.sampling.encoded_prompts import replayed
from training.sampling.files import to_array
from training.sampling.masked_images import MaskedImage, masked_image
from training.sampling.prepare import PreparedSamples, sample_frames
from training.sampling.prompts import SamplePrompt
from training.sampling.samples import Samples, WeightSet
from training.services import RunServices

CALLBACK = "callback_on_step_end"
"""Argument of most pipelines: a function that is called after each step."""
Share = dict[tuple[str, int], np.ndarray]
"""Label of the weights and number of the prompt -> image or video of one process."""


class DrawingStopped(Exception):
    """The end of a sample whose process has to stop."""


class SamplingError(RuntimeError):
    """Samples that could not be drawn, with a model whose processes draw each image together."""

    run_state = "finished"
    """For status.json: all other files are written."""

    def __init__(self, error: str):
        super().__init__(
            f"samples could not be drawn, and are left out:\n{error}\nAll other files of the run "
            "are written"
        )


class SampleRenderer:
    """Draws all prompts with sets of weights. After an error, it draws nothing more.

    The pipeline is loaded for the first image. Its modules, besides the denoiser, wait on the CPU
    while nothing is drawn. A failure must not fail the run: drawing may need memory that training
    did not."""

    def __init__(self, components: RunComponents, services: RunServices, samples: PreparedSamples):
        self.config, self.components, self.services = components.config, components, services
        self.samples = samples
        self.prompts = samples.prompts
        self.dataset = components.datasets.validation or components.datasets.train
        self.device = services.accelerator.device
        self.pipeline: Any = None
        self.error = samples.error
        self.is_error_reported = False
        self.max_side = 0
        self.masked_images: list[MaskedImage] = []
        """The image and the mask of each prompt, for models that paint a part of an image."""
        self.was_stopped = False
        """True if `render` ended before all images, because the run has to stop."""

    def render(self, weight_sets: dict[str, WeightSet], max_side: int = 0) -> Samples | None:
        """Return the images on the main process. Collective.

        `max_side`: keep the last frame of each video only, and shrink it to this longer side.

        Returns None if drawing failed, which is printed once, or if the run has to stop. With a
        sharded model, raises SamplingError: the other processes then wait in the middle of an
        image."""
        self.was_stopped = False
        self.max_side = max_side
        share: Share | None = {}
        if not self._has_failed():
            num_samples = len(weight_sets) * len(self.prompts)
            text = f"drawing {counted(num_samples, 'sample')}"
            with self.services.memory.phase(SAMPLES), announced(text):
                share = self._draw_share(weight_sets)
            self.was_stopped = share is None
        if share is None or self._has_failed():
            return None
        images = self._gather(share)
        if not self.services.process.is_main:
            return None
        rows: dict[str, list[np.ndarray]] = {}
        for label in weight_sets:
            rows[label] = [images[label, number] for number in range(len(self.prompts))]
        return Samples(self.prompts, rows, self._given_images())

    def _given_images(self) -> Sequence[list[Image.Image]]:
        """Return the images that the model was given with each prompt."""
        if self.components.family.paints_masks:
            return [[given.shown()] for given in self.masked_images]
        return self.samples.controls

    def _has_failed(self) -> bool:
        """Return whether a process could not draw; print its error once. Collective."""
        process = self.services.process
        if process.count > 1:
            self.services.barrier.wait()
            errors: list[str | None] = [None] * process.count
            dist.all_gather_object(errors, self.error, group=self.services.consensus.group)
            self.error = next((error for error in errors if error is not None), None)
        if self.error is None:
            return False
        if not self.is_error_reported:
            self.services.reporter.say(
                f"samples could not be drawn, and are left out:\n{self.error}"
            )
        self.is_error_reported = True
        return True

    def _gather(self, share: Share) -> Share:
        """Return the images of all processes on the main process. Collective."""
        process = self.services.process
        if process.count == 1:
            return share
        shares: list[Any] = [None] * process.count
        target = shares if process.is_main else None
        dist.gather_object(share, target, group=self.services.consensus.group)
        images: Share = {}
        if process.is_main:
            for other_share in shares:
                images |= other_share
        return images

    def _draw_share(self, weight_sets: dict[str, WeightSet]) -> Share | None:
        """Draw this process's prompts; return the images by label and number of the prompt.

        Returns None on all processes if the run has to stop, which all check equally often. They
        wait for each other without a time limit: one may load slower, or draw a longer video.
        Afterwards the adapters have their trained weights again."""
        adapted, services = self.components.adapted, self.services
        is_model_sharded = is_sharded(services.accelerator)
        images: Share = {}
        adapted.model.eval()
        try:
            for label, (weights, strength) in weight_sets.items():
                with adapted.using(weights):
                    for number in self._prompt_numbers():
                        services.barrier.wait()
                        if services.requests.must_stop():
                            return None
                        if number is not None:
                            self._try_to_draw(images, label, number, strength)
                        if self.error is not None and is_model_sharded:
                            raise SamplingError(self.error)
            services.barrier.wait()
            if services.requests.must_stop():
                return None
        finally:
            adapted.model.train()
            self._rest()
            if self.error is not None:
                self.pipeline = None
                free_memory(self.device)
        return images

    def _prompt_numbers(self) -> list[int | None]:
        """Return the number of the prompt that this process draws in each round, or None.

        All processes have the same number of rounds. Those that share a model draw the same
        prompt: prompts may need different numbers of passes."""
        process = self.services.process
        num_prompts = len(self.prompts)
        if is_sharded(self.services.accelerator):  # each pass needs all processes
            return list(range(num_prompts))
        numbers: list[int | None] = []
        for first in range(0, num_prompts, process.count):
            number = first + process.index
            numbers.append(number if number < num_prompts else None)
        return numbers

    def _try_to_draw(self, images: Share, label: str, number: int, strength: float | None) -> None:
        """Add an image, unless there was an error; keep the error of drawing.

        `strength`: None: that of the prompt."""
        if self.error is not None:
            return
        adapted = self.components.adapted
        try:
            with unchanged_random_state(self.device):
                self._wake()
                if strength is None:
                    strength = self.prompts[number].strength
                assert strength is not None  # prompts are completed
                assistant_strength = self.config.sample.assistant_strength
                with (
                    adapted.at_strength(strength),
                    assistant_at_strength(adapted.model, assistant_strength),
                ):
                    image = self._draw(number)
                if self.max_side:
                    image = shrunk(image[-1:], self.max_side)
                images[label, number] = image
        except DrawingStopped:
            self.services.reporter.say("stopping: the samples of this step are left out")
        except torch.OutOfMemoryError as error:
            self.services.memory.explain(error)
            self.error = describe_error(error) + (
                "\nSamples need the VAE on the GPU too. Use --model.vae_tiling, smaller samples, or "
                "--no_preview and --sample.every 0"
            )
        except Exception as error:
            self.error = describe_error(error)

    def _draw(self, number: int) -> np.ndarray:
        prompt = self.prompts[number]
        controls = self.samples.controls[number] if self.samples.controls else []
        options = pipeline_options(self.components.family, self.pipeline, prompt, controls)
        options |= self._data_options(prompt, number)
        can_stop = CALLBACK in call_parameters(type(self.pipeline))
        if can_stop and not is_sharded(self.services.accelerator):  # each pass needs all processes
            options[CALLBACK] = self._end_if_stopped
        if self.samples.encoded is None:
            return draw_sample(self.pipeline, prompt, options)
        with replayed(self.pipeline, self.samples.encoded[number], self.device):
            return draw_sample(self.pipeline, prompt, options)

    def _end_if_stopped(self, *_: Any) -> dict[str, Any]:
        """Raise DrawingStopped between two denoising steps if this process has to stop."""
        if self.services.requests.has_signal_to_stop:
            raise DrawingStopped
        return {}

    def _data_options(self, prompt: SamplePrompt, number: int) -> dict[str, Any]:
        """Return what a pipeline is given of the data: an image with its mask, or for videos the
        number of frames, and the first one."""
        family = self.components.family
        if family.paints_masks:
            return self.masked_images[number].options()
        if family.media != "video":
            return {}
        options: dict[str, Any] = {"num_frames": sample_frames(self.config, family)}
        if family.has_image_input:
            assert prompt.width is not None  # it is completed
            assert prompt.height is not None
            latents = self.dataset.latents(number % len(self.dataset))
            size = (prompt.width, prompt.height)
            options["image"] = first_frame(family, latents, self.pipeline, size)
        return options

    def _wake(self) -> None:
        """Load the pipeline, with the scheduler that the options ask for, and move it to the device
        that draws."""
        if self.pipeline is None:
            family, model = self.components.family, self.components.adapted.model
            has_encoders = self.samples.encoded is None
            with announced("loading the VAE for the samples"):
                pipeline = family.pipeline(model, with_text_encoders=has_encoders)
            self.pipeline = override_scheduler(pipeline, self.config.objective)
        self.pipeline.to(self.device)
        if self.components.family.paints_masks and not self.masked_images:
            self.masked_images = self._masked_images()

    def _masked_images(self) -> list[MaskedImage]:
        """Return the image and the mask of each prompt: those of the first samples."""
        images = []
        for number, prompt in enumerate(self.prompts):
            image = masked_image(
                self.components.family,
                self.dataset,
                number % len(self.dataset),
                prompt,
                self.pipeline,
            )
            images.append(image)
        return images

    def _rest(self) -> None:
        """Move the modules besides the denoiser to the CPU."""
        if self.pipeline is None or self.device.type == "cpu":
            return
        trained_modules = {*self.components.adapted.model.modules()}
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module) and not has_common(component, trained_modules):
                component.to("cpu")
        free_memory(self.device)


def shrunk(frames: np.ndarray, max_side: int) -> np.ndarray:
    """Return frames (F, H, W, 3) in [0, 1] with a longer side of at most `max_side`."""
    images = []
    for frame in frames:
        image = Image.fromarray(to_levels(frame))
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        images.append(to_array(image))
    return np.stack(images)


def build_renderer(components: RunComponents, services: RunServices) -> SampleRenderer | None:
    """Return the renderer of a run; None if nothing is drawn."""
    if components.samples is None:
        return None
    return SampleRenderer(components, services, components.samples)


def has_common(module: nn.Module, modules: set[nn.Module]) -> bool:
    """Return whether a module, or a module in it, is one of `modules`."""
    return not modules.isdisjoint(module.modules())


@contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Restore PyTorch's random numbers after a block: a scheduler may take some."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@torch.no_grad()
def first_frame(
    family: ModelFamily, latents: Tensor, pipeline: Any, size: tuple[int, int]
) -> Image.Image:
    """Decode the first frame of a clip, given its raw latents (C, F, h, w), and crop it to a size
    (width, height)."""
    pixels = family.decode_media(pipeline, latents[None, :, :1].to(pipeline._execution_device))[0]
    return ImageOps.fit(to_image(pixels.cpu()), size)
