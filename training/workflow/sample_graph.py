"""The graph with which ComfyUI draws a sample as the trainer does: with the same noise, noise levels,
guidance and size."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from models.comfy_nodes import ComfyGuidance, ComfyNodes
from models.diffusers_family import DiffusersFamily
from objectives.config import ObjectiveConfig
from objectives.processes import Flow
from objectives.schedulers import ZERO_SNR, scheduler_from_config
from training.workflow.control_nodes import DEFAULT_IMAGE, ControlNodes
from training.workflow.graph import Graph, Node, Output, Value
from training.workflow.model_nodes import DrawnSample, ModelNodes
from training.workflow.samplers import comfy_sampler

CLIP_VISION = "clip_vision_h.safetensors"
NUM_TIMESTEPS = 1000
"""Noise levels of models with ComfyUI's discrete sampling."""
EVEN_SCHEDULE = "ddim_uniform"
LAST_STEP = 10000
CHANGED_BY_EDITOR = re.compile(r"[{}]|//|/\*|\\")
"""Choices in braces, comments and backslashes."""


class Conditioning(NamedTuple):
    """Outputs with the embeddings of a prompt and of its negative prompt."""

    positive: Output
    negative: Output


def sample_graph(
    family: DiffusersFamily, nodes: ComfyNodes, objective: ObjectiveConfig, sample: DrawnSample
) -> Graph:
    """Return the graph of a sample. `nodes`: ComfyUI's nodes of the family.

    `objective`: the run's options. Its prediction_type and zero_terminal_snr change samples."""
    return SampleGraph(family, nodes, objective, sample).build()


