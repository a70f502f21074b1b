"""The workflow of a run: the graph of a sample, with a note that says which files it needs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.atomic import write_file
from models.diffusers_family import DiffusersFamily
from training.components import RunComponents
from training.run_folder import STEP_SUFFIX, WORKFLOW, WORKFLOW_API
from training.sampling.prepare import run_prompts, sample_frames
from training.sampling.prompts import SamplePrompt
from training.workflow.graph import Graph, api_form
from training.workflow.model_names import downloads
from training.workflow.model_nodes import DrawnSample
from training.workflow.sample_graph import sample_graph
from training.workflow.ui_form import file_names, ui_form

COMFYUI_FORMATS = ("comfyui", "kohya", "diffusers")
"""Formats of adapter files that ComfyUI reads, the best one first."""
FOLDERS = {
    "CheckpointLoaderSimple": "checkpoints",
    "CLIPVisionLoader": "clip_vision",
    "LoraLoader": "loras",
    "LoraLoaderModelOnly": "loras",
    "UNETLoader": "diffusion_models",
    "UnetLoaderGGUF": "diffusion_models",
    "VAELoader": "vae",
}
"""Node -> ComfyUI's folder with the files that it loads."""
TEXT_ENCODER_FOLDER = "text_encoders"


@dataclass(frozen=True)
class Workflow:
    """A graph for ComfyUI in both of its forms."""

    editor: dict[str, Any]
    """As ComfyUI's editor opens it."""
    server: dict[str, Any]
    """As ComfyUI's server takes it."""


def write_run_workflow(components: RunComponents) -> list[Path]:
    """Write the workflow of the first sample, with the exported adapter; return the paths.

    An error is printed: the run is worth more than its workflow."""
    config = components.config
    adapter = comfyui_adapter(config.export.name, config.export.formats)
    prompts = sample_prompts(components)
    if adapter is None or not prompts:
        return []
    try:
        workflow = run_workflow(components, prompts[0], adapter)
        if workflow is None:
            return []
        return write_workflow(workflow, Path(config.output_dir))
    except Exception as error:
        print(f"note: {WORKFLOW} was not written: {type(error).__name__}: {error}")
        return []


def sample_prompts(components: RunComponents) -> list[SamplePrompt]:
    """Return the prompts of the run's samples, also of a run that draws none."""
    if components.samples is not None:
        return components.samples.prompts
    datasets = components.datasets
    dataset = datasets.validation or datasets.train
    return run_prompts(components.config, components.family, dataset)


def step_workflows(components: RunComponents, step: int) -> list[str]:
    """Return a workflow of each sample of a step, for ComfyUI's editor; empty texts without workflows.

    It loads the adapter of that step if it was exported, else that of the end of the run."""
    config = components.config
    prompts = sample_prompts(components)
    export = config.export
    is_exported = bool(export.every) and step > 0 and step % export.every == 0
    name = export.name + (STEP_SUFFIX.format(step) if is_exported else "")
    adapter = comfyui_adapter(name, export.formats)
    texts = []
    for prompt in prompts:
        workflow = None
        if adapter is not None:
            workflow = run_workflow(components, prompt, adapter)
        texts.append(json.dumps(workflow.editor) if workflow is not None else "")
    return texts


def run_workflow(components: RunComponents, prompt: SamplePrompt, adapter: str) -> Workflow | None:
    """Return the workflow that draws a sample; None if ComfyUI's nodes of the model are not known.

    `adapter`: name of a file that ComfyUI reads."""
    config, family = components.config, components.family
    if family.comfy_nodes is None or not isinstance(family, DiffusersFamily):
        return None
    num_frames = sample_frames(config, family)
    sample = DrawnSample(prompt, adapter, num_frames, config.model.train_text_encoder)
    graph = sample_graph(family, family.comfy_nodes, config.objective, sample)
    note = note_text(graph, str(family.scheduler_config["_class_name"]))
    return Workflow(ui_form(graph, note, downloads()), api_form(graph))


def write_workflow(workflow: Workflow, folder: Path) -> list[Path]:
    """Write both forms of a workflow; return their paths."""
    contents = {WORKFLOW: workflow.editor, WORKFLOW_API: workflow.server}
    paths = []
    for name, content in contents.items():
        path = folder / name
        write_file(path, json.dumps(content, indent=1))
        paths.append(path)
    return paths


def comfyui_adapter(name: str, formats: tuple[str, ...]) -> str | None:
    """Return the name of an exported file that ComfyUI reads; None if there is no such file.

    `name`: of the adapter. `formats`: export.formats, which may be empty."""
    if not formats:
        return f"{name}.safetensors"
    for file_format in COMFYUI_FORMATS:
        if file_format in formats:
            is_first = formats[0] == file_format
            return f"{name}.safetensors" if is_first else f"{name}.{file_format}.safetensors"
    return None


def note_text(graph: Graph, scheduler: str) -> str:
    """Return the note of a graph: which files they need, and what is not the same.

    `scheduler`: class of diffusers with which the trainer draws."""
    lines = [
        "## A sample, drawn like the trainer's",
        "",
        "Noise, size, steps, guidance and noise levels are those of the sample. ComfyUI computes "
        "in another precision, so details may differ.",
        "",
        "Files in ComfyUI's folder `models`:",
        "",
    ]
    for node in graph.nodes:
        folder = FOLDERS.get(node.kind, TEXT_ENCODER_FOLDER)
        for name in file_names(node):
            lines.append(f"- `{folder}/{name}`")
    lines += ["", "If your file of the base model has another name, choose it in its node."]
    kinds = {node.kind for node in graph.nodes}
    if "UnetLoaderGGUF" in kinds:
        lines += ["", "GGUF files need the custom nodes ComfyUI-GGUF."]
    if "LoadImage" in kinds:
        lines += ["", "Choose the first frame of the video in the node Load Image."]
    samplers = {node.inputs.get("sampler_name") for node in graph.nodes} - {None}
    for sampler in samplers:
        lines += ["", f"`{sampler}` is ComfyUI's nearest sampler to {scheduler} of diffusers."]
    return "\n".join(lines)
