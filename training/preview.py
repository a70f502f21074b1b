"""Sample images before and after training, from the same prompts and noise, drawn by diffusers' own
pipeline."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor, nn

from data.dataset import LatentDataset
from models.base import ModelFamily
from objectives.schedulers import override_scheduler
from training.config import SampleConfig, TrainConfig
from training.distributed.engine import is_sharded
from training.distributed.failures import describe_error
from training.parts import RunParts
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
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    # a bf16 part meets others in fp32
    has_bf16 = any(
        parameter.dtype == torch.bfloat16 for module in modules for parameter in module.parameters()
    )
    with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=has_bf16):
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


@torch.no_grad()
def first_frame(family: ModelFamily, latents: Tensor, pipeline: Any, side: int) -> Image.Image:
    """Decode the first frame of a clip, given its raw latents (C, F, h, w), and crop it to a
    square."""
    pixels = family.decode_media(pipeline, latents[None, :, :1].to(pipeline.device))[0]
    return ImageOps.fit(to_image(pixels.cpu()), (side, side))


def default_prompts(family: ModelFamily, dataset: LatentDataset) -> list[str]:
    """Return captions of the data set: different ones, or for models that need an image those of
    the first clips."""
    if family.has_image_input:
        return list(islice(dataset.first_captions(), NUM_CAPTIONS))
    return dataset.captions(NUM_CAPTIONS)


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
            return None


class PreviewRenderer:
    """Draws the same prompts with several sets of weights; the processes share the prompts."""

    def __init__(self, config: TrainConfig, parts: RunParts, services: RunServices):
        self.config, self.parts, self.services = config, parts, services
        self.dataset = parts.datasets.validation or parts.datasets.train
        self.prompts = list(config.sample.prompts) or default_prompts(parts.family, self.dataset)

    def render(self, weight_sets: dict[str, Weights]) -> Preview | None:
        """Return the images on the main process; None if there are none.

        There are none if drawing failed, which is printed, or if the run is asked to stop.
        Collective."""
        process = self.services.process
        drawer = SampleDrawer(self._load_pipeline, self._draw)
        images = self._draw_share(weight_sets, drawer)
        if images is None:
            return None
        gathered: list[Any] = [(images, drawer.error)] * process.count
        if process.count > 1:
            target = gathered if process.is_main else None
            dist.gather_object(gathered[0], target, group=self.services.consensus.group)
        if not process.is_main:
            return None
        errors = [error for _, error in gathered if error]
        if errors:
            self.services.reporter.say(
                f"the preview could not be drawn:\n{errors[0]}\nThe adapter is written anyway"
            )
            return None
        stacked = {}
        for label in weight_sets:
            by_number = {
                number: image for share, _ in gathered for number, image in share[label].items()
            }
            stacked[label] = np.stack([by_number[number] for number in range(len(self.prompts))])
        return Preview(self.prompts, stacked)

    def _draw_share(
        self, weight_sets: dict[str, Weights], drawer: SampleDrawer
    ) -> dict[str, dict[int, np.ndarray]] | None:
        """Draw this process's prompts; None, on all processes, if the run is asked to stop.

        All processes ask equally often whether to stop. The adapters have their own weights again
        afterwards."""
        adapted = self.parts.adapted
        numbers = self._own_prompt_numbers()
        num_rounds = -(-len(self.prompts) // self.services.process.count)
        images: dict[str, dict[int, np.ndarray]] = {label: {} for label in weight_sets}
        adapted.model.eval()
        try:
            for label, weights in weight_sets.items():
                with adapted.using(weights):
                    for index in range(num_rounds):
                        if self.services.requests.must_stop():
                            return None
                        if index < len(numbers):
                            number = numbers[index]
                            images[label][number] = drawer(self.prompts[number], number)  # type: ignore[assignment]
        finally:
            adapted.model.train()
        return images

    def _own_prompt_numbers(self) -> list[int]:
        """Return the numbers of the prompts that this process draws."""
        process = self.services.process
        num_prompts = len(self.prompts)
        num_rounds = -(-num_prompts // process.count)
        numbers = [process.index + index * process.count for index in range(num_rounds)]
        if is_sharded(self.services.accelerator):  # each pass needs all processes
            return [min(number, num_prompts - 1) for number in numbers]
        return [number for number in numbers if number < num_prompts]

    def _load_pipeline(self) -> Any:
        pipeline = self.parts.family.pipeline(self.parts.adapted.model).to(
            self.services.accelerator.device
        )
        return override_scheduler(pipeline, self.config.objective)

    def _draw(self, pipeline: Any, prompt: str, number: int) -> np.ndarray:
        family, config = self.parts.family, self.config
        step = family.limits.pixel_step
        side = max(step, config.data.resolution // step * step)  # as for buckets
        options = {
            "height": side,
            "width": side,
            **family.preview_options(config.sample.guidance_scale),
        }
        if family.has_image_input:
            latents = self.dataset.latents(number % len(self.dataset))
            options |= {
                "image": first_frame(family, latents, pipeline, side),
                "num_frames": config.data.frames,
            }
        return draw_sample(pipeline, prompt, number, config.sample, options)
