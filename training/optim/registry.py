"""The optimizers by name: where each comes from and what is special about it. No torch here: the options list them."""

from dataclasses import dataclass, field
from typing import Any

# torch's: how a step is computed is ours to say
TORCH_OURS = ("params", "lr", "fused", "foreach", "capturable", "differentiable", "maximize")


@dataclass(frozen=True)
class Source:
    """One optimizer."""

    module: str
    """That is imported."""
    kind: str
    """The class in it."""
    package: str = "torch"
    """Its name on PyPI."""
    extra: str | None = None
    """Of pyproject.toml, that installs the package; None where the package is always there."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Arguments that are not the class's own defaults."""
    ours: tuple[str, ...] = ("params", "lr")
    """Arguments that are not the user's to give."""
    elementwise: bool = False
    """Whether a share of a flattened weight is updated as in the whole: what DeepSpeed's ZeRO takes."""
    averages: bool = False
    """Schedule-free: trains on one point and evaluates at another, by train() and eval()."""
    one_rate: bool = False
    """All parameters must have the same learning rate."""


def bitsandbytes(kind: str) -> Source:
    ours = ("params", "lr", "args", "amsgrad", "optim_bits", "is_paged")  # the name says what they are
    return Source("bitsandbytes.optim", kind, "bitsandbytes", "bitsandbytes", ours=ours)


def schedule_free(kind: str) -> Source:
    ours = ("params", "lr", "warmup_steps", "foreach")
    return Source("schedulefree", kind, "schedulefree", "optimizers", ours=ours, averages=True)


# of ComfyUI's node; the fused implementations where torch has them (one kernel, no device read)
NODE = {
    "AdamW": Source("torch.optim", "AdamW", fixed={"fused": True}, ours=TORCH_OURS, elementwise=True),
    "Adam": Source("torch.optim", "Adam", fixed={"fused": True}, ours=TORCH_OURS, elementwise=True),
    "SGD": Source("torch.optim", "SGD", fixed={"fused": True}, ours=TORCH_OURS, elementwise=True),
    "RMSprop": Source("torch.optim", "RMSprop", fixed={"foreach": True}, ours=TORCH_OURS, elementwise=True),
}
NAMED = {
    "AdamW8bit": bitsandbytes("AdamW8bit"),
    "PagedAdamW": bitsandbytes("PagedAdamW"),
    "PagedAdamW8bit": bitsandbytes("PagedAdamW8bit"),
    "Lion8bit": bitsandbytes("Lion8bit"),
    "PagedLion8bit": bitsandbytes("PagedLion8bit"),
    "Prodigy": Source(
        "prodigyopt", "Prodigy", "prodigyopt", "optimizers", ours=("params", "lr", "fsdp_in_use"), one_rate=True
    ),
    "Lion": Source("lion_pytorch", "Lion", "lion-pytorch", "optimizers", elementwise=True),
    "ScheduleFreeAdamW": schedule_free("AdamWScheduleFree"),
    "ScheduleFreeSGD": schedule_free("SGDScheduleFree"),
    "CAME": Source("came_pytorch", "CAME", "came-pytorch", "optimizers"),
    # transformers', not torch's: torch's multiplies the rate by the size of the weights, which for a factor that starts
    # at zero is next to nothing, and reads the device for each of them
    "Adafactor": Source(
        "transformers.optimization", "Adafactor", "transformers",
        fixed={"relative_step": False, "scale_parameter": False},
        ours=("params", "lr", "relative_step", "warmup_init"),
    ),
    "Muon": Source("training.optim.muon", "MuonAdamW"),
}  # fmt: skip
OPTIMIZERS = NODE | NAMED
