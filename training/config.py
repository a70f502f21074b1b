"""All options of a run. This module imports no torch, so that `--help` and config errors answer at
once.

The inputs of ComfyUI's node keep their own names at the root; everything else is in sections. A
field's help is the docstring under it. docs/options.md is generated from this file.
"""

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter

from common.config_fields import CHANGEABLE, STRICT
from common.text import public_values
from data.config import BlankConfig, CaptionOverrides, DataConfig
from lora_algos import ALGORITHMS
from lora_algos.config import AdapterConfig
from models.config import ModelConfig
from objectives import LOSSES
from objectives.config import ObjectiveConfig
from training.memory.config import MemoryConfig
from training.optim.registry import OPTIMIZERS
from training.output_config import (
    CheckpointConfig,
    ExportConfig,
    HubConfig,
    SampleConfig,
    TrackingConfig,
)

if TYPE_CHECKING:
    AlgorithmName = str
    OptimizerName = str
    LossName = str
else:
    AlgorithmName, OptimizerName, LossName = (
        Literal[tuple(names)] for names in (ALGORITHMS, OPTIMIZERS, LOSSES)
    )


def name_value_pairs(value: Any) -> Any:
    """Return `name=value` texts sorted by name; a mapping, as recipes may have it, is converted."""
    if isinstance(value, dict):
        value = [f"{name}={argument}" for name, argument in value.items()]
    if not isinstance(value, list | tuple):
        return value
    malformed = [str(pair) for pair in value if not re.fullmatch(r"\w+=.*", str(pair))]
    if malformed:
        raise ValueError(f"expected name=value, not {', '.join(malformed)}")
    names = [str(pair).split("=")[0] for pair in value]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} is given twice")
    return tuple(sorted(map(str, value)))


@dataclass(frozen=True)
class OptimConfig:
    """Options of the optimizer and of the learning rate."""

    __pydantic_config__ = STRICT

    args: Annotated[tuple[str, ...], BeforeValidator(name_value_pairs)] = ()
    """Further arguments of the optimizer's class, as name=value. A recipe may use a mapping."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay. None: the optimizer's own default (0.01 for AdamW, 0 for Adam, SGD and
    RMSprop)."""
    betas: (
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None
    ) = None
    """Decay rates of the running averages of the gradient and of its square. None: the optimizer's
    own default (0.9 0.999 for AdamW)."""
    eps: Annotated[float, Field(gt=0)] | None = None
    """Term added to the denominator. None: the optimizer's own default (1e-8 for AdamW, Adam and
    RMSprop)."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up. linear and cosine reach zero after the last
    step."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly from zero."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the gradient to this norm. 0: no clipping."""
    text_encoder_learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate of the text encoders, with model.train_text_encoder. None: learning_rate.
    """
    scale_lr: Literal["none", "linear", "sqrt"] = "none"
    """Multiply learning_rate by the samples per step (batch_size x grad_accumulation_steps x
    processes), or by the square root of this number."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """Action on a NaN or infinite loss or gradient. stop: end the run at the next log and name the
    samples; nothing of the step is saved. skip: leave the weights as they are in this step and
    continue."""
    max_skipped_steps: Annotated[int, Field(ge=1)] = 10
    """With on_non_finite skip: end the run after this many skipped steps."""


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average (EMA) of the trained weights."""

    __pydantic_config__ = STRICT

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the EMA, for example 0.999. The first steps use (1 + step) / (10 + step) where that
    is smaller. 0: no EMA."""
    evaluate_with: Annotated[Literal["ema", "raw"], CHANGEABLE] = "ema"
    """Weights that validation, samples and the exported adapter use, if there is an EMA: the EMA or
    the trained weights. The others are exported too, as <name>.raw or <name>.ema."""


@dataclass(frozen=True)
class ValidationConfig:
    """Validation: the mean squared error of the prediction on held-out images, at fixed noise and
    fixed noise levels.

    It does not depend on loss_function, loss space, timestep sampling, loss weighting and shift."""

    __pydantic_config__ = STRICT

    every: Annotated[int, Field(ge=0), CHANGEABLE] = 0
    """Validate every so many steps, and always before the first and after the last step. 0: only
    then."""
    noise_levels: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1), CHANGEABLE
    ] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Noise levels, as quantiles of the model's own noise process: 0 is clean, 1 is pure noise."""
    patience: Annotated[int, Field(ge=0), CHANGEABLE] = 0
    """Stop early after this many periodic validations in a row without improvement. 0: never."""
    min_delta: Annotated[float, Field(ge=0), CHANGEABLE] = 0.0
    """With patience: the decrease of the validation loss that counts as an improvement."""


