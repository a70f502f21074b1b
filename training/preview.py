"""Sample images before and after training, from the same prompts and noise, drawn by diffusers' own
pipeline."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor, nn

from common.precision import without_autocast
from data.dataset import LatentDataset
from models.base import ModelFamily
from models.encoder_placement import modules_of, place_text_encoders
from objectives.schedulers import override_scheduler
from training.components import RunComponents
from training.config import SampleConfig, TrainConfig
from training.distributed.failures import describe_error
from training.distributed.sharding import is_sharded
from training.reporting.image_grid import to_image
from training.services import RunServices

NUM_CAPTIONS = 4
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Preview:
    """Prompts, and for each label the images (N, H, W, 3) in [0, 1] of these prompts."""

    prompts: list[str]
    images: dict[str, np.ndarray]


def draw_sample(
    pipeline: Any, prompt: str, number: int, config: SampleConfig, options: dict[str, Any]
) -> np.ndarray:
    """Draw one image (H, W, 3) in [0, 1]. Each prompt number has its own noise, the same in every
    call.

    `options`: size and guidance, as the arguments of the pipeline's call."""
    # modules in bf16 get inputs from others in fp32
    autocast = torch.autocast(
        pipeline._execution_device.type, torch.bfloat16, enabled=has_bf16_modules(pipeline)
    )
    with autocast, vae_in_own_dtype(pipeline.vae):
        result = pipeline(
            prompt=prompt,  # by name: it is not the first argument of every pipeline
            num_inference_steps=config.num_inference_steps,
            generator=torch.Generator().manual_seed((config.seed + number) % 2**64),
            output_type="np",
            **options,
        )
    if hasattr(result, "images"):
        return result.images[0]
    return result.frames[0][-1]  # the first frame may be the input


