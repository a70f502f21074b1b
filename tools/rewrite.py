"""Writes an adapter layer by layer in one of the file formats, checked before it takes its name."""

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
from common.errors import AdapterError
from lora_algos.traits import Layers
from tools.adapter_file import AdapterFile, LayerTensors
from tools.base_model import Model
from tools.options import Convert, Resize
from tools.tables import Report
from tools.unknown_model import UnknownModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NOT_KEPT = (
    *EMPTY_HASHES,
    "modelspec.hash_sha256",
    "adapter_config",
    "lora_adapter_metadata",
    "format",
)
LayersInTurn = Iterable[tuple[str, LayerTensors]]


class ToolError(RuntimeError):
    """Something could not be done, though nothing is wrong with what was asked for."""


@dataclass(frozen=True)
class Target:
    """What is written: which names, which format, in which dtype."""

    model: Model | UnknownModel
    file_format: str
    dtype: torch.dtype
    metadata: dict[str, str]
    """What goes into the file besides the format's own."""


class Spool:
    """Layers on the disk, beside the file that is to be made of them: only when all are there are their shapes
    known."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.layers: dict[str, LayerTensors] = {}
        """Layer -> its tensors without values; but alphas have theirs."""

    def put(self, layer: str, tensors: LayerTensors) -> None:
        self.layers[layer] = files.shapes_only(tensors)
        try:
            self._path(layer).write_bytes(
                files.to_bytes({key: t.contiguous() for key, t in tensors.items()}, {})
            )
        except OSError as error:
            raise WriteError(self._path(layer), error) from error

    def get(self, layer: str) -> LayerTensors:
        with safe_open(self._path(layer), framework="pt") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118

    def _path(self, layer: str) -> Path:
        return self.folder / f"{list(self.layers).index(layer)}.safetensors"


def rewrite(
    options: Convert | Resize,
    adapter: AdapterFile,
    file_format: str,
    layers: LayersInTurn,
    report: Report,
) -> int:
    """Writes an adapter file anew, as `layers` make it, and says so. Returns the exit code."""
    dtype = DTYPES[options.dtype] if options.dtype else dtype_of(adapter)
    target = Target(adapter.model, file_format, dtype, adapter.metadata)
    rounding = write_adapter(Path(options.out), layers, target)
    print(report)
    print(written(options.out, target, rounding, adapter.dropped))
    return 0


def write_adapter(out: Path, layers: LayersInTurn, target: Target) -> float:
    """Writes the layers, which are asked for one by one. Returns the largest ||rounding|| /
    ||update|| of a layer.

    Raises AdapterError if the format cannot hold them, and ToolError if what it holds is another
    function.
    """
    with spool_beside(out) as spool:
        for layer, tensors in layers:
            spool.put(layer, portable(tensors))
        if not spool.layers:
            raise ToolError("there is nothing to write: no layer changes")
        weights = {layer: target.model.empty(layer) for layer in spool.layers}
        plan = get_writer(target.file_format)(spool.layers, weights, target.model.names)
        metadata = {**described(target.metadata, spool), **plan.metadata, **EMPTY_HASHES}
        if plan.config is not None:
            metadata["format"] = "pt"
        infos = {
            key: TensorInfo(storage_dtype(key, target.dtype), tuple(t.shape))
            for key, t in plan.tensors.items()
        }
        errors: list[float] = []
        content = contents(spool, target, FileContent({}, metadata, plan.config), errors)
        if plan.config is None:
            with new_file(out) as beside:
                write_tensors(beside, infos, content, metadata)
        else:
            with new_folder(out) as beside:
                write_tensors(beside / "adapter_model.safetensors", infos, content, metadata)
                text = json.dumps(plan.config, indent=1)
                (beside / "adapter_config.json").write_text(text, encoding="utf-8")
    return max(errors)


@contextmanager
def spool_beside(out: Path) -> Iterator[Spool]:
    """A spool that is gone in the end; those of runs that were killed go first."""
    out = Path(os.path.abspath(out))  # which has a name, as . has not
    folder = out.with_name(f".{out.name}.{os.getpid()}.spool")
    try:
        for path in out.parent.iterdir():
            if found := re.fullmatch(rf"\.{re.escape(out.name)}\.(\d{{1,9}})\.spool", path.name):
                remove_spool(path, int(found[1]))
        folder.mkdir()
        yield Spool(folder)
    except OSError as error:
        raise WriteError(out, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_spool(folder: Path, process: int) -> None:
    """Removes a spool unless its process is another that is still there."""
    try:
        if process != os.getpid():
            os.kill(process, 0)  # asks whether there is one
            return
    except ProcessLookupError:
        pass
    except PermissionError:
        return
    shutil.rmtree(folder, ignore_errors=True)


def contents(
    spool: Spool, target: Target, plan: FileContent, errors: list[float]
) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors, of one layer at a time, each layer read back as a stranger would and
    compared."""
    alpha = shared_alpha(spool.layers)
    one_for_all = target.file_format in FORMATS_WITH_SHARED_ALPHA
    for group in target.model.names.groups(spool.layers):
        layers = {layer: spool.get(layer) for layer in group}
        weights = {layer: target.model.weight(layer) for layer in group}
        # these formats have one alpha in all layers, and a writer sees a few layers here
        given = {
            name: with_shared_alpha(tensors, alpha) if one_for_all else tensors
            for name, tensors in layers.items()
        }
        written = get_writer(target.file_format)(given, weights, target.model.names).tensors
        error = difference(
            FileContent(written, plan.metadata, plan.config), layers, weights, target
        )
        if not error <= MAX_ERROR:
            raise ToolError(
                f"{', '.join(group)}: in the format {target.file_format} its update would differ by {error:.1e}"
            )
        rounded = {
            key: tensor.to(storage_dtype(key, target.dtype)) for key, tensor in written.items()
        }
        overflown = [key for key, tensor in rounded.items() if not tensor.isfinite().all()]
        if overflown:
            raise ToolError(
                f"{', '.join(overflown)}: too large for {target.dtype}. Choose --dtype bf16 or fp32"
            )
        errors.append(
            difference(FileContent(rounded, plan.metadata, plan.config), layers, weights, target)
        )
        yield from rounded.items()


