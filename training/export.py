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
from common.dtypes import DTYPES
from common.errors import AdapterError, error_list
from common.precision import exact_products
from lora_algos.full import DIFF
from lora_algos.traits import Layers
from objectives.schedulers import override_scheduler
from training.adapter_names import adapter_name
from training.build import on_one_process
from training.checkpoints.best import BestWeights
from training.components import RunComponents
from training.config import EmaConfig, TrainConfig
from training.distributed.sharding import is_sharded
from training.metadata import ExportFacts, file_metadata
from training.reporting.image_grid import grid_png
from training.reporting.loss_files import loss_json, loss_png
from training.reporting.trackers import log_images
from training.run_folder import LOSS_CHART, LOSS_FILE, PREVIEW
from training.sampling.control_images import with_control_row
from training.sampling.files import padded_stills
from training.sampling.grid import SampleGrid
from training.sampling.renderer import SampleRenderer
from training.sampling.samples import Samples, Weights, WeightSet
from training.services import RunServices
from training.train_state import TrainState
from training.workflow.run_workflow import write_run_workflow


@dataclass(frozen=True)
class ExportJob:
    """Weights to export."""

    weights: Weights
    step: int
    description: str
    """Description of the weights, such as "after step 400"."""
    suffix: str = ""
    """Appended to the name of the files."""


def export_jobs(config: TrainConfig, state: TrainState, services: RunServices) -> list[ExportJob]:
    """Return the adapter's weights, and with an EMA the other ones of EMA and trained weights.
    Collective."""
    main = main_average(config.ema)
    averages = [main]
    if config.ema.decay:
        other = {"raw", "ema"}.difference(averages)
        averages += other
    if config.export.weights == "best" and state.best is not None:
        return [best_job(config, state, state.best, main)]
    if config.export.weights == "best":
        services.reporter.say(
            f"no validation loss was finite: the weights after step {state.step} are exported"
        )
    jobs: list[ExportJob] = []
    for average in averages:
        weights = services.ema.evaluation_state(average)
        description = f"{average_name(config.ema, average)}after step {state.step}"
        suffix = ""
        if jobs:
            suffix = f".{average}"
        job = ExportJob(weights, state.step, description, suffix)
        jobs.append(job)
    return jobs


def best_job(config: TrainConfig, state: TrainState, best: BestWeights, average: str) -> ExportJob:
    """Return the job of the weights with the lowest validation loss."""
    losses = {entry["step"]: entry["loss"] for entry in state.history.validation}
    loss = losses[best.step]
    prefix = average_name(config.ema, average)
    description = (
        f"{prefix}after step {best.step} of {state.step}, "
        f"which has the lowest validation loss, {loss:.5f}"
    )
    return ExportJob(best.weights, best.step, description)


def main_average(config: EmaConfig) -> str:
    """Return the weights that are evaluated and exported as the adapter: ema or raw."""
    if not config.decay:
        return "raw"
    return config.evaluate_with


def average_name(config: EmaConfig, average: str) -> str:
    if average == "ema":
        return f"EMA of decay {config.decay:g}, "
    return ""


def check_export(components: RunComponents) -> None:
    """Raise AdapterError if a requested file format cannot hold the adapter. WHEN: before training."""
    conversion = components.config.export.convert
    if conversion == "lora-svd":
        return  # the file will hold a LoRA, which all formats support
    model = components.adapted.model
    layers: Layers = {}
    if conversion == "full":
        for name, weight in files.base_weights(model).items():
            layers[name] = {DIFF: weight}
    else:
        layers = converted_layers(components)
    for name, tensors in layers.items():
        layers[name] = files.shapes_only(tensors)
    for file_format in export_formats(components, layers):
        files.build_content(layers, model, components.names, file_format)


def export_formats(components: RunComponents, layers: Layers) -> tuple[str, ...]:
    """Return the requested file formats, or the one that most programs load for this model and
    adapter."""
    formats = components.config.export.formats
    if formats:
        return formats
    preferred = preferred_format(
        components.family.layer_names.file_formats, layers, components.names
    )
    return (preferred,)


