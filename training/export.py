"""The files of a finished run: the adapter with its metadata, losses, previews, and the merged base
model."""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from adapter_files import convert, files
from adapter_files.safetensors_stream import addnet_hashes, training_metadata
from adapter_files.verification import MAX_ERROR, verify_content
from adapter_files.writers import FileContent, preferred_format
from common.atomic import WriteError, new_folder, write_file
from common.errors import AdapterError, error_list
from lora_algos.adapted_model import AdaptedModel
from lora_algos.full import DIFF
from lora_algos.traits import Layers
from models.base import ModelFamily
from objectives.processes import sample_as_trained
from training.build import on_one_process
from training.config import TrainConfig
from training.distributed.engine import is_sharded
from training.metadata import ExportFacts, file_metadata
from training.parts import RunParts
from training.preview import Preview, PreviewRenderer, Weights
from training.reporting.image_grid import grid_png
from training.reporting.loss_files import loss_json, loss_png
from training.reporting.trackers import log_images
from training.services import RunServices
from training.train_state import TrainState

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class ExportJob:
    """Weights to export."""

    weights: Weights
    step: int
    description: str
    """Of the weights, such as "after step 400"."""
    suffix: str = ""
    """Appended to the name of the files."""


def export_jobs(config: TrainConfig, state: TrainState, services: RunServices) -> list[ExportJob]:
    """Return the adapter's weights, and with an EMA the other ones of EMA and trained weights.
    Collective."""
    kind = config.ema.evaluate_with if config.ema.decay else "raw"
    if config.export.weights == "best" and state.best is not None:
        losses = {entry["step"]: entry["loss"] for entry in state.history.validation}
        description = (
            f"{average_name(config, kind)}after step {state.best.step} of {state.step}, which has the lowest "
            f"validation loss, {losses[state.best.step]:.5f}"
        )
        return [ExportJob(state.best.weights, state.best.step, description)]
    if config.export.weights == "best":
        services.reporter.say(
            f"no validation loss was finite: the weights after step {state.step} are exported"
        )
    kinds = ["raw", "ema"] if config.ema.decay else ["raw"]
    jobs = []
    for other_kind in sorted(kinds, key=lambda name: name != kind):
        weights = services.ema.evaluation_state(other_kind)
        description = f"{average_name(config, other_kind)}after step {state.step}"
        suffix = "" if other_kind == kind else f".{other_kind}"
        jobs.append(ExportJob(weights, state.step, description, suffix))
    return jobs


def average_name(config: TrainConfig, kind: str) -> str:
    return f"EMA of decay {config.ema.decay:g}, " if kind == "ema" else ""


def check_export(config: TrainConfig, parts: RunParts) -> None:
    """Raise AdapterError if a requested file format cannot hold the adapter. WHEN: before training."""
    if config.export.convert == "lora-svd":
        return  # the file will hold a LoRA, which all formats support
    model = parts.adapted.model
    if config.export.convert == "full":
        layers: Layers = {
            name: {DIFF: weight} for name, weight in files.base_weights(model).items()
        }
    else:
        layers = converted_layers(config, parts.adapted)
    layers = {name: files.shapes_only(tensors) for name, tensors in layers.items()}
    for file_format in config.export.formats or (default_format(parts, layers),):
        files.build_content(layers, model, parts.names, file_format)


def default_format(parts: RunParts, layers: Layers) -> str:
    """Return the format that most programs load for this model and adapter."""
    return preferred_format(parts.family.file_formats, layers, parts.names)