@dataclass(frozen=True)
class DistributedConfig:
    """Runs with several processes. Their number and the sharding are set in Accelerate's config."""

    __pydantic_config__ = STRICT

    timeout_minutes: Annotated[float, Field(gt=0)] = 10.0
    """Time that a process waits for the others in a collective before the run ends. Encoding and
    saving do not count."""
    rank_check_every: Annotated[int, Field(ge=0)] = 100
    """Compare checksums of the adapters of all processes every so many steps and at the end,
    without waiting for them. 0: never. The gradients of the first two steps are always compared
    (not with DeepSpeed, which shards them).
    """


@dataclass(frozen=True)
class TrainConfig:
    """Train an adapter (LoRA and its variants) on a frozen diffusion model."""

    __pydantic_config__ = STRICT

    batch_size: Annotated[int, Field(ge=1, le=10000)] = 1
    """Samples per device in one micro-batch."""
    grad_accumulation_steps: Annotated[int, Field(ge=1, le=1024), CHANGEABLE] = 1
    """Micro-batches per optimizer step."""
    steps: Annotated[int, Field(ge=1, le=100000), CHANGEABLE] = 16
    """Optimizer steps of this run."""
    learning_rate: Annotated[float, Field(ge=1e-7, le=1)] = 5e-4
    """Peak learning rate."""
    rank: Annotated[int, Field(ge=1, le=128)] = 8
    """Rank of the update. LoKr's factor and the block size of OFT and BOFT are separate options."""
    optimizer: OptimizerName = "AdamW"
    """The optimizer. The first four are those of ComfyUI's node; docs/training.md describes the
    others."""
    loss_function: LossName = "MSE"
    """Comparison of prediction and target. The first four are those of ComfyUI's node. Validation
    always uses MSE."""
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] = 0
    """Seed of the adapter's initial weights, the order of the images, their noise and their noise
    levels."""
    training_dtype: Literal["bf16", "fp32", "none"] = "bf16"
    """bf16: base weights in bf16, and bf16 autocast. fp32: everything in fp32. none: the dtype in
    which the base model is stored, without autocast (fp16 weights become fp32, because fp16
    training would overflow)."""
    tf32: Annotated[bool, CHANGEABLE] = True
    """On NVIDIA GPUs from 2020 on: multiply fp32 numbers with 10 bits of mantissa instead of 23,
    several times as fast. It concerns the VAE and training in fp32; products in bf16 stay as they
    are."""
    deterministic: Annotated[bool, CHANGEABLE] = False
    """On GPUs: compute the same bits each time, so that a resumed run equals an uninterrupted one
    bit for bit. Slower. Runs on CPUs always do."""
    lora_dtype: Annotated[Literal["bf16", "fp32"], CHANGEABLE] = "bf16"
    """dtype of the adapter file. The trained weights and the optimizer state are always fp32."""
    algorithm: AlgorithmName = "LoRA"
    """Parameterization of the weight update."""
    bypass_mode: Annotated[Literal["auto", "true", "false"], CHANGEABLE] = "auto"
    """Way to compute the update; the result is the same. true: on the activations, factor by
    factor. false: on the weight. auto: the cheaper way in each layer. Base weights that are not
    fp32 are never rounded again."""
    gradient_checkpointing: Annotated[bool, CHANGEABLE] = True
    """Recompute the activations of each block in the backward pass: slower, but needs far less
    memory."""
    checkpoint_depth: Annotated[int, Field(ge=1, le=5), CHANGEABLE] = 1
    """Blocks that gradient_checkpointing recomputes. 1: the top-level blocks of the model. 2: the
    blocks inside these, and so on. Where a branch ends earlier, its deepest blocks are recomputed. UNets
    have their lowest peak at 2, transformers at 1."""
    checkpoint_policy: Annotated[Literal["full", "keep-attention-output"], CHANGEABLE] = "full"
    """full: recompute everything in a block. keep-attention-output: keep the output of scaled dot
    product attention, which saves time for long sequences at little memory. The math backend of
    attention does not support it.
    """
    checkpoint_blocks: Annotated[Annotated[int, Field(ge=1)] | None, CHANGEABLE] = None
    """Number of blocks that gradient_checkpointing recomputes: the first ones in the model's list, which
    includes embeddings. The other blocks are faster, but keep their activations. null: all."""
    compile: Annotated[Literal["none", "blocks", "auto"], CHANGEABLE] = "none"
    """Compile the top-level blocks of the model with torch.compile: faster steps after a slow start.
    Every size of a bucket is compiled. blocks: always. auto: on GPUs with a compiler, if the model is not
    quantized. none: never."""
    bucket_mode: bool = True
    """Keep the aspect ratio of the images: each is scaled and cropped to the nearest of a set of
    sizes with one area. Off: all images are cropped to squares."""
    existing_lora: str | None = None
    """An adapter to continue, with the algorithm, rank and alpha of each layer: a file of this
    trainer, ComfyUI, kohya, LyCORIS or diffusers, or a PEFT folder. Its steps are added to the step
    count."""
    preview: Annotated[bool, CHANGEABLE] = True
    """Draw sample images before and after training and write them to preview.png."""
    output_dir: Annotated[str, CHANGEABLE] = "output/run"
    """Folder of everything that the run writes."""
    resume: Annotated[Literal["auto", "never"], CHANGEABLE] = "auto"
    """auto: resume from the newest valid checkpoint in output_dir, if there is one, with any number
    of processes. The samples per step stay the same if grad_accumulation_steps does. never: raise
    an error if there is a checkpoint.
    """
    overwrite: bool = False
    """Replace a different run in output_dir, and delete its checkpoints."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sample: Annotated[SampleConfig, CHANGEABLE] = field(default_factory=SampleConfig)
    checkpoint: Annotated[CheckpointConfig, CHANGEABLE] = field(default_factory=CheckpointConfig)
    distributed: Annotated[DistributedConfig, CHANGEABLE] = field(default_factory=DistributedConfig)
    tracking: Annotated[TrackingConfig, CHANGEABLE] = field(default_factory=TrackingConfig)
    export: Annotated[ExportConfig, CHANGEABLE] = field(default_factory=ExportConfig)
    hub: Annotated[HubConfig, CHANGEABLE] = field(default_factory=HubConfig)

    @property
    def training_data(self) -> DataConfig:
        """Return `data`; of a slider without images, with a blank image for each target."""
        slider = self.objective.slider
        if not slider.needs_no_images:
            return self.data
        blank_sources = []
        for target in dict.fromkeys(slider.targets):
            captions = CaptionOverrides(
                text=target, trigger="", shuffle=False, tag_dropout=0.0, dropout=0.0
            )
            blank_sources.append(BlankConfig("blank", captions=captions))
        return replace(
            self.data, sources=tuple(blank_sources), validation_fraction=0.0, random_flip=False
        )

    @property
    def draws_samples(self) -> bool:
        return bool(self.preview or self.sample.every or self.sample.grid)

    @property
    def keeps_best_weights(self) -> bool:
        return self.checkpoint.keep_best or self.export.weights == "best"


SCHEMA = TypeAdapter(TrainConfig)


def to_dict(config: TrainConfig) -> dict:
    """Return the config as plain values for YAML and JSON.

    `overwrite` is left out: a config file from which a run is repeated must not delete anything."""
    return SCHEMA.dump_python(replace(config, overwrite=False), mode="json", exclude={"overwrite"})


def to_yaml(config: TrainConfig) -> str:
    return values_to_yaml(to_dict(config))


def public_yaml(config: TrainConfig) -> str:
    """Return a config for files that are published: paths are shortened to names."""
    return values_to_yaml(public_values(to_dict(config)))


def values_to_yaml(values: dict) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
