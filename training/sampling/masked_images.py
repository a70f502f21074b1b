"""The images of samples, for models that paint a part of an image: those of the data, with their masks."""

from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps

from data.dataset import LatentDataset
from data.media.pictures import to_image, to_levels
from models.base import ModelFamily
from models.families.inpainting import INPAINT_MASK
from training.sampling.prompts import SamplePrompt

PAINTED_COLOR = (128, 128, 128)


class MaskedImage(NamedTuple):
    """An image, and a mask that is white where the model paints."""

    image: Image.Image
    mask: Image.Image

    def options(self) -> dict[str, Image.Image]:
        """Return the arguments of a pipeline's call."""
        return {"image": self.image, "mask_image": self.mask}

    def shown(self) -> Image.Image:
        """Return what the model sees of the image."""
        gray = Image.new("RGB", self.image.size, PAINTED_COLOR)
        return Image.composite(gray, self.image, self.mask)


def blank_image(width: int, height: int) -> MaskedImage:
    """Return a white image that is painted as a whole."""
    size = (width, height)
    return MaskedImage(Image.new("RGB", size, "white"), Image.new("L", size, "white"))


@torch.no_grad()
def masked_image(
    family: ModelFamily,
    dataset: LatentDataset,
    row: int,
    prompt: SamplePrompt,
    pipeline: Any,
) -> MaskedImage:
    """Return the decoded image of a sample and its mask, cropped to the size of a prompt."""
    assert prompt.width is not None  # it is completed
    assert prompt.height is not None
    size = (prompt.width, prompt.height)
    latents = dataset.latents(row)[None]
    latents = latents.to(pipeline._execution_device)
    (pixels,) = family.decode_media(pipeline, latents)
    image = to_image(pixels.cpu())
    media_id = dataset.media_id(row)
    channels = dataset.media.read_tensor(media_id, INPAINT_MASK)
    (masks,) = family.mask_pixels(channels[None].float())
    levels = to_levels(masks[0].numpy())
    mask = Image.fromarray(levels)
    return MaskedImage(
        image=ImageOps.fit(image, size),
        mask=ImageOps.fit(mask, size, Image.Resampling.NEAREST),
    )
