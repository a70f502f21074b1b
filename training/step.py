"""The loss of one micro-batch: the only code that training and validation share with the model."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batches import Batch
from models.base import ModelFamily
from models.objectives import Objective

LOSSES: dict[str, Callable[..., Tensor]] = {
    "MSE": F.mse_loss,
    "L1": F.l1_loss,
    "Huber": F.huber_loss,
    "SmoothL1": F.smooth_l1_loss,
}


class LossFunction:
    """Loss per sample of a batch, for one family, objective and base dtype."""

    def __init__(self, family: ModelFamily, objective: Objective, name: str, dtype: torch.dtype):
        self.family, self.objective, self.dtype = family, objective, dtype
        self.compare = LOSSES[name]

    def __call__(self, denoiser: nn.Module, batch: Batch) -> Tensor:
        """(B,) losses in fp32, each the mean over one sample's elements, times its mask and weight."""
        noised = self.objective.noised(self.family.normalise(batch.latents.float()), batch.noise, batch.quantile)
        cond = {**self.family.size_cond(batch.crop), **batch.cond}  # sizes that the data states count more
        cond = {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in cond.items()}
        prediction = self.family.predict(denoiser, noised.noisy.to(self.dtype), noised.timestep, cond)
        # every loss here is a function of the difference alone, so scaling both sides scales the error
        scale = noised.error_scale.view(-1, *[1] * (prediction.ndim - 1))
        losses = self.compare(prediction.float() * scale, noised.target.float() * scale, reduction="none")
        if batch.mask is not None:
            losses = losses * batch.mask.unflatten(0, (-1, *[1] * (losses.ndim - 3)))
        return losses.flatten(1).mean(1) * batch.weight
