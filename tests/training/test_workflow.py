"""The workflow for ComfyUI draws what the trainer draws.

tests/fixtures/comfyui_sigmas.json has noise levels that ComfyUI 0.3.64 computed."""

import json
import re
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from helpers.family_cases import (
    SIDE,
    Case,
    cases,
    control_contents,
    family_of,
    folder_of,
    native_tensors,
)
from helpers.project import BASE
from PIL import Image
from safetensors.torch import save_file
from torch.utils._pytree import tree_map_only

from data.precompute.controls import control_pictures
from models.config import ModelConfig
from models.detect import get_family
from models.released import configuration_folder, released_models
from objectives.config import ObjectiveConfig
from training.adapter_names import adapter_names, comfyui_adapter, diffusers_adapter
from training.output_config import SampleConfig
from training.sampling.draw import draw_sample, pipeline_options
from training.sampling.encoded_prompts import encode_prompts, replayed, widened
from training.sampling.prompts import SamplePrompt
from training.workflow import run_workflow
from training.workflow.graph import WIDGET_TYPES, Graph, Output, api_form, node_definitions
from training.workflow.model_names import base_files, downloads, expert_files, known_files
from training.workflow.model_nodes import DrawnSample
from training.workflow.sample_graph import sample_graph
from training.workflow.samplers import comfy_sampler
from training.workflow.ui_form import ui_form

CPU = torch.device("cpu")
PROMPT = SamplePrompt("a (red) fox {or cat}", None, 768, 512, 42, 4.0, 20, 0.8)
OPTIONAL = {
    "device",
    "audio",
    "clip_vision_output",
    "start_image",
    "image",
    "image1",
    "image2",
    "image3",
}
"""Inputs that a node may lack."""
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WITHOUT_WORKFLOW = {
    "stable-diffusion-v1-5/stable-diffusion-inpainting", "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
    "black-forest-labs/FLUX.1-Fill-dev", "CalamitousFelicitousness/Ideogram-4-bf16-Diffusers", "Lightricks/LTX-2",
    "diffusers/LTX-2.3-Diffusers", "Tongyi-MAI/Z-Image-Omni-Base", "black-forest-labs/flux-3-image-klein-base",
}  # fmt: skip
"""Models for which a run writes no workflow."""
HUB_IDS = [hub_id for model in released_models().values() for hub_id in model["hub_ids"]]
RECORDED = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "comfyui_sigmas.json").read_text(encoding="utf-8")
)


def released_family(hub_id):
    """A family by the configurations of a released model; yields in a block."""
    (model,) = [model for model in released_models().values() if hub_id in model["hub_ids"]]
    return configuration_folder(model)


def graph_of(family, prompt=PROMPT, objective=None, **sample) -> Graph:
    drawn = DrawnSample(prompt, "lora.safetensors", **sample)
    return sample_graph(family, family.comfy_nodes, objective or ObjectiveConfig(), drawn)


def inputs_of(graph: Graph, kind: str) -> dict:
    """The inputs of the only node of a kind."""
    (node,) = [node for node in graph.nodes if node.kind == kind]
    return node.inputs


def check_links(graph: Graph) -> None:
    """Each input is there, and each link goes from an earlier node's output of the same type."""
    definitions = node_definitions()
    for node in graph.nodes:
        definition = definitions[node.kind]
        missing_names = definition.inputs.keys() - node.inputs.keys() - OPTIONAL
        assert not missing_names, (node.kind, missing_names)
        for name, value in node.inputs.items():
            if name in definition.links:
                assert isinstance(value, Output), (node.kind, name)
            if isinstance(value, Output):
                assert value.node < node.number
                source = definitions[graph.nodes[value.node - 1].kind]
                assert source.outputs[value.slot] == definition.inputs[name]
    used_nodes = {source.node for node in graph.nodes for source in node.sources.values()}
    unused = [node.kind for node in graph.nodes[:-1] if node.number not in used_nodes]
    assert not unused


