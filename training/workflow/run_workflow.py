"""The workflow of a run: the graph of a sample, with a note that says which files it needs."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from common.atomic import write_file
from models.base import ModelFamily
from models.diffusers_family import DiffusersFamily
from models.families.transformer_family import TransformerFamily
from models.families.unet_family import UNetFamily
from training.adapter_names import adapter_names, comfyui_adapter
from training.components import RunComponents
from training.run_folder import STEP_SUFFIX, WORKFLOW, WORKFLOW_API
from training.sampling.prepare import has_unused_negatives, run_prompts, sample_frames
from training.sampling.prompts import SamplePrompt
from training.workflow.graph import Graph, api_form
from training.workflow.model_names import downloads
from training.workflow.model_nodes import DrawnSample
from training.workflow.sample_graph import sample_graph
from training.workflow.ui_form import file_names, ui_form

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
DEFAULT_CONTROL_SIDE = 1024
TEXT_ENCODER_FOLDER = "text_encoders"
IMAGE_ENCODERS = {"ReferenceLatent", "TextEncodeQwenImageEdit", "TextEncodeQwenImageEditPlus"}
"""Nodes that give a model control images."""


@dataclass(frozen=True)
class Workflow:
    """A graph for ComfyUI in both of its forms."""

    editor: dict[str, Any]
    """As ComfyUI's editor opens it."""
    server: dict[str, Any]
    """As ComfyUI's server takes it."""


def write_run_workflow(components: RunComponents) -> list[Path]:
    """Write the workflow of the first sample, with the exported adapter; return the paths.

    An error is printed: the run is worth more than its workflow. Earlier workflows are removed."""
    folder = Path(components.config.output_dir)
    try:
        workflow = first_workflow(components)
        if workflow is not None:
            return write_workflow(workflow, folder)
    except Exception as error:
        print(f"note: {WORKFLOW} was not written: {type(error).__name__}: {error}")
    for name in (WORKFLOW, WORKFLOW_API):
        (folder / name).unlink(missing_ok=True)
    return []


def first_workflow(components: RunComponents) -> Workflow | None:
    """Return the workflow of the first sample; None if the run has no sample for ComfyUI."""
    adapter = exported_adapter(components, components.config.export.name)
    prompts = sample_prompts(components)
    if adapter is None or not prompts:
        return None
    first_prompt = prompts[0]
    first_controls: list[Image.Image] = []
    controls = sample_controls(components)
    if controls:
        first_controls = controls[0]
    return run_workflow(components, first_prompt, adapter, first_controls)


def exported_adapter(components: RunComponents, name: str) -> str | None:
    """Return the exported file that ComfyUI reads. `name`: of the adapter, perhaps with a step."""
    names = adapter_names(name, components.config.export.formats)
    return comfyui_adapter(names, reads_diffusers_names(components.family))


def reads_diffusers_names(family: ModelFamily) -> bool:
    """Return whether ComfyUI reads the family's files in diffusers' format."""
    return isinstance(family, TransformerFamily) and family.comfyui_reads_diffusers


def sample_prompts(components: RunComponents) -> list[SamplePrompt]:
    """Return the prompts of the run's samples, also of a run that draws none."""
    if components.samples is not None:
        return components.samples.prompts
    family, datasets = components.family, components.datasets
    dataset = datasets.validation or datasets.train
    prompts = run_prompts(components.config, family, dataset)
    if has_unused_negatives(family, prompts):
        prompts = [replace(prompt, negative=None) for prompt in prompts]
    return prompts


def sample_controls(components: RunComponents) -> list[list[Image.Image]]:
    """Return the control images of each sample; none for a run that draws no samples."""
    if components.samples is None:
        return []
    return components.samples.controls


def step_workflows(components: RunComponents, step: int) -> list[str]:
    """Return a workflow of each sample of a step, for ComfyUI's editor; empty texts without workflows.

    It loads the adapter of that step if it was exported, else that of the end of the run. At step 0 its
    strength is 0."""
    config = components.config
    prompts = sample_prompts(components)
    texts = [""] * len(prompts)
    controls = sample_controls(components)
    if step == 0 and config.existing_lora is not None:
        return texts
    export = config.export
    name, remark = export.name, ""
    if 0 < step < config.steps:
        if export.every and step % export.every == 0:
            name += STEP_SUFFIX.format(step)
        else:
            remark = (
                f"The adapter of step {step} was not exported, so this draws with that of the end of "
                "the run."
            )
    adapter = exported_adapter(components, name)
    if adapter is None:
        return texts
    for number, prompt in enumerate(prompts):
        if step == 0:
            prompt = replace(prompt, strength=0.0)
        images = controls[number] if controls else []
        workflow = run_workflow(components, prompt, adapter, images, remark)
        if workflow is not None:
            texts[number] = json.dumps(workflow.editor)
    return texts


