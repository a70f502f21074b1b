"""The processor of Qwen2-VL for images and texts, without torchvision.

transformers' own processor also reads videos, for which it needs torchvision, and with torchvision it
scales images by other functions. Images that are always scaled by Pillow have the same embeddings on all
machines.
"""

from typing import Any

from transformers import Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from models.model_files import ModelFiles


class ImageTextProcessor(Qwen2VLProcessor):
    """A processor of images and texts, and of no videos."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def load_processor(files: ModelFiles, tokenizer: Any) -> ImageTextProcessor:
    """Load the processor of a pipeline."""
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(
        files.source,
        subfolder="processor",
        local_files_only=files.load_options["local_files_only"],
    )
    return ImageTextProcessor(image_processor, tokenizer)
