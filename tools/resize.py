"""`resize`: writes each layer of an adapter as the nearest LoRA of a rank, or of the smallest rank
that keeps enough energy."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from adapter_files import convert
from adapter_files.normalize import bias_of
from common.errors import AdapterError, error_list
from lora_algos.detection import detect_algorithm, layer_delta, rank_of
from lora_algos.tensors import LayerTensors
from lora_algos.traits import TensorTraits
from tools.adapter_file import AdapterFile
from tools.base_model import BaseModel
from tools.options import ResizeOptions
from tools.rewrite import rewrite
from tools.tables import NO_VALUE, BlockTable
from tools.unknown_model import UnknownModel


def run(options: ResizeOptions) -> int:
    """Resize an adapter; return the exit code."""
    model: BaseModel | UnknownModel = UnknownModel()
    if options.model:
        model = BaseModel(options.model_config(options.model))
    adapter = AdapterFile(Path(options.file), model, options.drop)
    adapter.check_keys()
    table = BlockTable()
    layers = resize_layers(adapter, options, table)
    rewrite(options, adapter, adapter.file_format(), layers, table)
    return 0


def resize_layers(
    adapter: AdapterFile, options: ResizeOptions, table: BlockTable
) -> Iterator[tuple[str, LayerTensors]]:
    """Yield each layer as a LoRA, and add it to the table. Layers that are not matrices are not
    changed.

    Raises AdapterError naming all layers that need the base model."""
    errors = []
    for layer in adapter.layers:
        try:
            tensors, weight = adapter.read(layer)
            algorithm = detect_algorithm(tensors)
            if weight.is_meta and needs_model(algorithm.traits):
                raise AdapterError(f"{algorithm.name} needs --model")
        except AdapterError as error:
            errors.append(f"{layer}: {error}")
            continue
        if errors:
            continue
        if weight.ndim < 2:
            attributes = {"algorithm": algorithm.name, "rank": NO_VALUE, "was": NO_VALUE}
            table.add(layer, attributes, float(layer_delta(tensors, weight).norm()))
            yield layer, tensors
            continue
        yield layer, resize_layer(layer, tensors, weight, options, table)
    if errors:
        raise AdapterError(error_list(f"{options.file} cannot be resized", errors))


def needs_model(traits: TensorTraits) -> bool:
    """Return whether the tensors alone do not show the update, or the shape of a convolution."""
    return traits.needs_base_weight or not traits.has_exact_weight_shape


def resize_layer(
    layer: str, tensors: LayerTensors, weight: Tensor, options: ResizeOptions, table: BlockTable
) -> LayerTensors:
    """Return a layer as a LoRA, and add it to the table."""
    svd = convert.update_svd(tensors, weight)
    singular_values = svd[1]
    rank = new_rank(singular_values, options)
    lora, relative_error = convert.truncated_lora(svd, rank, weight.shape)
    attributes = {
        "algorithm": detect_algorithm(tensors).name,
        "rank": lora["lora_down.weight"].shape[0],
        "was": rank_of(tensors) or NO_VALUE,
    }
    table.add(layer, attributes, float(singular_values.norm()), relative_error)
    return {**lora, **bias_of(tensors)}


def new_rank(singular_values: Tensor, options: ResizeOptions) -> int:
    """Return the rank that --rank or --energy requests."""
    if options.energy is None:
        assert options.rank is not None  # checked by options.errors
        return options.rank
    return convert.rank_for_energy(singular_values, options.energy)