@contextmanager
def vae_in_own_dtype(vae: Any) -> Iterator[None]:
    """Let a VAE encode and decode in the dtype of its weights in a block: bf16 autocast would band
    colors."""

    def in_own_dtype(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
            with without_autocast(inputs.device.type):
                return function(inputs.to(vae.dtype), *args, **kwargs)

        return call

    vae.encode, vae.decode = in_own_dtype(vae.encode), in_own_dtype(vae.decode)
    try:
        yield
    finally:
        del vae.encode, vae.decode


def place_pipeline(pipeline: Any, config: TrainConfig, device: torch.device) -> Any:
    """Move a pipeline to the device that draws; return it.

    If the text encoders do not encode there as a whole, they stay on the CPU, and each of their
    layers is copied when it is needed."""
    model = config.model
    if model.text_encoder_placement == "device" or model.train_text_encoder:
        return pipeline.to(device)
    resident_names = []
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and not name.startswith("text_encoder"):
            component.to(device)
            resident_names.append(name)
    # the pipeline then asks the text encoders for its device
    pipeline._exclude_from_cpu_offload = resident_names
    return place_text_encoders(pipeline, "layers", device)


def preview_side(config: TrainConfig, family: ModelFamily) -> int:
    """Return height and width of a sample image in pixels, rounded as for buckets."""
    step = family.limits.pixel_step
    return max(step, config.data.resolution // step * step)


def has_bf16_modules(pipeline: Any) -> bool:
    """Return whether a component of the pipeline has weights in bf16."""
    return any(has_bf16_weights(module) for module in modules_of(pipeline))


def has_bf16_weights(module: nn.Module) -> bool:
    """Return whether a module has weights in bf16."""
    return any(parameter.dtype is torch.bfloat16 for parameter in module.parameters())


@torch.no_grad()
def first_frame(family: ModelFamily, latents: Tensor, pipeline: Any, side: int) -> Image.Image:
    """Decode the first frame of a clip, given its raw latents (C, F, h, w), and crop it to a
    square."""
    pixels = family.decode_media(pipeline, latents[None, :, :1].to(pipeline._execution_device))[0]
    return ImageOps.fit(to_image(pixels.cpu()), (side, side))


def default_prompts(family: ModelFamily, dataset: LatentDataset) -> list[str]:
    """Return captions of the data set: different ones, or for models that need an image those of
    the first clips."""
    if family.has_image_input:
        return list(islice(dataset.first_captions(), NUM_CAPTIONS))
    return dataset.captions(NUM_CAPTIONS)


class PreviewError(RuntimeError):
    """A preview that could not be drawn. Everything else is written before."""

    def __init__(self, error: str):
        super().__init__(
            f"the preview could not be drawn:\n{error}\nAll other files of the run are written"
        )


class SampleDrawer:
    """Draws images until an error occurs; then it keeps the error and draws nothing more.

    A failed preview must not fail the run: drawing may need memory that training did not.
    """

    def __init__(
        self, load_pipeline: Callable[[], Any], draw: Callable[[Any, str, int], np.ndarray]
    ):
        self.load_pipeline, self.draw = load_pipeline, draw
        self.pipeline: Any = None
        self.error: str | None = None

    def __call__(self, prompt: str, number: int) -> np.ndarray | None:
        if self.error is not None:
            return None
        try:
            self.pipeline = self.pipeline or self.load_pipeline()
            return self.draw(self.pipeline, prompt, number)
        except Exception as error:
            self.error, self.pipeline = describe_error(error), None
            if isinstance(error, torch.OutOfMemoryError):
                self.error += (
                    "\nA preview needs the text encoders too. The adapter is written. Use "
                    "--model.text_encoder_placement layers, --no_preview, or another program"
                )
            return None


class PreviewRenderer:
    """Draws the same prompts with several sets of weights; the processes share the prompts."""

    def __init__(self, components: RunComponents, services: RunServices):
        config = components.config
        self.config, self.components, self.services = config, components, services
        self.was_stopped = False
        """True if `render` ended before all images, because the run has to stop."""
        self.dataset = components.datasets.validation or components.datasets.train
        self.prompts = list(config.sample.prompts) or default_prompts(
            components.family, self.dataset
        )

    def render(self, weight_sets: dict[str, Weights]) -> Preview | None:
        """Return the images on the main process. Collective.

        Returns None if drawing failed, which is printed, or if the run has to stop. With a sharded
        model, raises PreviewError: the other processes then wait in the middle of an image."""
        process = self.services.process
        drawer = SampleDrawer(self._load_pipeline, self._draw)
        share = self._draw_share(weight_sets, drawer)
        self.was_stopped = share is None
        if share is None:
            return None
        results: list[Any] = [(share, drawer.error)]
        if process.count > 1:
            results = [None] * process.count
            target = results if process.is_main else None
            group = self.services.consensus.group
            self.services.barrier.wait()
            dist.gather_object((share, drawer.error), target, group=group)
        if not process.is_main:
            return None
        errors = [error for _, error in results if error]
        if errors:
            self.services.reporter.say(str(PreviewError(errors[0])))
            return None
        images: dict[tuple[str, int], np.ndarray] = {}
        for share, _ in results:
            images |= share
        stacked = {}
        num_prompts = len(self.prompts)
        for label in weight_sets:
            row = []
            for number in range(num_prompts):
                row.append(images[label, number])
            stacked[label] = np.stack(row)
        return Preview(self.prompts, stacked)

    def _draw_share(
        self, weight_sets: dict[str, Weights], drawer: SampleDrawer
    ) -> dict[tuple[str, int], np.ndarray | None] | None:
        """Draw this process's prompts; return the images by label and number of the prompt.

        Returns None on all processes if the run has to stop, which all check equally often. They
        wait for each other without a time limit: one may load slower, or draw a longer video.
        Afterwards the adapters have their trained weights again."""
        adapted, services = self.components.adapted, self.services
        is_model_sharded = is_sharded(services.accelerator)
        images: dict[tuple[str, int], np.ndarray | None] = {}
        adapted.model.eval()
        try:
            for label, weights in weight_sets.items():
                with adapted.using(weights):
                    for number in self._prompt_numbers():
                        services.barrier.wait()
                        if services.requests.must_stop():
                            return None
                        if number is not None:
                            images[label, number] = drawer(self.prompts[number], number)
                        if drawer.error is not None and is_model_sharded:
                            raise PreviewError(drawer.error)
        finally:
            adapted.model.train()
        return images

    def _prompt_numbers(self) -> list[int | None]:
        """Return the number of the prompt that this process draws in each round, or None.

        All processes have the same number of rounds."""
        process = self.services.process
        num_prompts = len(self.prompts)
        numbers: list[int | None] = []
        for first in range(0, num_prompts, process.count):
            number = first + process.index
            if number < num_prompts:
                numbers.append(number)
            elif is_sharded(self.services.accelerator):  # each pass needs all processes
                numbers.append(num_prompts - 1)
            else:
                numbers.append(None)
        return numbers

    def _load_pipeline(self) -> Any:
        """Return the pipeline where it draws, with the scheduler that the options ask for."""
        family, device = self.components.family, self.services.accelerator.device
        pipeline = family.pipeline(self.components.adapted.model)
        family.trim_text_encoders(pipeline)
        placed_pipeline = place_pipeline(pipeline, self.config, device)
        return override_scheduler(placed_pipeline, self.config.objective)

    def _draw(self, pipeline: Any, prompt: str, number: int) -> np.ndarray:
        family, config = self.components.family, self.config
        side = preview_side(config, family)
        options = family.preview_options(config.sample.guidance_scale)
        options |= {"height": side, "width": side}
        if family.has_image_input:
            latents = self.dataset.latents(number % len(self.dataset))
            options["image"] = first_frame(family, latents, pipeline, side)
            options["num_frames"] = config.data.frames
        return draw_sample(pipeline, prompt, number, config.sample, options)
