"""The nodes with which ComfyUI loads a model and its adapter."""

from dataclasses import dataclass
from typing import NamedTuple

from models.comfy_nodes import ComfyNodes
from models.diffusers_family import DiffusersFamily
from objectives.config import ObjectiveConfig
from objectives.processes import Flow
from training.sampling.prompts import SamplePrompt
from training.workflow import model_names
from training.workflow.graph import Graph, Node, Output, Value

GGUF_ENDING = ".gguf"


@dataclass(frozen=True)
class DrawnSample:
    """A sample of a run."""

    prompt: SamplePrompt
    """With all its options."""
    adapter: str
    """Name of the adapter's file."""
    num_frames: int = 1
    trains_text_encoders: bool = False
    control_sizes: tuple[tuple[int, int], ...] = ()
    """Width and height of each control image."""

    @property
    def size(self) -> tuple[int, int]:
        """Return width and height."""
        assert self.prompt.width is not None  # it is completed
        assert self.prompt.height is not None
        return self.prompt.width, self.prompt.height


class LoadedModel(NamedTuple):
    """Outputs of the nodes that load a model. `denoisers`: two for a model with two experts."""

    denoisers: list[Output]
    clip: Output
    vae: Output


class ModelNodes:
    """Adds the nodes that load a model for a sample."""

    def __init__(
        self, family: DiffusersFamily, nodes: ComfyNodes, sample: DrawnSample, graph: Graph
    ):
        self.family, self.nodes, self.sample, self.graph = family, nodes, sample, graph

    def add(self, objective: ObjectiveConfig) -> LoadedModel:
        """Add the nodes: files, adapter, and noise levels. `objective`: the run's options."""
        model = self._with_adapter(self._load())
        denoisers = []
        for denoiser in model.denoisers:
            leveled = self._with_noise_levels(denoiser, objective)
            denoisers.append(leveled)
        return LoadedModel(denoisers, model.clip, model.vae)

    def _add(self, kind: str, **inputs: Value) -> Node:
        return self.graph.add(kind, inputs)

    def _load(self) -> LoadedModel:
        """Add the nodes that load the base model."""
        names = model_names.base_files(self.family)
        vae_name = model_names.vae_file(self.family, self.nodes)
        encoder_names = model_names.text_encoder_files(self.family, self.nodes)
        if not model_names.is_checkpoint(self.family, self.nodes):
            return self._load_separately(names, encoder_names, vae_name)
        checkpoint = self._add("CheckpointLoaderSimple", ckpt_name=names[0])
        clip = checkpoint.output(1)
        vae = checkpoint.output(2)
        if encoder_names and not model_names.is_whole_checkpoint(self.family):
            clip = self._load_text_encoders(encoder_names)
        if self.family.config.vae is not None:
            vae = self._load_vae(vae_name)
        return LoadedModel([checkpoint.output()], clip, vae)

    def _load_separately(
        self, names: list[str], encoder_names: tuple[str, ...], vae_name: str
    ) -> LoadedModel:
        """Add the nodes that load denoisers, text encoders and VAE from their own files."""
        if encoder_names:
            denoisers = [self._load_denoiser(name) for name in names]
            clip = self._load_text_encoders(encoder_names)
        else:  # a UNet, whose text encoders are in its file
            checkpoint = self._add("CheckpointLoaderSimple", ckpt_name=names[0])
            denoisers = [checkpoint.output()]
            clip = checkpoint.output(1)
        vae = self._load_vae(vae_name)
        return LoadedModel(denoisers, clip, vae)

    def _load_denoiser(self, name: str) -> Output:
        if name.endswith(GGUF_ENDING):
            node = self._add("UnetLoaderGGUF", unet_name=name)
        else:
            node = self._add("UNETLoader", unet_name=name, weight_dtype="default")
        return node.output()

    def _load_vae(self, name: str) -> Output:
        node = self._add("VAELoader", vae_name=name)
        return node.output()

    def _load_text_encoders(self, names: tuple[str, ...]) -> Output:
        kind = self.nodes.text_encoder_type
        if len(names) == 1:
            node = self._add("CLIPLoader", clip_name=names[0], type=kind, device="default")
        elif len(names) == 2:
            node = self._add(
                "DualCLIPLoader",
                clip_name1=names[0],
                clip_name2=names[1],
                type=kind or self.family.name,
                device="default",
            )
        else:
            first, second, third = names
            node = self._add(
                "TripleCLIPLoader", clip_name1=first, clip_name2=second, clip_name3=third
            )
        padding, length = self.nodes.text_padding, self.nodes.text_length
        if not padding and not length:
            return node.output()
        options = self._add(
            "T5TokenizerOptions",
            clip=node.output(),
            min_padding=padding,
            min_length=length,
        )
        return options.output()

    def _with_adapter(self, model: LoadedModel) -> LoadedModel:
        """Add the adapter: to the trained expert, and to the text encoders if they are trained."""
        strength = self.sample.prompt.strength
        assert strength is not None  # it is completed
        denoisers = list(model.denoisers)
        trained = 0
        if len(denoisers) > 1 and self.family.config.expert == "low":
            trained = 1
        if not self.sample.trains_text_encoders:
            node = self._add(
                "LoraLoaderModelOnly",
                model=denoisers[trained],
                lora_name=self.sample.adapter,
                strength_model=strength,
            )
            denoisers[trained] = node.output()
            return LoadedModel(denoisers, model.clip, model.vae)
        node = self._add(
            "LoraLoader",
            model=denoisers[trained],
            clip=model.clip,
            lora_name=self.sample.adapter,
            strength_model=strength,
            strength_clip=strength,
        )
        denoisers[trained] = node.output()
        return LoadedModel(denoisers, node.output(1), model.vae)

    # Noise levels.

    def _with_noise_levels(self, denoiser: Output, objective: ObjectiveConfig) -> Output:
        """Set the shift, or the prediction type, that the trainer's samples are drawn with."""
        process = self.family.process(ObjectiveConfig())
        if isinstance(process, Flow):
            return self._shifted(denoiser, process)
        config = self.family.scheduler_config
        prediction_type: str = objective.prediction_type
        if prediction_type == "auto":
            prediction_type = process.prediction_type
        is_zero_snr = bool(objective.zero_terminal_snr or config.get("rescale_betas_zero_snr"))
        is_plain = prediction_type == "epsilon" and not is_zero_snr
        if is_plain or process.name == "EDM":
            return denoiser
        sampling = "v_prediction" if prediction_type == "v_prediction" else "eps"
        node = self._add(
            "ModelSamplingDiscrete", model=denoiser, sampling=sampling, zsnr=is_zero_snr
        )
        return node.output()

    def _shifted(self, denoiser: Output, process: Flow) -> Output:
        kind = self.nodes.shift
        width, height = self.sample.size
        config = self.family.scheduler_config
        if not kind:
            return denoiser
        if kind == "ModelSamplingFlux" and config.get("use_dynamic_shifting"):
            node = self._add(
                kind,
                model=denoiser,
                max_shift=config.get("max_shift", 1.15),
                base_shift=config.get("base_shift", 0.5),
                width=width,
                height=height,
            )
            return node.output()
        if kind == "ModelSamplingFlux":
            kind = "ModelSamplingAuraFlow"  # its shift does not depend on the image size
        shift = self._shift(process)
        node = self._add(kind, model=denoiser, shift=shift)
        return node.output()

    def _shift(self, process: Flow) -> float:
        """Return the factor on the noise levels for the size of the sample."""
        limits = self.family.limits
        width, height = self.sample.size
        num_frames = 1 + (self.sample.num_frames - 1) // limits.frame_step
        rows = height // limits.latent_step
        columns = width // limits.latent_step
        shape = (1, self.family.latent_channels, num_frames, rows, columns)
        num_tokens = limits.num_tokens(shape)
        return round(process.shift(num_tokens), 4)
