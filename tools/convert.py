"""`convert`: an adapter file in another program's format, or as another algorithm."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from adapter_files import convert
from common.errors import AdapterError, error_list
from lora_algos.detection import algorithm_name, rank_of
from tools.adapter_file import AdapterFile, LayerTensors, delta_of
from tools.base_model import Model
from tools.options import Convert
from tools.rewrite import rewrite
from tools.tables import Report


def run(options: Convert) -> int:
    """Converts. Returns the exit code."""
    model = Model(options.model_config(options.model))
    adapter = AdapterFile(Path(options.file), model, options.drop)
    adapter.require_all_known()
    report = Report(with_error=options.convert == "lora-svd")
    return rewrite(options, adapter, options.format, converted(adapter, options, report), report)


def converted(
    adapter: AdapterFile, options: Convert, report: Report
) -> Iterator[tuple[str, LayerTensors]]:
    """Each layer as `--convert` asks; AdapterError naming all that cannot be so."""
    faults = []
    for layer in adapter.layers:
        try:
            tensors, weight = adapter.read(layer)
            result, error = as_asked(tensors, weight, options)
            delta = delta_of(tensors, weight)
        except AdapterError as fault:
            faults.append(f"{layer}: {fault}")
            continue
        report.add(
            layer,
            {"algorithm": algorithm_name(result), "rank": rank_of(result) or "-"},
            float(delta.norm()),
            error,
        )
        if not faults:
            yield layer, result
    if faults:
        raise AdapterError(error_list(f"{options.file} cannot be converted", faults))


def as_asked(tensors: LayerTensors, weight: Tensor, options: Convert) -> tuple[LayerTensors, float]:
    """A layer's tensors converted, and ||error|| / ||update||."""
    if options.convert == "full":
        return convert.full_tensors(tensors, weight), 0.0
    if options.convert == "lora-exact":
        return convert.exact_lora(tensors, weight.shape), 0.0
    if options.convert == "lora-svd":
        assert options.rank is not None  # options.faults refuses it
        return convert.nearest_lora(tensors, weight, options.rank)
    return tensors, 0.0
