"""Writes an adapter layer by layer in a file format. The result is read back and compared before it
is renamed into place."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from adapter_files import files, get_writer
from adapter_files.kohya_metadata import network_metadata
from adapter_files.row_slices import portable
from adapter_files.safetensors_stream import EMPTY_HASHES, TensorInfo, write_tensors
from adapter_files.verification import MAX_ERROR, verify_content
from adapter_files.writers import (
    FORMATS_WITH_SHARED_ALPHA,
    FileContent,
    content_metadata_keys,
    shared_alpha,
    storage_dtype,
    with_shared_alpha,
)
from common.atomic import WriteError, new_file, new_folder
from common.dtypes import DTYPES, dtype_name
from common.errors import AdapterError
from lora_algos.tensors import LayerTensors
from lora_algos.traits import Layers
from tools.adapter_file import AdapterFile
from tools.argument_checks import PEFT_CONFIG
from tools.base_model import BaseModel
from tools.options import RewritingOptions
from tools.tables import BlockTable
from tools.unknown_model import UnknownModel

REPLACED_METADATA = (
    *EMPTY_HASHES,
    "modelspec.hash_sha256",
    "adapter_config",
    "lora_adapter_metadata",
    "format",
)
"""Keys of metadata that describe the input file, and not the adapter in it."""
LayerStream = Iterable[tuple[str, LayerTensors]]
"""Layers with their tensors, computed one at a time."""


class ToolError(RuntimeError):
    """A valid request that failed. The program ends with exit code 1."""


@dataclass(frozen=True)
class Target:
    """A file to write: the names of its layers, its format, its dtype and its metadata."""

    model: BaseModel | UnknownModel
    file_format: str
    dtype: torch.dtype
    metadata: dict[str, str]
    """Metadata besides that of the format."""


class Spool:
    """Layers in a temporary folder, because a file needs the shapes of all tensors before the first
    tensor."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.layers: dict[str, LayerTensors] = {}
        """Layer -> its tensors without values, except alphas."""

    def put(self, layer: str, tensors: LayerTensors) -> None:
        """Write a layer. Raises WriteError."""
        self.layers[layer] = files.shapes_only(tensors)
        contiguous_tensors = {}
        for name, tensor in tensors.items():
            contiguous_tensors[name] = tensor.contiguous()
        path = self._path(layer)
        try:
            path.write_bytes(files.to_bytes(contiguous_tensors, {}))
        except OSError as error:
            raise WriteError(path, error) from error

    def get(self, layer: str) -> LayerTensors:
        """Read a layer."""
        tensors = {}
        with safe_open(self._path(layer), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensors[name] = file.get_tensor(name).clone()
        return tensors

    def _path(self, layer: str) -> Path:
        number = list(self.layers).index(layer)
        return self.folder / f"{number}.safetensors"


def rewrite(
    options: RewritingOptions,
    adapter: AdapterFile,
    file_format: str,
    layers: LayerStream,
    table: BlockTable,
) -> None:
    """Write an adapter again from `layers`, then print the table of its layers."""
    dtype = written_dtype(adapter) if options.dtype is None else DTYPES[options.dtype]
    target = Target(adapter.model, file_format, dtype, adapter.metadata)
    rounding = write_adapter(Path(options.out), layers, target)
    print(table)
    print_result(options.out, target, rounding, adapter.dropped_keys)


def written_dtype(adapter: AdapterFile) -> torch.dtype:
    """Return the most frequent dtype of an adapter that can be written; fp32 if none can."""
    for dtype in adapter.dtype_counts():
        if dtype in DTYPES.values():
            return dtype
    return torch.float32


def print_result(
    out: str, target: Target, rounding: float, dropped_keys: Sequence[str] = ()
) -> None:
    """Print the file that was written."""
    if dropped_keys:
        print(f"left out by --drop: {len(dropped_keys)} keys")
    message = f"wrote {out}: {target.file_format}, {dtype_name(target.dtype)}"
    if rounding:
        message += f"; rounding changes the update of a layer by at most {rounding:.1e} of its norm"
    print(message)


def write_adapter(out: Path, layers: LayerStream, target: Target) -> float:
    """Write an adapter; return the largest ||rounding error|| / ||update|| of a layer.

    Raises AdapterError if the format cannot hold the layers, and ToolError if the file would be a
    different function."""
    with temporary_spool(out) as spool:
        for layer, tensors in layers:
            spool.put(layer, portable(tensors))
        if not spool.layers:
            raise ToolError("there is nothing to write, because the update of every layer is zero")
        weights = {layer: target.model.empty_weight(layer) for layer in spool.layers}
        plan = get_writer(target.file_format)(spool.layers, weights, target.model.names)
        plan.metadata = file_metadata(target, spool, plan)
        rounding_errors: list[float] = []
        content = verified_tensors(spool, target, plan, rounding_errors)
        write_content(out, plan, target.dtype, content)
    return max(rounding_errors)


def file_metadata(target: Target, spool: Spool, plan: FileContent) -> dict[str, str]:
    """Return the metadata of a file, in which everything about the adapter and the file is
    replaced."""
    metadata = {}
    dropped_keys = {*REPLACED_METADATA, *content_metadata_keys()}
    for key, value in target.metadata.items():
        if key not in dropped_keys:
            metadata[key] = value
    metadata |= network_metadata(spool.layers)
    metadata |= plan.metadata
    metadata |= EMPTY_HASHES
    if plan.config is not None:
        metadata["format"] = "pt"
    return metadata


def write_content(
    out: Path, plan: FileContent, dtype: torch.dtype, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a file, or a folder for PEFT. `plan`: tensors without values."""
    infos = {}
    for key, tensor in plan.tensors.items():
        shape = tuple(tensor.shape)
        infos[key] = TensorInfo(storage_dtype(key, dtype), shape)
    if plan.config is None:
        with new_file(out) as partial_path:
            write_tensors(partial_path, infos, tensors, plan.metadata)
        return
    with new_folder(out) as partial_path:
        tensor_file = partial_path / "adapter_model.safetensors"
        write_tensors(tensor_file, infos, tensors, plan.metadata)
        config_file = partial_path / PEFT_CONFIG
        config_file.write_text(json.dumps(plan.config, indent=1), encoding="utf-8")


@contextmanager
def temporary_spool(out: Path) -> Iterator[Spool]:
    """Yield a spool next to `out`, which is removed at the end. Spools of killed runs are removed
    too."""
    out = Path(os.path.abspath(out))  # "." has no name
    folder = out.with_name(f".{out.name}.{os.getpid()}.spool")
    try:
        remove_old_spools(out)
        folder.mkdir()
        yield Spool(folder)
    except OSError as error:
        raise WriteError(out, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_old_spools(out: Path) -> None:
    """Remove the spools next to `out` whose processes have ended."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.(\d{{1,9}})\.spool")
    for path in out.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        process_id = int(match[1])
        if process_id == os.getpid() or not is_running(process_id):
            shutil.rmtree(path, ignore_errors=True)


def is_running(process_id: int) -> bool:
    """Return whether there is a process with this id."""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # the process of another user
    return True


def verified_tensors(
    spool: Spool, target: Target, plan: FileContent, rounding_errors: list[float]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file, layer by layer. Each layer is loaded again with the general
    importer and compared.

    `rounding_errors`: gets the error of each layer. Raises ToolError."""
    alpha = None
    if target.file_format in FORMATS_WITH_SHARED_ALPHA:
        alpha = shared_alpha(spool.layers)
    for group in target.model.names.groups(spool.layers):
        layers = {layer: spool.get(layer) for layer in group}
        weights = {layer: target.model.weight(layer) for layer in group}
        exact = encode_layers(layers, weights, target, alpha)
        error = update_error(exact, plan, layers, weights, target)
        if not error <= MAX_ERROR:
            names = ", ".join(group)
            raise ToolError(
                f"{names}: in the format {target.file_format} its update would differ by "
                f"{error:.1e}"
            )
        rounded = round_tensors(exact, target.dtype)
        error = update_error(rounded, plan, layers, weights, target)
        rounding_errors.append(error)
        yield from rounded.items()


def encode_layers(
    layers: Layers, weights: LayerTensors, target: Target, alpha: float | None
) -> dict[str, Tensor]:
    """Return the tensors of a few layers by their keys in the file, in fp32.

    `alpha`: of all layers of the file. A writer sees only a few layers here, and would take the
    alpha of the first of them."""
    scaled_layers = dict(layers)
    if alpha is not None:
        for layer, tensors in layers.items():
            scaled_layers[layer] = with_shared_alpha(tensors, alpha)
    writer = get_writer(target.file_format)
    return writer(scaled_layers, weights, target.model.names).tensors


def round_tensors(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert tensors to the dtype of the file. Raises ToolError naming those that are too
    large."""
    rounded = {}
    infinite_keys = []
    for key, tensor in tensors.items():
        rounded[key] = tensor.to(storage_dtype(key, dtype))
        if not rounded[key].isfinite().all():
            infinite_keys.append(key)
    if infinite_keys:
        raise ToolError(
            f"{', '.join(infinite_keys)}: too large for {dtype}. Choose --dtype bf16 or fp32"
        )
    return rounded


def update_error(
    tensors: dict[str, Tensor],
    plan: FileContent,
    layers: Layers,
    weights: LayerTensors,
    target: Target,
) -> float:
    """Return the largest ||difference|| / ||update|| of a layer, between the tensors of a file
    as the importer reads them and `layers`."""
    content = FileContent(tensors, plan.metadata, plan.config)
    base_weights = {}
    for name, weight in weights.items():
        if weight.is_meta:
            # an update that depends on an unknown weight is not compared, but its norm is
            weight = torch.zeros_like(weight, device="cpu")
        base_weights[name] = weight
    module = target.model.module_with(base_weights)
    try:
        return verify_content(content, layers, module, target.model.names)
    except AdapterError as error:
        raise ToolError(str(error)) from error
