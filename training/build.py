"""Builds the denoiser with its adapters, and the engine, from a config."""

from collections import Counter
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from adapter_files.spellings import LayerSpellings, layer_spellings
from common.errors import AdapterError, ConfigError, ModelError, error_list
from data.prompts import ExtraPrompts, slider_texts
from lora_algos.adapted_model import AdaptedModel
from lora_algos.attach import attach, attach_from_file, check_specs
from lora_algos.plan import AdapterPlan
from lora_algos.traits import Layers
from models.base import ModelFamily
from models.block_format import BlockFormat
from models.blocks import inner_blocks
from models.detect import get_family
from models.quantization import quantize_blocks
from objectives.objective import Objective
from training import block_offload, compilation, gradient_checkpointing
from training.activation_offload import ActivationCopier
from training.adapter_source import read_source
from training.assistant import attach_assistant, read_assistant
from training.checkpoints.best import validation_errors
from training.components import RunComponents
from training.config import TrainConfig
from training.distributed.accelerator import sharding_engines
from training.distributed.engine import Engine
from training.distributed.sharding import is_sharded, shard_base
from training.memory.config import MemoryConfig
from training.metadata import total_steps_of
from training.optim.arguments import optimizer_errors
from training.optim.schedule import build_optimizer

BASE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "none": None}


def load_family(config: TrainConfig) -> ModelFamily:
    """Return the family of the base model. WHEN: before anything is encoded or loaded.

    Raises ConfigError or ModelError for options that do not fit together or to the model."""
    errors = [*optimizer_errors(config), *validation_errors(config)]
    if config.compile == "blocks" and config.model.quantization != "none":
        errors.append(
            "--compile blocks: does not work with --model.quantization yet. Use --compile none, or "
            "--model.quantization none"
        )
    errors += config.memory.errors(config.gradient_checkpointing)
    if errors:
        raise ConfigError(error_list("cannot train", errors))
    family = get_family(config.model)
    if config.model.quantization == "none" and family.files.is_quantized:
        check_quantized_file(config)
    Objective(family.process(config.objective), config.objective)
    return family


def extra_prompts(config: TrainConfig, family: ModelFamily) -> ExtraPrompts:
    """Return the prompts that the objective needs besides the captions. Raises ConfigError if the
    model cannot be trained with them."""
    preserve, slider = config.objective.preserve, config.objective.slider
    used_options = []
    if preserve.weight:
        used_options.append(f"--objective.preserve.weight {preserve.weight:g}")
    if slider.targets:
        used_options.append("--objective.slider.targets")
    if used_options and family.controls.is_seen_by_text_encoder:
        raise ConfigError(
            f"{' and '.join(used_options)}: the text encoder of {family.name} sees images with each "
            "prompt, so a prompt alone has no meaning. Remove the option"
        )
    if slider.needs_no_images:
        check_drawing_from_noise(config, family)
    texts = slider_texts(slider)
    if preserve.weight and not preserve.class_word:
        texts = (*texts, *preserve.prompts)
    class_word = preserve.class_word if preserve.weight else ""
    return ExtraPrompts(tuple(dict.fromkeys(texts)), class_word)


def check_drawing_from_noise(config: TrainConfig, family: ModelFamily) -> None:
    """Raise ConfigError if a model cannot draw training samples from noise and prompts alone."""
    if config.data.frames > 1:
        raise ConfigError(
            f"--data.frames {config.data.frames}: a slider from noise is trained on single frames. Set "
            "--data.frames 1, or use --objective.slider.start_from images with videos"
        )
    reasons = []
    if family.controls.is_required:
        reasons.append("needs a control image")
    if family.sample_conditioning:
        reasons.append("is also given images or masks")
    if family.process(config.objective).t_range[1] < 1:
        reasons.append("is only trained below a noise level, and pure noise is above it")
    if reasons:
        raise ConfigError(
            f"--objective.slider.start_from noise: the model {' and '.join(reasons)}. Use "
            "--objective.slider.start_from images, with --data.path"
        )


def check_quantized_file(config: TrainConfig) -> None:
    """Raise ConfigError if an option does not work with a model whose file has quantized weights."""
    subject = f"--model.path {config.model.path}: has quantized weights, with which"
    if config.compile == "blocks":
        raise ConfigError(f"{subject} --compile blocks does not work. Use --compile none")
    for engine in sharding_engines():
        raise ConfigError(f"{subject} {engine} does not work. Use ddp.yaml, or a model in bf16")


