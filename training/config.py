"""Every option of a run. No torch here: `--help` and config errors answer at once.

The node's inputs keep their own names at the root; what goes beyond the node sits in sections. Each field's help is the
docstring under it, and docs/options.md is generated from this file.
"""

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter

from common.strict import STRICT
from data.config import DataConfig
from lora_algos import ALGORITHMS
from lora_algos.config import AdapterConfig
from models.config import ModelConfig
from objectives.config import ObjectiveConfig
from training.optim.registry import NAMED, NODE

if TYPE_CHECKING:
    AlgorithmName = str
    NodeOptimizer = str
    NamedOptimizer = str
else:
    AlgorithmName, NodeOptimizer, NamedOptimizer = (Literal[tuple(names)] for names in (ALGORITHMS, NODE, NAMED))


def name_value_pairs(given: Any) -> Any:
    """`name=value` texts in the order of their names, also from a mapping, as a recipe may have it."""
    if isinstance(given, dict):
        given = [f"{name}={value}" for name, value in given.items()]
    if not isinstance(given, list | tuple):
        return given
    wrong = [pair for pair in given if not re.fullmatch(r"\w+=.*", str(pair))]
    if wrong:
        raise ValueError(f"must be name=value, not {', '.join(map(str, wrong))}")
    names = [str(pair).split("=")[0] for pair in given]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} is given twice")
    return tuple(sorted(map(str, given)))


@dataclass(frozen=True)
class OptimConfig:
    """What the optimizer is told beyond the learning rate."""

    __pydantic_config__ = STRICT

    name: NamedOptimizer | None = None
    """An optimizer beyond ComfyUI's four, in place of `optimizer` (docs/training.md)."""
    args: Annotated[tuple[str, ...], BeforeValidator(name_value_pairs)] = ()
    """Further arguments of the optimizer's class, name=value each; in a recipe a mapping too."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """None: the optimizer's own default (0.01 for AdamW, 0 for the others of ComfyUI)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = None
    """Decay of the running means of the gradient and of its square. None: the optimizer's own (0.9 0.999 for AdamW)."""
    eps: Annotated[float, Field(gt=0)] | None = None
    """Added to the denominator. None: the optimizer's own (1e-8 for AdamW, Adam and RMSprop)."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up; linear and cosine end at zero after the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly from zero."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """The gradient is scaled down to this norm; 0 turns clipping off."""
    text_encoder_learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate of the text encoders' layers, with model.train_text_encoder. None: learning_rate."""
    lr_scale_with_batch: Literal["none", "linear", "sqrt"] = "none"
    """Multiply learning_rate by the samples per step (batch_size x grad_accumulation_steps x processes), or by the
    square root of their number."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does. stop: the run ends at the next log, naming the samples; nothing
    of it is saved. skip: that step changes nothing, and the run goes on."""
    non_finite_limit: Annotated[int, Field(ge=1)] = 10
    """With skip: the run ends when so many steps were skipped."""


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average of the trained weights."""

    __pydantic_config__ = STRICT

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the average that stays in each step, e.g. 0.999; less in the first steps: (1 + step) / (10 + step). 0:
    no average."""
    use: Literal["ema", "raw"] = "ema"
    """Which weights are validated, drawn and exported as the adapter, where there is an average: it, or those trained.
    The others are exported beside as <name>.raw or <name>.ema."""