class RunExport:
    """Writes the files of a finished run. Only `prepare` is collective; the other methods run on
    the main process."""

    def __init__(
        self, config: TrainConfig, parts: RunParts, services: RunServices, state: TrainState
    ):
        self.config, self.parts, self.services, self.state = config, parts, services, state
        self.total_steps = parts.previous_steps + state.step
        self.jobs: list[ExportJob] = []
        self.preview: Preview | None = None

    def prepare(self, initial_weights: dict[str, Tensor] | None) -> None:
        """Do everything that needs all processes. Afterwards the other processes may end.
        Collective.

        `initial_weights`: weights before training, if a preview is drawn."""
        self.jobs = export_jobs(self.config, self.state, self.services)
        if initial_weights is not None:
            renderer = PreviewRenderer(self.config, self.parts, self.services)
            self.preview = renderer.render(
                {"before": initial_weights, "after": self.jobs[0].weights}
            )

    def write(self) -> list[Path]:
        """Write the adapter, the loss files, the preview and the merged model; return their paths."""
        config, folder = self.config, self.services.folder
        parts = (
            on_one_process(config, self.parts)
            if is_sharded(self.services.accelerator)
            else self.parts
        )
        paths: list[Path] = []
        for job in reversed(
            self.jobs
        ):  # the adapter last: it stays in the model, for the merged model
            parts.adapted.load_state_dict(job.weights)
            paths += write_adapter(config, parts, self._facts(job))
        loss_files: dict[str, str | bytes] = {
            "loss.json": loss_json(self.state.history, self.total_steps),
            "loss.png": loss_png(self.state.history),
        }
        for name, content in loss_files.items():
            write_file(folder / name, content)
            paths.append(folder / name)
        if config.export.merged_model:
            paths.append(write_merged_model(config, parts.family, parts.adapted))
        if self.preview is not None:
            path = folder / "preview.png"
            write_file(path, grid_png(self.preview.images, self.preview.prompts))
            images = {f"preview/{label}": array for label, array in self.preview.images.items()}
            log_images(self.services.accelerator, images, self.total_steps)
            paths.append(path)
        return paths

    def _facts(self, job: ExportJob) -> ExportFacts:
        return ExportFacts(
            name=self.config.export.name + job.suffix,
            total_steps=self.parts.previous_steps + job.step,
            total_batch_size=self.config.batch_size * self.state.micro_batches_per_step,
            started_at=self.state.started_at,
            weights=job.description,
        )

    def outdated_files(self, paths: list[Path]) -> list[Path]:
        """Return files of an earlier run, which exported other weights, that this run did not
        replace."""
        name = self.config.export.name
        candidates = [
            path
            for kind in ("ema", "raw")
            for path in self.services.folder.glob(f"{name}.{kind}.*")
        ]
        return sorted(path for path in candidates if path not in paths)


def write_adapter(config: TrainConfig, parts: RunParts, facts: ExportFacts) -> list[Path]:
    """Write the adapter in all requested formats. Each file is read back and compared before it is
    renamed."""
    adapted, names = parts.adapted, parts.names
    layers = converted_layers(config, adapted)
    metadata = file_metadata(config, parts, layers, facts)
    paths: list[Path] = []
    for file_format in config.export.formats or (default_format(parts, layers),):
        exact_content = files.file_content(layers, adapted.model, names, file_format, torch.float32)
        error = verify_content(exact_content, layers, adapted.model, names)
        if not error <= MAX_ERROR:
            raise AdapterError(
                f"--export.formats {file_format}: the file changes the weights by {error:.1e} relative to the trained "
                "update, so it was not kept. Report this with the config"
            )
        content = files.file_content(
            layers, adapted.model, names, file_format, DTYPES[config.lora_dtype]
        )
        content.metadata |= metadata
        content.metadata |= addnet_hashes(
            files.to_bytes(content.tensors, training_metadata(content.metadata))
        )
        path = Path(config.output_dir) / (
            facts.name + file_ending(content, file_format, is_first=not paths)
        )
        paths.append(write_content(path, content))
    return paths


def file_ending(content: FileContent, file_format: str, is_first: bool) -> str:
    """Return what follows the name of an adapter: only further formats are named."""
    if content.config is not None:
        return ".peft"
    return ".safetensors" if is_first else f".{file_format}.safetensors"


