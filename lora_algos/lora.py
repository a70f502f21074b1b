"""LoRA: dW = (alpha / rank) * up @ down, in PEFT's layers with their initializations and a forward
pass of ours (Hu et al. 2021, arXiv 2106.09685).

Shapes, for a weight (out, in, *kernel): lora_down (rank, in, *kernel), lora_up (out, rank, 1...).
up starts at zero.

An initialization that starts elsewhere (pissa, olora, orthogonal) takes its product out of the base
weight. Here the base stays and the product is subtracted in the adapter: dW = scaling * (up @ down
- up_0 @ down_0), which is exactly zero at first in any dtype, and is written as one LoRA of twice
the rank.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_lora
from torch import Tensor, nn

from common.errors import AdapterError
from lora_algos.adapter import Adapter, OwnAdapter
from lora_algos.config import AdapterOptions, LayerSpec
from lora_algos.kernels import Kernel, Tensors
from lora_algos.layer_op import LayerOp
from lora_algos.low_rank import LowRank, difference
from lora_algos.tensors import Shapes, fitted, rank_and_alpha

INITS_OF_LINEAR = ("orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16")
ADAPTER_NAME = "default"  # PEFT's name of the one adapter we attach


class LoRABase(Adapter):
    """What LoRA is, whoever holds its parameters."""

    algorithm = "LoRA"
    detected_by: ClassVar[tuple[str, ...]] = ("lora_down.weight", "lora_up.weight")
    rank_axis = {"lora_down.weight": 0, "initial_down": 0}  # noqa: RUF012
    starts_at_zero = ("lora_up.weight",)
    own_options = ("rslora", "init")

    @classmethod
    def heeds(cls, option: str, options: AdapterOptions, weight: torch.Size) -> bool:
        of_linear = option == "init" and options.init in INITS_OF_LINEAR
        return super().heeds(option, options, weight) and not (of_linear and len(weight) > 2)

    @classmethod
    def shapes(cls, spec: LayerSpec, weight: torch.Size) -> Shapes:
        out, channels, *kernel = weight
        if spec.options.init in INITS_OF_LINEAR and not kernel:
            if spec.rank > min(out, channels):
                raise AdapterError(
                    f"--adapter.init {spec.options.init} has at most rank {min(out, channels)} there"
                )
            if spec.options.init == "orthogonal" and spec.rank % 2:
                raise AdapterError(f"--adapter.init orthogonal wants an even rank, not {spec.rank}")
        return {
            "lora_up.weight": (out, spec.rank, *[1] * len(kernel)),
            "lora_down.weight": (spec.rank, channels, *kernel),
        }

    @classmethod
    def make_kernel(
        cls, op: LayerOp, spec: LayerSpec, weight: torch.Size, names: Iterable[str]
    ) -> Kernel:
        twin = spec.options.init in INITS_OF_LINEAR and not op.spatial
        return LowRank(op, weight, spec.scaling, twin)

    @classmethod
    def read_spec(cls, tensors: dict[str, Tensor], weight: torch.Size) -> tuple[LayerSpec, Shapes]:
        spec = LayerSpec(*rank_and_alpha(tensors), cls.algorithm)
        return spec, fitted(tensors, cls.shapes(spec, weight), weight)

    @classmethod
    def on(cls, base_layer: nn.Module, spec: LayerSpec, shapes: Shapes | None = None) -> Adapter:
        """`base_layer` adapted: in PEFT's layer, but for grouped convolutions, which PEFT gives
        another function."""
        peft_layers = {
            type_: layer
            for type_, layer in cls.peft_layers().items()
            if isinstance(base_layer, type_)
        }
        if not peft_layers or getattr(base_layer, "groups", 1) > 1:
            return cls.own_layer()(base_layer, spec, shapes)
        return next(iter(peft_layers.values()))(base_layer, spec)

    @classmethod
    def peft_layers(cls) -> dict[type[nn.Module], Callable[..., Adapter]]:
        return {
            nn.Linear: LoRALinear,
            nn.Conv1d: LoRAConv1d,
            nn.Conv2d: LoRAConv2d,
            nn.Conv3d: LoRAConv3d,
        }

    @classmethod
    def own_layer(cls) -> Callable[..., Adapter]:
        return OwnLoRA


class PeftAdapter(LoRABase):
    """A layer of PEFT's with our forward pass. `initial_*` hold what the initialization took out of
    the base."""

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_magnitude_vector: nn.ModuleDict
    initial_up: Tensor | None
    initial_down: Tensor | None
    has_magnitude: ClassVar[bool] = False

    def __init__(self, base_layer: Any, spec: LayerSpec):
        weight, init = base_layer.weight, spec.options.init
        if not isinstance(base_layer, nn.Linear) and init in INITS_OF_LINEAR:
            init = "default"  # PEFT has these for Linear layers only
        if init in INITS_OF_LINEAR and weight.dtype.itemsize == 1:
            raise AdapterError(
                f"--adapter.init {init} takes a base in fp32, bf16 or fp16, not in {weight.dtype}"
            )
        untouched = weight.detach().clone() if init in INITS_OF_LINEAR else None
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,  # type: ignore[arg-type]  # PEFT says int and only divides by the rank
            use_rslora=spec.options.rslora,
            init_lora_weights=True if init == "default" else init,  # type: ignore[arg-type]
            use_dora=self.has_magnitude,
        )
        with (
            torch.device("meta") if weight.is_meta else nullcontext()
        ):  # PEFT moves some of its tensors there too late
            arguments = {"config": config, "r": spec.rank, "lora_alpha": spec.alpha}
            super().__init__(base_layer, ADAPTER_NAME, **arguments)  # type: ignore[call-arg]
        for module in (self.lora_A, self.lora_B, self.lora_magnitude_vector):
            # PEFT takes over the base's dtype; in bf16 two thirds of the updates would be rounded
            # away
            module.float()
        up = down = None
        if untouched is not None:
            weight.data.copy_(untouched)
            up, down = (tensor.detach().clone() for tensor in PeftAdapter.tensors(self).values())
        self.register_buffer("initial_up", up)  # type: ignore[attr-defined]
        self.register_buffer("initial_down", down)  # type: ignore[attr-defined]
        self.setup(base_layer, spec)

    def tensors(self) -> dict[str, nn.Parameter]:
        return {
            "lora_up.weight": self.lora_B[ADAPTER_NAME].weight,  # type: ignore[dict-item]
            "lora_down.weight": self.lora_A[ADAPTER_NAME].weight,  # type: ignore[dict-item]
        }

    def constants(self) -> dict[str, Tensor]:
        if self.initial_up is None or self.initial_down is None:
            return {}
        return {"initial_up": self.initial_up, "initial_down": self.initial_down}

    def in_file(self) -> tuple[dict[str, Tensor], float]:
        """With what was taken out of the base subtracted."""
        tensors, alpha = super().in_file()
        if self.initial_up is not None and self.initial_down is not None:
            given = tensors["lora_up.weight"], tensors["lora_down.weight"]
            up, down = difference(*given, self.initial_up, self.initial_down)
            tensors |= {"lora_up.weight": up, "lora_down.weight": down}
            alpha *= len(down) / self.spec.rank
        return tensors, alpha

    def factors(self, tensors: dict[str, Tensor]) -> Tensors:
        tensors = {**self.constants(), **tensors}  # which rank_dropout may have masked
        initial_up, initial_down = (
            tensors.pop("initial_up", None),
            tensors.pop("initial_down", None),
        )
        up, down, *rest = super().factors(tensors)
        if initial_up is not None and initial_down is not None:
            up, down = torch.cat([up, -initial_up], 1), torch.cat([down, initial_down])
        return up, down, *rest

    def not_ours(self, *args: Any, **kwargs: Any) -> None:
        raise AdapterError(
            "a layer of this trainer's does not follow PEFT's switches (enable_adapters, scale_layer and the like). "
            "Export with --export.formats peft and load that with PEFT, or use merge and unmerge of lora_algos.Adapted"
        )

    def merge(self, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:  # PEFT's, which merges and unmerges adapters by name
            self.not_ours()
        super().merge()

    enable_adapters = set_scale = scale_layer = unscale_layer = delete_adapter = not_ours


class LoRALinear(PeftAdapter, peft_lora.Linear):
    """A Linear layer with a LoRA."""


class LoRAConv1d(PeftAdapter, peft_lora.Conv1d):
    """A Conv1d layer with a LoRA."""


class LoRAConv2d(PeftAdapter, peft_lora.Conv2d):
    """A Conv2d layer with a LoRA."""


class LoRAConv3d(PeftAdapter, peft_lora.Conv3d):
    """A Conv3d layer with a LoRA."""


class OwnLoRA(LoRABase, OwnAdapter):
    """A grouped convolution with a LoRA."""

    @classmethod
    def initialize(cls, tensors: dict[str, Tensor]) -> None:
        tensors["lora_up.weight"].zero_()
        nn.init.kaiming_uniform_(tensors["lora_down.weight"], a=math.sqrt(5))


ADAPTER = LoRABase
