"""Trained weights of normalisation layers: `.diff` (n), and `.diff_b` (n) of the bias, zero at first.

The layer runs with W + diff in fp32 whatever the base's dtype: in bf16 a small difference would be rounded away.
"""

import torch
from torch import Tensor, nn

from lora_algos.config import LayerSpec
from lora_algos.full import Full
from lora_algos.kernels import WIDE
from lora_algos.ops import LayerOp, without_autocast


class NormDifference(Full):
    """A normalisation layer whose weight is trained."""

    def setup(self, base_layer: nn.Module, spec: LayerSpec) -> None:
        weight, bias = base_layer.weight, getattr(base_layer, "bias", None)
        self.spec, self.op, self.unmerged, self.diff_b = spec, LayerOp(0), None, None
        self.kernel = self.make_kernel(self.op, spec, weight.shape, self.tensors())  # type: ignore[arg-type]
        if spec.bias and bias is not None:
            self.diff_b = nn.Parameter(torch.zeros_like(bias, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        if self.unmerged is not None:
            return self.base_layer(x)
        weight, bias = self.base_layer.weight, getattr(self.base_layer, "bias", None)
        wide = x.dtype if x.dtype in WIDE else torch.float32
        tensors = self._masked(dict(self.trained()))
        changed = {"weight": weight.to(wide) + tensors["diff"]}
        if bias is not None:
            changed["bias"] = bias.to(wide) + tensors["diff_b"] if "diff_b" in tensors else bias.to(wide)
        x, dtype = x.to(wide), x.dtype
        if torch.is_grad_enabled() and not x.requires_grad:
            # for a gradient that nobody reads: torch 2.13 dies on CPUs in the backward pass of a channels-last
            # GroupNorm that is to give one for its weight and none for its input
            x = x.detach().requires_grad_()
        with without_autocast(x.device.type):
            y = torch.func.functional_call(self.base_layer, changed, (x,))
        return y.to(dtype)