def format_notes(config: TrainConfig, family: ModelFamily) -> list[str]:
    """Return notes on formats of weights that are not what a user expects."""
    notes = []
    quantization = config.model.quantization
    if quantization != "none" and family.files.is_quantized:
        notes.append(
            "note: the weights in the model's file are quantized already. --model.quantization "
            f"{quantization} rounds them a second time"
        )
    encoder_quantization = config.model.text_encoder_quantization
    if encoder_quantization != "none" and not family.files.quantized_encoders:
        notes.append(
            f"note: --model.text_encoder_quantization {encoder_quantization} has no effect: no text "
            "encoder of this model has over a billion parameters"
        )
    return notes


def slider_notes(config: TrainConfig, family: ModelFamily) -> list[str]:
    """Return a note if a slider draws with guidance from a distilled model."""
    slider = config.objective.slider
    if not slider.uses_guidance or not (family.has_guidance_input or family.is_distilled):
        return []
    return [
        f"note: models of {family.name} may be distilled, and --objective.slider.guidance "
        f"{slider.guidance:g} is meant for models that are not. Set it to 1 for those that are"
    ]


def load_denoiser(
    config: TrainConfig, family: ModelFamily, device: torch.device, contiguous: bool = False
) -> tuple[nn.Module, torch.dtype]:
    """Return the base model on the CPU, and the dtype of its weights, which its inputs must have.

    `device`: the device of the training. `contiguous`: keep the memory layout of all weights."""
    dtype = BASE_DTYPES[config.training_dtype]
    blocks = BlockFormat(config.model.quantization, device, keeps_stored_format=True)
    denoiser = family.load_denoiser(dtype, blocks)
    dtype = prepare_denoiser(config, family, denoiser, device, contiguous)
    return denoiser, dtype


def prepare_denoiser(
    config: TrainConfig,
    family: ModelFamily,
    denoiser: nn.Module,
    device: torch.device,
    contiguous: bool = False,
) -> torch.dtype:
    """Quantize, compile and checkpoint the blocks of a denoiser as `load_denoiser` does; return the
    dtype of its weights."""
    is_quantized = family.block_storage is not None
    is_compiled = not is_quantized and compilation.uses_compiler(config.compile, device)
    dtype = most_common_dtype(denoiser)
    if config.model.quantization != "none":
        blocks = family.blocks(denoiser, depth=1)
        quantize_blocks(blocks, config.model.quantization, device)
    if not contiguous:
        # convolutions read channels-last weights without a copy, on GPUs with tensor cores and on
        # CPUs
        for layer in denoiser.modules():
            if isinstance(layer, nn.Conv2d):
                layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if is_compiled:
        compilation.apply(family.blocks(denoiser, depth=1))
    if config.gradient_checkpointing:
        checkpoint_blocks(config, family, denoiser, device)
    denoiser.train()
    return dtype


def checkpoint_blocks(
    config: TrainConfig, family: ModelFamily, denoiser: nn.Module, device: torch.device
) -> None:
    """Let blocks be recomputed in the backward pass, and offload the weights of some of them."""
    all_blocks = family.blocks(denoiser, config.checkpoint_depth)
    blocks = gradient_checkpointing.first_blocks(all_blocks, config.checkpoint_blocks)
    candidates = list(inner_blocks(blocks).values())
    number = config.memory.num_offloaded(len(candidates))
    block_offload.apply(block_offload.evenly_spaced(candidates, number), device)
    copier = ActivationCopier(device) if config.memory.offload_activations else None
    gradient_checkpointing.apply(
        denoiser,
        blocks,
        config.checkpoint_policy,
        config.adapter.has_dropout,
        copier,
    )


