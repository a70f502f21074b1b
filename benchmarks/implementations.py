"""Adapters of this project, of PEFT and of LyCORIS on one layer, for benchmarks/adapters.py."""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lora_algos.attach import attach
from lora_algos.config import AdapterOptions, LayerSpec

LYCORIS_VERSION = "4.1.3"
LYCORIS_ERROR = ""
"""Why LyCORIS cannot be measured; empty if it can."""
if importlib.util.find_spec("lycoris") is None:
    LYCORIS_ERROR = f"LyCORIS is not installed: pip install lycoris-lora=={LYCORIS_VERSION}"
UNDIVIDED_RANK = 10**6
"""For PEFT's LoKr: no factor is decomposed at such a rank."""


class UnsupportedError(Exception):
    """A setting that an implementation does not have."""


@dataclass(frozen=True)
class Setting:
    """An algorithm with its options: a row of the tables."""

    name: str
    spec: LayerSpec


def setting(name: str, algorithm: str, rank: int = 16, **options: Any) -> Setting:
    return Setting(name, LayerSpec(rank, float(rank), algorithm, AdapterOptions(**options)))


SETTINGS = (
    setting("LoRA r16", "LoRA"),
    setting("DoRA r16", "DoRA"),
    setting("LoHa r4", "LoHa", 4),
    setting("LoHa r8", "LoHa", 8),
    setting("LoHa r16", "LoHa"),
    setting("LoKr full f8", "LoKr", factor=8, full_matrix=True),
    setting("LoKr full f-1", "LoKr", full_matrix=True),
    setting("LoKr f8 r16", "LoKr", factor=8),
    setting("LoKr f-1 r16", "LoKr"),
    setting("OFT b32", "OFT", block_size=32),
    setting("BOFT 2 stages", "BOFT", block_size=32, stages=2),
    setting("BOFT all", "BOFT", block_size=32),
    setting("GLoRA r16", "GLoRA"),
    setting("Full", "Full"),
)


def no_mode(_x: Tensor) -> str:
    return ""


@dataclass(frozen=True)
class Layer:
    """A layer with an adapter."""

    module: nn.Module
    trained: list[nn.Parameter]
    mode: Callable[[Tensor], str] = field(default=no_mode)
    """Names the way in which the layer computes an input; only this project's layers have
    several."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress messages and warnings of the libraries in a block."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def sharing_weights(base: nn.Module) -> nn.ModuleDict:
    """Return a model with one layer that shares the weights of `base`."""
    layer = type(base).__new__(type(base))
    layer.__dict__ = {**base.__dict__, "_parameters": {**base._parameters}}
    return nn.ModuleDict({"layer": layer})


def ours(setting: Setting, base: nn.Module) -> Layer:
    """Attach this project's adapter, as the trainer does."""
    model = sharing_weights(base)
    attach(model, {"layer": setting.spec}, 0)
    layer: Any = model["layer"]

    def mode(x: Tensor) -> str:
        factors = layer.factors(dict(layer.update_tensors()))
        return layer.mode(x, factors)

    return Layer(layer, list(layer.trained_tensors().values()), mode)


def peft_config(spec: LayerSpec) -> Any:
    """Return PEFT's configuration for a setting. Raises UnsupportedError."""
    import peft

    rank, options, layers = spec.rank, spec.options, ["layer"]
    match spec.algorithm:
        case "LoRA" | "DoRA":
            is_dora = spec.algorithm == "DoRA"
            return peft.LoraConfig(r=rank, lora_alpha=rank, use_dora=is_dora, target_modules=layers)
        case "LoHa":
            return peft.LoHaConfig(r=rank, alpha=rank, target_modules=layers)
        case "LoKr":
            rank = UNDIVIDED_RANK if options.full_matrix else rank
            return peft.LoKrConfig(
                r=rank, alpha=rank, decompose_factor=options.factor, target_modules=layers
            )
        case "OFT":
            return peft.OFTConfig(r=0, oft_block_size=options.block_size, target_modules=layers)
        case "BOFT" if options.stages > 0:
            # more than one stage needs PEFT's CUDA extension
            return peft.BOFTConfig(
                boft_block_size=options.block_size, boft_n_butterfly_factor=1, target_modules=layers
            )
        case "BOFT":
            raise UnsupportedError("PEFT's BOFT has one stage on a CPU; see BOFT 2 stages")
        case "GLoRA":
            raise UnsupportedError("PEFT's GLoRA is another function, elementwise in the weight")
    raise UnsupportedError(f"PEFT has no {spec.algorithm}")


def peft(setting: Setting, base: nn.Module) -> Layer:
    """Attach PEFT's adapter as diffusers does, in fp32."""
    from peft import inject_adapter_in_model

    if setting.spec.algorithm == "OFT" and isinstance(base, nn.Conv2d):
        raise UnsupportedError(
            "PEFT's OFT of a 3x3 convolution adds up overlapping patches: another function"
        )
    model = inject_adapter_in_model(peft_config(setting.spec), sharing_weights(base))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return Layer(model["layer"], trained)


def lycoris(setting: Setting, base: nn.Module, bypass: bool) -> Layer:
    """Attach LyCORIS' adapter. `bypass`: add its output to the layer's, instead of changing the
    weight."""
    from lycoris import modules

    spec, options = setting.spec, setting.spec.options
    module_classes = {
        "LoRA": modules.LoConModule,
        "DoRA": modules.LoConModule,
        "LoHa": modules.LohaModule,
        "LoKr": modules.LokrModule,
        "OFT": modules.DiagOFTModule,
        "BOFT": modules.ButterflyOFTModule,
        "GLoRA": modules.GLoRAModule,
        "Full": modules.FullModule,
    }
    if spec.algorithm not in module_classes:
        raise UnsupportedError(f"LyCORIS has no {spec.algorithm}")
    if spec.algorithm == "DoRA" and bypass:
        raise UnsupportedError("LyCORIS' bypass of DoRA leaves the magnitude out: it is LoRA")
    if spec.algorithm == "BOFT" and options.stages > 0:
        raise UnsupportedError("LyCORIS' BOFT has all its stages always; see BOFT all")
    arguments: dict[str, Any] = {"lora_dim": spec.rank, "alpha": spec.rank}
    if spec.algorithm in ("OFT", "BOFT"):
        arguments = {"lora_dim": options.block_size, "alpha": 0}
    if spec.algorithm == "DoRA":
        arguments["weight_decompose"] = True
    if spec.algorithm == "LoKr":
        arguments |= {"factor": options.factor, "full_matrix": options.full_matrix}
    layer: Any = sharing_weights(base)["layer"]
    module_class = module_classes[spec.algorithm]
    adapter = module_class("layer", layer, 1.0, bypass_mode=bypass, **arguments)
    adapter.apply_to()
    adapted = nn.ModuleDict({"adapter": adapter, "layer": layer})
    adapted.forward = layer.forward  # type: ignore[method-assign]
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return Layer(adapted, trained)


def lycoris_rebuild(setting: Setting, base: nn.Module) -> Layer:
    """Attach LyCORIS' adapter, which changes the weight in each forward pass."""
    return lycoris(setting, base, bypass=False)


def lycoris_bypass(setting: Setting, base: nn.Module) -> Layer:
    """Attach LyCORIS' adapter, whose output is added to the layer's."""
    return lycoris(setting, base, bypass=True)


PEERS: dict[str, Callable[[Setting, nn.Module], Layer]] = {
    "PEFT": peft,
    "LyCORIS rebuild": lycoris_rebuild,
    "LyCORIS bypass": lycoris_bypass,
}
"""Column -> function that attaches the adapter of another library."""