@dataclass(frozen=True)
class ValidationConfig:
    """The mean squared error of the prediction on held-out images, at fixed noise and fixed noise levels.

    It is the same whatever loss_function, loss space, density, weighting and shift are trained with."""

    __pydantic_config__ = STRICT

    every: Annotated[int, Field(ge=0)] = 0
    """Validate every so many steps, besides before the first and after the last one; 0 means only those two."""
    quantiles: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (
        0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9,
    )  # fmt: skip
    """Noise levels, as quantiles of the model's own noise process: 0 is clean, 1 is pure noise."""
    patience: Annotated[int, Field(ge=0)] = 0
    """End the run when so many validations in a row, of those every `every` steps, brought no improvement; 0: never."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """For patience: by how much the validation loss must fall to count as an improvement."""


@dataclass(frozen=True)
class PreviewConfig:
    """Images drawn before and after training, on the same prompts and the same noise."""

    __pydantic_config__ = STRICT

    enabled: bool = True
    """Draw previews at the end of the run."""
    prompts: tuple[str, ...] = ()
    """Prompts; none means the first four captions of the validation images, or of the training images."""
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 30
    """Denoising steps of each preview."""
    guidance_scale: Annotated[float, Field(ge=0)] = 5.0
    """Strength of classifier-free guidance."""
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] = 0
    """Seed of the preview noise."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, from which a stopped run goes on."""

    __pydantic_config__ = STRICT

    every: Annotated[int, Field(ge=0)] = 100
    """Save every so many steps into output_dir/checkpoints; 0 saves only after the last step."""
    every_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Save also when so much time has gone by since the last checkpoint; 0 turns it off. A file `save` in output_dir
    asks for one at once."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many of the newest checkpoints to keep."""
    best: bool = False
    """Keep in every checkpoint the weights of the lowest validation loss so far, for export.which."""


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes as one run. How many and with what sharding is Accelerate's config."""

    __pydantic_config__ = STRICT

    timeout_minutes: Annotated[float, Field(gt=0)] = 10.0
    """How long a rank waits for another in a collective before the run ends. Encoding and saving do not count."""
    check_every: Annotated[int, Field(ge=0)] = 100
    """Compare checksums of the adapters of all ranks every so many steps and at the end, without waiting for them; 0
    never. The gradients of the first two steps are always compared (not with DeepSpeed, which keeps them in parts)."""


@dataclass(frozen=True)
class TrackingConfig:
    """What is reported while training."""

    __pydantic_config__ = STRICT

    report_to: Literal["none", "wandb", "tensorboard"] = "none"
    """Tracker. wandb runs offline, into output_dir, when no API key is set."""
    project: str = "train-lora"
    """Project of the tracker."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Read the losses from the device, check that they are finite and report them every so many steps."""
    samples: bool = False
    """Write output_dir/samples/rank_<n>.jsonl: for every sample its step, visit, dataset row, quantile and the hash of
    its noise, to compare runs by."""


@dataclass(frozen=True)
class ExportConfig:
    """The files written after the last step."""

    __pydantic_config__ = STRICT

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "lora"
    """The adapter is written to output_dir/<name>.safetensors, further formats to <name>.<format>.safetensors."""
    which: Literal["last", "best"] = "last"
    """The weights after the last step, or those of the step with the lowest validation loss, which are then kept."""
    format: tuple[Literal["kohya", "comfyui", "diffusers", "peft"], ...] = ()
    """Whose keys the file has, one or several; none means what loads in the most programs for the model. kohya:
    ComfyUI, A1111, Forge and, for LoRA, diffusers. comfyui: as ComfyUI's trainer writes. diffusers:
    load_lora_weights, LoRA and DoRA only. peft: a folder <name>.peft for PeftModel, of one algorithm among LoRA,
    DoRA, LoHa, LoKr."""
    convert: Literal["none", "lora-exact", "lora-svd", "full"] = "none"
    """Write the update as another algorithm's. lora-exact: LoHa and LoKr as the same function in a larger LoRA.
    lora-svd: anything as the nearest LoRA of rank svd_rank. full: anything as whole matrices (.diff)."""
    svd_rank: Annotated[int, Field(ge=1)] = 16
    """Rank for lora-svd."""
    trigger: str | None = None
    """Words that call the adapter up, for programs that show them; none means no metadata about it."""
    merged: bool = False
    """Also write output_dir/model_with_lora: the base model with the adapter merged, as a diffusers folder."""