def run_workflow(
    components: RunComponents,
    prompt: SamplePrompt,
    adapter: str,
    controls: Sequence[Image.Image] = (),
    remark: str = "",
) -> Workflow | None:
    """Return the workflow that draws a sample; None if ComfyUI's nodes of the model are not known.

    `adapter`: name of a file that ComfyUI reads. `controls`: the sample's control images. `remark`:
    for the note, may be empty."""
    config = components.config
    family = components.family
    nodes = family.comfy_nodes
    if nodes is None or not isinstance(family, DiffusersFamily):
        return None
    num_frames = sample_frames(config, family)
    sample = DrawnSample(
        prompt=prompt,
        adapter=adapter,
        num_frames=num_frames,
        trains_text_encoders=config.model.train_text_encoder,
        control_sizes=control_sizes(family, controls),
    )
    graph = sample_graph(family, nodes, config.objective, sample)
    remarks = [remark, nodes.difference, *prompt_remarks(family, prompt)]
    scheduler = str(family.scheduler_config["_class_name"])
    note = note_text(graph, scheduler, remarks, prompt)
    return Workflow(
        editor=ui_form(graph, note, downloads()),
        server=api_form(graph),
    )


def control_sizes(
    family: DiffusersFamily, controls: Sequence[Image.Image]
) -> tuple[tuple[int, int], ...]:
    """Return the size of each control image. Without any, a model that needs one has the usual number."""
    sizes = [image.size for image in controls]
    is_missing = not sizes and family.controls.is_required
    if is_missing:
        usual_size = (DEFAULT_CONTROL_SIDE, DEFAULT_CONTROL_SIDE)
        sizes = [usual_size] * family.controls.usual_count
    return tuple(sizes)


def prompt_remarks(family: DiffusersFamily, prompt: SamplePrompt) -> list[str]:
    """Return what ComfyUI does otherwise with a prompt: UNets see it cut after 75 tokens."""
    if not isinstance(family, UNetFamily):
        return []
    texts = [prompt.text, prompt.negative or ""]
    counts, limit = family.count_tokens(texts)
    if max(counts) <= limit:
        return []
    return [f"The trainer cuts this prompt after {limit} tokens. ComfyUI does not."]


def write_workflow(workflow: Workflow, folder: Path) -> list[Path]:
    """Write both forms of a workflow; return their paths."""
    contents = {WORKFLOW: workflow.editor, WORKFLOW_API: workflow.server}
    paths = []
    for name, content in contents.items():
        path = folder / name
        write_file(path, json.dumps(content, indent=1))
        paths.append(path)
    return paths


def note_text(
    graph: Graph,
    scheduler: str,
    remarks: Iterable[str] = (),
    prompt: SamplePrompt | None = None,
) -> str:
    """Return the note of a graph: which files it needs, and what is not the same.

    `scheduler`: class of diffusers with which the trainer draws. `remarks`: empty ones are left out."""
    lines = [
        "## A sample, drawn like the trainer's",
        "",
        "Prompt, noise, size, steps and guidance are those of the sample. ComfyUI computes in another "
        "precision, so details may differ.",
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
    if kinds & IMAGE_ENCODERS:
        names = ", ".join(f"`{Path(path).name}`" for path in prompt.controls) if prompt else ""
        files = f": {names}" if names else ""
        lines += ["", f"Choose the control images of the sample in the nodes Load Image{files}."]
    elif "LoadImage" in kinds:
        lines += ["", "Choose the first frame of the video in the node Load Image."]
    samplers = {node.inputs.get("sampler_name") for node in graph.nodes} - {None}
    for sampler in samplers:
        lines += ["", f"`{sampler}` is ComfyUI's nearest sampler to {scheduler} of diffusers."]
    for remark in remarks:
        if remark:
            lines += ["", remark]
    return "\n".join(lines)