def editor_to_server(editor: dict) -> dict:
    """What ComfyUI's editor sends to its server: checked once against the editor itself."""
    links = {link[0]: [str(link[1]), link[2]] for link in editor["links"]}
    result = {}
    for node in editor["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        values = iter(node["widgets_values"])
        inputs = {}
        has_choices = node["type"] == "CLIPTextEncode"
        for name, kind in node_definitions()[node["type"]].inputs.items():
            slots = [slot for slot in node["inputs"] if slot["name"] == name]
            if kind in WIDGET_TYPES:
                inputs[name] = next(values)
                assert not (has_choices and re.search(r"[{}]|//|/\*", str(inputs[name])))
            if kind in ("SEED", "UPLOAD"):
                next(values)
            if slots and slots[0]["link"] is not None:
                inputs[name] = links[slots[0]["link"]]
        result[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return result


@pytest.mark.parametrize("hub_id", [name for name in HUB_IDS if name not in WITHOUT_WORKFLOW])
def test_the_workflow_of_every_released_model(hub_id):
    with released_family(hub_id) as folder:
        family = get_family(ModelConfig(path=str(folder)))
        num_frames = 17 if family.media == "video" else 1
        graph = graph_of(family, num_frames=num_frames)
    check_links(graph)
    editor = ui_form(graph, "a note", downloads())
    assert editor_to_server(editor) == api_form(graph)
    text = json.dumps(editor)
    assert "a \\\\(red\\\\) fox {or cat}" in text, "ComfyUI would read a weight"
    assert str(folder) not in text
    positions = [tuple(node["pos"]) for node in editor["nodes"]]
    assert len({*positions}) == len(positions)


@pytest.mark.parametrize("hub_id", [name for name in HUB_IDS if name not in WITHOUT_WORKFLOW])
def test_released_models_have_names_in_comfyui(hub_id):
    if "turbo" in hub_id:
        return  # ComfyUI has no usual name for it
    for name in known_files()["hub_ids"][hub_id]:
        assert name.endswith(".safetensors")


@pytest.mark.parametrize(
    "case", [case for case in cases() if not case.has_mask], ids=str
)  # models that paint masks have no workflow
def test_the_noise_is_that_of_comfyui(case: Case, monkeypatch):
    """Also if the text encoders are so large that they are loaded in bf16."""
    family = family_of(case)
    prompt = SamplePrompt("a red fox").completed(0, SIDE, SampleConfig(num_inference_steps=1))
    prompt = replace(prompt, seed=7)
    controls = control_pictures(control_contents(case.controls), "white")
    encoded = encode_prompts(family, ModelConfig(), [prompt], CPU, [controls])
    in_bf16 = tree_map_only(torch.Tensor, rounded, encoded[0])
    pipeline = family.pipeline(family.load_denoiser(torch.float32), with_text_encoders=False)
    options = pipeline_options(family, pipeline, prompt, controls)
    num_frames = 1
    if family.has_image_input:
        num_frames = 5
        options |= {"image": Image.new("RGB", (SIDE, SIDE), "green"), "num_frames": num_frames}
    noises = []
    original = torch.randn

    def recorded(*args, **arguments):
        noise = original(*args, **arguments)
        if arguments.get("generator") is not None:
            noises.append(noise)
        return noise

    monkeypatch.setattr(torch, "randn", recorded)
    with replayed(pipeline, in_bf16, CPU):
        draw_sample(pipeline, prompt, options)
    monkeypatch.undo()
    limits = family.limits
    sides = (prompt.height // limits.latent_step, prompt.width // limits.latent_step)
    num_latent_frames = 1 + (num_frames - 1) // limits.frame_step
    size = family.latent_channels * num_latent_frames * sides[0] * sides[1]
    # ComfyUI's comfy.sample.prepare_noise
    expected = torch.randn(size, generator=torch.manual_seed(7), dtype=torch.float32)
    assert torch.equal(noises[0].flatten(), expected)


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


def test_recorded_embeddings_are_replayed_in_fp32():
    class Pipeline:
        pass

    encoded = [(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bool))]
    pipeline = Pipeline()
    with replayed(pipeline, encoded, torch.device("cpu")):
        embeds, mask = pipeline.encode_prompt("text")
    assert embeds.dtype is torch.float32
    assert mask.dtype is torch.bool
    assert widened(torch.tensor([1])).dtype is torch.int64


def recorded_sigmas(schedule: str, steps: int, model_sampling: str, **facts) -> np.ndarray:
    (row,) = [
        row
        for row in RECORDED
        if (row["schedule"], row["steps"], row["model_sampling"])
        == (schedule, steps, model_sampling)
        and all(row[name] == value for name, value in facts.items())
    ]
    return np.array(row["sigmas"])


@pytest.mark.parametrize("steps", [8, 20, 30])
def test_noise_levels_of_flow_matching_are_comfyuis(steps):
    """The pipelines give linear levels, SD3's lets the scheduler make them."""
    linear = np.linspace(1, 1 / steps, steps)
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(sigmas=linear)
    comfy = recorded_sigmas("simple", steps, "flow", shift=3.0)
    assert np.abs(euler.sigmas.numpy() - comfy).max() < 0.002
    euler.set_timesteps(steps)
    comfy = recorded_sigmas("normal", steps, "flow", shift=3.0)
    assert np.abs(euler.sigmas.numpy() - comfy).max() < 2e-5
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic.set_timesteps(sigmas=linear, mu=0.9)
    comfy = recorded_sigmas("simple", steps, "flux")
    assert np.abs(dynamic.sigmas.numpy() - comfy).max() < 2e-4
    comfy = recorded_sigmas("simple", steps, "flow", shift=2.459603)
    assert np.abs(dynamic.sigmas.numpy() - comfy).max() < 0.002
    unipc = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    unipc.set_timesteps(steps)
    comfy = recorded_sigmas("sgm_uniform", steps, "flow")
    assert np.abs(unipc.sigmas.numpy() - comfy).max() < 0.006


@pytest.mark.parametrize(
    ("class_name", "options", "steps"),
    [
        ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}, 20),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 20),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, 20),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, 30),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 20),
        ("DPMSolverMultistepScheduler", {}, 20),
        ("DPMSolverMultistepScheduler", {}, 30),
    ],
)
def test_noise_levels_of_ddpm_are_comfyuis(class_name, options, steps):
    scheduler = getattr(diffusers, class_name)(**SD_BETAS, **options)
    scheduler.set_timesteps(steps)
    config = {**scheduler.config, "_class_name": class_name}
    schedule = comfy_sampler(config, "").schedule
    comfy = recorded_sigmas(schedule, steps, "discrete")
    levels = scheduler.sigmas.numpy()
    assert np.abs(levels[:-1] / comfy[:-1] - 1).max() < 0.006