def most_common_dtype(denoiser: nn.Module) -> torch.dtype:
    """Return the dtype of most weights: some models keep a few in fp32."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in denoiser.parameters():
        counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0]


def attach_adapters(
    config: TrainConfig,
    family: ModelFamily,
    denoiser: nn.Module,
    names: LayerSpellings,
    assistant: Layers | None = None,
) -> tuple[AdaptedModel, int]:
    """Attach new adapters, or those of `existing_lora`; return them and the steps of the existing
    adapter.

    `assistant`: the assistant LoRA; None: that of the options."""
    plan = adapter_plan(config)
    if assistant is None:
        assistant = read_assistant(config.model, denoiser, names)
    if config.existing_lora is not None:
        adapted, previous_steps = attach_existing(
            config.existing_lora, family, denoiser, names, plan
        )
    else:
        adapted = attach(denoiser, plan.specs(denoiser, family.targets), config.seed)
        previous_steps = 0
    if names.text_encoders and not any(name in names.text_encoders for name in adapted.layers()):
        raise AdapterError(
            "--model.train_text_encoder: no layer of a text encoder is adapted. The file of "
            "--existing_lora has none, or no pattern of --adapter.targets matches one"
        )
    for name in family.idle_layers(denoiser):
        denoiser.get_submodule(name).requires_grad_(False)
    if not adapted.named_parameters():
        raise AdapterError(
            "--adapter.targets: no prediction depends on the matching layers. Choose other layers"
        )
    attach_assistant(denoiser, assistant)
    return adapted, previous_steps


def adapter_plan(config: TrainConfig) -> AdapterPlan:
    """Return the plan of new adapters."""
    return AdapterPlan(config.adapter, config.algorithm, config.rank, config.bypass_mode)


def check_adapters(config: TrainConfig, family: ModelFamily) -> None:
    """Raise AdapterError if no adapter of this config fits the model. WHEN: before encoding, which
    takes long. Reads no weights of the model."""
    if config.model.train_text_encoder:
        return  # the empty model has no text encoders
    if config.adapter.train_norms and not family.layer_names.comfyui_loads_norms:
        raise ModelError(
            f"--adapter.train_norms: ComfyUI does not load the norms of {family.name}. Remove the "
            "option"
        )
    denoiser = family.empty_denoiser()
    plan = adapter_plan(config)
    names = layer_spellings(family, denoiser)
    read_assistant(config.model, denoiser, names)
    if config.existing_lora is None:
        check_specs(denoiser, plan.specs(denoiser, family.targets))
    else:
        attach_existing(config.existing_lora, family, denoiser, names, plan)


def attach_existing(
    path: str, family: ModelFamily, denoiser: nn.Module, names: LayerSpellings, plan: AdapterPlan
) -> tuple[AdaptedModel, int]:
    """Attach the adapters of a file; return them and the steps for which they were trained."""
    advice = "Use --model.train_text_encoder to continue these"
    try:
        source = read_source(path, denoiser, names, advice)
        adapted = attach_from_file(denoiser, source.layers, source.errors, plan, family.targets)
    except AdapterError as error:
        raise AdapterError(f"--existing_lora {path}: {error}") from error
    return adapted, total_steps_of(path, source.metadata)


def build_engine(accelerator: Accelerator, components: RunComponents) -> Engine:
    """Build the engine that Accelerate's config selects, with the optimizer."""
    config, adapted = components.config, components.adapted
    denoiser = adapted.model
    for block in block_offload.offloaded_blocks(denoiser):
        block.host_weights.take_back()
    optimizer = build_optimizer(adapted, config)
    if is_sharded(accelerator):
        plugin = accelerator.state.fsdp_plugin
        assert plugin is not None
        shard_base(plugin, accelerator.device, components.family, adapted)
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        from training.distributed.deepspeed import ZeroEngine

        return ZeroEngine(config, accelerator, denoiser, adapted, optimizer)
    return Engine(config.optim, accelerator, denoiser, adapted, optimizer)


def on_one_process(components: RunComponents) -> RunComponents:
    """Return the components with the adapters on a whole copy of the base model, on the CPU.

    Each process holds a part of a sharded base model, but some files depend on whole weights."""
    config, family = components.config, components.family
    plain_config = replace(
        config, compile="none", gradient_checkpointing=False, memory=MemoryConfig()
    )
    denoiser, _ = load_denoiser(plain_config, family, torch.device("cpu"))
    adapted, _ = attach_adapters(config, family, denoiser, components.names, assistant={})
    adapted.load_state_dict(components.adapted.state_dict())
    return replace(components, adapted=adapted)
