"""DeepSpeed's ZeRO-2 on the adapters: each rank keeps a share of the optimizer's state and of the gradients.

A LoRA's state is small, so DDP is faster; this is for adapters of hundreds of millions of parameters (Full, LoKr with
whole factors, LoHa of high rank), and for those who have DeepSpeed set up. Checkpoints are those of the other engines.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_algos.attach import Adapted
from training.checkpoints.state import check_names
from training.config import TrainConfig
from training.distributed.engine import Engine


class ZeroEngine(Engine):
    """The adapters' optimizer belongs to DeepSpeed. It clips and updates in one."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, denoiser: nn.Module, adapted: Adapted,
        optimizer: torch.optim.Optimizer,
    ):  # fmt: skip
        self.accelerator, self.adapted, self.names = accelerator, adapted, adapted.named_parameters()
        self.trained = list(self.names.values())
        plugin = accelerator.state.deepspeed_plugin
        assert plugin is not None
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_accumulation_steps": 1,  # the loss is divided here, and each backward pass says what it is
            "gradient_clipping": config.optim.max_grad_norm,
            "zero_force_ds_cpu_optimizer": False,
        }
        if config.training_dtype == "bf16":
            denoiser.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(denoiser.forward)
        self.denoiser, wrapped = accelerator.prepare(denoiser, optimizer)
        self.optimizer: Any = wrapped.optimizer
        self.inner: torch.optim.Optimizer = self.optimizer.optimizer

    def accumulating(self, last: bool) -> AbstractContextManager:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.denoiser.set_gradient_accumulation_boundary(is_boundary=last)  # type: ignore[operator]
        self.denoiser.backward(loss)  # type: ignore[operator]

    def update(self, rate: float) -> Tensor:
        self.set_rate(rate)
        self.denoiser.step()  # type: ignore[operator]
        return torch.as_tensor(self.denoiser.get_global_grad_norm(), device=self.accelerator.device)  # type: ignore[operator]

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[str, Any] = next(iter(self.inner.state.values()), {})  # what is no tensor is the same for all
        keys = sorted(key for key, value in state.items() if _has_shape(value))
        numbers = {key: value for key, value in state.items() if key not in keys}
        return {
            name: {key: safe_get_full_optimizer_state(parameter, key).cpu() for key in keys}
            | {key: _copied(value, "cpu") for key, value in numbers.items()}
            for name, parameter in self.names.items()
            if keys or numbers
        }

    def load(self, adapter: dict[str, Tensor], optimizer: dict[str, dict[str, Any]]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self.adapted.load_state_dict(adapter)
        check_names(optimizer, self.names)
        device = self.accelerator.device
        self._make_room(next(iter(optimizer.values()), {}))
        for name, parameter in self.names.items():
            safe_set_full_fp32_param(parameter, adapter[name].to(device))
            for key, value in optimizer.get(name, {}).items():
                if _has_shape(value):
                    safe_set_full_optimizer_state(parameter, value.to(device), key)

    def _make_room(self, like: dict[str, Any]) -> None:
        """DeepSpeed makes an optimizer's state in the first step; here it is needed before, with the numbers in it."""
        if not like:
            return
        for flat in self.optimizer.single_partition_of_fp32_groups:
            self.inner.state[flat] = {
                key: torch.zeros_like(flat) if _has_shape(value) else _copied(value, flat.device)
                for key, value in like.items()
            }
        self.optimizer._lazy_init_hp_params_optimizer_state()


def _has_shape(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _copied(value: Any, device: torch.device | str) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else value