def test_schedules_by_the_defaults_of_diffusers():
    assert comfy_sampler({"_class_name": "DDIMScheduler"}, "") == ("ddim", "ddim_uniform")
    assert comfy_sampler({"_class_name": "PNDMScheduler"}, "") == ("deis", "ddim_uniform")
    assert comfy_sampler({"_class_name": "LMSDiscreteScheduler"}, "") == ("lms", "normal")
    assert comfy_sampler({"_class_name": "NewScheduler"}, "").sampler == "euler"
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert comfy_sampler(flow, "normal") == ("euler", "normal")


def test_guidance_of_families():
    """Distilled models have no classifier-free guidance; Z-Image counts from 0."""
    facts = {}
    for hub_id in (
        "black-forest-labs/FLUX.1-dev",
        "black-forest-labs/FLUX.1-schnell",
        "Tongyi-MAI/Z-Image",
        "Qwen/Qwen-Image",
    ):
        with released_family(hub_id) as folder:
            graph = graph_of(get_family(ModelConfig(path=str(folder))))
        guided = [node.inputs["guidance"] for node in graph.nodes if node.kind == "FluxGuidance"]
        facts[hub_id.split("/")[1]] = (inputs_of(graph, "KSampler")["cfg"], guided)
    assert facts == {
        "FLUX.1-dev": (1.0, [4.0]),
        "FLUX.1-schnell": (1.0, []),
        "Z-Image": (5.0, []),
        "Qwen-Image": (4.0, []),
    }