class RunExport:
    """Writes the files of a finished run: first the adapter, then the preview, whose drawing may
    fail."""

    def __init__(
        self,
        components: RunComponents,
        services: RunServices,
        state: TrainState,
        renderer: SampleRenderer | None,
    ):
        self.config, self.components = components.config, components
        self.services, self.state, self.renderer = services, state, renderer
        self.total_steps = components.previous_steps + state.step
        self.jobs: list[ExportJob] = []

    def collect_weights(self) -> None:
        """Collect the weights to export. Collective."""
        self.jobs = export_jobs(self.config, self.state, self.services)

    @exact_products()  # files are compared with the adapter to the sixth digit
    def write(self, share_waiting: float) -> None:
        """Write all files but the preview, and print the results. WHERE: on the main process.

        `share_waiting`: part of the training time that went into waiting for data."""
        components = self.components
        if is_sharded(self.services.accelerator):
            components = on_one_process(components)
        paths = [*self._write_adapters(components), *self._write_losses()]
        paths += write_run_workflow(components)
        if self.config.export.merged_model:
            paths.append(write_merged_model(components))
        previous_steps = components.previous_steps
        print_results(self.state, share_waiting, previous_steps, self.jobs[0])
        for path in paths:
            print(f"wrote {path}")
        for path in self.outdated_files(paths):
            print(f"note: {path} is from an earlier run, which exported other weights too")

    def _write_adapters(self, components: RunComponents) -> list[Path]:
        paths: list[Path] = []
        # the main weights last, because the merged model is made of those that are loaded last
        for job in reversed(self.jobs):
            components.adapted.load_state_dict(job.weights)
            facts = export_facts(components, self.state, job)
            paths += write_adapter(components, facts)
        return paths

    def draw_preview(self, initial_weights: dict[str, Tensor]) -> bool:
        """Draw and write the preview; return whether a signal ended this, on all processes alike.

        Collective. `initial_weights`: the weights before training."""
        assert self.renderer is not None  # the config asks for a preview
        trained_weights = self.jobs[0].weights
        weight_sets = {
            "before": WeightSet(initial_weights),
            "after": WeightSet(trained_weights),
        }
        samples = self.renderer.render(weight_sets)
        if samples is not None:
            self._write_preview(samples)
        return self.renderer.was_stopped

    def draw_grids(self) -> bool:
        """Draw and write the grids of steps and strengths; return whether a signal ended this."""
        assert self.renderer is not None  # the config asks for grids
        grid = SampleGrid(self.renderer, self.services)
        return grid.draw(self.state.step)

    def _write_losses(self) -> list[Path]:
        folder = self.services.folder
        history = self.state.history
        json_path = folder / LOSS_FILE
        write_file(json_path, loss_json(history, self.total_steps))
        png_path = folder / LOSS_CHART
        write_file(png_path, loss_png(history))
        return [json_path, png_path]

    def _write_preview(self, samples: Samples) -> None:
        services = self.services
        path = services.folder / PREVIEW
        rows = {}
        tracked_images = {}
        for label, images in samples.images.items():
            rows[label] = padded_stills(images)
            tracked_images[f"preview/{label}"] = rows[label]
        texts = [prompt.text for prompt in samples.prompts]
        grid = grid_png(with_control_row(rows, samples.controls), texts)
        write_file(path, grid)
        log_images(services.accelerator, tracked_images, self.total_steps)
        print(f"wrote {path}")

    def outdated_files(self, paths: list[Path]) -> list[Path]:
        """Return files of an earlier run, which exported other weights, that this run did not
        replace."""
        name = self.config.export.name
        folder = self.services.folder
        candidates: set[Path] = set()
        for average in ("ema", "raw"):
            pattern = f"{name}.{average}.*"
            candidates.update(folder.glob(pattern))
        candidates.difference_update(paths)
        return sorted(candidates)


def export_facts(components: RunComponents, state: TrainState, job: ExportJob) -> ExportFacts:
    """Return what a file's metadata says about the weights of a job."""
    config = components.config
    return ExportFacts(
        name=config.export.name + job.suffix,
        total_steps=components.previous_steps + job.step,
        total_batch_size=config.batch_size * state.micro_batches_per_step,
        started_at=state.started_at,
        weights=job.description,
    )


def write_adapter(components: RunComponents, facts: ExportFacts) -> list[Path]:
    """Write the adapter in all requested formats. Each file is read back and compared before it is
    renamed."""
    config, adapted, names = components.config, components.adapted, components.names
    layers = converted_layers(components)
    metadata = file_metadata(components, layers, facts)
    paths: list[Path] = []
    output_dir = Path(config.output_dir)
    for position, file_format in enumerate(export_formats(components, layers)):
        exact_content = files.file_content(layers, adapted.model, names, file_format, torch.float32)
        error = verify_content(exact_content, layers, adapted.model, names)
        if not error <= MAX_ERROR:
            raise AdapterError(
                f"--export.formats {file_format}: the file changes the weights by {error:.1e} "
                "relative to the trained update, so it was not kept. Report this with the config"
            )
        content = files.file_content(
            layers, adapted.model, names, file_format, DTYPES[config.lora_dtype]
        )
        content.metadata |= metadata
        hashed_bytes = files.to_bytes(content.tensors, training_metadata(content.metadata))
        content.metadata |= addnet_hashes(hashed_bytes)
        file_name = adapter_name(facts.name, file_format, position)
        path = write_content(output_dir / file_name, content)
        paths.append(path)
    return paths