def write_content(path: Path, content: FileContent) -> Path:
    """Write a file, or a folder for PEFT, after a bit for bit comparison of what is read back."""
    data = files.to_bytes(content.tensors, content.metadata)
    read_tensors = safetensors.torch.load(data)
    is_same = read_tensors.keys() == content.tensors.keys()
    if not is_same or not all(
        tensor.equal(read_tensors[key]) for key, tensor in content.tensors.items()
    ):
        raise WriteError(path, OSError("it does not read back as it was written"))
    if content.config is None:
        write_file(path, data)
    else:
        with new_folder(path) as partial_path:
            (partial_path / "adapter_model.safetensors").write_bytes(data)
            config_text = json.dumps(content.config, indent=1)
            (partial_path / "adapter_config.json").write_text(config_text, encoding="utf-8")
    return path


def converted_layers(config: TrainConfig, adapted: AdaptedModel) -> Layers:
    """Return the adapter's tensors by layer, converted as `export.convert` says."""
    layers, conversion = files.adapter_layers(adapted), config.export.convert
    if conversion == "none":
        return layers
    weights = {
        name: weight.detach().cpu() for name, weight in files.base_weights(adapted.model).items()
    }
    if conversion == "full":
        return {
            name: convert.full_tensors(tensors, weights[name]) for name, tensors in layers.items()
        }
    if conversion == "lora-exact":
        return {
            name: convert.exact_lora(tensors, weights[name].shape)
            for name, tensors in layers.items()
        }
    return nearest_loras(layers, weights, config.export.svd_rank)


def nearest_loras(layers: Layers, weights: dict[str, Tensor], rank: int) -> Layers:
    """Return the nearest LoRA of each layer, and print the errors. Raises AdapterError naming all
    failed layers."""
    loras: Layers = {}
    errors: dict[str, float] = {}
    failures = []
    for name, tensors in layers.items():
        try:
            loras[name], errors[name] = convert.nearest_lora(tensors, weights[name], rank)
        except AdapterError as error:
            failures.append(f"{name}: {error}")
    if failures:
        raise AdapterError(error_list("--export.convert lora-svd", failures))
    mean = sum(errors.values()) / len(errors)
    worst = max(errors, key=errors.__getitem__)
    print(
        f"lora-svd of rank {rank}: error {mean:.2%} of the update on average, at most {errors[worst]:.2%} ({worst})"
    )
    return loras


def write_merged_model(config: TrainConfig, family: ModelFamily, adapted: AdaptedModel) -> Path:
    """Write output_dir/model_with_lora: the whole pipeline, its denoiser in the dtype of the stored
    base model."""
    path = Path(config.output_dir) / "model_with_lora"
    stored_dtype = family.stored_dtype()
    # sums are computed in fp32 and rounded once; float8 is too coarse for the update
    merged = family.load_denoiser(stored_dtype if stored_dtype.itemsize > 1 else torch.bfloat16)
    adapted.merge_into(merged)
    pipeline = sample_as_trained(family.pipeline(merged), config.objective)
    with new_folder(path) as partial_path:
        pipeline.save_pretrained(partial_path)
    return path


def print_results(
    state: TrainState, share_waiting: float, previous_steps: int, job: ExportJob
) -> None:
    """Print what the run achieved."""
    history = state.history
    validation = history.validation
    if len(validation) > 1:
        first, last = validation[0]["loss"], validation[-1]["loss"]
        print(f"validation loss: {first:.5f} -> {last:.5f} ({100 * (last / first - 1):+.1f} %)")
    if history.skipped_steps:
        print(
            f"skipped because they were not finite: steps {', '.join(map(str, history.skipped_steps))}"
        )
    print(f"waiting for data took {100 * share_waiting:.1f} % of the training time")
    print(f"total steps: {previous_steps} + {state.step} = {previous_steps + state.step}")
    print(f"the adapter has the weights {job.description}")