@dataclass(frozen=True)
class TrainConfig:
    """Trains an adapter (LoRA and kin) on a frozen diffusion model."""

    __pydantic_config__ = STRICT

    batch_size: Annotated[int, Field(ge=1, le=10000)] = 1
    """Samples per device in one micro-step."""
    grad_accumulation_steps: Annotated[int, Field(ge=1, le=1024)] = 1
    """Micro-steps per optimizer step."""
    steps: Annotated[int, Field(ge=1, le=100000)] = 16
    """Optimizer steps of this run."""
    learning_rate: Annotated[float, Field(ge=1e-7, le=1)] = 5e-4
    """Peak learning rate."""
    rank: Annotated[int, Field(ge=1, le=128)] = 8
    """Rank of the update. LoKr's factor, OFT's and BOFT's block size are options of their own."""
    optimizer: NodeOptimizer = "AdamW"
    """The optimizer. Others: optim.name."""
    loss_function: Literal["MSE", "L1", "Huber", "SmoothL1", "pseudo-Huber", "log-cosh"] = "MSE"
    """How prediction and target are compared. The first four are the node's. Validation is always MSE."""
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] = 0
    """Decides the adapter's initial weights, the order of the images, their noise and their noise levels."""
    training_dtype: Literal["bf16", "fp32", "none"] = "bf16"
    """bf16: base weights in bf16 and bf16 autocast. fp32: everything in fp32. none: the dtype the base is stored in,
    without autocast (fp16 weights are widened to fp32, where training them would overflow)."""
    lora_dtype: Literal["bf16", "fp32"] = "bf16"
    """dtype of the adapter file. The trained weights and the optimizer state are fp32 either way."""
    algorithm: AlgorithmName = "LoRA"
    """How the update of a weight is parameterised."""
    bypass_mode: Literal["auto", "true", "false"] = "auto"
    """How the update is applied. true: to the activations, factor by factor. false: to the weight. auto: whichever
    costs less in each layer. The same function; where the base is not fp32, its weights are never rounded again."""
    gradient_checkpointing: bool = True
    """Recompute the activations of each block in the backward pass: slower, far less memory."""
    checkpoint_depth: Annotated[int, Field(ge=1, le=5)] = 1
    """Which blocks gradient_checkpointing recomputes: 1 the model's top-level ones, 2 the blocks in these, and so on,
    smaller ones at each level; a branch that ends earlier has its deepest blocks recomputed."""
    checkpoint_policy: Literal["full", "attention-output-kept"] = "full"
    """full: recompute everything in a block. attention-output-kept: all but scaled dot product attention, whose output
    is kept: faster for long sequences, for little memory; not with the math backend, which recomputes all."""
    bucket_mode: bool = True
    """Images keep their shape: each is scaled and cropped to the nearest of a set of sizes of one area. Off: all are
    cropped to squares."""
    existing_lora: str | None = None
    """An adapter to continue, with each layer's own algorithm, rank and alpha: a file of ours, ComfyUI, kohya, LyCORIS
    or diffusers, or a folder of PEFT's. Its steps are counted on."""
    output_dir: str = "output/run"
    """Everything the run writes goes here."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest valid checkpoint in output_dir, if there is one, on however many processes: with the
    same grad_accumulation_steps given, the samples per step stay what they were. never: refuse if there is one."""
    overwrite: bool = False
    """Replace a different run in output_dir, deleting its checkpoints."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    @property
    def optimizer_name(self) -> str:
        return self.optim.name or self.optimizer

    @property
    def keeps_best(self) -> bool:
        return self.checkpoint.best or self.export.which == "best"


SCHEMA = TypeAdapter(TrainConfig)


def to_dict(config: TrainConfig) -> dict:
    """The config as plain YAML and JSON values. `overwrite` is left off: a file to repeat from must not delete."""
    return SCHEMA.dump_python(replace(config, overwrite=False), mode="json", exclude={"overwrite"})


def to_yaml(config: TrainConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)
