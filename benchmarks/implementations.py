"""Ours, PEFT's and LyCORIS' adapters on one layer, as benchmarks/adapters.py compares them."""

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
from lora_algos.autograd_functions import choose_mode
from lora_algos.config import AdapterOptions, LayerSpec

LYCORIS_VERSION = "4.1.3"
UNAVAILABLE = (
    ""
    if importlib.util.find_spec("lycoris")
    else f"LyCORIS is not installed: pip install lycoris-lora=={LYCORIS_VERSION}"
)


class Unsupported(Exception):
    """An implementation does not have what is compared."""


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


@dataclass(frozen=True)
class Layer:
    """An adapted layer, its trained tensors, and a function that names how it computes an input."""

    module: nn.Module
    trained: list[nn.Parameter]
    mode: Callable[[Tensor], str] = field(default=lambda x: "")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what peers print and warn when they are built."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def same_weights(base: nn.Module) -> nn.ModuleDict:
    """A model whose one layer has the weights of `base`, without a copy."""
    layer = type(base).__new__(type(base))
    layer.__dict__ = {**base.__dict__, "_parameters": {**base._parameters}}
    return nn.ModuleDict({"layer": layer})


def ours(setting: Setting, base: nn.Module) -> Layer:
    """As the trainer attaches it."""
    model = same_weights(base)
    attach(model, {"layer": setting.spec}, 0)
    layer: Any = model["layer"]

    def mode(x: Tensor) -> str:
        factors = layer.factors(dict(layer.update_tensors()))
        return choose_mode(layer.kernel, layer.spec.bypass_mode, x, factors)

    return Layer(layer, list(layer.trained_tensors().values()), mode)


def peft_config(spec: LayerSpec) -> Any:
    import peft

    r, options, layers = spec.rank, spec.options, ["layer"]
    whole = 10**6  # LoKr: a rank that no factor is decomposed for
    match spec.algorithm:
        case "LoRA" | "DoRA":
            return peft.LoraConfig(
                r=r, lora_alpha=r, use_dora=spec.algorithm == "DoRA", target_modules=layers
            )
        case "LoHa":
            return peft.LoHaConfig(r=r, alpha=r, target_modules=layers)
        case "LoKr":
            r = whole if options.full_matrix else r
            return peft.LoKrConfig(
                r=r, alpha=r, decompose_factor=options.factor, target_modules=layers
            )
        case "OFT":
            return peft.OFTConfig(r=0, oft_block_size=options.block_size, target_modules=layers)
        case "BOFT" if options.stages > 0:
            # more than one stage needs its CUDA extension
            return peft.BOFTConfig(
                boft_block_size=options.block_size, boft_n_butterfly_factor=1, target_modules=layers
            )
        case "BOFT":
            raise Unsupported("PEFT's BOFT has one stage on a CPU; see BOFT 2 stages")
        case "GLoRA":
            raise Unsupported("PEFT's GLoRA is another function, elementwise in the weight")
    raise Unsupported("PEFT has none")


def peft(setting: Setting, base: nn.Module) -> Layer:
    """Injected as diffusers does, the adapters in fp32."""
    from peft import inject_adapter_in_model

    if setting.spec.algorithm == "OFT" and isinstance(base, nn.Conv2d):
        raise Unsupported(
            "PEFT's OFT of a 3x3 convolution adds up overlapping patches: another function"
        )
    model = inject_adapter_in_model(peft_config(setting.spec), same_weights(base))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return Layer(model["layer"], trained)


def lycoris(setting: Setting, base: nn.Module, bypass: bool) -> Layer:
    """One of its modules applied to the layer; with `bypass` the update runs beside it instead of
    in its weight."""
    from lycoris import modules

    spec, options = setting.spec, setting.spec.options
    kinds = {
        "LoRA": modules.LoConModule,
        "DoRA": modules.LoConModule,
        "LoHa": modules.LohaModule,
        "LoKr": modules.LokrModule,
        "OFT": modules.DiagOFTModule,
        "BOFT": modules.ButterflyOFTModule,
        "GLoRA": modules.GLoRAModule,
        "Full": modules.FullModule,
    }
    if spec.algorithm not in kinds:
        raise Unsupported("LyCORIS has none")
    if spec.algorithm == "DoRA" and bypass:
        raise Unsupported("LyCORIS' bypass of DoRA leaves the magnitude out: it is LoRA")
    if spec.algorithm == "BOFT" and options.stages > 0:
        raise Unsupported("LyCORIS' BOFT has all its stages always; see BOFT all")
    more: dict[str, Any] = {"DoRA": {"weight_decompose": True}}.get(spec.algorithm, {})
    if spec.algorithm == "LoKr":
        more = {"factor": options.factor, "full_matrix": options.full_matrix}
    rotates = spec.algorithm in ("OFT", "BOFT")
    size = options.block_size if rotates else spec.rank
    layer: Any = same_weights(base)["layer"]
    kind = kinds[spec.algorithm]
    adapter = kind(
        "layer", layer, 1.0, lora_dim=size, alpha=0 if rotates else size, bypass_mode=bypass, **more
    )
    adapter.apply_to()
    both = nn.ModuleDict({"adapter": adapter, "layer": layer})
    both.forward = layer.forward  # type: ignore[method-assign]
    return Layer(both, [parameter for parameter in both.parameters() if parameter.requires_grad])


PEERS: dict[str, Callable[[Setting, nn.Module], Layer]] = {
    "PEFT": peft,
    "LyCORIS rebuild": lambda setting, base: lycoris(setting, base, False),
    "LyCORIS bypass": lambda setting, base: lycoris(setting, base, True),
}
