"""CUDA's autocast on the CPU: the operators that it computes in fp32.

Memory for a GPU is counted with tensors that say they are on the CPU. Autocast has other lists there:
on a GPU the norms, softmax and sums are in fp32, and keep fp32 tensors for the backward pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

FP32_FUNCTIONS = frozenset((
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal",
    "rsqrt", "sinh", "tan", "pow", "softplus", "__pow__", "__rpow__", "__rdiv__", "__rtruediv__",
    "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "norm", "cosine_similarity",
    "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "dist", "cdist", "renorm", "logsumexp",
    "interpolate", "prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum",
))  # fmt: skip
"""Names of functions, from ATen/autocast_mode.h (AT_FORALL_FP32 and the lists after it)."""
LOW_DTYPES = (torch.bfloat16, torch.float16)


class CudaAutocast(TorchFunctionMode):
    """Converts arguments to fp32 where CUDA's autocast does, while autocast is on for the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            with self:  # checkpointed blocks are computed again
                return run_backward(args[0])
        if getattr(func, "__name__", "") in FP32_FUNCTIONS and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, widened, (args, kwargs))
        return func(*args, **kwargs)


def run_backward(loss: Tensor) -> None:
    """Compute gradients as torch.autograd.backward does, which turns this mode off."""
    _engine_run_backward(
        (loss,),
        (torch.ones_like(loss),),
        False,  # keep the graph
        False,  # create a graph of the gradients
        (),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in fp32, if it is in a 16-bit dtype."""
    return tensor.float() if tensor.dtype in LOW_DTYPES else tensor
