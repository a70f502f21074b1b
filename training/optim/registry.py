"""The optimizers by name. This module imports no torch, because the options list the names."""

from dataclasses import dataclass, field
from typing import Any

TORCH_RESERVED = ("params", "lr", "fused", "foreach", "capturable", "differentiable", "maximize")
"""Arguments of torch's optimizers that the trainer sets."""


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer."""

    module: str
    class_name: str
    package: str = "torch"
    """Name on PyPI."""
    extra: str | None = None
    """Extra of pyproject.toml that installs the package; None for packages that are always
    installed."""
    fixed_args: dict[str, Any] = field(default_factory=dict)
    """Arguments that differ from the class's defaults."""
    reserved_args: tuple[str, ...] = ("params", "lr")
    """Arguments that users cannot set."""
    is_elementwise: bool = False
    """A part of a flattened weight is updated as in the whole weight. DeepSpeed's ZeRO needs this.
    """
    is_schedule_free: bool = False
    """Trains at one point and evaluates at another; has train() and eval()."""
    needs_single_lr: bool = False
    """All parameters must have the same learning rate."""


def bitsandbytes(class_name: str) -> OptimizerEntry:
    # the names of the classes imply optim_bits and is_paged
    reserved = ("params", "lr", "args", "amsgrad", "optim_bits", "is_paged")
    return OptimizerEntry(
        "bitsandbytes.optim", class_name, "bitsandbytes", "bitsandbytes", reserved_args=reserved
    )


def schedule_free(class_name: str) -> OptimizerEntry:
    reserved = ("params", "lr", "warmup_steps", "foreach")
    return OptimizerEntry(
        "schedulefree",
        class_name,
        "schedulefree",
        "optimizers",
        reserved_args=reserved,
        is_schedule_free=True,
    )


def torch_optimizer(name: str, **fixed_args: Any) -> OptimizerEntry:
    return OptimizerEntry(
        "torch.optim",
        name,
        fixed_args=fixed_args,
        reserved_args=TORCH_RESERVED,
        is_elementwise=True,
    )


# fused implementations, where torch has them: one kernel, and no read of the device
NODE_OPTIMIZERS = {
    "AdamW": torch_optimizer("AdamW", fused=True),
    "Adam": torch_optimizer("Adam", fused=True),
    "SGD": torch_optimizer("SGD", fused=True),
    "RMSprop": torch_optimizer("RMSprop", foreach=True),
}
"""The optimizers of ComfyUI's node."""
OTHER_OPTIMIZERS = {
    "AdamW8bit": bitsandbytes("AdamW8bit"),
    "PagedAdamW": bitsandbytes("PagedAdamW"),
    "PagedAdamW8bit": bitsandbytes("PagedAdamW8bit"),
    "Lion8bit": bitsandbytes("Lion8bit"),
    "PagedLion8bit": bitsandbytes("PagedLion8bit"),
    "Prodigy": OptimizerEntry(
        "prodigyopt",
        "Prodigy",
        "prodigyopt",
        "optimizers",
        reserved_args=("params", "lr", "fsdp_in_use"),
        needs_single_lr=True,
    ),
    "Lion": OptimizerEntry(
        "lion_pytorch", "Lion", "lion-pytorch", "optimizers", is_elementwise=True
    ),
    "ScheduleFreeAdamW": schedule_free("AdamWScheduleFree"),
    "ScheduleFreeSGD": schedule_free("SGDScheduleFree"),
    "CAME": OptimizerEntry("came_pytorch", "CAME", "came-pytorch", "optimizers"),
    # transformers' Adafactor: torch's multiplies the rate by the size of the weights, which is
    # almost nothing for a factor that starts at zero, and reads the device for every weight
    "Adafactor": OptimizerEntry(
        "transformers.optimization",
        "Adafactor",
        "transformers",
        fixed_args={"relative_step": False, "scale_parameter": False},
        reserved_args=("params", "lr", "relative_step", "warmup_init"),
    ),
    "Muon": OptimizerEntry("training.optim.muon", "MuonAdamW"),
}
OPTIMIZERS = NODE_OPTIMIZERS | OTHER_OPTIMIZERS
"""`--optimizer` -> where the optimizer comes from."""