def difference(
    content: FileContent, layers: Layers, weights: dict[str, Tensor], target: Target
) -> float:
    """||what a reader of `content` makes of a few layers - what `layers` make of them|| /
    ||update||, of the worst."""
    # of a base that is not known the update is no function, but norms are compared
    known = {
        name: torch.zeros_like(w, device="cpu") if w.is_meta else w for name, w in weights.items()
    }
    try:
        return verify_content(content, layers, target.model.alone(known), target.model.names)
    except AdapterError as error:
        raise ToolError(str(error)) from error


def described(metadata: dict[str, str], spool: Spool) -> dict[str, str]:
    """Metadata with what it says of the adapter and of the file made true again."""
    dropped_keys = {*NOT_KEPT, *content_metadata_keys()}
    return {
        **{key: value for key, value in metadata.items() if key not in dropped_keys},
        **network_metadata(spool.layers),
    }


def written(out: str, target: Target, rounding: float, dropped: Sequence[str] = ()) -> str:
    """What to say of a file that was written."""
    left_out = f"left out by --drop: {len(dropped)} keys\n" if dropped else ""
    dtype = str(target.dtype).removeprefix("torch.")
    by = f", rounding changes a layer's update by {rounding:.1e} of it at most" if rounding else ""
    return f"{left_out}written {out}: {target.file_format}, {dtype}{by}"


def dtype_of(adapter: AdapterFile) -> torch.dtype:
    """The dtype of most of an adapter's tensors, if one can be written, else fp32."""
    return next((dtype for dtype in adapter.dtypes() if dtype in DTYPES.values()), torch.float32)
