"""DeepSpeed's ZeRO-2 on the adapters: each process keeps a part of the optimizer's state and of the
gradients.

The state of a LoRA is small, so DDP is faster. This engine is for adapters of hundreds of millions
of parameters: Full, LoKr with whole factors, LoHa of high rank. Checkpoints are the same for all
engines.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_algos.adapted_model import AdaptedModel
from lora_algos.prepared import parameter_updates
from training.checkpoints.state import NamedState, check_parameter_names
from training.config import TrainConfig
from training.distributed.engine import Engine


class ZeroEngine(Engine):
    """DeepSpeed owns the adapters' optimizer, and clips and updates in one call."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        denoiser: nn.Module,
        adapted: AdaptedModel,
        optimizer: torch.optim.Optimizer,
    ):
        self.accelerator, self.adapted = accelerator, adapted
        self.names = adapted.named_parameters()
        self.trained = list(self.names.values())
        plugin = accelerator.state.deepspeed_plugin
        assert plugin is not None
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_accumulation_steps": 1,  # the trainer divides the loss and marks the last backward pass
            "gradient_clipping": config.optim.max_grad_norm,
            "zero_force_ds_cpu_optimizer": False,
        }
        if config.training_dtype == "bf16":
            autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
            denoiser.forward = autocast(denoiser.forward)
        self.denoiser, wrapped = accelerator.prepare(denoiser, optimizer)
        self.optimizer: Any = wrapped.optimizer
        self.inner_optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        adapted.prepare_once_per_step()

    def accumulating(self, is_last: bool) -> AbstractContextManager:
        return nullcontext()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self.denoiser.set_gradient_accumulation_boundary(is_boundary=is_last)  # type: ignore[operator]
        self.denoiser.backward(loss)  # type: ignore[operator]

    def update(self, learning_rate: float) -> Tensor:
        self.set_learning_rate(learning_rate)
        self.denoiser.step()  # type: ignore[operator]
        parameter_updates.add()  # DeepSpeed writes parameters through their data
        norm = self.denoiser.get_global_grad_norm()  # type: ignore[operator]
        return torch.as_tensor(norm, device=self.accelerator.device)

    def optimizer_state(self) -> NamedState:
        from deepspeed.utils import safe_get_full_optimizer_state

        first_state: dict[str, Any] = next(iter(self.inner_optimizer.state.values()), {})
        state: NamedState = {}
        if not first_state:
            return state
        for name, parameter in self.names.items():
            values = {}
            for key, value in first_state.items():
                if has_shape(value):
                    values[key] = safe_get_full_optimizer_state(parameter, key).cpu()
                else:  # the same for all parameters
                    values[key] = copied(value, "cpu")
            state[name] = values
        return state

    def load(self, adapter: dict[str, Tensor], optimizer: NamedState) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self.adapted.load_state_dict(adapter)
        check_parameter_names(optimizer, self.names)
        device = self.accelerator.device
        self._create_state(next(iter(optimizer.values()), {}))
        for name, parameter in self.names.items():
            safe_set_full_fp32_param(parameter, adapter[name].to(device))
            for key, value in optimizer.get(name, {}).items():
                if has_shape(value):
                    safe_set_full_optimizer_state(parameter, value.to(device), key)
        parameter_updates.add()

    def _create_state(self, template: dict[str, Any]) -> None:
        """Create the optimizer's state with the scalars of `template`. DeepSpeed would do so in the
        first step."""
        if not template:
            return
        for flat_weights in self.optimizer.single_partition_of_fp32_groups:
            values = {}
            for key, value in template.items():
                if has_shape(value):
                    values[key] = torch.zeros_like(flat_weights)
                else:
                    values[key] = copied(value, flat_weights.device)
            self.inner_optimizer.state[flat_weights] = values
        self.optimizer._lazy_init_hp_params_optimizer_state()


def has_shape(value: Any) -> bool:
    """Return whether a value is a tensor with at least one dimension."""
    return isinstance(value, Tensor) and value.ndim > 0


def copied(value: Any, device: torch.device | str) -> Any:
    """Return a copy of a tensor on a device; other values are returned unchanged."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    return value