class SampleGraph:
    """Builds the graph of a sample."""

    def __init__(
        self,
        family: DiffusersFamily,
        nodes: ComfyNodes,
        objective: ObjectiveConfig,
        sample: DrawnSample,
    ):
        self.family, self.nodes, self.objective, self.sample = family, nodes, objective, sample
        self.graph = Graph()
        self.prompt = sample.prompt
        self.width, self.height = sample.size
        assert self.prompt.guidance_scale is not None  # it is completed
        self.scheduler_config = sampling_config(family.scheduler_config, objective)
        self.guidance: ComfyGuidance = family.comfy_guidance(self.prompt.guidance_scale)

    def build(self) -> Graph:
        model = ModelNodes(self.family, self.nodes, self.sample, self.graph).add(self.objective)
        controls = ControlNodes(self.graph, self.nodes, model.vae, self.sample.control_sizes)
        conditioning = self._encode(model.clip, controls)
        if self.family.has_image_input:
            start = self._start_from_image(model.vae, conditioning)
            conditioning = Conditioning(start.output(0), start.output(1))
            latents = start.output(2)
        else:
            latents = self._empty_latents(model.vae)
        denoised = self._denoise(model.denoisers, conditioning, latents)
        self._save(self._add("VAEDecode", samples=denoised, vae=model.vae).output())
        return self.graph

    def _add(self, kind: str, **inputs: Value) -> Node:
        return self.graph.add(kind, inputs)

    # Conditioning and latents.

    def _encode(self, clip: Output, controls: ControlNodes) -> Conditioning:
        text = self._encode_text(self.prompt.text, clip, controls)
        positive = text
        if self.guidance.distilled is not None:
            node = self._add(
                "FluxGuidance", conditioning=positive, guidance=self.guidance.distilled
            )
            positive = node.output()
        negative_text = self.prompt.negative
        has_no_guidance = self.guidance.cfg == 1
        if has_no_guidance and self.nodes.has_size_scheduler:
            return Conditioning(positive, positive)  # BasicGuider takes no negative
        if has_no_guidance or (negative_text is None and self.nodes.zeroes_missing_negative):
            zeros = self._add("ConditioningZeroOut", conditioning=text)
            return Conditioning(positive, zeros.output())
        if negative_text is None:
            negative_text = str(self.family.preview_options(1.0).get("negative_prompt", ""))
        negative = self._encode_text(negative_text, clip, controls)
        return Conditioning(positive, negative)

    def _encode_text(self, text: str, clip: Output, controls: ControlNodes) -> Output:
        """Add the nodes that encode a text with the control images.

        ComfyUI's editor would change some texts in the node that encodes them."""
        value: Value = without_weights(text)
        if CHANGED_BY_EDITOR.search(text):
            value = self._add("PrimitiveStringMultiline", value=value).output()
        if self.nodes.text_image_node:
            inputs = controls.text_inputs()
            node = self._add(self.nodes.text_image_node, clip=clip, prompt=value, **inputs)
            return controls.with_method(node.output())
        encoded = self._add("CLIPTextEncode", text=value, clip=clip)
        return controls.condition(encoded.output())

    def _latent_size(self) -> dict[str, Value]:
        size: dict[str, Value] = {"width": self.width, "height": self.height, "batch_size": 1}
        if self.family.media == "video":
            size["length"] = self.sample.num_frames
        return size

    def _empty_latents(self, vae: Output) -> Output:
        inputs = self._latent_size()
        if self.nodes.latents == "Wan22ImageToVideoLatent":
            inputs["vae"] = vae
        return self._add(self.nodes.latents, **inputs).output()

    def _start_from_image(self, vae: Output, conditioning: Conditioning) -> Node:
        """Add the node with positive and negative conditioning, and latents, of a first frame."""
        image = self._add("LoadImage", image=DEFAULT_IMAGE).output()
        inputs = self._latent_size()
        if "image_encoder" in self.family.identity_components("vae"):
            vision = self._add("CLIPVisionLoader", clip_name=CLIP_VISION).output()
            encoded = self._add("CLIPVisionEncode", clip_vision=vision, image=image, crop="none")
            inputs["clip_vision_output"] = encoded.output()
        return self._add(
            self.nodes.latents,
            positive=conditioning.positive,
            negative=conditioning.negative,
            vae=vae,
            start_image=image,
            **inputs,
        )

    # Denoising.

    def _denoise(
        self, denoisers: list[Output], conditioning: Conditioning, latents: Output
    ) -> Output:
        if self.nodes.has_size_scheduler:
            return self._denoise_by_size(denoisers[0], conditioning, latents)
        if len(denoisers) > 1:
            return self._denoise_by_experts(denoisers, conditioning, latents)
        inputs: dict[str, Value] = {
            **self._sampler_inputs(),
            "positive": conditioning.positive,
            "negative": conditioning.negative,
            "latent_image": latents,
        }
        num_extra_steps = 0
        if inputs["scheduler"] == EVEN_SCHEDULE:
            num_extra_steps = extra_steps(self._steps)
        if num_extra_steps:
            return self._denoise_from(num_extra_steps, denoisers[0], inputs)
        node = self._add("KSampler", model=denoisers[0], seed=self._seed, **inputs, denoise=1.0)
        return node.output()

    @property
    def _seed(self) -> int:
        assert self.prompt.seed is not None  # it is completed
        return self.prompt.seed

    @property
    def _steps(self) -> int:
        assert self.prompt.num_inference_steps is not None  # it is completed
        return self.prompt.num_inference_steps

    def _sampler_inputs(self) -> dict[str, Value]:
        sampler = comfy_sampler(self.scheduler_config, self.nodes.schedule)
        return {
            "steps": self._steps,
            "cfg": self.guidance.cfg,
            "sampler_name": sampler.sampler,
            "scheduler": sampler.schedule,
        }

    def _denoise_from(self, first_step: int, denoiser: Output, inputs: dict[str, Value]) -> Output:
        """Let ComfyUI leave out its first steps, where its schedule has more of them."""
        node = self._add(
            "KSamplerAdvanced",
            model=denoiser,
            add_noise="enable",
            noise_seed=self._seed,
            **inputs,
            start_at_step=first_step,
            end_at_step=LAST_STEP,
            return_with_leftover_noise="disable",
        )
        return node.output()

    def _denoise_by_experts(
        self, denoisers: list[Output], conditioning: Conditioning, latents: Output
    ) -> Output:
        """Let the expert of high noise draw the first steps, and the other one the rest."""
        switch = self._first_step_of_low_noise()
        ranges = [(0, switch), (switch, self._steps)]
        for position, (first, last) in enumerate(ranges):
            is_first = position == 0
            node = self._add(
                "KSamplerAdvanced",
                model=denoisers[position],
                add_noise="enable" if is_first else "disable",
                noise_seed=self._seed,
                **self._sampler_inputs(),
                positive=conditioning.positive,
                negative=conditioning.negative,
                latent_image=latents,
                start_at_step=first,
                end_at_step=last,
                return_with_leftover_noise="enable" if is_first else "disable",
            )
            latents = node.output()
        return latents

    def _first_step_of_low_noise(self) -> int:
        """Return the first step below the noise level at which the experts change."""
        process = self.family.process(ObjectiveConfig())
        assert isinstance(process, Flow)
        is_low = self.family.config.expert == "low"
        boundary = process.t_range[1] if is_low else process.t_range[0]
        factor = process.shift(0)
        level = factor * boundary / (1 + (factor - 1) * boundary)
        scheduler = scheduler_from_config(self.scheduler_config)
        scheduler.set_timesteps(self._steps)
        timesteps = scheduler.timesteps.tolist()
        return sum(timestep >= level * process.num_train_timesteps for timestep in timesteps)

    def _denoise_by_size(
        self, denoiser: Output, conditioning: Conditioning, latents: Output
    ) -> Output:
        """Add the nodes of FLUX.2, whose noise levels depend on steps and size."""
        if self.guidance.cfg == 1:
            guider = self._add("BasicGuider", model=denoiser, conditioning=conditioning.positive)
        else:
            guider = self._add(
                "CFGGuider",
                model=denoiser,
                positive=conditioning.positive,
                negative=conditioning.negative,
                cfg=self.guidance.cfg,
            )
        noise = self._add("RandomNoise", noise_seed=self._seed)
        sampler = self._add("KSamplerSelect", sampler_name="euler")
        levels = self._add(
            "Flux2Scheduler", steps=self._steps, width=self.width, height=self.height
        )
        node = self._add(
            "SamplerCustomAdvanced",
            noise=noise.output(),
            guider=guider.output(),
            sampler=sampler.output(),
            sigmas=levels.output(),
            latent_image=latents,
        )
        return node.output()

    def _save(self, images: Output) -> None:
        prefix = Path(self.sample.adapter).stem
        if self.sample.num_frames == 1:
            self._add("SaveImage", images=images, filename_prefix=prefix)
            return
        video = self._add("CreateVideo", images=images, fps=self.family.limits.fps)
        self._add(
            "SaveVideo",
            video=video.output(),
            filename_prefix=f"video/{prefix}",
            format="auto",
            codec="auto",
        )


def extra_steps(steps: int) -> int:
    """Return how many steps more than `steps` ComfyUI's even schedule has, in front."""
    spacing = max(NUM_TIMESTEPS // steps, 1)
    num_levels = len(range(1, NUM_TIMESTEPS, spacing))
    return max(num_levels - steps, 0)


def sampling_config(config: dict[str, Any], objective: ObjectiveConfig) -> dict[str, Any]:
    """Return the configuration of the scheduler that draws the samples of a run."""
    if not objective.zero_terminal_snr and not config.get("rescale_betas_zero_snr"):
        return config
    scheduler = scheduler_from_config({**config, **ZERO_SNR})
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def without_weights(text: str) -> str:
    """Return a text in which ComfyUI sees no (weights:1.1)."""
    return re.sub(r"([()])", r"\\\1", text)
