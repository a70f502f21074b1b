"""The processors of Qwen2-VL and Qwen3-VL for images and texts, without torchvision.

transformers' own processors also read videos, for which they need torchvision, and with torchvision they
scale images by other functions. Images that are always scaled by Pillow have the same embeddings on all
machines.
"""

from typing import Any

from transformers import AutoTokenizer, Qwen2VLProcessor, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from models.model_files import ModelFiles

PROCESSOR = "processor"
"""Usual component of a pipeline that is a processor."""


class WithoutVideos:
    """The parts of a processor of images and texts, and of no videos."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class ImageTextProcessor(WithoutVideos, Qwen2VLProcessor):
    """The processor of Qwen2-VL."""


class ImageTextProcessor3(WithoutVideos, Qwen3VLProcessor):
    """The processor of Qwen3-VL."""


for processor_class in (ImageTextProcessor, ImageTextProcessor3):
    # diffusers stores a pipeline's processor by these names, and loads it by them elsewhere
    processor_class.__name__ = processor_class.__bases__[-1].__name__
    processor_class.__module__ = "transformers"


class AbsentProcessor(ImageTextProcessor3):
    """The place of a processor that is not loaded, for a pipeline that asks it for tokens when it is made."""

    def __init__(self) -> None:
        self.tokenizer = self

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        return [[]]

    def encode(self, text: str) -> list[int]:
        """Return a token, as a tokenizer."""
        return [0]


def load_processor(
    files: ModelFiles,
    tokenizer: Any,
    processor_class: type[Any] = ImageTextProcessor,
    component: str = PROCESSOR,
) -> Any:
    """Load the processor of a pipeline, with this tokenizer and its template of a conversation."""
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(
        files.source,
        subfolder=component,
        local_files_only=files.load_options["local_files_only"],
    )
    return processor_class(image_processor, tokenizer, chat_template=tokenizer.chat_template)


def load_tokenizer(files: ModelFiles, component: str = PROCESSOR) -> Any:
    """Load the tokenizer of a pipeline's processor."""
    with files.loading_errors():
        return AutoTokenizer.from_pretrained(
            files.source,
            subfolder=component,
            local_files_only=files.load_options["local_files_only"],
        )
