"""`resize`: every layer of an adapter as the nearest LoRA of a rank, or of the least rank that
keeps enough."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from adapter_files import convert
from adapter_files.normalize import bias_of
from common.errors import AdapterError, error_list
from lora_algos import get_algorithm
from lora_algos.detection import algorithm_name, layer_delta, rank_of
from tools.adapter_file import AdapterFile, LayerTensors
from tools.base_model import Model
from tools.options import Resize
from tools.rewrite import rewrite
from tools.tables import Report
from tools.unknown_model import UnknownModel


def run(options: Resize) -> int:
    """Resizes. Returns the exit code."""
    model = Model(options.model_config(options.model)) if options.model else UnknownModel()
    adapter = AdapterFile(Path(options.file), model, options.drop)
    adapter.require_all_known()
    report = Report()
    return rewrite(
        options, adapter, adapter.file_format(), resized(adapter, options, report), report
    )


def resized(
    adapter: AdapterFile, options: Resize, report: Report
) -> Iterator[tuple[str, LayerTensors]]:
    """Each layer as a LoRA; what is no matrix stays as it is. AdapterError naming all that need the
    base model."""
    faults = []
    for layer in adapter.layers:
        try:
            tensors, weight = adapter.read(layer)
            algorithm = algorithm_name(tensors)
            traits = get_algorithm(algorithm).traits
            needs_model = traits.needs_base_weight or not traits.has_exact_weight_shape
            if weight.is_meta and needs_model:
                raise AdapterError(f"{algorithm} needs --model")
        except AdapterError as fault:
            faults.append(f"{layer}: {fault}")
            continue
        if faults:
            continue
        if weight.ndim < 2:
            report.add(
                layer,
                {"algorithm": algorithm, "rank": "-", "was": "-"},
                float(layer_delta(tensors, weight).norm()),
            )
            yield layer, tensors
            continue
        parts = convert.update_svd(tensors, weight)
        lora, error = convert.truncated_lora(parts, wanted_rank(parts[1], options), weight.shape)
        rank = lora["lora_down.weight"].shape[0]
        words = {"algorithm": algorithm, "rank": rank, "was": rank_of(tensors) or "-"}
        report.add(layer, words, float(parts[1].norm()), error)
        yield layer, {**lora, **bias_of(tensors)}
    if faults:
        raise AdapterError(error_list(f"{options.file} cannot be resized", faults))


def wanted_rank(singular_values: Tensor, options: Resize) -> int:
    """The rank that is asked for."""
    if options.energy is None:
        assert options.rank is not None  # options.faults refuses it
        return options.rank
    return convert.rank_for_energy(singular_values, options.energy)
