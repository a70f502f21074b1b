"""`convert`: writes an adapter in another program's format, or as another algorithm."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from adapter_files import convert
from common.errors import AdapterError, error_list
from lora_algos.detection import algorithm_name, rank_of
from lora_algos.tensors import LayerTensors
from tools.adapter_file import AdapterFile, delta_of
from tools.base_model import BaseModel
from tools.options import ConvertOptions
from tools.rewrite import rewrite
from tools.tables import NO_VALUE, BlockTable


def run(options: ConvertOptions) -> int:
    """Convert an adapter; return the exit code."""
    model = BaseModel(options.model_config(options.model))
    adapter = AdapterFile(Path(options.file), model, options.drop)
    adapter.check_keys()
    table = BlockTable(has_errors=options.convert == "lora-svd")
    layers = convert_layers(adapter, options, table)
    rewrite(options, adapter, options.format, layers, table)
    return 0


def convert_layers(
    adapter: AdapterFile, options: ConvertOptions, table: BlockTable
) -> Iterator[tuple[str, LayerTensors]]:
    """Yield each converted layer, and add it to the table.

    Raises AdapterError naming all layers that cannot be converted."""
    errors = []
    for layer in adapter.layers:
        try:
            tensors, weight = adapter.read(layer)
            converted_tensors, relative_error = convert_layer(tensors, weight, options)
            norm = float(delta_of(tensors, weight).norm())
        except AdapterError as error:
            errors.append(f"{layer}: {error}")
            continue
        attributes = {
            "algorithm": algorithm_name(converted_tensors),
            "rank": rank_of(converted_tensors) or NO_VALUE,
        }
        table.add(layer, attributes, norm, relative_error)
        if not errors:
            yield layer, converted_tensors
    if errors:
        raise AdapterError(error_list(f"{options.file} cannot be converted", errors))


def convert_layer(
    tensors: LayerTensors, weight: Tensor, options: ConvertOptions
) -> tuple[LayerTensors, float]:
    """Return a layer's tensors as --convert requests, and ||error|| / ||update||."""
    if options.convert == "full":
        return convert.full_tensors(tensors, weight), 0.0
    if options.convert == "lora-exact":
        return convert.exact_lora(tensors, weight.shape), 0.0
    if options.convert == "lora-svd":
        assert options.rank is not None  # checked by options.errors
        return convert.nearest_lora(tensors, weight, options.rank)
    return tensors, 0.0