def test_the_shift_is_that_of_the_size():
    with released_family("Qwen/Qwen-Image") as folder:
        family = get_family(ModelConfig(path=str(folder)))
        graph = graph_of(family)
    num_tokens = (768 // 16) * (512 // 16)
    mu = 0.5 + (num_tokens - 256) * (0.9 - 0.5) / (8192 - 256)
    shift = inputs_of(graph, "ModelSamplingAuraFlow")["shift"]
    assert shift == pytest.approx(np.exp(mu), rel=1e-4)


EDIT_NODES = {
    "black-forest-labs/FLUX.1-Kontext-dev": (
        1,
        ["LoadImage", "FluxKontextImageScale", "VAEEncode", "CLIPTextEncode", "ReferenceLatent", "FluxGuidance"],
    ),
    "black-forest-labs/FLUX.2-klein-base-4B": (
        2,
        ["LoadImage", "VAEEncode", "LoadImage", "ImageScaleToTotalPixels", "VAEEncode",
         "PrimitiveStringMultiline", "CLIPTextEncode", "ReferenceLatent", "ReferenceLatent",
         "CLIPTextEncode", "ReferenceLatent", "ReferenceLatent"],
    ),
    "Qwen/Qwen-Image-Edit": (1, ["LoadImage", "TextEncodeQwenImageEdit", "TextEncodeQwenImageEdit"]),
    "Qwen/Qwen-Image-Edit-2511": (
        2,
        ["LoadImage", "LoadImage", "TextEncodeQwenImageEditPlus", "FluxKontextMultiReferenceLatentMethod",
         "TextEncodeQwenImageEditPlus", "FluxKontextMultiReferenceLatentMethod"],
    ),
}  # fmt: skip
"""Number of control images, and some of the nodes in their order, as in ComfyUI's own templates."""


@pytest.mark.parametrize("hub_id", EDIT_NODES)
def test_control_images_are_given_as_in_comfyuis_templates(hub_id):
    count, expected = EDIT_NODES[hub_id]
    sizes = ((640, 480), (2048, 1024))[:count]
    with released_family(hub_id) as folder:
        graph = graph_of(get_family(ModelConfig(path=str(folder))), control_sizes=sizes)
    check_links(graph)
    kinds = [node.kind for node in graph.nodes]
    position = 0
    for kind in expected:
        position = kinds.index(kind, position) + 1
    assert "Choose the control images" in run_workflow.note_text(graph, "euler")
    assert editor_to_server(ui_form(graph, "note", {})) == api_form(graph)


@pytest.mark.parametrize("expert", ["high", "low"])
def test_two_experts(expert):
    (case,) = [case for case in cases() if str(case) == f"wan2.2-{expert}"]
    family = family_of(case)
    graph = graph_of(family, replace(PROMPT, width=SIDE, height=SIDE))
    check_links(graph)
    high, low = [node for node in graph.nodes if node.kind == "KSamplerAdvanced"]
    assert high.inputs["end_at_step"] == low.inputs["start_at_step"]
    assert high.inputs["add_noise"] == "enable"
    assert low.inputs["add_noise"] == "disable"
    shift = family.scheduler_config["flow_shift"]
    fractions = 1 - np.arange(20) / 20
    levels = shift * fractions / (1 + (shift - 1) * fractions)
    assert high.inputs["end_at_step"] == (levels >= family.boundary).sum()
    (adapter,) = [node for node in graph.nodes if node.kind == "LoraLoaderModelOnly"]
    (sampling,) = [
        node
        for node in graph.nodes
        if node.kind == "ModelSamplingSD3" and node.inputs["model"] == adapter.output()
    ]
    trained = high if expert == "high" else low
    assert trained.inputs["model"] == sampling.output()


def test_prediction_types_and_trained_text_encoders():
    family = get_family(ModelConfig(path=str(BASE)))
    prompt = replace(PROMPT, width=64, height=64, negative="blurry")
    objective = ObjectiveConfig(prediction_type="v_prediction", zero_terminal_snr=True)
    graph = graph_of(family, prompt, objective, trains_text_encoders=True)
    check_links(graph)
    assert inputs_of(graph, "ModelSamplingDiscrete")["sampling"] == "v_prediction"
    assert inputs_of(graph, "ModelSamplingDiscrete")["zsnr"] is True
    assert inputs_of(graph, "LoraLoader")["strength_clip"] == 0.8
    positive, negative = [node for node in graph.nodes if node.kind == "CLIPTextEncode"]
    assert isinstance(positive.inputs["text"], Output)
    assert inputs_of(graph, "PrimitiveStringMultiline")["value"] == "a \\(red\\) fox {or cat}"
    assert negative.inputs["text"] == "blurry"
    sampler = inputs_of(graph, "KSampler")
    assert (sampler["sampler_name"], sampler["scheduler"]) == ("ddim", "simple"), (
        "of trailing steps"
    )


def test_names_of_base_models():
    family = get_family(ModelConfig(path=str(BASE)))
    assert base_files(family) == [f"{Path(BASE).name}.safetensors"]
    expert = "Wan2.2_LowNoise_14B_fp8.safetensors"
    assert expert_files(expert, "low") == [
        expert.replace("Low", "high"),
        expert.replace("Low", "low"),
    ]
    assert expert_files("wan_HIGH.gguf", "high") == ["wan_HIGH.gguf", "wan_HIGH_low_noise.gguf"]


def test_the_adapter_that_a_program_reads():
    names = adapter_names("lora", ["peft", "diffusers", "kohya"])
    assert comfyui_adapter(names, reads_diffusers=True) == "lora.kohya.safetensors"
    assert diffusers_adapter(names) == "lora.diffusers.safetensors"
    names = adapter_names("lora", ["diffusers"])
    assert comfyui_adapter(names, reads_diffusers=True) == "lora.safetensors"
    assert comfyui_adapter(names, reads_diffusers=False) is None
    assert comfyui_adapter(adapter_names("lora", ["peft"]), reads_diffusers=True) is None
    assert comfyui_adapter(adapter_names("lora", []), reads_diffusers=False) == "lora.safetensors"


@pytest.mark.parametrize("steps", [20, 30])
def test_even_steps_are_those_of_the_trainer(steps):
    """ComfyUI has one more of 30, the first, which is left out."""
    scheduler = diffusers.EulerDiscreteScheduler(
        **SD_BETAS, timestep_spacing="leading", steps_offset=1
    )
    scheduler.set_timesteps(steps)
    comfy = recorded_sigmas("ddim_uniform", steps, "discrete")
    family = get_family(ModelConfig(path=str(BASE)))
    graph = graph_of(family, replace(PROMPT, width=64, height=64, num_inference_steps=steps))
    samplers = [node for node in graph.nodes if node.kind.startswith("KSampler")]
    first = samplers[0].inputs.get("start_at_step", 0)
    assert first == {20: 0, 30: 1}[steps]
    assert np.abs(scheduler.sigmas.numpy()[:-1] / comfy[first:-1] - 1).max() < 2e-4


@pytest.mark.parametrize("has_vae", [False, True])
def test_a_denoiser_alone_is_no_checkpoint(has_vae, tmp_path):
    (case,) = [case for case in cases() if str(case) == "sd3"]
    tensors = native_tensors(case, "model.diffusion_model.")
    if has_vae:
        tensors["first_stage_model.decoder.conv_in.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "sd3.safetensors")
    config = ModelConfig(path=str(tmp_path / "sd3.safetensors"), config=str(folder_of(case)))
    graph = graph_of(get_family(config), replace(PROMPT, width=SIDE, height=SIDE))
    check_links(graph)
    kinds = {node.kind for node in graph.nodes}
    assert ("CheckpointLoaderSimple" in kinds) == has_vae
    assert ({"UNETLoader", "VAELoader"} <= kinds) == (not has_vae)


def test_a_run_writes_its_workflow(options, run_here, tmp_path):
    drawn = ["--sample.every=2", "--sample.num_inference_steps=2", "--export.every=4"]
    assert run_here([*options, *drawn, "--sample.prompts", "a cat --d 9", "a dog"]) == 0
    folder = tmp_path / "out"
    server = json.loads((folder / "workflow_api.json").read_text())
    editor = json.loads((folder / "workflow.json").read_text())
    assert editor_to_server(editor) == server
    (sampler,) = [node for node in server.values() if node["class_type"] == "KSampler"]
    assert (sampler["inputs"]["seed"], sampler["inputs"]["steps"]) == (9, 2)
    (adapter,) = [node for node in server.values() if "lora_name" in node["inputs"]]
    assert (folder / adapter["inputs"]["lora_name"]).is_file()
    assert str(tmp_path) not in json.dumps(editor)
    names, notes = {}, {}
    for step in (2, 4, 6):
        with Image.open(folder / "samples" / f"lora-step{step:08d}_01.png") as image:
            drawn_graph = json.loads(image.text["workflow"])
        values = [node["widgets_values"] for node in drawn_graph["nodes"]]
        assert ["a dog"] in values
        notes[step] = values[0][0]
        texts = [str(value[0]) for value in values if value]
        (names[step],) = [
            text for text in texts if text.endswith(".safetensors") and "lora" in text
        ]
    assert names[4] == "lora-step00000004.safetensors"
    assert names[2] == names[6] == "lora.safetensors"
    assert "The adapter of step 2 was not exported" in notes[2]
    assert "not exported" not in notes[4] + notes[6]


def test_a_sample_before_training_is_the_base_model(options, run_here, tmp_path):
    drawn = ["--sample.every=1", "--sample.at_start", "--sample.num_inference_steps=1", "--steps=1"]
    assert run_here([*options, *drawn]) == 0
    with Image.open(tmp_path / "out" / "samples" / "lora-step00000000_00.png") as image:
        graph = json.loads(image.text["workflow"])
        assert "Lora" not in image.text["parameters"]
    (loader,) = [node for node in graph["nodes"] if node["type"] == "LoraLoaderModelOnly"]
    assert loader["widgets_values"] == ["lora.safetensors", 0.0]


def test_a_long_prompt_has_a_remark():
    family = get_family(ModelConfig(path=str(BASE)))
    remarks = run_workflow.prompt_remarks(family, SamplePrompt("owl " * 100))
    assert remarks == ["The trainer cuts this prompt after 22 tokens. ComfyUI does not."]
    assert run_workflow.prompt_remarks(family, SamplePrompt("owl")) == []


def test_an_outdated_workflow_is_removed(options, run_here, tmp_path):
    assert run_here([*options, "--steps=1"]) == 0
    assert (tmp_path / "out" / "workflow.json").is_file()
    assert run_here([*options, "--steps=2", "--export.formats", "diffusers"]) == 0
    assert not (tmp_path / "out" / "workflow.json").exists()
    assert not (tmp_path / "out" / "workflow_api.json").exists()


def test_a_run_without_samples_has_a_workflow_too(options, run_here, tmp_path):
    assert run_here([*options, "--steps=1", "--export.formats", "kohya"]) == 0
    assert (tmp_path / "out" / "workflow.json").is_file()


def test_an_error_does_not_end_the_run(options, run_here, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no nodes")

    monkeypatch.setattr(run_workflow, "sample_graph", fail)
    drawn = ["--steps=1", "--sample.every=1", "--sample.num_inference_steps=1"]
    assert run_here([*options, *drawn]) == 0
    output = capsys.readouterr().out
    assert "note: workflow.json was not written: RuntimeError: no nodes" in output
    assert (tmp_path / "out" / "lora.safetensors").is_file()
    assert [*(tmp_path / "out" / "samples").glob("*_00.png")]
