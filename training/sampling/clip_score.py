"""A score of how well samples fit their prompts, by a CLIP model."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.announce import announced
from data.media.pictures import to_levels

PERCENT = 100


class ClipScore:
    """Compares images with texts by a CLIP model, on the CPU, where it takes no memory of the training."""

    def __init__(self, folder: Path):
        from transformers import CLIPModel, CLIPProcessor

        with announced("loading the CLIP model"), torch.random.fork_rng(devices=[]):
            model = CLIPModel.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
            )
            self.processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        self.model: Any = model.float()
        self.model.eval()

    @torch.no_grad()
    def score(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> float:
        """Return the mean of 100 x the cosine between each image (H, W, 3) in [0, 1] and its text."""
        scores = []
        for array, text in zip(images, texts, strict=True):
            image = Image.fromarray(to_levels(array))
            inputs = self.processor(
                text=[text],
                images=[image],
                return_tensors="pt",
                padding=True,
                truncation=True,
            )
            outputs = self.model(**inputs)
            cosine = torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds)
            percent = PERCENT * cosine.item()
            scores.append(percent)
        return fmean(scores)