def write_content(path: Path, content: FileContent) -> Path:
    """Write a file, or a folder for PEFT, after a bit for bit comparison of what is read back."""
    data = files.to_bytes(content.tensors, content.metadata)
    if not are_equal(safetensors.torch.load(data), content.tensors):
        raise WriteError(path, OSError("it does not read back as it was written"))
    if content.config is None:
        write_file(path, data)
    else:
        with new_folder(path) as partial_path:
            (partial_path / "adapter_model.safetensors").write_bytes(data)
            config_text = json.dumps(content.config, indent=1)
            (partial_path / "adapter_config.json").write_text(config_text, encoding="utf-8")
    return path


def are_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Return whether two sets of tensors have the same names and the same bits."""
    if first.keys() != second.keys():
        return False
    return all(tensor.equal(second[name]) for name, tensor in first.items())


def converted_layers(components: RunComponents) -> Layers:
    """Return the adapter's tensors by layer, converted as `export.convert` says."""
    adapted, options = components.adapted, components.config.export
    layers = files.adapter_layers(adapted)
    conversion = options.convert
    if conversion == "none":
        return layers
    weights = files.base_weights(adapted.model)
    if conversion == "lora-svd":
        return nearest_loras(layers, weights, options.svd_rank)
    converted: Layers = {}
    for name, tensors in layers.items():
        if conversion == "full":
            converted[name] = convert.full_tensors(tensors, host_copy(weights[name]))
        else:
            converted[name] = convert.exact_lora(tensors, weights[name].shape)
    return converted


def host_copy(weight: Tensor) -> Tensor:
    """Return a weight on the CPU. Call this for one layer at a time: the base model may be large."""
    return weight.detach().cpu()


def nearest_loras(layers: Layers, weights: dict[str, Tensor], rank: int) -> Layers:
    """Return the nearest LoRA of each layer, and print the errors. Raises AdapterError naming all
    failed layers."""
    loras: Layers = {}
    errors: dict[str, float] = {}
    failures = []
    for name, tensors in layers.items():
        try:
            weight = host_copy(weights[name])
            loras[name], errors[name] = convert.nearest_lora(tensors, weight, rank)
        except AdapterError as error:
            failures.append(f"{name}: {error}")
    if failures:
        message = error_list("--export.convert lora-svd", failures)
        raise AdapterError(message)
    mean = sum(errors.values()) / len(errors)
    worst_layer = max(errors, key=errors.__getitem__)
    worst = errors[worst_layer]
    print(
        f"lora-svd of rank {rank}: error {mean:.2%} of the update on average, "
        f"at most {worst:.2%} ({worst_layer})"
    )
    return loras


def write_merged_model(components: RunComponents) -> Path:
    """Write output_dir/model_with_lora: the whole pipeline, its denoiser in the dtype of the stored
    base model."""
    config, family = components.config, components.family
    path = Path(config.output_dir) / "model_with_lora"
    stored_dtype = family.files.denoiser_dtype()
    # sums are computed in fp32 and rounded once; float8 is too coarse for the update
    merged = family.load_denoiser(stored_dtype if stored_dtype.itemsize > 1 else torch.bfloat16)
    components.adapted.merge_into(merged)
    pipeline = override_scheduler(family.pipeline(merged), config.objective)
    with new_folder(path) as partial_path:
        pipeline.save_pretrained(partial_path)
    return path


def print_results(
    state: TrainState, share_waiting: float, previous_steps: int, job: ExportJob
) -> None:
    """Print what the run achieved."""
    history = state.history
    losses = [entry["loss"] for entry in history.validation]
    if len(losses) > 1:
        first, last = losses[0], losses[-1]
        percent = 100 * (last / first - 1)
        print(f"validation loss: {first:.5f} -> {last:.5f} ({percent:+.1f} %)")
    if history.skipped_steps:
        skipped = ", ".join(map(str, history.skipped_steps))
        print(f"skipped because they were not finite: steps {skipped}")
    print(f"waiting for data took {100 * share_waiting:.1f} % of the training time")
    if previous_steps:
        total_steps = previous_steps + state.step
        print(
            f"total steps: {previous_steps} of the existing adapter + {state.step} = {total_steps}"
        )
    print(f"the adapter has the weights {job.description}")
