"""Names of transformers' layers in the original models' code, by a table in the family's file.

A table is a list of rules. The first rule applies whose prefix matches the diffusers name and that
has the remainder of the name. Names without a rule are the same in both.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import nn

from models.checkpoint_files import denoiser_prefix
from models.layer_names.names import (
    LayerNames,
    OriginalLayer,
    RowSlice,
    layers_with_weight,
)

NO_LAYER = "(?!)"
"""Regular expression that matches nothing."""


@dataclass(frozen=True)
class Original:
    """A name in the original model, as a rule gives it."""

    name: str


@dataclass(frozen=True)
class Slice(Original):
    """Part of a fused weight: the layer's rows come at this position among the fused layers."""

    position: int


@dataclass(frozen=True)
class SwappedHalves(Original):
    """A modulation whose original has shift and scale in the opposite order.

    Only if the layer computes nothing else, that is if it has twice as many rows as columns."""


@dataclass(frozen=True)
class Rule:
    """Original names of the layers whose diffusers names begin alike."""

    prefix: str
    """Regular expression for the beginning of the diffusers name."""
    original_prefix: str
    """The beginning of the original name; \\1, \\2 ... are groups of `prefix`."""
    names: Mapping[str, str | Original]
    """The remainder of the diffusers name -> the remainder of the original name."""


NameTable = tuple[Rule, ...]
Names = dict[str, str | Original]


def fused_qkv(
    prefix: str, fused_name: str, layers: tuple[str, str, str] = ("to_q", "to_k", "to_v")
) -> Names:
    """Return the names of three projections that the original holds as one weight."""
    names: Names = {}
    for position, layer in enumerate(layers):
        names[prefix + layer] = Slice(fused_name, position)
    return names


def translate(name: str, table: NameTable) -> Original:
    """Return the original name of a layer or of a parameter that belongs to no layer."""
    for rule in table:
        match = re.match(rule.prefix, name)
        if match is None:
            continue
        remainder = name[match.end() :]
        if remainder not in rule.names:
            continue
        original = rule.names[remainder]
        if isinstance(original, str):
            original = Original(original)
        return replace(original, name=match.expand(rule.original_prefix) + original.name)
    return Original(name)


@dataclass(frozen=True, kw_only=True)
class TableNames(LayerNames):
    """Names by a table. The defaults are those of most transformers."""

    table: NameTable = ()
    original_only: str = NO_LAYER
    """Regular expression for the layers that ComfyUI does not know by diffusers' name."""
    file_formats: tuple[str, ...] = ("diffusers", "comfyui")
    diffusers_prefix: str = "transformer."

    def original(self, denoiser: nn.Module) -> dict[str, OriginalLayer]:
        originals: dict[str, OriginalLayer] = {}
        fused: dict[str, dict[int, str]] = {}
        layers = layers_with_weight(denoiser)
        for layer, module in layers.items():
            original = translate(layer, self.table)
            if isinstance(original, Slice):
                fused.setdefault(original.name, {})[original.position] = layer
            originals[layer] = OriginalLayer(
                original.name,
                swapped_halves=isinstance(original, SwappedHalves) and is_modulation(module),
                known_by_diffusers_name=not re.fullmatch(self.original_only, layer),
            )
        for positions in fused.values():
            first = 0
            for _, layer in sorted(positions.items()):
                count = layers[layer].weight.shape[0]
                originals[layer] = replace(originals[layer], row_slice=RowSlice(first, count))
                first += count
        return originals

    def file_keys(self, denoiser: nn.Module, keys: Collection[str]) -> dict[str, str]:
        originals = self.original(denoiser)
        prefix = denoiser_prefix(keys)
        file_keys = {}
        for name, _ in denoiser.named_parameters():
            layer, _, tensor = name.rpartition(".")
            if layer in originals:
                original_name = f"{originals[layer].name}.{tensor}"
            else:
                original_name = translate(name, self.table).name
            file_keys[name] = existing_key(prefix + original_name, keys)
        return file_keys


def is_modulation(layer: nn.Linear) -> bool:
    """Return whether a layer computes scale and shift and nothing else."""
    num_rows, num_columns = layer.weight.shape
    return num_rows == 2 * num_columns


def existing_key(key: str, keys: Collection[str]) -> str:
    """Return a key, or the other spelling of a norm's weight if the file has that one.

    ComfyUI calls it `weight`, the files of Black Forest Labs call it `scale`."""
    other_key = re.sub("weight$", "scale", key)
    if key not in keys and other_key in keys:
        return other_key
    return key
